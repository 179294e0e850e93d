"""``--demo``: a ready target on the store, and the exact lines that use it."""

import secrets
import shlex
from pathlib import Path

from targetd.config import (
    WHOLE,
    ConfigError,
    Configuration,
    Extent,
    LunMapping,
    Portal,
    Target,
    TargetGroup,
    add,
    default_target_serial,
    full_name,
    make_extent_serial,
    make_naa,
    mappings_by_target,
    next_id,
    split_address,
)
from targetd.interface import Engine

__all__ = ["offer_demo"]

NAME = "demo"
SIZE = "1GB"
SIZE_BYTES = 1 << 30


async def offer_demo(engine: Engine, root: Path, api_url: str, password_file: Path) -> None:
    """Make the demo target unless it is there, and print how to connect.

    Raises:
        ConfigError: it cannot be made: something else has its name, or no portal has an address.
    """
    naa = make_naa(secrets.randbits(100))

    def edit(config: Configuration) -> Configuration:
        if any(target.name == NAME for target in config.targets.values()):
            return config
        extent_id = next_id(config, "extents")
        config = add(
            config,
            "extents",
            Extent(
                id=extent_id,
                name=NAME,
                type="File",
                path=str(root / "demo.img"),
                file_size=SIZE,
                size_bytes=SIZE_BYTES,
                naa=naa,
                serial=make_extent_serial(naa),
            ),
        )
        target_id = next_id(config, "targets")
        target = Target(id=target_id, name=NAME, serial=default_target_serial(target_id))
        config = add(config, "targets", target)
        config = add(
            config,
            "target_groups",
            TargetGroup(
                id=next_id(config, "target_groups"),
                target_id=target_id,
                portal_id=_portal(config).id,
                initiator_group_id=min(config.initiator_groups, default=None),
            ),
        )
        mapping = LunMapping(
            id=next_id(config, "lun_mappings"), target_id=target_id, extent_id=extent_id, lun=0
        )
        return add(config, "lun_mappings", mapping)

    config = await engine.apply(edit)
    target = next(target for target in config.targets.values() if target.name == NAME)
    extents = [mapping.extent_id for mapping in mappings_by_target(config).get(target.id, ())]
    for id, status in (await engine.extent_statuses(extents)).items():
        if status != "ok":
            print(f"The demo target's disk {config.extents[id].path} is not ready: {status}.", flush=True)
            return
    print(_instructions(config, target, api_url, password_file), flush=True)


def _portal(config: Configuration) -> Portal:
    """The first that can be connected to."""
    for id in sorted(config.portals):
        if config.portals[id].addresses:
            return config.portals[id]
    raise ConfigError.one("portals", WHOLE, "--demo needs a portal with an address, and there is none.")


def _instructions(config: Configuration, target: Target, api_url: str, password_file: Path) -> str:
    host, port = split_address(_portal(config).addresses[0])
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    portal = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    name = full_name(config.globals, target)
    url = f"iscsi://{portal}/{name}/0"
    return f"""
A demo target is ready: {name}, LUN 0, 1 GiB.

  Linux      iscsiadm -m discovery -t sendtargets -p {portal}
             iscsiadm -m node -T {name} -p {portal} --login
  libiscsi   iscsi-ls -s iscsi://{portal}
  QEMU       qemu-img info {url}
  REST API   curl -u "root:$(cat {shlex.quote(str(password_file))})" {api_url}/api/v1.0/services/iscsi/target/
"""
