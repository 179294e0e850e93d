"""Commands beside the resources: users of the API, statistics, a live view, why logins fail."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from targetd.ctl import output
from targetd.ctl.client import Client, FieldsError, UsageError
from targetd.ctl.commands import SESSIONS, Context, Json, _client, _read_secret, _settings, app, whole

__all__ = ["app"]

USERS = "account/users"
STATISTICS = "services/iscsi/statistics/"
FAILURES = "services/iscsi/loginfailure"
EVENTS = "services/iscsi/events/"
EXPLAIN = "services/iscsi/explain/"

# -- Users ------------------------------------------------------------------------------------------

_users = typer.Typer(help="Who may use the API.", no_args_is_help=True)
app.add_typer(_users, name="user")

Password = Annotated[
    Path | None,
    typer.Option("--password-file", help="File (- for standard input) with the password in its first line."),
]
ReadOnly = Annotated[bool | None, typer.Option("--read-only/--admin", help="May only read, or everything.")]
OPTIONS = {"password": "--password-file", "read_only": "--read-only", "name": "NAME"}


def _write_user(context: Context, method: str, path: str, body: Mapping[str, Any], json: bool) -> None:
    with _client(context) as client:
        try:
            shown = client.request(method, path, dict(body))
        except FieldsError as error:
            raise FieldsError(error.errors, OPTIONS) from None
    if json or _settings(context).json:
        output.as_json(shown)
    else:
        output.details(shown)


@_users.command("list")
def _list_users(context: Context, json: Json = False) -> None:
    """List them."""
    with _client(context) as client:
        users = client.all(USERS)
    if json or _settings(context).json:
        output.as_json(users)
    else:
        output.table(("name", "read only"), ((user["name"], user["read_only"]) for user in users))


def _given(password_file: Path | None, read_only: bool | None) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if password_file is not None:
        body["password"] = _read_secret(password_file, "--password-file")
    if read_only is not None:
        body["read_only"] = read_only
    return body


@_users.command("create")
def _create_user(
    context: Context,
    name: str,
    password_file: Password = None,
    read_only: ReadOnly = None,
    json: Json = False,
) -> None:
    """Make one."""
    body = {"name": name, **_given(password_file, read_only)}
    _write_user(context, "POST", f"{USERS}/", body, json)


@_users.command("update")
def _update_user(
    context: Context,
    name: str,
    password_file: Password = None,
    read_only: ReadOnly = None,
    json: Json = False,
) -> None:
    """Change the password, or what it may."""
    body = _given(password_file, read_only)
    if not body:
        raise UsageError("say what to change; --help tells the options")
    _write_user(context, "PUT", f"{USERS}/{_segment(name)}/", body, json)


@_users.command("delete")
def _delete_user(context: Context, names: Annotated[list[str], typer.Argument(metavar="NAME")]) -> None:
    """Delete them."""
    with _client(context) as client:
        for name in names:
            client.request("DELETE", f"{USERS}/{_segment(name)}/")


def _segment(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


# -- Why logins fail --------------------------------------------------------------------------------


@app.command("failures")
def _failures(context: Context, json: Json = False) -> None:
    """The last refused logins, newest first, with the rule that refused them."""
    with _client(context) as client:
        failures = client.all(FAILURES)
    if json or _settings(context).json:
        output.as_json(failures)
        return
    output.table(
        ("when", "from", "initiator", "target", "status", "reason"),
        (
            (
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(failure["at"])),
                failure["peer_address"],
                failure["initiator_name"],
                failure["target_name"],
                failure["status"],
                failure["reason"],
            )
            for failure in failures
        ),
    )


@app.command("explain")
def _explain(
    context: Context,
    initiator: Annotated[str, typer.Argument(help="iSCSI name of the initiator.")],
    address: Annotated[str, typer.Argument(help="IP address that it comes from.")],
    target: Annotated[str, typer.Argument(help="Full or short name; without it all targets.")] = "",
    portal: Annotated[
        int | None, typer.Option(parser=whole, metavar="INTEGER", help="Id of a portal; without it all.")
    ] = None,
    json: Json = False,
) -> None:
    """May this initiator from this address log in, and what would it see? Exit status 1: it may not."""
    from urllib.parse import urlencode

    query = {"initiator": initiator, "address": address, "target": target}
    if portal is not None:
        query["portal"] = str(portal)
    with _client(context) as client:
        answers = client.request("GET", f"{EXPLAIN}?{urlencode(query)}")
    if json or _settings(context).json:
        output.as_json(answers)
    else:
        output.table(
            ("target", "portal", "allowed", "authentication", "luns", "reason"),
            (
                (
                    answer["target_name"],
                    answer["portal_id"],
                    answer["allowed"],
                    answer["authentication"],
                    [f"{lun['lun']} {lun['extent']}" for lun in answer["luns"]],
                    answer["reason"],
                )
                for answer in answers
            ),
        )
    if not any(answer["allowed"] for answer in answers):
        raise typer.Exit(1)


# -- Statistics -------------------------------------------------------------------------------------


def _latency(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.0f} ms"


def _place(unit: Mapping[str, Any]) -> list[str]:
    return [f"{place['target']}/{place['lun']}" for place in unit["luns"]]


@app.command("stats")
def _stats(context: Context, json: Json = False) -> None:
    """Counters of every logical unit since the daemon started."""
    with _client(context) as client:
        statistics = client.request("GET", STATISTICS)
    if json or _settings(context).json:
        output.as_json(statistics)
        return
    output.table(
        ("extent", "luns", "reads", "writes", "read", "written", "errors", "in flight", "p50", "p99"),
        (
            (
                unit["extent"],
                _place(unit),
                unit["reads"],
                unit["writes"],
                output.size(unit["bytes_read"]),
                output.size(unit["bytes_written"]),
                unit["read_errors"] + unit["write_errors"],
                unit["in_flight"],
                _latency(unit["latency_s"]["p50"]),
                _latency(unit["latency_s"]["p99"]),
            )
            for unit in statistics["units"]
        ),
    )


@app.command("events")
def _events(context: Context, json: Json = False) -> None:
    """Logins, refusals, LUNs and changes as they happen, until interrupted; with --json one object a line."""
    import json as encoder

    with _client(context) as client, contextlib.suppress(KeyboardInterrupt):
        for kind, data in client.events(EVENTS):
            at = data.pop("at")
            if json or _settings(context).json:
                print(encoder.dumps({"event": kind, "at": at, **data}), flush=True)
            else:
                clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
                print(clock, kind, output.line(data), flush=True)


WORK = "services/iscsi/work"


@app.command("work")
def _work(context: Context, json: Json = False) -> None:
    """What takes its time just now: space being taken, SANITIZE, third-party copies. On a terminal it is
    watched until all of it is done."""
    with _client(context) as client:
        if json or _settings(context).json:
            output.as_json(client.all(WORK))
        elif sys.stdout.isatty():
            from targetd.ctl import progress

            with contextlib.suppress(KeyboardInterrupt):
                progress.watch(client)
        else:
            output.table(
                ("work", "extent", "done", "of"),
                (
                    (one["kind"], one["extent"], output.size(one["done"]), output.size(one["total"]))
                    for one in client.all(WORK)
                ),
            )


class _Rates:
    """What counters have gained a second since the last look."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, Any], tuple[float, Mapping[str, Any]]] = {}

    def of(self, kind: str, key: Any, now: float, counted: Mapping[str, Any]) -> Callable[[str], float]:
        at, before = self._before.get((kind, key), (now, counted))
        self._before[kind, key] = now, counted
        elapsed = now - at
        return lambda name: (counted[name] - before[name]) / elapsed if elapsed > 0 else 0.0


@app.command("top")
def _top(
    context: Context,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="Looks; 0 = until interrupted.")] = 0,
) -> None:
    """Watch sessions and logical units, the busiest first."""
    from rich.console import Console, Group
    from rich.live import Live

    rates = _Rates()
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else output.UNBOUNDED, highlight=False, markup=False)
    with _client(context) as client:
        try:
            with Live(Group(), console=console, auto_refresh=False, screen=terminal) as live:
                looks = 0
                while True:
                    live.update(_look(client, rates), refresh=True)
                    looks += 1
                    if looks == count:
                        return
                    time.sleep(interval)
        except KeyboardInterrupt:
            return


def _look(client: Client, rates: _Rates) -> Any:
    """One picture."""
    from rich.console import Group

    statistics = client.request("GET", STATISTICS)
    sessions = {session["id"]: session for session in client.all(SESSIONS)}
    now = time.monotonic()
    rows = []
    for counted in statistics["sessions"]:
        gained = rates.of("session", counted["id"], now, counted)
        session = sessions.get(counted["id"], {"connections": []})
        rows.append(
            (
                gained("commands"),
                (
                    counted["id"],
                    counted["initiator_name"],
                    counted["target_name"] or "(discovery)",
                    [connection["peer_address"] for connection in session["connections"]],
                    f"{gained('commands'):.0f}",
                    f"{output.size(int(gained('bytes_read')))}/s",
                    f"{output.size(int(gained('bytes_written')))}/s",
                    counted["in_flight"],
                    _latency(counted["latency_s"]["p50"]),
                    _latency(counted["latency_s"]["p99"]),
                ),
            )
        )
    units = []
    for unit in statistics["units"]:
        gained = rates.of("unit", (unit["extent_id"], str(unit["luns"])), now, unit)
        operations = gained("reads") + gained("writes")
        units.append(
            (
                operations,
                (
                    unit["extent"],
                    _place(unit),
                    f"{gained('reads'):.0f}",
                    f"{gained('writes'):.0f}",
                    f"{output.size(int(gained('bytes_read')))}/s",
                    f"{output.size(int(gained('bytes_written')))}/s",
                    unit["in_flight"],
                    "yes" if unit["ready"] else "no",
                ),
            )
        )
    speed = ("read", "written", "in flight")
    return Group(
        output.made_table(
            ("session", "initiator", "target", "from", "commands/s", *speed, "p50", "p99"), _busiest(rows)
        ),
        "",
        output.made_table(("extent", "luns", "reads/s", "writes/s", *speed, "ready"), _busiest(units)),
    )


def _busiest(rows: Sequence[tuple[float, tuple[object, ...]]]) -> list[tuple[object, ...]]:
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
