"""Which digests are demanded is one of a few words; it was any text, without effect."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

WORDS = ("Auto", "None", "Header", "Data", "Header Data", "CHAP", "CHAP Mutual")


def upgrade() -> None:
    """What is none of the words was as good as Auto."""
    for name in ("targets", "target_groups"):
        table = sa.table(name, sa.column("initial_digest", sa.Text))
        op.execute(sa.update(table).where(table.c.initial_digest.not_in(WORDS)).values(initial_digest="Auto"))
