"""What has no rate of commands: logins, requests of the API, sessions that are silent, many targets.

Each function returns figures by name; ``bench.report`` shows them. Logins and silent sessions are measured
for every subject that can; the API and many targets are ours alone.
"""

import json
import os
import select
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.many import Client, make
from bench.subjects import Ours, Subject
from bench.workloads import (
    HANG_LIMIT_S,
    WORKLOADS,
    ClientFailedError,
    load,
    load_command,
    make_image,
    run_client,
    warm,
)

IDLE_S = 10.0
SETTLE_S = 7.0
"""What logins left to do is no part of being idle: a look for garbage in the fourth quiet second, 0.1 s."""
LISTS = 5
"""Of each kind."""
READS = next(work for work in WORKLOADS if work.name == "4k-randread-qd32-load")

Figures = dict[str, float]


# -- logins and silent sessions ---------------------------------------------------------------------


def logins(subject: Subject, seconds: float) -> Figures:
    """Normal sessions opened and closed one after the other over loopback, by one client."""
    before = subject.cpu_seconds()
    answer = json.loads(run_client(load_command(subject, "--logins", "--seconds", str(seconds)), seconds))
    spent = subject.cpu_seconds() - before
    return {"logins/s": answer["iops"], "CPU ms per login": spent / answer["ios"] * 1e3}


def idle(subject: Subject, sessions: int, seconds: float = IDLE_S) -> Figures:
    """What sessions cost that say nothing: CPU in percent of one core, memory of each."""
    memory = subject.memory_kib()
    with subprocess.Popen(
        load_command(subject, "--idle", "--sessions", str(sessions)),
        stdin=subprocess.PIPE,  # it stays until this ends
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as client:
        try:
            assert client.stdout is not None and client.stdin is not None
            told, _, _ = select.select([client.stdout], [], [], 3 * HANG_LIMIT_S)
            if not told or not os.read(client.stdout.fileno(), 64):
                raise ClientFailedError(f"{sessions} sessions cannot be had")
            time.sleep(SETTLE_S)
            before = subject.cpu_seconds()
            time.sleep(seconds)
            spent = subject.cpu_seconds() - before
            grown = subject.memory_kib() - memory
        finally:
            client.kill()
    return {
        "idle sessions": sessions,
        "CPU % idle": 100 * spent / seconds,
        "KiB per session": grown / sessions,
    }


# -- the API ----------------------------------------------------------------------------------------


def api_rate(subject: Ours, seconds: float) -> Figures:
    """Requests a second, one after the other."""
    api = Client(subject.daemon)
    target = api.ask("the login", "GET", "target/?limit=1")[0]["id"]
    kinds: dict[str, Callable[[int], object]] = {
        "GET/s": lambda _: api.ask("GET", "GET", f"target/{target}/"),
        # An alias that changes each time, so that each PUT is validated, saved (synced) and made live.
        "PUT/s": lambda n: api.ask("PUT", "PUT", f"target/{target}/", {"iscsi_target_alias": f"a{n}"}),
    }
    rates = {}
    for name, ask in kinds.items():
        began = time.perf_counter()
        count = 0
        while time.perf_counter() < began + seconds:
            ask(count)
            count += 1
        rates[name] = count / (time.perf_counter() - began)
    api.close()
    return rates


# -- many targets -----------------------------------------------------------------------------------


def _cpu_us(subject: Subject, rounds: int, seconds: float) -> float:
    samples = []
    for _ in range(rounds):
        before = subject.cpu_seconds()
        ios = load(subject, READS, seconds)[0]
        samples.append((subject.cpu_seconds() - before) / ios * 1e6)
    return statistics.median(samples)


def _start_seconds(subject: Ours) -> float:
    began = time.perf_counter()
    subject.start()
    return time.perf_counter() - began


def many(targets: int, luns: int, rounds: int, seconds: float, directory: Path | None = None) -> Figures:
    """A daemon of its own, before and after it got so many targets with so many LUNs each."""
    with tempfile.TemporaryDirectory(prefix="iscsi-bench-", dir=directory) as scratch:
        image = Path(scratch) / "image"
        make_image(image, 64)
        subject = Ours(image, Path(scratch) / "many")
        try:
            empty_s = _start_seconds(subject)
            warm(image)
            alone = _cpu_us(subject, rounds, seconds)
            client = Client(subject.daemon)
            for number in range(targets):
                make(client, subject.daemon.extent_root, f"t{number}", luns)
            for _ in range(LISTS):
                for kind in ("target", "extent", "targettoextent"):
                    client.ask(f"list {kind}", "GET", f"{kind}/?limit=1000")
            client.close()
            subject.stop()
            full_s = _start_seconds(subject)
            memory = subject.memory_kib() / 1024
            warm(image)
            among = _cpu_us(subject, rounds, seconds)
        finally:
            subject.stop()
    create_s = max(statistics.mean(times) for kind, times in client.times.items() if "POST" in kind)
    list_s = max(statistics.median(times) for kind, times in client.times.items() if "list" in kind)
    return {
        "targets": targets,
        "LUNs": targets * luns,
        "create ms": create_s * 1e3,
        "list ms": list_s * 1e3,
        "start s, empty": empty_s,
        "start s": full_s,
        "idle MiB": memory,
        "CPU per command ÷ alone": among / alone,
    }


SCALE_AIMS: Sequence[tuple[str, str, str, float]] = (
    ("many", "create ms", "one target, extent or LUN through the API, ms", 10),
    ("many", "list ms", "a list of up to 1000 targets, extents or LUNs, ms", 100),
    ("many", "start s", "start with all of them, s", 5),
    ("many", "idle MiB", "memory when idle, MiB", 400),
    ("many", "CPU per command ÷ alone", "CPU per command ÷ with one target", 1.1),
    ("idle", "CPU % idle", "CPU of silent sessions, % of a core", 1),
    ("idle", "KiB per session", "memory of a silent session, KiB", 50),
)
"""Group of ours, figure, words, at most."""
