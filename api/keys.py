"""API keys: long random secrets that programs log in with, ``Authorization: Bearer <id>-<secret>``.

A key has a name, a role, perhaps an end, and the time of its last use. It is shown once, when it is made;
what is kept is a SHA-256 of it: 256 random bits cannot be guessed, so no slow hash and no count of guesses is
needed.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Protocol

from aiohttp import web

from api.auth import Account
from api.bodies import content_range, page, read_object
from api.errors import FieldsError, NotFoundError, answer
from api.resources.collection import LIST_PARAMETERS, PREFIX
from api.routing import Operation, Router
from targetd.config import REQUIRED

__all__ = ["ROLES", "ApiKey", "KeyRing", "KeysResource"]

ROLES: Final[Mapping[str, bool]] = {"admin": False, "read-only": True}
"""Name of a role → whether it may only read."""
NAME_LENGTH: Final = 64
USE_KEPT_S: Final = 3600.0
"""How old the stored time of last use may become: each request would else write to the disk."""
LONGEST_S: Final = 10 * 365 * 86400
_TOKEN: Final = re.compile(r"([0-9]{1,9})-([A-Za-z0-9_-]{20,200})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key. Times in seconds since the epoch."""

    id: int
    name: str
    digest: str
    """SHA-256 of the secret part, hexadecimal."""
    read_only: bool
    created: float
    expires: float | None = None
    used: float | None = None

    def show(self) -> dict[str, Any]:
        """As both APIs show it: never the secret."""
        return {
            "id": self.id,
            "name": self.name,
            "role": next(role for role, read_only in ROLES.items() if read_only == self.read_only),
            "created_at": self.created,
            "expires_at": self.expires,
            "used_at": self.used,
        }


class KeyRecords(Protocol):
    """Where keys are kept, durably."""

    async def put(self, name: str, value: bytes | None) -> None:
        """Keep under a name; None removes it."""

    async def items(self) -> dict[str, bytes]:
        """All of them."""


class KeyRing:
    """All API keys. Lives on the event loop."""

    def __init__(self, records: KeyRecords, *, now: Callable[[], float] = time.time) -> None:
        self._records = records
        self._now = now
        self._keys: dict[int, ApiKey] = {}
        self._last = 0

    async def load(self) -> None:
        """Take over what was kept."""
        for name, raw in (await self._records.items()).items():
            if name == "last":
                self._last = int(raw)
            else:
                self._keys[int(name)] = ApiKey(**json.loads(raw))
        self._last = max([self._last, *self._keys])

    def list(self) -> list[ApiKey]:
        """By id."""
        return [self._keys[id] for id in sorted(self._keys)]

    def find(self, id: int) -> ApiKey | None:
        """One of them."""
        return self._keys.get(id)

    async def create(self, name: str, read_only: bool, expires_in_s: float | None) -> tuple[ApiKey, str]:
        """Make a key: what is known of it, and the key itself, which nobody sees again.

        Raises:
            ValueError: the name is taken, empty or too long; the end is not in the future.
        """
        if not name.strip() or len(name) > NAME_LENGTH or not name.isprintable():
            raise ValueError(f"name: use 1 to {NAME_LENGTH} printable characters")
        if any(key.name == name for key in self._keys.values()):
            raise ValueError(f"name: an API key {name!r} already exists")
        if expires_in_s is not None and not 0 < expires_in_s <= LONGEST_S:
            raise ValueError("expires_in_s: use seconds from now, up to ten years; leave it out for no end")
        secret = secrets.token_urlsafe(32)
        now = self._now()
        self._last += 1
        key = ApiKey(
            id=self._last,
            name=name,
            digest=_digest(secret),
            read_only=read_only,
            created=now,
            expires=None if expires_in_s is None else now + expires_in_s,
        )
        await self._records.put("last", str(self._last).encode())
        await self._keep(key)
        return key, f"{key.id}-{secret}"

    async def _keep(self, key: ApiKey) -> None:
        await self._records.put(str(key.id), json.dumps(asdict(key)).encode())
        self._keys[key.id] = key

    async def delete(self, id: int) -> bool:
        """Delete a key; False: there is none. From now on nobody logs in with it."""
        if id not in self._keys:
            return False
        await self._records.put(str(id), None)
        self._keys.pop(id, None)
        return True

    async def login(self, token: str) -> Account | None:
        """The account of a key; None: there is no such key, or its time is over."""
        match = _TOKEN.fullmatch(token.strip())
        key = self._keys.get(int(match[1])) if match else None
        digest = key.digest if key else _digest("")
        right = hmac.compare_digest(digest, _digest(match[2] if match else ""))
        now = self._now()
        if key is None or not right or (key.expires is not None and now >= key.expires):
            return None
        before, key = key.used, replace(key, used=now)
        self._keys[key.id] = key
        if before is None or now - before > USE_KEPT_S:
            await self._keep(key)
        return Account(f"api-key:{key.name}", "", key.read_only)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class KeysResource:
    """``account/keys/``: API keys of API v1.0's clients."""

    path: Final = f"{PREFIX}account/keys/"

    def __init__(self, keys: KeyRing) -> None:
        self.keys = keys

    def register(self, router: Router) -> None:
        """Register both places."""
        failures: dict[int, str | None] = {400: "Error", 401: None}
        router.add(
            "users",
            self.path,
            {
                "GET": Operation(
                    self.get_list, "List.", {200: "ApiKey[]", **failures}, None, LIST_PARAMETERS
                ),
                "POST": Operation(
                    self.post,
                    "Create; the key is in this answer and never shown again.",
                    {201: "ApiKeyCreated", **failures, 409: "FieldErrors"},
                    "ApiKeyCreate",
                ),
            },
        )
        router.add(
            "users",
            f"{self.path}{{id}}/",
            {
                "GET": Operation(self.detail, "Show.", {200: "ApiKey", 401: None, 404: None}),
                "DELETE": Operation(
                    self.remove, "Delete: nobody logs in with it any more.", {204: None, 401: None, 404: None}
                ),
            },
        )

    async def get_list(self, request: web.Request) -> web.StreamResponse:
        """List the API keys."""
        keys = [key.show() for key in self.keys.list()]
        offset, shown = page(request, keys)
        return answer(200, list(shown), content_range(offset, len(shown), len(keys)))

    async def detail(self, request: web.Request, id: int) -> web.StreamResponse:
        """Show one API key."""
        key = self.keys.find(id)
        if key is None:
            raise NotFoundError
        return answer(200, key.show())

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Create an API key."""
        body = await read_object(request)
        errors: dict[str, list[str]] = {}
        name, role, expires = body.get("name"), body.get("role", "admin"), body.get("expires_in_s")
        if not isinstance(name, str) or not name:
            errors["name"] = [REQUIRED]
        if not isinstance(role, str) or role not in ROLES:
            errors["role"] = [f"One of: {', '.join(ROLES)}."]
        if expires is not None and (isinstance(expires, bool) or not isinstance(expires, int | float)):
            errors["expires_in_s"] = ["Enter a number of seconds."]
        if errors:
            raise FieldsError(errors)
        try:
            key, secret = await self.keys.create(str(name), ROLES[role], expires)
        except ValueError as error:
            field, _, message = str(error).partition(": ")
            raise FieldsError({field: [message]}) from None
        return answer(201, {**key.show(), "key": secret}, {"Location": f"{self.path}{key.id}/"})

    async def remove(self, request: web.Request, id: int) -> web.StreamResponse:
        """Delete an API key."""
        if not await self.keys.delete(id):
            raise NotFoundError
        return answer(204)
