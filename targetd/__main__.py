"""``iscsi-targetd``: argv only. The daemon is imported when there is something to serve."""

import gc
import os
import sys
from collections.abc import Sequence

from targetd.daemon.options import PROGRAM, UsageError, describe, parse, version

__all__ = ["main"]

WORKER = "worker"
"""First argument where the program is a worker process of another one; not for people."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0, 1 failure, 2 usage."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == [WORKER]:
        from targetd.workers.worker import serve

        return serve(*map(int, given[1:]))
    try:
        command = parse(given, os.environ)
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    if command.options is None:
        print(f"{PROGRAM} {version()}")
        return 0
    if command.options.check_config:
        print("\n".join(describe(command)))
        return 0
    # Until all is built nothing becomes garbage, and looking for it costs; daemon._serve allows it again.
    gc.disable()
    from targetd.daemon.main import run

    return run(command.options)


if __name__ == "__main__":
    sys.exit(main())
