"""The store's schema, version by version. Travels inside the package and needs no ``alembic.ini``.

Each file in ``versions/`` takes a store from one version to the next, written by hand and never edited once
released, so a store of any age ends up the same. To change the schema: add a file with the next number,
raise ``HEAD``, and change what ``targetd.persistence.store`` derives from the model; a test compares
the two. A fresh store is made from the model and stamped with ``HEAD``: the same, without importing Alembic.

Versions are numbers of four digits, so that a program can tell a newer store from an older one.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["HEAD", "absolute", "relative", "stamp", "upgrade"]

HEAD = "0009"
"""The version this program writes."""

_STATE_DIRECTORY = "STATE-DIR/"
"""Begins a path that is kept relative to the store's directory."""


def relative(path: str, directory: Path) -> str:
    """The path as it is kept: one below the store's directory moves with it."""
    below = f"{directory}/"
    if path.startswith(below) and ".." not in path.split("/"):
        return _STATE_DIRECTORY + path.removeprefix(below)
    return path


def absolute(path: str, directory: Path) -> str:
    """The path that was kept, where the store is now."""
    if path.startswith(_STATE_DIRECTORY):
        return f"{directory}/{path.removeprefix(_STATE_DIRECTORY)}"
    return path


def stamp(connection: "Connection") -> None:
    """Note in a store that has just been made that its schema is that of ``HEAD``, as Alembic does."""
    connection.exec_driver_sql(
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
        "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )
    connection.exec_driver_sql("INSERT INTO alembic_version (version_num) VALUES (?)", (HEAD,))


def upgrade(connection: "Connection", version: str = HEAD, directory: Path | None = None) -> None:
    """Bring the schema up to ``version``, inside the transaction that ``connection`` is in.

    Args:
        directory: that of the store, as the daemon was told it.
    """
    # Alembic costs a tenth of a second to import, and nearly every start finds nothing to do
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    config.attributes["directory"] = directory
    command.upgrade(config, version)
