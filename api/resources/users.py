"""``account/users/``: who may use the API, and who may only read. Ours; FreeNAS knew root alone.

Passwords are kept as salted hashes and never returned. ``root`` is there always: its password is the daemon's
to read from a file, so it is neither changed nor deleted here.
"""

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from typing import Any, Final, Protocol

from aiohttp import web

from api.audit import MASK, note
from api.auth import Account, Authenticator, hash_password
from api.bodies import content_range, page, read_object
from api.errors import FieldsError, NotFoundError, answer
from api.resources.collection import LIST_PARAMETERS, PREFIX
from api.routing import Operation, Router
from api.schema import coerce
from targetd.config import REQUIRED
from targetd.system.threads import run_in_thread

__all__ = ["AccountRecords", "UsersResource"]

log = logging.getLogger("api")

PATH: Final = f"{PREFIX}account/users/"
_NAME: Final = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")
LEAST: Final = 8
MOST: Final = 256
"""Characters of a password."""
BUILT_IN: Final = "This user is built in; its password is in the daemon's password file."


class AccountRecords(Protocol):
    """Where accounts are kept, durably."""

    async def put(self, name: str, value: bytes | None) -> None:
        """Keep under a name; None forgets it."""

    async def items(self) -> dict[str, bytes]:
        """Everything kept."""


class UsersResource:
    """The accounts."""

    def __init__(self, authenticator: Authenticator, keeper: AccountRecords, root: Account) -> None:
        self._authenticator = authenticator
        self._keeper = keeper
        self._root = root
        self._accounts: dict[str, Account] = {root.name: root}
        self._turn = asyncio.Lock()

    def replace_root(self, root: Account) -> None:
        """The built-in user has another password; who logged in with the old one has to log in again."""
        self._root = self._accounts[root.name] = root
        self._authenticator.replace_accounts(self._accounts)

    async def load(self) -> None:
        """Take over what was kept."""
        for name, raw in (await self._keeper.items()).items():
            kept = json.loads(raw)
            self._accounts.setdefault(name, Account(name, kept["hash"], bool(kept["read_only"])))
        self._authenticator.replace_accounts(self._accounts)

    def register(self, router: Router) -> None:
        """Add both places."""
        failures: dict[int, str | None] = {400: "Error", 401: None}
        router.add(
            "users",
            PATH,
            {
                "GET": Operation(self.get_list, "List.", {200: "User[]", **failures}, None, LIST_PARAMETERS),
                "POST": Operation(
                    self.post, "Create.", {201: "User", **failures, 409: "FieldErrors"}, "UserCreate"
                ),
            },
        )
        failures[404] = None
        router.add(
            "users",
            f"{PATH}{{user}}/",
            {
                "GET": Operation(self.detail, "Show.", {200: "User", 401: None, 404: None}),
                "PUT": Operation(
                    self.put,
                    "Change password or rights.",
                    {202: "User", **failures, 409: "FieldErrors"},
                    "UserUpdate",
                ),
                "DELETE": Operation(
                    self.delete, "Delete.", {204: None, 401: None, 404: None, 409: "FieldErrors"}
                ),
            },
        )

    def _find(self, name: str) -> Account:
        account = self._accounts.get(name)
        if account is None:
            raise NotFoundError
        return account

    async def get_list(self, request: web.Request) -> web.StreamResponse:
        """GET of all."""
        accounts = [_show(self._accounts[name]) for name in sorted(self._accounts)]
        offset, shown = page(request, accounts)
        return answer(200, list(shown), content_range(offset, len(shown), len(accounts)))

    async def detail(self, request: web.Request, name: str) -> web.StreamResponse:
        """GET of one."""
        return answer(200, _show(self._find(name)))

    async def post(self, request: web.Request) -> web.StreamResponse:
        """POST: a new one."""
        body = await read_object(request)
        errors: dict[str, list[str]] = {}
        name = body.get("name")
        if name in (None, ""):
            errors["name"] = [REQUIRED]
        elif not isinstance(name, str) or not _NAME.fullmatch(name):
            errors["name"] = ["Use up to 32 of a-z, 0-9, _ . and -, a letter or _ first."]
        password = _password(body, errors, required=True)
        read_only = _flag(body, errors, False)
        async with self._turn:
            if isinstance(name, str) and name in self._accounts:
                errors["name"] = ["A user with that name already exists."]
            if errors or password is None:
                raise FieldsError(errors)
            account = await self._keep(str(name), password, read_only, "")
        note("users", name, None, {"read_only": read_only, "password": MASK})
        return answer(201, _show(account), {"Location": f"{PATH}{name}/"})

    async def put(self, request: web.Request, name: str) -> web.StreamResponse:
        """PUT: what the body names. Who has logged in with what was before, has to log in again."""
        body = await read_object(request)
        async with self._turn:
            before = self._find(name)
            errors: dict[str, list[str]] = {}
            if before is self._root:
                raise FieldsError({"__all__": [BUILT_IN]})
            password = _password(body, errors, required=False)
            read_only = _flag(body, errors, before.read_only)
            if errors:
                raise FieldsError(errors)
            account = await self._keep(name, password, read_only, before.password_hash)
        changed = {} if password is None else {"password": MASK}
        note("users", name, {"read_only": before.read_only}, {"read_only": read_only, **changed})
        return answer(202, _show(account))

    async def delete(self, request: web.Request, name: str) -> web.StreamResponse:
        """DELETE: from now on nobody."""
        async with self._turn:
            before = self._find(name)
            if before is self._root:
                raise FieldsError({"__all__": [BUILT_IN]})
            await self._keeper.put(name, None)
            del self._accounts[name]
            self._authenticator.replace_accounts(self._accounts)
        note("users", name, {"read_only": before.read_only}, None)
        return answer(204)

    async def _keep(self, name: str, password: str | None, read_only: bool, password_hash: str) -> Account:
        if password is not None:
            password_hash = await run_in_thread(hash_password, password)
        kept = json.dumps({"hash": password_hash, "read_only": read_only}).encode()
        await self._keeper.put(name, kept)
        account = self._accounts[name] = Account(name, password_hash, read_only)
        self._authenticator.replace_accounts(self._accounts)
        return account


def _show(account: Account) -> dict[str, Any]:
    return {"name": account.name, "read_only": account.read_only}


def _password(body: Mapping[str, Any], errors: dict[str, list[str]], *, required: bool) -> str | None:
    given = body.get("password")
    if given is None or given == "":
        if required or given == "":
            errors["password"] = [REQUIRED]
        return None
    if not isinstance(given, str) or not LEAST <= len(given) <= MOST or not given.isprintable():
        errors["password"] = [f"Use {LEAST} to {MOST} printable characters."]
        return None
    return given


def _flag(body: Mapping[str, Any], errors: dict[str, list[str]], default: bool) -> bool:
    given = body.get("read_only")
    try:
        return bool(coerce(bool, given)) if given is not None else default
    except ValueError as error:
        errors["read_only"] = [str(error)]
        return default
