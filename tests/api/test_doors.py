"""Who gets in by which door: pages of other sites, guessed passwords, and what read-only users are told."""

import asyncio
from typing import Any

import pytest

import api.auth
from api.auth import Account, Authenticator, hash_password, verify_password
from api.errors import BusyError, TooManyFailuresError, UnauthorizedError
from api.origin import is_foreign
from tests.api.conftest import PASSWORD, Api, basic

# -- Pages of other sites ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "scheme", "host", "foreign"),
    [
        ("http://nas:8080", "http", "nas:8080", False),
        ("http://NAS:8080", "http", "nas:8080", False),
        ("http://nas", "http", "nas", False),
        ("http://nas", "http", "nas:80", False),
        ("http://nas.", "http", "nas", False),
        ("https://nas", "https", "nas:443", False),
        ("https://nas", "http", "nas", False),  # a proxy ends TLS
        ("http://[2001:db8::1]:8080", "http", "[2001:db8::1]:8080", False),
        ("http://nas:8081", "http", "nas:8080", True),
        ("http://nas", "https", "nas", True),  # in clear, on the way to an API with TLS
        ("http://evil.example", "http", "nas", True),
        ("http://nas.evil.example", "http", "nas", True),
        ("http://nas:8080@evil.example", "http", "nas:8080", True),
        ("null", "http", "nas", True),
        ("", "http", "nas", True),
        ("file://", "http", "nas", True),
        ("chrome-extension://abc", "http", "nas", True),
        ("http://nas:99999", "http", "nas", True),
        ("http://", "http", "", True),
    ],
)
def test_an_origin_is_this_api_or_it_is_foreign(origin: str, scheme: str, host: str, foreign: bool) -> None:
    assert is_foreign(origin, scheme, host) is foreign


EVIL = {"Origin": "http://evil.example"}
CROSS = {"Sec-Fetch-Site": "cross-site"}


@pytest.mark.parametrize("headers", [EVIL, CROSS, {"Origin": "null"}, EVIL | CROSS])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["target/", "/api/docs", "/metrics", "/nowhere", "/api/v1.0/system/health/"])
async def test_another_sites_page_is_refused_before_anything_else(
    api: Api, headers: dict[str, str], method: str, path: str
) -> None:
    """403 also without a login, or on a path that is not there: nothing was looked at."""
    for api.authorization in (basic("root", PASSWORD), None):
        body = None if method in ("GET", "OPTIONS") else {"iscsi_target_name": "evil"}
        answer = await api.request(method, path, body, headers=headers)
        assert (answer.status, "another site" in answer.json["error"]) == (403, True)
    assert api.engine.configuration.targets == {}


async def test_the_apis_own_page_and_other_clients_are_served(api: Api) -> None:
    own = f"http://{api.server.host}:{api.server.port}"
    browser = {"Origin": own, "Sec-Fetch-Site": "same-origin"}
    assert (await api.post("target/", {"iscsi_target_name": "a"}, headers=browser)).status == 201
    assert (await api.get("target/", headers={"Sec-Fetch-Site": "none"})).status == 200
    # an old client sends neither an Origin nor, sometimes, a Content-Type
    answer = await api.request("POST", "target/", data=b'{"iscsi_target_name": "b"}')
    assert answer.status == 201


@pytest.mark.parametrize("kind", [None, "text/plain", "text/plain;charset=UTF-8", "multipart/form-data"])
async def test_a_browser_has_to_call_a_body_json(api: Api, kind: str | None) -> None:
    """Only then does it ask (CORS preflight) before it sends what a page of another site wants it to."""
    headers = {"Origin": f"http://{api.server.host}:{api.server.port}"}
    if kind is not None:
        headers["Content-Type"] = kind
    answer = await api.request("POST", "target/", data=b'{"iscsi_target_name": "a"}', headers=headers)
    assert (answer.status, list(answer.json)) == (400, ["error_message"])
    assert api.engine.configuration.targets == {}


# -- Guessed passwords ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def account() -> Account:
    return Account("root", hash_password(PASSWORD))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Passwords that were hashed."""
    found: list[str] = []

    def counting(password: str, password_hash: str) -> bool:
        found.append(password)
        return verify_password(password, password_hash)

    monkeypatch.setattr(api.auth, "verify_password", counting)
    monkeypatch.setattr(api.auth, "PACE_S", 0.001)
    return found


async def outcomes(authenticator: Authenticator, guesses: int, address: str) -> list[type]:
    results = await asyncio.gather(
        *(authenticator.login(basic("root", f"guess {n}"), address) for n in range(guesses)),
        return_exceptions=True,
    )
    return [type(result) for result in results]


async def test_guesses_are_counted_before_they_are_hashed(account: Account, hashed: list[str]) -> None:
    """A hundred at once have as many tries as a hundred one by one."""
    found = await outcomes(Authenticator({"root": account}), 100, "192.0.2.1")
    assert found.count(UnauthorizedError) == len(hashed) == 10
    assert found.count(TooManyFailuresError) == 90


async def test_right_passwords_are_no_guesses(account: Account, hashed: list[str]) -> None:
    users = {f"u{n}": Account(f"u{n}", account.password_hash) for n in range(12)}
    authenticator = Authenticator(users)
    for name in users:
        assert (await authenticator.login(basic(name, PASSWORD), "192.0.2.1")).name == name
    assert len(hashed) == 12


async def test_how_many_hashes_wait_is_bounded(
    account: Account, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From however many addresses they come; and loopback is not among them."""
    monkeypatch.setattr(api.auth, "WAITING", 5)
    authenticator = Authenticator({"root": account})
    logins = [authenticator.login(basic("root", f"{n}"), f"192.0.2.{n}") for n in range(20)]
    administrator = authenticator.login(basic("root", PASSWORD), "127.0.0.1")
    *found, known = await asyncio.gather(*logins, administrator, return_exceptions=True)
    assert [type(each) for each in found].count(BusyError) == 20 - 5 - api.auth.AT_ONCE
    assert known is account


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
async def test_guesses_on_this_machine_do_not_lock_the_administrator_out(
    account: Account, hashed: list[str], address: str
) -> None:
    authenticator = Authenticator({"root": account})
    found = await outcomes(authenticator, 13, address)
    assert (found[:10], found[10:]) == ([UnauthorizedError] * 10, [TooManyFailuresError] * 3)
    assert await authenticator.login(basic("root", PASSWORD), address) is account


async def test_who_has_gone_takes_no_turn(account: Account, hashed: list[str]) -> None:
    authenticator = Authenticator({"root": account})
    gone = [authenticator.login(basic("root", f"guess {n}"), "127.0.0.1", lambda: False) for n in range(50)]
    administrator = authenticator.login(basic("root", PASSWORD), "127.0.0.1")
    await asyncio.gather(*gone, administrator, return_exceptions=True)
    assert hashed == [PASSWORD]


async def test_what_one_address_has_proven_is_no_answer_to_another(
    account: Account, hashed: list[str]
) -> None:
    """Else an address that has to wait would learn of a right guess all the same."""
    authenticator = Authenticator({"root": account})
    await authenticator.login(basic("root", PASSWORD), "192.0.2.1")
    await outcomes(authenticator, 10, "192.0.2.2")
    with pytest.raises(TooManyFailuresError):
        await authenticator.login(basic("root", PASSWORD), "192.0.2.2")


# -- Secrets -------------------------------------------------------------------------------------------

SECRET, PEER = "a-secret-of-the-initiator", "one-of-the-target"
SECRET_FIELDS = ("iscsi_target_auth_secret", "iscsi_target_auth_peersecret")


async def with_credentials(api: Api) -> list[dict[str, Any]]:
    """One with both secrets, one with the first alone."""
    return [
        await api.made(
            "authcredential/",
            iscsi_target_auth_user="a",
            iscsi_target_auth_secret=SECRET,
            iscsi_target_auth_peeruser="p",
            iscsi_target_auth_peersecret=PEER,
        ),
        await api.made("authcredential/", iscsi_target_auth_user="b", iscsi_target_auth_secret="z" * 12),
    ]


@pytest.mark.parametrize("query", ["", "?limit=0", "?sort(id)", "?secrets=shown"])
async def test_a_read_only_user_is_told_no_secret(api: Api, query: str) -> None:
    await with_credentials(api)
    api.authorization = basic("viewer", PASSWORD)
    for path in (f"authcredential/{query}", f"authcredential/1/{query}"):
        answer = await api.get(path)
        assert answer.status == 200
        assert SECRET.encode() not in answer.raw and PEER.encode() not in answer.raw
    first = (await api.get("authcredential/1/")).json
    second = (await api.get("authcredential/2/")).json
    assert [first[name] for name in SECRET_FIELDS] == ["***", "***"]
    assert [second[name] for name in SECRET_FIELDS] == ["***", ""]


@pytest.mark.parametrize("name", SECRET_FIELDS)
async def test_nor_can_it_ask_by_filters_or_order(api: Api, name: str) -> None:
    """A filter answers whether a guess is right; an order tells a secret letter by letter."""
    await with_credentials(api)
    api.authorization = basic("viewer", PASSWORD)
    everything = (await api.get("authcredential/")).json
    for guess in (SECRET, "wrong", "***", ""):
        assert (await api.get(f"authcredential/?{name}={guess}")).json == everything
    for order in (name, f"-{name}", f"id,{name}"):
        answer = await api.get(f"authcredential/?sort({order})")
        assert (answer.status, "field for ordering" in answer.json["error"]) == (400, True)


async def test_an_administrator_may_go_without(api: Api) -> None:
    """``?secrets=masked``: what was shown can be sent back, and the secrets stay what they are."""
    stored = await with_credentials(api)
    masked = (await api.get("authcredential/?secrets=masked&limit=0")).json
    assert [body[SECRET_FIELDS[0]] for body in masked] == ["***", "***"]
    assert (await api.get("authcredential/1/?secrets=masked")).json == masked[0]
    assert (await api.get(f"authcredential/?secrets=masked&sort({SECRET_FIELDS[0]})")).status == 400
    changed = {**masked[0], "iscsi_target_auth_tag": 7}
    answer = await api.put("authcredential/1/?secrets=masked", changed)
    assert (answer.status, answer.json) == (202, changed)
    assert (await api.get("authcredential/1/")).json == {**stored[0], "iscsi_target_auth_tag": 7}
    new = {"iscsi_target_auth_user": "c", "iscsi_target_auth_secret": "a-new-secret-it-is"}
    answer = await api.post("authcredential/?secrets=masked", new)
    assert (answer.status, answer.json[SECRET_FIELDS[0]]) == (201, "***")


async def test_a_masked_secret_does_not_become_one(api: Api) -> None:
    new = {"iscsi_target_auth_user": "c", "iscsi_target_auth_secret": "***"}
    answer = await api.post("authcredential/", new)
    assert (answer.status, list(answer.json)) == (409, ["iscsi_target_auth_secret"])
    assert api.engine.configuration.credentials == {}


async def test_another_word_for_secrets_is_refused_before_anything_is_done(api: Api) -> None:
    new = {"iscsi_target_auth_user": "c", "iscsi_target_auth_secret": "a-new-secret-it-is"}
    assert (await api.post("authcredential/?secrets=no", new)).status == 400
    assert (await api.get("authcredential/?secrets=no")).status == 400
    assert api.engine.configuration.credentials == {}
