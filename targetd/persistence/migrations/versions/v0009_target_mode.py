"""Targets are served by iSCSI alone; fc and both could be stored, without effect."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Whatever the mode was, iSCSI is what was served."""
    table = sa.table("targets", sa.column("mode", sa.Text))
    op.execute(sa.update(table).where(table.c.mode != "iscsi").values(mode="iscsi"))
