"""The commands, made from the table of resources.

``iscsi-targetctl RESOURCE list|show|create|update|delete``; options follow from the declarations, and what
is wrong is told under the option's name. Values go to the daemon as they were written: it reads ``10MB``
and ``yes`` itself, and there is one judge of what is right.
"""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from api.schema import Column
from targetd.config import read_whole
from targetd.ctl import document as documents
from targetd.ctl import output
from targetd.ctl.client import Client, CtlError, FieldsError, UsageError
from targetd.ctl.resources import BY_COLLECTION, GLOBALS, RESOURCES, Resource, option_name
from targetd.daemon.options import version

__all__ = ["app"]

ENVIRONMENT = "ISCSI_TARGETCTL_"
SESSIONS = "services/iscsi/session"
SERVICE = documents.SERVICE_PATH

app = typer.Typer(
    help="Steer iscsi-targetd through its API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@dataclass(slots=True)
class Settings:
    """The options before the command."""

    url: str
    user: str
    password_file: Path | None
    ca_file: Path | None
    json: bool


def _settings(context: typer.Context) -> Settings:
    settings: Settings = context.find_root().obj
    return settings


def _password(settings: Settings) -> str:
    """The password, from the file named or from where the daemon on this machine leaves it."""
    path = settings.password_file
    if path is None:
        states = [os.environ.get("ISCSI_TARGETD_STATE_DIR"), "state", "/var/lib/iscsi-targetd"]
        candidates = [os.environ.get("ISCSI_TARGETD_API_PASSWORD_FILE")]
        candidates += [os.path.join(state, "api-password") for state in states if state]  # noqa: PTH118
        path = next((Path(name) for name in candidates if name and Path(name).exists()), None)
    if path is None:
        if sys.stdin.isatty():
            return str(typer.prompt(f"Password of {settings.user}", hide_input=True, err=True))
        raise UsageError(
            "--password-file: say where the password is; there is none where the daemon leaves it"
        )
    return _read_secret(path, "--password-file")


def _read_secret(path: Path, option: str) -> str:
    """The first line of a file, ``-`` for standard input; never empty."""
    try:
        text = sys.stdin.readline() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise UsageError(f"{option}: cannot read {path}: {reason}") from None
    lines = text.splitlines()
    if not lines or not lines[0].strip():
        raise UsageError(f"{option}: {path} is empty")
    return lines[0].strip()


@contextlib.contextmanager
def _client(context: typer.Context) -> Iterator[Client]:
    settings = _settings(context)
    client = Client(settings.url, settings.user, _password(settings), settings.ca_file)
    try:
        yield client
    finally:
        client.close()


def whole(value: str | int) -> int:
    """A whole number of the command line (``read_whole``), or a default that typer hands on as it is.

    Raises:
        ValueError: it is none.
    """
    return value if isinstance(value, int) else read_whole(value)


Id = Annotated[int, typer.Argument(parser=whole, metavar="ID")]
Ids = Annotated[list[int], typer.Argument(parser=whole, metavar="ID")]
Json = Annotated[bool, typer.Option("--json", help="Answer with JSON, as the API has it.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Change the block size, medium or size of an extent though initiators are logged in.",
    ),
]
Context = typer.Context


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"iscsi-targetctl {version()}")
        raise typer.Exit


@app.callback()
def _root(
    context: Context,
    url: Annotated[
        str, typer.Option(envvar=f"{ENVIRONMENT}URL", help="Where the API is, http:// or https://.")
    ] = "http://127.0.0.1:8260",
    user: Annotated[str, typer.Option(envvar=f"{ENVIRONMENT}USER", help="Who asks.")] = "root",
    password_file: Annotated[
        Path | None,
        typer.Option(
            envvar=f"{ENVIRONMENT}PASSWORD_FILE",
            help="File with the password, - for standard input; by default the one in the state directory.",
        ),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(envvar=f"{ENVIRONMENT}CA_FILE", help="Certificates (PEM) to trust for https://."),
    ] = None,
    json: Json = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say which this is.")
    ] = False,
) -> None:
    context.obj = Settings(url, user, password_file, ca_file, json)


# -- Resources --------------------------------------------------------------------------------------


def _option(column: Column) -> inspect.Parameter:
    """One field as an option; not given is None."""
    name = option_name(column)
    text = column.help_text
    kind: Any = str
    if column.secret:
        text, kind = f"File (- for standard input) with this in its first line: {text}", Path
    elif column.rule.type is bool:
        name, kind = f"{name}/--no-{name[2:]}", bool
    elif column.rule.type is tuple:
        text, kind = f"{text} Repeatable.", list[str]
    elif column.rule.choices and not all(str(choice) in text for choice in column.rule.choices):
        choices = ", ".join(str(choice) or "(empty)" for choice in column.rule.choices)
        text = f"{text.rstrip('.')}; one of {choices}."
    elif column.rule.reference and BY_COLLECTION[column.rule.reference.collection].is_named:
        text = f"{text.rstrip('.')}, or its name."
    return inspect.Parameter(
        column.attribute,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(name, help=text)],
    )


def _with_options(
    resource: Resource, function: Callable[..., None], without: Collection[str] = ()
) -> Callable[..., None]:
    """The function with the resource's fields as options; it takes them as its last argument, a dict."""
    columns = [column for column in resource.inputs if column.attribute not in without]
    fixed = [
        parameter
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.name != "given"
    ]

    def command(**arguments: Any) -> None:
        given = {column.attribute: arguments.pop(column.attribute) for column in columns}
        function(**arguments, given={name: value for name, value in given.items() if value is not None})

    options = [_option(column) for column in columns]
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in fixed]
    vars(command)["__signature__"] = inspect.Signature([*keyword, *options])
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keyword, *options]}
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command


def _body(client: Client, resource: Resource, given: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a write: values as written, secrets from their files, references by id."""
    body: dict[str, Any] = {}
    for column in resource.inputs:
        if column.attribute not in given:
            continue
        value = given[column.attribute]
        if column.secret:
            value = _read_secret(value, option_name(column))
        elif column.rule.reference is not None and value not in ("", "null"):
            other = BY_COLLECTION[column.rule.reference.collection]
            try:
                value = other.find(client, value)["id"]
            except CtlError as error:
                raise type(error)(f"{option_name(column)}: {error}") from None
        body[column.wire] = value
    return body


def _write(
    context: typer.Context,
    client: Client,
    method: str,
    path: str,
    resource: Resource,
    given: Mapping[str, Any],
) -> Any:
    body = _body(client, resource, given)
    try:
        if given.get("allocate") and sys.stderr.isatty():
            # Only who waits for it waits for rich.
            from targetd.ctl import progress

            with _client(context) as watcher:
                return progress.during(watcher, lambda: client.request(method, path, body))
        return client.request(method, path, body)
    except FieldsError as error:
        raise FieldsError(error.errors, resource.option_names) from None


def _add(resource: Resource) -> None:
    """The commands of one resource."""
    group = typer.Typer(help=resource.declaration.summary, no_args_is_help=True)
    app.add_typer(group, name=resource.name)
    chosen = "id or name" if resource.is_named else "id"
    one_type = Annotated[str, typer.Argument(metavar=chosen.upper().replace(" ", "-"), help=f"Its {chosen}.")]
    many_type = Annotated[
        list[str], typer.Argument(metavar=chosen.upper().replace(" ", "-"), help=f"Its {chosen}.")
    ]

    def show_all(
        context: Context,
        every: Annotated[bool, typer.Option("--all", help="All columns.")] = False,
        json: Json = False,
    ) -> None:
        """List them."""
        with _client(context) as client:
            objects = client.all(resource.path)
        if json or _settings(context).json:
            output.as_json(objects)
        else:
            output.resource_table(resource, objects, every=every)

    def show(context: Context, one: one_type, json: Json = False) -> None:
        """Show one whole."""
        with _client(context) as client:
            _print(context, resource, resource.find(client, one), json)

    def create(context: Context, given: Mapping[str, Any], json: Json = False) -> None:
        """Make one."""
        with _client(context) as client:
            _print(
                context, resource, _write(context, client, "POST", f"{resource.path}/", resource, given), json
            )

    def update(
        context: Context,
        one: one_type,
        given: Mapping[str, Any],
        json: Json = False,
    ) -> None:
        """Change what is given; the rest stays."""
        _update(context, resource, one, given, json)

    def update_by_force(
        context: Context,
        one: one_type,
        given: Mapping[str, Any],
        force: Force = False,
        json: Json = False,
    ) -> None:
        """Change what is given; the rest stays."""
        _update(context, resource, one, given, json, documents.FORCE if force else "")

    def delete(context: Context, them: many_type) -> None:
        """Delete them, and what refers to them. Files stay."""
        with _client(context) as client:
            ids = [resource.find(client, one)["id"] for one in them]
            for id in ids:
                client.request("DELETE", f"{resource.path}/{id}/")

    group.command("list")(show_all)
    group.command("show")(show)
    group.command("create")(_with_options(resource, create))
    may_force = resource.name in documents.FORCIBLE
    group.command("update")(_with_options(resource, update_by_force if may_force else update))
    if resource.name == "extent":
        group.command("delete")(_delete_extent(resource))
        group.command("sanitize")(_sanitize_extent(resource))
        group.command("adopt")(_adopt_extent(resource))
        group.command("clone")(_with_options(resource, _clone_extent(resource), NOT_OF_A_CLONE))
    else:
        group.command("delete")(delete)


def _update(
    context: Context, resource: Resource, one: str, given: Mapping[str, Any], json: bool, query: str = ""
) -> None:
    if not given:
        raise UsageError("say what to change; --help tells the options")
    with _client(context) as client:
        path = f"{resource.path}/{resource.find(client, one)['id']}/{query}"
        _print(context, resource, _write(context, client, "PUT", path, resource, given), json)


def _delete_extent(resource: Resource) -> Callable[..., None]:
    def delete(
        context: Context,
        them: Annotated[list[str], typer.Argument(metavar="ID-OR-NAME", help="Its id or name.")],
        file: Annotated[bool, typer.Option("--file", help="Delete the file of a File extent too.")] = False,
    ) -> None:
        """Delete them, and where they are LUNs. Files stay unless --file is given."""
        with _client(context) as client:
            ids = [resource.find(client, one)["id"] for one in them]
            for id in ids:
                client.request("DELETE", f"{resource.path}/{id}/", {"delete": True} if file else None)

    return delete


NOT_OF_A_CLONE = ("type", "disk", "file_size")
"""It is a File, as large as its source."""


def _adopt_extent(resource: Resource) -> Callable[..., None]:
    def adopt(
        context: Context,
        one: Annotated[str, typer.Argument(metavar="ID-OR-NAME", help="Its id or name.")],
        json: Json = False,
    ) -> None:
        """Take the file or device that is under the path of an extent now, in place of the one it had. It is
        grown where it is too short, and written to from then on."""
        with _client(context) as client:
            found = resource.find(client, one)
            shown = client.request("POST", f"{resource.path}/{found['id']}/adopt/")
            _print(context, resource, shown, json)

    return adopt


def _sanitize_extent(resource: Resource) -> Callable[..., None]:
    def sanitize(
        context: Context,
        one: Annotated[str, typer.Argument(metavar="ID-OR-NAME", help="Its id or name.")],
        method: Annotated[str, typer.Option(help="overwrite, block erase or cryptographic erase.")],
        passes: Annotated[
            int, typer.Option(parser=whole, metavar="INTEGER", help="Of an overwrite with zeroes.")
        ] = 1,
        yes: Annotated[
            bool, typer.Option("--yes", help="Do not ask whether all data shall be lost.")
        ] = False,
        json: Json = False,
    ) -> None:
        """Make everything on an extent unreadable. It cannot be stopped, and a restart goes on with it; on a
        terminal it is watched until it is done. No session may have the extent."""
        with _client(context) as client:
            found = resource.find(client, one)
            if not yes:
                typer.confirm(f"Lose all data of extent {one}?", abort=True, err=True)
            body = {"method": method, "passes": passes}
            try:
                begun = client.request("POST", f"{resource.path}/{found['id']}/sanitize/", body)
            except FieldsError as error:
                options = {"method": "--method", "passes": "--passes"}
                raise FieldsError(error.errors, options) from None
            if json or _settings(context).json:
                output.as_json(begun)
            elif sys.stdout.isatty():
                from targetd.ctl import progress

                progress.watch(client)
            else:
                output.details(begun)

    return sanitize


def _clone_extent(resource: Resource) -> Callable[..., None]:
    def clone(
        context: Context,
        one: Annotated[str, typer.Argument(metavar="ID-OR-NAME", help="Its id or name.")],
        given: Mapping[str, Any],
        json: Json = False,
    ) -> None:
        """Make another of a File extent, which shares its blocks; --read-only makes it a snapshot."""
        with _client(context) as client:
            path = f"{resource.path}/{resource.find(client, one)['id']}/clone/"
            _print(context, resource, _write(context, client, "POST", path, resource, given), json)

    return clone


def _print(context: typer.Context, resource: Resource, shown: dict[str, Any], json: bool) -> None:
    if json or _settings(context).json:
        output.as_json(shown)
    else:
        output.resource_details(resource, shown)


for _resource in RESOURCES:
    _add(_resource)

_globals = typer.Typer(help=GLOBALS.declaration.summary, no_args_is_help=True)
app.add_typer(_globals, name=GLOBALS.name)


@_globals.command("show")
def _show_globals(context: Context, json: Json = False) -> None:
    """Show it."""
    with _client(context) as client:
        _print(context, GLOBALS, client.request("GET", f"{GLOBALS.path}/"), json)


def _update_globals(context: Context, given: Mapping[str, Any], json: Json = False) -> None:
    """Change what is given; the rest stays. What a login negotiates holds for new sessions."""
    if not given:
        raise UsageError("say what to change; --help tells the options")
    with _client(context) as client:
        _print(context, GLOBALS, _write(context, client, "PUT", f"{GLOBALS.path}/", GLOBALS, given), json)


_globals.command("update")(_with_options(GLOBALS, _update_globals))

# -- Sessions, service ------------------------------------------------------------------

_sessions = typer.Typer(help="Who is logged in.", no_args_is_help=True)
app.add_typer(_sessions, name="session")


@_sessions.command("list")
def _list_sessions(context: Context, json: Json = False) -> None:
    """List the sessions, discovery ones too."""
    with _client(context) as client:
        sessions = client.all(SESSIONS)
    if json or _settings(context).json:
        output.as_json(sessions)
        return
    headings = ("id", "initiator", "target", "from", "user", "luns", "commands", "read", "written", "idle")
    output.table(
        headings,
        (
            (
                session["id"],
                session["initiator_name"],
                session["target_name"] or "(discovery)",
                [connection["peer_address"] for connection in session["connections"]],
                session["user"],
                session["luns"],
                session["commands"],
                output.size(session["bytes_read"]),
                output.size(session["bytes_written"]),
                f"{session['idle_s']:.0f} s",
            )
            for session in sessions
        ),
    )


@_sessions.command("show")
def _show_session(context: Context, id: Id, json: Json = False) -> None:
    """Show one whole, with what was negotiated."""
    with _client(context) as client:
        session = client.request("GET", f"{SESSIONS}/{id}/")
    if json or _settings(context).json:
        output.as_json(session)
        return
    negotiated = session.pop("negotiated")
    connections = session.pop("connections")
    output.details(session)
    for connection in connections:
        print(f"\nconnection {connection.pop('cid')}")
        output.details({f"  {name}": value for name, value in connection.items()})
    print("\nnegotiated")
    output.details({f"  {name}": value for name, value in negotiated.items()})


@_sessions.command("drop")
def _drop_session(context: Context, ids: Ids) -> None:
    """Ask initiators to log out, then end their sessions."""
    with _client(context) as client:
        for id in ids:
            client.request("DELETE", f"{SESSIONS}/{id}/")


@_sessions.command("negotiate")
def _negotiate_session(context: Context, ids: Ids) -> None:
    """Ask initiators to negotiate anew, so that a changed MaxRecvDataSegmentLength or alias holds without a
    new login. Linux's initiator answers by logging in again; one that does nothing loses the connection."""
    with _client(context) as client:
        for id in ids:
            client.request("POST", f"{SESSIONS}/{id}/negotiate/")


_service = typer.Typer(help="Whether the iSCSI portals listen.", no_args_is_help=True)
app.add_typer(_service, name="service")


def _service_command(name: str, enabled: bool | None, text: str) -> None:
    def command(context: Context, json: Json = False) -> None:
        with _client(context) as client:
            if enabled is None:
                state = client.request("GET", SERVICE)
            else:
                state = client.request("PUT", SERVICE, {"srv_enable": enabled})
        if json or _settings(context).json:
            output.as_json(state)
        else:
            output.details({"enabled": state["srv_enable"], "state": state["srv_state"].lower()})

    _service.command(name, help=text)(command)


_service_command("show", None, "Show it.")
_service_command("start", True, "Listen, now and after a restart.")
_service_command("stop", False, "Stop listening and end all sessions, now and after a restart.")

# -- The whole configuration ------------------------------------------------------------------------


@app.command("export")
def _export(
    context: Context,
    file: Annotated[
        Path | None, typer.Argument(help="Where to, mode 0600; otherwise standard output.")
    ] = None,
    secrets: Annotated[bool, typer.Option("--secrets/--no-secrets", help="With the CHAP secrets.")] = True,
    json: Annotated[bool, typer.Option("--json", help="As JSON; only TOML can be imported.")] = False,
) -> None:
    """Write the whole configuration as one TOML document."""
    with _client(context) as client:
        made = documents.export(client, secrets=secrets)
    if file is None:
        if json or _settings(context).json:
            output.as_json(made)
        else:
            sys.stdout.write(documents.dumps(made))
        return
    try:
        # Secrets are in it: nobody else may read it, from its first byte on.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(descriptor, 0o600)
            stream.write(documents.dumps(made))
    except OSError as error:
        raise CtlError(f"cannot write {file}: {error.strerror}") from None


@app.command("import")
def _import(
    context: Context,
    file: Annotated[Path, typer.Argument(help="The document, - for standard input.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only have it judged, and show what would change.")
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what the document does not name.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make the configuration that of a document, all of it or nothing; a second time changes nothing."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise UsageError(f"cannot read {file}: {reason}") from None
    document = documents.loads(text, str(file))
    with _client(context) as client:
        changes = documents.carry_out(client, document, delete=delete, force=force, dry_run=dry_run)
    if json or _settings(context).json:
        output.as_json(changes)
    elif changes:
        print("\n".join(line for change in changes for line in documents.lines(change)))
    else:
        print("nothing to change")
