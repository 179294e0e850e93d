"""A wire that flips a bit now and then: a relay in the guest, between its initiator and a portal.

It follows the PDUs, so that each has one bit flipped at most: of its header, its data, padding or a digest.
The login is passed on as it is: no digest covers it.
"""

import random
import socket
import threading
from types import TracebackType
from typing import Self

WAYS = ("to the target", "to the initiator")


class FlippingRelay:
    """Listens on the guest's loopback."""

    def __init__(self, portal: str, one_in: int, seed: int) -> None:
        """
        Args:
            one_in: every so many PDUs one is damaged, each way, the first after half as many.
        """
        host, _, port = portal.rpartition(":")
        self._to = host, int(port)
        self._one_in = one_in
        self._dice = random.Random(seed)
        self.flipped = dict.fromkeys(WAYS, 0)
        self._passed = dict.fromkeys(WAYS, one_in // 2)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.portal = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
                target = socket.create_connection(self._to)
            except OSError:
                return
            logged_in = threading.Event()
            for way, source, to in zip(WAYS, (client, target), (target, client), strict=True):
                thread = threading.Thread(target=self._pass, args=(way, source, to, logged_in), daemon=True)
                thread.start()

    def _pass(self, way: str, source: socket.socket, to: socket.socket, logged_in: threading.Event) -> None:
        stream = source.makefile("rb")
        try:
            while header := stream.read(48):
                digests = logged_in.is_set()
                size = (int.from_bytes(header[5:8], "big") + 3 & ~3) + 4 * header[4]
                pdu = bytearray(header + stream.read(size + (4 + 4 * (size > 0) if digests else 0)))
                self._passed[way] += digests
                if digests and self._passed[way] % self._one_in == 0:
                    pdu[self._dice.randrange(len(pdu))] ^= 1 << self._dice.randrange(8)
                    self.flipped[way] += 1
                if header[0] == 0x23 and header[1] & 0x83 == 0x83 and not header[36]:
                    logged_in.set()  # the last Login Response: what follows has digests
                to.sendall(pdu)
        except OSError:
            pass
        for sock in (source, to):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
