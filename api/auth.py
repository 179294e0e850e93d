"""Who is asking: HTTP Basic, against salted scrypt hashes (api-semantics §3).

A hash is meant to be slow, so it is computed on a worker thread, by two at a time at most, and only once
for callers that say the same at the same time. What has been proven is remembered for a while as a keyed
digest, so that a client which sends its password with every request costs microseconds. An address that
keeps guessing is told to wait before anything is computed for it; one that is remembered is not disturbed.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from api.errors import ForbiddenError, Handler, TooManyFailuresError, UnauthorizedError

__all__ = ["USER", "Account", "Authenticator", "hash_password", "require_login", "verify_password"]

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
HEADER_BYTES: Final = 1024
"""A user name and a password are shorter."""


@dataclass(frozen=True, slots=True)
class Account:
    """One user of the API."""

    name: str
    password_hash: str
    """From ``hash_password``."""
    read_only: bool = False


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
        self._checks: dict[bytes, asyncio.Task[bool]] = {}
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="api-login")
        self.replace_accounts(accounts)

    def replace_accounts(self, accounts: Mapping[str, Account]) -> None:
        """From now on these; what was proven before counts no more."""
        self._accounts = dict(accounts)
        self._proven: OrderedDict[bytes, tuple[float, Account]] = OrderedDict()

    def close(self) -> None:
        """Let the worker threads go."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def login(self, header: str | None, address: str) -> Account:
        """The account behind an ``Authorization`` header.

        Args:
            header: as sent; the scheme in any case, blanks and line ends within the token allowed
                (Perl's encoder breaks it into lines).
            address: of the peer, for the count of failures.

        Raises:
            UnauthorizedError: no header, or a wrong one.
            TooManyFailuresError: the address has to wait.
        """
        pair = _credentials(header)
        if pair is None:
            raise UnauthorizedError
        name, password = pair
        digest = hashlib.blake2b(
            b"%d:%b%b"
            % (len(name), name.encode(errors="surrogateescape"), password.encode(errors="surrogateescape")),
            key=self._key,
        ).digest()
        now = self._now()
        proven = self._proven.get(digest)
        if proven is not None and now < proven[0]:
            return proven[1]
        address = _network(address)
        self._refuse_guessers(address, now)
        account = self._accounts.get(name)
        right = await self._check(digest, password, account.password_hash if account else self._nobody)
        if account is None or not right or self._accounts.get(name) is not account:
            self._failed(address, name)
            raise UnauthorizedError
        self._proven[digest] = (now + REMEMBER_S, account)
        self._proven.move_to_end(digest)
        if len(self._proven) > REMEMBERED:
            self._proven.popitem(last=False)
        return account

    async def _check(self, digest: bytes, password: str, password_hash: str) -> bool:
        """``verify_password`` on a worker, once for all who wait for the same answer."""
        check = self._checks.get(digest)
        if check is None:
            loop = asyncio.get_running_loop()

            async def run() -> bool:
                try:
                    return await loop.run_in_executor(self._workers, verify_password, password, password_hash)
                finally:
                    del self._checks[digest]

            check = self._checks[digest] = loop.create_task(run())
        # a caller that goes away must not take the answer of the others along
        return await asyncio.shield(check)

    def _refuse_guessers(self, address: str, now: float) -> None:
        failures = self._failures.get(address)
        if not failures:
            return
        failures[:] = [at for at in failures if now - at < WINDOW_S]
        if len(failures) >= FAILURES:
            raise TooManyFailuresError(int(WINDOW_S - (now - failures[0])) + 1)

    def _failed(self, address: str, name: str) -> None:
        failures = self._failures.setdefault(address, [])
        failures.append(self._now())
        self._failures.move_to_end(address)
        if len(self._failures) > ADDRESSES:
            self._failures.popitem(last=False)
        log.warning("login of API user %.64r from %s refused (%d in a row)", name, address, len(failures))


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


def require_login(authenticator: Authenticator, public: frozenset[str]) -> Middleware:
    """The middleware: nothing but ``public`` paths without a login, no writes by a read-only user.

    It stands before routing: an unknown URL or a wrong method is not told to a stranger, and clients
    that wait for the challenge get it (api-semantics §2.1).
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in public:
            return await handler(request)
        account = await authenticator.login(request.headers.get("Authorization"), request.remote or "")
        if account.read_only and request.method not in ("GET", "HEAD", "OPTIONS"):
            raise ForbiddenError("This user may only read.")
        request[USER] = account
        return await handler(request)

    return middleware
