"""The highest error recovery level that a target offers."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the column; what is there stays at level 0."""
    op.add_column(
        "targets", sa.Column("error_recovery_level", sa.Integer, nullable=False, server_default="0")
    )
