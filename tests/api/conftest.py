"""A client of the API over an engine in memory, logged in as ``root``."""

import base64
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer
from yarl import URL

from api.app import make_app
from api.auth import Account, Authenticator, hash_password
from api.server import ApiRunner
from tests.api.engine import MemoryEngine

PASSWORD = "correct horse"
BASE = "/api/v1.0/services/iscsi/"
_HASH = hash_password(PASSWORD)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)


class Address(Protocol):
    """Where a server listens."""

    host: str
    port: int | None


class Api:
    """Requests with paths below the iSCSI resources, or absolute ones, sent as they are spelled."""

    def __init__(self, session: ClientSession, server: Address, engine: MemoryEngine) -> None:
        self.session = session
        self.server = server
        self.engine = engine
        self.authorization: str | None = basic("root", PASSWORD)

    async def request(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        path = path if path.startswith("/") else BASE + path
        url = URL(f"http://{self.server.host}:{self.server.port}{path}", encoded=True)
        headers = dict(options.pop("headers", {}))
        if self.authorization is not None:
            headers.setdefault("Authorization", self.authorization)
        data = options.pop("data", None)
        if body is not None:
            data = json.dumps(body)
            headers.setdefault("Content-Type", "application/json")
        async with self.session.request(
            method, url, data=data, headers=headers, allow_redirects=False, **options
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.request("POST", path, body, **options)

    async def put(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.request("PUT", path, body, **options)

    async def delete(self, path: str, body: Any = None, **options: Any) -> Answer:
        return await self.request("DELETE", path, body, **options)

    async def made(self, path: str, **fields: Any) -> dict[str, Any]:
        """The object that a POST made; the test fails if it made none."""
        answer = await self.post(path, fields)
        assert answer.status == 201, answer.raw
        body: dict[str, Any] = answer.json
        return body


class ApiServer(TestServer):
    """The test server, on the runner that the daemon uses."""

    async def _make_runner(self, **options: Any) -> ApiRunner:
        # a client that goes away does not stop a change half way, neither here nor there
        return ApiRunner(self.app, **{**options, "handler_cancellation": False})


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine()


@pytest.fixture
def root() -> Account:
    return Account("root", _HASH)


@pytest.fixture
def further() -> list[Any]:
    """Resources beside the usual ones."""
    return []


@pytest.fixture
def authenticator(root: Account) -> Authenticator:
    return Authenticator(
        {"root": root, "viewer": Account("viewer", _HASH, read_only=True)},
    )


@pytest.fixture
async def api(engine: MemoryEngine, authenticator: Authenticator, further: list[Any]) -> AsyncIterator[Api]:
    server = ApiServer(make_app(engine, authenticator, version="0.1.0", resources=further))
    await server.start_server()
    async with ClientSession(skip_auto_headers=("Content-Type",)) as session:
        yield Api(session, server, engine)
    await server.close()
