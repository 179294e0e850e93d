"""Builds the whole, tells when it is ready, and takes it down again. Everything is imported here; nobody
imports this but ``__main__``.

Start: store → runtime (media, portals) → API → ``ready`` (log line and sd_notify). A port in use or a store
that must not be opened is one line and exit 1, with nothing half-started.
Stop (SIGTERM, SIGINT): ``Runtime.stop``, the API, the store; under 10 s.
"""

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from api.app import make_app
from api.auth import Account, Authenticator, hash_password
from api.resources.storage import StorageResource
from api.resources.users import UsersResource
from api.server import ApiRunner
from targetd.config import ConfigError, fresh
from targetd.daemon.demo import offer_demo
from targetd.daemon.options import Address, Options, version
from targetd.daemon.reload import Reloader
from targetd.engine.runtime import Runtime
from targetd.net.inherited_sockets import API, Listeners, inherited
from targetd.net.loop import Loop
from targetd.persistence.durable import write_private
from targetd.persistence.store import Store, StoreError
from targetd.system import logs, notify
from targetd.system.tls import Certificate
from targetd.volumes import Pools

if TYPE_CHECKING:
    from targetd.workers.supervisor import Supervisor

__all__ = ["StartError", "run"]

log = logging.getLogger("targetd")

STORE_NAME = "targetd.sqlite"
PASSWORD_NAME = "api-password"
ADMIN = "root"
"""The user of the API (design.md §2)."""
ACCOUNTS = "account"
"""Namespace in the store of the API's further users."""
API_SHUTDOWN_S = 2.0
"""How long requests under way may take when the daemon stops."""


class StartError(Exception):
    """The daemon cannot start; the text is one line for the operator."""


def run(options: Options) -> int:
    """Serve until told to stop; returns the exit code (design.md §2)."""
    logs.set_up(options.log_level, options.log_format)
    listeners = Listeners(inherited(os.environ))
    try:
        loop = Loop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(_serve(options, loop, listeners))
    except (StartError, StoreError) as error:
        print(f"iscsi-targetd: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(options: Options, loop: Loop, listeners: Listeners) -> None:
    _raise_descriptor_limit()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    state = options.state_dir
    roots = _extent_roots(options)
    try:
        await asyncio.to_thread(_make_directories, state, () if options.extent_roots else roots)
        password, generated = await asyncio.to_thread(_admin_password, options)
        tls = await asyncio.to_thread(_certificate, options)
    except OSError as error:
        raise StartError(f"{error.filename or state}: {error.strerror or error}") from None
    except ValueError as error:
        raise StartError(str(error)) from None
    store = await Store.open(state / STORE_NAME)
    runtime: Runtime | Supervisor
    if options.workers > 1:
        from targetd.workers import supervisor  # a twentieth of all imports, which one process does without

        runtime = supervisor.Supervisor(
            *(store, roots, loop, dict(options.pools), options.workers),
            *(options.log_level, options.log_format, listeners),
        )
    else:
        runtime = Runtime(store, roots, loop, dict(options.pools), listeners=listeners)
    admin = Account(ADMIN, await asyncio.to_thread(hash_password, password))
    storage = StorageResource(runtime, Pools(dict(options.pools)))
    authenticator = Authenticator({ADMIN: admin})
    users = UsersResource(authenticator, _Accounts(store), admin)
    app = make_app(runtime, authenticator, version=version(), resources=[storage, users])
    api = ApiRunner(app, shutdown_timeout=API_SHUTDOWN_S)
    watchers: list[asyncio.Task[None]] = []
    try:
        sockets = await _bind_api(listeners, options.api)
        first = store.fresh
        stored = await store.load()
        config = fresh(str(options.portal)) if first else stored
        with _as_start_error():
            await runtime.start(config)
        if first:
            # Only now: a start that fails leaves no portal behind that the next one would insist on.
            await store.save(stored, config)
        await users.load()
        again = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, again.set)
        reloader = Reloader(options, runtime, users, admin, tls, _read_password, _extent_roots)
        watchers.append(loop.create_task(reloader.serve(again)))
        if tls is not None:
            watchers.append(loop.create_task(tls.watch()))
        await _start_api(api, listeners, sockets, tls.context if tls else None)
        listeners.settle()
        password_file = options.api_password_file or state / PASSWORD_NAME
        if options.demo:
            url = f"{'https' if tls else 'http'}://{options.api}"
            with _as_start_error():
                await offer_demo(runtime, roots[0], url, password_file)
        if generated or (first and options.api_password_file is None):
            print(f"The admin password of the API (user root) is in {password_file}", flush=True)
        runtime.settle()
        log.info("ready")
        notify.ready()
        await stop.wait()
        log.info("stopping")
        notify.stopping()
    finally:
        for watcher in watchers:
            watcher.cancel()
        await runtime.stop()
        await api.cleanup()
        await store.close()
        listeners.close()
    log.info("stopped")


def _extent_roots(options: Options) -> tuple[Path, ...]:
    return options.extent_roots or (options.state_dir / "extents",)


def _make_directories(state: Path, roots: tuple[Path, ...]) -> None:
    for directory in (state, *roots):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _admin_password(options: Options) -> tuple[str, bool]:
    """(the password of the API's root user, whether it was made just now). Never empty."""
    try:
        return _read_password(options), False
    except FileNotFoundError:
        if options.api_password_file is not None:
            raise
    password = secrets.token_urlsafe(18)
    path = options.state_dir / PASSWORD_NAME
    write_private(path, password + "\n")
    return password, True


def _read_password(options: Options) -> str:
    path = options.api_password_file or options.state_dir / PASSWORD_NAME
    password = path.read_text(encoding="utf-8").strip()
    if not password:
        raise ValueError(
            f"{path}: the password is empty; write one there, or remove the file to have one made"
        )
    return password


def _certificate(options: Options) -> Certificate | None:
    if options.tls_cert is None or options.tls_key is None:
        return None
    try:
        return Certificate(options.tls_cert, options.tls_key)
    except ssl.SSLError as error:
        raise StartError(f"--tls-cert {options.tls_cert}: {error.reason or error}") from None


class _Accounts:
    """``api.resources.users.Persistence`` in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, name: str, value: bytes | None) -> None:
        await self._store.put(ACCOUNTS, name, value)

    async def items(self) -> dict[str, bytes]:
        return await self._store.items(ACCOUNTS)


async def _bind_api(listeners: Listeners, address: Address) -> list[socket.socket]:
    """Take the address of the API before anything else is begun; nobody is answered yet."""
    try:
        return await listeners.api(address)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartError(f"--api {address}: {reason}") from None


async def _start_api(
    api: web.AppRunner, listeners: Listeners, sockets: list[socket.socket], tls: ssl.SSLContext | None
) -> None:
    await api.setup()
    for sock in sockets:
        await web.SockSite(api, sock, ssl_context=tls).start()
        listeners.keep(API, sock)


@contextlib.contextmanager
def _as_start_error() -> Iterator[None]:
    """What the configuration cannot be is one line."""
    try:
        yield
    except ConfigError as error:
        raise StartError("; ".join(problem.message for problem in error.problems)) from None


def _raise_descriptor_limit() -> None:
    """Every connection and every extent takes a descriptor: use all that the system lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
