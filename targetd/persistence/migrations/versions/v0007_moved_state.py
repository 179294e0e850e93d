"""Files of extents below the state directory are kept relative to it, so that they move with it."""

import sqlalchemy as sa
from alembic import context, op

from targetd.persistence.migrations import relative

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Change the paths there are. Where no directory is known there is nothing below it."""
    directory = context.config.attributes.get("directory")
    if directory is None:
        return
    connection = op.get_bind()
    for id, path in connection.execute(sa.text("SELECT id, path FROM extents WHERE type = 'File'")).all():
        connection.execute(
            sa.text("UPDATE extents SET path = :path WHERE id = :id"),
            {"path": relative(path, directory), "id": id},
        )
