"""Log pages: a builder per page, and LOG SENSE (SPC-4 §6.6, §7.3; SBC-3 §6.4).

A builder answers the page's parameters as (code, control byte, value). The counters are those that dispatch
keeps anyway. Provisioning looks at the medium's space, which may wait, so that page is made on a worker.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.scsi.cdb import cut
from protocol.scsi.mode import THRESHOLD_SET_BYTES
from protocol.scsi.request import Outcome, Request
from protocol.scsi.sense import CheckCondition, Sense

if TYPE_CHECKING:
    from protocol.scsi.device import LogicalUnit

__all__ = ["log_sense", "log_sense_nowait"]

Parameters = list[tuple[int, int, bytes]]

_COUNTER = 0x00  # FORMAT AND LINKING: bounded data counter
_LIST = 0x03  # binary format list
_CUMULATIVE, _DEFAULT_CUMULATIVE = 1, 3  # PC; the others are thresholds, and there are none


def _errors(total_bytes: int, uncorrected: int) -> Parameters:
    """Parameters 0 to 6 of the error counter pages (SPC-4 §7.3.6): nothing is corrected by us."""
    values = (0, 0, 0, 0, 0, total_bytes, uncorrected)
    return [(code, _COUNTER, value.to_bytes(8, "big")) for code, value in enumerate(values)]


def _write_errors(unit: "LogicalUnit") -> Parameters:
    """02h."""
    return _errors(unit.bytes_written, unit.write_errors)


def _read_errors(unit: "LogicalUnit") -> Parameters:
    """03h."""
    return _errors(unit.bytes_read, unit.read_errors)


def _provisioning(unit: "LogicalUnit") -> Parameters:
    """0Ch, Logical Block Provisioning (SBC-3 §6.4.4): resources in threshold sets, dedicated to the unit."""
    backend = unit.backend
    if backend is None:
        raise CheckCondition(Sense.MEDIUM_NOT_PRESENT)
    space = backend.space()

    def sets(size: int) -> bytes:
        # scope 00b not reported: the medium below may be shared with other units
        return min(size // THRESHOLD_SET_BYTES, 0xFFFFFFFF).to_bytes(4, "big") + bytes(4)

    return [(0x0001, _LIST, sets(space.available)), (0x0002, _LIST, sets(space.used))]


def _temperature(unit: "LogicalUnit") -> Parameters:
    """0Dh: FFh, there is no sensor (SPC-4 §7.3.21)."""
    return [(0x0000, _LIST, b"\x00\xff"), (0x0001, _LIST, b"\x00\xff")]


def _start_stop_cycles(unit: "LogicalUnit") -> Parameters:
    """0Eh: of the parameters of SPC-4 §7.3.20 those that count something here, the load cycles."""
    return [(0x0006, _LIST, unit.load_cycles.to_bytes(4, "big"))]


def _general_statistics(unit: "LogicalUnit") -> Parameters:
    """19h, General Statistics and Performance (SPC-4 §7.3.9): commands and blocks; no times are kept."""
    size = unit.block_size
    values = (unit.reads, unit.writes, unit.bytes_written // size, unit.bytes_read // size, 0, 0, 0, 0)
    return [(0x0001, _LIST, b"".join(value.to_bytes(8, "big") for value in values))]


_PAGES: dict[int, Callable[["LogicalUnit"], Parameters]] = {
    0x02: _write_errors,
    0x03: _read_errors,
    0x0C: _provisioning,
    0x0D: _temperature,
    0x0E: _start_stop_cycles,
    0x19: _general_statistics,
}
_MAY_WAIT = frozenset((0x0C,))


def _pages(unit: "LogicalUnit") -> list[int]:
    return [page for page in _PAGES if page != 0x0C or unit.thin]


def log_sense_nowait(unit: "LogicalUnit", request: Request) -> Outcome | None:
    """LOG SENSE of every page that needs nothing of the medium."""
    return None if request.cdb[2] & 0x3F in _MAY_WAIT else log_sense(unit, request)


def log_sense(unit: "LogicalUnit", request: Request) -> Outcome:
    """LOG SENSE (SPC-4 §6.6)."""
    cdb = request.cdb
    page, subpage = cdb[2] & 0x3F, cdb[3]
    if cdb[2] >> 6 not in (_CUMULATIVE, _DEFAULT_CUMULATIVE):
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=7)
    if page == 0x00:
        if subpage == 0x00:
            body = bytes((0x00, *_pages(unit)))
        elif subpage == 0xFF:
            body = bytes((0x00, 0x00, 0x00, 0xFF)) + b"".join(bytes((code, 0x00)) for code in _pages(unit))
        else:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=3)
    else:
        if page not in _pages(unit):
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=2, bit=5)
        if subpage:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=3)
        body = _from_pointer(_PAGES[page](unit), int.from_bytes(cdb[5:7], "big"))
    code = page | (0x40 if subpage else 0)  # SPF
    return Outcome(data_in=cut(bytes((code, subpage)) + len(body).to_bytes(2, "big") + body, cdb))


def _from_pointer(parameters: Parameters, pointer: int) -> bytes:
    """The parameters from PARAMETER POINTER on; one beyond the last is an error."""
    wanted = [parameter for parameter in parameters if parameter[0] >= pointer]
    if not wanted:
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=5)
    return b"".join(
        code.to_bytes(2, "big") + bytes((control, len(value))) + value for code, control, value in wanted
    )
