"""Many writers, many objects (design.md §1, §5; api-semantics §10)."""

import asyncio
from dataclasses import replace

from targetd.config import (
    Configuration,
    Extent,
    LunMapping,
    Target,
    TargetGroup,
    fresh,
    make_naa,
    validate,
)
from tests.api.conftest import Api


def many(targets: int, luns: int) -> Configuration:
    """So many targets with a grant and so many LUNs each."""
    extents = {
        number: Extent(
            id=number,
            name=f"e{number}",
            type="File",
            path=f"/mnt/e{number}",
            file_size="1MB",
            size_bytes=1 << 20,
            naa=make_naa(number),
        )
        for number in range(1, targets * luns + 1)
    }
    return replace(
        fresh(),
        extents=extents,
        targets={number: Target(id=number, name=f"t{number}") for number in range(1, targets + 1)},
        target_groups={
            number: TargetGroup(id=number, target_id=number, portal_id=1) for number in range(1, targets + 1)
        },
        lun_mappings={
            number: LunMapping(
                id=number, target_id=(number - 1) // luns + 1, extent_id=number, lun=(number - 1) % luns
            )
            for number in extents
        },
    )


async def test_a_hundred_writers_at_once_get_a_hundred_right_answers(api: Api) -> None:
    async def writer(number: int) -> None:
        name = f"w{number}"
        target = await api.made("target/", iscsi_target_name=name, iscsi_target_portalgroup=1)
        extent = await api.made(
            "extent/",
            iscsi_target_extent_name=name,
            iscsi_target_extent_type="File",
            iscsi_target_extent_path=f"/mnt/{name}",
            iscsi_target_extent_filesize="1MB",
        )
        assert (target["iscsi_target_name"], extent["iscsi_target_extent_name"]) == (name, name)
        mapping = await api.made("targettoextent/", iscsi_target=target["id"], iscsi_extent=extent["id"])
        assert mapping["iscsi_lunid"] == 0
        answer = await api.put(f"target/{target['id']}/", {"iscsi_target_alias": name})
        assert (answer.json["id"], answer.json["iscsi_target_alias"]) == (target["id"], name)
        if number % 2:
            assert (await api.delete(f"target/{target['id']}/")).status == 204
            assert (await api.get(f"targettoextent/{mapping['id']}/")).status == 404

    await asyncio.gather(*(writer(number) for number in range(100)))
    config = api.engine.configuration
    validate(config)
    assert {target.name for target in config.targets.values()} == {
        f"w{number}" for number in range(0, 100, 2)
    }
    assert len(config.extents) == 100
    assert len(config.lun_mappings) == len(config.target_groups) == 50


async def test_one_of_a_hundred_wins_a_name(api: Api) -> None:
    answers = await asyncio.gather(*(api.post("target/", {"iscsi_target_name": "one"}) for _ in range(100)))
    assert sorted(answer.status for answer in answers) == [201] + [409] * 99
    assert len(api.engine.configuration.targets) == 1


async def test_a_hundred_get_different_luns_of_one_target(api: Api) -> None:
    await api.made("target/", iscsi_target_name="t")
    api.engine.configuration = replace(api.engine.configuration, extents=many(100, 1).extents)
    bodies = [{"iscsi_target": 1, "iscsi_extent": number} for number in range(1, 101)]
    answers = await asyncio.gather(*(api.post("targettoextent/", body) for body in bodies))
    assert sorted(answer.json["iscsi_lunid"] for answer in answers) == list(range(100))


async def test_a_thousand_targets_are_listed_whole_and_grow(api: Api) -> None:
    """How fast is measured by ``bench/many.py``."""
    api.engine.configuration = many(1000, 4)
    for path, count in (("target", 1000), ("extent", 4000), ("targettoextent", 4000), ("targetgroup", 1000)):
        answer = await api.get(f"{path}/?limit=0")
        assert len({shown["id"] for shown in answer.json}) == count
        assert answer.headers["Content-Range"] == f"items 0-{count - 1}/{count}"
    target = await api.made("target/", iscsi_target_name="one-more", iscsi_target_portalgroup=1)
    mapping = await api.made("targettoextent/", iscsi_target=target["id"], iscsi_extent=4000)
    assert (target["id"], mapping["id"], mapping["iscsi_lunid"]) == (1001, 4001, 0)
