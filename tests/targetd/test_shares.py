"""Who owns what: what is linked together, what is new where there is room, moves as small as can be."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from targetd.config import (
    COLLECTIONS,
    ConfigError,
    Configuration,
    LunMapping,
    Target,
    TargetGroup,
    add,
    diff,
    mappings_by_extent,
    objects,
    remove,
    replace_object,
)
from targetd.workers.messages import Delta
from targetd.workers.placement import OWNED, Move, Part, Placement, coming, leaving, share_of_front
from tests.targetd.configurations import extent, small

WORKERS = 3


class Workers:
    """Shares, and what each worker would have been told by now."""

    def __init__(self, count: int = WORKERS) -> None:
        self.shares = Placement(count)
        self.config = Configuration()
        self.parts = {worker: Configuration() for worker in range(1, count + 1)}
        self.moves: list[Move] = []
        self.busy: dict[int, int] = {}

    def tell(self, worker: int, delta: Delta) -> None:
        self.parts[worker] = delta.applied_to(self.parts[worker])

    def apply(self, new: Configuration, clone_of: int | None = None) -> None:
        old, changes = self.config, diff(self.config, new)
        plan = self.shares.plan(old, new, changes, lambda target: self.busy.get(target, 0), clone_of)
        self.moves = plan.moves
        for move in plan.moves:
            self.tell(move.source, leaving(old, move.part))
            self.shares.moved(move)
            self.tell(move.destination, coming(old, move.part))
        for worker, delta in self.shares.deltas(old, new, changes, plan).items():
            self.tell(worker, delta)
        self.shares.carried_out(plan, changes)
        self.config = new
        self.check()

    def check(self) -> None:
        """Each worker has a configuration that is whole in itself, and all together have all of it."""
        for name in COLLECTIONS:
            shares = [objects(part, name) for part in self.parts.values()]
            if name in OWNED:
                assert sum(map(len, shares)) == len(objects(self.config, name))
                assert {id: each for share in shares for id, each in share.items()} == objects(
                    self.config, name
                )
            else:
                assert all(share == objects(self.config, name) for share in shares)
        for worker, part in self.parts.items():
            assert all(m.target_id in part.targets for m in part.lun_mappings.values())
            assert all(m.extent_id in part.extents for m in part.lun_mappings.values())
            assert all(group.target_id in part.targets for group in part.target_groups.values())
            assert (part.globals, part.service_enabled) == (self.config.globals, self.config.service_enabled)
            whole = self.shares.whole(self.config, worker).applied_to(Configuration())
            assert replace(whole, last_ids={}) == replace(part, last_ids={})


def target(config: Configuration, id: int) -> Configuration:
    config = add(config, "targets", Target(id=id, name=f"t{id}"))
    return add(config, "target_groups", TargetGroup(id=id, target_id=id, portal_id=1))


def lun(config: Configuration, id: int, target_id: int, extent_id: int, number: int = 0) -> Configuration:
    return add(
        config,
        "lun_mappings",
        LunMapping(id=id, target_id=target_id, extent_id=extent_id, lun=number),
    )


def separate(count: int) -> Configuration:
    """As many disks, each a target with one extent."""
    config = Configuration(portals=small().portals)
    for id in range(1, count + 1):
        config = lun(target(add(config, "extents", extent(id)), id), id, id, id)
    return config


def test_what_is_linked_stays_together_and_the_rest_is_spread() -> None:
    workers = Workers()
    workers.apply(small())  # targets 1 and 2 share extent 1; extent 3 is alone
    shares = workers.shares
    assert len({shares.targets[1], shares.targets[2], shares.extents[1], shares.extents[2]}) == 1
    assert shares.extents[3] != shares.extents[1]
    workers = Workers()
    workers.apply(separate(6))
    assert sorted(workers.shares.targets.values()) == [1, 1, 2, 2, 3, 3]


def test_nothing_moves_for_the_sake_of_balance() -> None:
    workers = Workers()
    workers.apply(separate(6))
    before = dict(workers.shares.targets)
    config = workers.config
    for id in [id for id, owner in before.items() if owner == 1]:
        config = remove(config, "targets", id)
    workers.apply(config)
    assert workers.moves == []
    assert workers.shares.targets == {id: owner for id, owner in before.items() if owner != 1}


@pytest.mark.parametrize(("busy", "goes"), [({}, 2), ({1: 1}, 2), ({2: 1}, 1), ({1: 2, 2: 3}, 1)])
def test_a_new_lun_moves_the_lesser_part(busy: dict[int, int], goes: int) -> None:
    """Fewer connections, then fewer extents; it moves whole, before the change."""
    workers = Workers()
    workers.apply(separate(2))
    owners = dict(workers.shares.targets)
    workers.busy = busy
    workers.apply(lun(workers.config, 9, 1, 2, 1))
    (move,) = workers.moves
    assert move == Move(owners[goes], owners[3 - goes], Part(frozenset((goes,)), frozenset((goes,))))


def test_a_lun_that_is_changed_to_another_extent_takes_its_old_one_along() -> None:
    """What moves is whole under the configuration that is in force until then."""
    workers = Workers()
    workers.apply(separate(2))
    workers.busy = {2: 1}
    workers.apply(
        replace_object(workers.config, "lun_mappings", LunMapping(id=1, target_id=1, extent_id=2, lun=0))
    )
    assert workers.moves[0].part == Part(frozenset((1,)), frozenset((1,)))


def test_what_is_in_memory_stays_where_it_is() -> None:
    """Whatever else is there; two of them apart cannot be linked, and nothing has changed."""
    workers = Workers()
    config = separate(3)
    for id in (1, 3):
        config = replace_object(config, "extents", replace(config.extents[id], type="Memory"))
    workers.apply(config)
    owners = dict(workers.shares.extents)
    workers.busy = {2: 5}
    workers.apply(lun(workers.config, 9, 1, 2, 1))
    assert workers.moves == [Move(owners[2], owners[1], Part(frozenset((2,)), frozenset((2,))))]
    with pytest.raises(ConfigError, match="in different worker processes"):
        workers.apply(lun(workers.config, 10, 1, 3, 2))
    workers.check()


def test_a_clone_lives_beside_its_source() -> None:
    """The worker that has the source open makes it."""
    workers = Workers()
    workers.apply(separate(3))
    workers.apply(add(workers.config, "extents", extent(7)), clone_of=2)
    assert workers.shares.extents[7] == workers.shares.extents[2]


def test_what_is_common_goes_to_everybody_and_what_is_not_to_its_owner() -> None:
    workers = Workers()
    workers.apply(separate(3))
    old = workers.config
    shares = workers.shares

    def touched(new: Configuration) -> set[int]:
        changes = diff(old, new)
        return set(shares.deltas(old, new, changes, shares.plan(old, new, changes)))

    assert touched(replace(old, service_enabled=False)) == {1, 2, 3}
    assert touched(remove(old, "portals", 2)) == {1, 2, 3}
    assert touched(replace_object(old, "extents", extent(2, comment="x"))) == {shares.extents[2]}
    assert touched(remove(old, "targets", 1)) == {shares.targets[1]}


def test_the_front_has_all_but_targets_and_extents() -> None:
    config = small()
    front = share_of_front(config)
    assert not any(objects(front, name) for name in OWNED)
    assert (front.portals, front.credentials, front.globals) == (
        config.portals,
        config.credentials,
        config.globals,
    )


@settings(deadline=None)
@given(st.data())
def test_any_sequence_of_changes_leaves_every_worker_with_a_whole_share(data: st.DataObject) -> None:
    """``Workers.check`` after each."""
    workers = Workers()
    last = 0
    for _ in range(data.draw(st.integers(1, 12))):
        config = workers.config
        for _ in range(data.draw(st.integers(1, 3))):
            last += 1
            step = data.draw(st.sampled_from(("target", "extent", "lun", "relink", "remove")))
            if step == "target":
                config = add(config, "targets", Target(id=last, name=f"t{last}"))
            elif step == "extent":
                config = add(
                    config, "extents", replace(extent(1), id=last, name=f"e{last}", path=f"/m/{last}")
                )
            elif step == "lun" and config.targets and config.extents:
                to = data.draw(st.sampled_from(sorted(config.targets)))
                of = data.draw(st.sampled_from(sorted(config.extents)))
                config = lun(config, last, to, of, last)
            elif step == "relink" and config.lun_mappings and config.extents:
                mapping = config.lun_mappings[data.draw(st.sampled_from(sorted(config.lun_mappings)))]
                of = data.draw(st.sampled_from(sorted(config.extents)))
                to = data.draw(st.sampled_from(sorted(config.targets)))
                config = replace_object(config, "lun_mappings", replace(mapping, extent_id=of, target_id=to))
            elif step == "remove":
                name = data.draw(st.sampled_from(("targets", "extents", "lun_mappings")))
                if members := objects(config, name):
                    config = remove(config, name, data.draw(st.sampled_from(sorted(members))))
        workers.apply(config)
        for id, mappings in mappings_by_extent(config).items():
            owners = {workers.shares.targets[mapping.target_id] for mapping in mappings}
            assert owners == {workers.shares.extents[id]}
