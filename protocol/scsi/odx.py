"""Token copies: POPULATE TOKEN, WRITE USING TOKEN, RECEIVE ROD TOKEN INFORMATION (ODX).

A token names ranges of a logical unit for a while. Without snapshots there is no copy of their contents, so
the ROD type is *access upon reference*: who uses the token gets what the ranges hold then; the token says so.
It is good for whoever presents all 512 bytes, 32 of them random, on a session that sees the unit it was made
from; it expires when nobody has used it for its inactivity timeout, and it is revoked when that unit changes
medium or block size. Tokens do not survive the daemon.

Source: SPC-4 r37 §5.17.6, §6.23, §7.8.17; SBC-3 r36 §4.28, §5.10, §5.47.
"""

import hmac
import secrets
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING
from weakref import ref

from protocol.enums import ScsiStatus
from protocol.scsi.copymanager import (
    Copy,
    Reach,
    Result,
    destination_backend,
    may_copy,
    reachable,
    results_of,
    run,
    source_backend,
    throttles_of,
)
from protocol.scsi.request import GOOD, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense
from protocol.scsi.taskset import Throttle
from storage.base import Backend

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = [
    "TOKEN_BYTES",
    "block_device_rod_limits",
    "populate_token",
    "prepare_token_command",
    "receive_rod_token_information",
    "rod_token_features",
    "supported_rod_types",
    "write_using_token",
]

TOKEN_BYTES = 512
MAXIMUM_TOKENS = 1024
"""Of the whole daemon; the one that expires first makes room."""
MAXIMUM_RANGES = 64
"""MAXIMUM RANGE DESCRIPTORS of one command."""
MAXIMUM_TOKEN_BYTES = 256 * 2**20
"""MAXIMUM TOKEN TRANSFER SIZE: what a copy without offload does within a time-out."""
OPTIMAL_TOKEN_BYTES = 64 * 2**20
DEFAULT_INACTIVITY_TIMEOUT_S = 30
MAXIMUM_INACTIVITY_TIMEOUT_S = 3600

_ANY_TYPE = 0x00000000
"""ROD TYPE: the copy manager decides."""
ACCESS_UPON_REFERENCE = 0x00010000
BLOCK_DEVICE_ZERO = 0xFFFF0001
"""The well-known token whose contents are zeros (SBC-3 §4.28.4)."""

_POPULATE_TOKEN, _WRITE_USING_TOKEN = 0x10, 0x11
_POPULATE_HEADER_BYTES, _WRITE_HEADER_BYTES = 16, 536
_RANGE = Struct("!QI4x")
_IMMED, _RTV, _DEL_TKN = 0x01, 0x02, 0x02

_Ranges = list[tuple[int, int]]
"""(LBA, blocks), none empty."""


@dataclass(slots=True)
class _Token:
    """A token in force."""

    data: bytes
    unit: "ref[LogicalUnit]"
    backend: Backend
    block_size: int
    ranges: _Ranges
    timeout_s: int
    expires_at: float


_tokens: dict[bytes, _Token] = {}
"""By their identifier, bytes 8 to 15. On the event loop only."""


# -- parameters -------------------------------------------------------------------------------------


def prepare_token_command(unit: "LogicalUnit", request: Request) -> None:
    """POPULATE TOKEN and WRITE USING TOKEN: PARAMETER LIST LENGTH, where none is no error."""
    populates = request.cdb[1] & 0x1F == _POPULATE_TOKEN
    header = _POPULATE_HEADER_BYTES if populates else _WRITE_HEADER_BYTES
    length = int.from_bytes(request.cdb[10:14], "big")
    # Range descriptors beyond the maximum are refused by their count, once the list is here.
    if length and not header <= length <= header + 2 * MAXIMUM_RANGES * _RANGE.size:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR, field=10)
    request.transfer_length = length


def _parameters(request: Request) -> bytes:
    data = bytes(request.data_out[: request.transfer_length])
    if len(data) < request.transfer_length:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    return data


def _wrong(at: int, sense: Sense = Sense.INVALID_FIELD_IN_PARAMETER_LIST) -> CheckCondition:
    return CheckCondition(sense, field=at, in_parameters=True)


def _ranges(unit: "LogicalUnit", data: bytes, header: int) -> _Ranges:
    """The block device range descriptors: inside the unit, not overlapping, not too many nor too much."""
    length = int.from_bytes(data[header - 2 : header], "big")
    if int.from_bytes(data[0:2], "big") < header - 2 + length or length % _RANGE.size:
        raise _wrong(0)
    if header + length > len(data):
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    if not 0 < length <= MAXIMUM_RANGES * _RANGE.size:
        raise _wrong(header - 2)
    ranges: _Ranges = []
    total = 0
    for at in range(header, header + length, _RANGE.size):
        lba, blocks = _RANGE.unpack_from(data, at)
        if lba + blocks > unit.blocks:
            raise _wrong(at, Sense.LBA_OUT_OF_RANGE)
        total += blocks * unit.block_size
        if total > MAXIMUM_TOKEN_BYTES:
            raise _wrong(at + 8)
        if any(lba < other + size and other < lba + blocks for other, size in ranges):
            raise _wrong(at)
        if blocks:
            ranges.append((lba, blocks))
    return ranges


# -- POPULATE TOKEN (SBC-3 §5.10) -----------------------------------------------------------------------


def populate_token(unit: "LogicalUnit", request: Request) -> Outcome:
    """POPULATE TOKEN: at once, since nothing is copied; IMMED makes no difference."""
    data = _parameters(request)
    if not data:
        return GOOD
    kind = int.from_bytes(data[8:12], "big")
    if data[2] & _RTV and kind not in (_ANY_TYPE, ACCESS_UPON_REFERENCE):
        raise _wrong(8, Sense.INVALID_TOKEN_OPERATION_UNSUPPORTED_TOKEN_TYPE)
    timeout_s = int.from_bytes(data[4:8], "big") or DEFAULT_INACTIVITY_TIMEOUT_S
    if timeout_s > MAXIMUM_INACTIVITY_TIMEOUT_S:
        raise _wrong(4)
    ranges = _ranges(unit, data, _POPULATE_HEADER_BYTES)
    backend = source_backend(Reach(unit, request.nexus), request)
    list_identifier = int.from_bytes(request.cdb[6:10], "big")
    result = results_of(unit).begin(unit, request.nexus, list_identifier, _POPULATE_TOKEN)
    size = sum(blocks for _, blocks in ranges) * unit.block_size
    token = _new_token(unit, size)
    now = unit.now()
    _make_room(now)
    _tokens[token[8:16]] = _Token(
        token, ref(unit), backend, unit.block_size, ranges, timeout_s, now + timeout_s
    )
    result.token = token
    result.transferred = size
    result.segments = len(ranges)
    result.outcome = GOOD
    return GOOD


def _new_token(unit: "LogicalUnit", size: int) -> bytes:
    """The ROD token (SPC-4 §5.17.6.5): who made it, how much it stands for, and what cannot be guessed."""
    token = bytearray(TOKEN_BYTES)
    token[0:4] = ACCESS_UPON_REFERENCE.to_bytes(4, "big")
    token[6:8] = (TOKEN_BYTES - 8).to_bytes(2, "big")
    token[8:16] = secrets.token_bytes(8)
    naa = bytes.fromhex(unit.config.naa.removeprefix("0x"))
    token[16:20] = bytes((0xE4, 0, 0, 0))
    token[20:24] = bytes((0x01, 0x03, 0, len(naa)))
    token[24 : 24 + len(naa)] = naa
    token[45:48] = unit.block_size.to_bytes(3, "big")
    token[48:64] = size.to_bytes(16, "big")
    token[128:160] = secrets.token_bytes(32)
    return bytes(token)


def _make_room(now: float) -> None:
    for identifier in [key for key, token in _tokens.items() if token.expires_at <= now]:
        del _tokens[identifier]
    while len(_tokens) >= MAXIMUM_TOKENS:
        del _tokens[min(_tokens, key=lambda key: _tokens[key].expires_at)]


# -- WRITE USING TOKEN (SBC-3 §5.47) --------------------------------------------------------------------


def write_using_token(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """WRITE USING TOKEN; None: a worker has begun. With IMMED it is answered now and asked about later."""
    data = _parameters(request)
    if not data:
        return GOOD
    offset = int.from_bytes(data[8:16], "big")
    given = data[16 : 16 + TOKEN_BYTES]
    ranges = _ranges(unit, data, _WRITE_HEADER_BYTES)
    own = Reach(unit, request.nexus)
    destination = destination_backend(own, request)
    wanted = sum(blocks for _, blocks in ranges) * unit.block_size
    source: LogicalUnit | None = None
    if int.from_bytes(given[0:4], "big") == BLOCK_DEVICE_ZERO:
        pieces: list[tuple[Backend | None, int, int]] = [(None, 0, wanted)]
    else:
        source, pieces = _pieces(unit, request, given, offset, wanted, delete=bool(data[2] & _DEL_TKN))
    todo = _pair(own, pieces, ranges, destination, throttles_of(unit, source))
    list_identifier = int.from_bytes(request.cdb[6:10], "big")
    result = results_of(unit).begin(unit, request.nexus, list_identifier, _WRITE_USING_TOKEN)
    result.segments = len(ranges)
    immediate = bool(data[2] & _IMMED)
    run(unit, request, result, todo, answer=not immediate)
    return GOOD if immediate else None


def _pieces(
    unit: "LogicalUnit", request: Request, given: bytes, offset: int, wanted: int, *, delete: bool
) -> "tuple[LogicalUnit, list[tuple[Backend | None, int, int]]]":
    """What a token stands for from ``offset`` (blocks of this unit) on: the unit that it was made from, and
    (backend, byte offset, bytes)."""
    token = _tokens.get(given[8:16])
    if token is None:
        raise _wrong(16, Sense.TOKEN_UNKNOWN)
    if not hmac.compare_digest(token.data, given):
        raise _wrong(16, Sense.TOKEN_CORRUPT)
    now = unit.now()
    if token.expires_at <= now:
        del _tokens[given[8:16]]
        raise _wrong(16, Sense.TOKEN_EXPIRED)
    source = token.unit()
    if source is None or source.backend is not token.backend or source.block_size != token.block_size:
        del _tokens[given[8:16]]
        raise _wrong(16, Sense.TOKEN_REVOKED)
    own = Reach(unit, request.nexus)
    reach = own if source is unit else None
    for each in reachable(unit, request.nexus, source.config.naa) if reach is None else ():
        if each.unit is source:
            reach = each
            break
    if reach is None or not may_copy(reach, own):
        raise _wrong(16, Sense.TOKEN_UNKNOWN)
    backend = source_backend(reach, request)
    skip = offset * unit.block_size
    if skip + wanted > sum(blocks for _, blocks in token.ranges) * token.block_size:
        raise _wrong(8)
    if any(lba + blocks > source.blocks for lba, blocks in token.ranges):
        raise _wrong(16, Sense.TOKEN_REVOKED)  # the unit has shrunk
    token.expires_at = now + token.timeout_s
    if delete:
        del _tokens[given[8:16]]
    pieces: list[tuple[Backend | None, int, int]] = []
    for lba, blocks in token.ranges:
        size = blocks * token.block_size
        cut = min(skip, size)
        skip -= cut
        if size > cut:
            pieces.append((backend, lba * token.block_size + cut, size - cut))
    return source, pieces


def _pair(
    own: Reach,
    pieces: list[tuple[Backend | None, int, int]],
    ranges: _Ranges,
    destination: Backend,
    throttles: tuple[Throttle, ...],
) -> list[Copy]:
    """Lay the pieces of the source along the ranges of the destination."""
    todo: list[Copy] = []
    at, used = 0, 0
    for lba, blocks in ranges:
        offset, left = lba * own.unit.block_size, blocks * own.unit.block_size
        while left:
            source, begin, size = pieces[at]
            length = min(left, size - used)
            copy = Copy(source, begin + used, own, destination, offset, length, own.durable, throttles)
            todo.append(copy)
            offset += length
            left -= length
            used += length
            if used == size:
                at, used = at + 1, 0
    return todo


# -- RECEIVE ROD TOKEN INFORMATION (SPC-4 §6.23) ----------------------------------------------------------

_DONE, _FAILED, _IN_BACKGROUND = 0x01, 0x02, 0x11
_IN_BLOCKS = 0xF1
"""TRANSFER COUNT UNITS: logical blocks."""


def receive_rod_token_information(unit: "LogicalUnit", request: Request) -> Outcome:
    """RECEIVE ROD TOKEN INFORMATION: how a token command fared, and the token that it made."""
    list_identifier = int.from_bytes(request.cdb[2:6], "big")
    result = results_of(unit).find(request.nexus, list_identifier, _POPULATE_TOKEN, _WRITE_USING_TOKEN)
    if result is None:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2)
    data = _information(unit, result)
    return Outcome(data_in=data[: int.from_bytes(request.cdb[10:14], "big")])


def _information(unit: "LogicalUnit", result: Result) -> bytes:
    outcome = result.outcome
    sense = outcome.sense if outcome is not None else b""
    status = _IN_BACKGROUND
    if outcome is not None:
        status = _DONE if outcome.status == ScsiStatus.GOOD else _FAILED
    body = bytearray(28)  # bytes 4 to 31
    body[0] = result.service_action
    body[1] = status
    body[2:4] = (1).to_bytes(2, "big")
    body[4:8] = (100 if outcome is None else 0xFFFFFFFE).to_bytes(4, "big")  # ms until it is worth asking
    body[8] = outcome.status if outcome is not None else 0
    body[9] = body[10] = len(sense)
    body[11] = _IN_BLOCKS
    body[12:20] = (result.transferred // unit.block_size).to_bytes(8, "big")
    body[20:22] = result.segments.to_bytes(2, "big")
    tokens = b"\x00\x00" + result.token if result.token else b""
    whole = bytes(body) + sense + len(tokens).to_bytes(4, "big") + tokens
    return len(whole).to_bytes(4, "big") + whole


# -- their part of VPD page 8Fh (SPC-4 §7.8.17, SBC-3 §6.6.6) ---------------------------------------------


def block_device_rod_limits(unit: "LogicalUnit") -> bytes:
    """Descriptor 0000h."""
    return (
        bytes(6)
        + MAXIMUM_RANGES.to_bytes(2, "big")
        + MAXIMUM_INACTIVITY_TIMEOUT_S.to_bytes(4, "big")
        + DEFAULT_INACTIVITY_TIMEOUT_S.to_bytes(4, "big")
        + (MAXIMUM_TOKEN_BYTES // unit.block_size).to_bytes(8, "big")
        + (OPTIMAL_TOKEN_BYTES // unit.block_size).to_bytes(8, "big")
    )


def rod_token_features(unit: "LogicalUnit") -> bytes:
    """Descriptor 0106h: no remote tokens; lifetimes in seconds."""
    body = bytearray(44)
    body[12:16] = DEFAULT_INACTIVITY_TIMEOUT_S.to_bytes(4, "big")
    body[16:20] = MAXIMUM_INACTIVITY_TIMEOUT_S.to_bytes(4, "big")
    body[20:24] = MAXIMUM_INACTIVITY_TIMEOUT_S.to_bytes(4, "big")
    return bytes(body)


_TOKEN_IN, _TOKEN_OUT = 0x02, 0x01


def supported_rod_types(unit: "LogicalUnit") -> bytes:
    """Descriptor 0108h: what POPULATE TOKEN makes and WRITE USING TOKEN takes."""
    types = ((ACCESS_UPON_REFERENCE, _TOKEN_IN | _TOKEN_OUT), (BLOCK_DEVICE_ZERO, _TOKEN_IN))
    body = bytes(2) + (64 * len(types)).to_bytes(2, "big")
    for kind, flags in types:
        body += kind.to_bytes(4, "big") + bytes((flags, 0, 0, 0)) + bytes(56)
    return body
