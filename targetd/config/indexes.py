"""Look-ups in a configuration: who has this name, what names that id.

Each is an ``Index``: declared once, made when first asked for, and carried from one configuration to the next
by the edits, where it is brought up to date by what they touched.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from targetd.config.fields import rules
from targetd.config.resources import (
    COLLECTIONS,
    AuthCredential,
    Collection,
    Configuration,
    Extent,
    GlobalConfiguration,
    LunMapping,
    Resource,
    Target,
    TargetGroup,
)
from targetd.config.versioned import VersionedMap

__all__ = [
    "EXTENTS_BY_NAA",
    "REFERENCES",
    "REFERRING",
    "TARGETS_BY_NAME",
    "Index",
    "credentials_by_tag",
    "extents_by_naa",
    "first_group",
    "full_name",
    "groups_by_portal",
    "groups_by_target",
    "mappings_by_extent",
    "mappings_by_target",
    "target_named",
]

_R = TypeVar("_R", bound=Resource)
_K = TypeVar("_K", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Index(Generic[_K, _R]):
    """The objects of a collection by a key: key → those that have it, in the order of their ids."""

    collection: Collection
    key: Callable[[GlobalConfiguration, _R], _K | None]
    """None: it stands under no key."""
    context: Callable[[GlobalConfiguration], object] = lambda globals: None
    """What else the keys depend on."""

    def of(self, config: Configuration) -> Mapping[_K, Sequence[_R]]:
        """In this configuration. A key that nobody has is absent."""
        members: VersionedMap[_R] = getattr(config, self.collection)
        context = self.context(config.globals)
        kept = cast("_Kept[_K, _R] | None", config.derived.get(self))
        touched = None
        if kept is not None and kept.context == context:
            if kept.members is members:
                return kept.groups
            touched = members.touched_since(kept.members)
        if kept is None or touched is None:
            groups = self._made(config.globals, members)
        else:
            groups = self._followed(config.globals, kept, members, touched)
        config.derived[self] = _Kept(members, context, groups)
        return groups

    def _made(self, globals: GlobalConfiguration, members: VersionedMap[_R]) -> dict[_K, tuple[_R, ...]]:
        gathered: dict[_K, list[_R]] = {}
        for _, member in sorted(members.items()):
            if (key := self.key(globals, member)) is not None:
                gathered.setdefault(key, []).append(member)
        return {key: tuple(group) for key, group in gathered.items()}

    def _followed(
        self,
        globals: GlobalConfiguration,
        kept: "_Kept[_K, _R]",
        members: VersionedMap[_R],
        touched: set[int],
    ) -> dict[_K, tuple[_R, ...]]:
        groups = dict(kept.groups)
        for id in touched:
            was, now = kept.members.get(id), members.get(id)
            if was is now:
                continue
            before = None if was is None else self.key(globals, was)
            if before is not None:
                left = tuple(member for member in groups[before] if member.id != id)
                if left:
                    groups[before] = left
                else:
                    del groups[before]
            after = None if now is None else self.key(globals, now)
            if now is not None and after is not None:
                groups[after] = tuple(sorted((*groups.get(after, ()), now), key=lambda member: member.id))
        return groups


@dataclass(frozen=True, slots=True)
class _Kept(Generic[_K, _R]):
    """An index as it was last made."""

    members: VersionedMap[_R]
    context: object
    groups: dict[_K, tuple[_R, ...]]


def full_name(globals: GlobalConfiguration, target: Target) -> str:
    """The iSCSI name, lower case: as stored if it is a whole name, else below the basename (§4)."""
    name = target.name.lower()
    return name if name.startswith(("iqn.", "eui.", "naa.")) else f"{globals.basename.lower()}:{name}"


TARGETS_BY_NAME: Index[str, Target] = Index("targets", full_name, lambda globals: globals.basename)
"""By full iSCSI name, lower case."""
EXTENTS_BY_NAA: Index[str, Extent] = Index("extents", lambda _, extent: extent.naa or None)
"""By NAA, as stored: in lower case."""
_CREDENTIALS_BY_TAG: Index[int, AuthCredential] = Index("credentials", lambda _, user: user.tag)

REFERENCES: Sequence[tuple[Collection, str, Collection]] = tuple(
    (collection, rule.attribute, cast(Collection, rule.reference.collection))
    for collection, cls in COLLECTIONS.items()
    for rule in rules(cls).values()
    if rule.reference is not None
)
"""Who refers to whom: (collection, attribute, what it names), read from the declarations."""


def _by(attribute: str) -> Callable[[GlobalConfiguration, Any], Any]:
    return lambda _, member: getattr(member, attribute)


REFERRING: Mapping[tuple[Collection, str], Index[int, Any]] = {
    (collection, attribute): Index(collection, _by(attribute)) for collection, attribute, _ in REFERENCES
}
"""The objects of a collection by what one of their attributes refers to."""


def target_named(config: Configuration, name: str) -> Target | None:
    """The target of this full iSCSI name, in lower case."""
    found = TARGETS_BY_NAME.of(config).get(name)
    return found[0] if found else None


def groups_by_target(config: Configuration) -> Mapping[int, Sequence[TargetGroup]]:
    """Target id → its grants; a target without any is absent."""
    return REFERRING["target_groups", "target_id"].of(config)


def groups_by_portal(config: Configuration) -> Mapping[int, Sequence[TargetGroup]]:
    """Portal id → the grants through it; a portal without any is absent."""
    return REFERRING["target_groups", "portal_id"].of(config)


def mappings_by_target(config: Configuration) -> Mapping[int, Sequence[LunMapping]]:
    """Target id → its LUNs, in no order of LUN; a target without any is absent."""
    return REFERRING["lun_mappings", "target_id"].of(config)


def mappings_by_extent(config: Configuration) -> Mapping[int, Sequence[LunMapping]]:
    """Extent id → where it is a LUN; an extent without any is absent."""
    return REFERRING["lun_mappings", "extent_id"].of(config)


def credentials_by_tag(config: Configuration) -> Mapping[int, Sequence[AuthCredential]]:
    """Tag → its users, oldest first."""
    return _CREDENTIALS_BY_TAG.of(config)


def extents_by_naa(config: Configuration) -> Mapping[str, Sequence[Extent]]:
    """NAA in lower case → the extent that has it."""
    return EXTENTS_BY_NAA.of(config)


def first_group(config: Configuration, target_id: int) -> TargetGroup | None:
    """The grant that a flat target shows and edits: its oldest (§5.8)."""
    groups = groups_by_target(config).get(target_id)
    return groups[0] if groups else None
