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

__all__ = ["HEAD", "stamp", "upgrade"]

HEAD = "0006"
"""The version this program writes."""


def stamp(connection: "Connection") -> None:
    """Note in a store that has just been made that its schema is that of ``HEAD``, as Alembic does."""
    connection.exec_driver_sql(
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
        "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )
    connection.exec_driver_sql("INSERT INTO alembic_version (version_num) VALUES (?)", (HEAD,))


def upgrade(connection: "Connection", version: str = HEAD) -> None:
    """Bring the schema up to ``version``, inside the transaction that ``connection`` is in."""
    # Alembic costs a tenth of a second to import, and nearly every start finds nothing to do
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, version)
