"""Mode pages: a builder per page, MODE SENSE and MODE SELECT (SPC-4 §6.11 to §6.14, §7.5; SBC-3 §6.5).

``ModeState`` is all that can be changed, so a page is a function of (unit, state), and the changeable mask is
the difference between the pages of two states. A MODE SELECT is checked whole before any of it counts.
Every page is shared by all nexuses (VPD page 87h says so).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

from protocol.scsi.cdb import cut, parameter_list_length
from protocol.scsi.request import GOOD, Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = ["THRESHOLD_SET_BYTES", "ModeState", "prepare_select", "select", "sense"]


@dataclass(frozen=True, slots=True)
class ModeState:
    """What MODE SELECT can change."""

    write_cache: bool = True
    """WCE, caching page."""
    software_write_protect: bool = False
    """SWP, control page."""
    descriptor_sense: bool = False
    """D_SENSE, control page."""

    def store(self) -> bytes:
        """As it is kept for a restart."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def restore(cls, stored: bytes | None, default: "ModeState") -> "ModeState":
        """What ``store`` made, or ``default`` where nothing was kept."""
        if stored is None:
            return default
        known = {field.name for field in fields(cls)}
        values = json.loads(stored)
        return replace(default, **{name: bool(value) for name, value in values.items() if name in known})


THRESHOLD_SET_BYTES = 1 << 20
"""Threshold set: what counts of provisioning resources are in (SBC-3 §4.7.3.7); VPD page B2h tells it."""

_ALL_CLEAR = ModeState(False, False, False)
_ALL_SET = ModeState(True, True, True)
_CURRENT, _CHANGEABLE, _DEFAULT, _SAVED = range(4)  # PC


# -- the pages, without their header ------------------------------------------------------------------


def _read_write_recovery(unit: "LogicalUnit", state: ModeState) -> bytes:
    """01h (SBC-3 §6.5.8): AWRE and ARRE are the medium's own business below us; no retries of ours."""
    return bytes(10)


def _caching(unit: "LogicalUnit", state: ModeState) -> bytes:
    """08h (SBC-3 §6.5.5)."""
    page = bytearray(18)
    page[0] = 0x04 if state.write_cache else 0
    return bytes(page)


def _control(unit: "LogicalUnit", state: ModeState) -> bytes:
    """0Ah (SPC-4 §7.5.8). TST 0: one task set for all. QUEUE ALGORITHM MODIFIER 1: reordering is free."""
    page = bytearray(10)
    page[0] = 0x04 if state.descriptor_sense else 0
    page[1] = 0x10
    page[2] = 0x08 if state.software_write_protect else 0
    page[6:8] = b"\xff\xff"  # BUSY TIMEOUT PERIOD: unlimited
    return bytes(page)


def _control_extension(unit: "LogicalUnit", state: ModeState) -> bytes:
    """0Ah/01h (SPC-4 §7.5.9). SCSIP: the clock is the host's."""
    page = bytearray(28)
    page[0] = 0x02
    return bytes(page)


def _informational_exceptions(unit: "LogicalUnit", state: ModeState) -> bytes:
    """1Ch (SBC-3 §6.5.6): MRIE 0, no failure prediction."""
    return bytes(10)


def _provisioning(unit: "LogicalUnit", state: ModeState) -> bytes:
    """1Ch/02h (SBC-3 §6.5.7): the soft threshold on what is left of the medium's space.

    The descriptor's count is in threshold sets, of the space as last looked at.
    """
    threshold, space = unit.config.threshold, unit.space
    page = bytearray(12)
    if threshold is not None and space is not None and unit.thin:
        sets = (space.total or space.used + space.available) * threshold // 100 // THRESHOLD_SET_BYTES
        # ENABLED, type soft, armed decreasing; resource 01h: available LBA mapping resource count
        page += bytes((0x80 | 0x02, 0x01, 0, 0)) + min(sets, 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(page)


_PAGES: dict[tuple[int, int], Callable[["LogicalUnit", ModeState], bytes]] = {
    # (page, subpage), in the order in which MODE SENSE returns them
    (0x01, 0x00): _read_write_recovery,
    (0x08, 0x00): _caching,
    (0x0A, 0x00): _control,
    (0x0A, 0x01): _control_extension,
    (0x1C, 0x00): _informational_exceptions,
    (0x1C, 0x02): _provisioning,
}


def _page(unit: "LogicalUnit", key: tuple[int, int], state: ModeState) -> bytes:
    """A page with its header, PS clear (SPC-4 §7.5.7)."""
    code, subpage = key
    body = _PAGES[key](unit, state)
    if subpage:
        return bytes((0x40 | code, subpage)) + len(body).to_bytes(2, "big") + body
    return bytes((code, len(body))) + body


def _changeable(unit: "LogicalUnit", key: tuple[int, int]) -> bytes:
    """The page as a mask of what can be changed; header as in every other page."""
    clear, full = _page(unit, key, _ALL_CLEAR), _page(unit, key, _ALL_SET)
    head = 4 if key[1] else 2
    return clear[:head] + bytes(a ^ b for a, b in zip(clear[head:], full[head:], strict=True))


def _default(unit: "LogicalUnit") -> ModeState:
    return ModeState(write_cache=unit.config.write_cache)


# -- MODE SENSE ---------------------------------------------------------------------------------------


def _wanted(page: int, subpage: int) -> list[tuple[int, int]]:
    """The pages that PAGE CODE and SUBPAGE CODE ask for (SPC-4 table 160); raises for none."""
    if page == 0x3F:
        if subpage == 0xFF:
            return list(_PAGES)
        keys = [key for key in _PAGES if subpage == key[1] == 0]
    elif subpage == 0xFF:
        keys = [key for key in _PAGES if key[0] == page]
    else:
        keys = [key for key in _PAGES if key == (page, subpage)]
    if keys:
        return keys
    if page == 0x3F or any(key[0] == page for key in _PAGES):
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=3)
    raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=5)


def _block_descriptor(unit: "LogicalUnit", long: bool) -> bytes:
    """Number and length of blocks (SBC-3 §6.5.2); FFFFFFFFh where 32 bits do not suffice."""
    size = unit.block_size.to_bytes(4, "big")
    if long:
        return unit.blocks.to_bytes(8, "big") + bytes(4) + size
    return min(unit.blocks, 0xFFFFFFFF).to_bytes(4, "big") + size


def sense(unit: "LogicalUnit", request: Request) -> Outcome:
    """MODE SENSE(6) and (10) (SPC-4 §6.13, §6.14)."""
    cdb = request.cdb
    ten = cdb[0] == 0x5A
    control = cdb[2] >> 6
    keys = _wanted(cdb[2] & 0x3F, cdb[3])
    if control == _SAVED and unit.keep is None:
        raise CheckCondition(Sense.SAVING_PARAMETERS_NOT_SUPPORTED)
    pages = b""
    for key in keys:
        if control == _CHANGEABLE:
            page = _changeable(unit, key)
        else:
            page = _page(
                unit, key, {_CURRENT: unit.mode, _SAVED: unit.saved_mode}.get(control, _default(unit))
            )
        if unit.keep is not None:
            page = bytes((page[0] | 0x80,)) + page[1:]  # PS
        pages += page
    specific = 0x10 | (0x80 if unit.write_protected else 0)  # DPOFUA, WP
    long = ten and bool(cdb[1] & 0x10)  # LLBAA
    descriptor = b"" if cdb[1] & 0x08 else _block_descriptor(unit, long)
    rest = descriptor + pages
    if ten:
        length = (len(rest) + 6).to_bytes(2, "big")
        flags = 1 if long and descriptor else 0
        header = length + bytes((0, specific, flags, 0)) + len(descriptor).to_bytes(2, "big")
    else:
        header = bytes((len(rest) + 3, 0, specific, len(descriptor)))
    return Outcome(data_in=cut(header + rest, cdb))


# -- MODE SELECT --------------------------------------------------------------------------------------


def prepare_select(unit: "LogicalUnit", request: Request) -> None:
    """MODE SELECT: the parameter list is as long as the CDB says."""
    cdb = request.cdb
    if not cdb[1] & 0x10:  # PF: pages in a vendor specific format
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=4)
    if cdb[1] & 0x01 and unit.keep is None:  # SP
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=1, bit=0)
    request.transfer_length = parameter_list_length(cdb)


def select(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """MODE SELECT(6) and (10) (SPC-4 §6.11, §6.12).

    Clearing WCE first brings to the medium what it does not have yet; SP first stores the pages. Either
    ends the command later, and with a failure nothing has changed.
    """
    state = _parse(unit, request)
    save = bool(request.cdb[1] & 0x01)
    if unit.write_cache and not state.write_cache and unit.backend is not None:
        unit.flush_then(request, partial(_store, unit, request, state, save))
        return None
    return _store(unit, request, state, save)


def _store(unit: "LogicalUnit", request: Request, state: ModeState, save: bool) -> Outcome | None:
    if not save:
        return _apply(unit, request, state)
    assert unit.keep is not None

    def stored(error: Exception | None) -> None:
        if error is not None:
            unit.complete(request, unit.failed(request, error))
        else:
            unit.kept["mode"] = state.store()
            unit.complete(request, _apply(unit, request, state, save=True))

    unit.keep("mode", state.store(), stored)
    return None


def _apply(unit: "LogicalUnit", request: Request, state: ModeState, *, save: bool = False) -> Outcome:
    unit.change_mode(state, request.nexus, save=save)
    return GOOD


def _bad(field: int, bit: int | None = None) -> CheckCondition:
    return CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST, field=field, bit=bit, in_parameters=True)


def _parse(unit: "LogicalUnit", request: Request) -> ModeState:
    """The state that the parameter list asks for; raises unless every byte of it is acceptable."""
    cdb = request.cdb
    wanted = parameter_list_length(cdb)
    data = bytes(request.data_out[:wanted])
    if not wanted:
        return unit.mode
    ten = cdb[0] == 0x55
    head = 8 if ten else 4
    if len(data) < wanted or len(data) < head:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    if data[2 if ten else 1]:  # MEDIUM TYPE
        raise _bad(2 if ten else 1)
    descriptor = int.from_bytes(data[6:8], "big") if ten else data[3]
    long = ten and bool(data[4] & 0x01)
    if descriptor not in (0, 16 if long else 8):
        raise _bad(6 if ten else 3)
    at = head + descriptor
    if len(data) < at:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    if descriptor:
        _check_block_descriptor(unit, data, head, long)
    state = unit.mode
    while at < len(data):
        state, at = _parse_page(unit, data, at, state)
    return state


def _check_block_descriptor(unit: "LogicalUnit", data: bytes, at: int, long: bool) -> None:
    """The capacity and the block length are not for the initiator to change."""
    if long:
        count, size, size_at = data[at : at + 8], data[at + 12 : at + 16], at + 12
    else:
        count, size, size_at = data[at : at + 4], data[at + 5 : at + 8], at + 5
    blocks = int.from_bytes(count, "big")
    if blocks not in (0, unit.blocks, 0xFFFFFFFF if not long else 2**64 - 1):
        raise _bad(at)
    if int.from_bytes(size, "big") not in (0, unit.block_size):
        raise _bad(size_at)


def _parse_page(unit: "LogicalUnit", data: bytes, at: int, state: ModeState) -> tuple[ModeState, int]:
    """Read one page at ``data[at:]``; returns the state with its changes, and where the next begins."""
    head = 4 if data[at] & 0x40 else 2
    if len(data) < at + head:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    key = (data[at] & 0x3F, data[at + 1] if head == 4 else 0)
    if key not in _PAGES:
        raise _bad(at, 5)
    current = _page(unit, key, state)
    sent = data[at : at + len(current)]
    if sent[1:head] != current[1:head]:  # PAGE LENGTH
        raise _bad(at + (2 if head == 4 else 1))
    if len(sent) < len(current):
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    mask = _changeable(unit, key)
    for index in range(head, len(current)):
        wrong = (sent[index] ^ current[index]) & ~mask[index]
        if wrong:
            raise _bad(at + index, wrong.bit_length() - 1)
    # Which fields of the state does this page carry? Those that change it when set alone.
    changes: dict[str, bool] = {}
    for field in fields(ModeState):
        bare = _page(unit, key, _ALL_CLEAR)
        alone = _page(unit, key, replace(_ALL_CLEAR, **{field.name: True}))
        bits = int.from_bytes(bare, "big") ^ int.from_bytes(alone, "big")
        if bits:
            changes[field.name] = bool(int.from_bytes(sent, "big") & bits)
    return replace(state, **changes), at + len(current)
