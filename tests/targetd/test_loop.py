"""The loop that serves data connections inside its wait, beside all that asyncio does."""

import asyncio
import math
import socket
from collections.abc import Iterator
from functools import partial

import pytest

from targetd.net.loop import (
    AT_ONCE,
    LONGEST_S,
    NEWCOMERS_AT_ONCE,
    NEWCOMERS_WAIT,
    REST_S,
    SHORTEST_S,
    Loop,
    Patience,
    Turn,
)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_a_served_descriptor_is_called_for_data_and_for_its_end(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    ended = loop.create_future()

    def readable() -> None:
        got.append(ours.recv(100))
        if not got[-1]:
            loop.forget(ours.fileno())
            ended.set_result(None)

    loop.serve(ours.fileno(), readable, lambda: None)
    theirs.send(b"one")
    theirs.shutdown(socket.SHUT_WR)
    loop.run_until_complete(asyncio.wait_for(ended, 10))
    assert got == [b"one", b""]


def test_what_is_scheduled_by_a_served_connection_runs_at_once(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A callback must not wait for the next event of anybody."""
    ours, theirs = pair
    ran = loop.create_future()

    def readable() -> None:
        ours.recv(100)
        loop.call_soon(ran.set_result, True)

    loop.serve(ours.fileno(), readable, lambda: None)
    theirs.send(b"x")
    assert loop.run_until_complete(asyncio.wait_for(ran, 10))


def test_timers_and_streams_go_on_under_constant_traffic(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A connection that always has something to read takes nothing from the rest of the loop."""
    ours, theirs = pair
    theirs.setblocking(False)

    def bounce(ball: socket.socket) -> None:
        ball.send(ball.recv(100))

    loop.serve(ours.fileno(), lambda: bounce(ours), lambda: None)
    loop.serve(theirs.fileno(), lambda: bounce(theirs), lambda: None)
    theirs.send(b"ball")

    async def others() -> bytes:
        await asyncio.sleep(0.01)
        server = await asyncio.start_server(lambda r, w: w.write(b"hello"), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        said = await reader.readexactly(5)
        writer.close()
        server.close()
        return said

    assert loop.run_until_complete(asyncio.wait_for(others(), 10)) == b"hello"
    loop.forget(ours.fileno())
    loop.forget(theirs.fileno())


def test_a_handler_that_fails_ends_its_own_service_alone(
    loop: Loop, pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = pair
    done = loop.create_future()

    def broken() -> None:
        loop.call_soon(done.set_result, None)
        raise RuntimeError("a bug")

    loop.serve(ours.fileno(), broken, lambda: None)
    theirs.send(b"x")
    loop.run_until_complete(asyncio.wait_for(done, 10))
    assert "a bug" in caplog.text
    loop.forget(ours.fileno())  # it is forgotten already: nothing happens


def test_writing_is_told_only_while_it_is_wanted(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, _ = pair
    told = loop.create_future()

    def writable() -> None:
        loop.want(ours.fileno(), read=True, write=False)
        told.set_result(None)

    loop.serve(ours.fileno(), lambda: None, writable)
    loop.want(ours.fileno(), read=True, write=True)
    loop.run_until_complete(asyncio.wait_for(told, 10))
    loop.run_until_complete(asyncio.sleep(0))


@pytest.mark.parametrize("number", [False, True], ids=["object", "number"])
def test_a_reader_is_known_by_its_object_and_by_its_number(
    loop: Loop, pair: tuple[socket.socket, socket.socket], number: bool
) -> None:
    """Whichever it was added by; asyncio hands on what it was given since Python 3.13."""
    ours, theirs = pair
    known: socket.socket | int = ours.fileno() if number else ours
    called: list[str] = []
    loop.add_reader(ours, called.append, "first")
    loop.add_reader(known, called.append, "second")
    theirs.send(b"x")
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.run_until_complete(asyncio.sleep(0))
    assert set(called) == {"second"}
    assert loop.remove_reader(known)
    called.clear()
    loop.run_until_complete(asyncio.sleep(0))
    assert not called
    assert not loop.remove_reader(ours)


def test_a_crowd_of_newcomers_does_not_hold_up_one_that_is_at_work(loop: Loop) -> None:
    """Two hundred have something to say at once, and so does one that was promoted: it has its turn when at
    most one round of newcomers had theirs, every time."""
    newcomers = [socket.socketpair() for _ in range(200)]
    working, client = socket.socketpair()
    order: list[str] = []
    over = loop.create_future()

    def newcomer(sock: socket.socket) -> None:
        sock.recv(1)
        loop.forget(sock.fileno())
        order.append("newcomer")
        if order.count("newcomer") == len(newcomers):
            over.set_result(None)

    def at_work() -> None:
        working.recv(1)
        order.append("at work")
        client.send(b"x")  # and again it has something

    for ours, theirs in newcomers:
        loop.serve(ours.fileno(), partial(newcomer, ours), lambda: None)
        theirs.send(b"x")
    loop.serve(working.fileno(), at_work, lambda: None)
    loop.promote(working.fileno())
    client.send(b"x")
    loop.run_until_complete(asyncio.wait_for(over, 30))
    loop.forget(working.fileno())
    longest = max(len(part.split()) for part in " ".join(order).replace("at work", "|").split("|"))
    assert longest <= NEWCOMERS_AT_ONCE
    for sock in (working, client, *(sock for pair in newcomers for sock in pair)):
        sock.close()


def test_who_has_more_to_do_waits_for_those_who_ask_for_little(loop: Loop) -> None:
    """Ten never come to an end; one has something to say after each answer. It is served again after each
    turn of one of the ten, and they have theirs one after the other."""
    busy = [socket.socketpair() for _ in range(10)]
    light, client = socket.socketpair()
    order: list[int] = []
    over = loop.create_future()

    def has_more(number: int) -> Turn:
        order.append(number)
        return Turn.MORE

    def has_little() -> Turn:
        light.recv(1)
        order.append(-1)
        if order.count(-1) == 100:
            over.set_result(None)
        client.send(b"x")
        return Turn.OVER

    for number, (ours, theirs) in enumerate(busy):
        loop.serve(ours.fileno(), partial(has_more, number), lambda: None)
        loop.promote(ours.fileno())
        theirs.send(b"x")
    loop.serve(light.fileno(), has_little, lambda: None)
    loop.promote(light.fileno())
    client.send(b"x")
    loop.run_until_complete(asyncio.wait_for(over, 30))
    for ours, _ in (*busy, (light, client)):
        loop.forget(ours.fileno())
    served = order[order.index(9) + 1 :]  # when all ten stand in the queue
    assert served[::2] == [-1] * len(served[::2]) or served[1::2] == [-1] * len(served[1::2])
    turns = [number for number in served if number >= 0]
    assert turns == [number % 10 for number in range(turns[0], turns[0] + len(turns))]
    for pair in (*busy, (light, client)):
        for sock in pair:
            sock.close()


def test_newcomers_that_have_more_to_do_share_one_turn_in_some(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(6)]
    order: list[int] = []
    over = loop.create_future()

    def has_more(number: int) -> Turn:
        order.append(number)
        if len(order) == 400 and not over.done():
            over.set_result(None)
        return Turn.MORE

    for number, (ours, theirs) in enumerate(pairs):
        loop.serve(ours.fileno(), partial(has_more, number), lambda: None)
        if number == 0:
            loop.promote(ours.fileno())
        theirs.send(b"x")
    loop.run_until_complete(asyncio.wait_for(over, 30))
    assert order[-200:].count(0) == 200 * (NEWCOMERS_WAIT - 1) // NEWCOMERS_WAIT
    assert set(order[-200:]) == set(range(6))
    for pair in pairs:
        loop.forget(pair[0].fileno())
        for sock in pair:
            sock.close()


def test_a_turn_is_had_though_nothing_comes_and_not_when_it_was_forgotten(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    had = [loop.create_future() for _ in pairs]

    def turn(number: int) -> Turn:
        had[number].set_result(None)
        return Turn.OVER

    for number, (ours, _) in enumerate(pairs):
        loop.serve(ours.fileno(), partial(turn, number), lambda: None)
        loop.promote(ours.fileno())
    loop.call_soon(loop.again, pairs[0][0].fileno())
    loop.call_soon(loop.again, pairs[1][0].fileno())
    loop.call_soon(loop.forget, pairs[0][0].fileno())
    loop.run_until_complete(asyncio.wait_for(had[1], 10))
    assert not had[0].done()
    loop.forget(pairs[1][0].fileno())
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_a_crowd_at_work_does_not_hold_up_a_callback_or_another_descriptor(loop: Loop) -> None:
    """Two hundred connections always have something. A callback runs when at most ``AT_ONCE`` more of them
    were served, and a descriptor of the API when each of them was served once more, and the rest of the
    batches in which it came and was found."""
    crowd = [socket.socketpair() for _ in range(200)]
    stock, client = socket.socketpair()
    served = 0
    marks: dict[str, int] = {}
    over = loop.create_future()

    def mark(what: str) -> None:
        marks[what] = served
        if len(marks) == 4:
            over.set_result(None)

    def at_work(sock: socket.socket) -> None:  # nothing is taken out, so it has something again
        nonlocal served
        served += 1
        if served == 300:
            mark("asked")
            loop.call_soon(mark, "callback")
            client.send(b"x")
        elif served == 1000:
            mark("end")

    def api() -> None:
        loop.remove_reader(stock)
        mark("api")

    loop.add_reader(stock, api)
    for ours, theirs in crowd:
        loop.serve(ours.fileno(), partial(at_work, ours), lambda: None)
        loop.promote(ours.fileno())
        theirs.send(b"x")
    loop.run_until_complete(asyncio.wait_for(over, 30))
    assert marks["callback"] - marks["asked"] <= AT_ONCE
    assert marks["api"] - marks["asked"] <= len(crowd) + 2 * AT_ONCE
    for ours, theirs in crowd:
        loop.forget(ours.fileno())
        ours.close()
        theirs.close()
    stock.close()
    client.close()


def test_asking_again_goes_on_while_answers_come_soon() -> None:
    """KVM's rule: longer after an answer that came soon, not at all after one that did not."""
    patience = Patience(cores=2)
    assert patience.window == 0
    doublings = math.ceil(math.log2(LONGEST_S / SHORTEST_S))
    for _ in range(1 + doublings):
        patience.waited(LONGEST_S * 0.9, now=1)
    assert patience.window == LONGEST_S
    patience.waited(LONGEST_S * 1.1, now=1)
    assert patience.window == 0


def test_asking_again_rests_where_others_need_the_core() -> None:
    patience = Patience(cores=2)
    patience.waited(LONGEST_S / 2, now=1)
    patience.preempted(now=1)
    patience.waited(LONGEST_S / 2, now=1 + REST_S / 2)
    assert patience.window == 0
    patience.waited(LONGEST_S / 2, now=1 + REST_S * 2)
    assert patience.window > 0


def test_on_one_core_nobody_asks_again() -> None:
    patience = Patience(cores=1)
    patience.waited(1e-6, now=1)
    assert patience.window == 0


def test_an_answer_that_comes_while_asking_is_served(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A ball between two who are each likely to be heard again: all comes through, and a timer too."""
    ours, theirs = pair
    theirs.setblocking(False)
    bounces = 0
    done = loop.create_future()

    def bounce(ball: socket.socket) -> bool:
        nonlocal bounces
        ball.send(ball.recv(100))
        bounces += 1
        if bounces == 2000:
            loop.call_later(0, done.set_result, None)
        return True

    loop.serve(ours.fileno(), lambda: bounce(ours), lambda: None)
    loop.serve(theirs.fileno(), lambda: bounce(theirs), lambda: None)
    for sock in pair:
        loop.promote(sock.fileno())
    theirs.send(b"ball")
    loop.run_until_complete(asyncio.wait_for(done, 10))
    assert bounces >= 2000
    for sock in pair:
        loop.forget(sock.fileno())


def test_what_is_put_off_again_before_waiting_is_tried_again_though_nothing_comes(loop: Loop) -> None:
    """As a submission for which the kernel has no memory just now."""
    tries: list[int] = []
    done = loop.create_future()

    def attempt() -> None:
        tries.append(len(tries))
        if len(tries) < 4:
            loop.call_before_waiting(attempt)
        else:
            loop.call_soon(loop.stop)

    loop.call_before_waiting(attempt)
    loop.call_later(30, done.set_result, None)
    loop.run_forever()
    assert tries == [0, 1, 2, 3] and not done.done()
