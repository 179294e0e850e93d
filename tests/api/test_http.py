"""How the API speaks HTTP, whatever the resource (api-semantics §2, §2.1, §3)."""

import asyncio
import base64
import json
import logging

import pytest

import api.auth
from api.auth import Account, Authenticator, hash_password, verify_password
from api.errors import TooManyFailuresError, UnauthorizedError
from api.server import unfold
from targetd.config import ConfigError
from tests.api.conftest import BASE, PASSWORD, Api, basic

TOKEN = base64.b64encode(f"root:{PASSWORD}".encode()).decode()


async def exchange(api: Api, text: str, *, until: bytes = b"\r\n\r\n", reads: int = 1) -> bytes:
    """Send bytes as they are; what came back up to ``reads`` times ``until``."""
    reader, writer = await asyncio.open_connection(api.server.host, api.server.port)
    writer.write(text.encode())
    await writer.drain()
    received = b"".join([await reader.readuntil(until) for _ in range(reads)])
    writer.close()
    await writer.wait_closed()
    return received


# -- URLs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        f"{BASE}target/",
        f"{BASE}target",
        f"{BASE}target//",
        f"/{BASE}target/",
        "//api/v1.0//services///iscsi/target//",
        f"{BASE}target/?format=json",
        f"{BASE}target?format=json&",
    ],
)
async def test_every_spelling_of_a_url_is_served_directly_for_every_method(api: Api, path: str) -> None:
    created = await api.post(path, {"iscsi_target_name": "t"})
    assert created.status == 201
    listed = await api.get(path)
    assert [body["id"] for body in listed.json] == [created.json["id"]]
    object_path = path.partition("?")[0].rstrip("/") + f"/{created.json['id']}"
    assert (await api.put(object_path, {"iscsi_target_alias": "a"})).status == 202
    assert (await api.delete(object_path)).status == 204


async def test_location_names_the_new_object_and_leads_to_it(api: Api) -> None:
    answer = await api.post("target/", {"iscsi_target_name": "t"})
    location = answer.headers["Location"]
    assert location == f"http://{api.server.host}:{api.server.port}{BASE}target/{answer.json['id']}/"
    assert (await api.get(location.partition(str(api.server.port))[2])).json == answer.json


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("target/9", 404),
        ("target/x", 404),
        ("target/-1", 404),
        ("target/1/2", 404),
        ("nothing/", 404),
        ("/", 404),
        ("/api/v1.0/storage/snapshot/", 404),
        ("target/99999999999999999999999999", 404),
        ("/api/v1.0/services/services/cifs/", 404),
        ("session/7", 404),
    ],
)
async def test_what_is_not_there_is_404_with_an_empty_body(api: Api, path: str, status: int) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = await api.request(method, path, {} if method == "PUT" else None)
        if answer.status != 405:
            assert (answer.status, answer.raw) == (status, b""), method


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "target/", "GET, HEAD, OPTIONS, POST"),
        ("DELETE", "target/", "GET, HEAD, OPTIONS, POST"),
        ("PATCH", "extent/", "GET, HEAD, OPTIONS, POST"),
        ("POST", "target/1/", "DELETE, GET, HEAD, OPTIONS, PATCH, PUT"),
        ("POST", "globalconfiguration/", "GET, HEAD, OPTIONS, PUT"),
        ("DELETE", "globalconfiguration/1/", "GET, HEAD, OPTIONS, PUT"),
        ("PATCH", "globalconfiguration/", "GET, HEAD, OPTIONS, PUT"),
        ("PROPFIND", "target/", "GET, HEAD, OPTIONS, POST"),
        ("PUT", "session/", "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_method_that_is_not_there_is_405_and_says_what_is(
    api: Api, method: str, path: str, allow: str
) -> None:
    answer = await api.request(method, path, {})
    assert (answer.status, answer.raw, answer.headers["Allow"]) == (405, b"", allow)
    options = await api.request("OPTIONS", path)
    assert (options.status, options.headers["Allow"]) == (200, allow)


async def test_head_is_get_without_the_body(api: Api) -> None:
    answer = await api.request("HEAD", "portal/")
    get = await api.get("portal/")
    assert (answer.status, answer.raw) == (200, b"")
    assert answer.headers["Content-Length"] == get.headers["Content-Length"]
    assert answer.headers["Content-Range"] == get.headers["Content-Range"]


# -- Lists ---------------------------------------------------------------------------------------------


async def fill(api: Api, count: int) -> None:
    for number in range(count):
        await api.made("target/", iscsi_target_name=f"t{number:02}", iscsi_target_queue_depth=number % 3)


@pytest.mark.parametrize(
    ("query", "first", "length", "shown"),
    [
        ("", 0, 30, "items 0-29/35"),
        ("limit=0", 0, 35, "items 0-34/35"),
        ("limit=1000", 0, 35, "items 0-34/35"),
        ("limit=99999&format=json", 0, 35, "items 0-34/35"),
        ("limit=99999999999999999999", 0, 35, "items 0-34/35"),
        ("limit=10&offset=30", 30, 5, "items 30-34/35"),
        ("offset=20", 20, 15, "items 20-34/35"),
        ("limit=5&offset=100", 100, 0, "items 100-99/35"),
        ("unknown=1", 0, 30, "items 0-29/35"),
    ],
)
async def test_pages(api: Api, query: str, first: int, length: int, shown: str) -> None:
    await fill(api, 35)
    answer = await api.get(f"target/?{query}")
    names = [body["iscsi_target_name"] for body in answer.json]
    assert names == [f"t{number:02}" for number in range(first, first + length)]
    assert answer.headers["Content-Range"] == shown


async def test_an_empty_list_and_the_range_header(api: Api) -> None:
    assert (await api.get("target/")).headers["Content-Range"] == "items 0--1/0"
    await fill(api, 5)
    answer = await api.get("target/", headers={"Range": "items=1-2"})
    assert [body["id"] for body in answer.json] == [2, 3]
    assert answer.headers["Content-Range"] == "items 1-2/5"


@pytest.mark.parametrize(
    "query", ["limit=x", "limit=-1", "offset=-2", "offset=1.5", "limit=", "sort(nothing)"]
)
async def test_bad_paging_and_sorting_is_400_with_a_reason(api: Api, query: str) -> None:
    answer = await api.get(f"target/?{query}")
    assert answer.status == 400
    assert answer.json["error"]


async def test_limit_on_a_detail_url_is_ignored(api: Api) -> None:
    assert (await api.get("portal/1/?limit=x")).status == 200


async def test_sorting_by_several_fields_in_either_direction(api: Api) -> None:
    await fill(api, 6)
    answer = await api.get("target/?sort(iscsi_target_queue_depth,-id)")
    found = [(body["iscsi_target_queue_depth"], body["id"]) for body in answer.json]
    assert found == sorted(found, key=lambda pair: (pair[0], -pair[1]))
    answer = await api.get("target/?sort(-iscsi_target_name)&limit=1")
    assert answer.json[0]["iscsi_target_name"] == "t05"


async def test_default_orders(api: Api) -> None:
    """Extents and targets by name, LUNs by target and number, the rest by id (api-semantics §2)."""
    for name in ("b", "a"):
        await api.made("target/", iscsi_target_name=name)
        path = f"/mnt/{name}"
        await api.made(
            "extent/",
            iscsi_target_extent_name=name,
            iscsi_target_extent_type="File",
            iscsi_target_extent_path=path,
            iscsi_target_extent_filesize="1MB",
        )
    for target, extent, lun in ((2, 1, 5), (2, 2, 1), (1, 1, 9)):
        await api.made("targettoextent/", iscsi_target=target, iscsi_extent=extent, iscsi_lunid=lun)
    assert [body["iscsi_target_name"] for body in (await api.get("target/")).json] == ["a", "b"]
    assert [body["iscsi_target_extent_name"] for body in (await api.get("extent/")).json] == ["a", "b"]
    luns = (await api.get("targettoextent/")).json
    assert [(body["iscsi_target"], body["iscsi_lunid"]) for body in luns] == [(1, 9), (2, 1), (2, 5)]


async def test_a_query_key_that_is_a_field_filters_by_its_value(api: Api) -> None:
    await fill(api, 6)
    answer = await api.get("target/?iscsi_target_queue_depth=1")
    assert [body["id"] for body in answer.json] == [2, 5]
    assert answer.headers["Content-Range"] == "items 0-1/2"


# -- Bodies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "nonsense",
        "[]",
        '"text"',
        "null",
        "7",
        '{"a": NaN}',
        '{"a": 1}}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"id": ' + "9" * 5000 + "}",
        b'{"a": "\xff"}',
    ],
)
async def test_a_body_that_is_no_json_object_is_400_with_a_reason(api: Api, body: str | bytes) -> None:
    answer = await api.request("POST", "target/", data=body, headers={"Content-Type": "application/json"})
    assert answer.status == 400
    assert answer.json["error"]
    assert api.engine.applied == 0


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml"])
async def test_another_content_type_is_400(api: Api, kind: str) -> None:
    answer = await api.request(
        "POST", "target/", data='{"iscsi_target_name": "t"}', headers={"Content-Type": kind}
    )
    assert answer.status == 400
    assert answer.json["error_message"].startswith("The format indicated")


@pytest.mark.parametrize(
    ("headers", "data"),
    [
        ({}, b'{"iscsi_target_name": "t"}'),
        ({"Content-Type": "application/json; charset=UTF-8"}, b'{"iscsi_target_name": "t"}'),
        ({"Content-Type": "Application/JSON"}, b'\xef\xbb\xbf{"iscsi_target_name": "t"}'),
        ({"Content-Type": "application/json; charset=utf-16"}, '{"iscsi_target_name": "t"}'.encode("utf-16")),
        ({"Content-Type": "application/json"}, b'{"iscsi_target_name": "t",\n}'),
    ],
)
async def test_json_in_every_dress_is_read(api: Api, headers: dict[str, str], data: bytes) -> None:
    assert (await api.request("POST", "target/", data=data, headers=headers)).status == 201


async def test_a_comma_within_a_text_survives_the_mending_of_trailing_commas(api: Api) -> None:
    data = '{"iscsi_target_portal_comment": "a,} \\",]",}'
    answer = await api.request("POST", "portal/", data=data)
    assert answer.json["iscsi_target_portal_comment"] == 'a,} ",]'


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b'{"a":"' + rb"\"" * 15_000 + b",", id="a string without an end"),
        pytest.param(b'{"a":"' + rb"\"" * 500_000 + b",", id="a long one"),
        pytest.param(b'{"a":' + b'"' * 30_000, id="quotes"),
        pytest.param(b"[" + b"," * 1_000_000, id="commas"),
        pytest.param(b'{"a":1' + (b"," + b" " * 200) * 150, id="commas and blanks"),
        pytest.param(b'{"a":"\\', id="a backslash at the end"),
        pytest.param(b"[" * 1_000_000, id="brackets"),
    ],
)
async def test_what_is_no_json_is_found_out_in_linear_time(api: Api, data: bytes) -> None:
    """In more than linear time this would not end."""
    answer = await api.request("POST", "target/", data=data)
    assert answer.status == 400
    assert "not valid JSON" in answer.json["error"]


@pytest.mark.parametrize(
    "charset", ["punycode", "idna", "unicode_escape", "utf-7", "rot13", "nonesuch", "mbcs"]
)
async def test_a_charset_that_json_is_not_written_in_is_400_and_names_those_that_are(
    api: Api, charset: str
) -> None:
    headers = {"Content-Type": f"application/json; charset={charset}"}
    answer = await api.request("POST", "target/", data=b"a-" * 400_000, headers=headers)
    assert answer.status == 400
    assert "utf-8" in answer.json["error"]


async def test_a_body_larger_than_the_limit_is_413(api: Api) -> None:
    data = json.dumps({"iscsi_target_name": "x" * (2 << 20)})
    answer = await api.request("POST", "target/", data=data)
    assert answer.status == 413
    assert answer.json["error"]


async def test_every_answer_varies_by_accept_and_is_not_kept(api: Api) -> None:
    """Bodies hold CHAP secrets."""
    for path in ("target/", "target/9/", "/api/docs", "/healthz"):
        headers = (await api.get(path)).headers
        assert headers["Vary"] == "Accept"
        assert headers["Cache-Control"] == "no-store"


async def test_expect_100_continue_is_answered(api: Api) -> None:
    body = b'{"iscsi_maxsesh": 17}'
    reader, writer = await asyncio.open_connection(api.server.host, api.server.port)
    writer.write(
        f"PUT {BASE}globalconfiguration/ HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {TOKEN}\r\n"
        f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
    writer.write(body)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202")
    writer.close()


# -- Who is asking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        basic("root", "wrong"),
        basic("root", ""),
        basic("admin", PASSWORD),
        basic("", ""),
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"no colon").decode(),
        f"Bearer {TOKEN}",
        f"Token {TOKEN}",
        TOKEN,
        "Basic " + "A" * 4000,
    ],
)
async def test_without_the_right_password_there_is_only_a_challenge(
    api: Api, authorization: str | None
) -> None:
    """Before the method, the URL and the body are looked at (api-semantics §2.1)."""
    api.authorization = authorization
    for method, path in (("GET", "target/"), ("DELETE", "target/"), ("POST", "nothing/"), ("PROPFIND", "/")):
        answer = await api.request(method, path, data="{")
        assert (answer.status, answer.raw) == (401, b"")
        assert answer.headers["WWW-Authenticate"].startswith('Basic Realm="')
        if authorization is not None:
            break  # more wrong passwords are another test's subject


@pytest.mark.parametrize(
    "authorization",
    [f"basic {TOKEN}", f"BASIC   {TOKEN}", f"Basic {TOKEN[:9]} {TOKEN[9:]}", f"Basic {TOKEN} "],
)
async def test_scheme_and_token_are_read_generously(api: Api, authorization: str) -> None:
    api.authorization = authorization
    assert (await api.get("target/")).status == 200


async def test_a_token_broken_into_header_lines_is_read(api: Api) -> None:
    """Perl's encode_base64 breaks lines; its HTTP library folds the header (api-semantics §3)."""
    for fold in ("\r\n ", "\r\n\t", "\r\n  \r\n "):
        folded = f"{TOKEN[:10]}{fold}{TOKEN[10:]}"
        request = (
            f"GET {BASE}target/ HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {folded}\r\nAccept: */*\r\n\r\n"
        )
        assert (await exchange(api, request)).startswith(b"HTTP/1.1 200")


def test_only_folds_of_the_authorization_header_are_replaced() -> None:
    cases = {
        b"GET / HTTP/1.1\r\nAuthorization: Basic YQ\r\n ==\r\nA: b\r\n\r\n": (
            b"GET / HTTP/1.1\r\nAuthorization: Basic YQ   ==\r\nA: b\r\n\r\n"
        ),
        b"POST / HTTP/1.1\r\nA: b\r\n c\r\n\r\n{\r\n  }": b"POST / HTTP/1.1\r\nA: b\r\n c\r\n\r\n{\r\n  }",
        b"A: b\r\nAuthorization: x\r\n\r\n  body": b"A: b\r\nAuthorization: x\r\n\r\n  body",
    }
    for data, expected in cases.items():
        assert unfold(data) == expected
        assert len(unfold(data)) == len(data)


async def test_a_malformed_request_is_neither_quoted_nor_logged(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    request = f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Basic {TOKEN}\r\nX bad: {TOKEN}\r\n\r\n"
    answer = await exchange(api, request, until=b"}")
    assert b" 400 " in answer
    assert TOKEN.encode() not in answer
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    "line", ["GET /" + "a" * 9000 + " HTTP/1.1\r\nHost: x", "GET / HTTP/1.1\r\nX: " + "a" * 9000]
)
async def test_request_line_and_headers_are_bounded(api: Api, line: str) -> None:
    assert b" 400 " in await exchange(api, f"{line}\r\n\r\n")


async def test_a_read_only_user_reads_and_does_not_write(api: Api) -> None:
    api.authorization = basic("viewer", PASSWORD)
    assert (await api.get("target/")).status == 200
    answer = await api.post("target/", {"iscsi_target_name": "t"})
    assert answer.status == 403
    assert answer.json["error"]
    assert api.engine.applied == 0


async def test_health_needs_no_login(api: Api) -> None:
    api.authorization = None
    answer = await api.get("/healthz")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


def test_a_password_is_kept_as_a_salted_hash_only() -> None:
    first, second = hash_password("secret"), hash_password("secret")
    assert first != second
    assert "secret" not in first
    assert verify_password("secret", first)
    assert not verify_password("Secret", first)
    with pytest.raises(ValueError, match="may not be empty"):
        hash_password("")
    with pytest.raises(ValueError, match="not a password hash"):
        verify_password("secret", "plain")


class Clock:
    """Seconds, as told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def root() -> Account:
    return Account("root", hash_password(PASSWORD))


async def test_an_address_that_guesses_has_to_wait_and_others_do_not(root: Account) -> None:
    clock = Clock()
    authenticator = Authenticator({"root": root}, now=clock)
    right, wrong = basic("root", PASSWORD), basic("root", "wrong")
    await authenticator.login(right, "192.0.2.1")
    for _ in range(10):
        with pytest.raises(UnauthorizedError):
            await authenticator.login(wrong, "192.0.2.1")
    with pytest.raises(TooManyFailuresError) as refusal:
        await authenticator.login(wrong, "192.0.2.1")
    assert 1 <= int(refusal.value.headers()["Retry-After"]) <= 61
    # whoever was known before is not disturbed by a neighbour's guessing, nor is another address
    assert await authenticator.login(right, "192.0.2.1") is root
    with pytest.raises(UnauthorizedError):
        await authenticator.login(wrong, "192.0.2.2")
    clock.now += 61
    with pytest.raises(UnauthorizedError):
        await authenticator.login(wrong, "192.0.2.1")


async def test_too_many_failures_are_429_on_the_wire(api: Api) -> None:
    api.authorization = basic("root", "wrong")
    statuses = [(await api.get("target/")).status for _ in range(11)]
    assert statuses == [401] * 10 + [429]


async def test_a_changed_password_counts_at_once(root: Account) -> None:
    authenticator = Authenticator({"root": root})
    await authenticator.login(basic("root", PASSWORD), "::1")
    authenticator.replace_accounts({"root": Account("root", hash_password("new"))})
    with pytest.raises(UnauthorizedError):
        await authenticator.login(basic("root", PASSWORD), "::1")
    assert (await authenticator.login(basic("root", "new"), "::1")).name == "root"


async def test_a_password_is_hashed_once_and_then_known(
    root: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash takes tens of milliseconds; clients send their password with every request."""
    hashed: list[str] = []

    def counting(password: str, password_hash: str) -> bool:
        hashed.append(password)
        return verify_password(password, password_hash)

    monkeypatch.setattr(api.auth, "verify_password", counting)
    authenticator = Authenticator({"root": root})
    header = basic("root", PASSWORD)
    await asyncio.gather(*(authenticator.login(header, "::1") for _ in range(200)))
    for _ in range(1000):
        await authenticator.login(header, "::1")
    assert hashed == [PASSWORD]


# -- What goes wrong inside ----------------------------------------------------------------------------


async def test_a_bug_is_500_without_details_and_is_logged(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.engine.refuse = RuntimeError("the detail")
    answer = await api.post("target/", {"iscsi_target_name": "t"})
    assert answer.status == 500
    assert set(answer.json) == {"error_message"}
    assert b"detail" not in answer.raw
    assert "the detail" in caplog.text


async def test_what_the_engine_refuses_is_told_by_field(api: Api) -> None:
    """A path that cannot be used is found by the engine, not by the model (api-semantics §6.2)."""
    text = "The file must exist if the extent size is set to auto (0)"
    api.engine.refuse = ConfigError.one("extents", "path", text, 1)
    body = {
        "iscsi_target_extent_name": "e",
        "iscsi_target_extent_type": "File",
        "iscsi_target_extent_path": "/mnt/e",
    }
    answer = await api.post("extent/", body)
    assert (answer.status, answer.json) == (409, {"iscsi_target_extent_path": [text]})
    assert api.engine.configuration.extents == {}


async def test_secrets_are_returned_and_never_logged(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret, peer = "an-odd-secret-indeed", "its-odd-partner"
    made = await api.made(
        "authcredential/",
        iscsi_target_auth_user="u",
        iscsi_target_auth_secret=secret,
        iscsi_target_auth_peeruser="p",
        iscsi_target_auth_peersecret=peer,
    )
    assert made["iscsi_target_auth_secret"] == secret
    answer = await api.put(f"authcredential/{made['id']}/", {"iscsi_target_auth_peersecret": secret})
    assert answer.status == 409
    answer = await api.put(f"authcredential/{made['id']}/", {"iscsi_target_auth_secret": secret * 20})
    assert answer.status == 409
    assert secret.encode() not in answer.raw
    assert secret not in caplog.text
    assert peer not in caplog.text
    assert PASSWORD not in caplog.text
