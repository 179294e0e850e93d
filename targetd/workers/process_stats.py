"""What a process uses, from /proc (proc(5))."""

import os
import resource
from dataclasses import replace
from pathlib import Path

from targetd.interface import ProcessStatistics, Statistics

__all__ = ["measure"]

_PAGE = resource.getpagesize()


def measure(statistics: Statistics, name: str) -> Statistics:
    """The statistics, with what this process uses."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    own = ProcessStatistics(
        name=name,
        pid=os.getpid(),
        cpu_s=usage.ru_utime + usage.ru_stime,
        resident_bytes=pages * _PAGE,
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        loop_lag_s=statistics.loop_lag_s,
        loop_lag_longest_s=statistics.loop_lag_longest_s,
    )
    return replace(statistics, processes=(own,))
