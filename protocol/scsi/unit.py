"""The logical unit: what a command meets between its header and its medium. Knows no iSCSI.

What it is apart from commands is in ``state.py``, what may run beside what in ``taskset.py``.

A request passes twice. ``admit`` judges it when its header has arrived: unit attention, reservation,
opcode, reserved bits, medium, write protection, fields and range (SAM-5 §5.3.3 gives the order). Then
the transport collects the Data-Out, and ``submit`` runs it: on the event loop where that cannot wait,
else on the unit's lane of workers, whose result comes back by ``deliver``.

Rules:

* Everything here runs on the event loop, except bodies that run on a worker. These touch the backend
  and their request and nothing else; what they change in the unit is done by the row's ``after``.
* Anything but ``CheckCondition``, ``ReservationConflict`` and ``OSError`` out of a body is a bug of
  ours: logged with its traceback, and INTERNAL TARGET FAILURE for that task alone.
"""

import errno
import logging
from collections.abc import Callable, Sequence
from functools import partial

from protocol.enums import ScsiStatus
from protocol.scsi.attention import condition
from protocol.scsi.commands import Access, Command, Needs, Row, service_action_field
from protocol.scsi.limits import MAX_LINGERING_TASKS, MAXIMUM_TRANSFER_BYTES
from protocol.scsi.request import GOOD, Buffer, Nexus, Outcome, Request
from protocol.scsi.sense import CheckCondition, ReservationConflict, Sense, from_os_error
from protocol.scsi.state import UnitState
from protocol.scsi.table import table_for
from protocol.scsi.taskset import PLAIN
from storage.base import Rest

__all__ = ["LogicalUnit"]

log = logging.getLogger(__name__)

RESERVATION_CONFLICT = Outcome(ScsiStatus.RESERVATION_CONFLICT)
BUSY = Outcome(ScsiStatus.BUSY)
TASK_SET_FULL = Outcome(ScsiStatus.TASK_SET_FULL)

_READ_NEEDS = int(Needs.READY | Needs.MEDIUM)
_WRITE_NEEDS = int(Needs.READY | Needs.MEDIUM | Needs.WRITABLE)
"""Of the rows of READ(10/16) and WRITE(10/16), for ``read_at_once`` and ``write_at_once``."""


class LogicalUnit(UnitState):
    """One logical unit with its task set."""

    def _offer(self) -> Sequence[Row]:
        return table_for(self)

    def admit(self, request: Request) -> Outcome | None:
        """Judge a request by its CDB; it joins the task set unless an outcome comes back.

        Sets ``command``, ``transfer_length``, ``offset`` and ``length`` of the request.
        """
        cdb = request.cdb
        opcode = cdb[0]
        self.commands[opcode] += 1
        try:
            if self.attentions.pending:
                self._attend(request)
            row = self.table[opcode]
            if row.__class__ is not Command:
                row = self._select(request, row)
            request.command = row
            if self.reservations.held:
                self.reservations.check(request, row)
            if int.from_bytes(cdb[: row.length], "big") & row.reserved:
                raise _reserved_bit(cdb, row)
            if row.required & self._lacking:
                raise self._why_not(row)
            if row.prepare is not None:
                row.prepare(self, request)
        except Exception as error:
            return self._refused(request, error)
        if self._lingering >= MAX_LINGERING_TASKS and not row.inline:
            self._count_failure(opcode, ScsiStatus.TASK_SET_FULL)
            return TASK_SET_FULL
        self._join(request)
        return None

    def read_at_once(self, opcode: int, lba: int, blocks: int, length: int, touched: bool) -> Buffer | None:
        """READ(10/16) of ``length`` bytes without a request, when nothing stands in its way and the bytes are
        in memory; None: go by ``admit`` and ``submit``, nothing has happened yet.

        ``touched``: as ``Request.touched``; the bytes are a copy then.

        The same tests as theirs in one place, for ``protocol.fastpath``: attentions, reservations, what the
        unit lacks, what must wait, the range.
        """
        backend = self.backend
        if (
            self._crowded
            or self._lacking & _READ_NEEDS
            or self.attentions.pending
            or self.reservations.held
            or lba + blocks > self.blocks
            or blocks * self.block_size != length
            or backend is None
        ):
            return None
        if touched:
            data = backend.copy_nowait(lba * self.block_size, length)
        else:
            data = backend.read_nowait(lba * self.block_size, length)
        if data is not None:
            self.commands[opcode] += 1
            self.reads += 1
            self.bytes_read += length
        return data

    def write_at_once(self, opcode: int, lba: int, blocks: int, data: Buffer, nexus: Nexus) -> bool:
        """WRITE(10/16) of exactly ``data`` into the cache, like ``read_at_once``; False: nothing was done, or
        it failed and is to be done again by the way that reports failures."""
        backend = self.backend
        length = len(data)
        if (
            self._crowded
            or self._lacking & _WRITE_NEEDS
            or self.attentions.pending
            or self.reservations.held
            or not self.write_cache
            or lba + blocks > self.blocks
            or blocks * self.block_size != length
            or length > MAXIMUM_TRANSFER_BYTES
            or backend is None
        ):
            return False
        try:
            if not backend.write_nowait(lba * self.block_size, data):
                return False
        except OSError:
            return False
        self.commands[opcode] += 1
        self.writes += 1
        self.bytes_written += length
        self.unflushed.add(nexus)
        return True

    def _order(self, request: Request) -> None:
        """In the stand-in nothing waits for anything: what it can do is done at once."""
        if self.absent:
            request.attribute = PLAIN
        else:
            super()._order(request)

    def _start(self, request: Request, row: Command) -> Outcome | None:
        """Run it here if it can be run here; None: it is under way."""
        try:
            if row.inline:
                if row.takes_parameters:
                    request.hold()  # the body may answer later, and look at its list again then
                outcome = row.body(self, request)
                if outcome is None and request in self.tasks:  # it may have ended meanwhile
                    self._begin(request, row)
                return outcome
            if row.nowait is not None:
                outcome = row.nowait(self, request)
                if outcome is not None:
                    return outcome
        except Exception as error:
            return self.failed(request, error)
        request.hold()
        self._begin(request, row)
        if row.changes:
            self.note_written(request.nexus)
        if row.begin is not None and row.begin(self, request, partial(self._ended, request)):
            return None
        if row.flushes:
            self._flush_with_others(request, row)
            return None
        lane = self.lane if request.length <= row.long_bytes else self.lane.long
        lane.run(partial(self._work, request, row), partial(self._done, request))
        return None

    def _flush_with_others(self, request: Request, row: Command) -> None:
        """One flush is enough for all that came before it began, and does not keep a worker for each."""
        batch = self._next_flush
        if batch is not None:
            batch.append(request)
            return
        self._next_flush = batch = [request]
        self.lane.flushes.run(partial(self._flush, request, row), partial(self._flushed, batch))

    def _flush(self, request: Request, row: Command) -> Exception | None:
        """On a worker thread. Who looked at ``_next_flush`` before this ends it had no write under way that
        the flush would miss, and is in the list when ``_flushed`` goes through it on the event loop."""
        self._next_flush = None
        try:
            row.body(self, request)
        except Exception as error:
            return error
        return None

    def _flushed(self, batch: list[Request], error: Exception | None) -> None:
        for request in batch:
            self._done(request, GOOD if error is None else self.failed(request, error))

    def _ended(self, request: Request, result: Buffer | Rest | None) -> None:
        """What a row's ``begin`` has begun is done, or is a worker's from here."""
        if callable(result):
            self.lane.run(partial(self._rest, request, result), partial(self._done, request))
        else:
            self._done(request, GOOD if result is None else Outcome(ScsiStatus.GOOD, result))

    def _rest(self, request: Request, rest: Rest) -> Outcome:
        """On a worker thread."""
        try:
            result = rest()
        except Exception as error:
            return self.failed(request, error)
        return GOOD if result is None else Outcome(ScsiStatus.GOOD, result)

    def _work(self, request: Request, row: Command) -> Outcome:
        """On a worker thread."""
        try:
            outcome = row.body(self, request)
            if outcome is None:
                raise TypeError(f"the body of {row.name} ended without an outcome")
            return outcome
        except Exception as error:
            return self.failed(request, error)

    def _finish(self, request: Request, row: Command, outcome: Outcome) -> None:
        """Take the task out of the set and count it."""
        self._leave(request)
        if not outcome.status or outcome.status == ScsiStatus.CONDITION_MET:
            if row.reads:
                self.reads += 1
                self.bytes_read += request.length
            elif row.writes:
                self.writes += 1
                self.bytes_written += request.length
            if row.changes:
                self.note_written(request.nexus)
        else:
            self._count_failure(row.opcode, outcome.status)
            self.note_lost_writes()
            if outcome.sense and outcome.sense[1 if outcome.sense[0] & 0x02 else 2] & 0x0F == 0x03:
                if row.writes:
                    self.write_errors += 1
                else:
                    self.read_errors += 1
        if row.after is not None:
            row.after(self, request, outcome)

    def _finish_aborted(self, request: Request, row: Command, outcome: Outcome) -> None:
        """Nobody waits for it, but what it did to the unit was done."""
        if row.after is not None:
            row.after(self, request, outcome)

    def _count_failure(self, opcode: int, status: int) -> None:
        key = (opcode, status)
        self.failures[key] = self.failures.get(key, 0) + 1

    def flush_then(self, request: Request, then: Callable[[], Outcome | None]) -> None:
        """For an INLINE body that answers None: flush the medium on a worker, then go on with ``then`` on
        the event loop; its outcome, or that of a failed flush, ends the request. None: it will end itself."""
        backend = self.backend

        def flush() -> Outcome:
            try:
                if backend is not None:
                    backend.flush()
            except OSError as error:
                return self.failed(request, error)
            return GOOD

        def flushed(outcome: Outcome) -> None:
            ended = then() if outcome is GOOD else outcome
            if ended is not None:
                self.complete(request, ended)

        self.lane.run(flush, flushed)

    def _attend(self, request: Request) -> None:
        """Report a pending unit attention instead of running the command (SAM-5 §5.14).

        INQUIRY and REPORT LUNS are done regardless and leave it pending; REQUEST SENSE returns it as
        its parameter data.
        """
        if request.cdb[0] not in _UNATTENDED:
            sense = self.take_attention(request.nexus)
            if sense is not None:
                raise condition(sense)

    def _why_not(self, row: Command) -> CheckCondition:
        lacks = row.required & self._lacking
        if self.locked is not None and lacks & Needs.READY:
            return self.locked()
        if lacks & Needs.MEDIUM:
            return CheckCondition(Sense.MEDIUM_NOT_PRESENT)
        software = self.mode.software_write_protect and not self.read_only
        return CheckCondition(Sense.SOFTWARE_WRITE_PROTECTED if software else Sense.WRITE_PROTECTED)

    # -- failures -----------------------------------------------------------------------------

    def check(self, condition: CheckCondition) -> Outcome:
        """CHECK CONDITION with this sense, in the format of D_SENSE (SPC-4 §4.5.1)."""
        return Outcome(ScsiStatus.CHECK_CONDITION, sense=condition.build(self.descriptor_sense))

    def give_up(self, request: Request, condition: CheckCondition) -> Outcome:
        """End an admitted task that will not be submitted: its Data-Out cannot be had."""
        outcome = self.check(condition)
        if request in self.tasks:
            self._withdraw(request)
            self._count_failure(request.cdb[0], outcome.status)
        return outcome

    def _refused(self, request: Request, error: Exception) -> Outcome:
        outcome = self.failed(request, error)
        self._count_failure(request.cdb[0], outcome.status)
        return outcome

    def failed(self, request: Request, error: Exception) -> Outcome:
        """The one place where an exception becomes a status."""
        if isinstance(error, CheckCondition):
            return self.check(error)
        if isinstance(error, ReservationConflict):
            return RESERVATION_CONFLICT
        row = request.command
        name = row.name if row is not None else f"opcode {request.cdb[0]:02X}h"
        if isinstance(error, OSError):
            if error.errno == errno.EBADF:
                # The backend was closed under the command: its extent was edited, or the daemon stops. The
                # medium is well; who tries again meets the new backend, or the next daemon.
                return BUSY
            words = "%s: %s at byte %d: %s"
            log.warning(words, self.config.name, name, request.offset, error, extra=_fields(request))
            write = row is not None and row.access is Access.WRITE
            lba = request.offset // self.block_size
            return self.check(from_os_error(error, write=write, lba=lba))
        log.error(
            "%s: %s from %s failed by a fault of ours",
            self.config.name,
            name,
            request.nexus.initiator_name,
            exc_info=error,
            extra=_fields(request),
        )
        return self.check(CheckCondition(Sense.INTERNAL_TARGET_FAILURE))

    def _select(self, request: Request, row: Row) -> Command:
        """The row of a service action; raises for what is not in the table."""
        cdb = request.cdb
        if row is None:
            raise CheckCondition(Sense.LOGICAL_UNIT_NOT_SUPPORTED if self.absent else Sense.INVALID_OPCODE)
        if isinstance(row, Command):
            return row
        at, mask = service_action_field(cdb[0])
        action = int.from_bytes(cdb[8:10], "big") if at == 8 else cdb[at] & mask
        command = row.get(action)
        if command is None:
            raise CheckCondition(
                Sense.INVALID_FIELD_IN_CDB, field=at, bit=mask.bit_length() - 1 if at != 8 else 7
            )
        return command


_UNATTENDED = frozenset((0x12, 0xA0, 0x03))
"""INQUIRY, REPORT LUNS, REQUEST SENSE (SAM-5 §5.14.2)."""


def _reserved_bit(cdb: bytes, row: Command) -> CheckCondition:
    """INVALID FIELD IN CDB that points at the first bit set outside the usage mask."""
    wrong = int.from_bytes(cdb[: row.length], "big") & row.reserved
    position = 8 * row.length - wrong.bit_length()
    return CheckCondition(Sense.INVALID_FIELD_IN_CDB, field=position // 8, bit=7 - position % 8)


def _fields(request: Request) -> dict[str, object]:
    """Whose a log line about a command is: initiator, target and LUN, and the task tag where there is one."""
    nexus, lun = request.nexus, getattr(request, "lun", None)
    return {
        "initiator": nexus.initiator_name,
        "target": nexus.target_name,
        "lun": (lun[0] & 0x3F) << 8 | lun[1] if lun else None,  # peripheral or flat addressing, SAM-5 §4.7
        "tag": getattr(request, "initiator_task_tag", None),
    }
