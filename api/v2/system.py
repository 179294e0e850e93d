"""``auth.*``, ``core.*``, ``system.*``, ``service.*``: what is not about disks."""

import base64
import errno
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final, Literal

from api.auth import Account, Authenticator
from api.errors import BusyError, TooManyFailuresError, UnauthorizedError
from api.keys import ROLES, KeyRing
from api.resources.service import SERVICE_ID, SERVICE_NAME
from api.v2.errors import ENOTAUTHENTICATED, CallError
from api.v2.jobs import COLLECTION, Job, Jobs
from api.v2.methods import Call, Method, Model, Parameter, before_login, reading, writing
from api.v2.query import PARAMETERS, QueryOptions, select
from targetd.config import ConfigError, Configuration
from targetd.interface import Engine

__all__ = ["DEFAULT_VERSION", "SystemMethods"]

DEFAULT_VERSION: Final = "TrueNAS-SCALE-25.04.2"
"""What clients choose their dialect by: SCALE, and 25.04 for JSON-RPC."""
COLLECTIONS: Final = frozenset((COLLECTION,))
"""What can be subscribed to."""
BULK: Final = 1000
"""Calls in one ``core.bulk``."""


class LoginPassword(Model):
    mechanism: Literal["PASSWORD_PLAIN"]
    username: str
    password: str
    login_options: dict[str, Any] | None = None


class LoginKey(Model):
    mechanism: Literal["API_KEY_PLAIN"]
    username: str
    api_key: str
    login_options: dict[str, Any] | None = None


class ClientOptions(Model):
    legacy_jobs: bool = True
    private_methods: bool = False
    py_exceptions: bool = False


class ServiceOptions(Model):
    ha_propagate: bool = True
    silent: bool = True
    timeout: int | None = None


class ServiceUpdate(Model):
    enable: bool


class KeyCreate(Model):
    name: str
    username: str = "root"
    role: Literal["admin", "read-only"] = "admin"
    expires_in_s: int | None = None


def credentials(name: str, password: str) -> str:
    """A Basic header of both, as the authenticator takes it."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode(errors="surrogateescape")).decode()


class SystemMethods:
    """Everything beside the disks."""

    def __init__(
        self,
        engine: Engine,
        authenticator: Authenticator,
        keys: KeyRing,
        jobs: Jobs,
        *,
        daemon_version: str,
        version: str = "",
    ) -> None:
        self.engine = engine
        self.authenticator = authenticator
        self.keys = keys
        self.jobs = jobs
        self.version = version or DEFAULT_VERSION
        self.daemon_version = daemon_version
        self.started = time.time()

    # -- auth -------------------------------------------------------------------------------------

    async def _password(self, call: Call, name: str, password: str) -> Account | None:
        try:
            return await self.authenticator.login(credentials(name, password), call.caller.address)
        except UnauthorizedError:
            return None
        except (TooManyFailuresError, BusyError) as error:
            raise CallError(str(error), errno.EBUSY) from None

    async def login(self, call: Call, name: str, password: str, otp: str | None) -> bool:
        account = await self._password(call, name, password)
        if account is not None:
            call.caller.account = account
        return account is not None

    async def login_with_api_key(self, call: Call, key: str) -> bool:
        account = await self.keys.login(key)
        if account is not None:
            call.caller.account = account
        return account is not None

    async def login_ex(self, call: Call, model: LoginPassword | LoginKey) -> dict[str, Any]:
        account = (
            await self._password(call, model.username, model.password)
            if isinstance(model, LoginPassword)
            else await self.keys.login(model.api_key)
        )
        if account is None:
            return {"response_type": "AUTH_ERR"}
        call.caller.account = account
        return {"response_type": "SUCCESS", "user_info": _me(account), "authenticator": "LEVEL_1"}

    async def mechanisms(self, call: Call) -> list[str]:
        return ["API_KEY_PLAIN", "PASSWORD_PLAIN"]

    async def logout(self, call: Call) -> bool:
        call.caller.account = None
        return True

    async def me(self, call: Call) -> dict[str, Any]:
        account = call.caller.account
        if account is None:
            raise CallError("Not authenticated", ENOTAUTHENTICATED)
        return _me(account)

    # -- API keys ---------------------------------------------------------------------------------

    async def key_query(self, call: Call, filters: list[Any], options: QueryOptions) -> Any:
        return select([key.show() for key in self.keys.list()], filters, options)

    async def key_create(self, call: Call, model: KeyCreate) -> dict[str, Any]:
        try:
            key, secret = await self.keys.create(model.name, ROLES[model.role], model.expires_in_s)
        except ValueError as error:
            raise CallError(str(error), errno.EINVAL) from None
        return {**key.show(), "key": secret}

    async def key_delete(self, call: Call, id: int) -> bool:
        if not await self.keys.delete(id):
            raise CallError(f"there is no API key {id}", errno.ENOENT)
        return True

    # -- core -------------------------------------------------------------------------------------

    async def ping(self, call: Call) -> str:
        return "pong"

    async def set_options(self, call: Call, options: ClientOptions) -> None:
        if options.py_exceptions or options.private_methods:
            raise CallError("py_exceptions and private_methods are not offered", errno.EINVAL)

    async def subscribe(self, call: Call, collection: str) -> str:
        if collection not in COLLECTIONS:
            raise CallError(
                f"{collection}: no such event; there is {', '.join(sorted(COLLECTIONS))}", errno.ENOENT
            )
        return call.caller.subscribe(collection)

    async def unsubscribe(self, call: Call, id: str) -> None:
        call.caller.unsubscribe(id)

    async def get_jobs(self, call: Call, filters: list[Any], options: QueryOptions) -> Any:
        return select([job.show() for job in self.jobs.list()], filters, options)

    async def job_wait(self, call: Call, id: int) -> int:
        """A job that ends as another does; REST and JSON-RPC clients ask for its number."""
        waited = self.jobs.find(id)

        async def work(job: Job) -> Any:
            await waited.over.wait()
            if waited.error is not None:
                raise CallError(waited.error.partition("] ")[2] or waited.error, errno.EFAULT)
            return waited.result

        return (await self.jobs.start("core.job_wait", [id], work)).id

    async def job_abort(self, call: Call, id: int) -> None:
        self.jobs.abort(id)

    async def bulk(self, call: Call, name: str, calls: list[list[Any]], description: str | None) -> int:
        method = call.table.find(name)
        if method is None or method.public:
            raise CallError(f"{name}: no such method", errno.ENOENT)
        if len(calls) > BULK:
            raise CallError(f"{len(calls)} calls at once: {BULK} at the most", errno.EINVAL)

        async def work(job: Job) -> list[dict[str, Any]]:
            results: list[dict[str, Any]] = []
            for number, given in enumerate(calls):
                try:
                    result, error = await call.table.call(call.caller, method, given), None
                    if method.job:
                        waited = self.jobs.find(result)
                        await waited.over.wait()
                        result, error = waited.result, waited.error
                except CallError as failure:
                    result, error = None, failure.reason
                results.append({"job_id": None, "result": result, "error": error})
                await self.jobs.progress(
                    job, 100 * (number + 1) / len(calls), f"{number + 1} of {len(calls)}"
                )
            return results

        return (await self.jobs.start("core.bulk", [name, calls], work)).id

    async def get_methods(self, call: Call) -> dict[str, Any]:
        return {method.name: {"description": method.summary, "job": method.job} for method in call.table}

    # -- system, service --------------------------------------------------------------------------

    async def system_version(self, call: Call) -> str:
        return self.version

    async def product_type(self, call: Call) -> str:
        return "COMMUNITY_EDITION"

    async def system_info(self, call: Call) -> dict[str, Any]:
        return {
            "version": self.version,
            "hostname": platform.node(),
            "physmem": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "cores": os.cpu_count(),
            "loadavg": list(os.getloadavg()),
            "uptime_seconds": time.time() - self.started,
            "system_product": f"iscsi-targetd {self.daemon_version}",
        }

    def _service(self) -> dict[str, Any]:
        state = self.engine.service_state()
        return {
            "id": SERVICE_ID,
            "service": SERVICE_NAME,
            "enable": state.enabled,
            "state": "RUNNING" if state.running else "STOPPED",
            "pids": [os.getpid()] if state.running else [],
        }

    async def service_query(self, call: Call, filters: list[Any], options: QueryOptions) -> Any:
        return select([self._service()], filters, options)

    async def service_started(self, call: Call, service: str) -> bool:
        _known(service)
        return self.engine.service_state().running

    async def service_update(self, call: Call, service: str | int, model: ServiceUpdate) -> int:
        _known(service)
        await self._enable(model.enable)
        return SERVICE_ID

    async def service_start(self, call: Call, service: str, options: ServiceOptions) -> bool:
        _known(service)
        await self._enable(True)
        return True

    async def service_stop(self, call: Call, service: str, options: ServiceOptions) -> bool:
        _known(service)
        await self._enable(False)
        return False

    async def service_reload(self, call: Call, service: str, options: ServiceOptions) -> bool:
        """Every change is in force when it is answered: there is nothing to reload."""
        _known(service)
        return self.engine.service_state().running

    async def _enable(self, wanted: bool) -> None:
        def edit(config: Configuration) -> Configuration:
            return config if config.service_enabled == wanted else replace(config, service_enabled=wanted)

        try:
            await self.engine.apply(edit)
        except ConfigError as error:
            raise CallError("; ".join(one.message for one in error.problems), errno.EBUSY) from None

    def methods(self) -> Iterator[Method]:
        """All of them."""
        service, options = Parameter("service", str), Parameter("options", ServiceOptions, ServiceOptions)
        id = Parameter("id", int)
        password = Parameter("password", str)
        token = Parameter("otp_token", str | None, None)
        calls = Parameter("params", list[list[Any]])
        words = Parameter("description", str | None, None)
        wanted = Parameter("service-update", ServiceUpdate)
        yield before_login(
            "auth.login", "Log in by name.", self.login, Parameter("username", str), password, token
        )
        yield before_login(
            "auth.login_with_api_key", "Log in by a key.", self.login_with_api_key, Parameter("key", str)
        )
        yield before_login(
            "auth.login_ex", "Log in.", self.login_ex, Parameter("login_data", LoginPassword | LoginKey)
        )
        yield before_login("auth.mechanism_choices", "How one can log in.", self.mechanisms)
        yield before_login("auth.logout", "End the login.", self.logout)
        yield before_login("core.ping", "Answer pong.", self.ping, rest=("GET", "/core/ping"))
        yield before_login(
            "core.set_options",
            "Choose how answers look.",
            self.set_options,
            Parameter("options", ClientOptions),
        )
        yield reading("auth.me", "Show the account that is logged in.", self.me, rest=("GET", "/auth/me"))
        yield reading(
            "core.subscribe", "Have events sent: core.get_jobs.", self.subscribe, Parameter("name", str)
        )
        yield reading("core.unsubscribe", "Have no more events sent.", self.unsubscribe, Parameter("id", str))
        yield reading(
            "core.get_jobs", "List jobs.", self.get_jobs, *PARAMETERS, rest=("GET", "/core/get_jobs")
        )
        yield reading(
            "core.get_methods", "List methods.", self.get_methods, rest=("GET", "/core/get_methods")
        )
        yield replace(
            reading("core.job_wait", "Wait for a job.", self.job_wait, id, rest=("POST", "/core/job_wait")),
            job=True,
        )
        bulk = (Parameter("method", str), calls, words)
        yield replace(
            reading("core.bulk", "Call a method many times.", self.bulk, *bulk, rest=("POST", "/core/bulk")),
            job=True,
        )
        yield writing("core.job_abort", "End a job.", self.job_abort, id, rest=("POST", "/core/job_abort"))
        yield reading(
            "system.version", "What to take us for.", self.system_version, rest=("GET", "/system/version")
        )
        yield reading(
            "system.product_type", "Edition.", self.product_type, rest=("GET", "/system/product_type")
        )
        yield reading("system.info", "Show the host.", self.system_info, rest=("GET", "/system/info"))
        yield writing(
            "api_key.query", "List API keys.", self.key_query, *PARAMETERS, rest=("GET", "/api_key")
        )
        made = Parameter("api_key_create", KeyCreate)
        yield writing(
            "api_key.create", "Make an API key, shown once.", self.key_create, made, rest=("POST", "/api_key")
        )
        yield writing(
            "api_key.delete", "Delete a key.", self.key_delete, id, rest=("DELETE", "/api_key/id/{id}")
        )
        yield reading(
            "service.query", "List services.", self.service_query, *PARAMETERS, rest=("GET", "/service")
        )
        yield reading(
            "service.started",
            "Does it run?",
            self.service_started,
            service,
            rest=("POST", "/service/started"),
        )
        which = Parameter("id_or_name", str | int)
        place = ("PUT", "/service/id/{id}")
        yield writing("service.update", "Switch a service.", self.service_update, which, wanted, rest=place)
        for verb, summary, run in (
            ("start", "Start a service.", self.service_start),
            ("stop", "Stop a service; its sessions end.", self.service_stop),
            ("restart", "Start a service; one that runs goes on: changes are in force.", self.service_start),
            ("reload", "Nothing is to be done: changes are in force already.", self.service_reload),
        ):
            yield writing(
                f"service.{verb}", summary, run, service, options, rest=("POST", f"/service/{verb}")
            )


def _known(service: str | int) -> None:
    if service not in (SERVICE_NAME, SERVICE_ID, str(SERVICE_ID)):
        raise CallError(f"{service}: no such service; there is {SERVICE_NAME}", errno.ENOENT)


def _me(account: Account) -> dict[str, Any]:
    role = "READONLY_ADMIN" if account.read_only else "FULL_ADMIN"
    return {"pw_name": account.name, "username": account.name, "privilege": {"roles": [role]}}
