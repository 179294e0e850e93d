"""What a whole test run says on loopback, recorded for a second reader of RFC 7143 at its end.

``python -m tests.recording FILE LOW-HIGH`` has dumpcap take every TCP segment of these ports and writes those
of the beginning of each connection to FILE, which stays small however much data the tests move: a
conversation is kept whole up to ``KEPT_OF_A_CONNECTION``, then not at all, so a dissector never has to begin
in the middle of a PDU. SIGINT ends it.
"""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

KEPT_OF_A_CONNECTION = 1 << 20
"""Bytes of both directions: thousands of small PDUs, or the first few large ones."""
KEPT_OF_ALL = 1 << 29
"""Bytes of the file; a whole run needs a fraction of it."""
KERNEL_BUFFER_MIB = 64

_FILE_HEADER = 24
_RECORD = struct.Struct("<IIII")
_SYN_ONLY, _SYN_ACK = 0x02, 0x12
_ETHERNET = 14
_BHS = 48
_LOGIN = 0x43
"""Opcode 3, always immediate (RFC 7143 §11.12)."""


def keep(source: BinaryIO, target: BinaryIO) -> None:
    """Copy a capture (classic pcap, little-endian, Ethernet) and leave out what is too much."""
    target.write(source.read(_FILE_HEADER))
    target.flush()
    kept: dict[bytes, int] = {}
    total = 0
    while len(header := source.read(_RECORD.size)) == _RECORD.size:
        length = _RECORD.unpack(header)[2]
        frame = source.read(length)
        if len(frame) < length:
            break
        connection = _connection(frame)
        if connection is None:
            continue
        name, flags = connection
        if flags & _SYN_ACK == _SYN_ONLY:
            kept[name] = 0  # a new one between the same ports
        size = kept.get(name)
        if size is None or size > KEPT_OF_A_CONNECTION or total > KEPT_OF_ALL:
            continue  # its beginning was not seen, or enough of it was
        kept[name] = size + length
        total += length
        target.write(header)
        target.write(frame)


def portals(source: BinaryIO, low: int, high: int) -> set[int]:
    """The ports of a capture, within bounds, to which somebody sent a Login Request first.

    Wireshark's own guess at what is iSCSI comes after its list of ports, and any port is in that.
    """
    source.read(_FILE_HEADER)
    found: set[int] = set()
    while len(header := source.read(_RECORD.size)) == _RECORD.size:
        frame = source.read(_RECORD.unpack(header)[2])
        at = _tcp_at(frame)
        if at is None:
            continue
        port = int.from_bytes(frame[at + 2 : at + 4], "big")
        payload = frame[at + (frame[at + 12] >> 4) * 4 :]
        if low <= port <= high and len(payload) >= _BHS and payload[0] == _LOGIN:
            found.add(port)
    return found


def _tcp_at(frame: bytes) -> int | None:
    """Where the TCP header of a frame begins."""
    kind = frame[12:14]
    if kind == b"\x08\x00":
        return _ETHERNET + 4 * (frame[_ETHERNET] & 0x0F)
    return _ETHERNET + 40 if kind == b"\x86\xdd" else None


def _connection(frame: bytes) -> tuple[bytes, int] | None:
    """Which connection a frame belongs to, the same for both directions, and its TCP flags."""
    at = _tcp_at(frame)
    if at is None:
        return None
    size = 4 if frame[12:14] == b"\x08\x00" else 16  # the two addresses end an IPv4 or IPv6 header
    start = _ETHERNET + (12 if size == 4 else 8)
    ends = frame[start : start + size], frame[start + size : start + 2 * size]
    ports = frame[at : at + 2], frame[at + 2 : at + 4]
    return b"".join(sorted((ends[0] + ports[0], ends[1] + ports[1]))), frame[at + 13]


def main(path: Path, ports: str) -> int:
    """Record until told to stop; what dumpcap says of dropped packets is passed on."""
    dumpcap = subprocess.Popen(
        [
            *("dumpcap", "-i", "lo", "-P", "-q", "-B", str(KERNEL_BUFFER_MIB)),
            *("-f", f"tcp portrange {ports}", "-w", "-"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    # Told to stop, dumpcap stops, and its end of file ends the loop below; the run's Ctrl-C reaches both.
    signal.signal(signal.SIGINT, lambda *_: dumpcap.send_signal(signal.SIGINT))
    assert dumpcap.stdout is not None
    with path.open("wb") as file, os.fdopen(dumpcap.stdout.fileno(), "rb", 1 << 20, closefd=False) as source:
        keep(source, file)
    return dumpcap.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
