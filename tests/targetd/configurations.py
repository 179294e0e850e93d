"""Configurations for tests: a small one that is valid, and any at all, made from the declarations."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from targetd.config import (
    COLLECTIONS,
    AuthCredential,
    Configuration,
    Extent,
    FieldRule,
    GlobalConfiguration,
    LunMapping,
    Portal,
    Resource,
    Target,
    TargetGroup,
    add,
    fresh,
    make_naa,
    rules,
)

NAA = tuple(make_naa(number) for number in range(8))


def extent(number: int, /, **changes: Any) -> Extent:
    """An extent with this id and names made from it, but for what is said otherwise."""
    name = f"extent{number}"
    made = Extent(id=number, name=name, type="File", path=f"/mnt/tank/{name}", naa=NAA[number])
    return replace(made, **changes)


def small() -> Configuration:
    """Two targets, three extents, two portals; credentials 1 (one way) and 2 (both ways)."""
    config = fresh("10.0.0.1:3260")
    config = add(config, "portals", Portal(id=2, tag=2, addresses=("[fd00::1]:3260", "10.0.0.2")))
    config = add(config, "credentials", AuthCredential(id=1, tag=1, user="one", secret="secretsecret"))
    config = add(
        config,
        "credentials",
        AuthCredential(id=2, tag=2, user="two", secret="sesame", peer_user="peer", peer_secret="open"),
    )
    for id in (1, 2, 3):
        config = add(config, "extents", extent(id))
    for id in (1, 2):
        config = add(config, "targets", Target(id=id, name=f"target{id}", alias=f"alias {id}"))
        config = add(config, "target_groups", TargetGroup(id=id, target_id=id, portal_id=1))
    config = add(config, "target_groups", TargetGroup(id=3, target_id=1, portal_id=2, initiator_group_id=1))
    for id, (target_id, extent_id, lun) in enumerate(((1, 1, 0), (1, 2, 1), (2, 1, 5)), 1):
        config = add(
            config,
            "lun_mappings",
            LunMapping(id=id, target_id=target_id, extent_id=extent_id, lun=lun),
        )
    return config


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_INTEGER = st.integers(1, 2**63 - 1)


def values(rule: FieldRule) -> st.SearchStrategy[Any]:
    """Anything of the field's type: a store must keep what the model lets through, and asks no more."""
    by_type: Mapping[type, st.SearchStrategy[Any]] = {
        int: _INTEGER if rule.range is None else st.integers(rule.range.low, rule.range.high),
        str: _TEXT,
        bool: st.booleans(),
        tuple: st.lists(_TEXT, max_size=3).map(tuple),
    }
    some = st.sampled_from(rule.choices) if rule.choices else by_type[rule.type]
    return st.none() | some if rule.nullable else some


def instances(cls: type[Any]) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{name: values(rule) for name, rule in rules(cls).items()})


@st.composite
def any_configuration(draw: st.DrawFn) -> Configuration:
    parts: dict[str, dict[int, Resource]] = {
        collection: {obj.id: obj for obj in draw(st.lists(instances(cls), max_size=3))}
        for collection, cls in COLLECTIONS.items()
    }
    return Configuration(
        globals=draw(instances(GlobalConfiguration)),
        service_enabled=draw(st.booleans()),
        last_ids={name: max(members) for name, members in parts.items() if members},
        **parts,  # type: ignore[arg-type]
    )
