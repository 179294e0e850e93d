"""Extents that take their space at once, and their I/O limits."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns; what is there stays sparse and unlimited."""
    for column in (
        sa.Column("allocate", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("iops_limit", sa.Integer, nullable=False, server_default="0"),
        sa.Column("bandwidth_limit", sa.Integer, nullable=False, server_default="0"),
    ):
        op.add_column("extents", column)
