"""What SendTargets tells (RFC 7143 appendix C): which targets an initiator may see through a portal, and
where.

A stranger may ask without end, each time for the names of thousands of targets. So the list is made once for
an ``AccessSnapshot``, for each portal and way to it, and for each initiator that a group names; all others
see the same. It is made as far as somebody reads it (``protocol.access.TargetList``).
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from protocol.access import TargetList, TargetRecord
from protocol.names import fold
from targetd.config import (
    EVERYBODY,
    Configuration,
    entries_about,
    full_name,
    groups_by_portal,
    groups_by_target,
)

__all__ = ["Lists", "records"]

MAX_KEPT = 20_000
"""Records in all lists that are kept for a snapshot, at some 200 bytes; the oldest list goes first."""


@dataclass(frozen=True, slots=True)
class _Admitted:
    """Initiator groups by whom they let in by name: the first entry that is about somebody counts (§7.4)."""

    everybody: frozenset[int]
    """Ids of those that let everybody in whom they do not name."""
    named: Mapping[str, Mapping[int, bool]]
    """Initiator name, as it is compared → what the groups that name it say."""

    def group(self, group_id: int | None, name: str) -> bool:
        """Whether this group (None: no group is asked) lets this initiator in."""
        said = self.named.get(name, {}).get(group_id) if group_id is not None else True
        return group_id in self.everybody if said is None else said


def admitted_by_name(config: Configuration) -> _Admitted:
    """The same from one configuration to the next, as long as no initiator group changes."""
    kept = config.derived.get(_ADMITTED)
    if isinstance(kept, tuple) and kept[0] is config.initiator_groups:
        found: _Admitted = kept[1]
        return found
    everybody = set()
    named: dict[str, dict[int, bool]] = {}
    for group in config.initiator_groups.values():
        for name, admitted in entries_about(group.initiators):
            if name == EVERYBODY:
                if admitted:
                    everybody.add(group.id)
                break
            named.setdefault(name, {}).setdefault(group.id, admitted)
    made = _Admitted(frozenset(everybody), named)
    config.derived[_ADMITTED] = config.initiator_groups, made
    return made


_ADMITTED = "targetd.net.discovery.admitted"
"""Where a configuration keeps it."""


class Lists:
    """The lists of one snapshot of the configuration."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[Hashable, TargetList] = {}

    def of(
        self,
        config: Configuration,
        portal_id: int,
        initiator_name: str,
        way: Hashable,
        addresses: Callable[[int], Sequence[tuple[str, int]]],
    ) -> TargetList:
        """All that this initiator sees through this portal.

        Args:
            way: whatever ``addresses`` depends on beside its argument.
            addresses: portal id → where it is reached on this way.
        """
        name = fold(initiator_name)
        if name not in admitted_by_name(config).named:
            name = ""
        key = portal_id, name, way
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = TargetList(records(config, portal_id, name, addresses))
            while len(self._kept) > 1 and sum(each.made for each in self._kept.values()) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
        return found


def records(
    config: Configuration,
    portal_id: int,
    initiator_name: str,
    addresses: Callable[[int], Sequence[tuple[str, int]]],
    among: Sequence[int] | None = None,
) -> Iterator[TargetRecord]:
    """The targets that an initiator sees through a portal, by id; only those ``among``, if given."""
    admitted = admitted_by_name(config)
    name = fold(initiator_name)
    by_target = groups_by_target(config)
    if among is None:
        here = groups_by_portal(config).get(portal_id, ())
        among = sorted({group.target_id for group in here if admitted.group(group.initiator_group_id, name)})
    told: dict[int, Sequence[tuple[str, int]]] = {}
    for target_id in among:
        portal_ids = [
            group.portal_id
            for group in by_target.get(target_id, ())
            if admitted.group(group.initiator_group_id, name)
        ]
        if portal_id not in portal_ids:
            continue
        for each in portal_ids:
            if each not in told:
                told[each] = addresses(each)
        places = dict.fromkeys(place for each in portal_ids for place in told[each])
        yield TargetRecord(full_name(config.globals, config.targets[target_id]), tuple(places))
