"""Extents whose medium initiators may eject; no extent of before is one."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column."""
    op.add_column("extents", sa.Column("removable", sa.Boolean, nullable=False, server_default=sa.false()))
