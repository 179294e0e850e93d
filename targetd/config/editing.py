"""Changes: pure functions that make a new configuration from the old, and the difference of two.

They keep the shape right (ids never reused, no reference left to nothing); whether the result makes
sense is for ``validate``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, cast

from targetd.config.errors import ConfigError
from targetd.config.fields import rules, well_typed
from targetd.config.indexes import REFERENCES, REFERRING, mappings_by_target
from targetd.config.parsing import parse_size, split_list
from targetd.config.resources import (
    COLLECTIONS,
    MAX_LUN,
    SIZED,
    AuthCredential,
    Collection,
    Configuration,
    Extent,
    GlobalConfiguration,
    InitiatorGroup,
    LunMapping,
    Portal,
    Resource,
    Target,
    TargetGroup,
    objects,
)
from targetd.config.versioned import VersionedMap

__all__ = [
    "Change",
    "Changes",
    "add",
    "default_target_serial",
    "diff",
    "extent_serial_given",
    "fresh",
    "make_extent_serial",
    "make_naa",
    "next_id",
    "next_lun",
    "next_tag",
    "normalise",
    "remove",
    "replace_object",
    "target_serial_given",
]

_R = TypeVar("_R", Extent, InitiatorGroup, AuthCredential, Portal, Target, TargetGroup, LunMapping)


FRESH_MAX_SESSIONS = 256
"""Sessions that a new store allows: what one takes is bounded, and so are all together, by the memory of the
process. More than a rack of hosts with a few targets each; 192 of them for one host."""


def fresh(portal_address: str = "0.0.0.0:3260") -> Configuration:
    """What a new store holds: portal 1, initiator group 1 for everyone, the defaults (design.md §2), but for
    iscsi_maxsesh: with FreeNAS's 16 over all targets the seventeenth host is refused on the day it comes."""
    globals_ = GlobalConfiguration(max_sessions=FRESH_MAX_SESSIONS)
    empty = add(Configuration(globals=globals_), "portals", Portal(id=1, tag=1, addresses=(portal_address,)))
    return add(empty, "initiator_groups", InitiatorGroup(id=1, tag=1))


def _evolve(config: Configuration, **changes: Any) -> Configuration:
    new = replace(config, **changes)
    new.derived.update(config.derived)
    return new


def add(config: Configuration, collection: Collection, obj: Resource) -> Configuration:
    """The configuration with one object more. Its id comes from ``next_id``, or from an import.

    Raises:
        ValueError: the id is taken (a mistake of the caller; ``validate`` finds those of the user).
    """
    assert type(obj) is COLLECTIONS[collection]
    if obj.id in objects(config, collection):
        raise ValueError(f"id {obj.id} is taken in {collection}")
    last_ids = {**config.last_ids, collection: max(obj.id, config.last_ids.get(collection, 0))}
    return _evolve(config, **{collection: objects(config, collection).put(obj.id, obj), "last_ids": last_ids})


def replace_object(config: Configuration, collection: Collection, obj: Resource) -> Configuration:
    """The configuration with this object in place of the one of the same id.

    An equal one changes nothing: the same configuration comes back. KeyError: there is no such id.
    """
    assert type(obj) is COLLECTIONS[collection]
    if objects(config, collection)[obj.id] == obj:
        return config
    return _evolve(config, **{collection: objects(config, collection).put(obj.id, obj)})


def remove(config: Configuration, collection: Collection, id: int) -> Configuration:
    """The configuration without this object and without those that refer to it (§6.4).

    An extent takes its LUNs along; a target its LUNs and grants; a portal and an initiator group the
    grants that named them, which never widens access. Credentials are named by tag and take nothing.
    KeyError: there is no such id.
    """
    changes: dict[str, Any] = {collection: objects(config, collection).without((id,))}
    for other, attribute, named in REFERENCES:
        if named != collection:
            continue
        gone = {member.id for member in REFERRING[other, attribute].of(config).get(id, ())}
        left: VersionedMap[Resource] = changes.get(other, objects(config, other))
        if gone & left.keys():
            changes[other] = left.without(gone & left.keys())
    return _evolve(config, **changes)


def next_id(config: Configuration, collection: Collection) -> int:
    """The id for a new object: above every one that was ever given out there, deleted ones too."""
    return config.last_ids.get(collection, 0) + 1


def next_tag(config: Configuration, collection: Literal["portals", "initiator_groups"]) -> int:
    """The lowest free group number (§11)."""
    members = cast(Mapping[int, Portal | InitiatorGroup], objects(config, collection))
    return _lowest_free({member.tag for member in members.values()}, 1)


def next_lun(config: Configuration, target_id: int) -> int:
    """The lowest free LUN of the target (§6.5).

    Raises:
        ConfigError: it has all that can be addressed.
    """
    lun = _lowest_free({mapping.lun for mapping in mappings_by_target(config).get(target_id, ())}, 0)
    if lun > MAX_LUN:
        raise ConfigError.one("lun_mappings", "lun", "This target has no free LUN ID.")
    return lun


def _lowest_free(taken: set[int], number: int) -> int:
    while number in taken:
        number += 1
    return number


def make_naa(entropy: int) -> str:
    """A new extent's NAA identifier from at least 100 random bits (``secrets.randbits(100)``).

    NAA 6, IEEE Registered Extended (SPC-4 §7.8.6.5.5): the company id 025447h has its locally assigned
    bit set, so it is nobody's; the other 100 bits are random and need no register to be unique.
    """
    return f"0x6025447{entropy & (1 << 100) - 1:025x}"


def make_extent_serial(naa: str) -> str:
    """A new extent's serial number: the last 16 digits of its NAA identifier, so that both tell the same."""
    return naa[-16:]


def extent_serial_given(naa: str, serial: str) -> bool:
    """Whether somebody chose it: what is made from the NAA identifier, and comes back with it in an import
    or a copied body, nobody did."""
    return serial not in ("", make_extent_serial(naa))


def default_target_serial(id: int) -> str:
    """istgt's rule (§5.5)."""
    return str(10000000 + id)


def target_serial_given(serial: str) -> bool:
    """Whether somebody chose it: one of istgt's rule, of whatever id, is no choice. FreeNAS gave every target
    that of id 1, clients send it back, and a document brings that of another id from another daemon."""
    return bool(serial) and not re.fullmatch("1[0-9]{7}", serial)


def normalise(obj: _R) -> _R:
    """The object in its stored form: name in lower case, size without blank, networks one a line (§4 to §6).

    What has no such form is left alone, for ``validate`` to name.
    """
    if not all(well_typed(rule, getattr(obj, name)) for name, rule in rules(type(obj)).items()):
        return obj
    changes: dict[str, Any] = {}
    if isinstance(obj, Target):
        changes = {"name": obj.name.lower(), "alias": obj.alias or None}
    elif isinstance(obj, InitiatorGroup):
        changes = {"auth_network": "\n".join(split_list(obj.auth_network.upper()))}
    elif isinstance(obj, Extent):
        changes = {"naa": obj.naa.lower()}
        try:
            text, size = ("0", 0) if obj.type not in SIZED else parse_size(obj.file_size)
            changes |= {"file_size": text, "size_bytes": size}
        except ValueError:
            pass
    return replace(obj, **changes)


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one collection: ids → objects that are new or other than before; ids that are gone."""

    written: Mapping[int, Resource]
    removed: Sequence[int]


Changes: TypeAlias = Mapping[Collection, Change]
"""What became of the collections where anything did."""


def diff(old: Configuration, new: Configuration) -> Changes:
    """What a change did, for collections where it did anything; cheap, as what stayed is the same object."""
    changes: dict[Collection, Change] = {}
    for collection in COLLECTIONS:
        before, after = objects(old, collection), objects(new, collection)
        if before is after:
            continue
        touched = after.touched_since(before)
        ids = sorted(before.keys() | after.keys() if touched is None else touched)
        written = {
            id: now for id in ids if (now := after.get(id)) is not None and before.get(id) not in (now,)
        }
        removed = [id for id in ids if id in before and id not in after]
        if written or removed:
            changes[collection] = Change(written, removed)
    return changes
