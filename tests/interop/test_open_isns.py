"""Open-iSNS, Debian's iSNS server: what the daemon registers is what it knows then."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from targetd.isns.messages import (
    DELIMITER,
    HEADER_LENGTH,
    Attribute,
    Function,
    PduHeader,
    Tag,
    read_response,
    request,
    text,
)
from tests.daemon import Daemon
from tests.functional.sessions import daemon_in
from tests.interop.peers import needs
from tests.network import Network, needs_networks

CONFIGURATION = """\
Database = {0}/db
PIDFile = {0}/pid
ControlSocket = {0}/control
DefaultDiscoveryDomain = 1
Security = 0
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Network, "subprocess.Popen[bytes]"]]:
    """isnsd on its own port 3205, in a network of its own."""
    network = Network()
    (tmp_path / "db").mkdir()
    (tmp_path / "isnsd.conf").write_text(CONFIGURATION.format(tmp_path))
    with network.entered():
        process = subprocess.Popen(
            ["isnsd", "-f", "-c", str(tmp_path / "isnsd.conf")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield network, process
        finally:
            process.terminate()
            process.wait(10)
    network.close()


def names(entity: str, source: str) -> list[str]:
    """Of the nodes of an entity, as the server knows them."""
    with socket.create_connection(("127.0.0.1", 3205), 10) as sock:
        key = text(Tag.ENTITY_IDENTIFIER, entity)
        wanted = [text(Tag.ISCSI_NAME, source), key, DELIMITER, Attribute(Tag.ISCSI_NAME)]
        sock.sendall(request(Function.QUERY, 1, wanted))
        stream = sock.makefile("rb")
        header = PduHeader.parse(stream.read(HEADER_LENGTH))
        _, said = read_response(stream.read(header.length))
    return sorted(each.value.rstrip(b"\0").decode() for each in said if each.tag == Tag.ISCSI_NAME)


def registered(daemon: Daemon, targets: int) -> None:
    daemon.wait_for_line("iSNS server 127.0.0.1: ", f"{targets} targets registered")


@needs("isnsd")
@needs_networks
def test_open_isns_knows_what_is_registered(
    server: tuple[Network, "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    with daemon_in(tmp_path / "daemon") as daemon:
        one, two = daemon.create_disk("one", "1MB"), daemon.create_disk("two", "1MB")
        entity = f"{socket.gethostname()}:{one.iqn.rpartition(':')[0]}"
        body = {"iscsi_isns_servers": "127.0.0.1"}
        daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", body)
        registered(daemon, 2)
        assert names(entity, two.iqn) == [one.iqn, two.iqn]
        daemon.delete("target", one.target_id)
        registered(daemon, 1)
        assert names(entity, two.iqn) == [two.iqn]
        body = {"iscsi_isns_servers": ""}
        daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", body)
        daemon.wait_for_line("iSNS server 127.0.0.1: deregistered")
        assert names(entity, two.iqn) == []
