"""What SendTargets tells, and that it is made once."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.access import TargetList
from targetd.config import Configuration, InitiatorGroup, Target, TargetGroup, add, fresh, split_list
from targetd.net.access import AccessSnapshot, PortalAuthorizer
from targetd.net.discovery import MAX_KEPT

NAMES = ("iqn.2026-11.example:a", "iqn.2026-11.example:B", "iqn.2026-11.example:c")
HERE = "192.0.2.1"


def configuration(entries: list[str], grants: list[tuple[int, int | None]]) -> Configuration:
    """Initiator groups with these entries, and targets that are granted to them through two portals."""
    config = fresh("0.0.0.0:3260")
    portal = config.portals[1]
    config = add(config, "portals", replace(portal, id=2, tag=2, addresses=(f"{HERE}:3261",)))
    groups = []
    for text in entries:
        id = max(config.initiator_groups, default=0) + 1
        config = add(config, "initiator_groups", InitiatorGroup(id=id, tag=id, initiators=text))
        groups.append(id)
    for number, (portal_id, group) in enumerate(grants, 1):
        config = add(config, "targets", Target(id=number, name=f"t{number}", alias=None))
        config = add(
            config,
            "target_groups",
            TargetGroup(
                id=number,
                target_id=number,
                portal_id=portal_id,
                initiator_group_id=None if group is None else groups[group % len(groups)],
            ),
        )
    return config


def told(found: TargetList) -> str:
    text, number = b"", 0
    while record := found.text(number):
        text += record
        number += 1
    return text.decode().replace("\0", "\n")


def authorizer(view: AccessSnapshot, portal_id: int = 1, local: str = HERE) -> PortalAuthorizer:
    return PortalAuthorizer(lambda: view, portal_id, "192.0.2.99", local, 3260)


ENTRIES = st.lists(
    st.lists(
        st.sampled_from(["ALL", "!ALL", *NAMES, *(f"!{name}" for name in NAMES)]), min_size=1, max_size=4
    ).map("\n".join),
    min_size=1,
    max_size=4,
)


@given(
    ENTRIES,
    st.lists(st.tuples(st.sampled_from([1, 2]), st.none() | st.integers(0, 3)), max_size=8),
    st.sampled_from([*NAMES, "iqn.2026-11.example:stranger", NAMES[0].upper()]),
)
def test_each_initiator_sees_what_the_first_entry_about_it_says(
    entries: list[str], grants: list[tuple[int, int | None]], name: str
) -> None:
    config = configuration(entries, grants)

    def admits(group_id: int | None) -> bool:
        if group_id is None:
            return True
        for entry in split_list(config.initiator_groups[group_id].initiators):
            if entry.lower().removeprefix("!") in ("all", name.lower()):
                return not entry.startswith("!")
        return False

    wanted = [group.target_id for group in config.target_groups.values() if group.portal_id == 1]
    wanted = [id for id in wanted if admits(config.target_groups[id].initiator_group_id)]
    ask = authorizer(AccessSnapshot(config, {}))
    names = [line.rpartition(":")[2] for line in told(ask.send_targets(name, None)).splitlines()[::2]]
    assert names == [f"t{id}" for id in wanted]
    for id, target in config.targets.items():
        one = ask.send_targets(name, f"{config.globals.basename}:{target.name}")
        assert bool(one) == (id in wanted)


def test_strangers_share_one_list_and_it_is_made_as_far_as_it_is_read() -> None:
    view = AccessSnapshot(configuration([NAMES[0]], [(1, None)] * 500), {})
    lists = [authorizer(view).send_targets(f"iqn.2026-11.example:stranger{n}", None) for n in range(9)]
    assert all(found is lists[0] for found in lists)
    assert authorizer(view).send_targets(NAMES[0], None) is not lists[0]
    lists[0].text(0)
    assert lists[0].made == 1
    assert told(lists[0]).count("TargetName") == 500


@pytest.mark.parametrize(
    "change",
    [
        {"local": "192.0.2.7"},
        {"portal_id": 2},
        {"absent": {f"{HERE}:3261": "gone"}},
        {"configuration": configuration([], [(1, None)])},
    ],
)
def test_it_is_another_list_where_anything_of_it_may_differ(change: dict[str, Any]) -> None:
    view = AccessSnapshot(configuration([], [(1, None), (2, None)]), {})
    first = authorizer(view).send_targets(NAMES[0], None)
    how = {key: change.pop(key) for key in ("local", "portal_id") if key in change}
    if "configuration" in change:
        view = AccessSnapshot(change["configuration"], {})
    elif change:
        view = replace(view, **change)
    assert authorizer(view, **how).send_targets(NAMES[0], None) is not first


def test_addresses_go_when_they_are_absent() -> None:
    absent: dict[str, str] = {}
    view = AccessSnapshot(configuration([], [(2, None)]), {}, absent)
    ask = authorizer(view, 2)
    assert f"TargetAddress={HERE}:3261,2" in told(ask.send_targets(NAMES[0], None))
    absent[f"{HERE}:3261"] = "it went"
    assert "TargetAddress" not in told(ask.send_targets(NAMES[0], None))


def test_what_is_kept_is_bounded() -> None:
    config = configuration([], [(1, None)] * 300)
    view = AccessSnapshot(config, {})
    for host in range(200):
        told(authorizer(view, local=f"192.0.2.{host}").send_targets(NAMES[0], None))
    assert sum(found.made for found in view.lists._kept.values()) <= MAX_KEPT + 300
