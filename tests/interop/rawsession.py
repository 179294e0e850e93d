"""A bare iSCSI session over a socket: just enough to hold one open and see how the target ends it.

Written from RFC 7143 §11.12 with numbers of its own, not with ``protocol.bhs``, so that one reading of
the RFC checks the other.
"""

import socket
import struct
from types import TracebackType
from typing import Self

LOGIN_REQUEST = 0x43
"""Opcode 03h with the immediate bit."""
LOGIN_RESPONSE = 0x23
ASYNC_MESSAGE = 0x32
OPERATIONAL_TO_FULL_FEATURE = 0x87
"""T=1, CSG=1, NSG=3."""


class RawSession:
    """One logged-in normal session; closes its socket on exit."""

    def __init__(self, address: tuple[str, int], initiator: str, target: str, limit_s: float = 15.0) -> None:
        self.socket = socket.create_connection(address, limit_s)
        keys = {
            "InitiatorName": initiator,
            "TargetName": target,
            "SessionType": "Normal",
            "HeaderDigest": "None",
            "DataDigest": "None",
        }
        text = b"".join(f"{key}={value}\0".encode() for key, value in keys.items())
        header = struct.pack(
            "!BBBBI6sHIHHIIQQ",
            LOGIN_REQUEST,
            OPERATIONAL_TO_FULL_FEATURE,
            0,
            0,
            len(text),
            bytes.fromhex("80000000002a"),  # ISID of the random type, §11.12.5
            0,  # TSIH: a new session
            1,  # initiator task tag
            0,  # CID
            0,
            1,  # CmdSN
            0,  # ExpStatSN
            0,
            0,
        )
        self.socket.sendall(header + text + bytes(-len(text) % 4))
        self.login_response, _ = self.receive()
        if self.login_response[0] != LOGIN_RESPONSE:
            raise ConnectionError(f"no Login Response but {self.login_response.hex()}")
        self.status = int.from_bytes(self.login_response[36:38], "big")
        """Status-Class and Status-Detail, §11.13.5."""

    def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = self.socket.recv(length - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def receive(self) -> tuple[bytes, bytes]:
        """Header and data segment of the next PDU; EOFError when the target has closed."""
        header = self._exactly(48)
        length = int.from_bytes(header[5:8], "big")
        return header, self._exactly(header[4] * 4 + (length + 3 & ~3))[: header[4] * 4 + length]

    def until_closed(self) -> list[int]:
        """Opcodes of what still comes, up to the close; TimeoutError if none comes in time."""
        opcodes = []
        try:
            while True:
                opcodes.append(self.receive()[0][0] & 0x3F)
        except (EOFError, ConnectionResetError):
            return opcodes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
