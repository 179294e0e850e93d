"""Put before a daemon by its PYTHONPATH: on SIGUSR2 it prints what is alive in it, as one line of JSON.

Only for ``tests/soak``: nothing of it is in the daemon itself.
"""

import asyncio
import gc
import json
import os
import signal
import sys
import threading
from collections import Counter
from types import FrameType

OURS = ("protocol", "targetd", "builtins")
WATCHED = ("Channel", "Connection", "Session", "Task", "Burst", "Transfer", "LogicalUnit", "memoryview")


def census(number: int, frame: FrameType | None) -> None:
    """Runs on the loop's thread, between two instructions of its."""
    # targetd/system/gc_schedule.py: what is set aside is alive too, or garbage that nobody has looked at
    gc.unfreeze()
    gc.collect()
    kinds = Counter(
        kind.__name__
        for kind in map(type, gc.get_objects())
        if str(kind.__module__).partition(".")[0] in OURS
    )
    gc.freeze()
    found = {name: kinds[name] for name in WATCHED}
    found["asyncio tasks"] = len(asyncio.all_tasks())
    found["threads"] = threading.active_count()
    places = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # the directory's own is among them, and gone then
        try:
            places.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
        except FileNotFoundError:
            continue
    found["descriptors"] = len(places)
    sys.stderr.write(f"census {json.dumps(found)} {sorted(places)}\n")
    sys.stderr.flush()


signal.signal(signal.SIGUSR2, census)
