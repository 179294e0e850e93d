"""Builds the whole, tells when it is ready, and takes it down again. Everything is imported here; nobody
imports this but ``__main__``.

Start: store → runtime (media, portals) → API → ``ready`` (log line and sd_notify). A port in use or a store
that must not be opened is one line and exit 1, with nothing half-started. But where a store has portals
already, a portal whose port is in use is waited for: the API, which alone can change that, comes up.
Stop (SIGTERM, SIGINT): the API and ``Runtime.stop``, then the store; under 10 s, whatever hangs (``STOP_S``).
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import platform
import resource
import secrets
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from api.app import make_app
from api.auth import Account, Authenticator, hash_password
from api.keys import KeyRing
from api.resources.snapshot import SnapshotResource
from api.resources.storage import StorageResource
from api.resources.users import UsersResource
from api.server import ApiRunner, ApiSite
from api.v2.app import TrueNas
from storage.identity import trace_of
from targetd.config import ConfigError, fresh, is_wildcard
from targetd.daemon.demo import offer_demo
from targetd.daemon.options import Address, Options, version
from targetd.daemon.reload import Reloader
from targetd.datasets.service import NAMESPACE as DATASETS
from targetd.datasets.service import DatasetService
from targetd.engine.io_engine import available
from targetd.engine.media import TRACE_KEPT_AS, OwnFiles
from targetd.engine.runtime import Runtime
from targetd.net.inherited_sockets import API, Listeners, inherited
from targetd.net.loop import Loop
from targetd.persistence.durable import write_private
from targetd.persistence.store import Store, StoreError
from targetd.system import logs, notify
from targetd.system.own_certificate import CA, OwnCertificate
from targetd.system.threads import Deadline, run_in_thread
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
KEYS = "api_key"
"""Namespace of API keys."""
PLACE = "place"
"""Namespace in the store of where it is itself."""
RENEW_LOOK_S = 86400.0
"""How often it is looked whether our own certificate ends soon."""
API_SHUTDOWN_S = 2.0
"""How long requests under way may take when the daemon stops."""
STORE_CLOSE_S = 1.0
"""How long the store may take to be closed: longer, and its disk hangs. What it has promised is on the
medium, and what it has not is undone at the next start."""
LEFT_S = 0.5
"""How long what is still under way at the end may take to notice that it is cancelled."""
STOP_S = 9.5
"""From the signal until the process ends itself. systemd's own patience is 90 s by default, docker's 10 s."""


class StartError(Exception):
    """The daemon cannot start; the text is one line for the operator."""


def run(options: Options) -> int:
    """Serve until told to stop; returns the exit code (design.md §2)."""
    logs.set_up(options.log_level, options.log_format)
    listeners = Listeners(inherited(os.environ))
    deadline = Deadline(STOP_S)
    loop = Loop()
    asyncio.set_event_loop(loop)
    try:
        in_order = loop.run_until_complete(_serve(options, loop, listeners, deadline))
    except (StartError, StoreError) as error:
        print(f"iscsi-targetd: {error}", file=sys.stderr)
        return 1
    finally:
        _leave(loop)
        deadline.met()
    if not in_order:
        # Python would close the database now, and wait for the lock that the hanging thread has.
        logging.shutdown()
        os._exit(0)
    return 0


def _leave(loop: Loop) -> None:
    """Cancel what is still under way, and close the loop. Not ``asyncio.Runner``, which waits for every task,
    also for one that cannot end before a disk answers."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=LEFT_S))
    asyncio.set_event_loop(None)
    loop.set_exception_handler(lambda loop, context: None)  # tasks that hang are destroyed: that was told
    loop.close()


async def _serve(options: Options, loop: Loop, listeners: Listeners, deadline: Deadline) -> bool:
    """Until told to stop; whether nothing was left hanging."""
    _raise_descriptor_limit()
    stop = asyncio.Event()

    def stop_now() -> None:
        deadline.begin()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_now)
    state = options.state_dir
    roots = _extent_roots(options)
    try:
        await run_in_thread(_make_directories, state, () if options.extent_roots else roots)
        password, generated = await run_in_thread(_admin_password, options)
        tls = await run_in_thread(_certificate, options)
    except OSError as error:
        raise StartError(f"{error.filename or state}: {error.strerror or error}") from None
    except ValueError as error:
        raise StartError(str(error)) from None
    if options.io_engine == "uring" and (reason := available()) is not None:
        raise StartError(f"--io-engine uring: io_uring cannot be used: {reason.strerror}")
    store = await Store.open(state / STORE_NAME)
    await _settle_in(store)
    runtime: Runtime | Supervisor
    if options.workers > 1:
        from targetd.workers import supervisor  # a twentieth of all imports, which one process does without

        runtime = supervisor.Supervisor(
            *(store, roots, loop, dict(options.pools), options.workers),
            *(options.log_level, options.log_format, listeners, options.io_engine, _own_files(options)),
            data_memory=options.memory_limit,
        )
    else:
        runtime = Runtime(
            *(store, roots, loop, dict(options.pools)),
            listeners=listeners,
            io_engine=options.io_engine,
            own_files=_own_files(options),
            data_memory=options.memory_limit,
        )
    admin = Account(ADMIN, await run_in_thread(hash_password, password))
    pools = Pools(dict(options.pools))
    datasets = DatasetService(pools, _Records(store, DATASETS))
    storage = StorageResource(runtime, pools)
    keys = KeyRing(_Records(store, KEYS))
    authenticator = Authenticator({ADMIN: admin})
    users = UsersResource(authenticator, _Records(store, ACCOUNTS), admin)
    app = make_app(
        runtime,
        authenticator,
        version=version(),
        resources=[storage, SnapshotResource(runtime, datasets), users],
        keys=keys,
        truenas=TrueNas(pools, datasets, options.emulated_version or ""),
        page_size=options.api_page_size,
    )
    api = ApiRunner(app, shutdown_timeout=API_SHUTDOWN_S)
    watchers: list[asyncio.Task[None]] = []
    in_order = True
    try:
        sockets = await _bind_api(listeners, options.api)
        first = store.fresh
        stored = await store.load()
        config = fresh(str(options.portal)) if first else stored
        with _as_start_error():
            await runtime.start(config, first=first)
        if first:
            # Only now: a start that fails leaves no portal behind that the next one would insist on.
            await store.save(stored, config)
        runtime.tell_io_engine()  # only now: a start that fails is one line
        await users.load()
        await keys.load()
        await datasets.load()
        again = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, again.set)
        reloader = Reloader(options, runtime, users, admin, tls, _read_password, _extent_roots, _own_files)
        watchers.append(loop.create_task(reloader.serve(again)))
        own = _own_certificate(options)
        if own is not None:
            watchers.append(loop.create_task(_renew(own)))
            log.info("the API's certificate is signed by %s; clients are to trust that", own.directory / CA)
        elif tls is None and not _is_loopback(options.api.host):
            log.warning("passwords of the API travel in clear to %s; --tls auto encrypts them", options.api)
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
        await asyncio.gather(runtime.stop(), api.cleanup())
        try:
            await asyncio.wait_for(store.close(), STORE_CLOSE_S)
        except TimeoutError:
            log.error(
                "%s: its disk does not answer; the store was left open. A change that was being stored is in "
                "force at the next start, or not, as a whole",
                store.path,
            )
            in_order = False
        listeners.close()
    log.info("stopped")
    return in_order


def _extent_roots(options: Options) -> tuple[Path, ...]:
    return options.extent_roots or (options.state_dir / "extents",)


def _own_files(options: Options) -> OwnFiles:
    """What no extent may have."""
    files = (options.api_password_file, options.tls_cert, options.tls_key, options.config)
    return OwnFiles(options.state_dir, [path for path in files if path is not None])


async def _settle_in(store: Store) -> None:
    """A store that is not the file it was has been restored, copied or moved, and perhaps the files of its
    extents with it: by what they were known is forgotten, and they are taken as they are found."""
    try:
        trace = (await run_in_thread(trace_of, str(store.path))).encode()
        kept = (await store.items(PLACE)).get(TRACE_KEPT_AS)
        if trace == kept:
            return
        if kept is not None:
            await store.forget_traces(TRACE_KEPT_AS)
            log.warning(
                "%s was restored, copied or moved; extents take what is under their paths", store.path
            )
        await store.put(PLACE, TRACE_KEPT_AS, trace)
    except (OSError, StoreError) as error:
        log.error("%s: where it is could not be noted: %s", store.path, error)


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


def _own_certificate(options: Options) -> OwnCertificate | None:
    """The certificate that we make ourselves, under every name that a client may know us by."""
    if options.tls != "auto":
        return None
    host = options.api.host
    known = [] if is_wildcard(host) else [host]
    names = [*known, *filter(None, [platform.node()]), "localhost", "127.0.0.1", "::1"]
    return OwnCertificate(options.state_dir / "tls", names)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (not is_wildcard(host) and ipaddress.ip_address(host).is_loopback)


async def _renew(own: OwnCertificate) -> None:
    """Make our own certificate anew in time, until cancelled; its files are watched by who shows it."""
    while True:
        await asyncio.sleep(RENEW_LOOK_S)
        try:
            await run_in_thread(own.ensure)
        except (OSError, ValueError) as error:
            log.error("the certificate of the API cannot be made anew: %s", error)


def _certificate(options: Options) -> Certificate | None:
    own = _own_certificate(options)
    if own is not None:
        own.ensure()
        return Certificate(*own.files)
    if options.tls_cert is None or options.tls_key is None:
        return None
    try:
        return Certificate(options.tls_cert, options.tls_key)
    except ssl.SSLError as error:
        raise StartError(f"--tls-cert {options.tls_cert}: {error.reason or error}") from None


class _Records:
    """Named bytes of one namespace of the store: accounts, API keys, attributes of datasets."""

    def __init__(self, store: Store, namespace: str) -> None:
        self._store = store
        self._namespace = namespace

    async def put(self, name: str, value: bytes | None) -> None:
        await self._store.put(self._namespace, name, value)

    async def items(self) -> dict[str, bytes]:
        return await self._store.items(self._namespace)


async def _bind_api(listeners: Listeners, address: Address) -> list[socket.socket]:
    """Take the address of the API before anything else is begun; nobody is answered yet."""
    try:
        return await listeners.api(address)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartError(f"--api {address}: {reason}") from None


async def _start_api(
    api: ApiRunner, listeners: Listeners, sockets: list[socket.socket], tls: ssl.SSLContext | None
) -> None:
    await api.setup()
    for sock in sockets:
        await ApiSite(api, sock, ssl_context=tls).start()
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
