"""``pool`` and ``volume``: what extents of type ZVOL stand on (``storage/volume/`` of the API)."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from targetd.ctl import output
from targetd.ctl.commands import Context, Json, _client, _settings

__all__ = ["pools", "volumes"]

PATH = "storage/volume"

pools = typer.Typer(help="Directories and ZFS pools that volumes are made in.", no_args_is_help=True)
volumes = typer.Typer(help="Volumes of a pool, /dev/zvol/POOL/NAME for extents.", no_args_is_help=True)

Pool = Annotated[str, typer.Argument(metavar="POOL", help="Its pool.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name in the pool.")]
Size = Annotated[
    str, typer.Argument(metavar="SIZE", help="Bytes, or a number with K, M, G, T (powers of 1024).")
]


def _zvols(pool: str, name: str = "") -> str:
    path = f"{PATH}/{quote(pool, safe='')}/zvols"
    return f"{path}/{quote(name)}/" if name else path


def _show(context: Context, volume: dict[str, Any], json: bool) -> None:
    if json or _settings(context).json:
        output.as_json(volume)
    else:
        sizes = {name: output.size(volume[name]) for name in ("volsize", "used", "avail")}
        output.details({"name": volume["name"], **sizes})


@pools.command("list")
def _list_pools(context: Context, json: Json = False) -> None:
    """List them."""
    with _client(context) as client:
        found = client.all(PATH)
    if json or _settings(context).json:
        output.as_json(found)
        return
    output.table(
        ("name", "status", "used", "available", "where"),
        (
            (
                one["name"],
                one["status"],
                output.size(one["used"]),
                output.size(one["avail"]),
                one["mountpoint"],
            )
            for one in found
        ),
    )


@volumes.command("list")
def _list_volumes(context: Context, pool: Pool, json: Json = False) -> None:
    """List those of a pool."""
    with _client(context) as client:
        found = client.all(_zvols(pool))
    if json or _settings(context).json:
        output.as_json(found)
        return
    output.table(
        ("name", "size", "used"),
        ((one["name"], output.size(one["volsize"]), output.size(one["used"])) for one in found),
    )


@volumes.command("create")
def _create(
    context: Context,
    pool: Pool,
    name: Name,
    size: Size,
    sparse: Annotated[
        bool, typer.Option("--sparse/--no-sparse", help="--no-sparse: the space must be free.")
    ] = True,
    json: Json = False,
) -> None:
    """Make one."""
    with _client(context) as client:
        body = {"name": name, "volsize": size, "sparse": sparse}
        _show(context, client.request("POST", f"{_zvols(pool)}/", body), json)


@volumes.command("resize")
def _resize(context: Context, pool: Pool, name: Name, size: Size, json: Json = False) -> None:
    """Make it larger; initiators learn it at once. It shrinks only while no extent is on it."""
    with _client(context) as client:
        _show(context, client.request("PUT", _zvols(pool, name), {"volsize": size}), json)


@volumes.command("delete")
def _delete(
    context: Context,
    pool: Pool,
    names: Annotated[list[str], typer.Argument(metavar="NAME")],
    snapshots: Annotated[
        bool, typer.Option("--snapshots", help="With the snapshots of a ZFS volume.")
    ] = False,
) -> None:
    """Destroy them with all their data; not while an extent is on one."""
    with _client(context) as client:
        for name in names:
            client.request("DELETE", _zvols(pool, name), {"cascade": True} if snapshots else None)
