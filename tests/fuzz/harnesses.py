"""What is fuzzed: for each entry point a function of bytes that must return, whatever they are.

``python -m tests.fuzz.harnesses NAME [libFuzzer options]`` runs one under atheris, guided by the coverage of
our packages (``make fuzz`` runs all). Without atheris the same functions are called with the corpus and with
mutations of it by ``test_harnesses.py``. Any exception is a finding.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from protocol.enums import Opcode
from protocol.textkeys import TextError, parse, read_binary, read_number
from tests.initiator import MemoryPeer
from tests.protocol.target import MemoryTarget, connection_of

CORPUS = Path(__file__).parent / "corpus"
KEPT = 4 << 20
"""More than this waiting to be sent for 64 KiB received would be an amplifier."""


def _deliver(peer: MemoryPeer, data: bytes) -> None:
    """All of it, in two pieces at a place the data itself names."""
    connection = connection_of(peer)
    cut = data[0] * len(data) // 256 if data else 0
    for piece in (data[:cut], data[cut:]):
        if piece and not connection.closing:
            peer.send(piece)
    assert sum(map(len, connection.data_to_send())) < KEPT + 64 * len(data) or not connection.session
    connection.lost("over")


def before_login(data: bytes) -> None:
    """Any bytes as the first of a connection."""
    _deliver(MemoryTarget(size=1 << 16).connect(strict=False), data)


def login_text(data: bytes) -> None:
    """Well-formed Login Requests, their flags and text from the data."""
    peer = MemoryTarget(size=1 << 16).connect(strict=False)
    connection = connection_of(peer)
    for piece in data.split(b"\xff")[:16]:
        if connection.closing:
            break
        flags = piece[0] if piece else 0
        request = peer.initiator.login_request(piece[1:8192], flags=flags, initiator_task_tag=1)
        peer.send(request)
    connection.lost("over")


def after_login(data: bytes) -> None:
    """Any bytes in full feature phase."""
    _deliver(MemoryTarget(size=1 << 16).logged_in(strict=False), data)


def pdus(data: bytes) -> None:
    """Headers from the data, 48 bytes each, with lengths and CmdSN made right so that they get somewhere."""
    peer = MemoryTarget(size=1 << 16).logged_in(strict=False)
    connection = connection_of(peer)
    for at in range(0, min(len(data), 48 * 32), 48):
        header = bytearray(data[at : at + 48].ljust(48, b"\0"))
        body = bytes(header[32:48]) * (header[7] % 5)
        header[4:8] = len(body).to_bytes(4, "big")
        if connection.session is None or connection.closing:
            break
        if header[0] & 0x3F != Opcode.SCSI_DATA_OUT:
            header[24:28] = connection.session.exp_cmd_sn.to_bytes(4, "big")
        peer.send(bytes(header) + body)
    connection.lost("over")


def commands(data: bytes) -> None:
    """CDB of 16 bytes (a longer one for 7Fh) and, behind it, the parameter list."""
    target = MemoryTarget(luns=2, size=1 << 16)
    peer = target.logged_in(strict=False)
    connection = connection_of(peer)
    size = 32 if data[:1] == b"\x7f" else 16
    cdb, parameters = data[:size].ljust(size, b"\0"), data[size : size + 4096]
    write = bool(parameters)
    pdu = peer.initiator.scsi_command(
        cdb,
        parameters,
        write=write,
        read=not write,
        expected=len(parameters) if write else 65535,
    )
    peer.send(pdu)
    assert not connection.closing or connection.session is not None
    connection.lost("over")


def text_keys(data: bytes) -> None:
    """The text of keys, and values read as numbers and binary (CHAP)."""
    try:
        pairs = parse(data)
    except TextError:
        return
    for _, value in pairs:
        for read in (read_number, lambda text: read_binary(text, 1024)):
            try:
                read(value)
            except TextError:
                pass


def text_requests(data: bytes) -> None:
    """Text Requests in full feature phase, pieces parted by FFh."""
    peer = MemoryTarget(size=1 << 16).logged_in(strict=False)
    for piece in data.split(b"\xff")[:16]:
        flags = piece[0] if piece else 0x80
        peer.send(peer.initiator.text_request(piece[1:8192], flags=flags, initiator_task_tag=9))
    connection_of(peer).lost("over")


HARNESSES: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (before_login, login_text, after_login, pdus, commands, text_keys, text_requests)
}


def seeds(name: str) -> list[bytes]:
    """What to begin with: the corpus of a harness."""
    path = CORPUS / f"{name}.json"
    return [bytes.fromhex(text) for text in json.loads(path.read_text(encoding="utf-8"))]


def main() -> None:
    """Run one under atheris."""
    import tempfile

    import atheris

    name = sys.argv.pop(1)
    harness = HARNESSES[name]
    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as directory:
        for number, seed in enumerate(seeds(name)):
            (Path(directory) / str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, directory], harness)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
