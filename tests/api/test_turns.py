"""Long answers are made in pieces: the event loop, which serves connections, has a turn after each.

Counted in function calls, not by a clock: a turn of the loop may make so many at the most.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from api.encoding import TURN, encoded
from targetd.interface import Explanation, Latency, LoginFailure, Statistics, UnitStatistics, VisibleLun
from targetd.system.pieces import PIECE, gathered
from tests.api.conftest import Api
from tests.api.test_load import many

MANY = 1000
CALLS = 25_000
"""Function calls of one turn, some 100 ns each: 50 objects with their fields, and the HTTP server's work. All
of a list at once are 70,000 and more."""


class Turns:
    """What turns of the loop cost."""

    def __init__(self) -> None:
        self.calls = self.most_calls = 0
        self.most_json = 0
        """Longest text that was written in one go: ``json.dumps`` is a single call."""

    def count(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.calls += 1

    def over(self) -> None:
        self.most_calls = max(self.most_calls, self.calls)
        self.calls = 0


@asynccontextmanager
async def counted(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Turns]:
    """Turns of the loop while this is open."""
    turns, loop, dumps, there = Turns(), asyncio.get_running_loop(), json.dumps, True

    def write(value: Any) -> str:
        text = dumps(value)
        turns.most_json = max(turns.most_json, len(text))
        return text

    def turn() -> None:
        turns.over()
        if there:
            loop.call_soon(turn)

    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", write)
        loop.call_soon(turn)
        before = sys.getprofile()
        sys.setprofile(turns.count)
        try:
            yield turns
        finally:
            sys.setprofile(before)
            there = False
            turns.over()


@pytest.mark.parametrize(
    "path",
    [
        "target/?limit=0",
        "extent/?limit=0",
        "extent/?limit=0&iscsi_target_extent_type=File&sort=-iscsi_target_extent_name",
        "targettoextent/?limit=0",
        "targetgroup/?limit=0",
    ],
)
async def test_a_list_of_thousands_is_made_in_pieces(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    api.engine.configuration = many(MANY, 1)
    async with counted(monkeypatch) as turns:
        answer = await api.get(path)
    assert len(answer.json) == MANY
    assert (turns.most_calls < CALLS, turns.most_json < 2 * TURN) == (True, True), vars(turns)


def _unit(number: int) -> UnitStatistics:
    return UnitStatistics(
        *(number, f"extent{number}", (("iqn.2026-07.example:t", number),)),
        *({"INQUIRY": 2}, {("READ(10)", "BUSY"): 1}, 1, 2, 3, 4, 5, 6, 7, 8),
        ready=True,
        latency=Latency(),
    )


def _explanation(luns: int) -> Explanation:
    lun = VisibleLun(0, 1, "extent", 1 << 20, 512, read_only=False, ready=True)
    return Explanation(
        *(1, ("127.0.0.1:3260",), 1, "iqn.2026-07.example:t"),
        allowed=True,
        reason="initiator group 1",
        authentication="None",
        discovered=True,
        luns=(lun,) * luns,
    )


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("statistics/", lambda body: len(body["units"])),
        ("explain/?initiator=iqn.2026-07.example:i&address=127.0.0.1", len),
        ("loginfailure/?limit=0", len),
    ],
)
async def test_so_is_what_the_engine_tells(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str, count: Callable[[Any], int]
) -> None:
    api.engine.counted = Statistics(units=tuple(map(_unit, range(MANY))))
    api.engine.explained = [_explanation(1)] * MANY
    api.engine.failures = [LoginFailure(0.0, "i", "p", "l", 1, "t", "0201", "no")] * MANY
    async with counted(monkeypatch) as turns:
        answer = await api.get(path)
    assert count(answer.json) == MANY
    assert (turns.most_calls < CALLS, turns.most_json < 2 * TURN) == (True, True), vars(turns)


async def test_the_array_within_an_object_within_an_array_is_written_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lun = {"lun": 0, "extent": "e" * 60}
    async with counted(monkeypatch) as turns:
        text = await encoded([{"target": "t", "luns": (lun,) * MANY}])
    assert len(json.loads(text)[0]["luns"]) == MANY
    assert 0 < turns.most_json < 2 * TURN


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        None,
        "ä",
        [1, 2],
        {"a": [], "b": {"c": None}},
        list(range(PIECE)),
        list(range(PIECE + 1)),
        [tuple(range(3 * PIECE)), [], "x", {"a": list(range(2 * PIECE)), "b": [1]}],
        {"jsonrpc": "2.0", "id": 7, "result": [{"n": n, "s": '"'} for n in range(4 * PIECE + 3)]},
    ],
)
async def test_what_is_written_in_pieces_is_what_json_writes(value: Any) -> None:
    assert await encoded(value) == json.dumps(value).encode()


async def test_gathering_leaves_a_turn_after_each_piece() -> None:
    seen: list[str] = []
    loop = asyncio.get_running_loop()

    def objects() -> Any:
        for number in range(2 * PIECE):
            if number % PIECE == 0:
                loop.call_soon(seen.append, "other")
            seen.append("object")
            yield number

    assert await gathered(objects()) == list(range(2 * PIECE))
    piece = ["object"] * PIECE + ["other"]
    assert seen == piece + piece
