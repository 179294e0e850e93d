"""The target device: its logical units by LUN, and who is logged in (SAM-5 §4.5). Knows no iSCSI.

What the rest of the program needs of the SCSI layer can be had from here.
"""

from collections.abc import Callable, Iterable, Mapping

from protocol.scsi.commands import Command
from protocol.scsi.interfaces import Keep, Lane, Reservations, Reset, UnitConfig
from protocol.scsi.lun import decode_lun, encode_lun, flat_lun
from protocol.scsi.request import Nexus, Request
from protocol.scsi.sense import Sense
from protocol.scsi.unit import LogicalUnit

__all__ = [
    "Keep",
    "Lane",
    "LogicalUnit",
    "Reservations",
    "Reset",
    "Target",
    "UnitConfig",
    "decode_lun",
    "encode_lun",
]


class _NoReservations:
    """Reservations of the stand-in: none."""

    held = False

    def check(self, request: Request, command: Command) -> None:
        """Nothing conflicts."""

    def reset(self) -> None:
        """Nothing to end."""

    def nexus_lost(self, nexus: Nexus) -> None:
        """Nothing to end."""


def _nothing_beyond(nexus: Nexus, naa: str) -> Iterable[tuple[LogicalUnit, Nexus]]:
    """This target is the only one."""
    return ()


class Target:
    """A target device as initiators see it: its logical units by LUN, and who is logged in.

    The units may be replaced while sessions are open. A LUN without a unit is answered by a stand-in,
    so that there is one way for all commands.
    """

    def __init__(
        self, name: str, luns: Mapping[int, LogicalUnit], *, lane: Lane, now: Callable[[], float]
    ) -> None:
        self.name = name
        self.ports: tuple[int, ...] = ()
        """Relative target port identifiers: the tags of its portal groups (RFC 7143 §3.4.1)."""
        self.luns: dict[int, LogicalUnit] = {}
        self.beyond: Callable[[Nexus, str], Iterable[tuple[LogicalUnit, Nexus]]] = _nothing_beyond
        """The units of other targets that have an NAA (``UnitConfig.naa``) and that the initiator of a nexus
        may use, each with the nexus whose rights count there."""
        self.nexuses: dict[Nexus, dict[int, tuple[str, str]]] = {}
        """Who is logged in, with the units that have left a LUN since: LUN → which it was (``_identity``)."""
        config = UnitConfig(name=f"{name} (no such LUN)", serial="", naa="", thin=False)
        self.absent = LogicalUnit(config, None, lane, reservations=_NoReservations(), now=now, absent=True)
        self._by_field: dict[bytes, LogicalUnit] = {}
        self._set(luns)

    def _set(self, luns: Mapping[int, LogicalUnit]) -> None:
        self.luns = dict(sorted(luns.items()))
        fields: dict[bytes, LogicalUnit] = {}
        for lun, unit in self.luns.items():
            fields[encode_lun(lun)] = unit
            fields[flat_lun(lun)] = unit
        self._by_field = fields

    def rename(self, name: str) -> None:
        """Another name from now on; VPD page 83h says it, so every nexus is told."""
        self.name = name
        for unit in self.luns.values():
            unit.raise_attention(Sense.INQUIRY_DATA_CHANGED)

    def unit_for(self, field: bytes) -> LogicalUnit:
        """The unit of an 8-byte LUN field, or the stand-in."""
        return self._by_field.get(field, self.absent)

    def attach(self, nexus: Nexus) -> None:
        """A session came."""
        self.nexuses[nexus] = {}
        self.absent.nexuses[nexus] = self  # without a unit attention: there is no unit
        for unit in self.luns.values():
            unit.attach(nexus, self)

    def detach(self, nexus: Nexus) -> list[Request]:
        """A session went: returns the tasks it leaves behind, all ended."""
        self.nexuses.pop(nexus, None)
        dropped: list[Request] = []
        for unit in (*self.luns.values(), self.absent):
            dropped += unit.detach(nexus)
        return dropped

    def nexus_lost(self, nexus: Nexus) -> list[Request]:
        """I_T NEXUS RESET: returns the tasks of the nexus, all ended."""
        return [request for unit in self.luns.values() for request in unit.nexus_lost(nexus)]

    def reset(self, origin: Nexus | None, kind: Reset) -> list[Request]:
        """TARGET WARM RESET and TARGET COLD RESET: every unit; returns the tasks of the origin."""
        return [request for unit in self.luns.values() for request in unit.reset(origin, kind)]

    def replace_luns(self, luns: Mapping[int, LogicalUnit]) -> list[Request]:
        """Make ``luns`` the units, live. Returns the tasks of the units that went, all ended: nobody's task
        management did it, so the owner answers them.

        A unit that stays, on whatever LUN, keeps its tasks and reservations. When the inventory has
        changed every nexus learns it from any unit (SPC-4 §6.33, 3Fh/0Eh), new ones too, for there may be no
        other. Told by one it is told; so where a nexus has known another unit at the same LUN, that unit
        itself says so besides (28h/00h, 3Fh/03h): else what was meant for the one is written to the other.
        """
        before = self.luns
        if dict(luns) == before:
            return []
        had = set(before.values())
        gone = had.difference(luns.values())
        dropped: list[Request] = []
        for nexus, known in self.nexuses.items():
            for lun, unit in before.items():
                if unit in gone:
                    dropped += unit.detach(nexus)
                if luns.get(lun) is not unit:
                    known[lun] = _identity(unit)
        self._set(luns)
        for nexus, known in self.nexuses.items():
            for lun, unit in self.luns.items():
                if unit not in had:
                    unit.attach(nexus, self)
                unit.raise_attention(Sense.REPORTED_LUNS_DATA_CHANGED, only=nexus)
                if known.pop(lun, _identity(unit)) != _identity(unit):
                    unit.raise_attention(Sense.MEDIUM_MAY_HAVE_CHANGED, only=nexus)
                    unit.raise_attention(Sense.INQUIRY_DATA_CHANGED, only=nexus)
        return dropped


def _identity(unit: LogicalUnit) -> tuple[str, str]:
    """What initiators know a unit by."""
    return unit.config.naa, unit.config.serial
