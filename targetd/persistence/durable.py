"""A small file that is there whole or not at all, whatever comes in between: kill -9 or a power cut.

Written beside its name, synced, then given the name, which is synced too (fsync(2): syncing a file does not
promise its name). Without that a file system may keep the name and lose the content.
"""

import os
from pathlib import Path

__all__ = ["write_private"]


def write_private(path: Path, text: str) -> None:
    """Make or replace ``path``; nobody else may read it, from its first byte on."""
    making = path.with_name(path.name + ".new")
    making.unlink(missing_ok=True)
    with os.fdopen(os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    making.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
