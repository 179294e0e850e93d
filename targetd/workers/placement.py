"""Who owns what: every target and every extent belongs to one worker, and those that are linked by LUNs to
the same one. Pure data; nothing here talks to a worker.

A new target or extent goes to the worker that has the fewest, and stays there: nobody's sessions are moved
for the sake of balance. Only when a new LUN links what two workers have does the lesser part move: the one
with fewer connections, then with fewer extents. What is in the memory of a worker cannot move: where both
parts have such extents, they cannot be linked. Since its LUNs are those of the configuration still in force,
the part moves before the change is made, and whole; a change that then fails has moved it all the same,
which nothing in the configuration shows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from targetd.config import (
    COLLECTIONS,
    Changes,
    Collection,
    ConfigError,
    Configuration,
    LunMapping,
    Resource,
    Target,
    TargetGroup,
    groups_by_target,
    mappings_by_extent,
    mappings_by_target,
    objects,
)
from targetd.workers.messages import Delta

__all__ = ["Move", "Part", "Placement", "Plan", "coming", "leaving", "share_of_front"]

OWNED: tuple[Collection, ...] = ("extents", "targets", "target_groups", "lun_mappings")
"""Each member is one worker's; all other collections are everybody's."""


MEMORY = "Memory"
"""The type of extents whose content is nowhere else."""
APART = (
    "This extent cannot be linked with the others of the target: on both sides there is one in memory, "
    "and they are in different worker processes."
)


@dataclass(frozen=True, slots=True)
class Part:
    """Targets and extents that belong together, by id."""

    targets: frozenset[int]
    extents: frozenset[int]


@dataclass(frozen=True, slots=True)
class Move:
    """A part that goes from one worker to another."""

    source: int
    destination: int
    part: Part


@dataclass(slots=True)
class Plan:
    """What a change needs."""

    moves: list[Move] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)
    """New target → its worker."""
    extents: dict[int, int] = field(default_factory=dict)
    silent: frozenset[int] = frozenset()
    """Workers that get nothing new."""


def _linked(configs: Iterable[Configuration], target_id: int) -> Part:
    """Everything that is linked with a target, in any of the configurations."""
    configs = tuple(configs)
    targets, extents = {target_id}, set[int]()
    ahead: list[tuple[bool, int]] = [(True, target_id)]
    while ahead:
        is_target, id = ahead.pop()
        for config in configs:
            by = mappings_by_target(config) if is_target else mappings_by_extent(config)
            for mapping in by.get(id, ()):
                other = mapping.extent_id if is_target else mapping.target_id
                seen = extents if is_target else targets
                if other not in seen:
                    seen.add(other)
                    ahead.append((not is_target, other))
    return Part(frozenset(targets), frozenset(extents))


def share_of_front(config: Configuration) -> Configuration:
    """What the front itself has: all but targets and extents."""
    return Configuration(
        globals=config.globals,
        service_enabled=config.service_enabled,
        last_ids=config.last_ids,
        **{name: objects(config, name) for name in COLLECTIONS if name not in OWNED},  # type: ignore[arg-type]
    )


class Placement:
    """Worker indices, from 1 up, by target and by extent."""

    def __init__(self, workers: int) -> None:
        self._workers = range(1, workers + 1)
        self.targets: dict[int, int] = {}
        self.extents: dict[int, int] = {}

    # -- planning -----------------------------------------------------------------------------

    def plan(
        self,
        old: Configuration,
        new: Configuration,
        changes: Changes,
        connections: Callable[[int], int] = lambda target_id: 0,
        clone_of: int | None = None,
        silent: frozenset[int] = frozenset(),
    ) -> Plan:
        """Who shall have what is new, and what has to move before.

        Args:
            connections: how many a target has.
            clone_of: an extent; a new one that is not linked goes to its worker.
            silent: workers that do not answer: what is new goes to others.

        Raises:
            ConfigError: what the change links cannot come together.
        """
        plan = Plan(silent=silent)
        loads = Counter(self.targets.values()) + Counter(self.extents.values())
        done: set[int] = set()
        for target_id in sorted(
            {
                mapping.target_id
                for mapping in _written(changes, "lun_mappings")
                if isinstance(mapping, LunMapping)
            }
        ):
            if target_id not in done:
                part = _linked((old, new), target_id)
                done |= part.targets
                fixed = frozenset(
                    id for id in part.extents & old.extents.keys() if old.extents[id].type == MEMORY
                )
                self._settle(part, plan, loads, connections, clone_of, fixed)
        for extent in _written(changes, "extents"):
            if extent.id not in self.extents and extent.id not in plan.extents:
                self._settle(Part(frozenset(), frozenset((extent.id,))), plan, loads, connections, clone_of)
        for target in _written(changes, "targets"):
            if target.id not in self.targets and target.id not in plan.targets:
                self._settle(Part(frozenset((target.id,)), frozenset()), plan, loads, connections, None)
        return plan

    def _settle(
        self,
        part: Part,
        plan: Plan,
        loads: Counter[int],
        connections: Callable[[int], int],
        clone_of: int | None,
        fixed: frozenset[int] = frozenset(),
    ) -> None:
        """Give a part to one worker; ``fixed`` extents cannot move."""
        weights: dict[int, tuple[bool, int, int, int]] = {}
        for id in part.targets & self.targets.keys():
            stays, busy, extents, targets = weights.get(self.targets[id], (False, 0, 0, 0))
            weights[self.targets[id]] = stays, busy + connections(id), extents, targets + 1
        for id in part.extents & self.extents.keys():
            stays, busy, extents, targets = weights.get(self.extents[id], (False, 0, 0, 0))
            weights[self.extents[id]] = stays or id in fixed, busy, extents + 1, targets
        if sum(weight[0] for weight in weights.values()) > 1:
            raise ConfigError.one("lun_mappings", "extent_id", APART)
        if weights:
            owner = max(weights, key=lambda worker: (weights[worker], -worker))
        elif clone_of is not None and clone_of in self.extents:
            owner = self.extents[clone_of]
        else:
            owner = min(self._workers, key=lambda worker: (worker in plan.silent, loads[worker]))
        for source in sorted(weights.keys() - {owner}):
            there = Part(
                frozenset(id for id in part.targets if self.targets.get(id) == source),
                frozenset(id for id in part.extents if self.extents.get(id) == source),
            )
            plan.moves.append(Move(source, owner, there))
        for id in part.targets - self.targets.keys():
            plan.targets[id] = owner
            loads[owner] += 1
        for id in part.extents - self.extents.keys():
            plan.extents[id] = owner
            loads[owner] += 1

    def moved(self, move: Move) -> None:
        """A move has been made."""
        self.targets.update(dict.fromkeys(move.part.targets, move.destination))
        self.extents.update(dict.fromkeys(move.part.extents, move.destination))

    def carried_out(self, plan: Plan, changes: Changes) -> None:
        """The change is in force."""
        self.targets.update(plan.targets)
        self.extents.update(plan.extents)
        for id in _removed(changes, "targets"):
            del self.targets[id]
        for id in _removed(changes, "extents"):
            del self.extents[id]

    # -- what each worker is told -------------------------------------------------------------

    def _owner(self, plan: Plan, collection: Collection, member: Resource) -> int:
        if collection == "extents":
            return plan.extents.get(member.id) or self.extents[member.id]
        assert isinstance(member, Target | TargetGroup | LunMapping)
        target_id = member.id if isinstance(member, Target) else member.target_id
        return plan.targets.get(target_id) or self.targets[target_id]

    def deltas(
        self, old: Configuration, new: Configuration, changes: Changes, plan: Plan
    ) -> Mapping[int, Delta]:
        """Worker → what the change means for it; who is not touched is not in it."""
        everybody = (old.globals, old.service_enabled) != (new.globals, new.service_enabled) or any(
            collection not in OWNED for collection in changes
        )
        deltas: dict[int, Delta] = {}

        def of(worker: int) -> Delta:
            if worker not in deltas:
                shared = {name: dict(c.written) for name, c in changes.items() if name not in OWNED}
                gone = {name: tuple(c.removed) for name, c in changes.items() if name not in OWNED}
                deltas[worker] = Delta(new.globals, new.service_enabled, shared, gone)
            return deltas[worker]

        if everybody:
            for worker in self._workers:
                of(worker)
        for collection in OWNED:
            if collection not in changes:
                continue
            before = objects(old, collection)
            for id, member in changes[collection].written.items():
                owner = self._owner(plan, collection, member)
                of(owner).written.setdefault(collection, {})[id] = member
                if id in before and self._owner(plan, collection, before[id]) != owner:
                    _take(of(self._owner(plan, collection, before[id])), collection, id)
            for id in changes[collection].removed:
                _take(of(self._owner(plan, collection, before[id])), collection, id)
        return deltas

    def whole(self, config: Configuration, worker: int) -> Delta:
        """All that a worker has, for one that has nothing yet."""
        part = Part(
            frozenset(id for id, owner in self.targets.items() if owner == worker),
            frozenset(id for id, owner in self.extents.items() if owner == worker),
        )
        written = _members(config, part)
        written |= {name: dict(objects(config, name)) for name in COLLECTIONS if name not in OWNED}
        return Delta(config.globals, config.service_enabled, written, {})


def _take(delta: Delta, collection: Collection, id: int) -> None:
    delta.removed[collection] = (*delta.removed.get(collection, ()), id)


def _written(changes: Changes, collection: Collection) -> Iterator[Resource]:
    if collection in changes:
        yield from changes[collection].written.values()


def _removed(changes: Changes, collection: Collection) -> Iterable[int]:
    return changes[collection].removed if collection in changes else ()


def _members(config: Configuration, part: Part) -> dict[Collection, dict[int, Resource]]:
    """Everything of the owned collections that belongs to a part."""
    groups, luns = groups_by_target(config), mappings_by_target(config)
    return {
        "extents": {id: config.extents[id] for id in part.extents},
        "targets": {id: config.targets[id] for id in part.targets},
        "target_groups": {group.id: group for id in part.targets for group in groups.get(id, ())},
        "lun_mappings": {lun.id: lun for id in part.targets for lun in luns.get(id, ())},
    }


def leaving(config: Configuration, part: Part) -> Delta:
    """What a worker is told that loses a part."""
    removed = {name: tuple(members) for name, members in _members(config, part).items()}
    return Delta(config.globals, config.service_enabled, {}, removed)


def coming(config: Configuration, part: Part) -> Delta:
    """What a worker is told that gets one."""
    return Delta(config.globals, config.service_enabled, _members(config, part), {})
