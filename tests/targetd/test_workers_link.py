"""Messages between the processes: whole, in order, with their descriptors, and plain data only."""

import asyncio
import os
import pickle
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from protocol.scsi.registrations import State, Type
from targetd.config import Configuration
from targetd.interface import Event
from targetd.net.loop import Loop
from targetd.workers.link import Link
from targetd.workers.messages import Adopt, Answer, Ask, Delta, EventRaised, Prepared, decode, encode
from targetd.workers.quota import SessionQuota, make_file
from tests.targetd.configurations import small


@dataclass
class Ends:
    """Two links, and what came out of each."""

    loop: Loop
    one: Link
    two: Link
    came: list[tuple[object, int]]
    lost: asyncio.Event
    awaited: int = 0
    """Of messages."""
    here: asyncio.Event = field(default_factory=asyncio.Event)

    def until(self, count: int) -> None:
        """Run until so many messages have come out of the second."""
        self.awaited = count
        self.loop.run_until_complete(asyncio.wait_for(self.here.wait(), 20))

    def take(self, message: object, descriptor: int) -> None:
        """One has come out of the second."""
        self.came.append((message, descriptor))
        if len(self.came) == self.awaited:
            self.here.set()


@pytest.fixture
def ends() -> Iterator[Ends]:
    loop = Loop()
    left, right = socket.socketpair()
    lost = asyncio.Event()
    one = Link(loop, left, lambda message, descriptor: None, lambda: None)
    two = Link(loop, right, lambda message, descriptor: ends.take(message, descriptor), lost.set)
    ends = Ends(loop, one, two, [], lost)
    yield ends
    one.close()
    two.close()
    loop.close()


def test_messages_longer_than_the_socket_takes_arrive_whole_and_in_order(ends: Ends) -> None:
    sent = [Ask(number, "x", (bytes(number * 100_000),)) for number in range(12)]
    for message in sent:
        ends.one.send(message)
    ends.until(len(sent))
    assert [message for message, _ in ends.came] == sent


def test_each_descriptor_comes_with_its_message(ends: Ends, tmp_path: Path) -> None:
    """Between long messages without any, and more of them than one read brings."""
    for number in range(100):
        (tmp_path / str(number)).write_text(str(number))
        descriptor = os.open(tmp_path / str(number), os.O_RDONLY)
        ends.one.send(Adopt(number, 1, "", "", 0.0, bytes(number * 100), 0), descriptor)
        ends.one.send(Prepared())
    ends.until(200)
    for message, descriptor in ends.came:
        if isinstance(message, Adopt):
            assert os.read(descriptor, 10) == str(message.number).encode()
            os.close(descriptor)
        else:
            assert descriptor == -1


def test_the_end_of_one_is_told_to_the_other_once(ends: Ends) -> None:
    ends.one.close()
    ends.loop.run_until_complete(asyncio.wait_for(ends.lost.wait(), 20))
    assert ends.two.closed
    read, write = os.pipe()
    ends.two.send(Adopt(1, 1, "", "", 0.0, b"", 0), write)
    assert os.read(read, 1) == b"", "a descriptor that can go nowhere is closed"
    os.close(read)


def test_plain_data_goes_through_as_it_is() -> None:
    config = small()
    delta = Delta(config.globals, True, {"extents": dict(config.extents)}, {"targets": (1, 2)})
    state = State({("i", "t"): 7}, Type.WRITE_EXCLUSIVE, ("i", "t"), True)
    for message in (
        Ask(1, "change", (delta, frozenset((1,)), None)),
        Answer(2, {1: state}),
        EventRaised(Event("a", 1.0)),
    ):
        assert decode(encode(message)) == message
    assert delta.applied_to(Configuration(targets=config.targets)).extents == config.extents


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize("thing", [Harmful(), Path("/"), Ask(1, "x", (Harmful(),)), os.system])
def test_nothing_else_comes_out_of_a_message(thing: object, ends: Ends) -> None:
    """A worker faces the network; the front does not do what a message says."""
    with pytest.raises(pickle.UnpicklingError, match="does not belong in a message"):
        decode(pickle.dumps(thing))
    ends.one.send(thing)
    ends.loop.run_until_complete(asyncio.wait_for(ends.lost.wait(), 20))
    assert ends.came == []


def test_seats_are_counted_over_all_workers() -> None:
    """And those of a worker that is gone are free."""
    file = make_file(2)
    one, two, front = SessionQuota(file, 2, 1), SessionQuota(file, 2, 2), SessionQuota(file, 2)
    assert not one.take(0, 3) and not one.take(1, 3) and not two.take(0, 3)
    assert "3 sessions exist already" in two.take(1, 3) and one.take(2, 3)
    one.put(1)
    assert not two.take(1, 3, asking=True) and not two.take(1, 3)
    front.forget(2)
    assert not one.take(1, 3) and not one.take(2, 3)
    os.close(file)


def test_the_share_of_one_address_is_counted_over_all_workers() -> None:
    file = make_file(2)
    one, two = SessionQuota(file, 2, 1), SessionQuota(file, 2, 2)
    greedy, other = ("address", "192.0.2.1"), ("address", "192.0.2.2")
    assert not any(one.take(count, 8, [(greedy, count)]) for count in range(3))
    assert not any(two.take(count, 8, [(greedy, count)]) for count in range(3))
    for each in (one, two):
        assert "address 192.0.2.1 has 6 sessions" in each.take(3, 8, [(greedy, 3)])
    assert not two.take(3, 8, [(other, 0)])
    os.close(file)
