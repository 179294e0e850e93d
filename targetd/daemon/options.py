"""What the operator asks for: command line, environment and configuration file, declared once.

``Options`` is the declaration: the name of a field gives ``--name``, ``ISCSI_TARGETD_NAME`` and the key
``name`` of the TOML file (dashes for underscores on the command line and in the file); its metadata say
how a text becomes its value. Nearer wins: command line, environment, file, default. A repeatable
option given in a nearer place replaces the farther list, it does not add to it.

Relative paths are relative to the working directory, wherever they were written. Nothing heavier than
``argparse`` is imported here: ``--version`` and a usage error answer at once.
"""

# ruff: noqa: RUF009  # option() is dataclasses.field() with metadata: one call a class, meant

import argparse
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

__all__ = ["Address", "Command", "Options", "UsageError", "describe", "parse", "version"]

PROGRAM = "iscsi-targetd"
ENVIRONMENT = "ISCSI_TARGETD_"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
IO_ENGINES = ("auto", "uring", "threads")
MAX_WORKERS = 256
"""More processors than one host has for this."""


LEAST_MEMORY = 64 << 20
"""Bytes: room for the largest commands of a few connections."""


class UsageError(Exception):
    """What was asked cannot be; one line that names the option and where it was given."""


class Address(NamedTuple):
    """Where to listen."""

    host: str
    """Without brackets."""
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# -- Texts to values: each raises ValueError with what is wrong -------------------------------------


def _port(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or not least <= int(text) <= 65535:
        raise ValueError(f"port {text!r} is not a number from {least} to 65535")
    return int(text)


def _split_address(text: str, default_port: int, least_port: int) -> Address:
    host, bracket, rest = text.partition("]")
    if bracket:
        if not host.startswith("[") or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r} is not [ADDRESS]:PORT")
        host, port = host[1:], rest[1:]
        if rest == ":":
            raise ValueError(f"{text!r} has no port after its colon")
    elif text.count(":") > 1:
        raise ValueError(f"{text!r}: an IPv6 address goes in brackets, as in [::1]:{default_port}")
    else:
        host, colon, port = text.partition(":")
        if colon and not port:
            raise ValueError(f"{text!r} has no port after its colon")
    if not host:
        raise ValueError(f"{text!r} has no address; 0.0.0.0 or [::] is every one")
    return Address(host, _port(port, least_port) if port else default_port)


def read_portal(text: str) -> Address:
    """ADDR[:PORT] of an iSCSI portal; the address is numeric, since a portal is told to initiators."""
    address = _split_address(text, 3260, 1)
    try:
        ipaddress.ip_address(address.host)
    except ValueError:
        raise ValueError(f"{address.host!r} is not an IP address") from None
    return address


def read_api(text: str) -> Address:
    """ADDR[:PORT] of the API; port 0 takes any free one."""
    return _split_address(text, 8260, 0)


def read_path(text: str) -> Path:
    """A path, made absolute."""
    if not text:
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError("a path cannot hold a null character")
    return Path(text).expanduser().absolute()


def read_pool(text: str) -> tuple[str, Path]:
    """NAME=DIR of a pool; the directory is there."""
    name, equals, directory = text.partition("=")
    if not equals or not re.fullmatch("[A-Za-z][A-Za-z0-9_.-]{0,62}", name):
        raise ValueError(f"{text!r} is not NAME=DIR, with a name of letters, digits and _ . -")
    path = read_path(directory)
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a directory")
    return name, path


def read_file(text: str) -> Path:
    """A file that can be read now."""
    path = read_path(text)
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from None
    return path


def read_password_file(text: str) -> Path:
    """A file whose first line is not empty: the password is never empty."""
    path = read_file(text)
    with path.open("rb") as file:
        if not file.readline(4096).strip():
            raise ValueError(f"{str(path)!r} holds no password in its first line")
    return path


def read_workers(text: str) -> int:
    """A number of worker processes; ``auto`` is one for each processor but the first, and at least 1."""
    if text.lower() == "auto":
        return max(len(os.sched_getaffinity(0)) - 1, 1)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= MAX_WORKERS:
        raise ValueError(f"{text!r} is neither auto nor a number from 1 to {MAX_WORKERS}")
    return int(text)


def read_memory(text: str) -> int:
    """Bytes, with K, M, G or T (powers of 1024); ``auto`` is a quarter of the memory that this process may
    have, from 64 MiB to 4 GiB: the page cache, which makes reads fast, needs the rest."""
    if text.lower() == "auto":
        return min(max(_memory() // 4, LEAST_MEMORY), 4 << 30)
    match = re.fullmatch(r"([0-9]{1,15})\s*(?:([KMGT])(?:i?B)?)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is neither auto nor bytes as 512M, 2GiB or 1073741824")
    size = int(match[1]) << 10 * " KMGT".index((match[2] or " ").upper())
    if size < LEAST_MEMORY:
        raise ValueError(f"{text!r} is less than {LEAST_MEMORY >> 20} MiB")
    return size


def _memory() -> int:
    """Bytes that the machine has, or the cgroup may have (cgroup v2, as the process sees its own)."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::")[2].lstrip("/")
        limit = (Path("/sys/fs/cgroup") / own / "memory.max").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return size
    return min(size, int(limit)) if limit.isdigit() else size


def read_page_size(text: str) -> int:
    """How many objects a list has unless the client says; 0: all of them."""
    if not (text.isascii() and text.isdigit()) or len(text) > 6:
        raise ValueError(f"{text!r} is not a number from 0 to 999999")
    return int(text)


def read_version(text: str) -> str:
    """A version as FreeNAS and TrueNAS write theirs: ``FreeNAS-11.2-U8``, ``TrueNAS-SCALE-25.04.2``."""
    if not re.fullmatch(r"(?:FreeNAS|TrueNAS)-[A-Za-z0-9][A-Za-z0-9.-]{0,62}", text):
        raise ValueError(f"{text!r} is not FreeNAS-… or TrueNAS-…")
    return text


def read_choice(*choices: str) -> Callable[[str], str]:
    """One of the choices, in any case."""

    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text.lower()

    return read


def read_flag(text: str) -> bool:
    """A switch, as environments spell them."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


# -- The declaration --------------------------------------------------------------------------------


def option(
    read: Callable[[str], Any],
    metavar: str,
    help_text: str,
    *,
    default: Any = None,
    shown: str = "",
    many: bool = False,
    number: bool = False,
    in_file: bool = True,
) -> Any:
    """One option.

    Args:
        default: what ``read`` makes of it is the value, None is None.
        shown: the default as the help text tells it, where it is not simply ``default``.
        number: the file may give it as one.
        many: repeatable; a list in the file, separated by ``:`` in the environment.
        in_file: False where the file would be no place for it.
    """
    return field(
        metadata={
            "read": read,
            "metavar": metavar,
            "help": help_text,
            "default": default,
            "shown": shown or default,
            "many": many,
            "number": number,
            "in_file": in_file,
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``iscsi-targetd serve`` was asked to do. Paths are absolute."""

    state_dir: Path = option(
        read_path, "DIR", "configuration store, secrets, reservations", shown="./state, as a service its own"
    )
    portal: Address = option(read_portal, "ADDR:PORT", "portal 1 of a fresh store", default="0.0.0.0:3260")
    api: Address = option(read_api, "ADDR:PORT", "REST API", default="127.0.0.1:8260")
    extent_roots: tuple[Path, ...] = option(
        read_path, "DIR", "where File extents may live; repeatable", many=True, shown="STATE-DIR/extents"
    )
    """Empty: ``extents`` below the state directory, which is made then."""
    pools: tuple[tuple[str, Path], ...] = option(
        read_pool,
        "NAME=DIR",
        "a directory whose volumes are /dev/zvol/NAME/…; repeatable",
        many=True,
        shown="none",
    )
    """Name and directory."""
    api_password_file: Path | None = option(
        read_password_file, "FILE", "admin password", shown="made once, into STATE-DIR/api-password"
    )
    workers: int = option(
        read_workers,
        "N",
        "processes that the targets are spread over; 1: all in one",
        default="auto",
        shown="one for each processor but the first, at least 1",
        number=True,
    )
    io_engine: str = option(
        read_choice(*IO_ENGINES),
        "|".join(IO_ENGINES),
        "what waits for a disk: by io_uring, by worker threads, or auto: io_uring where it can be had",
        default="auto",
    )
    memory_limit: int = option(
        read_memory,
        "SIZE",
        "memory for the data of all connections that is under way; each has its share, at least 1 MiB for "
        "each direction and at most 16",
        default="auto",
        shown="a quarter of the memory, 64 MiB to 4 GiB",
        number=True,
    )
    api_page_size: int = option(
        read_page_size,
        "N",
        "objects in a list of the API, unless the client says; 0: all",
        default="30",
        number=True,
    )
    emulated_version: str | None = option(
        read_version,
        "TEXT",
        "version that the API tells clients, which choose their dialect by it",
        shown="FreeNAS 9.2.1.9 on v1.0, TrueNAS-SCALE-25.04.2 on v2.0",
    )
    tls: str = option(
        read_choice("off", "auto"),
        "off|auto",
        "auto: serve the API over HTTPS with a certificate made here; clients trust STATE-DIR/tls/ca.pem",
        default="off",
    )
    tls_cert: Path | None = option(read_file, "FILE", "certificate chain (PEM): serve the API over HTTPS")
    tls_key: Path | None = option(read_file, "FILE", "private key of --tls-cert (PEM)")
    demo: bool = option(read_flag, "", "a ready 1 GiB target, and how to connect", default="no")
    log_level: str = option(read_choice(*LOG_LEVELS), "|".join(LOG_LEVELS), "least level", default="info")
    log_format: str = option(read_choice(*LOG_FORMATS), "|".join(LOG_FORMATS), "log lines", default="text")
    config: Path | None = option(read_file, "FILE", "TOML file with the same names", in_file=False)
    check_config: bool = option(
        read_flag, "", "check all options, say what they come to, and end", default="no", in_file=False
    )


SINGULAR = {"extent_roots": "extent_root", "pools": "pool"}
"""Field → name as the operator writes it, where the field holds several."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One field of ``Options`` under its three names."""

    field: str
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As in the file, and with ``--`` on the command line."""
        return SINGULAR.get(self.field, self.field).replace("_", "-")

    @property
    def variable(self) -> str:
        """Of the environment."""
        return ENVIRONMENT + SINGULAR.get(self.field, self.field).upper()

    @property
    def is_flag(self) -> bool:
        """Takes no value on the command line."""
        return self.metadata["read"] is read_flag

    def value(self, given: Any, where: str) -> Any:
        """The value of what was given; ``where`` begins the message of the ``UsageError``."""
        many, read = self.metadata["many"], self.metadata["read"]
        if isinstance(given, bool) and self.is_flag:
            return given
        texts = given if isinstance(given, list) and many else [given]
        values = []
        for text in texts:
            if self.metadata["number"] and type(text) is int:  # not bool, which is one
                text = str(text)  # the one form that all readers take
            if not isinstance(text, str):
                expected = "true or false" if self.is_flag else "a list of strings" if many else "a string"
                raise UsageError(_one_line(f"{where}: {text!r} is not {expected}"))
            try:
                values.append(read(text))
            except ValueError as error:
                raise UsageError(_one_line(f"{where}: {error}")) from None
        return tuple(values) if many else values[0]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _declare(described: Field[Any]) -> Declared:
    return Declared(described.name, described.metadata)


DECLARED = tuple(_declare(described) for described in fields(Options))


# -- Where options come from ------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, by exception."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(_one_line(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="iSCSI target with a REST API.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="say which version this is, and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    serve = commands.add_parser(
        "serve",
        help="serve targets and the API",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog=f"Every option is also an environment variable ({ENVIRONMENT}STATE_DIR) and, but for "
        "--config and --check-config, a key of the file; the command line wins over the environment, "
        "the environment over the file.",
    )
    for declared in DECLARED:
        shown = declared.metadata["shown"]
        text = declared.metadata["help"] + (f" (default: {shown})" if shown else "")
        flag = "--" + declared.name
        if declared.is_flag:
            serve.add_argument(flag, dest=declared.field, action=argparse.BooleanOptionalAction, help=text)
        else:
            serve.add_argument(
                flag,
                dest=declared.field,
                metavar=declared.metadata["metavar"],
                action="append" if declared.metadata["many"] else "store",
                help=text,
            )
    return parser


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Field → (value, where). An empty variable counts as not set, as a shell makes it hard to unset one.

    Unknown variables with our prefix are left alone: Kubernetes makes such (ISCSI_TARGETD_PORT_…) for
    a service of our name.
    """
    found = {}
    for declared in DECLARED:
        text = environ.get(declared.variable, "")
        if text:
            given = text.split(os.pathsep) if declared.metadata["many"] else text
            found[declared.field] = (declared.value(given, declared.variable), declared.variable)
    return found


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(_one_line(f"--config: cannot read {str(path)!r}: {error.strerror}")) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(_one_line(f"{path}: {error}")) from None
    by_name = {declared.name: declared for declared in DECLARED}
    found = {}
    for key, given in document.items():
        where = f"{path}: {key}"
        declared = by_name.get(key)
        if declared is None:
            near = key.replace("_", "-")
            hint = f"; did you mean {near}?" if near in by_name else ""
            raise UsageError(_one_line(f"{where}: there is no such option{hint}"))
        if not declared.metadata["in_file"]:
            raise UsageError(f"{where}: belongs on the command line or in {declared.variable}")
        found[declared.field] = (declared.value(given, where), where)
    return found


def _defaults(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for declared in DECLARED:
        text = declared.metadata["default"]
        found[declared.field] = (None if text is None else declared.metadata["read"](text), "default")
    # systemd names the directory of a unit with StateDirectory= here (systemd.exec(5)).
    service = environ.get("STATE_DIRECTORY", "").split(":")[0]
    found["state_dir"] = (read_path(service or "state"), "STATE_DIRECTORY" if service else "default")
    return found


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line came to."""

    options: Options | None
    """None: only ``--version`` was asked."""
    sources: Mapping[str, str]
    """Field of ``Options`` → where its value was given."""


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> Command:
    """Read command line, environment and file.

    Raises:
        UsageError: something is wrong; its text is one line.
        SystemExit: after ``--help``, by argparse.
    """
    parsed = vars(_parser().parse_args(arguments))
    if parsed.pop("version"):
        return Command(None, {})
    if parsed.pop("command") is None:
        raise UsageError("say what to do: iscsi-targetd serve, iscsi-targetd --version, or --help")
    by_field = {declared.field: declared for declared in DECLARED}
    given = {
        name: (by_field[name].value(value, f"--{by_field[name].name}"), "command line")
        for name, value in parsed.items()
    }
    nearer = {**_from_environment(environ), **given}
    path = nearer["config"][0] if "config" in nearer else None
    found = {**_defaults(environ), **(_from_file(path) if path else {}), **nearer}
    values = {name: value for name, (value, _) in found.items()}
    sources = {name: where for name, (_, where) in found.items()}
    values["extent_roots"] = values["extent_roots"] or ()
    values["pools"] = values["pools"] or ()
    names = [name for name, _ in values["pools"]]
    if len(set(names)) != len(names):
        raise UsageError(f"{_where(by_field['pools'], sources['pools'])}: two pools of one name")
    if values["tls"] == "auto" and values["tls_cert"] is not None:
        raise UsageError(
            f"{_where(by_field['tls'], sources['tls'])}: auto goes without --tls-cert, which names one"
        )
    _check_tls(
        values["tls_cert"],
        values["tls_key"],
        {name: _where(by_field[name], sources[name]) for name in sources},
    )
    return Command(Options(**values), sources)


def _check_tls(cert: Path | None, key: Path | None, where: Mapping[str, str]) -> None:
    """Both or neither, and they must fit together."""
    if cert is None and key is None:
        return
    if key is None:
        raise UsageError(f"{where['tls_cert']}: needs --tls-key as well")
    if cert is None:
        raise UsageError(f"{where['tls_key']}: needs --tls-cert as well")
    import ssl  # only who serves HTTPS waits for it

    try:
        # A passphrase would be asked for on the terminal; a daemon has none.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UsageError(_one_line(f"{where['tls_cert']}: cannot use {cert} with {key}: {reason}")) from None


def _where(declared: Declared, source: str) -> str:
    return f"--{declared.name}" if source == "command line" else source


def describe(command: Command) -> list[str]:
    """One line per option: name, value, and where it was given."""
    lines = []
    for declared in DECLARED:
        if declared.field == "check_config" or command.options is None:
            continue
        value = getattr(command.options, declared.field)
        if declared.field == "extent_roots" and not value:
            value = (command.options.state_dir / "extents",)
        parts = value if isinstance(value, tuple) and declared.metadata["many"] else (value,)
        text = ", ".join(map(_described, parts))
        lines.append(
            f"{declared.name} = {'-' if value is None else text}  ({command.sources[declared.field]})"
        )
    return lines


def _described(part: object) -> str:
    if isinstance(part, bool):
        return "yes" if part else "no"
    return f"{part[0]}={part[1]}" if type(part) is tuple else str(part)


def version() -> str:
    """The version as installed; run from a tree that is not installed, the one of its pyproject.toml."""
    try:
        return metadata.version(PROGRAM)
    except metadata.PackageNotFoundError:
        pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
        try:
            return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])
        except (OSError, KeyError, tomllib.TOMLDecodeError):
            return "unknown"
