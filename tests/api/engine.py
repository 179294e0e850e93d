"""An engine without disks and sockets, for tests of the API: it validates, serialises and remembers.

What the real one finds on disk is said in advance: ``refuse`` makes the next edits fail as it would.
"""

import asyncio
from collections.abc import AsyncIterator, Collection

from targetd.config import ConfigError, Configuration, fresh, validate
from targetd.interface import (
    Edit,
    Event,
    Explanation,
    LoginFailure,
    ServiceState,
    SessionStatus,
    Statistics,
    Work,
)


class MemoryEngine:
    """Implements ``targetd.interface.Engine``."""

    def __init__(self, configuration: Configuration | None = None) -> None:
        self.configuration = configuration or fresh()
        self.applied = 0
        """Edits that changed something."""
        self.discarded: set[int] = set()
        self.forced = 0
        """Those of them that were to be done in any case."""
        self.cloned: list[int] = []
        self.adopted: list[int] = []
        self.sanitized: list[tuple[int, str, int]] = []
        self.faults: dict[int, str] = {}
        self.absent: dict[int, str] = {}
        self.open_sessions: dict[int, SessionStatus] = {}
        self.looked_at: list[str] = []
        self.negotiated: list[int] = []
        self.counted = Statistics()
        self.failures: list[LoginFailure] = []
        self.explained: list[Explanation] = []
        self.asked: tuple[str, str, str, int | None] | None = None
        self.happening: asyncio.Queue[Event] = asyncio.Queue()
        self.readers = 0
        self.refuse: ConfigError | Exception | None = None
        self._lock = asyncio.Lock()

    async def apply(
        self,
        edit: Edit,
        *,
        discard_files: frozenset[int] = frozenset(),
        clone_of: int | None = None,
        force: bool = False,
    ) -> Configuration:
        async with self._lock:
            before = self.configuration
            after = edit(before)
            if after is before:
                return before
            validate(after, since=before)
            await asyncio.sleep(0)  # as the real one waits for disk here: others get a turn
            if self.refuse is not None:
                raise self.refuse
            self.configuration = after
            self.applied += 1
            self.discarded |= discard_files
            self.forced += force
            if clone_of is not None:
                self.cloned.append(clone_of)
            return after

    async def foresee(self, edit: Edit, *, force: bool = False) -> None:
        before = self.configuration
        after = edit(before)
        if after is not before:
            validate(after, since=before)
            if self.refuse is not None:
                raise self.refuse

    async def sanitize(self, extent_id: int, method: str, passes: int = 1) -> Work | str:
        self.sanitized.append((extent_id, method, passes))
        return self.faults.get(extent_id) or Work("sanitize", extent_id, "name", 0, 1 << 20)

    async def adopt_medium(self, extent_id: int) -> str:
        self.adopted.append(extent_id)
        return self.faults.get(extent_id, "")

    async def look_again(self, path: str = "") -> None:
        self.looked_at.append(path)

    async def extent_statuses(self, extent_ids: Collection[int]) -> dict[int, str]:
        return {id: self.faults.get(id, "ok") for id in extent_ids}

    def portal_status(self, portal_id: int) -> str:
        return self.absent.get(portal_id, "ok")

    def service_state(self) -> ServiceState:
        enabled = self.configuration.service_enabled
        return ServiceState(enabled=enabled, running=enabled)

    async def sessions(self) -> list[SessionStatus]:
        return list(self.open_sessions.values())

    async def drop(self, session_id: int, reason: str) -> bool:
        return self.open_sessions.pop(session_id, None) is not None

    async def negotiate(self, session_id: int) -> bool:
        self.negotiated.append(session_id)
        return session_id in self.open_sessions

    async def statistics(self) -> Statistics:
        return self.counted

    async def login_failures(self) -> list[LoginFailure]:
        return list(self.failures)

    async def explain(
        self, initiator_name: str, address: str, target: str = "", portal_id: int | None = None
    ) -> list[Explanation]:
        self.asked = (initiator_name, address, target, portal_id)
        return list(self.explained)

    async def events(self) -> AsyncIterator[Event]:
        self.readers += 1
        try:
            while True:
                yield await self.happening.get()
        finally:
            self.readers -= 1
