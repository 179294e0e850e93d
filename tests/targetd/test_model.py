"""Text forms, declarations, edits and look-ups of the configuration."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from targetd import config as model
from targetd.config import (
    COLLECTIONS,
    TARGETS_BY_NAME,
    AuthCredential,
    Collection,
    ConfigError,
    Configuration,
    Extent,
    GlobalConfiguration,
    InitiatorGroup,
    LunMapping,
    Portal,
    Problem,
    Range,
    Target,
    TargetGroup,
    add,
    check_value,
    diff,
    full_name,
    make_naa,
    next_id,
    next_lun,
    next_tag,
    normalise,
    objects,
    parse_network,
    parse_size,
    remove,
    replace_object,
    rules,
    split_address,
    validate,
)
from targetd.config.editing import _evolve
from targetd.config.indexes import REFERRING
from targetd.config.validation import _EXTENTS_BY_PATH, _UNIQUE
from tests.targetd.configurations import extent, small

# -- Text forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:3260", ("10.0.0.1", 3260)),
        ("10.0.0.1", ("10.0.0.1", 3260)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[::]:3261", ("::", 3261)),
        ("[::1]", ("::1", 3260)),
        ("[FD00:0:0::1]:860", ("fd00::1", 860)),
        ("::1", ("::1", 3260)),
        ("::", ("::", 3260)),
        (":::3260", ("::", 3260)),
        ("fe80::1:3260", ("fe80::1", 3260)),
        ("fe80::1%eth0", ("fe80::1%eth0", 3260)),
        ("[fe80::1%eth0]:861", ("fe80::1%eth0", 861)),
        ("1:2:3:4:5:6:7:8", ("1:2:3:4:5:6:7:8", 3260)),
        ("1:2:3:4:5:6:7:8:99", ("1:2:3:4:5:6:7:8", 99)),
    ],
)
def test_portal_addresses_are_read_in_every_form_of_the_api(text: str, expected: tuple[str, int]) -> None:
    """api-semantics §5.6: ``[v6]:port`` and ``v6:port``, port 3260 where absent."""
    assert split_address(text) == expected


NO_ADDRESSES = """\
:|:3260|10.0.0.1:|10.0.0.1:0|10.0.0.1:65536|10.0.0.1:x|10.0.0.1:+1|10.0.0.1:٣|256.0.0.1|host:3260|\
[10.0.0.1]:3260|[::1]3260|[::1|[::1]:|[::1]:99999999|[]:1|"""


@pytest.mark.parametrize("text", NO_ADDRESSES.split("|"))
def test_what_is_no_address_and_port_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"port|address") as caught:
        split_address(text)
    assert str(caught.value).startswith(text)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_addresses_with_a_port_survive_both_spellings(address: object, port: int) -> None:
    assert split_address(f"{address}:{port}") == (str(address), port)
    if ":" in str(address):
        assert split_address(f"[{address}]:{port}") == (str(address), port)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", ("0", 0)),
        ("0MB", ("0", 0)),
        ("10485760", ("10485760", 10 << 20)),
        ("10MB", ("10MB", 10 << 20)),
        ("10 MB", ("10MB", 10 << 20)),
        (" 10  mb ", ("10MB", 10 << 20)),
        ("1KB", ("1KB", 1 << 10)),
        ("1GB", ("1GB", 1 << 30)),
        ("2TB", ("2TB", 2 << 40)),
        ("1PB", ("1PB", 1 << 50)),
        ("1G", ("1G", 1 << 30)),
        ("1 gib", ("1GiB", 1 << 30)),
        ("1Ki", ("1Ki", 1 << 10)),
        ("512B", ("512", 512)),
        ("007", ("7", 7)),
        (str(2**63 - 1), (str(2**63 - 1), 2**63 - 1)),
    ],
)
def test_sizes_are_read_as_powers_of_1024_and_keep_the_clients_unit(
    text: str, expected: tuple[str, int]
) -> None:
    """api-semantics §6.2."""
    assert parse_size(text) == expected
    assert parse_size(expected[0]) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "MB", "-1", "1.5GB", "1XB", "10 M B", "1e3", "0x10", "٣", "1BB", "1iB", str(2**63), "8192PB"],
)
def test_a_bad_size_gets_the_text_of_the_form(text: str) -> None:
    """api-semantics §6.2."""
    with pytest.raises(
        ValueError, match=r"^This value can be a size in bytes, or can be postfixed with KB, MB, GB, TB$"
    ):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ALL", None),
        ("all", None),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("FD00::/16", "fd00::/16"),
        ("[fd00::1]/16", "fd00::/16"),
        ("[fd00::1]", "fd00::1/128"),
    ],
)
def test_masks_are_read_with_and_without_brackets(text: str, expected: str | None) -> None:
    """api-semantics §7.4."""
    network = parse_network(text)
    assert (None if network is None else str(network)) == expected


# -- Declarations --------------------------------------------------------------------------------------


def test_every_field_of_every_resource_is_declared() -> None:
    for cls in (*COLLECTIONS.values(), GlobalConfiguration):
        declared = rules(cls)
        assert list(declared) == [item.name for item in dataclasses.fields(cls)]
        for name, rule in declared.items():
            if rule.type is str:
                assert rule.text or rule.choices, f"{cls.__name__}.{name} has no bound on its length"
            if rule.type is int:
                assert rule.range or rule.choices or rule.reference, f"{cls.__name__}.{name} has no range"
            if not rule.required:
                assert check_value(rule, rule.default) is None


def test_a_declaration_is_given_back_as_data() -> None:
    rule = rules(GlobalConfiguration)["luc_port"]
    assert (rule.type, rule.nullable, rule.required, rule.default) == (int, True, False, 3261)
    assert rule.range == Range(1, 65535)
    assert rules(TargetGroup)["auth_method"].choices == ("None", "Auto", "CHAP", "CHAP Mutual")
    assert rules(Extent)["name"].required
    assert {name for name, rule in rules(AuthCredential).items() if rule.secret} == {"secret", "peer_secret"}


def test_secrets_stay_out_of_repr() -> None:
    shown = repr(AuthCredential(id=1, tag=1, user="u", secret="abc123", peer_user="p", peer_secret="def456"))
    assert "abc123" not in shown
    assert "def456" not in shown


# -- Names and generated values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("disk1", "iqn.2011-03.org.example.istgt:disk1"),
        ("iqn.2001-04.com.example:x", "iqn.2001-04.com.example:x"),
        ("IQN.2001-04.com.Example:X", "iqn.2001-04.com.example:x"),
        ("eui.0123456789abcdef", "eui.0123456789abcdef"),
        ("naa.6001405000000000", "naa.6001405000000000"),
        ("iqnx", "iqn.2011-03.org.example.istgt:iqnx"),
    ],
)
def test_full_names_are_below_the_basename_unless_they_are_whole(name: str, expected: str) -> None:
    """api-semantics §4."""
    assert full_name(GlobalConfiguration(), Target(id=1, name=name)) == expected


@given(st.integers(0, 2**128 - 1))
def test_generated_identifiers_pass_their_own_check(entropy: int) -> None:
    naa = make_naa(entropy)
    serial = model.make_extent_serial(naa)
    assert check_value(rules(Extent)["naa"], naa) is None
    assert len(naa) == 34
    assert check_value(rules(Extent)["serial"], serial) is None
    assert len(serial) == 16


def test_target_serials_follow_istgt() -> None:
    """api-semantics §5.5: 10000001 for id 1."""
    assert model.default_target_serial(1) == "10000001"


def test_objects_are_brought_into_their_stored_form() -> None:
    """api-semantics §4, §5.3, §5.5, §6.2."""
    target = normalise(Target(id=1, name="Disk.One", alias=""))
    assert (target.name, target.alias) == ("disk.one", None)
    group = normalise(InitiatorGroup(id=1, tag=1, auth_network="10.0.0.0/8, fd00::/16\nall"))
    assert group.auth_network == "10.0.0.0/8\nFD00::/16\nALL"
    file = normalise(extent(1, file_size="10 mb"))
    assert (file.file_size, file.size_bytes) == ("10MB", 10 << 20)
    disk = normalise(extent(1, type="Disk", path="/dev/sda", file_size="10MB"))
    assert (disk.file_size, disk.size_bytes) == ("0", 0)
    assert normalise(extent(1, file_size="rubbish")).file_size == "rubbish"
    assert normalise(extent(1, file_size=10)).file_size == 10
    portal = Portal(id=1, tag=1, addresses=("FD00::1:3260",))
    assert normalise(portal) == portal


# -- Edits ---------------------------------------------------------------------------------------------

CASCADES = [
    # removed                what goes with it (api-semantics §6.4)
    ("extents", 1, {"lun_mappings": {1, 3}}),
    ("extents", 3, {}),
    ("targets", 1, {"lun_mappings": {1, 2}, "target_groups": {1, 3}}),
    ("portals", 1, {"target_groups": {1, 2}}),
    ("initiator_groups", 1, {"target_groups": {3}}),
    ("credentials", 1, {}),
    ("target_groups", 1, {}),
    ("lun_mappings", 2, {}),
]


@pytest.mark.parametrize(("collection", "id", "expected"), CASCADES)
def test_a_removed_object_takes_those_that_refer_to_it(
    collection: Collection, id: int, expected: dict[str, set[int]]
) -> None:
    before = small()
    after = remove(before, collection, id)
    gone = {name: set(change.removed) for name, change in diff(before, after).items()}
    assert gone == {collection: {id}, **expected}
    assert not any(change.written for change in diff(before, after).values())
    assert before == small()
    validate(after, before)
    validate(after)


def test_ids_are_never_given_twice() -> None:
    """api-semantics §5: reuse made clients delete the wrong object."""
    config = small()
    assert next_id(config, "extents") == 4
    config = remove(config, "extents", 3)
    assert next_id(config, "extents") == 4
    config = add(config, "extents", extent(7))
    config = remove(config, "extents", 7)
    assert next_id(config, "extents") == 8
    assert next_id(Configuration(), "extents") == 1


def test_an_id_that_is_taken_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="id 1 is taken"):
        add(small(), "extents", extent(1))


def test_an_equal_replacement_changes_nothing() -> None:
    config = small()
    assert replace_object(config, "extents", extent(1)) is config
    changed = replace_object(config, "extents", extent(1, comment="x"))
    assert changed.extents[1].comment == "x"
    assert list(changed.extents) == list(config.extents)
    with pytest.raises(KeyError):
        replace_object(config, "extents", extent(4))


def test_a_new_tag_is_the_lowest_free_number() -> None:
    """api-semantics §11."""
    config = small()
    assert next_tag(config, "portals") == 3
    assert next_tag(remove(config, "portals", 1), "portals") == 1
    assert next_tag(config, "initiator_groups") == 2


def test_a_new_lun_is_the_lowest_free_of_its_target() -> None:
    """api-semantics §6.5."""
    config = small()
    assert next_lun(config, 1) == 2
    assert next_lun(config, 2) == 0
    assert next_lun(remove(config, "lun_mappings", 1), 1) == 0


def test_a_target_with_every_lun_taken_refuses_another() -> None:
    """api-semantics §10 item 8: refuse at create, with a clear message."""
    full = {id: LunMapping(id=id, target_id=1, extent_id=1, lun=id - 1) for id in range(1, model.MAX_LUN + 2)}
    with pytest.raises(ConfigError) as caught:
        next_lun(replace(small(), lun_mappings=full), 1)
    assert caught.value.fields("lun_mappings") == {"lun": ["This target has no free LUN ID."]}


# -- Look-ups ------------------------------------------------------------------------------------------


def test_look_ups_follow_every_edit() -> None:
    config = small()
    assert set(TARGETS_BY_NAME.of(config)) == {
        "iqn.2011-03.org.example.istgt:target1",
        "iqn.2011-03.org.example.istgt:target2",
    }
    assert [m.lun for m in model.mappings_by_target(config)[1]] == [0, 1]
    assert [m.target_id for m in model.mappings_by_extent(config)[1]] == [1, 2]
    assert [g.portal_id for g in model.groups_by_target(config)[1]] == [1, 2]
    assert [user.user for user in model.credentials_by_tag(config)[2]] == ["two"]

    later = remove(config, "targets", 1)
    assert set(TARGETS_BY_NAME.of(later)) == {"iqn.2011-03.org.example.istgt:target2"}
    assert 1 not in model.mappings_by_target(later)
    assert 1 not in model.groups_by_target(later)
    assert [m.target_id for m in model.mappings_by_extent(later)[1]] == [2]

    renamed = replace(later, globals=replace(later.globals, basename="iqn.2020-01.com.example"))
    assert set(TARGETS_BY_NAME.of(renamed)) == {"iqn.2020-01.com.example:target2"}


def test_a_look_up_is_made_once_while_its_sources_stay() -> None:
    config = small()
    made = model.mappings_by_target(config)
    assert model.mappings_by_target(config) is made
    edited = add(config, "targets", Target(id=3, name="third"))
    assert model.mappings_by_target(edited) is made
    assert edited == add(small(), "targets", Target(id=3, name="third"))


INDEXES = (*REFERRING.values(), TARGETS_BY_NAME, *(rule.index for rule in _UNIQUE), _EXTENTS_BY_PATH)


def forgetful(config: Configuration) -> Configuration:
    """The same, with nothing known of where it came from and no look-up made."""
    return replace(config, **{name: dict(objects(config, name)) for name in COLLECTIONS})  # type: ignore[arg-type]


def problems(config: Configuration, since: Configuration) -> set[Problem]:
    try:
        validate(config, since)
    except ConfigError as error:
        return set(error.problems)
    return set()


@st.composite
def edit(draw: st.DrawFn, config: Configuration) -> Configuration:
    """One edit of few names and few ids, so that they clash; now and then of the globals."""
    if draw(st.integers(0, 9)) == 0:
        basename = draw(st.sampled_from(["iqn.2020-01.com.example", "iqn.2011-03.org.example.istgt"]))
        return _evolve(config, globals=replace(config.globals, basename=basename))
    collection = draw(st.sampled_from(["extents", "targets", "target_groups", "lun_mappings", "credentials"]))
    there = objects(config, collection)
    few, number = st.integers(1, 4), next_id(config, collection)
    id = draw(st.sampled_from([*there, number]))
    if id in there and draw(st.booleans()):
        return remove(config, collection, id)
    made: Any = {
        "extents": lambda: extent(id, name=f"disk{draw(few)}", path=f"/mnt/{draw(few)}"),
        "targets": lambda: Target(id=id, name=f"target{draw(few)}", alias=draw(st.sampled_from([None, "a"]))),
        "target_groups": lambda: TargetGroup(id=id, target_id=draw(few), portal_id=draw(few)),
        "lun_mappings": lambda: LunMapping(
            id=id, target_id=draw(few), extent_id=draw(few), lun=draw(st.integers(0, 2))
        ),
        "credentials": lambda: AuthCredential(
            id=id, tag=draw(few), user=f"user{draw(few)}", secret="secret secret"
        ),
    }[collection]()
    return (add if id == number else replace_object)(config, collection, made)


@settings(max_examples=300)
@given(st.data())
def test_what_is_remembered_is_what_a_look_at_everything_finds(data: st.DataObject) -> None:
    """Look-ups, differences and verdicts after any edits, asked at any of them, are those of configurations
    about which nothing is known."""
    old = new = small()
    for _ in range(data.draw(st.integers(1, 25), "edits")):
        new = data.draw(edit(new), "edit")
        if data.draw(st.booleans(), "asked"):
            plain = forgetful(new)
            for index in INDEXES:
                assert index.of(new) == index.of(plain)
            assert diff(old, new) == diff(forgetful(old), plain)
            assert problems(new, old) == problems(plain, forgetful(old))
        if data.draw(st.booleans(), "in force"):
            old = new


def test_the_flat_target_is_bridged_to_its_oldest_grant() -> None:
    """api-semantics §5.8."""
    config = small()
    first = model.first_group(config, 1)
    assert first is not None
    assert first.id == 1
    assert model.first_group(add(config, "targets", Target(id=3, name="bare")), 3) is None


def test_a_difference_names_only_what_became_other() -> None:
    old = small()
    new = replace_object(old, "targets", replace(old.targets[1], alias=None))
    new = remove(new, "extents", 3)
    new = add(new, "extents", extent(4))
    new = replace(new, portals=dict(new.portals))
    changes = diff(old, new)
    assert set(changes) == {"targets", "extents"}
    assert set(changes["targets"].written) == {1}
    assert (set(changes["extents"].written), changes["extents"].removed) == ({4}, [3])


@given(st.data())
def test_applying_a_difference_to_the_old_gives_the_new(data: st.DataObject) -> None:
    comments = st.dictionaries(st.integers(1, 5), st.sampled_from("abc"))
    old, new = (
        Configuration(extents={id: extent(id, comment=text) for id, text in data.draw(comments).items()})
        for _ in range(2)
    )
    merged = dict(old.extents)
    for change in diff(old, new).values():
        for id in change.removed:
            del merged[id]
        merged |= change.written  # type: ignore[arg-type]
    assert merged == new.extents


# -- Errors --------------------------------------------------------------------------------------------


def test_an_error_says_what_is_wrong_with_which_object() -> None:
    problems = [
        Problem("targets", "name", "taken", 3),
        Problem("targets", "name", "too long", 3),
        Problem("target_groups", model.WHOLE, "no"),
        Problem("targets", "name", "taken", 3),
    ]
    error = ConfigError(problems)
    assert error.fields("targets") == {"name": ["taken", "too long"]}
    assert error.fields("target_groups") == {"": ["no"]}
    assert error.fields("globals") == {}
    assert str(error) == "targets 3.name: taken; targets 3.name: too long; target_groups: no"


def test_collections_stand_after_those_they_refer_to() -> None:
    order = list(COLLECTIONS)
    for collection, cls in COLLECTIONS.items():
        for rule in rules(cls).values():
            if rule.reference:
                assert order.index(rule.reference.collection) < order.index(collection)  # type: ignore[arg-type]
        assert objects(Configuration(), collection) == {}


# -- Initiator names in groups -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("initiators", "said"),
    [
        ("ALL", []),
        ("iqn.2026-11.com.example:a, !iqn.2026-11.com.example:b\nALL", []),
        ("iqn.2026-11.com.example:*", ["iqn.2026-11.com.example:* can match no initiator: the name has"]),
        ("iqn.foo", ["iqn.foo can match no initiator: the name needs behind iqn."]),
        ("host1", ["host1 can match no initiator: the name does not begin with"]),
        ("!host1", ["!host1 can match no initiator: the name does not begin with"]),
        (
            "ALL !iqn.2026-11.com.example:b",
            ["!iqn.2026-11.com.example:b is never asked: ALL before it is about the same."],
        ),
        (
            "iqn.2026-11.com.example:a !IQN.2026-11.com.example:A",
            ["!IQN.2026-11.com.example:A is never asked: iqn.2026-11.com.example:a before it is about"],
        ),
    ],
)
def test_entries_that_can_match_nobody_are_told(initiators: str, said: list[str]) -> None:
    found = model.futile_entries(initiators)
    assert len(found) == len(said)
    assert all(text.startswith(begin) for text, begin in zip(found, said, strict=True))


def test_entries_and_initiators_are_compared_as_rfc_3722_has_it() -> None:
    group = "iqn.2026-11.com.example:STRASSE !ALL"
    assert (
        model.matching_entry(group, "iqn.2026-11.com.example:stra\u00dfe")
        == "iqn.2026-11.com.example:STRASSE"
    )
    assert model.matching_entry(group, "iqn.2026-11.com.example:else") == "!ALL"


@pytest.mark.parametrize(
    "name",
    ["eui.", "naa.xyz", "eui.0200", "iqn.foo", "iqn.", "naa.52004567ba64678", "iqn.2026-13.com.example"],
)
def test_a_whole_name_that_is_none_is_not_written_but_one_from_before_is_kept(name: str) -> None:
    config = small()
    target = config.targets[min(config.targets)]
    written = replace_object(config, "targets", replace(target, name=name))
    with pytest.raises(ConfigError) as refused:
        validate(written, config)
    (problem,) = refused.value.problems
    assert (problem.collection, problem.attribute, problem.id) == ("targets", "name", target.id)
    assert problem.message.startswith(f"{name} is no iSCSI name: it needs behind {name[:4]} ")
    validate(written)  # as an older release stored it
    edited = replace(written.targets[target.id], flags="ro")
    validate(replace_object(written, "targets", edited), written)
