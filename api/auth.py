"""Who is asking: HTTP Basic, against salted scrypt hashes (api-semantics §3).

A hash is meant to be slow, so it is computed on a worker thread, by a few at a time, and only once for
callers that say the same at the same time. What has been proven is remembered for a while, for the address
that proved it, as a keyed digest: a client which sends its password with every request costs microseconds.

Guessing. A password counts as wrong from before it is hashed until it has turned out right: an address that
sends a thousand at once has its ten, as one that sends them one by one. Then it is told to wait (429), and
nothing is computed for it. How many hashes may wait for their turn is bounded too (503), and no address has
more than its ten in that line.

From this machine itself a password is looked at however many wrong ones came before, since whoever guesses
there has the administrator's own address, and would lock the administrator out. There each address has a line
of its own; after ten wrong ones it moves by one guess each ``PACE_S``, and every one gets its turn, in order.

Passwords are never kept, logged or put into an error.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol
from weakref import WeakValueDictionary

from aiohttp import web
from aiohttp.typedefs import Middleware

from api.errors import (
    BusyError,
    ForbiddenError,
    Handler,
    TooManyFailuresError,
    UnauthorizedError,
)
from targetd.system.threads import ThreadLimit

__all__ = ["READING", "USER", "Account", "Authenticator", "hash_password", "require_login", "verify_password"]

log = logging.getLogger("api.auth")

COST: Final = 2**14
"""scrypt n; with r=8 that is 16 MiB and about 40 ms, the lower end of what RFC 7914 §2 has in mind."""
BLOCK: Final = 8
PARALLEL: Final = 1
REMEMBERED: Final = 256
"""Proven pairs of user and password that are kept."""
REMEMBER_S: Final = 3600.0
FAILURES: Final = 10
"""Wrong passwords from one address within the window, then 429."""
WINDOW_S: Final = 60.0
ADDRESSES: Final = 4096
"""Addresses whose failures are counted; beyond that the oldest is forgotten."""
AT_ONCE: Final = 2
"""Hashes that are computed at a time for everybody who is not on this machine."""
WAITING: Final = 64
"""Hashes that may wait for that; a second or two."""
PACE_S: Final = 0.05
"""Between two guesses from this machine, once it has made ``FAILURES`` wrong ones within the window."""
HEADER_BYTES: Final = 1024
"""A user name and a password are shorter."""


@dataclass(frozen=True, slots=True)
class Account:
    """One user of the API."""

    name: str
    password_hash: str
    """From ``hash_password``."""
    read_only: bool = False


READING: Final = frozenset(("GET", "HEAD", "OPTIONS"))
"""Methods that change nothing."""

USER: Final[web.RequestKey[Account]] = web.RequestKey("user", Account)
"""Set on every request that has passed the login."""


def hash_password(password: str) -> str:
    """A salted hash, with its parameters: ``scrypt$n$r$p$salt$hash``, base64. Takes tens of milliseconds.

    Raises:
        ValueError: the password is empty.
    """
    if not password:
        raise ValueError("the password of the API may not be empty")
    salt = secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, n=COST, r=BLOCK, p=PARALLEL)
    return _join(salt, digest)


def _join(salt: bytes, digest: bytes) -> str:
    shown = (base64.b64encode(part).decode() for part in (salt, digest))
    return "$".join(("scrypt", str(COST), str(BLOCK), str(PARALLEL), *shown))


def verify_password(password: str, password_hash: str) -> bool:
    """Whether a hash is this password's, compared in constant time. Takes tens of milliseconds.

    Raises:
        ValueError: that is no hash of ours.
    """
    try:
        kind, n, r, p, salt, digest = password_hash.split("$")
        if kind != "scrypt":
            raise ValueError(kind)
        expected = base64.b64decode(digest, validate=True)
        found = hashlib.scrypt(
            password.encode(errors="surrogateescape"),
            salt=base64.b64decode(salt, validate=True),
            n=int(n),
            r=int(r),
            p=int(p),
            dklen=len(expected),
        )
    except (ValueError, binascii.Error):
        raise ValueError("this is not a password hash: scrypt$n$r$p$salt$hash is wanted") from None
    return hmac.compare_digest(found, expected)


class Authenticator:
    """Decides about ``Authorization`` headers. Lives on the event loop; not for other threads."""

    def __init__(self, accounts: Mapping[str, Account], *, now: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            accounts: by name. Empty: nobody may do anything.
            now: seconds; for tests.
        """
        self._now = now
        self._key = secrets.token_bytes(32)
        # a user who does not exist costs as much as one who does; no password has this hash
        self._nobody = _join(secrets.token_bytes(16), secrets.token_bytes(64))
        self._failures: OrderedDict[str, list[float]] = OrderedDict()
        """Address → when each of its guesses was made: the wrong ones, and those that are being checked."""
        self._checks: dict[bytes, tuple[asyncio.Task[bool], list[Callable[[], bool]]]] = {}
        """What is being checked, and for each who waits for it whether he still does."""
        self._line = ThreadLimit(AT_ONCE, WAITING)
        self._local_line = ThreadLimit(1, 1 << 24)  # one of each address of loopback
        self._local_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.replace_accounts(accounts)

    def replace_accounts(self, accounts: Mapping[str, Account]) -> None:
        """From now on these; what was proven before counts no more."""
        self._accounts = dict(accounts)
        self._proven: OrderedDict[bytes, tuple[float, Account]] = OrderedDict()

    async def login(
        self, header: str | None, address: str, waits: Callable[[], bool] = lambda: True
    ) -> Account:
        """The account behind an ``Authorization`` header.

        Args:
            header: as sent; the scheme in any case, blanks and line ends within the token allowed
                (Perl's encoder breaks it into lines).
            address: of the peer, for the count of failures.
            waits: whether the caller is still there; a hash is computed for nobody else.

        Raises:
            UnauthorizedError: no header, or a wrong one.
            TooManyFailuresError: the address has to wait.
            BusyError: too many others are being checked.
        """
        pair = _credentials(header)
        if pair is None:
            raise UnauthorizedError
        name, password = pair
        address = _network(address)
        digest = self._digest(address, name, password)
        proven = self._proven.get(digest)
        if proven is not None and self._now() < proven[0]:
            return proven[1]
        account = self._accounts.get(name)
        right = await self._check(digest, address, name, password, account, waits)
        if account is None or not right or self._accounts.get(name) is not account:
            raise UnauthorizedError
        self._proven[digest] = (self._now() + REMEMBER_S, account)
        self._proven.move_to_end(digest)
        if len(self._proven) > REMEMBERED:
            self._proven.popitem(last=False)
        return account

    def _digest(self, *parts: str) -> bytes:
        """A keyed digest of texts, with their lengths: no two lists of texts have the same."""
        digest = hashlib.blake2b(key=self._key)
        for part in parts:
            raw = part.encode(errors="surrogateescape")
            digest.update(b"%d:%b" % (len(raw), raw))
        return digest.digest()

    async def _check(
        self,
        digest: bytes,
        address: str,
        name: str,
        password: str,
        account: Account | None,
        waits: Callable[[], bool],
    ) -> bool:
        """Whether the password is right, found out once for all who wait for the same answer."""
        check, waiting = self._checks.get(digest, (None, []))
        waiting.append(waits)
        if check is None:
            local = _is_local(address)
            late = self._recent(address) >= FAILURES
            if not local:
                self._refuse_guessers(address)
                try:
                    self._line.enter()
                except OverflowError:
                    raise BusyError("Too many logins are being checked; try again in a moment.") from None
            charge = self._charge(address)
            password_hash = account.password_hash if account else self._nobody

            async def run() -> bool:
                right = False
                try:
                    if local:
                        right = await self._check_local(address, late, password, password_hash, waiting)
                        if late and not right:
                            self._refuse_guessers(address)
                    else:
                        right = await self._line.run(verify_password, password, password_hash)
                    return right  # a user who is not there has a hash that no password has
                finally:
                    del self._checks[digest]
                    self._settle(address, name, charge, right)

            check = asyncio.get_running_loop().create_task(run())
            self._checks[digest] = check, waiting
        # a caller that goes away must not take the answer of the others along
        return await asyncio.shield(check)

    async def _check_local(
        self, address: str, late: bool, password: str, password_hash: str, waiting: list[Callable[[], bool]]
    ) -> bool:
        """In the line of those on this machine: first come, first served, and nobody is sent away. Who has
        gone meanwhile takes no time, so what is in it is bounded by the connections that one address may
        have (``api.server``)."""
        turn = self._local_turns.get(address)
        if turn is None:
            turn = self._local_turns[address] = asyncio.Lock()
        async with turn:
            if not any(waits() for waits in waiting):
                return False
            if late:
                await asyncio.sleep(PACE_S)
            self._local_line.enter()
            return await self._local_line.run(verify_password, password, password_hash)

    def _recent(self, address: str) -> int:
        """How many guesses of an address count now."""
        guesses = self._failures.get(address)
        if not guesses:
            return 0
        now = self._now()
        guesses[:] = [at for at in guesses if now - at < WINDOW_S]
        return len(guesses)

    def _refuse_guessers(self, address: str) -> None:
        if self._recent(address) >= FAILURES:
            raise TooManyFailuresError(int(WINDOW_S - (self._now() - self._failures[address][0])) + 1)

    def _charge(self, address: str) -> float:
        """Count a guess before anything is computed for it."""
        at = self._now()
        self._failures.setdefault(address, []).append(at)
        self._failures.move_to_end(address)
        if len(self._failures) > ADDRESSES:
            self._failures.popitem(last=False)
        return at

    def _settle(self, address: str, name: str, charge: float, right: bool) -> None:
        """It turned out right: not a guess. Else it stays counted, and is told."""
        guesses = self._failures.get(address, [])
        if not right and (len(guesses) <= FAILURES or not len(guesses) % 100):
            log.warning("login of API user %.64r from %s refused (%d in a row)", name, address, len(guesses))
        if right and charge in guesses:
            guesses.remove(charge)
        if not guesses:
            self._failures.pop(address, None)


def _credentials(header: str | None) -> tuple[str, str] | None:
    """User and password of a Basic header (RFC 7617 §2), None if it is no such thing."""
    if header is None or len(header) > HEADER_BYTES:
        return None
    scheme, _, token = header.strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        raw = base64.b64decode("".join(token.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    name, colon, password = text.partition(":")
    return (name, password) if colon else None


def _network(address: str) -> str:
    """What counts as one peer: a v4 address, a v6 /64."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


def _is_local(network: str) -> bool:
    """Whether it is this machine: what is let through to loopback has come from here."""
    return network == "::/64" or network.startswith("127.")


class BearerLogin(Protocol):
    """Knows who a token is."""

    async def login(self, token: str) -> Account | None:
        """The account; None: nobody has this token."""


def require_login(
    authenticator: Authenticator, public: Callable[[str], bool], bearer: BearerLogin | None = None
) -> Middleware:
    """The middleware: nothing but ``public`` paths without a login, no writes by a read-only user.

    It stands before routing: an unknown URL or a wrong method is not told to a stranger, and clients
    that wait for the challenge get it (api-semantics §2.1).
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if public(request.path):
            return await handler(request)

        def waits() -> bool:
            return request.transport is not None and not request.transport.is_closing()

        header = request.headers.get("Authorization")
        scheme, _, token = (header or "").strip().partition(" ")
        if bearer is not None and scheme.lower() == "bearer":
            known = await bearer.login(token)
            if known is None:
                raise UnauthorizedError
            account = known
        else:
            account = await authenticator.login(header, request.remote or "", waits)
        request[USER] = account  # before anything is refused: the audit tells who was
        if account.read_only and request.method not in READING:
            raise ForbiddenError("This user may only read.")
        return await handler(request)

    return middleware
