"""``iscsi-targetctl``: the admin command over the API.

It knows HTTP and the declarations of ``api.fields``, from which its commands, options, tables and the
exported document follow; it touches neither the store nor the daemon's process. Exit status: 0, 1 when
the daemon could not be reached or refused, 2 usage.

    client.py     requests to the API; standard library only, so that a command starts fast
    resources.py  the table of resources, and how fields are called here
    document.py   the whole configuration as one TOML document: export, difference, import
    output.py     tables for people, JSON for programs
    commands.py   the commands, made from the table
    progress.py   bars for what takes its time
    storage.py    pools and the volumes in them
    operations.py users, statistics, a live view, why logins fail
"""

import sys
from collections.abc import Sequence

from targetd.ctl.client import CtlError

__all__ = ["PROGRAM", "main"]

PROGRAM = "iscsi-targetctl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    from targetd.ctl.keys import keys
    from targetd.ctl.operations import app
    from targetd.ctl.storage import pools, volumes

    app.add_typer(keys, name="key")
    app.add_typer(pools, name="pool")
    app.add_typer(volumes, name="volume")

    try:
        app(args=None if arguments is None else list(arguments), prog_name=PROGRAM)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except CtlError as failure:
        for line in failure.lines():
            print(f"{PROGRAM}: {line}", file=sys.stderr)
        return failure.exit_status
    except BrokenPipeError:
        # The reader has seen enough; so that the interpreter does not fail on it again at its end:
        sys.stderr.close()
        return 1
    return 0
