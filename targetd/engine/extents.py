"""Live extents and their logical units: from the configuration's words to open backends.

``LiveExtent`` is one extent, open: its backend, its workers, its reservations, and a ``LogicalUnit`` for
every target that shows it. What an extent and a target say of each other (block size, serial number, write
protection, api-semantics §5.2) is a setting of that unit: an edit changes it, and is never another unit, so
whatever initiators have under way or have set up there goes on. The units of an extent share its backend
and its reservations.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from protocol.scsi.device import LogicalUnit, UnitConfig
from protocol.scsi.reservations import Reservations
from protocol.scsi.taskset import Throttle
from storage.base import Backend, Space
from storage.open import ExtentKind, ExtentSpec, PathError, open_backend, resolve_path
from storage.uring import Ring
from targetd.config import ConfigError, Extent, ExtentType, LunMapping, Target, unit_serial
from targetd.system.threads import WorkerThreads
from targetd.volumes import volume_file

__all__ = [
    "Appearance",
    "LiveExtent",
    "appearance",
    "check_path",
    "open_extent",
    "path_errors",
    "spec_of",
]


KINDS: Mapping[ExtentType, ExtentKind] = {
    "File": "file",
    "Disk": "device",
    "Device": "device",
    "ZVOL": "zvol",
    "ZFS Volume": "zvol",
    "Memory": "memory",
    "Null": "null",
}

PRODUCT = "iSCSI Disk"
VOLATILE_PRODUCTS: Mapping[ExtentType, str] = {"Memory": "VOLATILE MEMORY", "Null": "VOLATILE NULL"}
"""PRODUCT IDENTIFICATION (SPC-4 §6.4.2) of what nobody shall take for a disk."""

ROTATION: Mapping[str, int] = {"Unknown": 0, "SSD": 1}
"""``rpm`` → MEDIUM ROTATION RATE of VPD B1h; the other values are numbers (api-semantics §5.2)."""

MUST_NOT_EXIST = "There is a file under this path already."
SPACE_ARMED_S = 5.0
"""How often a medium is asked how full it is, when that can reach a threshold: soon enough to act on it."""
SPACE_IDLE_S = 60.0
"""The same where it is only for those who look."""

MUST_EXIST = "The file must exist if the extent size is set to auto (0)"


@dataclass(frozen=True, slots=True)
class Appearance:
    """How a target shows an extent: what may differ between two that show the same."""

    block_size: int
    serial: str
    read_only: bool


def appearance(extent: Extent, target: Target, mapping: LunMapping) -> Appearance:
    """How ``target`` shows ``extent`` (api-semantics §5.2: who wins where both have a say)."""
    return Appearance(
        block_size=extent.block_size if target.logical_block_size == 512 else target.logical_block_size,
        serial=unit_serial(extent, target, mapping.lun),
        read_only=extent.read_only or target.flags == "ro",
    )


def unit_config(
    extent: Extent, shown: Appearance, backend: Backend | None, threshold: int | None = None
) -> UnitConfig:
    """The logical unit's settings, from the extent's fields and what its medium is.

    ``threshold``: of an extent that has none of its own.
    """
    physical = backend.geometry.physical_block_size if backend is not None else 4096
    exponent = max((physical // shown.block_size).bit_length() - 1, 0)
    return UnitConfig(
        name=extent.name,
        serial=shown.serial,
        naa=extent.naa,
        vendor="FreeBSD" if extent.legacy else "TARGETD",
        product=VOLATILE_PRODUCTS.get(extent.type, PRODUCT),
        block_size=shown.block_size,
        physical_block_exponent=0 if extent.physical_block_size_hidden else exponent,
        read_only=shown.read_only,
        rotation_rate=_rotation_rate(extent, backend),
        xen=extent.xen,
        # what was taken beforehand is not given back: it was taken so that no write fails for want of it
        thin=not extent.allocate,
        insecure_tpc=extent.insecure_tpc,
        removable=extent.removable,
        threshold=threshold if extent.avail_threshold is None else extent.avail_threshold,
    )


def _rotation_rate(extent: Extent, backend: Backend | None) -> int:
    """As the operator says; what he does not know of a device the kernel may, if not how fast it turns."""
    if extent.rpm == "Unknown" and backend is not None and backend.geometry.rotational is False:
        return ROTATION["SSD"]
    return ROTATION[extent.rpm] if extent.rpm in ROTATION else int(extent.rpm)


def spec_of(extent: Extent, pools: Mapping[str, Path]) -> ExtentSpec:
    """What to open for an extent; a volume of a directory pool is a file that must be there."""
    volume = volume_file(extent.path, pools)
    if volume is not None:
        return ExtentSpec(kind="file", path=str(volume), read_only=extent.read_only)
    return ExtentSpec(
        kind=KINDS[extent.type],
        path=extent.path,
        size_bytes=extent.size_bytes,
        read_only=extent.read_only,
        create=extent.type == "File",
    )


def check_path(
    extent: Extent, roots: Sequence[Path], pools: Mapping[str, Path], *, new: bool = False
) -> None:
    """Where a file extent may live, and whether a volume is there; ``new``: a file must not be. Worker
    threads only.

    Raises:
        ConfigError: on ``path``.
    """
    if extent.type != "File":
        volume = volume_file(extent.path, pools)
        if volume is not None and not volume.is_file():
            message = f'Zvol "{extent.path.removeprefix("/dev/zvol/")}" does not exist'
            raise ConfigError.one("extents", "path", message, extent.id)
        return
    try:
        real = resolve_path(extent.path, roots)
    except PathError as error:
        raise ConfigError.one("extents", "path", str(error), extent.id) from None
    if new:
        if os.path.lexists(extent.path):
            raise ConfigError.one("extents", "path", MUST_NOT_EXIST, extent.id)
    elif not extent.size_bytes and not real.exists():
        raise ConfigError.one("extents", "path", MUST_EXIST, extent.id)


@contextmanager
def path_errors(extent: Extent) -> Iterator[None]:
    """Says of what the medium refuses, on ``path``, what the operator is to know.

    Raises:
        ConfigError: for an OSError or a ValueError inside.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError.one("extents", "path", f"{extent.path}: {reason}.", extent.id) from None
    except ValueError as error:
        raise ConfigError.one("extents", "path", str(error), extent.id) from None


def open_extent(extent: Extent, pools: Mapping[str, Path]) -> Backend:
    """Open the medium of an extent that an operator is writing now. Worker threads only.

    Raises:
        ConfigError: on ``path``, with the reason in words; a medium smaller than a block too.
    """
    with path_errors(extent):
        backend = open_backend(spec_of(extent, pools))
    if not extent.size_bytes and backend.geometry.size_bytes < extent.block_size:
        size = backend.geometry.size_bytes
        backend.close()
        message = f"{extent.path}: {size} bytes are less than one block of {extent.block_size} bytes."
        raise ConfigError.one("extents", "path", message, extent.id)
    return backend


class LiveExtent:
    """One extent of the configuration in force."""

    def __init__(
        self,
        extent: Extent,
        backend: Backend | None,
        lane: WorkerThreads,
        reservations: Reservations,
        make_unit: Callable[["LiveExtent", UnitConfig], LogicalUnit],
        threshold: int | None = None,
        ring: Ring | None = None,
    ) -> None:
        """
        Args:
            threshold: of extents that have none of their own.
            ring: what the backend may use.
        """
        self.extent = extent
        self.threshold = threshold
        self._ring = ring
        self.backend = backend
        self.lane = lane
        self.reservations = reservations
        self.units: dict[int, LogicalUnit] = {}
        """By the id of the target that shows it."""
        self._shown: dict[int, Appearance] = {}
        self._make_unit = make_unit
        self.missing = ""
        """Why there is no medium, or why it is gone; empty while there is one."""
        self.throttle: Throttle | None = None
        """I/O limits, while there are any."""
        self.looking = False
        """Someone is looking at the medium, or for it."""
        self.told = "ok"
        """The status that was told last."""
        self.lost_writes = 0
        """As far as the units know of them."""
        self._next_space = 0.0
        self._measuring = False

    @property
    def backend(self) -> Backend | None:
        """The open medium."""
        return self._backend

    @backend.setter
    def backend(self, backend: Backend | None) -> None:
        self._backend = backend
        if backend is not None:
            backend.serve_by(self._ring)

    @property
    def medium(self) -> Backend | None:
        """What the units work on: nothing while the medium is gone, even though its opening is kept."""
        return None if self.missing else self.backend

    @property
    def status(self) -> str:
        """``ok``, or what is wrong in words for the operator."""
        if self.missing:
            return self.missing
        return self.backend.status if self.backend is not None else "not open"

    @property
    def in_use(self) -> bool:
        """A session could be reading or writing it."""
        return any(unit.nexuses for unit in self.units.values())

    def unit(self, target_id: int, shown: Appearance) -> LogicalUnit:
        """The unit of a target, made when it is wanted first, and told how the extent is shown by now."""
        self._shown[target_id] = shown
        config = unit_config(self.extent, shown, self.medium, self.threshold)
        unit = self.units.get(target_id)
        if unit is None:
            unit = self._make_unit(self, config)
            unit.limit(self.throttle)
            self.units[target_id] = unit
        elif unit.config != config or unit.backend is not self.medium:
            unit.reconfigure(config, self.medium)
        return unit

    def replace_medium(self, lane: WorkerThreads) -> None:
        """Another medium is to come, with threads of its own: those of the one before may hang in it."""
        self.lane.close()
        self.lane = lane
        first: LogicalUnit | None = None
        for unit in self.units.values():
            unit.replace_medium()
        for unit in self.units.values():
            unit.lane = lane
            unit.begin_anew(first)
            first = first or unit

    def keep_units(self, target_ids: set[int]) -> None:
        """Forget the units of other targets: they show the extent no more."""
        for target_id in self.units.keys() - target_ids:
            unit = self.units.pop(target_id)
            del self._shown[target_id]
            self.reservations.units.discard(unit)
            unit.leave_medium()

    def show(self) -> None:
        """Tell the units what their medium is now."""
        medium = self.medium
        for target_id, unit in self.units.items():
            shown = self._shown[target_id]
            unit.reconfigure(unit_config(self.extent, shown, medium, self.threshold), medium)

    def measure_space(self, now: float) -> None:
        """Now and then, while somebody uses it, look how full the medium is, and let the units know.

        On the lane: what is asked may wait for the medium. A medium that does not answer is not asked again.
        """
        backend = self.medium
        if now < self._next_space:
            return
        self._next_space = now + SPACE_ARMED_S
        if self._measuring or backend is None or not self.in_use:
            return
        if all(unit.config.threshold is None for unit in self.units.values()):
            self._next_space = now + SPACE_IDLE_S
        self._measuring = True

        def done(space: Space | None) -> None:
            self._measuring = False
            if space is not None and self.medium is backend:
                for unit in self.units.values():
                    unit.note_space(space)

        self.lane.run(partial(_space, backend), done)

    def limit(self, throttle: Throttle | None) -> None:
        """Other I/O limits, or none."""
        self.throttle = throttle
        for unit in self.units.values():
            unit.limit(throttle)

    def proceed(self) -> None:
        """What waited for the I/O limits may go on."""
        for unit in self.units.values():
            unit.proceed()


def _space(backend: Backend) -> Space | None:
    """On a worker."""
    try:
        return backend.space()
    except OSError:
        return None  # commands meet the same, and say it
