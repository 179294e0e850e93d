"""Bytes in, PDUs out: header, AHS, data segment, padding, digests. Knows lengths, not meanings.

A PDU is (RFC 7143 §11.2)::

    BHS 48 | AHS 4 × TotalAHSLength | header digest 0 or 4 | data | 0–3 padding | data digest 0 or 4

Rule 1: nothing is believed before the header digest is right, and nothing is allocated before
DataSegmentLength is known to be within what we declared.

Rule 2: a PDU that lies whole in the bytes given is handed on as a window on them, without a copy; the
receiver takes what it wants to keep. Only the last PDU of a wake-up can be incomplete:

* a short rest waits in ``_stash`` (copied: small by definition);
* a long data segment goes to a place of its own, asked of ``place`` by its header: the buffer of the
  task it belongs to, so that the rest of it can be received straight home (``receive_target``).

Rule 3: whoever owns the connection may stop it between two PDUs (``pause``), as what bytes ask for has no
relation to how many they are. What was received by then is kept, and taken by ``go_on``.

A wrong header digest leaves no length to believe. RFC 7143 §7.8: close the connection, or discard what
comes until "the beginning of a later PDU", which "needs to be reliably ascertained by other means". With
``resynchronise`` the means are digests: the damaged header's own length is believed only when the data
digest is right where that length puts it (if there is one) and a header with a right digest follows. Until
that is here the PDU is in doubt; if something else follows, the stream is lost.
"""

from collections.abc import Callable
from struct import Struct

from protocol.digest import DIGEST_LENGTH, digest, matches
from protocol.enums import RejectReason
from protocol.errors import ProtocolViolation
from protocol.limits import MAX_AHS_WORDS
from protocol.wire import BHS_LENGTH

__all__ = ["EMPTY", "Framer", "Handler", "padded"]

EMPTY = memoryview(b"")

Handler = Callable[[memoryview, int, memoryview], None]
"""Called with (view, at, data): the header is at ``view[at:]``, AHS behind it; both are borrowed."""

PREFIX = Struct("!B3xI")
"""Opcode byte; TotalAHSLength << 24 | DataSegmentLength."""

LONG = 16384
"""Bytes still to come of a data segment, from which it gets a place of its own. Below this the copy out
of the stash (1.5 µs at 16 KiB) costs less than the extra receive call."""


STEP = 512
"""Bytes of PDUs between two questions whether to go on. 10 PDUs without data, and to ask takes 0.1 µs."""


def _never() -> bool:
    return False


def padded(length: int) -> int:
    """Length with the padding to a multiple of four (RFC 7143 §11.2.3)."""
    return (length + 3) & ~3


def _header_digest_error() -> ProtocolViolation:
    """RFC 7143 §7.8: without a trustworthy length the stream is lost; close the connection."""
    return ProtocolViolation(RejectReason.PROTOCOL_ERROR, "header digest error", fatal=True)


class Framer:
    """Cuts the byte stream of one connection."""

    __slots__ = (
        "_body",
        "_body_filled",
        "_doubtful",
        "_head",
        "_stash",
        "_tail",
        "_tail_length",
        "damaged",
        "data_digest",
        "handlers",
        "header_digest",
        "max_data",
        "pause",
        "place",
        "resynchronise",
        "unread",
    )

    def __init__(
        self,
        handlers: list[Handler],
        damaged: Handler,
        place: Callable[[memoryview, int, int], memoryview | None],
        max_data: int,
    ) -> None:
        """
        Args:
            handlers: 64 of them, by opcode; may be replaced between PDUs.
            damaged: gets a PDU whose data digest is wrong.
            place: (view, at, length) → where a long data segment should land, or None.
            max_data: the longest data segment we have declared to receive, bytes.
        """
        self.handlers = handlers
        self.damaged = damaged
        self.place = place
        self.max_data = max_data
        self.header_digest = False
        self.data_digest = False
        self.pause: Callable[[], bool] = _never
        """Asked each ``STEP`` bytes; True: leave what is behind them for ``go_on``."""
        self.unread: memoryview | None = None
        """Received, and left so. Nothing may be given to ``feed`` meanwhile."""
        self.resynchronise = False
        """Drop a PDU whose header digest is wrong, and go on behind it."""
        self._doubtful: bytearray | None = None
        """What came from such a PDU on, until it is clear where the next begins."""
        self._stash = bytearray()
        self._head: bytes | None = None
        self._body: memoryview | None = None
        self._body_filled = 0
        self._tail = bytearray()
        self._tail_length = 0

    @property
    def in_pdu(self) -> bool:
        """A PDU has begun and is not complete: the peer owes us bytes."""
        return self.unread is None and (
            self._body is not None or bool(self._stash) or self._doubt_needs_data()
        )

    def receive_target(self) -> memoryview | None:
        """Where the next received bytes belong, when a long data segment is under way."""
        body = self._body
        if body is None or self._body_filled == len(body):
            return None
        return body[self._body_filled :]

    def received_in_target(self, count: int) -> None:
        """``count`` bytes were received into ``receive_target()``."""
        self._body_filled += count
        assert self._body is not None
        if self._body_filled == len(self._body) and not self._tail_length:
            self._finish_body()

    def feed(self, view: memoryview) -> None:
        """Take received bytes; calls a handler for every PDU that is complete.

        Raises:
            ProtocolViolation: the stream cannot be followed any further.
        """
        end = len(view)
        at = 0
        if self._body is not None or self._stash:
            at = self._resume(view)
        if self._doubtful is not None:
            self._resolve(view[at:])
            return
        unpack = PREFIX.unpack_from
        until = at + STEP if end - at > STEP else end
        while True:
            if until - at < BHS_LENGTH:
                if until == end:
                    break
                if self.pause():
                    self.unread = view[at:] if view.readonly else memoryview(bytes(view[at:]))
                    return
                until = at + STEP if end - at > STEP else end
                continue
            first, lengths = unpack(view, at)
            if lengths > self.max_data or self.header_digest or self.data_digest:
                total = self._deliver_general(view, at, end, lengths)
                if not total:
                    break
                at += total
                continue
            # The common case in one place: no AHS, no digests.
            data_at = at + BHS_LENGTH
            data_end = data_at + lengths
            following = data_at + (lengths + 3 & ~3)
            if following > end:
                if data_end - end > LONG:
                    self._begin_body(view, at, BHS_LENGTH, lengths, end)
                    return
                break
            self.handlers[first & 0x3F](view, at, view[data_at:data_end] if lengths else EMPTY)
            at = following
        if self._doubtful is not None:
            self._resolve(view[end:])
        elif at < end and self._body is None:
            self._stash += view[at:]

    def go_on(self) -> None:
        """Take what ``pause`` has left unread."""
        view, self.unread = self.unread, None
        if view is not None:
            self.feed(view)

    # -- the general case ---------------------------------------------------------------------

    def _measure(self, view: memoryview, at: int, lengths: int) -> tuple[int, int, int]:
        """(bytes before the data, DataSegmentLength, bytes after the data); judges the lengths."""
        size = lengths & 0xFFFFFF
        ahs_words = lengths >> 24
        if ahs_words > MAX_AHS_WORDS:
            raise ProtocolViolation(
                RejectReason.INVALID_PDU_FIELD, f"TotalAHSLength {ahs_words} words", fatal=True
            )
        if size > self.max_data:
            raise ProtocolViolation(
                RejectReason.INVALID_PDU_FIELD,
                f"DataSegmentLength {size} is more than the {self.max_data} declared",
                fatal=True,
            )
        before = BHS_LENGTH + 4 * ahs_words + (DIGEST_LENGTH if self.header_digest else 0)
        after = -size % 4 + (DIGEST_LENGTH if self.data_digest and size else 0)
        return before, size, after

    def _is_good(self, view: memoryview, at: int, before: int) -> bool:
        """Whether the header digest is right; if not, the PDU is in doubt, or the stream lost."""
        covered = before - DIGEST_LENGTH
        good = matches(view, at, covered, at + covered)
        if not good:
            self._doubt(view, at)
        return good

    def _doubt(self, view: memoryview, at: int) -> None:
        """A header digest is wrong."""
        if not self.resynchronise:
            raise _header_digest_error()
        self._doubtful = bytearray(view[at:])

    def _deliver_general(self, view: memoryview, at: int, end: int, lengths: int) -> int:
        """One PDU with AHS or digests, or an impossible one; returns its length, 0 = not complete."""
        header_digest = self.header_digest
        if lengths <= self.max_data:
            # Digests and no AHS, and it is all here: one look at the header, one at the data.
            data_at = at + BHS_LENGTH + (DIGEST_LENGTH if header_digest else 0)
            filled = data_at + (lengths + 3 & ~3)
            following = filled + (DIGEST_LENGTH if lengths and self.data_digest else 0)
            if following <= end:
                if header_digest and not matches(view, at, BHS_LENGTH, at + BHS_LENGTH):
                    self._doubt(view, at)
                    return end - at
                data = view[data_at : data_at + lengths] if lengths else EMPTY
                if following == filled or matches(view, data_at, filled - data_at, filled):
                    self.handlers[view[at] & 0x3F](view, at, data)
                else:
                    self.damaged(view, at, data)
                return following - at
        if header_digest:
            # The lengths are only believed once the digest over them is right; TotalAHSLength says
            # where that digest is, so it must at least be sane.
            before = BHS_LENGTH + 4 * min(lengths >> 24, MAX_AHS_WORDS) + DIGEST_LENGTH
            if end - at < before:
                return 0
            if not self._is_good(view, at, before):
                return end - at
        before, size, after = self._measure(view, at, lengths)
        total = before + size + after
        if end - at < total:
            if at + before <= end and at + before + size - end > LONG:
                self._begin_body(view, at, before, size, end)
            return 0
        data_at = at + before
        data = view[data_at : data_at + size] if size else EMPTY
        if size and self.data_digest and not matches(view, data_at, padded(size), data_at + padded(size)):
            self.damaged(view, at, data)
        else:
            self.handlers[view[at] & 0x3F](view, at, data)
        return total

    # -- a PDU in doubt -----------------------------------------------------------------------

    def _doubt_needs_data(self) -> bool:
        """The damaged PDU itself is not all here; what is missing of the next header may take its time."""
        doubt = self._doubtful
        return doubt is not None and len(doubt) < sum(self._measure(memoryview(doubt), 0, _lengths(doubt)))

    def _resolve(self, view: memoryview) -> None:
        """Find the PDU behind the one in doubt; raises if it is not where it should be."""
        doubt = self._doubtful
        assert doubt is not None
        doubt += view
        before, size, after = self._measure(memoryview(doubt), 0, _lengths(doubt))
        following = before + size + after
        if len(doubt) < following + BHS_LENGTH + DIGEST_LENGTH:
            return
        words = doubt[following + 4]
        covered = BHS_LENGTH + 4 * min(words, MAX_AHS_WORDS)
        if len(doubt) < following + covered + DIGEST_LENGTH:
            return
        whole = memoryview(bytes(doubt))
        if size and self.data_digest and not matches(whole, before, padded(size), before + padded(size)):
            raise _header_digest_error()
        if not matches(whole, following, covered, following + covered):
            raise _header_digest_error()
        self._doubtful = None
        self.feed(whole[following:])

    # -- PDUs that arrive in pieces -----------------------------------------------------------

    def _begin_body(self, view: memoryview, at: int, before: int, size: int, end: int) -> None:
        """A long data segment has begun: give it its place and move over what is here."""
        self._head = bytes(view[at : at + before])
        body = self.place(view, at, size) or memoryview(bytearray(size))
        here = end - at - before
        body[:here] = view[at + before : end]
        self._body = body
        self._body_filled = here
        self._tail.clear()
        self._tail_length = -size % 4 + (DIGEST_LENGTH if self.data_digest else 0)

    def _resume(self, view: memoryview) -> int:
        """Complete the PDU that was cut; returns how many bytes of ``view`` it took."""
        if self._body is not None:
            return self._resume_body(view)
        taken = 0
        stash = self._stash
        while True:
            missing, long = self._missing(stash)
            if long:
                self._stash = bytearray()
                with memoryview(stash) as whole:
                    self._begin_body(whole, 0, long, _lengths(stash) & 0xFFFFFF, len(stash))
                return taken + self._resume_body(view[taken:])
            if self._doubtful is not None:
                self._stash = bytearray()
                return taken
            if not missing:
                break
            piece = view[taken : taken + missing]
            stash += piece
            taken += len(piece)
            if len(piece) < missing:
                return taken
        self._stash = bytearray()
        whole = memoryview(stash)
        lengths = PREFIX.unpack_from(whole)[1]
        self._deliver_general(whole, 0, len(whole), lengths)
        return taken

    def _missing(self, stash: bytearray) -> tuple[int, int]:
        """(bytes missing from the PDU begun in ``stash``, or from what tells its length; 0 or, when the
        rest is long enough for a place of its own, the bytes before its data)."""
        have = len(stash)
        if have < BHS_LENGTH:
            return BHS_LENGTH - have, 0
        lengths = PREFIX.unpack_from(stash)[1]
        if self.header_digest:
            before = BHS_LENGTH + 4 * min(lengths >> 24, MAX_AHS_WORDS) + DIGEST_LENGTH
            if have < before:
                return before - have, 0
            with memoryview(stash) as whole:
                if not self._is_good(whole, 0, before):
                    return 0, 0
        with memoryview(stash) as whole:
            before, size, after = self._measure(whole, 0, lengths)
        missing = before + size + after - have
        if have >= before and missing - after > LONG:
            return missing, before
        if have < before and size > LONG:
            return before - have, 0
        return missing, 0

    def _resume_body(self, view: memoryview) -> int:
        body = self._body
        assert body is not None
        filled = self._body_filled
        taken = min(len(body) - filled, len(view))
        body[filled : filled + taken] = view[:taken]
        self._body_filled = filled + taken
        if self._body_filled < len(body):
            return taken
        rest = self._tail_length - len(self._tail)
        self._tail += view[taken : taken + rest]
        taken += min(rest, len(view) - taken)
        if len(self._tail) == self._tail_length:
            self._finish_body()
        return taken

    def _finish_body(self) -> None:
        body, head = self._body, self._head
        assert body is not None and head is not None
        self._body = self._head = None
        view = memoryview(head)
        if self.data_digest:
            padding = bytes(self._tail[:-DIGEST_LENGTH])
            if digest(body, padding) != bytes(self._tail[-DIGEST_LENGTH:]):
                self.damaged(view, 0, body)
                return
        self.handlers[head[0] & 0x3F](view, 0, body)


def _lengths(buffer: bytearray) -> int:
    lengths: int = PREFIX.unpack_from(buffer)[1]
    return lengths
