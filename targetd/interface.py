"""The one narrow interface between the engine and everything that steers it (design.md §1).

Plain data in and out, so that targets can be spread over worker processes without touching ``api/``
or ``protocol/``.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from targetd.config import Configuration

__all__ = [
    "LATENCY_BOUNDS_S",
    "ConnectionStatus",
    "Dataset",
    "DatasetError",
    "DatasetRequest",
    "DatasetStatus",
    "Datasets",
    "Edit",
    "Engine",
    "Event",
    "Explanation",
    "Latency",
    "LoginFailure",
    "LunStatus",
    "PortalStatistics",
    "ProcessStatistics",
    "ServiceState",
    "SessionStatistics",
    "SessionStatus",
    "SnapshotStatus",
    "Statistics",
    "Storage",
    "StorageError",
    "UnitStatistics",
    "VisibleLun",
    "Volume",
    "Work",
]

Edit = Callable[[Configuration], Configuration]
"""Makes the new configuration from the one in force; raises ``ConfigError`` to change nothing."""


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """One connection of a session."""

    cid: int
    peer_address: str
    local_address: str
    header_digest: str
    data_digest: str


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """One session as an operator sees it. Ages in seconds, lengths in bytes."""

    id: int
    """Unique for the life of the daemon; not the TSIH, which is reused."""
    initiator_name: str
    initiator_alias: str
    target_id: int | None
    """None: a discovery session."""
    target_name: str
    target_portal_group_tag: int
    isid: str
    """``0x`` and 12 hexadecimal digits."""
    tsih: int
    user: str
    """The CHAP user, empty without CHAP."""
    connections: tuple[ConnectionStatus, ...]
    negotiated: dict[str, Any]
    """Login key → value as settled."""
    luns: tuple[int, ...]
    commands: int
    bytes_read: int
    bytes_written: int
    age_s: float
    idle_s: float
    told_s: float = 0.0
    """How long ago this was so: more than 0 while its worker process does not answer."""


LATENCY_BOUNDS_S: tuple[float, ...] = tuple(2.0**exponent * 1e-6 for exponent in range(26))
"""Upper bounds of the latency buckets, seconds: 1 µs, doubled each time, to half a minute."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long commands took, from when all of it was here to when its answer was handed to the network.

    Commands that ended at once are sampled and weighted, so counts are estimates of the true ones; those
    that waited for a medium are all there.
    """

    buckets: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS_S) + 1)
    """Commands up to each of ``LATENCY_BOUNDS_S`` and above the one before; the last: longer ones."""
    sum_s: float = 0.0


@dataclass(frozen=True, slots=True)
class UnitStatistics:
    """One logical unit since it came: an extent as one or more targets show it."""

    extent_id: int
    extent: str
    luns: tuple[tuple[str, int], ...]
    """(full target name, LUN) where it is."""
    commands: dict[str, int]
    """Name of the command → received."""
    failures: dict[tuple[str, str], int]
    """(name of the command, SCSI status) → ended so; GOOD is not among them."""
    reads: int
    writes: int
    bytes_read: int
    bytes_written: int
    read_errors: int
    """Reads that the medium failed."""
    write_errors: int
    in_flight: int
    queued: int
    """Work of the whole extent that waits for a worker."""
    ready: bool
    """The medium is there."""
    latency: Latency


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """One open session."""

    id: int
    initiator_name: str
    target_name: str
    portal_id: int
    commands: int
    bytes_read: int
    bytes_written: int
    in_flight: int
    latency: Latency


@dataclass(frozen=True, slots=True)
class PortalStatistics:
    """One portal since the start: its open sessions and those that are over."""

    id: int
    connections_accepted: int
    connections: int
    sessions: int
    commands: int
    bytes_read: int
    bytes_written: int
    in_flight: int
    login_failures: dict[str, int]
    """Login status → logins refused."""
    drops: dict[str, int]
    """Kind of reason → connections that ended."""
    latency: Latency
    addresses_absent: int = 0
    """Addresses that are not listened on, though they are wanted."""


@dataclass(frozen=True, slots=True)
class Work:
    """Something that takes its time, while it is under way. ``done`` of ``total`` bytes."""

    kind: str
    """``allocate`` (all the space of a file), ``sanitize``, ``format``, or ``copy`` (a third-party copy)."""
    extent_id: int
    extent: str
    """For a copy: of the unit that carries it out."""
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ProcessStatistics:
    """One worker process."""

    name: str
    """Its number, from 1 up."""
    pid: int
    """0: it is not there at the moment."""
    cpu_s: float = 0.0
    """User and system time."""
    resident_bytes: int = 0
    descriptors: int = 0
    loop_lag_s: float = 0.0
    loop_lag_longest_s: float = 0.0
    restarts: int = 0
    """Since the daemon started."""
    told_s: float = 0.0
    """How long ago the figures of this process, and of its units and sessions, were so: more than 0 while it
    does not answer."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters since start, at one moment. Times in seconds, lengths in bytes."""

    units: tuple[UnitStatistics, ...] = ()
    sessions: tuple[SessionStatistics, ...] = ()
    portals: tuple[PortalStatistics, ...] = ()
    changes: int = 0
    """Changes of the configuration that were saved."""
    changes_failed: int = 0
    save_s: float = 0.0
    """Spent saving, in all."""
    save_longest_s: float = 0.0
    loop_lag_s: float = 0.0
    """How late the event loop was at its last tick."""
    loop_lag_longest_s: float = 0.0
    events_lost: int = 0
    """Events that readers of the stream were too slow for."""
    io_engine: str = "threads"
    """What does reads, writes and flushes that wait for a medium: ``uring`` (the kernel) or ``threads``."""
    io_engine_reason: str = ""
    """Why it is not ``uring``."""
    io_under_way: int = 0
    """Operations that the kernel has in hand."""
    work: tuple[Work, ...] = ()
    """What is under way just now."""
    processes: tuple[ProcessStatistics, ...] = ()
    """Workers, where there are any."""


SANITIZE_METHODS: tuple[str, ...] = ("overwrite", "block erase", "cryptographic erase")
"""Service actions 1, 2 and 3 of SANITIZE (SBC-3 table 96)."""

MAX_SANITIZE_PASSES = 31
"""OVERWRITE COUNT has five bits (SBC-3 §5.24)."""


class StorageError(Exception):
    """What was asked of a pool could not be done; the text is for who asked."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A pool, or a file system in it. Lengths in bytes."""

    name: str
    """With its pool: ``tank/a/b``."""
    pool: str
    available: int
    used: int
    mountpoint: str
    status: str
    """``HEALTHY``, or what it is instead."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume of a pool. Lengths in bytes."""

    name: str
    """Without its pool."""
    size_bytes: int
    used: int
    available: int


class Storage(Protocol):
    """Pools beside the extents. Whatever names a pool raises ``KeyError`` when there is none of the name,
    and ``StorageError`` when it fails."""

    def pools(self) -> Awaitable[list[tuple[Dataset, list[Dataset]]]]:
        """Each pool as a dataset, and the datasets right below it."""

    def dataset(self, path: str) -> Awaitable[Dataset | None]:
        """``POOL/…``; None: there is none."""

    def volumes(self, pool: str) -> Awaitable[list[Volume]]:
        """All volumes of a pool, by name."""

    def volume(self, pool: str, name: str) -> Awaitable[Volume | None]:
        """One volume; None: there is none."""

    def create(self, pool: str, name: str, size_bytes: int, sparse: bool) -> Awaitable[Volume]:
        """Make a volume."""

    def resize(self, pool: str, name: str, size_bytes: int) -> Awaitable[Volume | None]:
        """Make it larger or smaller; None: there is none."""

    def delete(self, pool: str, name: str, recursive: bool = False) -> Awaitable[bool]:
        """Destroy it, with what was made from it if ``recursive``; False: there is none."""


class DatasetError(StorageError):
    """A dataset or snapshot cannot be made, changed or destroyed; the text is for whoever asked.

    Args:
        error: number of ``errno`` that says the kind: ENOENT, EEXIST, EBUSY, EINVAL, ENOSPC, ENOTSUP.
    """

    def __init__(self, error: int, text: str) -> None:
        super().__init__(text)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatus:
    """A volume or file system of a pool, as TrueNAS calls both: a dataset. Lengths in bytes."""

    name: str
    """With its pool: ``tank/vms/disk1``."""
    kind: Literal["FILESYSTEM", "VOLUME"]
    available: int
    used: int
    size_bytes: int = 0
    """Of a volume."""
    block_size: int = 0
    """Of a volume: its size is a multiple of it (``volblocksize``)."""
    sparse: bool = True
    """Of a volume: its space is not reserved."""
    mountpoint: str = ""
    origin: str = ""
    """The snapshot that it was cloned from; empty: none."""
    comments: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)
    """User properties: names with a colon, as zfsprops(7) has them."""

    @property
    def pool(self) -> str:
        """The first part of the name."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotStatus:
    """A snapshot of a dataset. Lengths in bytes."""

    dataset: str
    name: str
    """The part behind ``@``."""
    created: float
    """Seconds since the epoch."""
    used: int
    referenced: int
    size_bytes: int = 0
    """Of the volume when it was taken; 0 for a file system."""
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """``tank/vms/disk1@before``."""
        return f"{self.dataset}@{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRequest:
    """A dataset to make. Lengths in bytes."""

    name: str
    kind: Literal["FILESYSTEM", "VOLUME"] = "FILESYSTEM"
    size_bytes: int = 0
    block_size: int = 0
    """0: the pool's own."""
    sparse: bool = False
    ancestors: bool = False
    """Make the file systems that lead to it."""
    comments: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)


class Datasets(Protocol):
    """Datasets and snapshots of all pools. Names are whole (``tank/vms/disk1``, ``tank/vms/disk1@before``).

    What cannot be done raises ``DatasetError`` and has changed nothing.
    """

    def datasets(self) -> Awaitable[list[DatasetStatus]]:
        """All datasets of all pools, by name; a pool itself is the first of its own."""

    def dataset(self, name: str) -> Awaitable[DatasetStatus | None]:
        """One dataset; None: there is none."""

    def create(self, request: DatasetRequest) -> Awaitable[DatasetStatus]:
        """Make a volume or a file system."""

    def resize(self, name: str, size_bytes: int) -> Awaitable[None]:
        """Change the size of a volume."""

    def describe(
        self, name: str, comments: str | None, properties: Mapping[str, str | None]
    ) -> Awaitable[None]:
        """Set comments (None: as they are) and user properties (None removes one), durably."""

    def destroy(self, name: str, recursive: bool) -> Awaitable[None]:
        """Destroy a dataset; with ``recursive`` its snapshots and what is below it too."""

    def rename(self, name: str, new_name: str) -> Awaitable[None]:
        """Give a dataset another name in the same pool."""

    def promote(self, name: str) -> Awaitable[None]:
        """Make a clone independent of where it came from: the snapshot becomes its own."""

    def snapshots(self, dataset: str | None = None) -> Awaitable[list[SnapshotStatus]]:
        """Snapshots of one dataset or of all, by name."""

    def snapshot(
        self, dataset: str, name: str, properties: Mapping[str, str], in_use: bool, recursive: bool
    ) -> Awaitable[SnapshotStatus]:
        """Take a snapshot.

        Args:
            in_use: an initiator may be writing; then only what takes it in one instant is right.
            recursive: of all datasets below too.
        """

    def destroy_snapshot(self, full_name: str, recursive: bool) -> Awaitable[None]:
        """Destroy a snapshot; with ``recursive`` those of the same name below it too."""

    def rename_snapshot(self, full_name: str, new_full_name: str) -> Awaitable[None]:
        """Give a snapshot another name."""

    def clone(self, full_name: str, name: str, properties: Mapping[str, str]) -> Awaitable[DatasetStatus]:
        """Make a dataset that begins as a snapshot is."""

    def rollback(self, full_name: str) -> Awaitable[None]:
        """Make a dataset what it was when the snapshot was taken. Nobody may use it meanwhile."""

    def copy(self, full_name: str, name: str, progress: Callable[[int, int], None]) -> Awaitable[None]:
        """Copy a snapshot to a new dataset that shares nothing with it.

        Args:
            progress: hears of bytes done and bytes in all; called on another thread.
        """


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for the event stream."""

    kind: str
    at: float
    """Seconds since the epoch."""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoginFailure:
    """A login that was refused, or a connection that we closed before it had logged in."""

    at: float
    """Seconds since the epoch."""
    initiator_name: str
    """As the peer said; empty: it had not said yet."""
    peer_address: str
    local_address: str
    portal_id: int
    target_name: str
    """Empty: discovery, or not said yet."""
    status: str
    """Login status as sent, four hexadecimal digits; empty: nothing was sent."""
    reason: str
    """The rule that refused it, in words."""


@dataclass(frozen=True, slots=True)
class VisibleLun:
    """A logical unit that an initiator would see."""

    lun: int
    extent_id: int
    extent: str
    size_bytes: int
    block_size: int
    read_only: bool
    ready: bool
    """Its medium is there."""


@dataclass(frozen=True, slots=True)
class LunStatus:
    """A logical unit as the logical unit controller shows it."""

    path: str
    size_bytes: int
    read_only: bool = False
    removable: bool = False
    present: bool = True
    locked: bool = False
    """An initiator prevents removal."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would come of a login to one target through one portal."""

    portal_id: int
    portal_addresses: tuple[str, ...]
    target_id: int
    target_name: str
    allowed: bool
    reason: str
    """The rule that decides, in words."""
    authentication: str
    """What the initiator has to prove: None, Auto, CHAP or CHAP Mutual; empty when it is refused anyway."""
    discovered: bool
    """SendTargets through this portal tells it of the target; networks are not asked then."""
    luns: tuple[VisibleLun, ...]
    """What it would see; nothing when it is refused."""


@dataclass(frozen=True, slots=True)
class ServiceState:
    """``services/services/iscsitarget``."""

    enabled: bool
    running: bool


class Engine(Protocol):
    """What api/ is given."""

    @property
    def configuration(self) -> Configuration:
        """What is in force now."""

    def apply(
        self,
        edit: Edit,
        *,
        discard_files: frozenset[int] = frozenset(),
        clone_of: int | None = None,
        force: bool = False,
    ) -> Awaitable[Configuration]:
        """Change the configuration: validate, prepare, save, swap, drain; all of it or none of it.

        Edits are serialised; each sees the result of the one before. When the answer comes the change
        is durable and in force. What an edit raises reaches the caller as it is, and nothing has changed.

        Args:
            edit: makes the new configuration; the very one it was given if there is nothing to do.
            discard_files: ids of File extents which the edit removes and whose backing files go too,
                once the change is in force. Other files are kept.
            clone_of: id of a File extent. The one extent that the edit adds gets a new file that shares
                that one's blocks, as they are between two commands.
            force: change what initiators that are logged in rely upon, too (another medium, another block
                size, a smaller size); they are told by unit attention, and commands under way are ended.

        Returns:
            What this edit made, also if another has followed since.

        Raises:
            ConfigError: a field is wrong, or the change cannot be carried out (a file cannot be made, an
                address cannot be bound, an initiator relies on what there is); nothing has changed.
        """

    def foresee(self, edit: Edit, *, force: bool = False) -> Awaitable[None]:
        """Judge an edit as ``apply`` does, and change nothing: the configuration as a whole, where extents
        are and what is there. Whether there will be room and an address can be bound is not foreseen.

        Raises:
            ConfigError: as ``apply``.
        """

    def sanitize(self, extent_id: int, method: str, passes: int = 1) -> Awaitable["Work | str"]:
        """Begin to make everything on an extent unreadable; it goes on to its end, over restarts too.

        Args:
            method: of ``SANITIZE_METHODS``.
            passes: of an overwrite with zeroes, 1 to 31.

        Returns:
            The work that is under way, or why it is not begun, in words.
        """

    def adopt_medium(self, extent_id: int) -> Awaitable[str]:
        """Take what is under the path of an extent for its medium, whatever was there before; a file that is
        shorter than the extent is grown. Its initiators learn that the medium may have changed.

        Returns:
            Why that cannot be, in words; empty: it is done, or there was nothing to do.
        """

    def look_again(self, path: str = "") -> Awaitable[None]:
        """Look at a medium again, or with no path at all: initiators learn if its size has changed."""

    def extent_statuses(self, extent_ids: Collection[int]) -> Awaitable[Mapping[int, str]]:
        """``ok`` for each, or what is wrong with its medium, in words."""

    def portal_status(self, portal_id: int) -> str:
        """``ok``, or which of its addresses are not listened on and why, in words."""

    def service_state(self) -> ServiceState:
        """Whether the iSCSI portals are wanted and listening."""

    def sessions(self) -> Awaitable[list[SessionStatus]]:
        """All sessions, discovery ones too."""

    def drop(self, session_id: int, reason: str) -> Awaitable[bool]:
        """Ask the initiator to log out, then end the session; False: no such session."""

    def negotiate(self, session_id: int) -> Awaitable[bool]:
        """Ask the initiator to negotiate anew what may be in full feature phase; False: no such session."""

    def statistics(self) -> Awaitable[Statistics]:
        """Counters since start."""

    def login_failures(self) -> Awaitable[list[LoginFailure]]:
        """The last ones, newest first."""

    def explain(
        self, initiator_name: str, address: str, target: str = "", portal_id: int | None = None
    ) -> Awaitable[list[Explanation]]:
        """May this initiator from this address log in, and what would it see?

        Args:
            address: IP address of the initiator.
            target: full or stored name; empty: every target.
            portal_id: one that exists; None: every portal.
        """

    def events(self) -> AsyncIterator[Event]:
        """What happens from now on."""
