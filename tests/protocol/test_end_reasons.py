"""Why connections and sessions end: a value of ``EndReason``, whatever the words."""

import copy
import pickle
from collections.abc import Callable

import pytest

from protocol.connection import Connection
from protocol.events import End, EndReason
from tests.initiator import LoginFailed, SessionState
from tests.protocol.target import TARGET, Endpoint, MemoryTarget, connection_of


def logs_out(target: MemoryTarget) -> Connection:
    peer = target.logged_in()
    peer.logout()
    return connection_of(peer)


def is_refused(target: MemoryTarget) -> Connection:
    peer = target.connect()
    with pytest.raises(LoginFailed):
        peer.login("iqn.2026-11.example:nowhere")
    return connection_of(peer)


def never_logs_in(target: MemoryTarget) -> Connection:
    connection = Endpoint(target).connection
    connection.tick(target.now)
    connection.tick(target.now + connection.login_limits.seconds + 1)
    return connection


def says_nothing(target: MemoryTarget) -> Connection:
    peer = target.logged_in()
    peer.answer_pings = False
    connection = connection_of(peer)
    connection.tick(target.now + 1000)
    connection.tick(target.now + 10_000)
    return connection


def stalls(target: MemoryTarget) -> Connection:
    peer = target.logged_in()
    connection_of(peer).nop_interval_s = 0
    peer.send(peer.initiator.nop_out(b"x")[:50])
    target.pass_time(1000)
    return connection_of(peer)


def does_not_log_out(target: MemoryTarget) -> Connection:
    connection = connection_of(target.logged_in())
    connection.nop_interval_s = 0
    connection.request_logout(5, End(EndReason.STOPPED, "shutdown"))
    target.pass_time(6)
    return connection


def does_not_negotiate(target: MemoryTarget) -> Connection:
    connection = connection_of(target.logged_in())
    connection.nop_interval_s = 0
    connection.request_negotiation(5)
    target.pass_time(6)
    return connection


def breaks_the_protocol(target: MemoryTarget) -> Connection:
    peer = target.connect()
    peer.send(bytes([0x3F]) + bytes(47))
    return connection_of(peer)


def logs_in_again(target: MemoryTarget) -> Connection:
    first = target.logged_in()
    target.connect(session=SessionState(isid=first.session.isid)).login(TARGET)
    return connection_of(first)


@pytest.mark.parametrize(
    ("story", "reason"),
    [
        (logs_out, EndReason.LOGOUT),
        (is_refused, EndReason.LOGIN_REFUSED),
        (never_logs_in, EndReason.LOGIN_TIMEOUT),
        (says_nothing, EndReason.PING_TIMEOUT),
        (stalls, EndReason.IO_TIMEOUT),
        (does_not_log_out, EndReason.LOGOUT_TIMEOUT),
        (does_not_negotiate, EndReason.NEGOTIATION_TIMEOUT),
        (breaks_the_protocol, EndReason.PROTOCOL),
        (logs_in_again, EndReason.REINSTATEMENT),
    ],
)
def test_each_end_has_its_reason(story: Callable[[MemoryTarget], Connection], reason: EndReason) -> None:
    closing = story(MemoryTarget()).closing
    assert closing is not None and closing, "there are words too"
    assert closing.reason is reason


def test_a_session_ends_for_the_reason_of_its_connection() -> None:
    target = MemoryTarget()
    peer = target.logged_in()
    session = connection_of(peer).session
    assert session is not None
    connection_of(peer).lost(End(EndReason.NETWORK, "Connection reset by peer"))
    assert session.ended is not None
    assert (session.ended.reason, session.ended) == (EndReason.NETWORK, "Connection reset by peer")


def test_the_words_alone_go_to_others() -> None:
    """Another process, and JSON, are told a plain text."""
    end = End(EndReason.LOGOUT, "logout")
    for words in (str(end), pickle.loads(pickle.dumps(end)), copy.deepcopy(end)):
        assert (type(words), words) == (str, "logout")
