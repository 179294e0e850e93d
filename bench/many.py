"""Measures what many targets cost: making each, listing them, starting with them, and memory.

``python -m bench.many [--targets 1000] [--luns 4]``. The aims are those of design.md §5. One client asks one
thing after the other over one connection, as a tool would; times are what it waits. A create of a target is
three kinds of request (the target with its grant, an extent with its file, a LUN), so each kind is shown.

Times hold on a machine that does nothing else; the CPU time of the daemon holds on any. The cost of a command
is looked at before and after, by a client in Python: what it tells is the ratio.
"""

import argparse
import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.daemon import HOST, PREFIX, Daemon
from tests.initiator import SocketInitiator

READ_4K = bytes.fromhex("28000000000000000800")
COMMANDS = 2000
ROUNDS = 5


class Client:
    """One kept connection to the API."""

    def __init__(self, daemon: Daemon) -> None:
        self._connection = http.client.HTTPConnection(HOST, daemon.api_port, timeout=60)
        self._headers = {**daemon.authorization(), "Content-Type": "application/json"}
        self.times: dict[str, list[float]] = {}
        self.ask("the login", "GET", "target/?limit=1")

    def ask(self, kind: str, method: str, path: str, body: Any = None) -> Any:
        """One request; how long it took goes to its kind."""
        data = None if body is None else json.dumps(body)
        began = time.perf_counter()
        self._connection.request(method, f"{PREFIX}services/iscsi/{path}", data, self._headers)
        response = self._connection.getresponse()
        raw = response.read()
        self.times.setdefault(kind, []).append(time.perf_counter() - began)
        assert response.status < 300, (path, response.status, raw)
        return json.loads(raw)

    def close(self) -> None:
        self._connection.close()


def make(client: Client, root: Path, name: str, luns: int) -> None:
    """A target with so many LUNs."""
    target = client.ask(
        "POST target", "POST", "target/", {"iscsi_target_name": name, "iscsi_target_portalgroup": 1}
    )
    for lun in range(luns):
        extent = client.ask(
            "POST extent",
            "POST",
            "extent/",
            {
                "iscsi_target_extent_name": f"{name}-{lun}",
                "iscsi_target_extent_type": "File",
                "iscsi_target_extent_path": str(root / name / f"{lun}.img"),
                "iscsi_target_extent_filesize": "16MB",
            },
        )
        client.ask(
            "POST LUN",
            "POST",
            "targettoextent/",
            {"iscsi_target": target["id"], "iscsi_extent": extent["id"]},
        )


def microseconds_a_command(daemon: Daemon, iqn: str) -> float:
    """The daemon's CPU time for one 4 KiB READ at depth 1."""
    with SocketInitiator((HOST, daemon.portal_port)) as session:
        session.login(iqn)
        session.command(bytes(6))
        before = cpu_seconds(daemon)
        for _ in range(COMMANDS):
            session.command(READ_4K, read=4096)
        spent = cpu_seconds(daemon) - before
        session.logout()
    return spent / COMMANDS * 1e6


def process_directory(daemon: Daemon) -> Path:
    assert daemon.process is not None
    return Path("/proc") / str(daemon.process.pid)


def cpu_seconds(daemon: Daemon) -> float:
    """On all processors, to the nanosecond (proc(5): schedstat, of every thread)."""
    tasks = (process_directory(daemon) / "task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def resident_megabytes(daemon: Daemon) -> float:
    status = (process_directory(daemon) / "status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--luns", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-many-") as directory:
        daemon = Daemon(Path(directory))
        empty_s = seconds(daemon.start)
        try:
            measure(daemon, options.targets, options.luns, empty_s)
        finally:
            daemon.kill9()


def measure(daemon: Daemon, targets: int, luns: int, empty_s: float) -> None:
    client = Client(daemon)
    make(client, daemon.extent_root, "first", 1)
    iqn = daemon.full_name("first")
    alone = statistics.median(microseconds_a_command(daemon, iqn) for _ in range(ROUNDS))
    spent = [cpu_seconds(daemon)]
    for number in range(targets):
        make(client, daemon.extent_root, f"t{number}", luns)
        spent.append(cpu_seconds(daemon))
    for _ in range(ROUNDS):
        client.ask("list of all targets", "GET", "target/?limit=0")
        client.ask("list of all LUNs", "GET", "targettoextent/?limit=0")
        client.ask("list of all extents", "GET", "extent/?limit=0")
    client.close()
    among = statistics.median(microseconds_a_command(daemon, iqn) for _ in range(ROUNDS))
    daemon.terminate()
    full_s = seconds(daemon.start)
    print(f"{targets} targets with {luns} LUNs each\n")
    print(f"{'request':<22}{'median':>10}{'p99':>10}{'longest':>10}   ms")
    for kind, times in client.times.items():
        times.sort()
        shown = (statistics.median(times), times[len(times) * 99 // 100], times[-1])
        print(f"{kind:<22}" + "".join(f"{value * 1e3:>10.2f}" for value in shown))
    tenth = max(1, targets // 10)
    early, late = (
        (spent[end] - spent[end - tenth]) / tenth / (1 + 2 * luns) * 1e3 for end in (tenth, targets)
    )
    print(f"\nCPU of a create         {early:.2f} ms at first, {late:.2f} ms at last")
    print(f"start, empty            {empty_s:.2f} s")
    print(f"start, with all of them {full_s:.2f} s")
    print(f"memory, idle            {resident_megabytes(daemon):.0f} MiB")
    print(f"CPU of a 4 KiB READ     {alone:.1f} µs alone, {among:.1f} µs among them: × {among / alone:.2f}")


if __name__ == "__main__":
    main()
