"""The logical unit controller's line protocol, without sockets (api-semantics §8)."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from protocol import chap
from protocol.access import Credential
from targetd.interface import ConnectionStatus, LunStatus, SessionStatus
from targetd.luc.protocol import MAX_FAILURES, MAX_LINE, VERSION, Conversation, Policy, split_words

DISK = "iqn.2011-03.example:disk"
TRAY = "iqn.2011-03.example:tray"
ALICE = Credential("alice", b"alice's secret", "target", b"target's secret")
BOB = Credential("bob", b"bob's secret")
MD5 = 5

SESSION = SessionStatus(
    id=7,
    initiator_name="iqn.client",
    initiator_alias="",
    target_id=3,
    target_name=DISK,
    target_portal_group_tag=1,
    isid="0x00023d000000",
    tsih=12,
    user="",
    connections=(ConnectionStatus(0, "[::1]:5000", "127.0.0.1:3260", "CRC32C", "None"),),
    negotiated={
        "MaxConnections": "1",
        "FirstBurstLength": "65536",
        "MaxBurstLength": "262144",
        "MaxRecvDataSegmentLength": "262144",
        "InitialR2T": "No",
        "ImmediateData": "Yes",
        "MaxOutstandingR2T": "1",
    },
    luns=(0,),
    commands=1,
    bytes_read=0,
    bytes_written=0,
    age_s=1.0,
    idle_s=0.0,
)


@dataclass
class Shelf:
    """A controller over two targets: a disk, and a tray whose medium can be taken out."""

    rules: Policy = field(default_factory=lambda: Policy("None"))
    tray: LunStatus = field(
        default_factory=lambda: LunStatus("/media/a b.iso", 4096, read_only=True, removable=True)
    )
    logins: tuple[SessionStatus, ...] = ()
    done: list[tuple[str, str, int]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    wait_s: float = 0
    answers: list[tuple[str, bool]] = field(default_factory=list)

    def policy(self) -> Policy:
        return self.rules

    def targets(self) -> Sequence[str]:
        return [DISK, TRAY]

    async def luns(self, target: str) -> Mapping[int, LunStatus] | None:
        return {
            DISK: {0: LunStatus('/tank/"x"', 1 << 30), 5: LunStatus("/tank/y", 512)},
            TRAY: {0: self.tray},
        }.get(target)

    async def sessions(self) -> Sequence[SessionStatus]:
        return self.logins

    async def reset(self, target: str, lun: int) -> None:
        self.done.append(("reset", target, lun))

    async def load(self, target: str, lun: int, loaded: bool) -> None:
        self.done.append(("load" if loaded else "unload", target, lun))

    def refresh(self) -> None:
        self.done.append(("refresh", "", 0))

    def chap_wait_s(self, user: str) -> float:
        return self.wait_s

    def chap_judged(self, user: str, right: bool) -> None:
        self.answers.append((user, right))

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)


def fixed_randomness(count: int) -> bytes:
    return bytes(range(7, 7 + count))


def converse(shelf: Shelf | None = None) -> Conversation:
    return Conversation(shelf or Shelf(), fixed_randomness, "127.0.0.1", "127.0.0.2")


def receive(conversation: Conversation, data: bytes) -> bytes:
    return asyncio.run(conversation.receive(data))


def ask(conversation: Conversation, line: str) -> list[str]:
    answer = receive(conversation, line.encode() + b"\r\n").decode()
    assert not answer or answer.endswith("\r\n")
    return answer.split("\r\n")[:-1]


def test_the_greeting_names_version_and_both_addresses() -> None:
    """§8, Banner."""
    assert converse().greeting == (
        b"iSCSI Target Controller version 0.5 (20150713) on 127.0.0.1 from 127.0.0.2\r\n"
    )


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("NOOP", ["OK NOOP"]),
        ("noop", ["OK NOOP"]),
        ("VERSION", [f"VERSION {VERSION}", "OK VERSION"]),
        ("LIST", [f"LIST {DISK}", f"LIST {TRAY}", "OK LIST"]),
        (f'LIST "{DISK}"', [r'LIST lun0 storage "/tank/\"x\"" 1073741824', "OK LIST"]),
        (f'LIST "{DISK.upper()}" 5', ['LIST lun5 storage "/tank/y" 512', "OK LIST"]),
        (f"LIST '{TRAY}'", ['LIST lun0 removable present unlock - ro "/media/a b.iso" 4096', "OK LIST"]),
        ('LIST "iqn.none"', ["ERR no target"]),
        (f"LIST {DISK} 1", ["ERR no LUN"]),
        (f"LIST {DISK} one", ["ERR invalid parameters"]),
        (f"LIST {DISK} 0 0", ["ERR invalid parameters"]),
        ("INFO", ["INFO no login", "OK INFO"]),
        ("INFO a b", ["ERR invalid parameters"]),
        (f"RESET {DISK} 5", ["OK RESET"]),
        ("RESET", ["ERR invalid parameters"]),
        ("RESET iqn.none 0", ["ERR no target"]),
        (f"RESET {DISK} 1", ["ERR no LUN"]),
        (f"LOAD {DISK}", ["ERR not removable"]),
        (f"UNLOAD {DISK} 0", ["ERR not removable"]),
        (f"LOAD {TRAY}", ["OK LOAD"]),
        (f"UNLOAD {TRAY} 0", ["OK UNLOAD"]),
        (f"CHANGE {DISK} 0 - rw /x auto", ["ERR not removable"]),
        (f"CHANGE {TRAY} 0 - rw /x auto", ["ERR change"]),
        (f"CHANGE {TRAY} 0", ["ERR invalid parameters"]),
        ("REFRESH", ["OK REFRESH"]),
        ("AUTH CHAP_A 5", ["ERR auth not required"]),
        ("SHUTDOWN", ["ERR unknown command"]),
        ('LIST "', ["ERR invalid parameters"]),
        ("NOOP \\", ["ERR invalid parameters"]),
        ("", []),
        ("  \t ", []),
    ],
)
def test_a_line_is_answered_as_istgt_answers_it(line: str, answer: list[str]) -> None:
    """§8, table of commands."""
    assert ask(converse(), line) == answer


def test_reset_and_load_reach_the_unit_that_was_named() -> None:
    shelf = Shelf()
    conversation = converse(shelf)
    for line in (f"RESET {DISK} 5", f"LOAD {TRAY}", f"UNLOAD {TRAY} 0"):
        ask(conversation, line)
    assert shelf.done == [("reset", DISK, 5), ("load", TRAY, 0), ("unload", TRAY, 0)]


def test_a_locked_medium_is_not_ejected() -> None:
    shelf = Shelf(tray=LunStatus("/media/x", 0, removable=True, present=False, locked=True))
    assert ask(converse(shelf), f"UNLOAD {TRAY}") == ["ERR unload"]
    assert ask(converse(shelf), f"LIST {TRAY}")[0] == 'LIST lun0 removable absent lock - rw "/media/x" 0'
    assert shelf.done == []


def test_info_has_a_line_for_each_connection() -> None:
    """§8, INFO; a discovery session is nobody's login."""
    discovery = SessionStatus(**{name: getattr(SESSION, name) for name in SESSION.__slots__})
    object.__setattr__(discovery, "target_id", None)
    expected = (
        f"INFO Login from iqn.client (::1) on {DISK} LU3 (127.0.0.1:3260,1), ISID=00023d000000, TSIH=12, "
        "CID=0, HeaderDigest=on, DataDigest=off, MaxConnections=1, FirstBurstLength=65536, "
        "MaxBurstLength=262144, MaxRecvDataSegmentLength=262144, InitialR2T=No, ImmediateData=Yes"
    )
    conversation = converse(Shelf(logins=(SESSION, discovery)))
    assert ask(conversation, "INFO") == [expected, "OK INFO"]
    assert ask(conversation, f'INFO "{DISK}"') == [expected, "OK INFO"]
    assert ask(conversation, f'INFO "{TRAY}"') == ["INFO no login", "OK INFO"]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_a_line_may_end_in_any_way_and_come_in_pieces(end: bytes) -> None:
    conversation = converse()
    whole = b"NOOP" + end + b"VERSION" + end + b"QUIT" + end + b"NOOP" + end
    out = b"".join(receive(conversation, whole[at : at + 1]) for at in range(len(whole)))
    assert out == f"OK NOOP\r\nVERSION {VERSION}\r\nOK VERSION\r\nOK QUIT\r\n".encode()
    assert conversation.closing


@pytest.mark.parametrize(
    ("length", "answer", "closes"),
    [(MAX_LINE, b"ERR unknown command\r\n", False), (MAX_LINE + 1, b"ERR invalid parameters\r\n", True)],
)
def test_a_line_has_a_longest(length: int, answer: bytes, closes: bool) -> None:
    """§8: at most 4094 bytes."""
    conversation = converse()
    assert receive(conversation, b"X" * length + b"\n") == answer
    assert conversation.closing is closes


def test_a_line_without_an_end_is_not_kept() -> None:
    conversation = converse()
    assert receive(conversation, b"X" * (MAX_LINE + 1)) == b"ERR invalid parameters\r\n"
    assert conversation.closing


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('a "b c" d', ["a", "b c", "d"]),
        (r'"a\"b" c', ['a"b', "c"]),
        (r"'a\b' c\ d", ["a\\b", "c d"]),
        ('""', [""]),
        ("x\"y z\"'w'", ["xy zw"]),
    ],
)
def test_words_are_quoted_in_three_ways(line: str, words: list[str]) -> None:
    """§8, Request."""
    assert split_words(line) == words


# -- CHAP ----------------------------------------------------------------------------------------------

CHALLENGE = fixed_randomness(16)
IDENTIFIER = 7


def answer_for(secret: bytes) -> str:
    return "0x" + chap.response(MD5, IDENTIFIER, secret, CHALLENGE).hex().upper()


@pytest.mark.parametrize("method", ["CHAP", "CHAP Mutual"])
def test_without_a_login_nothing_but_auth_and_quit_is_answered(method: str) -> None:
    conversation = converse(Shelf(Policy(method, (ALICE,))))
    for line in ("NOOP", "VERSION", "LIST", "nonsense"):
        assert ask(conversation, line) == ["ERR auth required"]
    assert ask(conversation, "QUIT") == ["OK QUIT"]


def test_with_auto_a_login_is_the_clients_choice() -> None:
    conversation = converse(Shelf(Policy("Auto", (ALICE,))))
    assert ask(conversation, "NOOP") == ["OK NOOP"]
    assert ask(conversation, "AUTH CHAP_A 5") == [f"AUTH CHAP_IC {IDENTIFIER} 0x{CHALLENGE.hex().upper()}"]


def test_the_right_secret_is_let_in() -> None:
    conversation = converse(Shelf(Policy("CHAP", (BOB, ALICE))))
    assert ask(conversation, "AUTH CHAP_A 5") == [f"AUTH CHAP_IC {IDENTIFIER} 0x{CHALLENGE.hex().upper()}"]
    assert ask(conversation, f"AUTH CHAP_NR alice {answer_for(ALICE.secret)}") == ["OK AUTH"]
    assert ask(conversation, "NOOP") == ["OK NOOP"]


def test_a_client_that_challenges_gets_its_proof() -> None:
    conversation = converse(Shelf(Policy("CHAP Mutual", (ALICE,))))
    ask(conversation, "AUTH CHAP_A 5")
    theirs = b"a challenge of theirs"
    proof = chap.response(MD5, 200, ALICE.peer_secret, theirs).hex().upper()
    line = f"AUTH CHAP_NR alice {answer_for(ALICE.secret)} 200 0x{theirs.hex()}"
    assert ask(conversation, line) == [f'AUTH CHAP_NR "target" 0x{proof}', "OK AUTH"]


CHALLENGED = f"200 0x{b'theirs'.hex()}"


@pytest.mark.parametrize(
    ("method", "lines", "answer"),
    [
        ("CHAP", ["AUTH CHAP_A 6"], "ERR invalid algorithm"),
        ("CHAP", ["AUTH"], "ERR CHAP sequence error"),
        ("CHAP", ["AUTH CHAP_NR alice 0x00"], "ERR CHAP sequence error"),
        ("CHAP", ["AUTH CHAP_A 5", "AUTH CHAP_NR alice zz"], "ERR response format error"),
        # what int() and fromhex() take, and no number is
        (
            "CHAP",
            ["AUTH CHAP_A 5", f"AUTH CHAP_NR alice {answer_for(ALICE.secret)} 1_0 0xAB"],
            "ERR response format error",
        ),
        (
            "CHAP",
            ["AUTH CHAP_A 5", f"AUTH CHAP_NR alice {answer_for(ALICE.secret)} ' 1' 0xAB"],
            "ERR response format error",
        ),
        (
            "CHAP",
            ["AUTH CHAP_A 5", f"AUTH CHAP_NR alice {answer_for(ALICE.secret)} 1 '0xAB CD'"],
            "ERR response format error",
        ),
        ("CHAP", ["AUTH CHAP_A 5", f"AUTH CHAP_NR alice {answer_for(b'wrong')}"], "ERR CHAP sequence error"),
        (
            "CHAP",
            ["AUTH CHAP_A 5", f"AUTH CHAP_NR nobody {answer_for(ALICE.secret)}"],
            "ERR CHAP sequence error",
        ),
        (
            "CHAP Mutual",
            ["AUTH CHAP_A 5", f"AUTH CHAP_NR alice {answer_for(ALICE.secret)}"],
            "ERR CHAP sequence error",
        ),
        (
            "CHAP",
            ["AUTH CHAP_A 5", f"AUTH CHAP_NR bob {answer_for(BOB.secret)} {CHALLENGED}"],
            "ERR auth user or secret is missing",
        ),
        (
            "CHAP",
            ["AUTH CHAP_A 5", f"AUTH CHAP_NR alice {answer_for(ALICE.secret)} 1 0x{CHALLENGE.hex()}"],
            "ERR CHAP sequence error",
        ),
    ],
)
def test_a_failed_login_is_refused_and_begins_anew(method: str, lines: list[str], answer: str) -> None:
    """§8: any failure restarts the exchange."""
    shelf = Shelf(Policy(method, (ALICE, BOB)))
    conversation = converse(shelf)
    *before, last = lines
    for line in before:
        ask(conversation, line)
    assert ask(conversation, last) == [answer]
    assert ask(conversation, "NOOP") == ["ERR auth required"]
    assert ask(conversation, f"AUTH CHAP_NR alice {answer_for(ALICE.secret)}") == ["ERR CHAP sequence error"]
    assert shelf.refusals and not any("secret's" in reason for reason in shelf.refusals)


def test_a_group_without_users_lets_nobody_in() -> None:
    """§8: FreeNAS' defaults, CHAP and no group, can never authenticate."""
    conversation = converse(Shelf(Policy("CHAP")))
    ask(conversation, "AUTH CHAP_A 5")
    line = f"AUTH CHAP_NR alice {answer_for(b'')}"
    assert ask(conversation, line) == ["ERR auth user or secret is missing"]


def test_who_keeps_guessing_is_closed() -> None:
    conversation = converse(Shelf(Policy("CHAP", (ALICE,))))
    for _ in range(MAX_FAILURES):
        assert not conversation.closing
        ask(conversation, "AUTH CHAP_A 5")
        ask(conversation, f"AUTH CHAP_NR alice {answer_for(b'guess')}")
    assert conversation.closing


def test_who_has_to_wait_is_not_looked_at() -> None:
    shelf = Shelf(Policy("CHAP", (ALICE,)))
    conversation = converse(shelf)
    for secret in (b"guess", ALICE.secret):
        ask(conversation, "AUTH CHAP_A 5")
        ask(conversation, f"AUTH CHAP_NR alice {answer_for(secret)}")
    assert shelf.answers == [("alice", False), ("alice", True)]
    shelf.wait_s = 3
    conversation = converse(shelf)
    ask(conversation, "AUTH CHAP_A 5")
    line = f"AUTH CHAP_NR alice {answer_for(ALICE.secret)}"
    assert ask(conversation, line) == ["ERR too many wrong answers"]
    assert ask(conversation, "NOOP") == ["ERR auth required"]
    assert len(shelf.answers) == 2
