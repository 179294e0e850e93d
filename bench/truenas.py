"""1,000 volumes through TrueNAS' REST v2.0: time of each create and of a list, and what I/O notices of it.

    python -m bench.truenas [--volumes 1000]

Aims: 30 ms a create, 150 ms a list. A reader at queue depth 1 runs all the while; its latency is shown alone
and beside. Everything is on loopback; the pool is a directory below ``$TMPDIR``.
"""

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.daemon import HOST, Daemon
from tests.initiator import SocketInitiator

MB = 1 << 20
READ = bytes.fromhex("28000000000000000800")


class Client:
    """One HTTP connection with a login."""

    def __init__(self, daemon: Daemon) -> None:
        self.connection = http.client.HTTPConnection(HOST, daemon.api_port, timeout=120)
        self.headers = {**daemon.authorization(), "Content-Type": "application/json"}

    def ask(self, method: str, path: str, body: Any = None) -> tuple[float, Any]:
        """Milliseconds, and the answer."""
        began = time.perf_counter()
        data = None if body is None else json.dumps(body)
        self.connection.request(method, f"/api/v2.0{path}", data, self.headers)
        response = self.connection.getresponse()
        raw = response.read()
        spent = (time.perf_counter() - began) * 1e3
        if response.status != 200:
            raise SystemExit(f"{method} {path}: {response.status} {raw.decode()[:200]}")
        return spent, json.loads(raw)


class Reader(threading.Thread):
    """4 KiB READs at depth 1; latencies in ms."""

    def __init__(self, daemon: Daemon, iqn: str) -> None:
        super().__init__(daemon=True)
        self.session = SocketInitiator((HOST, daemon.portal_port))
        self.session.login(iqn)
        self.session.command(bytes(6))
        self.latencies: list[float] = []
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            began = time.perf_counter()
            assert self.session.command(READ, read=4096).good
            self.latencies.append((time.perf_counter() - began) * 1e3)

    def p99(self, seconds: float = 0.0) -> float:
        """Of what has been read since the last call."""
        time.sleep(seconds)
        taken, self.latencies = self.latencies, []
        return statistics.quantiles(taken, n=100)[-1]


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--volumes", type=int, default=1000)
    count = options.parse_args().volumes
    with tempfile.TemporaryDirectory() as place:
        pool = Path(place) / "pool"
        pool.mkdir()
        daemon = Daemon(Path(place) / "daemon", ["--pool", f"tank={pool}"]).start()
        try:
            disk = daemon.create_disk("reader", "64MB")
            reader = Reader(daemon, disk.iqn)
            reader.start()
            alone = reader.p99(3.0)
            client = Client(daemon)
            volume = {"type": "VOLUME", "volsize": MB, "sparse": True}
            creates = [
                client.ask("POST", "/pool/dataset", {**volume, "name": f"tank/v{number:04}"})[0]
                for number in range(count)
            ]
            beside = reader.p99()
            lists = [client.ask("GET", "/pool/dataset?extra.retrieve_children=false")[0] for _ in range(7)]
            listing = reader.p99()
            reader.stopped = True
            reader.join()
        finally:
            daemon.terminate()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")
    print(f"create of one of {count} volumes: mean {statistics.mean(creates):.1f} ms, "
          f"p99 {statistics.quantiles(creates, n=100)[-1]:.1f} ms (aim 30)")  # fmt: skip
    print(f"list of all of them: median {statistics.median(lists):.1f} ms (aim 150)")
    print(f"p99 of a READ: {alone:.2f} ms alone, {beside:.2f} beside creates, {listing:.2f} beside lists")
    return 0


if __name__ == "__main__":
    sys.exit(main())
