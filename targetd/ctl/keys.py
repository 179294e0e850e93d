"""``key``: API keys for programs (``account/keys/`` of the API)."""

import datetime
from typing import Annotated

import typer

from targetd.ctl import output
from targetd.ctl.commands import Context, Json, _client, _settings

__all__ = ["keys"]

PATH = "account/keys"

keys = typer.Typer(help="API keys, by which programs log in without a password.", no_args_is_help=True)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


@keys.command("list")
def _list(context: Context, json: Json = False) -> None:
    """List them, with their last use."""
    with _client(context) as client:
        found = client.all(PATH)
    if json or _settings(context).json:
        output.as_json(found)
        return
    output.table(
        ("id", "name", "role", "expires", "used"),
        (
            (one["id"], one["name"], one["role"], _time(one["expires_at"]), _time(one["used_at"]))
            for one in found
        ),
    )


@keys.command("create")
def _create(
    context: Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for; no other key has it.")],
    read_only: Annotated[bool, typer.Option("--read-only", help="It may only read.")] = False,
    days: Annotated[
        float | None, typer.Option("--days", help="How long it works; without it, for ever.")
    ] = None,
    json: Json = False,
) -> None:
    """Make one and print it, this once: send it as Authorization: Bearer KEY."""
    body = {"name": name, "role": "read-only" if read_only else "admin"}
    with _client(context) as client:
        made = client.request(
            "POST", f"{PATH}/", body if days is None else {**body, "expires_in_s": days * 86400}
        )
    if json or _settings(context).json:
        output.as_json(made)
    else:
        typer.echo(made["key"])


@keys.command("delete")
def _delete(
    context: Context, names: Annotated[list[str], typer.Argument(metavar="NAME", help="Names or ids.")]
) -> None:
    """Delete them: nobody logs in with one any more."""
    with _client(context) as client:
        found = client.all(PATH)
        for name in names:
            ids = [one["id"] for one in found if name in (one["name"], str(one["id"]))]
            if not ids:
                there = ", ".join(one["name"] for one in found) or "none"
                raise typer.BadParameter(f"there is no API key {name!r}; there are: {there}")
            client.request("DELETE", f"{PATH}/{ids[0]}/")
