"""What the protocol lets a peer have, all in one place, each with its reason. Numbers only.

A number here is ours. What an operator sets, or both sides negotiate, bounds the rest:

    sessions in all                  ``SessionTable.max_sessions``, from iscsi_maxsesh
    connections of a session         MaxConnections (§13.2), from iscsi_maxconnect
    outstanding commands             the command window, ``Grant.queue_depth``, and MAX_IMMEDIATE_TASKS
    a data segment                   the MaxRecvDataSegmentLength that we declared (§13.12); before it came
                                     into force, MAX_LOGIN_DATA. More is never received, let alone kept
    unsolicited data of a command    FirstBurstLength (§13.14), checked at each PDU; of a session, that for
                                     every command of its window
    solicited data                   MaxBurstLength (§13.13) an R2T, as many R2Ts as MaxOutstandingR2T; of all
                                     commands of a connection, MAX_IN_FLIGHT, or less where there are many
    replies that wait to be read     of small commands, the command window; of large ones, MAX_IN_FLIGHT

How many connections the process takes at all, before it knows from whom, is ``targetd.net.admission``.
"""

from dataclasses import dataclass

__all__ = [
    "DATA_MEMORY",
    "KEPT_COST",
    "LARGE_COMMAND",
    "LEAST_IN_FLIGHT",
    "MAX_AHS_WORDS",
    "MAX_CHAP_BINARY",
    "MAX_DISCOVERY_OF_ONE",
    "MAX_DISCOVERY_SESSIONS",
    "MAX_EARLY_HEADERS",
    "MAX_FRUITLESS",
    "MAX_IMMEDIATE_TASKS",
    "MAX_IN_FLIGHT",
    "MAX_KEPT",
    "MAX_KEY",
    "MAX_LOGIN_DATA",
    "MAX_LONG_VALUE",
    "MAX_NAME",
    "MAX_PLAIN_READ",
    "MAX_PLAIN_REPLIES",
    "MAX_TEXT",
    "MAX_TEXT_PIECE",
    "MAX_TEXT_QUEUED",
    "MAX_TSIH",
    "MAX_VALUE",
    "PING_PATIENCE",
    "PROBE_S",
    "REMEMBERED_TAGS",
    "SEQUENCE_TIMEOUT_S",
    "LoginLimits",
]

# -- Before login --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoginLimits:
    """What a peer that has proven nothing may cost. Ordinary logins take 2 to 6 PDUs and 1 KiB."""

    seconds: float = 15.0
    """From connect to full feature phase; enforced by the connection's owner."""
    pdus: int = 64
    bytes: int = 65536
    """Of text over all PDUs; the longest sensible login, with 1 KiB CHAP values, has 5 KiB."""
    keys: int = 128
    """There are about 30."""


MAX_LOGIN_DATA = 8192
"""Bytes of a data segment of either side before MaxRecvDataSegmentLength is in force (RFC 7143 §13.12)."""

MAX_CHAP_BINARY = 1024
"""Bytes of CHAP_C and CHAP_R (RFC 7143 §12.1.3)."""

# -- Text ----------------------------------------------------------------------------------------------

MAX_NAME = 223
"""Bytes of an iSCSI name (RFC 7143 §4.2.7.1)."""

MAX_KEY = 63
"""Bytes of a key name (RFC 7143 §6.1)."""

MAX_VALUE = 255
"""Bytes of a text value, unless a key says otherwise (RFC 7143 §6.1)."""

MAX_LONG_VALUE = 8192
"""Bytes of values that may be long, as binary ones. No login data segment is longer."""

MAX_TEXT = 8192
"""Bytes of one Text Request's text over all its PDUs, which take a ms to read. There is nothing
to ask that takes more than a line."""

MAX_TEXT_QUEUED = 1 << 20
"""Bytes of text answers in one ``data_to_send``. A request of 64 bytes can ask for the names of thousands
of targets, and one turn brings thousands of requests."""

MAX_TEXT_PIECE = 65536
"""Bytes of text in one Text Response, whatever the initiator takes: some 600 targets, a few ms of work."""

# -- PDUs and tasks ------------------------------------------------------------------------------------

MAX_AHS_WORDS = 66
"""One extended CDB of 260 bytes and one bidirectional length (RFC 7143 §11.2.2) need no more."""

MAX_IMMEDIATE_TASKS = 64
"""Immediate commands are outside the window (RFC 7143 §4.2.2.1), so they need a bound of their own; more
are rejected with Immediate Command Reject. Initiators use a handful."""

MAX_EARLY_HEADERS = 64 * 1024
"""Bytes of Data-Out headers kept for a command that waits for its turn, beside FirstBurstLength of data."""

LARGE_COMMAND = 64 * 1024
"""Bytes of data from which on a command is held back when there is no room for them. Smaller ones never are:
the command window of 32 bounds them to 2 MiB."""

MAX_IN_FLIGHT = 16 * 2**20
"""Bytes that the large commands of a connection may hold in memory, for each direction: replies that are
being made or wait to be read, and buffers for Data-Out. What does not fit waits for its turn, in its order;
a command that is larger by itself has its turn all the same, when little or nothing else is there. A window
of 32 commands of 512 KiB fits, or the largest I/O of Windows (8 MiB) twice; without a bound a queue of the
largest commands would be 1 GiB that a peer asks for, and never reads or sends."""

LEAST_IN_FLIGHT = 2**20
"""What a connection has of that, however many there are."""

DATA_MEMORY = 4 * 2**30
"""Bytes for the large commands of all connections, unless the owner says otherwise: divided evenly among
them, up to ``MAX_IN_FLIGHT`` for each."""

MAX_PLAIN_READ = 256 * 1024
"""Bytes of a READ that is answered while its wake-up is still being read (``protocol.fastpath``)."""

MAX_PLAIN_REPLIES = 256
"""Buffers queued after which such a READ waits for the end of its wake-up, where the command window counts:
there are two or three a reply, and one turn may bring READs of 48 bytes by the thousand, with numbers that
the peer was not told yet."""

REMEMBERED_TAGS = 64
"""Aborted tasks whose Data-Out may still be on the way, so that it is dropped without a Reject."""

# -- Error recovery ------------------------------------------------------------------------------------

MAX_KEPT = 16 * 2**20
"""Bytes that a connection keeps so that it can send them again (ErrorRecoveryLevel 1 and 2), data, headers
and what else they cost. Room for twice a queue of 32 commands of 256 KiB; with half of it full,
acknowledgements of data are asked for, and beyond it the oldest is forgotten and a SNACK for it
rejected."""

KEPT_COST = 256
"""What a PDU kept costs beside its data: header, tuple, place in a dict."""

SEQUENCE_TIMEOUT_S = 2
"""Silence after which the rest of a Data-Out sequence is taken for lost (RFC 7143 §7.1.4.1). SCSI timers of
initiators run for 30 s and more."""

MAX_FRUITLESS = 15
"""R2Ts in a row that bring nothing, after which a write is given up."""

# -- Sessions ------------------------------------------------------------------------------------------

PING_PATIENCE = 4
"""Ping intervals that a peer may take to answer. A host that is gone shows much sooner, as its kernel stops
acknowledging (the owner sets TCP_USER_TIMEOUT); this is for an initiator that has other things to do."""

PROBE_S = 5
"""How long the answer to a multi-task abort waits for the other connections of the session to show that they
have got what was sent before (RFC 7143 §4.2.3.3 d). One that is silent for longer is most likely dead."""

MAX_DISCOVERY_SESSIONS = 256
"""They last as long as a SendTargets takes; who keeps them open, or opens them without end, must not take
the TSIHs of those who have work to do. One more ends the oldest of the origin that has the most."""

MAX_DISCOVERY_OF_ONE = 64
"""Of one origin (an address): one more ends its oldest. A host has one for each portal while it looks."""

MAX_TSIH = 0xFFFF
"""TSIH is 16 bits and 0 is reserved (RFC 7143 §11.12.6)."""
