"""The serial numbers that units show (VPD page 80h), and that no two extents share one.

A unit shows its extent's serial number, unless the target was given one and the extent was not: then it is
the target's with the LUN behind it, as istgt had it (api-semantics §5.2). So what two units show may clash
though no two fields are equal: LUN 1 of a target with ``A1`` and LUN 11 of one with ``A``.

A rule of writing: what an older release let in stays as it is until it is changed.
"""

from collections.abc import Iterator, Mapping

from targetd.config.editing import Change
from targetd.config.errors import WHOLE, Problem
from targetd.config.indexes import Index, mappings_by_extent, mappings_by_target
from targetd.config.resources import MAX_LUN, Collection, Configuration, Extent, LunMapping, Target

__all__ = ["MAPPINGS_AT", "shared_serials", "unit_serial"]

MAPPINGS_AT: Index[tuple[int, int], LunMapping] = Index("lun_mappings", lambda _, m: (m.target_id, m.lun))
"""By target id and LUN."""
_EXTENTS: Index[str, Extent] = Index("extents", lambda _, extent: extent.serial or None)
_TARGETS: Index[str, Target] = Index("targets", lambda _, t: t.serial if t.serial_given else None)

_TAKEN = "Extent {} has the serial number {} already."


def unit_serial(extent: Extent, target: Target, lun: int) -> str:
    """What an extent shows as a LUN of a target."""
    if target.serial_given and not extent.serial_given:
        return f"{target.serial}{lun}"
    return extent.serial


def shared_serials(
    config: Configuration, changes: Mapping[Collection, Change], since: Configuration
) -> Iterator[Problem]:
    """What a change gives to an extent although another has it, told of the object that was written."""
    for extent in _written(changes, "extents", since.extents):
        assert isinstance(extent, Extent)
        if (other := _other(config, extent.serial, extent.id)) is not None:
            yield Problem("extents", "serial", _TAKEN.format(other.name, extent.serial), extent.id)
        for mapping in mappings_by_extent(config).get(extent.id, ()):
            yield from _of_mapping(config, mapping, "extents", "serial", extent.id)
    for target in _written(changes, "targets", since.targets):
        for mapping in mappings_by_target(config).get(target.id, ()):
            yield from _of_mapping(config, mapping, "targets", "serial", target.id)
    if "lun_mappings" in changes:
        for mapping_id, written in changes["lun_mappings"].written.items():
            assert isinstance(written, LunMapping)
            yield from _of_mapping(config, written, "lun_mappings", WHOLE, mapping_id)


def _written(
    changes: Mapping[Collection, Change], collection: Collection, before: Mapping[int, Extent | Target]
) -> Iterator[Extent | Target]:
    """Objects whose serial number is new."""
    for id, obj in changes[collection].written.items() if collection in changes else ():
        assert isinstance(obj, Extent | Target)
        was = before.get(id)
        if was is None or (was.serial, was.serial_given) != (obj.serial, obj.serial_given):
            yield obj


def _of_mapping(
    config: Configuration, mapping: LunMapping, where: Collection, attribute: str, id: int
) -> Iterator[Problem]:
    extent, target = config.extents.get(mapping.extent_id), config.targets.get(mapping.target_id)
    if extent is None or target is None or not target.serial_given or extent.serial_given:
        return
    serial = unit_serial(extent, target, mapping.lun)
    other = _other(config, serial, extent.id)
    if other is not None:
        message = f"As LUN {mapping.lun} of target {target.name} extent {extent.name} has the serial number "
        yield Problem(where, attribute, f"{message}{serial}, as extent {other.name} has already.", id)


def _other(config: Configuration, serial: str, extent_id: int) -> Extent | None:
    """Another extent that has this serial number, by itself or through a target."""
    for extent in _EXTENTS.of(config).get(serial, ()):
        if extent.id != extent_id:
            return extent
    for digits in range(1, len(str(MAX_LUN)) + 1):
        of_target, lun = serial[:-digits], serial[-digits:]
        if not (lun.isdecimal() and lun == str(int(lun))):
            continue
        for target in _TARGETS.of(config).get(of_target, ()):
            for mapping in MAPPINGS_AT.of(config).get((target.id, int(lun)), ()):
                found = config.extents.get(mapping.extent_id)
                if found is not None and found.id != extent_id and not found.serial_given:
                    return found
    return None
