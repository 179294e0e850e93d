"""A small iSNS server (RFC 4171), written against the standard and not against our client: it keeps what is
registered, forgets when told to, and answers what it is told to answer."""

import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

EID, PROTOCOL, PERIOD, ADDRESS, PORT, NAME, TYPE, ALIAS, GROUP_ADDRESS, GROUP_PORT, GROUP_TAG = (
    1, 2, 6, 16, 17, 32, 33, 34, 49, 50, 51,
)  # fmt: skip
REGISTER, QUERY, DEREGISTER = 1, 2, 4
REPLACE, LAST, FIRST = 0x1000, 0x0800, 0x0400


class Entity:
    """What one host has registered."""

    def __init__(self, attributes: list[tuple[int, bytes]]) -> None:
        self.portals: set[tuple[str, int]] = set()
        self.targets: dict[str, dict[int, set[tuple[str, int]]]] = {}
        """Name → portal group tag → where."""
        self.aliases: dict[str, str] = {}
        self.period_s = 0
        name, tag, host = "", 0, ""
        for number, value in attributes:
            match number:
                case 2:
                    assert value == struct.pack("!I", 2), "the entity protocol is iSCSI"
                case 6:
                    self.period_s = int.from_bytes(value, "big")
                case 16 | 49:
                    host = shown(value)
                case 17:
                    self.portals.add((host, int.from_bytes(value, "big")))
                case 32:
                    name = value.rstrip(b"\0").decode()
                    self.targets[name] = {}
                case 33:
                    assert value == struct.pack("!I", 1), "the node is a target"
                case 34:
                    self.aliases[name] = value.rstrip(b"\0").decode()
                case 51:
                    tag = int.from_bytes(value, "big")
                    self.targets[name][tag] = set()
                case 50:
                    self.targets[name][tag].add((host, int.from_bytes(value, "big")))


def shown(value: bytes) -> str:
    assert len(value) == 16
    if value.startswith(bytes(10) + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, value[12:])
    return socket.inet_ntop(socket.AF_INET6, value)


def cut(payload: bytes) -> list[tuple[int, bytes]]:
    found = []
    while payload:
        tag, length = struct.unpack_from("!II", payload)
        assert length % 4 == 0 and 8 + length <= len(payload)
        found.append((tag, payload[8 : 8 + length]))
        payload = payload[8 + length :]
    return found


class IsnsServer:
    """Listens on a port of the loopback; ``entities`` is what is registered now."""

    def __init__(self, port: int = 0) -> None:
        self.entities: dict[str, Entity] = {}
        self.requests: list[int] = []
        """Functions, as they came."""
        self.pdus = 0
        self.answer: Callable[[int, int], bytes] | None = None
        """(function, transaction) → bytes said in place of a right answer."""
        self.changed = threading.Condition()
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outer._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_until(self, true: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(true, 20), (self.requests, self.entities)

    def targets(self) -> set[str]:
        return {name for entity in self.entities.values() for name in entity.targets}

    def _serve(self, sock: socket.socket) -> None:
        stream = sock.makefile("rb")
        payload = b""
        while header := stream.read(12):
            version, function, length, flags, transaction, sequence = struct.unpack("!HHHHHH", header)
            assert version == 1 and flags & 0x8000 and length % 4 == 0
            assert bool(flags & FIRST) == (sequence == 0)
            self.pdus += 1
            payload += stream.read(length)
            if not flags & LAST:
                continue
            with self.changed:
                self.requests.append(function)
                answer = self._answer(function, flags, payload)
                self.changed.notify_all()
            payload = b""
            if self.answer is not None:
                sock.sendall(self.answer(function, transaction))
                continue
            sock.sendall(
                struct.pack(
                    "!HHHHHH", 1, function | 0x8000, len(answer), 0x4000 | LAST | FIRST, transaction, 0
                )
                + answer
            )

    def _answer(self, function: int, flags: int, payload: bytes) -> bytes:
        attributes = cut(payload)
        assert attributes[0][0] == NAME, "who speaks is said first"
        if self.answer is not None:
            return b""
        border = attributes.index((0, b""))
        key, said = attributes[1:border], attributes[border + 1 :]
        if function == REGISTER:
            assert flags & REPLACE and not key and said[0][0] == EID
            self.entities[said[0][1].rstrip(b"\0").decode()] = Entity(said[1:])
            return bytes(4)
        entity = (key or said)[0][1].rstrip(b"\0").decode()
        if function == QUERY:
            there = entity in self.entities
            return struct.pack("!III", 0, PROTOCOL, 4) + struct.pack("!I", 2) if there else bytes(4)
        assert function == DEREGISTER
        self.entities.pop(entity, None)
        return bytes(4)
