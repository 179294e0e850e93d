"""Wrong answers to CHAP are slowed, for the user and the address that they come from."""

import pytest

from targetd.net.guesses import MAX_KEPT, OF_ADDRESS, OF_USER, GuessLimiter

HERE, THERE = "192.0.2.1", "192.0.2.2"


def guess(
    limiter: GuessLimiter, times: int, user: str = "alice", address: str = HERE, now: float = 0.0
) -> int:
    """How many of so many guesses are looked at."""
    looked_at = 0
    for _ in range(times):
        if not limiter.wait_s(address, user, now):
            limiter.judged(address, user, False, now)
            looked_at += 1
    return looked_at


def test_so_many_at_once_then_one_in_a_while() -> None:
    limiter = GuessLimiter()
    assert guess(limiter, 1000) == OF_USER.at_once
    assert limiter.wait_s(HERE, "alice", 0.0) == OF_USER.every_s
    assert limiter.wait_s(HERE, "alice", OF_USER.every_s) == 0
    assert sum(guess(limiter, 5, now=now) for now in range(1, 1001)) == 1000 / OF_USER.every_s


@pytest.mark.parametrize(("address", "user"), [(THERE, "alice"), (HERE, "bob"), ("2001:db8::1", "alice")])
def test_another_address_or_user_is_not_slowed(address: str, user: str) -> None:
    limiter = GuessLimiter()
    guess(limiter, 1000)
    assert limiter.wait_s(address, user, 0.0) == 0


def test_all_addresses_of_a_v6_host_are_one() -> None:
    """RFC 4291 2.5.4: a host has a /64 of them."""
    limiter = GuessLimiter()
    assert sum(guess(limiter, 1, address=f"2001:db8::{n:x}") for n in range(1, 100)) == OF_USER.at_once


def test_names_tried_in_turn_count_for_their_address() -> None:
    limiter = GuessLimiter()
    assert sum(guess(limiter, 1, user=f"user{n}") for n in range(1000)) == OF_ADDRESS.at_once
    assert limiter.wait_s(HERE, "alice", 0.0) == OF_ADDRESS.every_s
    assert limiter.wait_s(THERE, "alice", 0.0) == 0


def test_a_right_answer_forgives_its_user_and_right_ones_are_never_counted() -> None:
    limiter = GuessLimiter()
    guess(limiter, OF_USER.at_once - 1)
    limiter.judged(HERE, "alice", True, 0.0)
    assert guess(limiter, 1000) == OF_USER.at_once
    for _ in range(1000):
        limiter.judged(THERE, "bob", True, 0.0)
    assert limiter.wait_s(THERE, "bob", 0.0) == 0


def test_what_is_remembered_is_bounded() -> None:
    limiter = GuessLimiter()
    for n in range(3 * MAX_KEPT):
        limiter.judged(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", "alice", False, 0.0)
    assert len(limiter) == MAX_KEPT
