"""SIGHUP: options are read again, and what can change while the daemon runs, changes.

``LIVE`` is the whole of it: option → what carries it out. An option that is not in it and has changed is told
to the operator as waiting for the next start. What is wrong in any of them leaves all as they were.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from api.auth import Account, hash_password, verify_password
from api.resources.users import UsersResource
from targetd.daemon.options import DECLARED, Options, UsageError, parse
from targetd.engine.media import OwnFiles
from targetd.engine.runtime import Runtime
from targetd.system import logs
from targetd.system.threads import run_in_thread
from targetd.system.tls import Certificate

if TYPE_CHECKING:
    from targetd.workers.supervisor import Supervisor

__all__ = ["LIVE", "Reloader"]

log = logging.getLogger("targetd.reload")


@dataclass
class Reloader:
    """What may change."""

    started: Options
    """As they were at the start."""
    runtime: "Runtime | Supervisor"
    users: UsersResource
    admin: Account
    certificate: Certificate | None
    password: Callable[[Options], str]
    """Reads it; may wait for a disk.

    Raises:
        OSError: it cannot be had.
        ValueError: it is none.
    """
    roots: Callable[[Options], tuple[Path, ...]]
    """Where extents may live by these options."""
    own_files: Callable[[Options], OwnFiles]
    """What no extent may have by these options."""

    async def serve(self, asked: asyncio.Event) -> None:
        """Read again whenever ``asked`` is set, until cancelled."""
        while True:
            await asked.wait()
            asked.clear()
            try:
                await self.reload()
            except Exception:
                log.exception("options could not be read again")

    async def reload(self) -> None:
        """Once."""
        try:
            options = (await run_in_thread(parse, sys.argv[1:], os.environ)).options
        except UsageError as error:
            log.error("all options stay as they were: %s", error)
            return
        assert options is not None
        for name, carry_out in LIVE.items():
            if problem := await carry_out(self, options):
                log.error("%s stays as it was: %s", name, problem)
        for declared in DECLARED:
            if declared.field in LIVE or declared.field in ("config", "check_config"):
                continue
            if getattr(options, declared.field) != getattr(self.started, declared.field):
                log.warning("%s has changed; that waits for the next start", declared.name)
        log.info("options were read again; log level %s", options.log_level)

    async def _logs(self, options: Options) -> str:
        logs.set_up(options.log_level, options.log_format)
        if not isinstance(self.runtime, Runtime):
            self.runtime.set_logs(options.log_level, options.log_format)
        return ""

    async def _password(self, options: Options) -> str:
        try:
            password = await run_in_thread(self.password, options)
        except (OSError, ValueError) as error:
            return getattr(error, "strerror", None) or str(error)
        if not await run_in_thread(verify_password, password, self.admin.password_hash):
            self.admin = Account(self.admin.name, await run_in_thread(hash_password, password))
            self.users.replace_root(self.admin)
            log.info("user %s of the API has another password", self.admin.name)
        return ""

    async def _tls(self, options: Options) -> str:
        files = options.tls_cert, options.tls_key
        if options.tls != self.started.tls:
            return "HTTP or HTTPS is decided at the start"
        if options.tls == "auto":
            return ""
        if (files[0] is None or files[1] is None) != (self.certificate is None):
            return "HTTP or HTTPS is decided at the start"
        if self.certificate is not None and files[0] is not None and files[1] is not None:
            self.certificate.files = (files[0], files[1])
            await self.certificate.reload(always=True)
        return ""

    async def _roots(self, options: Options) -> str:
        self.runtime.extent_roots = self.roots(options)
        own, before = self.own_files(options), self.own_files(self.started)
        self.runtime.own_files = OwnFiles(own.state_directory, {*own.files, *before.files})
        return ""


async def _with_another(reloader: Reloader, options: Options) -> str:
    """Another row of ``LIVE`` sees to it."""
    return ""


LIVE: Mapping[str, Callable[[Reloader, Options], Awaitable[str]]] = {
    "log_level": Reloader._logs,
    "log_format": _with_another,
    "api_password_file": Reloader._password,
    "tls": _with_another,
    "tls_cert": Reloader._tls,
    "tls_key": _with_another,
    "extent_roots": Reloader._roots,
}
"""Field of ``Options`` → what brings it in force; it answers why that cannot be."""

assert LIVE.keys() <= {field.name for field in fields(Options)}
