"""iSNS: what is registered, how it is said, and that it stays so (RFC 4171)."""

import asyncio
import struct
from dataclasses import replace

import pytest

from targetd.config import Configuration, replace_object
from targetd.isns import registrar
from targetd.isns.messages import Attribute, Function, MessageError, Tag, attributes, number, request, text
from targetd.isns.registrar import Registrar, isns_servers
from targetd.isns.registration import Registration, registration
from tests.isns_server import IsnsServer
from tests.targetd.configurations import small


def configured(**fields: object) -> Configuration:
    config = small()
    return replace(config, globals=replace(config.globals, **{"isns_servers": "192.0.2.1", **fields}))  # type: ignore[arg-type]


def registered(config: Configuration, absent: tuple[str, ...] = ()) -> Registration:
    found = registration(config, absent, "host")
    assert found is not None
    return found


ONE, TWO = "iqn.2011-03.org.example.istgt:target1", "iqn.2011-03.org.example.istgt:target2"
FIRST = (("10.0.0.1", 3260),)
SECOND = (("fd00::1", 3260), ("10.0.0.2", 3260))


def test_every_target_is_registered_with_the_portals_that_it_is_granted_through() -> None:
    found = registered(configured())
    assert found.entity == "host:iqn.2011-03.org.example.istgt"
    assert found.portals == FIRST + SECOND
    assert found.targets == ((ONE, "alias 1", ((1, FIRST), (2, SECOND))), (TWO, "alias 2", ((1, FIRST),)))
    assert found.hidden == 0


def test_what_is_not_registered() -> None:
    assert registration(configured(isns_servers=""), (), "host") is None
    assert registration(replace(configured(), service_enabled=False), (), "host") is None
    assert registration(configured(discovery_auth_method="CHAP", discovery_auth_group=1), (), "host") is None
    config = configured()
    hidden = replace(config.portals[1], discovery_auth_method="CHAP Mutual", discovery_auth_group=2)
    found = registered(replace_object(config, "portals", hidden))
    assert (found.portals, [name for name, _, _ in found.targets], found.hidden) == (SECOND, [ONE], 1)
    assert registered(config, ("10.0.0.2",)).portals == (*FIRST, SECOND[0])
    told = replace(config.portals[2], advertised=("198.51.100.7:3333", "a-host.example:3260"))
    assert registered(replace_object(config, "portals", told)).portals == (*FIRST, ("198.51.100.7", 3333))
    local = replace(config.portals[2], addresses=("[fe80::1%eth0]:3260",))
    assert registered(replace_object(config, "portals", local)).portals == FIRST


@pytest.mark.parametrize(
    ("seen_at", "portals"), [("192.0.2.9", [("192.0.2.9", 3260)]), ("2001:db8::9", [("2001:db8::9", 3260)])]
)
def test_a_wildcard_is_where_the_server_sees_us(seen_at: str, portals: list[tuple[str, int]]) -> None:
    config = configured()
    every = replace(config.portals[1], addresses=("0.0.0.0:3260", "[::]:3260"))
    config = replace_object(config, "portals", every)
    said = registered(replace_object(config, "portals", replace(config.portals[2], addresses=()))).register(
        seen_at
    )
    places = [each.value for each in said if each.tag == Tag.PORTAL_ADDRESS]
    assert len(places) == len(portals)
    assert places[0].endswith(b"\x00\x09" if ":" in seen_at else bytes((192, 0, 2, 9)))


def test_servers_have_port_3205_unless_it_is_said() -> None:
    config = configured(isns_servers="192.0.2.1 192.0.2.2:9999\n[2001:db8::1]")
    assert list(isns_servers(config).values()) == [
        ("192.0.2.1", 3205),
        ("192.0.2.2", 9999),
        ("2001:db8::1", 3205),
    ]


def test_a_long_message_is_cut_into_pdus() -> None:
    """RFC 4171 5.1.3 to 5.1.6: numbered, the first and the last marked, one transaction."""
    said = [text(Tag.ISCSI_NAME, f"iqn.2026-11.example:target-{n}") for n in range(5000)]
    raw = request(Function.REGISTER, 77, said)
    payload, at, flags = b"", 0, []
    while at < len(raw):
        version, function, length, flag, transaction, sequence = struct.unpack_from("!HHHHHH", raw, at)
        assert (version, function, transaction, sequence) == (1, 1, 77, len(flags))
        flags.append(flag)
        payload += raw[at + 12 : at + 12 + length]
        at += 12 + length
    assert flags == [0x8400, *[0x8000] * (len(flags) - 2), 0x8800]
    assert list(attributes(payload)) == said


@pytest.mark.parametrize(
    "payload", [b"\0", bytes(7), struct.pack("!II", 1, 4), struct.pack("!II", 1, 3) + bytes(3), b"\xff" * 12]
)
def test_attributes_that_are_cut_are_refused(payload: bytes) -> None:
    with pytest.raises(MessageError):
        list(attributes(payload))
    assert list(attributes(b"")) == []
    assert number(Tag.PORTAL_PORT, 3260) == Attribute(17, b"\0\0\x0c\xbc")


def test_a_server_that_forgot_is_told_again_and_an_edit_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrar, "SIGN_OF_LIFE_S", 0.05)

    async def run(server: IsnsServer) -> None:
        absent: set[str] = set()
        kept = Registrar(lambda: absent)
        config = configured(isns_servers=f"127.0.0.1:{server.port}")
        kept.follow(config)
        await asyncio.to_thread(server.wait_until, lambda: server.targets() == {ONE, TWO})
        server.entities.clear()
        await asyncio.to_thread(server.wait_until, lambda: server.targets() == {ONE, TWO})
        absent.add("10.0.0.1:3260")
        kept.follow(config)
        await asyncio.to_thread(server.wait_until, lambda: server.targets() == {ONE})
        await kept.close()
        assert not server.entities

    with IsnsServer() as server:
        asyncio.run(run(server))
