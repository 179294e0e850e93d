"""The logical unit controller: istgt's line protocol, spoken by ``istgtcontrol`` (api-semantics §8). Sans-IO.

A client sends lines, ``COMMAND arg…``; each is answered by any number of ``COMMAND data`` lines and then by
``OK COMMAND`` or ``ERR reason``. Rules:

* What a line does comes from the table ``_COMMANDS``; what it acts upon is a ``Controller``, whose units may
  live elsewhere: it is waited for, nothing else is.
* While a login is owed, every command but AUTH and QUIT is refused, known or not.
* A client that cannot be understood (a line without end) or that keeps guessing is told so and closed.

CHAP on the channel: AUTH CHAP_A, AUTH CHAP_IC from us, AUTH CHAP_NR; any failure begins it anew. A user who
does not exist and a wrong secret are the same answer after the same time.
"""

import hmac
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from protocol import chap
from protocol.access import Credential
from targetd.config import read_whole
from targetd.interface import ConnectionStatus, LunStatus, SessionStatus

__all__ = ["Controller", "Conversation", "Policy"]

VERSION = "0.5 (20150713)"
"""Of the protocol: that of istgt's last release, which clients may look at."""

MAX_LINE = 4094
"""Bytes of a line, its end not counted, as istgt has it."""
MAX_FAILURES = 5
"""Failed logins of one connection before it is closed."""
MAX_CHALLENGE = 1024
"""Bytes, as in CHAP_C (RFC 7143 §12.1.3)."""
MD5 = 5


@dataclass(frozen=True, slots=True)
class Policy:
    """How a client has to prove itself now."""

    method: str
    """``None``, ``Auto``, ``CHAP`` or ``CHAP Mutual``."""
    credentials: tuple[Credential, ...] = ()


class Controller(Protocol):
    """What the commands act upon. Target names are full names in lower case."""

    def policy(self) -> Policy:
        """How a client has to prove itself."""

    def targets(self) -> Sequence[str]:
        """All target names."""

    def luns(self, target: str) -> Awaitable[Mapping[int, LunStatus] | None]:
        """The logical units of a target; None: there is no such target."""

    def sessions(self) -> Awaitable[Sequence[SessionStatus]]:
        """All sessions."""

    def reset(self, target: str, lun: int) -> Awaitable[None]:
        """LOGICAL UNIT RESET of a unit that is there."""

    def load(self, target: str, lun: int, loaded: bool) -> Awaitable[None]:
        """Load or eject the medium of a removable unit that is there."""

    def refresh(self) -> None:
        """Look at every medium again."""

    def chap_wait_s(self, user: str) -> float:
        """Seconds until this user may answer a challenge from where this client is; 0: now."""

    def chap_judged(self, user: str, right: bool) -> None:
        """A user, known or not, has answered a challenge."""

    def refused(self, reason: str) -> None:
        """A login failed; for the operator's log."""


class _CommandError(Exception):
    """Answered as ``ERR`` with this text."""


def split_words(line: str) -> list[str]:
    """The words of a line: ``"…"`` with backslash escapes, ``'…'``, or bare with backslash escapes.

    Raises:
        ValueError: a quote is not closed, or a backslash ends the line.
    """
    words: list[str] = []
    word: list[str] = []
    begun = False  # an empty pair of quotes is a word too
    quote = ""
    letters = iter(line)
    for letter in letters:
        if letter == "\\" and quote != "'":
            escaped = next(letters, None)
            if escaped is None:
                raise ValueError("a backslash ends the line")
            word.append(escaped)
            begun = True
        elif quote:
            if letter == quote:
                quote = ""
            else:
                word.append(letter)
        elif letter in "\"'":
            quote = letter
            begun = True
        elif letter in " \t":
            if begun:
                words.append("".join(word))
            word = []
            begun = False
        else:
            word.append(letter)
            begun = True
    if quote:
        raise ValueError("a quote is not closed")
    if begun:
        words.append("".join(word))
    return words


def quoted(text: str) -> str:
    """A word that ``split_words`` reads back."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _hex(data: bytes) -> str:
    return "0x" + data.hex().upper()


def _binary(text: str, limit: int) -> bytes:
    """``0x…`` → bytes.

    Raises:
        ValueError: no such text, or nothing in it, or more than ``limit`` bytes.
    """
    if text[:2].lower() != "0x" or not text.isalnum():  # fromhex() passes over blanks
        raise ValueError(text)
    data = bytes.fromhex(text[2:])
    if not 0 < len(data) <= limit:
        raise ValueError(text)
    return data


@dataclass(slots=True)
class _Challenge:
    """What was sent as AUTH CHAP_IC."""

    identifier: int
    value: bytes


class Conversation:
    """One client: bytes in by ``receive``, bytes out by what it returns, ``closing`` when it is over."""

    def __init__(
        self, controller: Controller, randomness: Callable[[int], bytes], local: str, peer: str
    ) -> None:
        """
        Args:
            randomness: n → n bytes that nobody can predict.
            local, peer: addresses for the greeting.
        """
        self._controller = controller
        self._randomness = randomness
        self._buffer = bytearray()
        self._challenge: _Challenge | None = None
        self._failures = 0
        self._proven = False
        self.greeting = f"iSCSI Target Controller version {VERSION} on {local} from {peer}\r\n".encode()
        self.closing = False
        """Close when everything is sent."""

    async def receive(self, data: bytes) -> bytes:
        """Take what a client sent; answers of the lines that are whole now. One call at a time."""
        self._buffer += data
        out: list[str] = []
        while not self.closing:
            line = self._next_line()
            if line is None:
                break
            out += await self._answer(line)
        return "".join(f"{text}\r\n" for text in out).encode("utf-8", "surrogateescape")

    def _next_line(self) -> str | None:
        """The next line without its end, LF, CR or CRLF. Empty lines are no lines."""
        buffer = self._buffer
        while buffer.startswith((b"\r", b"\n")):
            del buffer[:1]
        ends = [at for at in (buffer.find(b"\r"), buffer.find(b"\n")) if at >= 0]
        if not ends:
            if len(buffer) > MAX_LINE:
                buffer.clear()
                return "\0"  # answered as what it is: nothing that can be understood
            return None
        end = min(ends)
        line = bytes(buffer[:end]) if end <= MAX_LINE else b"\0"
        del buffer[: end + 1]
        return line.decode("utf-8", "surrogateescape")

    async def _answer(self, line: str) -> Sequence[str]:
        if "\0" in line:
            self.closing = True
            return ("ERR invalid parameters",)
        try:
            words = split_words(line)
        except ValueError:
            return ("ERR invalid parameters",)
        if not words:
            return ()
        name, *arguments = words
        return await self._carry_out(name.upper(), arguments)

    async def _carry_out(self, name: str, arguments: Sequence[str]) -> Sequence[str]:
        command = _COMMANDS.get(name)
        try:
            if name not in _ALWAYS and not self._proven and self._owes_login():
                raise _CommandError("auth required")
            if command is None:
                raise _CommandError("unknown command")
            lines = await command(self, arguments)
        except _CommandError as error:
            return (f"ERR {error}",)
        over = () if isinstance(lines, _Unfinished) else (f"OK {name}",)
        return (*(f"{name} {line}" for line in lines), *over)

    def _owes_login(self) -> bool:
        return self._controller.policy().method.startswith("CHAP")

    # -- AUTH ---------------------------------------------------------------------------------

    async def _auth(self, arguments: Sequence[str]) -> Sequence[str]:
        policy = self._controller.policy()
        if policy.method == "None":
            raise _CommandError("auth not required")
        match list(arguments):
            case [key, algorithm] if key.upper() == "CHAP_A":
                if algorithm != str(MD5):
                    raise self._failed("invalid algorithm", f"CHAP_A={algorithm[:20]!r}")
                challenge = _Challenge(self._randomness(1)[0], self._randomness(16))
                self._challenge = challenge
                return _Unfinished((f"CHAP_IC {challenge.identifier} {_hex(challenge.value)}",))
            case [key, user, answered, *back] if key.upper() == "CHAP_NR" and len(back) in (0, 2):
                return self._prove(policy, user, answered, back)
            case _:
                raise self._failed("CHAP sequence error", "no CHAP_A or CHAP_NR")

    def _prove(self, policy: Policy, user: str, answered: str, back: Sequence[str]) -> Sequence[str]:
        challenge, self._challenge = self._challenge, None
        if challenge is None:
            raise self._failed("CHAP sequence error", "CHAP_NR without a challenge of ours")
        if not user or not policy.credentials:
            raise self._failed("auth user or secret is missing", "there is no user in the credential group")
        try:
            response = _binary(answered, 16)
            identifier = read_whole(back[0]) if back else 0
            theirs = _binary(back[1], MAX_CHALLENGE) if back else b""
        except ValueError:
            raise self._failed("response format error", "a value is no number") from None
        wait_s = self._controller.chap_wait_s(user)
        if wait_s:
            reason = f"too many wrong answers of {user[:64]!r}; the next is looked at in {wait_s:.0f} s"
            raise self._failed("too many wrong answers", reason)
        known = [credential for credential in policy.credentials if credential.user == user]
        credential = known[0] if known else Credential(user, self._randomness(16))
        right = chap.verify(MD5, challenge.identifier, credential.secret, challenge.value, response)
        self._controller.chap_judged(user, bool(known) and right)
        if not known or not right:
            raise self._failed("CHAP sequence error", f"unknown user or wrong secret: {user[:64]!r}")
        lines: list[str] = []
        if back:
            if not 0 <= identifier <= 255 or theirs == challenge.value:
                raise self._failed("CHAP sequence error", "a challenge that is none")
            if not credential.peer_user or not credential.peer_secret:
                raise self._failed("auth user or secret is missing", f"{user!r} has no peer secret")
            if hmac.compare_digest(credential.secret, credential.peer_secret):
                raise self._failed("CHAP sequence error", f"{user!r} has the same secret in both directions")
            proof = chap.response(MD5, identifier, credential.peer_secret, theirs)
            lines.append(f"CHAP_NR {quoted(credential.peer_user)} {_hex(proof)}")
        elif policy.method == "CHAP Mutual":
            raise self._failed("CHAP sequence error", f"{user!r} did not challenge us")
        self._proven = True
        return lines

    def _failed(self, told: str, reason: str) -> _CommandError:
        """A login failed; the exchange begins anew, and not for ever."""
        self._challenge = None
        self._failures += 1
        self.closing = self._failures >= MAX_FAILURES
        self._controller.refused(reason)
        return _CommandError(told)

    # -- the commands -------------------------------------------------------------------------

    async def _noop(self, arguments: Sequence[str]) -> Sequence[str]:
        return ()

    async def _quit(self, arguments: Sequence[str]) -> Sequence[str]:
        self.closing = True
        return ()

    async def _version(self, arguments: Sequence[str]) -> Sequence[str]:
        return (VERSION,)

    async def _list(self, arguments: Sequence[str]) -> Sequence[str]:
        if not arguments:
            return tuple(self._controller.targets())
        _, number, lun = await self._unit(arguments)
        if not lun.removable:
            return (f"lun{number} storage {quoted(lun.path)} {lun.size_bytes}",)
        present, lock = "present" if lun.present else "absent", "lock" if lun.locked else "unlock"
        flags = "ro" if lun.read_only else "rw"
        return (f"lun{number} removable {present} {lock} - {flags} {quoted(lun.path)} {lun.size_bytes}",)

    async def _info(self, arguments: Sequence[str]) -> Sequence[str]:
        if len(arguments) > 1:
            raise _CommandError("invalid parameters")
        wanted = arguments[0].lower() if arguments else None
        lines = [
            _shown(session, connection)
            for session in await self._controller.sessions()
            if session.target_id is not None and wanted in (None, session.target_name)
            for connection in session.connections
        ]
        return lines or ("no login",)

    async def _reset(self, arguments: Sequence[str]) -> Sequence[str]:
        target, number, _ = await self._unit(arguments)
        await self._controller.reset(target, number)
        return ()

    async def _load(self, arguments: Sequence[str]) -> Sequence[str]:
        target, number, _ = await self._medium(arguments)
        await self._controller.load(target, number, True)
        return ()

    async def _unload(self, arguments: Sequence[str]) -> Sequence[str]:
        target, number, lun = await self._medium(arguments)
        if lun.locked:
            raise _CommandError("unload")
        await self._controller.load(target, number, False)
        return ()

    async def _change(self, arguments: Sequence[str]) -> Sequence[str]:
        """What file a unit has is the configuration's, so it is changed through the API."""
        if len(arguments) != 6:
            raise _CommandError("invalid parameters")
        await self._medium(arguments[:2])
        raise _CommandError("change")

    async def _refresh(self, arguments: Sequence[str]) -> Sequence[str]:
        """Changes of the configuration are in force when they are answered; media may have grown."""
        self._controller.refresh()
        return ()

    async def _unit(self, arguments: Sequence[str]) -> tuple[str, int, LunStatus]:
        """``"iqn" [lun]`` → target, LUN number and unit."""
        if not 1 <= len(arguments) <= 2:
            raise _CommandError("invalid parameters")
        number = arguments[1] if len(arguments) == 2 else "0"
        if not (number.isascii() and number.isdecimal() and len(number) < 8):
            raise _CommandError("invalid parameters")
        luns = await self._controller.luns(arguments[0].lower())
        if luns is None:
            raise _CommandError("no target")
        lun = luns.get(int(number))
        if lun is None:
            raise _CommandError("no LUN")
        return arguments[0].lower(), int(number), lun

    async def _medium(self, arguments: Sequence[str]) -> tuple[str, int, LunStatus]:
        found = await self._unit(arguments)
        if not found[2].removable:
            raise _CommandError("not removable")
        return found


class _Unfinished(tuple[str, ...]):
    """Lines after which no OK is due."""

    __slots__ = ()


_Command = Callable[[Conversation, Sequence[str]], Coroutine[Any, Any, Sequence[str]]]

_COMMANDS: Mapping[str, _Command] = {
    "AUTH": Conversation._auth,
    "CHANGE": Conversation._change,
    "INFO": Conversation._info,
    "LIST": Conversation._list,
    "LOAD": Conversation._load,
    "NOOP": Conversation._noop,
    "QUIT": Conversation._quit,
    "REFRESH": Conversation._refresh,
    "RESET": Conversation._reset,
    "UNLOAD": Conversation._unload,
    "VERSION": Conversation._version,
}
_ALWAYS = frozenset(("AUTH", "QUIT"))


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _shown(session: SessionStatus, connection: ConnectionStatus) -> str:
    """One line of INFO, worded as istgt has it."""
    keys = session.negotiated
    host, port = _host(connection.local_address), connection.local_address.rpartition(":")[2]
    digests = {"CRC32C": "on", "None": "off"}
    told: dict[str, object] = {
        "ISID": session.isid.removeprefix("0x"),
        "TSIH": session.tsih,
        "CID": connection.cid,
        "HeaderDigest": digests[connection.header_digest],
        "DataDigest": digests[connection.data_digest],
        **{
            name: keys[name]
            for name in (
                "MaxConnections",
                "FirstBurstLength",
                "MaxBurstLength",
                "MaxRecvDataSegmentLength",
                "InitialR2T",
                "ImmediateData",
            )
            if name in keys
        },
    }
    return (
        f"Login from {session.initiator_name} ({_host(connection.peer_address)}) on {session.target_name} "
        f"LU{session.target_id} ({host}:{port},{session.target_portal_group_tag}), "
        + ", ".join(f"{name}={value}" for name, value in told.items())
    )
