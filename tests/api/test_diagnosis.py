"""Refused logins, answers ahead of time, and the stream of events."""

import asyncio
import json
from dataclasses import asdict
from typing import Any

import pytest
from aiohttp import ClientResponse

from api.resources.events import MAX_OF_ONE
from targetd.interface import Event, Explanation, LoginFailure, Statistics, VisibleLun, Work
from tests.api.conftest import BASE, Api

FAILURE = LoginFailure(
    1700000000.0, "iqn.client", "10.0.0.9:4000", "10.0.0.1:3260", 1, "iqn.t", "0203", "no target iqn.t"
)
EXPLANATION = Explanation(
    1,
    ("0.0.0.0:3260",),
    2,
    "iqn.t",
    True,
    "open",
    "CHAP",
    True,
    (VisibleLun(0, 3, "e", 512, 512, False, True),),
)


async def test_refused_logins_are_listed_with_their_reason(api: Api) -> None:
    api.engine.failures = [FAILURE] * 3
    answer = await api.get("loginfailure/?limit=2")
    assert answer.json == [asdict(FAILURE)] * 2
    assert answer.headers["Content-Range"] == "items 0-1/3"


async def test_work_that_takes_its_time_is_listed(api: Api) -> None:
    api.engine.counted = Statistics(work=(Work("sanitize", 3, "e", 1 << 20, 1 << 30),))
    answer = await api.get("work/")
    assert answer.json == [
        {"kind": "sanitize", "extent_id": 3, "extent": "e", "done": 1 << 20, "total": 1 << 30}
    ]
    assert answer.headers["Content-Range"] == "items 0-0/1"


async def test_a_question_reaches_the_engine_as_it_was_asked(api: Api) -> None:
    api.engine.explained = [EXPLANATION]
    answer = await api.get("explain/?initiator=iqn.client&address=%5Bfe80::1%25eth0%5D&target=T&portal=1")
    assert (answer.status, api.engine.asked) == (200, ("iqn.client", "fe80::1", "T", 1))
    assert answer.json[0]["luns"][0]["extent"] == "e"


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("address=10.0.0.1", "initiator"),
        ("initiator=iqn.a", "address"),
        ("initiator=iqn.a&address=host", "address"),
        ("initiator=iqn.a&address=10.0.0.1&portal=9", "portal 9"),
        ("initiator=iqn.a&address=10.0.0.1&portal=x", "portal x"),
        ("initiator=iqn.a&address=10.0.0.1&target=none", "target none"),
        (f"initiator={'x' * 300}&address=10.0.0.1", "initiator"),
    ],
)
async def test_a_question_that_cannot_be_answered_says_why(api: Api, query: str, part: str) -> None:
    answer = await api.get(f"explain/?{query}")
    assert answer.status == 400
    assert part in answer.json["error"]


# -- Events --------------------------------------------------------------------------------------------


async def open_stream(api: Api) -> ClientResponse:
    url = f"http://{api.server.host}:{api.server.port}{BASE}events/"
    return await api.session.get(url, headers={"Authorization": api.authorization or ""})


async def next_event(response: ClientResponse) -> tuple[str, Any]:
    while True:
        block = (await response.content.readuntil(b"\n\n")).decode().strip()
        if not block.startswith(":"):
            kind, data = block.split("\n")
            return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_events_come_as_they_happen(api: Api) -> None:
    async with await open_stream(api) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        api.engine.happening.put_nowait(Event("session.login", 5.0, {"id": 1, "initiator": "a\nb"}))
        api.engine.happening.put_nowait(Event("session.end", 6.0, {"id": 1}))
        assert await next_event(response) == ("session.login", {"at": 5.0, "id": 1, "initiator": "a\nb"})
        assert await next_event(response) == ("session.end", {"at": 6.0, "id": 1})


async def test_a_reader_that_left_is_forgotten(api: Api) -> None:
    async with await open_stream(api):
        assert api.engine.readers == 1
    async with asyncio.timeout(10):
        while api.engine.readers:
            api.engine.happening.put_nowait(Event("x", 1.0))
            await asyncio.sleep(0.01)


async def test_of_too_many_readers_the_oldest_of_who_has_most_ends(api: Api) -> None:
    """Streams can be had again, so that one address does not keep another out."""
    streams = [await open_stream(api) for _ in range(MAX_OF_ONE + 1)]
    assert await asyncio.wait_for(streams[0].content.read(), 10) in (b"", b": from now on\n\n")
    for stream in streams:
        stream.close()


async def test_the_end_of_the_server_ends_the_streams(api: Api) -> None:
    async with await open_stream(api) as response:
        await api.server.close()
        assert b"from now on" in await response.content.read()


async def test_the_stream_stands_behind_the_login_and_outside_the_document(api: Api) -> None:
    document = (await api.get("/api/v1.0/openapi.json")).json
    assert f"{BASE}loginfailure/" in document["paths"]
    assert f"{BASE}events/" not in document["paths"]
    api.authorization = None
    assert (await api.get("events/")).status == 401
