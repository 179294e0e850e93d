"""The resources: fields, defaults, coercions, error texts, references (api-semantics §4 to §6)."""

from dataclasses import replace
from typing import Any

import pytest

from api.fields import DECLARATIONS
from targetd.config import (
    COLLECTIONS,
    GLOBALS,
    ConfigError,
    Configuration,
    GlobalConfiguration,
    replace_object,
    rules,
)
from targetd.interface import ConnectionStatus, Edit, SessionStatus
from tests.api.conftest import Api

REQUIRED = "This field is required."
FILE = {
    "iscsi_target_extent_type": "File",
    "iscsi_target_extent_path": "/mnt/tank/a",
    "iscsi_target_extent_filesize": "1MB",
}


def choice(value: object) -> str:
    return f"Select a valid choice. {value} is not one of the available choices."


async def extent(api: Api, name: str = "e", **fields: Any) -> dict[str, Any]:
    body = {
        **FILE,
        "iscsi_target_extent_path": f"/mnt/tank/{name}",
        "iscsi_target_extent_name": name,
        **fields,
    }
    return await api.made("extent/", **body)


async def disk(api: Api) -> tuple[int, int, int, int]:
    """Ids of a target, its grant, an extent and the LUN that joins them."""
    target = await api.made(
        "target/", iscsi_target_name="t", iscsi_target_portalgroup=1, iscsi_target_initiatorgroup=1
    )
    made = await extent(api)
    lun = await api.made("targettoextent/", iscsi_target=target["id"], iscsi_extent=made["id"])
    (group,) = (await api.get("targetgroup/")).json
    return target["id"], group["id"], made["id"], lun["id"]


# -- One field -----------------------------------------------------------------------------------------

GLOBAL_ERRORS = [
    # field, value, message
    ("iscsi_iotimeout", 301, "This value must be between 0 and 300, inclusive."),
    ("iscsi_nopinint", -1, "This value must be between 0 and 300, inclusive."),
    ("iscsi_maxsesh", 0, "This value must be between 1 and 65535, inclusive."),
    ("iscsi_maxconnect", 65536, "This value must be between 1 and 65535, inclusive."),
    ("iscsi_r2t", 257, "This value must be between 0 and 256, inclusive."),
    ("iscsi_firstburst", 511, "This value must be between 512 and 16777215, inclusive."),
    ("iscsi_maxburst", 2**24, "This value must be between 512 and 16777215, inclusive."),
    ("iscsi_defaultt2w", 3601, "This value must be between 0 and 3600, inclusive."),
    ("iscsi_maxsesh", "many", "Enter a whole number."),
    ("iscsi_maxsesh", True, "Enter a whole number."),
    ("iscsi_maxsesh", 1.5, "Enter a whole number."),
    ("iscsi_maxsesh", [1], "Enter a whole number."),
    # int() takes all of these
    ("iscsi_maxsesh", "1_0", "Enter a whole number."),
    ("iscsi_maxsesh", "+10", "Enter a whole number."),
    ("iscsi_maxsesh", "- 10", "Enter a whole number."),
    ("iscsi_maxsesh", "\u0661\u0662", "Enter a whole number."),
    ("iscsi_maxsesh", "\uff11\uff12", "Enter a whole number."),
    ("iscsi_maxsesh", "0x10", "Enter a whole number."),
    ("iscsi_maxsesh", "1e2", "Enter a whole number."),
    ("iscsi_lucport", "32_60", "Enter a whole number."),
    ("iscsi_isns_servers", "10.0.0.1:3_205", "The following addresses are not valid: 10.0.0.1:3_205"),
    ("iscsi_isns_servers", "10.0.0.1:\u0663", "The following addresses are not valid: 10.0.0.1:\u0663"),
    ("iscsi_maxsesh", None, REQUIRED),
    ("iscsi_maxsesh", "", REQUIRED),
    ("iscsi_basename", "", REQUIRED),
    ("iscsi_basename", None, REQUIRED),
    ("iscsi_basename", {"a": 1}, "Enter text."),
    ("iscsi_discoveryauthmethod", "MD5", choice("MD5")),
    ("iscsi_discoveryauthmethod", "", REQUIRED),
    ("iscsi_discoveryauthgroup", 7, choice(7)),
    ("iscsi_toggleluc", "maybe", "Enter true or false."),
    ("iscsi_lucip", "localhost", "Enter a valid IPv4 or IPv6 address."),
    ("iscsi_pool_avail_threshold", 100, "This value must be between 1 and 99, inclusive."),
    ("iscsi_isns_servers", "10.0.0.1 x", "The following addresses are not valid: x"),
]


@pytest.mark.parametrize(("name", "value", "message"), GLOBAL_ERRORS)
async def test_a_bad_global_value_is_told_and_changes_nothing(
    api: Api, name: str, value: object, message: str
) -> None:
    answer = await api.put("globalconfiguration/", {name: value, "iscsi_r2t": 5} | {name: value})
    assert (answer.status, answer.json) == (409, {name: [message]})
    assert api.engine.applied == 0


@pytest.mark.parametrize(
    ("name", "sent", "kept"),
    [
        ("iscsi_maxsesh", "17", 17),
        ("iscsi_maxsesh", " 17 ", 17),
        ("iscsi_maxsesh", 17.0, 17),
        ("iscsi_toggleluc", "True", True),
        ("iscsi_toggleluc", "false", False),
        ("iscsi_toggleluc", None, False),
        ("iscsi_toggleluc", 0, False),
        ("iscsi_lucport", "", None),
        ("iscsi_lucport", "null", None),
        ("iscsi_lucip", "", None),
        ("iscsi_lucip", None, None),
        ("iscsi_lucip", "::1", "::1"),
        ("iscsi_luc_authmethod", "", ""),
        ("iscsi_luc_authmethod", None, ""),
        ("iscsi_discoveryauthgroup", -1, None),
        ("iscsi_discoveryauthgroup", "-1", None),
        ("iscsi_discoveryauthgroup", "", None),
        ("iscsi_basename", " iqn.2020-01.com.example ", "iqn.2020-01.com.example"),
        ("iscsi_pool_avail_threshold", "80", 80),
    ],
)
async def test_values_are_read_as_from_a_form(api: Api, name: str, sent: object, kept: object) -> None:
    body: dict[str, Any] = {name: sent}
    if name == "iscsi_toggleluc" and kept:
        body |= {"iscsi_luc_authmethod": "None"}
    for path in ("globalconfiguration/", "globalconfiguration/1/"):
        answer = await api.put(path, body)
        assert (answer.status, answer.json[name]) == (202, kept), answer.raw


async def test_users_and_secrets_keep_their_blanks(api: Api) -> None:
    """What is changed in silence is a login that fails."""
    given = {
        "iscsi_target_auth_user": " user name ",
        "iscsi_target_auth_secret": "twelve chars ",
        "iscsi_target_auth_peeruser": "peer ",
        "iscsi_target_auth_peersecret": " twelve charz",
    }
    made = await api.post("authcredential/", {"iscsi_target_auth_tag": 1, **given})
    assert made.status == 201
    changed = await api.put(
        f"authcredential/{made.json['id']}/", {"iscsi_target_auth_secret": "  other chars  "}
    )
    assert changed.status == 202
    (kept,) = api.engine.configuration.credentials.values()
    assert (kept.user, kept.secret) == (" user name ", "  other chars  ")
    assert (kept.peer_user, kept.peer_secret) == ("peer ", " twelve charz")


async def test_all_messages_come_at_once(api: Api) -> None:
    """Wrong fields, what is missing, and what clashes with others, in one answer."""
    await extent(api, "taken")
    answer = await api.post(
        "extent/",
        {
            "iscsi_target_extent_name": "taken",
            "iscsi_target_extent_type": "Tape",
            "iscsi_target_extent_filesize": "much",
            "iscsi_target_extent_blocksize": 513,
            "iscsi_target_extent_comment": "c" * 121,
            "iscsi_target_extent_avail_threshold": "0",
        },
    )
    assert answer.status == 409
    assert answer.json == {
        "iscsi_target_extent_name": ["Extent name must be unique"],
        "iscsi_target_extent_type": [choice("Tape")],
        "iscsi_target_extent_path": [REQUIRED],
        "iscsi_target_extent_filesize": [
            "This value can be a size in bytes, or can be postfixed with KB, MB, GB, TB"
        ],
        "iscsi_target_extent_blocksize": [choice(513)],
        "iscsi_target_extent_comment": ["Ensure this value has at most 120 characters (it has 121)."],
        "iscsi_target_extent_avail_threshold": ["This value must be between 1 and 99, inclusive."],
    }


async def test_rules_between_fields(api: Api) -> None:
    put = api.put
    answer = await put("globalconfiguration/", {"iscsi_firstburst": 300000})
    assert "iscsi_firstburst" in answer.json
    answer = await put("globalconfiguration/", {"iscsi_discoveryauthmethod": "CHAP"})
    assert answer.json["iscsi_discoveryauthgroup"][0].startswith("This field is required if ")
    answer = await put("globalconfiguration/", {"iscsi_toggleluc": True, "iscsi_lucip": None})
    assert answer.json["iscsi_lucip"] == [REQUIRED]
    assert answer.json["iscsi_luc_authgroup"][0].startswith("This field is required if ")
    assert api.engine.applied == 0


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\ud800"])
async def test_text_that_nothing_could_store_is_refused(api: Api, text: str) -> None:
    answer = await api.post("authorizedinitiator/", {"iscsi_target_initiator_comment": text})
    assert answer.status == 409
    assert list(answer.json) == ["iscsi_target_initiator_comment"]


async def test_unknown_keys_and_an_id_in_the_body_mean_nothing(api: Api) -> None:
    made = await api.made("target/", id=77, pk=78, iscsi_target_name="t", resource_uri="/x/")
    assert made["id"] == 1
    answer = await api.put("target/1/", {"id": 9, "what": 1})
    assert (answer.status, answer.json) == (202, made)


@pytest.mark.parametrize(
    ("query", "preference", "refused"),
    [
        ("?strict=1", "", True),
        ("", "handling=strict", True),
        ("", 'respond-async, Handling="strict"; wait=10', True),
        ("", "handling=lenient", False),
        ("?strict=0", "handling=strict", False),
        ("", "", False),
    ],
)
async def test_who_asks_for_it_is_told_of_unknown_fields(
    api: Api, query: str, preference: str, refused: bool
) -> None:
    """RFC 7240 §4.4. What a GET shows can still be put back."""
    headers = {"Prefer": preference}
    shown = await api.made("target/", iscsi_target_name="t")
    extent = await api.made(
        "extent/", iscsi_target_extent_name="e", iscsi_target_extent_type="Memory",
        iscsi_target_extent_filesize="1MB",
    )  # fmt: skip
    typo = {"iscsi_target_queuedepth": 3}
    for method, path, body in (
        ("POST", "target/", {"iscsi_target_name": "u"}),
        ("PUT", "target/1/", shown),
        ("PUT", "extent/1/", extent),
        ("PUT", "globalconfiguration/", (await api.get("globalconfiguration/")).json),
    ):
        answer = await api.request(method, f"{path}{query}", {**body, **typo}, headers=headers)
        if refused:
            assert (answer.status, answer.json) == (
                409,
                {"iscsi_target_queuedepth": ["There is no such field."]},
            )
            answer = await api.request(method, f"{path}{query}", body, headers=headers)
        assert answer.status == (201 if method == "POST" else 202), answer.raw


async def test_null_on_create_is_the_default(api: Api) -> None:
    nulls = dict.fromkeys(
        ("iscsi_target_queue_depth", "iscsi_target_flags", "iscsi_target_alias", "iscsi_target_serial")
    )
    made = await api.made("target/", iscsi_target_name="t", **nulls)
    assert made == {**made, "iscsi_target_queue_depth": 32, "iscsi_target_flags": "rw"}
    answer = await api.post("target/", {"iscsi_target_name": None})
    assert answer.json == {"iscsi_target_name": [REQUIRED]}


# -- Every resource ------------------------------------------------------------------------------------

CREATE: dict[str, dict[str, Any]] = {
    "extent": {**FILE, "iscsi_target_extent_name": "second"},
    "authorizedinitiator": {},
    "authcredential": {"iscsi_target_auth_user": "u", "iscsi_target_auth_secret": "s"},
    "target": {"iscsi_target_name": "second"},
    "portal": {"iscsi_target_portal_ips": ["127.0.0.1:3261"]},
}


@pytest.mark.parametrize("resource", CREATE)
async def test_ids_are_never_used_again(api: Api, resource: str) -> None:
    """FreeNAS did, and clients deleted other people's objects (api-semantics §10)."""
    first = await api.made(f"{resource}/", **CREATE[resource])
    await api.delete(f"{resource}/{first['id']}/")
    second = await api.made(f"{resource}/", **CREATE[resource])
    assert second["id"] == first["id"] + 1


async def test_putting_back_what_get_returned_changes_nothing(api: Api) -> None:
    """§10 no. 12: also for a target without grants, and for a zvol."""
    await disk(api)
    await api.made("target/", iscsi_target_name="bare")
    await api.made("authcredential/", iscsi_target_auth_user="u", iscsi_target_auth_secret="s")
    await api.made(
        "extent/",
        iscsi_target_extent_name="z",
        iscsi_target_extent_type="Disk",
        iscsi_target_extent_disk="zvol/tank/z",
    )
    before = api.engine.configuration
    for name in (*CREATE, "targettoextent", "targetgroup"):
        for body in (await api.get(f"{name}/")).json:
            answer = await api.put(f"{name}/{body['id']}/", body)
            assert (answer.status, answer.json) == (202, body)
    body = (await api.get("globalconfiguration/")).json
    assert (await api.put("globalconfiguration/", body)).json == body
    assert api.engine.configuration is before


async def test_patch_is_put(api: Api) -> None:
    await api.made("target/", iscsi_target_name="t")
    answer = await api.request("PATCH", "target/1/", {"iscsi_target_alias": "a"})
    assert (answer.status, answer.json["iscsi_target_alias"]) == (202, "a")


async def test_a_failed_put_changes_nothing(api: Api) -> None:
    made = await extent(api)
    answer = await api.put(
        f"extent/{made['id']}/", {"iscsi_target_extent_comment": "new", "iscsi_target_extent_rpm": "7"}
    )
    assert answer.status == 409
    assert (await api.get(f"extent/{made['id']}/")).json == made


def test_every_field_of_the_model_has_its_place_on_the_wire() -> None:
    """A field added to the model and forgotten here would be invisible."""
    derived = {"id", "size_bytes", "serial_given"}
    records = {**COLLECTIONS, GLOBALS: GlobalConfiguration}
    for declaration in DECLARATIONS:
        shown = {column.attribute for column in declaration.columns}
        assert set(rules(records[declaration.collection])) - derived <= shown, declaration.title  # type: ignore[index]


# -- extent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "key", "given", "word_shown", "path_shown"),
    [
        ("Disk", "disk", "zvol/tank/a", "ZVOL", "/dev/zvol/tank/a"),
        ("ZVOL", "disk", "zvol/tank/a", "ZVOL", "/dev/zvol/tank/a"),
        ("ZVOL", "path", "/dev/zvol/tank/a", "ZVOL", "/dev/zvol/tank/a"),
        ("Disk", "path", "/dev/zvol/tank/a", "ZVOL", "/dev/zvol/tank/a"),
        ("Disk", "disk", "ada1", "Disk", "/dev/ada1"),
        ("Disk", "disk", "multipath/x", "Disk", "/dev/multipath/x"),
        ("Disk", "disk", "/dev/sdb", "Disk", "/dev/sdb"),
        ("Device", "path", "ada1", "Device", "/dev/ada1"),
        ("Device", "path", "/dev/ada1", "Device", "/dev/ada1"),
        ("ZFS Volume", "path", "tank/a", "ZFS Volume", "/dev/zvol/tank/a"),
        ("ZFS Volume", "disk", "zvol/tank/a", "ZFS Volume", "/dev/zvol/tank/a"),
        ("File", "path", "/mnt/a", "File", "/mnt/a"),
    ],
)
async def test_words_for_backing_stores(
    api: Api, word: str, key: str, given: str, word_shown: str, path_shown: str
) -> None:
    sent = {"iscsi_target_extent_type": word, f"iscsi_target_extent_{key}": given}
    made = await api.made("extent/", iscsi_target_extent_name="e", **sent)
    assert made["iscsi_target_extent_type"] == word_shown
    assert made["iscsi_target_extent_path"] == path_shown
    assert "iscsi_target_extent_disk" not in made


async def test_a_zvol_extent_is_changed_in_the_words_of_every_client(api: Api) -> None:
    made = await api.made(
        "extent/",
        iscsi_target_extent_name="e",
        iscsi_target_extent_type="Disk",
        iscsi_target_extent_disk="zvol/tank/a",
    )
    for body in (
        {"iscsi_target_extent_comment": "1"},
        {
            "iscsi_target_extent_comment": "2",
            "iscsi_target_extent_type": "Disk",
            "iscsi_target_extent_disk": "zvol/tank/a",
        },
        {"iscsi_target_extent_comment": "3", "iscsi_target_extent_type": "ZVOL"},
    ):
        answer = await api.put("extent/1/", body)
        assert answer.json == {**made, "iscsi_target_extent_comment": body["iscsi_target_extent_comment"]}
    answer = await api.put("extent/1/", {"iscsi_target_extent_disk": "ada2"})
    assert (answer.json["iscsi_target_extent_type"], answer.json["iscsi_target_extent_path"]) == (
        "Disk",
        "/dev/ada2",
    )


@pytest.mark.parametrize(
    "body",
    [
        {"iscsi_target_extent_comment": "c"},
        {"iscsi_target_extent_type": "File"},
        {"iscsi_target_extent_disk": "", "iscsi_target_extent_rpm": "7200"},
    ],
)
async def test_a_change_made_while_another_was_under_way_is_kept(
    api: Api, monkeypatch: pytest.MonkeyPatch, body: dict[str, str]
) -> None:
    """What a PUT does not name it does not write, however long it waited for its turn."""
    await extent(api)
    apply = api.engine.apply

    async def apply_after_another(edit: Edit, **options: Any) -> Configuration:
        def other(config: Configuration) -> Configuration:
            return replace_object(
                config, "extents", replace(config.extents[1], path="/mnt/moved", serial="s")
            )

        await apply(other)
        return await apply(edit, **options)

    monkeypatch.setattr(api.engine, "apply", apply_after_another)
    answer = await api.put("extent/1/", body)
    assert answer.json == {
        **answer.json,
        **{name: value for name, value in body.items() if value},
        "iscsi_target_extent_path": "/mnt/moved",
        "iscsi_target_extent_serial": "s",
    }


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({"iscsi_target_extent_type": "File"}, "iscsi_target_extent_path"),
        ({"iscsi_target_extent_type": "File", "iscsi_target_extent_path": ""}, "iscsi_target_extent_path"),
        ({"iscsi_target_extent_type": "Disk"}, "iscsi_target_extent_disk"),
        ({"iscsi_target_extent_type": "Device"}, "iscsi_target_extent_path"),
    ],
)
async def test_an_extent_needs_a_place(api: Api, sent: dict[str, str], field: str) -> None:
    answer = await api.post("extent/", {"iscsi_target_extent_name": "e", **sent})
    assert (answer.status, answer.json) == (409, {field: [REQUIRED]})


async def test_a_file_extent_has_no_disk(api: Api) -> None:
    answer = await api.post("extent/", {**CREATE["extent"], "iscsi_target_extent_disk": "ada1"})
    assert list(answer.json) == ["iscsi_target_extent_disk"]
    # typed clients send the empty field along
    assert (await api.post("extent/", {**CREATE["extent"], "iscsi_target_extent_disk": ""})).status == 201


async def test_a_disk_that_cannot_be_used_is_told_where_the_client_named_it(api: Api) -> None:
    text = 'Zvol "tank/a" does not exist'
    api.engine.refuse = ConfigError.one("extents", "path", text, 1)
    body = {"iscsi_target_extent_name": "e", "iscsi_target_extent_type": "Disk"}
    answer = await api.post("extent/", {**body, "iscsi_target_extent_disk": "zvol/tank/a"})
    assert answer.json == {"iscsi_target_extent_disk": [text]}


@pytest.mark.parametrize(
    ("sent", "kept", "size"),
    [
        ("10 mb", "10MB", 10 << 20),
        (10485760, "10485760", 10 << 20),
        ("1GiB", "1GiB", 1 << 30),
        ("2T", "2T", 2 << 40),
        ("1024 KB", "1024KB", 1 << 20),
    ],
)
async def test_sizes_are_powers_of_1024_in_the_unit_of_the_client(
    api: Api, sent: object, kept: str, size: int
) -> None:
    made = await extent(api, iscsi_target_extent_filesize=sent)
    assert made["iscsi_target_extent_filesize"] == kept
    assert api.engine.configuration.extents[1].size_bytes == size


async def test_numbers_that_are_texts_stay_texts(api: Api) -> None:
    """Typed clients break otherwise (api-semantics §2, "Output types")."""
    made = await extent(
        api, iscsi_target_extent_rpm=7200, iscsi_target_extent_serial=1234, iscsi_target_extent_filesize=512
    )
    names = ("filesize", "rpm", "serial", "naa")
    assert [type(made[f"iscsi_target_extent_{name}"]) for name in names] == [str] * 4
    assert made["iscsi_target_extent_rpm"] == "7200"
    answer = await api.put("extent/1/", {"iscsi_target_extent_rpm": "unknown"})
    assert answer.json["iscsi_target_extent_rpm"] == "Unknown"


NAA_6, NAA_5 = "0x6589CFC000000A1B2C3D4E5F60718293", "0x5000c500a1b2c3d4"


async def test_identifiers_of_an_extent_never_change(api: Api) -> None:
    made = await extent(api)
    naa, serial = made["iscsi_target_extent_naa"], made["iscsi_target_extent_serial"]
    assert naa.startswith("0x6")
    answer = await api.put("extent/1/", {"iscsi_target_extent_naa": NAA_6})
    assert answer.status == 409
    assert naa in answer.json["iscsi_target_extent_naa"][0]
    body = {"iscsi_target_extent_name": "f", "iscsi_target_extent_legacy": True}
    for same in (naa, naa.upper().replace("X", "x"), "", None):
        answer = await api.put("extent/1/", {**body, "iscsi_target_extent_naa": same})
        assert (answer.status, answer.json["iscsi_target_extent_naa"]) == (202, naa), same
    assert answer.json["iscsi_target_extent_legacy"] is False
    assert not api.engine.configuration.extents[1].serial_given
    answer = await api.put("extent/1/", {"iscsi_target_extent_serial": "mine"})
    assert api.engine.configuration.extents[1].serial_given
    answer = await api.put("extent/1/", {"iscsi_target_extent_serial": ""})
    assert answer.json["iscsi_target_extent_serial"] == serial
    assert not api.engine.configuration.extents[1].serial_given


@pytest.mark.parametrize(
    ("naa", "serial", "shown", "given"),
    [
        (NAA_6, "", "2c3d4e5f60718293", False),
        (NAA_6, "2c3d4e5f60718293", "2c3d4e5f60718293", False),
        (NAA_6, "mine", "mine", True),
        (NAA_5, "", "5000c500a1b2c3d4", False),
    ],
)
async def test_a_rebuilt_extent_gets_the_identifiers_that_it_had(
    api: Api, naa: str, serial: str, shown: str, given: bool
) -> None:
    """A serial number made from the NAA identifier comes back as what it was: nobody's choice."""
    made = await extent(api, iscsi_target_extent_naa=naa, iscsi_target_extent_serial=serial)
    assert made["iscsi_target_extent_naa"] == naa.lower()
    assert made["iscsi_target_extent_serial"] == shown
    assert api.engine.configuration.extents[1].serial_given is given


@pytest.mark.parametrize("naa", ["6589", "0x" + "6" * 31, "0x1" + "0" * 15, "naa.5000c500a1b2c3d4"])
async def test_an_naa_identifier_is_one_of_the_standard(api: Api, naa: str) -> None:
    body = {**FILE, "iscsi_target_extent_name": "e", "iscsi_target_extent_naa": naa}
    answer = await api.post("extent/", body)
    assert (answer.status, list(answer.json)) == (409, ["iscsi_target_extent_naa"])


@pytest.mark.parametrize(
    ("body", "gone"),
    [
        (None, False),
        ({"delete": True}, True),
        ({"delete": "true"}, True),
        ({"delete": False}, False),
        ({}, False),
    ],
)
async def test_the_file_goes_only_when_the_body_says_so(
    api: Api, body: dict[str, Any] | None, gone: bool
) -> None:
    made = await extent(api)
    assert (await api.delete(f"extent/{made['id']}/", body)).status == 204
    assert (made["id"] in api.engine.discarded) is gone


async def test_a_delete_body_is_not_guessed_at_and_never_required(api: Api) -> None:
    made = await extent(api)
    answer = await api.delete(f"extent/{made['id']}/", {"delete": "perhaps"})
    assert (answer.status, answer.json) == (409, {"delete": ["Enter true or false."]})
    assert (await api.request("DELETE", f"extent/{made['id']}/", data="{")).status == 204
    assert api.engine.discarded == set()


# -- authorizedinitiator, portal -----------------------------------------------------------------------


async def test_group_numbers(api: Api) -> None:
    """The lowest free number; a taken one in a POST counts as none, in a PUT as an error (§11)."""
    for resource, field in (
        ("authorizedinitiator", "iscsi_target_initiator_tag"),
        ("portal", "iscsi_target_portal_tag"),
    ):
        tags = [
            (await api.made(f"{resource}/", **body))[field]
            for body in ({}, {field: 9}, {field: 9}, {field: None})
        ]
        assert tags == [2, 9, 3, 4]
        await api.delete(f"{resource}/2/")
        assert (await api.made(f"{resource}/"))[field] == 2
        assert list((await api.put(f"{resource}/3/", {field: 1})).json) == [field]
        assert (await api.put(f"{resource}/3/", {field: None})).json[field] == 9
        assert (await api.put(f"{resource}/3/", {field: "11"})).json[field] == 11


async def test_initiators_are_kept_verbatim_and_networks_put_in_order(api: Api) -> None:
    made = await api.made(
        "authorizedinitiator/",
        iscsi_target_initiator_initiators="iqn.A:x,iqn.b \n!iqn.c",
        iscsi_target_initiator_auth_network="10.0.0.0/8, fe80::/10 all",
        scsi_target_initiator_comment="as the list of parameters spells it",
    )
    assert made["iscsi_target_initiator_initiators"] == "iqn.A:x,iqn.b \n!iqn.c"
    assert made["iscsi_target_initiator_auth_network"] == "10.0.0.0/8\nFE80::/10\nALL"
    assert made["iscsi_target_initiator_comment"] == "as the list of parameters spells it"
    for value in ("10.0.0.0/33", "example.com"):
        answer = await api.put("authorizedinitiator/2/", {"iscsi_target_initiator_auth_network": value})
        assert "not a valid IP address or network" in answer.json["iscsi_target_initiator_auth_network"][0]
    # nothing would mean nobody, null would mean everybody: neither is guessed at
    for value in ("", None):
        answer = await api.put("authorizedinitiator/2/", {"iscsi_target_initiator_initiators": value})
        assert answer.json == {"iscsi_target_initiator_initiators": [REQUIRED]}


async def test_portal_addresses(api: Api) -> None:
    ips = "iscsi_target_portal_ips"
    await api.put("portal/1/", {ips: ["127.0.0.1:3260"]})
    made = await api.made("portal/", **{ips: ["127.0.0.2", "[::1]:3261", "::1:3262"]})
    assert made[ips] == ["127.0.0.2", "[::1]:3261", "::1:3262"]
    # a PUT replaces the list; one that leaves it out keeps it
    assert (await api.put("portal/2/", {"iscsi_target_portal_comment": "c"})).json[ips] == made[ips]
    assert (await api.put("portal/2/", {ips: ["127.0.0.3:3260"]})).json[ips] == ["127.0.0.3:3260"]
    answer = await api.post("portal/", {ips: ["127.0.0.1:3260"]})
    assert answer.json == {"__all__": ["This IP and port are already in use."]}
    for wrong in (["x:3260"], ["127.0.0.9:0"], ["127.0.0.9:70000"], [7], [[]], {"a": 1}, 5):
        answer = await api.post("portal/", {ips: wrong})
        assert (answer.status, list(answer.json)) == (409, [ips]), wrong


# -- authcredential ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer_user", "peer_secret", "message"),
    [
        ("p", "", "The peer secret is required if you set a peer user."),
        ("", "other", "The peer user is required if you set a peer secret."),
        ("p", "secret", "The peer secret cannot be the same as user secret."),
    ],
)
async def test_peer_credentials(api: Api, peer_user: str, peer_secret: str, message: str) -> None:
    answer = await api.post(
        "authcredential/",
        {
            "iscsi_target_auth_user": "u",
            "iscsi_target_auth_secret": "secret",
            "iscsi_target_auth_peeruser": peer_user,
            "iscsi_target_auth_peersecret": peer_secret,
        },
    )
    assert answer.json == {"iscsi_target_auth_peersecret": [message]}


async def test_users_share_a_tag_that_starts_at_1(api: Api) -> None:
    for user in ("a", "b"):
        made = await api.made("authcredential/", iscsi_target_auth_user=user, iscsi_target_auth_secret="s")
        assert made["iscsi_target_auth_tag"] == 1


# -- target and targetgroup ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("Disk1", "disk1"),
        ("iqn.2020-01.com.example:A", "iqn.2020-01.com.example:a"),
        ("eui.0123456789ABCDEF", "eui.0123456789abcdef"),
        (7, "7"),
    ],
)
async def test_target_names_are_lower_case_and_returned_as_stored(api: Api, name: object, kept: str) -> None:
    assert (await api.made("target/", iscsi_target_name=name))["iscsi_target_name"] == kept


async def test_target_names_are_checked_and_unique(api: Api) -> None:
    for name in ("a b", "a_b", "ä"):
        answer = await api.post("target/", {"iscsi_target_name": name})
        assert answer.json == {"iscsi_target_name": ['Use alphanumeric characters, ".", "-" and ":".']}
    await api.made("target/", iscsi_target_name="a", iscsi_target_alias="")
    await api.made("target/", iscsi_target_name="b", iscsi_target_alias="")
    for name in ("a", "A", "iqn.2011-03.org.example.istgt:a"):
        answer = await api.post("target/", {"iscsi_target_name": name})
        assert (answer.status, answer.json) == (409, {"iscsi_target_name": ["Target name already exists"]})


async def test_a_flat_target_is_a_target_with_a_grant(api: Api) -> None:
    """§5.8: the flat fields are those of the first grant."""
    target = await api.made(
        "target/", iscsi_target_name="t", iscsi_target_portalgroup="1", iscsi_target_initiatorgroup=1
    )
    (group,) = (await api.get("targetgroup/")).json
    assert group == {
        "id": 1,
        "iscsi_target": target["id"],
        "iscsi_target_portalgroup": 1,
        "iscsi_target_initiatorgroup": 1,
        "iscsi_target_authtype": "Auto",
        "iscsi_target_authgroup": None,
        "iscsi_target_initialdigest": "Auto",
    }
    # the same grant again is the duplicate that clients look for
    answer = await api.post("targetgroup/", {"iscsi_target": 1, "iscsi_target_portalgroup": 1})
    assert answer.status == 409
    assert answer.json == {"iscsi_target_portalgroup": ["Portal 1 cannot be duplicated on a target"]}
    # writing either is seen in the other
    await api.put("target/1/", {"iscsi_target_authtype": "None", "iscsi_target_initiatorgroup": None})
    (group,) = (await api.get("targetgroup/")).json
    assert (group["iscsi_target_authtype"], group["iscsi_target_initiatorgroup"]) == ("None", None)
    await api.put("targetgroup/1/", {"iscsi_target_authtype": "Auto", "iscsi_target_initiatorgroup": "1"})
    assert (await api.get("target/1/")).json == target
    await api.delete("targetgroup/1/")
    shown = (await api.get("target/1/")).json
    assert [
        shown[f"iscsi_target_{name}"] for name in ("portalgroup", "initiatorgroup", "authtype", "authgroup")
    ] == [None] * 4
    # and a later write of the flat fields grants anew
    assert (await api.put("target/1/", {"iscsi_target_portalgroup": 1})).status == 202
    assert [group["id"] for group in (await api.get("targetgroup/")).json] == [2]


async def test_a_grant_needs_a_portal_group(api: Api) -> None:
    answer = await api.post("target/", {"iscsi_target_name": "t", "iscsi_target_initiatorgroup": 1})
    assert answer.json == {"iscsi_target_portalgroup": [REQUIRED]}
    await api.made("target/", iscsi_target_name="t", iscsi_target_portalgroup=1)
    for field in ("iscsi_target_portalgroup", "iscsi_target_authtype"):
        assert (await api.put("target/1/", {field: None})).json == {field: [REQUIRED]}
    # and all else that is wrong is told with it
    both = await api.post("target/", {"iscsi_target_name": "t", "iscsi_target_initiatorgroup": 9})
    assert both.json == {
        "iscsi_target_portalgroup": [REQUIRED],
        "iscsi_target_initiatorgroup": [choice(9)],
        "iscsi_target_name": ["Target name already exists"],
    }


@pytest.mark.parametrize(
    ("sent", "errors"),
    [
        ({"iscsi_target_portalgroup": 9}, {"iscsi_target_portalgroup": [choice(9)]}),
        (
            {"iscsi_target_portalgroup": 1, "iscsi_target_initiatorgroup": 9},
            {"iscsi_target_initiatorgroup": [choice(9)]},
        ),
        (
            {"iscsi_target_portalgroup": 1, "iscsi_target_authtype": "CHAP"},
            {
                "iscsi_target_authgroup": [
                    "This field is required if the authentication method is set to CHAP or CHAP Mutual."
                ]
            },
        ),
        (
            {"iscsi_target_portalgroup": 1, "iscsi_target_authtype": "CHAP", "iscsi_target_authgroup": 3},
            {"iscsi_target_authgroup": [choice(3)]},
        ),
        (
            {"iscsi_target_queue_depth": 256},
            {"iscsi_target_queue_depth": ["This value must be between 0 and 255, inclusive."]},
        ),
        (
            {"iscsi_target_error_recovery_level": 3},
            {"iscsi_target_error_recovery_level": ["This value must be between 0 and 2, inclusive."]},
        ),
        ({"iscsi_target_logical_blocksize": 500}, {"iscsi_target_logical_blocksize": [choice(500)]}),
        ({"iscsi_target_flags": "wo"}, {"iscsi_target_flags": [choice("wo")]}),
        ({"iscsi_target_mode": "fc"}, {"iscsi_target_mode": [choice("fc")]}),
        ({"iscsi_target_mode": "both"}, {"iscsi_target_mode": [choice("both")]}),
    ],
)
async def test_bad_targets(api: Api, sent: dict[str, Any], errors: dict[str, list[str]]) -> None:
    answer = await api.post("target/", {"iscsi_target_name": "t", **sent})
    assert (answer.status, answer.json) == (409, errors)
    assert api.engine.configuration.targets == {}


@pytest.mark.parametrize("nothing", [None, "", "null", -1, 0, "-1"])
async def test_no_auth_group_in_every_spelling(api: Api, nothing: object) -> None:
    await api.made("target/", iscsi_target_name="t")
    group = await api.made(
        "targetgroup/",
        iscsi_target="1",
        iscsi_target_portalgroup="1",
        iscsi_target_initiatorgroup="" if nothing in (-1, 0, "-1") else nothing,
        iscsi_target_authtype="",
        iscsi_target_authgroup=nothing,
        iscsi_target_initialdigest="CHAP",
    )
    assert group["iscsi_target_authgroup"] is None
    assert group["iscsi_target_initiatorgroup"] is None
    assert group["iscsi_target_authtype"] == "None"
    assert group["iscsi_target_initialdigest"] == "CHAP"


async def test_target_serials(api: Api) -> None:
    """``10000000 + id`` as istgt had it; equals the specification's sample (§5.5)."""
    for name in ("a", "b"):
        await api.made("target/", iscsi_target_name=name)
    assert (await api.get("target/2/")).json["iscsi_target_serial"] == "10000002"
    assert (await api.put("target/2/", {"iscsi_target_serial": "x"})).json["iscsi_target_serial"] == "x"
    assert api.engine.configuration.targets[2].serial_given
    assert (await api.put("target/2/", {"iscsi_target_serial": ""})).json["iscsi_target_serial"] == "10000002"


async def test_a_target_serial_of_istgts_rule_was_chosen_by_nobody(api: Api) -> None:
    """FreeNAS gave that of id 1 to all, clients send it back, and imports bring that of another id."""
    made = await api.made("target/", iscsi_target_name="a", iscsi_target_serial="10000007")
    assert made["iscsi_target_serial"] == "10000007"
    assert not api.engine.configuration.targets[1].serial_given


# -- targettoextent ------------------------------------------------------------------------------------


async def test_lun_numbers(api: Api) -> None:
    """§6.5: settled at creation, the lowest free one of the target; unique within the target only."""
    for name in ("a", "b"):
        await api.made("target/", iscsi_target_name=name)
    for name in ("a", "b", "c", "d"):
        await extent(api, name)
    luns = []
    for target, number, lun in ((1, 1, 1), (1, 2, None), (1, 3, ""), (2, 1, "1"), (2, 2, "null")):
        made = await api.made("targettoextent/", iscsi_target=target, iscsi_extent=number, iscsi_lunid=lun)
        luns.append(made["iscsi_lunid"])
    assert luns == [1, 0, 2, 1, 0]
    answer = await api.post("targettoextent/", {"iscsi_target": 1, "iscsi_extent": 4, "iscsi_lunid": 1})
    assert (answer.status, answer.json) == (
        409,
        {"iscsi_lunid": ["LUN ID is already being used for this target."]},
    )
    answer = await api.post("targettoextent/", {"iscsi_target": 1, "iscsi_extent": 1, "iscsi_lunid": 7})
    assert (answer.status, answer.json) == (409, {"iscsi_target": ["Extent is already in this target."]})
    for wrong in (-1, 100000):
        answer = await api.post(
            "targettoextent/", {"iscsi_target": 1, "iscsi_extent": 4, "iscsi_lunid": wrong}
        )
        assert answer.json["iscsi_lunid"][0].startswith("LUN ID must be a positive integer")
    answer = await api.post("targettoextent/", {"iscsi_target": 8, "iscsi_extent": "9"})
    assert answer.json == {"iscsi_target": [choice(8)], "iscsi_extent": [choice(9)]}
    assert (await api.post("targettoextent/", {})).json == {
        "iscsi_target": [REQUIRED],
        "iscsi_extent": [REQUIRED],
    }
    # a PUT without a number keeps it
    assert (await api.put("targettoextent/1/", {"iscsi_lunid": None})).json["iscsi_lunid"] == 1


# -- References ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deleted", "gone", "left"),
    [
        ("extent", {"targettoextent"}, {"target", "targetgroup"}),
        ("target", {"targettoextent", "targetgroup"}, {"extent"}),
        ("targettoextent", set(), {"target", "extent", "targetgroup"}),
        ("targetgroup", set(), {"target", "extent", "targettoextent"}),
        ("portal", {"targetgroup"}, {"target", "extent", "targettoextent"}),
        ("authorizedinitiator", {"targetgroup"}, {"target", "extent", "targettoextent"}),
    ],
)
async def test_what_a_delete_takes_along(api: Api, deleted: str, gone: set[str], left: set[str]) -> None:
    """§6.4. What is gone is 404 (§11); but what a cascade can take is gone as a later DELETE asks for, as
    clients that delete an extent and then its LUN fail unless both succeed."""
    await disk(api)
    assert (await api.delete(f"{deleted}/1/")).status == 204
    for name in {deleted} | gone:
        assert (await api.get(f"{name}/1/")).status == 404
        dependent = name in ("targettoextent", "targetgroup")
        assert (await api.delete(f"{name}/1/")).status == (204 if dependent else 404)
        for never in (0, 2, 4711):
            assert (await api.delete(f"{name}/{never}/")).status == 404
    for name in left:
        assert (await api.get(f"{name}/1/")).status == 200


async def test_a_deleted_credential_leaves_the_grant_with_its_tag(api: Api) -> None:
    """§6.4: references are tags and may dangle; the unmodified grant can still be written."""
    await api.made(
        "authcredential/", iscsi_target_auth_user="u", iscsi_target_auth_secret="s", iscsi_target_auth_tag=5
    )
    await api.made(
        "target/",
        iscsi_target_name="t",
        iscsi_target_portalgroup=1,
        iscsi_target_authtype="CHAP",
        iscsi_target_authgroup=5,
    )
    assert (await api.delete("authcredential/1/")).status == 204
    body = (await api.get("target/1/")).json
    assert body["iscsi_target_authgroup"] == 5
    assert (await api.put("target/1/", body)).status == 202


# -- The neighbours ------------------------------------------------------------------------------------


async def test_the_service_is_found_by_name_and_id_and_switched(api: Api) -> None:
    base = "/api/v1.0/services/services/"
    service = (await api.get(f"{base}iscsitarget/")).json
    assert service == {"id": 1, "srv_service": "iscsitarget", "srv_enable": True, "srv_state": "RUNNING"}
    assert (await api.get(f"{base}1/")).json == service
    assert (await api.get(base)).json == [service]
    answer = await api.put(f"{base}iscsitarget/", {"srv_enable": "False"})
    assert (answer.status, answer.json) == (200, {**service, "srv_enable": False, "srv_state": "STOPPED"})
    assert (await api.put(f"{base}1/", {"srv_enable": True})).json == service
    assert (await api.put(f"{base}iscsitarget/", {})).json == {"srv_enable": [REQUIRED]}
    assert (await api.put(f"{base}iscsitarget/", {"srv_enable": "x"})).status == 409


async def test_the_version_is_one_that_clients_can_take_apart(api: Api) -> None:
    answer = await api.get("/api/v1.0/system/version/")
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json["name"] == "FreeNAS"
    assert answer.json["fullversion"].startswith(f"FreeNAS-{answer.json['version']}-")


def session(number: int) -> SessionStatus:
    return SessionStatus(
        id=number,
        initiator_name="iqn.2020-01.com.example:host",
        initiator_alias="",
        target_id=1,
        target_name="iqn.2011-03.org.example.istgt:t",
        target_portal_group_tag=1,
        isid="0x00023d000001",
        tsih=number,
        user="",
        connections=(
            ConnectionStatus(
                cid=0,
                peer_address="127.0.0.1:4000",
                local_address="127.0.0.1:3260",
                header_digest="None",
                data_digest="CRC32C",
            ),
        ),
        negotiated={"MaxBurstLength": 262144},
        luns=(0, 1),
        commands=7,
        bytes_read=512,
        bytes_written=0,
        age_s=1.5,
        idle_s=0.5,
    )


async def test_sessions_are_listed_and_ended(api: Api) -> None:
    assert (await api.get("session/")).json == []
    api.engine.open_sessions = {number: session(number) for number in (4, 2)}
    answer = await api.get("session/")
    assert [body["id"] for body in answer.json] == [2, 4]
    assert answer.headers["Content-Range"] == "items 0-1/2"
    shown = (await api.get("session/4/")).json
    assert shown["connections"][0]["data_digest"] == "CRC32C"
    assert (shown["luns"], shown["negotiated"]) == ([0, 1], {"MaxBurstLength": 262144})
    assert (await api.post("session/4/negotiate/", None)).status == 202
    assert (await api.post("session/5/negotiate/", None)).status == 404
    assert api.engine.negotiated == [4, 5]
    assert (await api.delete("session/4")).status == 204
    assert (await api.delete("session/4")).status == 404


FORCE = [("extent/1/", "iscsi_target_extent_comment"), ("target/1/", "iscsi_target_alias")]


@pytest.mark.parametrize(("path", "field"), FORCE)
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_what_sessions_rely_on_is_changed_by_force_alone(
    api: Api, path: str, field: str, method: str
) -> None:
    """Whether it has to be is the engine's answer."""
    await api.post("extent/", CREATE["extent"])
    await api.post("target/", {"iscsi_target_name": "forced"})
    for query, forced in (("", 0), ("?force=0", 0), ("?force=false", 0), ("?force=1", 1), ("?force=true", 2)):
        answer = await api.request(method, path + query, {field: f"x{query.strip('?')}"})
        assert (answer.status, api.engine.forced) == (202, forced)
    answer = await api.request(method, f"{path}?force=perhaps", {field: "y"})
    assert answer.status == 400
    assert answer.json == {"error": "Invalid force 'perhaps' provided. Use 1 or 0."}
    document = (await api.request("GET", "/api/v1.0/openapi.json")).json
    places = document["paths"]["/api/v1.0/services/iscsi/" + path.replace("1", "{id}")]
    assert {"$ref": "#/components/parameters/force"} in places[method.lower()]["parameters"]


async def test_entries_of_an_initiator_group_that_can_never_match_are_told_in_the_answer(api: Api) -> None:
    made = await api.post(
        "authorizedinitiator/", {"iscsi_target_initiator_initiators": "iqn.2026-11.com.example:*"}
    )
    assert made.status == 201
    assert "can match no initiator" in made.json["iscsi_target_initiator_warning"]
    changed = await api.put(
        f"authorizedinitiator/{made.json['id']}/", {"iscsi_target_initiator_initiators": "ALL"}
    )
    assert changed.json["iscsi_target_initiator_warning"] == ""
