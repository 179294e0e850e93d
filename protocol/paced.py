"""Replies of many PDUs, made a piece at a time, as the peer takes them.

A READ of 32 MiB by an initiator that takes 512 bytes a PDU is answered by 65,536 of them, and a SNACK of 48
bytes may ask for as many: to make them all at once takes longer than one connection may have in one go. So
such a reply stands in ``Connection.out`` as one thing, in its place among the others, and each
``data_to_send`` makes the next ``PIECE`` PDUs of it. Everything that is numbered was numbered when it was
queued: what goes over the wire is the same, byte for byte.
"""

from collections.abc import Iterator

from protocol.scsi.request import Buffer
from protocol.wire import BHS_LENGTH

__all__ = ["PIECE", "Paced", "pdus_of"]

PIECE = 64
"""PDUs that are made in one go; a reply of no more is made at once. 64 take some 0.2 ms."""


class Paced:
    """PDUs still to be made, as an iterator of (header, data)."""

    __slots__ = ("_pdus", "_size", "done")

    def __init__(self, pdus: Iterator[tuple[bytes, Buffer]], size: int) -> None:
        """``size``: bytes of all of them, without digests."""
        self._pdus = pdus
        self._size = size
        self.done = False

    def __len__(self) -> int:
        """Bytes still to come, as of whatever else waits to be sent."""
        return self._size

    def take(self, most: int) -> list[tuple[bytes, Buffer]]:
        """The next of them, ``most`` at most; fewer: it is ``done``."""
        taken = []
        for pdu in self._pdus:
            taken.append(pdu)
            self._size -= BHS_LENGTH + len(pdu[1])
            if len(taken) == most:
                return taken
        self.done = True
        self._size = 0
        return taken


def pdus_of(size: int, limit: int, burst: int) -> int:
    """How many Data-In PDUs of at most ``limit`` bytes carry ``size`` bytes in sequences of ``burst``."""
    whole, rest = divmod(size, burst)
    return whole * -(-burst // limit) + -(-rest // limit)
