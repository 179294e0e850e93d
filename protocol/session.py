"""Sessions: the command window, the task set, who belongs to whom. Knows no sockets and no time source.

A ``Session`` is the target's end of an I_T nexus (RFC 7143 §4.2, §8.1.3). Its two counters are the whole
of command numbering and flow control (§4.2.2.1):

* ``exp_cmd_sn`` is the next CmdSN in turn. Commands are handed on strictly in this order, over all
  connections of the session; one that comes early waits in ``held``, with the unsolicited data behind it.
* ``max_cmd_sn`` is the last CmdSN the initiator may use now. It starts a queue depth ahead and moves on by
  one when a command *completes*, so what a session can have outstanding is bounded by its queue depth, and
  the number never goes back: where the depth gets less, as many completions do not move it.

``SessionTable`` knows all sessions and decides what a login means: a new session, the same one again
(session reinstatement, §6.3.5), one more connection, or the same connection again.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from protocol import allegiance, serial
from protocol.access import Grant, Refusal
from protocol.enums import AsyncEvent, LoginStatus
from protocol.events import End, EndReason
from protocol.limits import (
    DATA_MEMORY,
    LEAST_IN_FLIGHT,
    MAX_DISCOVERY_OF_ONE,
    MAX_DISCOVERY_SESSIONS,
    MAX_IN_FLIGHT,
    MAX_TSIH,
)
from protocol.scsi.attention import condition
from protocol.scsi.request import Nexus
from protocol.scsi.sense import Sense

if TYPE_CHECKING:
    from protocol.allegiance import Lost
    from protocol.connection import Connection
    from protocol.login import LoginResult
    from protocol.negotiation import SessionKeys
    from protocol.scsi.device import Target
    from protocol.task import Task

__all__ = ["DeferredPdu", "Session", "SessionTable"]

_MASK = serial.MASK


@dataclass(slots=True)
class DeferredPdu:
    """A PDU that came before its turn; copies, since receive buffers are used again."""

    connection: "Connection"
    header: bytes
    """BHS and AHS."""
    data: bytes
    data_outs: list[tuple[bytes, bytes]] = field(default_factory=list)
    """(header, data) of unsolicited Data-Out PDUs that came for it."""
    size: int = 0
    """Bytes in ``data_outs``."""


class Session:
    """One session, normal or discovery."""

    __slots__ = (
        "_releasing",
        "bytes_read",
        "bytes_written",
        "commands",
        "connections",
        "created_at",
        "depth",
        "ended",
        "exp_cmd_sn",
        "grant",
        "held",
        "id",
        "initiator_alias",
        "initiator_name",
        "isid",
        "keys",
        "lost",
        "max_cmd_sn",
        "nexus",
        "origin",
        "target",
        "tasks",
        "tsih",
        "user",
        "withheld",
    )

    def __init__(
        self, number: int, tsih: int, login: "LoginResult", cmd_sn: int, now: float, origin: str = ""
    ) -> None:
        grant: Grant = login.grant
        self.id = number
        """Unique for the life of the daemon."""
        self.tsih = tsih
        self.isid = login.isid
        self.initiator_name = login.initiator_name
        self.initiator_alias = login.initiator_alias
        self.user = login.user
        self.grant = grant
        self.keys: SessionKeys = login.session_keys
        self.target: Target | None = grant.target  # type: ignore[assignment]  # opaque to access.py
        """None: a discovery session."""
        self.nexus = Nexus(
            login.initiator_name,
            login.isid,
            grant.target_name,
            grant.target_portal_group_tag,
            login.user,
        )
        self.connections: dict[int, Connection] = {}
        self.lost: dict[Connection, Lost] = {}
        """Connections that are gone and whose tasks wait (``protocol.allegiance``)."""
        self.tasks: dict[int, Task] = {}
        """InitiatorTaskTag → SCSI command under way."""
        self.exp_cmd_sn = cmd_sn
        self.depth = max(grant.queue_depth, 1)
        """Commands that may be outstanding."""
        self.withheld = 0
        """Completions to come that do not open the window: it is to be narrower. While there are any, no
        command goes by ``fastpath``, which does not know of them."""
        self.max_cmd_sn = serial.add(cmd_sn, self.depth - 1)
        self.held: dict[int, DeferredPdu | None] = {}
        """CmdSN → the PDU that came before its turn; None where the number counts as used (``skip``)."""
        self._releasing = False
        self.created_at = now
        self.origin = origin
        """Whom limits count it for."""
        self.ended: End | None = None
        """Why the session is over; None while it lives."""
        self.commands = 0
        self.bytes_read = 0
        self.bytes_written = 0

    def __repr__(self) -> str:
        return f"<Session {self.id} {self.initiator_name} {self.grant.target_name or 'discovery'}>"

    # -- the command window -------------------------------------------------------------------

    def in_turn(self, cmd_sn: int) -> bool:
        """Whether a non-immediate PDU with this CmdSN is to be carried out now (RFC 7143 §4.2.2.1).

        Then it is counted. A number ahead of its turn may be kept (``is_early``); anything outside the
        window, or seen already, is ignored silently, as the RFC demands.
        """
        if cmd_sn != self.exp_cmd_sn or not serial.le(cmd_sn, self.max_cmd_sn):
            return False
        self.exp_cmd_sn = (cmd_sn + 1) & _MASK
        return True

    def is_early(self, cmd_sn: int) -> bool:
        """Ahead of its turn, inside the window, and not here yet."""
        return (
            serial.lt(self.exp_cmd_sn, cmd_sn)
            and serial.le(cmd_sn, self.max_cmd_sn)
            and cmd_sn not in self.held
        )

    def skip(self, cmd_sn: int) -> None:
        """Count a number inside the window as received and over (RFC 7143 §11.6.1): whatever carries it,
        here already or still to come, is not carried out."""
        early = self.held.get(cmd_sn)
        if early is not None:
            early.connection.forget_early(early)
        self.held[cmd_sn] = None
        self.release_held()

    def release_held(self) -> None:
        """Carry out what waited for its turn, as far as the turn has come."""
        if self._releasing:  # called by what is carried out here: one loop does it, however many wait
            return
        self._releasing = True
        try:
            while self.exp_cmd_sn in self.held:
                early = self.held.pop(self.exp_cmd_sn)
                if early is None:
                    self.exp_cmd_sn = (self.exp_cmd_sn + 1) & _MASK
                    self.retired()
                else:
                    early.connection.carry_out_early(early)
        finally:
            self._releasing = False

    def retired(self) -> None:
        """A non-immediate command is over: the window opens by one."""
        if self.withheld:
            self.withheld -= 1
            if not self.withheld:
                self._choose_paths()
        else:
            self.max_cmd_sn = (self.max_cmd_sn + 1) & _MASK

    def set_depth(self, queue_depth: int) -> None:
        """Another queue depth, at once; the initiator sees it by MaxCmdSN of what it is sent next."""
        change = max(queue_depth, 1) - self.depth
        self.depth += change
        before = self.withheld
        self.withheld = max(before - change, 0)
        self.max_cmd_sn = serial.add(self.max_cmd_sn, max(change - before, 0))
        self._choose_paths()

    def _choose_paths(self) -> None:
        for connection in self.connections.values():
            connection.choose_path()

    # -- the end ------------------------------------------------------------------------------

    def forget_tasks(self, of: "Connection | None" = None) -> None:
        """Drop tasks without a word to the initiator; what already runs is not waited for."""
        for task in [task for task in self.tasks.values() if of is None or task.connection is of]:
            task.unit.abort(task)
            task.connection.forget(task)
        for cmd_sn, early in list(self.held.items()):
            if early is not None and early.connection is of:
                self.skip(cmd_sn)

    def end(self, reason: End, *, notice: bool = False) -> None:
        """Nexus loss: every task is dropped, every connection closes when it has sent what it has.

        Args:
            notice: tell the initiator on every connection that all of them go (RFC 7143 §11.9.1, event 3).
        """
        if self.ended:
            return
        self.ended = reason
        self.held.clear()
        self.forget_tasks()
        self.lost.clear()
        if self.target is not None:
            self.target.detach(self.nexus)
        for connection in list(self.connections.values()):
            if notice and not connection.closing:
                connection.asynchronous(AsyncEvent.SESSION_DROP, parameter2=self.keys.default_time2wait)
            connection.close(reason)


Holder = tuple[str, str]
"""("address" or "initiator", which): who has a share of the sessions."""


def holders(origin: str, initiator_name: str) -> tuple[Holder, Holder]:
    """Whom a session counts for."""
    return ("address", origin), ("initiator", initiator_name)


def share(max_sessions: int) -> int:
    """How many of all normal sessions one address, or one initiator, may have: a quarter is for others."""
    return max_sessions - max_sessions // 4


_RAISE = "raise iscsi_maxsesh (globalconfiguration/) if there shall be more"


def all_taken(max_sessions: int) -> str:
    """Why a login is refused, for an operator."""
    return f"iscsi_maxsesh: {max_sessions} sessions exist already, over all targets; {_RAISE}"


def share_taken(holder: Holder, max_sessions: int) -> str:
    """The same, where one has its share."""
    kind, name = holder
    return (
        f"iscsi_maxsesh: {kind} {name} has {share(max_sessions)} sessions already, three quarters of the "
        f"{max_sessions} that there may be over all targets; {_RAISE}"
    )


class SessionTable:
    """All sessions of the daemon."""

    def __init__(self, max_sessions: int = 16) -> None:
        self.max_sessions = max_sessions
        """Over all normal sessions; live-changeable (api-semantics §11)."""
        self.max_discovery_sessions = MAX_DISCOVERY_SESSIONS
        self.data_memory = DATA_MEMORY
        """Bytes for the data of large commands, over all normal sessions and both directions."""
        self.counts: Counter[Hashable] = Counter()
        """``key`` of a holder → its normal sessions."""
        self.sessions: dict[int, Session] = {}
        """By ``Session.id``."""
        self._by_tsih: dict[int, Session] = {}
        self._by_port: dict[tuple[str, str], Session] = {}
        """(initiator port name, target port name) → normal session."""
        self._last_id = 0
        self._last_tsih = 0
        self.now = 0.0
        """Seconds, as last told by ``tick`` or a login."""
        self.stirred: set[Connection] = set()
        """Connections with something to send or to close because of what another one did."""
        self.ended: Callable[[Session], None] | None = None
        """Called once when a session is over."""

    def in_flight(self, session: Session) -> int:
        """Bytes that the large commands of one connection of a session may hold, for each direction: an even
        share of what there is. A session more makes it smaller, for commands that come then; nothing that is
        under way is lost, and who has nothing under way may always begin a command, so none waits for ever.
        """
        shares = 2 * max(len(self._by_port), 1) * max(len(session.connections), 1)
        return max(LEAST_IN_FLIGHT, min(MAX_IN_FLIGHT, self.data_memory // shares))

    # The two that a table which is one of several answers with the others in mind.

    def new_id(self, connection: "Connection") -> int:
        """The ``Session.id`` of the session that this connection begins."""
        self._last_id += 1
        return self._last_id

    def key(self, holder: Holder) -> Hashable:
        """What its sessions are counted under."""
        return holder

    def full(self, origin: str, initiator_name: str, *, asking: bool = False) -> str:
        """Why there may not be one more normal session; empty: there may, and it is made at once unless
        somebody is only ``asking``."""
        if self.normal_count() >= self.max_sessions:
            return all_taken(self.max_sessions)
        for holder in holders(origin, initiator_name):
            if self.counts[self.key(holder)] >= share(self.max_sessions):
                return share_taken(holder, self.max_sessions)
        return ""

    def obstacle(self, origin: str, initiator_name: str, target_name: str) -> str:
        """What ``full`` would say to a login; one that takes the place of a session of its own needs none."""
        if any(
            (session.initiator_name, session.grant.target_name) == (initiator_name, target_name)
            for session in self.sessions.values()
        ):
            return ""
        return self.full(origin, initiator_name, asking=True)

    def of(self, nexus: Nexus) -> Session | None:
        """The normal session that a nexus is; None: it is over, or never was."""
        session = self._by_port.get((nexus.initiator_port, nexus.target_port))
        return session if session is not None and session.nexus is nexus else None

    def normal_count(self) -> int:
        """Sessions that are not discovery sessions."""
        return len(self._by_port)

    def discovery_count(self) -> int:
        """Sessions that are."""
        return len(self.sessions) - len(self._by_port)

    def admit(
        self, login: "LoginResult", connection: "Connection", cmd_sn: int, now: float
    ) -> Session | Refusal:
        """What ``access.SessionDirectory.admit`` asks, for this connection (RFC 7143 §6.3.1)."""
        self.now = now
        grant = login.grant
        port = Nexus(login.initiator_name, login.isid, grant.target_name, grant.target_portal_group_tag)
        key = (port.initiator_port, port.target_port)
        existing = self._by_port.get(key) if grant.target is not None else None
        if login.requested_tsih:
            return self._join(login, existing, connection)
        if existing is not None:
            if not _may_reinstate(existing, login):
                return Refusal(
                    LoginStatus.AUTHORIZATION_FAILURE,
                    f"the initiator port has a session of CHAP user {existing.user!r} already; this login is "
                    + (f"CHAP user {login.user!r}" if login.user else "without CHAP"),
                )
            self.end(existing, End(EndReason.REINSTATEMENT, "session reinstatement"))
        if grant.target is None:
            self._make_room_for_discovery(connection.origin)
        elif why := self.full(connection.origin, login.initiator_name):
            return Refusal(LoginStatus.OUT_OF_RESOURCES, why)
        tsih = self._free_tsih()
        if not tsih:
            return Refusal(LoginStatus.OUT_OF_RESOURCES, "every TSIH is in use")
        session = Session(self.new_id(connection), tsih, login, cmd_sn, now, connection.origin)
        self.sessions[session.id] = session
        self._by_tsih[tsih] = session
        if session.target is not None:
            self._by_port[key] = session
            self.counts.update(map(self.key, holders(session.origin, session.initiator_name)))
            session.target.attach(session.nexus)
        session.connections[login.cid] = connection
        return session

    def _join(
        self, login: "LoginResult", existing: Session | None, connection: "Connection"
    ) -> Session | Refusal:
        if existing is None or existing.tsih != login.requested_tsih:
            other = self._by_tsih.get(login.requested_tsih)
            if other is not None and other.target is not None and _same_but_for_the_portal(other, login):
                tag = other.grant.target_portal_group_tag
                return Refusal(
                    LoginStatus.CANNOT_INCLUDE_IN_SESSION,
                    f"the session is of portal group {tag}; this connection came in through another",
                )
            return Refusal(
                LoginStatus.SESSION_DOES_NOT_EXIST,
                f"no session with TSIH {login.requested_tsih} of this initiator port and target",
            )
        if existing.user != login.user:
            # Who it is has been proven; this session is not its own.
            return Refusal(
                LoginStatus.AUTHORIZATION_FAILURE,
                f"the session belongs to CHAP user {existing.user!r}, not {login.user!r}",
            )
        old = existing.connections.get(login.cid)
        # Level 2 needs room for one connection that takes over from another whose end it was not told yet.
        recovers = existing.keys.error_recovery_level == 2
        if old is None and len(existing.connections) >= existing.keys.max_connections + recovers:
            return Refusal(
                LoginStatus.TOO_MANY_CONNECTIONS,
                f"the session has its MaxConnections={existing.keys.max_connections} already",
            )
        # Connection reinstatement: an implicit logout of the old one (RFC 7143 §6.3.4).
        if recovers:
            allegiance.remove_for_recovery(existing, login.cid)
        elif old is not None:
            del existing.connections[login.cid]
            allegiance.terminate(existing, old)
            old.close(End(EndReason.REINSTATEMENT, "connection reinstatement"))
        existing.connections[login.cid] = connection
        return existing

    def _count_out(self, session: Session) -> None:
        """An origin without sessions costs no memory."""
        for key in map(self.key, holders(session.origin, session.initiator_name)):
            self.counts[key] -= 1
            if not self.counts[key]:
                del self.counts[key]

    def _make_room_for_discovery(self, origin: str) -> None:
        """Who looks for targets is not kept out by who keeps a discovery session open, which holds nothing:
        the oldest of the origin with the most goes, or of the same origin, if that has its share."""
        found = [session for session in self.sessions.values() if session.target is None]
        have = Counter(session.origin for session in found)
        if have[origin] >= MAX_DISCOVERY_OF_ONE:
            most = origin
        elif len(found) >= self.max_discovery_sessions:
            most = max(have, key=lambda each: have[each])
        else:
            return
        oldest = next(session for session in found if session.origin == most)
        words = f"made room for another discovery session; {most or 'its origin'} had {have[most]}"
        self.end(oldest, End(EndReason.MADE_ROOM, words))

    def _free_tsih(self) -> int:
        for _ in range(MAX_TSIH):
            self._last_tsih = self._last_tsih % MAX_TSIH + 1
            if self._last_tsih not in self._by_tsih:
                return self._last_tsih
        return 0

    def rename(self, names: "Mapping[Target, str]") -> None:
        """Targets have other names from now on: their sessions go on under these, and are found by them when
        their initiators log in anew."""
        renamed = [session for session in self.sessions.values() if session.target in names]
        for session in renamed:
            self._by_port.pop((session.nexus.initiator_port, session.nexus.target_port), None)
        for session in renamed:
            assert session.target is not None
            name, nexus = names[session.target], session.nexus
            nexus.rename_target(name)
            session.grant = replace(session.grant, target_name=name)
            self._by_port[nexus.initiator_port, nexus.target_port] = session

    def set_depth(self, target: "Target", queue_depth: int) -> None:
        """Another queue depth for the sessions of a target."""
        for session in self.sessions.values():
            if session.target is target:
                session.set_depth(queue_depth)

    def tell_luns_changed(self, target: "Target") -> None:
        """Tell the sessions of a target that its LUNs are others (RFC 7143 §11.9.1, event 0), once each.

        The unit attention of each unit stays: it is what the standards count on. But it waits for a next
        command, and open-iscsi scans for new LUNs only when it is told by this.
        """
        sense = condition(Sense.REPORTED_LUNS_DATA_CHANGED).build()
        for session in self.sessions.values():
            alive = [connection for connection in session.connections.values() if not connection.closing]
            if session.target is target and alive:
                alive[0].asynchronous(AsyncEvent.SCSI_EVENT, data=len(sense).to_bytes(2, "big") + sense)

    def excuse(self, seconds: float) -> None:
        """For so long nobody was here to listen (``Connection.excuse``)."""
        for session in self.sessions.values():
            allegiance.excuse(session, seconds)

    def tick(self, now: float) -> None:
        """Time has passed: end what waited for lost connections for too long."""
        self.now = now
        for session in [session for session in self.sessions.values() if session.lost]:
            allegiance.expire(self, session, now)

    def end(self, session: Session, reason: End, *, notice: bool = False) -> None:
        """End a session and forget it; ``notice``: as in ``Session.end``."""
        if self.sessions.pop(session.id, None) is None:
            return
        del self._by_tsih[session.tsih]
        if session.target is not None:
            key = (session.nexus.initiator_port, session.nexus.target_port)
            if self._by_port.get(key) is session:
                del self._by_port[key]
                self._count_out(session)
        session.end(reason, notice=notice)
        if self.ended is not None:
            self.ended(session)


def _may_reinstate(session: Session, login: "LoginResult") -> bool:
    """Whether a login may end a session of the same initiator port and take its place (RFC 7143 §6.3.5).

    Initiator names and ISIDs are claimed, users are proven: a session that somebody has proven to be theirs
    is ended by them alone, as long as there is such a user. Where no proof was asked for the name is all that
    tells initiators apart, and whoever gives it is taken for the same.
    """
    known = {credential.user for credential in login.grant.credentials}
    return session.user in ("", login.user) or session.user not in known


def _same_but_for_the_portal(session: Session, login: "LoginResult") -> bool:
    """A session does not span portal groups (RFC 7143 §4.4.1: each is a target port of its own)."""
    return (session.initiator_name, session.isid, session.grant.target_name) == (
        login.initiator_name,
        login.isid,
        login.grant.target_name,
    )
