"""Filters and options of TrueNAS' queries."""

import errno
from typing import Any

import pytest

from api.v2.errors import CallError
from api.v2.query import QueryOptions, select

ITEMS: list[dict[str, Any]] = [
    {"id": 1, "name": "alpha", "size": {"parsed": 10}, "tags": ["x", "y"], "alias": None},
    {"id": 2, "name": "beta", "size": {"parsed": 30}, "tags": [], "alias": "b"},
    {"id": 3, "name": "alphabet", "size": {"parsed": 20}, "tags": ["y"], "alias": "a"},
]


def ids(filters: list[Any], **options: Any) -> list[int]:
    return [one["id"] for one in select(ITEMS, filters, QueryOptions(**options))]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ([], [1, 2, 3]),
        ([["name", "=", "beta"]], [2]),
        ([["name", "!=", "beta"]], [1, 3]),
        ([["size.parsed", ">", 10]], [2, 3]),
        ([["size.parsed", ">=", 10], ["size.parsed", "<", 30]], [1, 3]),
        ([["size.parsed", "<=", 10]], [1]),
        ([["size.parsed", ">", "text"]], []),
        ([["name", "in", ["beta", "none"]]], [2]),
        ([["name", "nin", ["beta"]]], [1, 3]),
        ([["tags", "rin", "y"]], [1, 3]),
        ([["tags", "rnin", "y"]], [2]),
        ([["name", "^", "alpha"]], [1, 3]),
        ([["name", "!^", "alpha"]], [2]),
        ([["name", "$", "bet"]], [3]),
        ([["name", "!$", "bet"]], [1, 2]),
        ([["name", "~", "^(beta|alpha)$"]], [1, 2]),
        ([["alias", "=", None]], [1]),
        ([["nothing", "=", None]], [1, 2, 3]),
        ([["OR", [["id", "=", 1], ["id", "=", 2]]]], [1, 2]),
        ([["OR", [[["id", "=", 1], ["name", "=", "beta"]], ["id", "=", 3]]]], [3]),
        ([["tags", "=", ["x", "y"]]], [1]),
    ],
)
def test_filters_choose(filters: list[Any], found: list[int]) -> None:
    assert ids(filters) == found


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"order_by": ["-size.parsed"]}, [2, 3, 1]),
        ({"order_by": ["alias"]}, [3, 2, 1]),
        ({"order_by": ["nulls_first:alias"]}, [1, 3, 2]),
        ({"limit": 2}, [1, 2]),
        ({"limit": 0}, [1, 2, 3]),
        ({"offset": 1, "limit": 1}, [2]),
    ],
)
def test_options_order_and_cut(options: dict[str, Any], found: list[int]) -> None:
    assert ids([], **options) == found


def test_get_count_and_select() -> None:
    assert select(ITEMS, [["id", "=", 2]], QueryOptions(get=True))["name"] == "beta"
    assert select(ITEMS, [["id", ">", 1]], QueryOptions(count=True)) == 2
    chosen = select(ITEMS, [["id", "=", 1]], QueryOptions(select=["name", "size.parsed"]))
    assert chosen == [{"name": "alpha", "size.parsed": 10}]
    with pytest.raises(CallError) as caught:
        select(ITEMS, [["id", "=", 9]], QueryOptions(get=True))
    assert caught.value.number == errno.ENOENT


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ([["name", "like", "x"]], "is not .field, operator, value"),
        (["name"], "is not .field, operator, value"),
        ([["name", "~", "("]], "no regular expression"),
        ([["name", "~", "a" * 201]], "at most 200"),
        ([["name", "~", 5]], "a pattern is text"),
    ],
)
def test_what_is_no_filter_is_refused_in_words(filters: list[Any], words: str) -> None:
    with pytest.raises(CallError, match=words):
        select(ITEMS, filters, QueryOptions())


def test_a_hostile_pattern_ends_by_itself() -> None:
    """Catastrophic backtracking: without a bound this takes hours."""
    with pytest.raises(CallError, match="takes too long"):
        select([{"name": "a" * 60 + "!"}], [["name", "~", "(a|a|aa)+$"]], QueryOptions())


def test_filters_nested_too_deeply_are_refused() -> None:
    filters: list[Any] = [["id", "=", 1]]
    for _ in range(20):
        filters = [["OR", [filters]]]
    with pytest.raises(CallError, match="nested too deeply"):
        select(ITEMS, filters, QueryOptions())
