"""Who uses a dataset: the extent that is on it, and the initiator that is logged in to that extent."""

from typing import Final

from targetd.config import Configuration
from targetd.interface import Engine

__all__ = ["DEVICES", "extent_on", "initiator_on"]

DEVICES: Final = "/dev/zvol/"
"""Where an extent finds the volume ``POOL/NAME``."""


def extent_on(config: Configuration, name: str) -> str:
    """The name of an extent on a dataset, or on one below it; empty: there is none."""
    path = f"{DEVICES}{name}"
    for extent in config.extents.values():
        if extent.path == path or extent.path.startswith(f"{path}/"):
            return extent.name
    return ""


async def initiator_on(engine: Engine, name: str) -> str:
    """The name of an initiator that is logged in to a volume; empty: none is."""
    path = f"{DEVICES}{name}"
    config = engine.configuration
    extents = {extent.id for extent in config.extents.values() if extent.path == path}
    targets = {one.target_id for one in config.lun_mappings.values() if one.extent_id in extents}
    if not targets:
        return ""
    return next((one.initiator_name for one in await engine.sessions() if one.target_id in targets), "")
