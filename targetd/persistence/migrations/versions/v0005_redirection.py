"""Redirection of logins, addresses told to initiators, the weakest CHAP algorithm; nothing changes by it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the columns."""
    for table in ("targets", "portals"):
        op.add_column(table, sa.Column("redirect", sa.Text, nullable=False, server_default=""))
        op.add_column(
            table, sa.Column("redirect_permanent", sa.Boolean, nullable=False, server_default=sa.false())
        )
    op.add_column("portals", sa.Column("advertised", sa.Text, nullable=False, server_default="[]"))
    op.add_column("globals", sa.Column("chap_weakest", sa.Text, nullable=False, server_default="MD5"))
