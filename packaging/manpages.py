"""Writes the man pages beside this file from the declarations of options and commands.

    PYTHONPATH=. python packaging/manpages.py

A test fails when they are not what this writes.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from targetd.ctl import PROGRAM as CTL
from targetd.ctl.operations import app
from targetd.daemon.options import DECLARED, PROGRAM
from targetd.daemon.reload import LIVE

HERE = Path(__file__).parent
PLAIN = {"…": "...", "–": "-", "’": "'", "“": '"', "”": '"', "×": "x", "µ": "u", "§": "section "}


def escape(text: str) -> str:
    """Text as roff shows it as it stands."""
    for fancy, plain in PLAIN.items():
        text = text.replace(fancy, plain)
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("``", "")
    return re.sub(r"(?m)^(?=[.'])", r"\\&", text)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a docstring, as roff."""
    first = True
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if not first:
            yield ".IP"
        first = False
        yield escape(" ".join(paragraph.split()))


def entry(head: str, text: str) -> Iterator[str]:
    """A tagged paragraph; ``head`` is roff."""
    yield ".TP"
    yield head
    yield from paragraphs(text)


def option_head(flags: list[str], metavar: str = "") -> str:
    shown = ", ".join(f"\\fB{escape(flag)}\\fR" for flag in flags)
    return f"{shown} \\fI{escape(metavar)}\\fR" if metavar else shown


# -- iscsi-targetd ----------------------------------------------------------------------------------


def daemon_page() -> Iterator[str]:
    """iscsi-targetd(8)."""
    yield ".TH ISCSI-TARGETD 8"
    yield ".SH NAME"
    yield "iscsi-targetd \\- iSCSI target daemon with an embedded REST API"
    yield ".SH SYNOPSIS"
    yield ".B iscsi-targetd serve"
    yield ".RI [ OPTION ]..."
    yield ".br"
    yield ".B iscsi-targetd \\-\\-version"
    yield ".SH DESCRIPTION"
    yield "Serves files, block devices and volumes as iSCSI disks and is configured, live, through its API"
    yield "(see"
    yield ".BR iscsi-targetctl (8))."
    yield "Each option is also an environment variable (\\fBISCSI_TARGETD_STATE_DIR\\fR for"
    yield "\\fB\\-\\-state\\-dir\\fR) and, but for \\fB\\-\\-config\\fR and"
    yield "\\fB\\-\\-check\\-config\\fR, a key of the configuration file."
    yield "The command line wins over the environment, the environment over the file."
    yield ".SH OPTIONS"
    for declared in DECLARED:
        text = declared.metadata["help"]
        text = text[0].upper() + text[1:]
        default = declared.metadata["shown"]
        if default and not declared.is_flag:
            text += f" (default: {default})"
        yield from entry(option_head([f"--{declared.name}"], declared.metadata["metavar"]), f"{text}.")
    yield ".SH SIGNALS"
    yield from entry(
        '.BR SIGTERM ", " SIGINT', "Ask initiators to log out, flush, and end within ten seconds."
    )
    live = ", ".join(f"--{declared.name}" for declared in DECLARED if declared.field in LIVE)
    yield from entry(
        ".B SIGHUP",
        f"Read all options and the files they name again. What these say is in force at once: {live}."
        " Whatever else has changed is told in the log and waits for the next start. The certificate is"
        " also taken up by itself when its files change. All else is configured live through the API.",
    )
    yield ".SH SERVICE MANAGER"
    yield from paragraphs(
        "With systemd (Type=notify) it tells when portals and API listen. Sockets that a socket unit hands"
        " over are used for the portal that has their address, and for the API if they are named api."
        " What it binds by itself goes into the descriptor store (FileDescriptorStoreMax=), so that whoever"
        " connects during a restart waits for the new daemon."
    )
    yield ".SH EXIT STATUS"
    yield "0 after a stop; 1 when it could not start; 2 for a wrong option."
    yield ".SH FILES"
    yield from entry(".I STATE-DIR/targetd.sqlite", "The configuration, mode 0600, as are its backups.")
    yield from entry(".I STATE-DIR/api-password", "The generated password, mode 0600.")
    yield ".SH SEE ALSO"
    yield ".BR iscsi-targetctl (8)"


# -- iscsi-targetctl --------------------------------------------------------------------------------


def _options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        text = parameter.help if getattr(parameter, "help", None) else ""
        if parameter.param_type_name == "argument":
            if text:
                yield from entry(f"\\fI{escape((parameter.metavar or parameter.name).upper())}\\fR", text)
            continue
        if parameter.name in ("help", "install_completion", "show_completion") or parameter.hidden:
            continue
        flags = [*parameter.opts, *parameter.secondary_opts]
        variables = parameter.envvar or []
        variables = [variables] if isinstance(variables, str) else variables
        if variables:
            text = f"{text} Environment: {', '.join(variables)}."
        metavar = (
            "" if parameter.is_flag else (parameter.metavar or parameter.name.rpartition("_")[2]).upper()
        )
        yield from entry(option_head(flags, metavar), text or "See the API's document.")


def _usage(path: list[str], command: Any) -> str:
    words = [f"\\fB{escape(' '.join(path))}\\fR"]
    if any(parameter.param_type_name == "option" for parameter in command.params):
        words.append("[\\fIOPTION\\fR]...")
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = f"\\fI{escape((parameter.metavar or parameter.name).upper())}\\fR"
            words.append(name if parameter.required else f"[{name}]")
    return " ".join(words)


def _commands(path: list[str], command: Any) -> Iterator[str]:
    """A command, or all of a group."""
    inner = getattr(command, "commands", None)
    if inner is not None:
        if len(path) > 0:
            yield f".SS {escape(' '.join(path))}"
            yield from paragraphs(command.help or "")
        for name, each in inner.items():
            yield from _commands([*path, name], each)
        return
    yield ".TP"
    yield _usage(path, command)
    yield from paragraphs(command.help or "")
    options = list(_options(command))
    if options:
        yield ".RS"
        yield from options
        yield ".RE"


def ctl_page() -> Iterator[str]:
    """iscsi-targetctl(8)."""
    root: Any = typer.main.get_command(app)
    yield ".TH ISCSI-TARGETCTL 8"
    yield ".SH NAME"
    yield "iscsi-targetctl \\- steer iscsi-targetd through its API"
    yield ".SH SYNOPSIS"
    yield ".B iscsi-targetctl"
    yield '.RI [ OPTION "]... " COMMAND " [" ARGUMENT ]...'
    yield ".SH OPTIONS"
    yield from _options(root)
    yield ".SH COMMANDS"
    yield "Each takes \\-\\-help."
    plain = {name: each for name, each in root.commands.items() if not hasattr(each, "commands")}
    for name, each in plain.items():
        yield from _commands([name], each)
    for name, each in root.commands.items():
        if name not in plain:
            yield from _commands([name], each)
    yield ".SH EXIT STATUS"
    yield "0; 1 when the daemon could not be reached or refused; 2 for a wrong command line."
    yield ".SH SEE ALSO"
    yield ".BR iscsi-targetd (8)"


PAGES = {f"{PROGRAM}.8": daemon_page, f"{CTL}.8": ctl_page}


def main() -> None:
    """Write them."""
    for name, page in PAGES.items():
        (HERE / name).write_text("\n".join(page()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
