"""The configuration: a table for each resource, one for what is global, one for the ids given out.

References and uniqueness are the model's to check, before anything is saved; the database would only see
them broken in the middle of a transaction that mends them (two names exchanged).
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _text(name: str) -> "sa.Column[str]":
    return sa.Column(name, sa.Text, nullable=False)


def _integer(name: str, nullable: bool = False) -> "sa.Column[int]":
    return sa.Column(name, sa.Integer, nullable=nullable)


def _boolean(name: str) -> "sa.Column[bool]":
    return sa.Column(name, sa.Boolean, nullable=False)


def _id() -> "sa.Column[int]":
    return sa.Column("id", sa.Integer, primary_key=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "globals",
        _id(),
        _text("basename"),
        _text("discovery_auth_method"),
        _integer("discovery_auth_group", nullable=True),
        _integer("io_timeout_s"),
        _integer("nop_in_interval_s"),
        _integer("max_sessions"),
        _integer("max_connections"),
        _integer("r2t"),
        _integer("max_outstanding_r2t"),
        _integer("first_burst_length"),
        _integer("max_burst_length"),
        _integer("max_recv_data_segment_length"),
        _integer("default_time2wait"),
        _integer("default_time2retain"),
        _boolean("luc_enabled"),
        sa.Column("luc_ip", sa.Text, nullable=True),
        _integer("luc_port", nullable=True),
        _text("luc_auth_network"),
        _text("luc_auth_method"),
        _integer("luc_auth_group", nullable=True),
        _text("isns_servers"),
        _integer("pool_avail_threshold", nullable=True),
        _boolean("service_enabled"),
    )
    op.create_table(
        "extents",
        _id(),
        _text("name"),
        _text("type"),
        _text("path"),
        _text("file_size"),
        _integer("size_bytes"),
        _text("comment"),
        _text("naa"),
        _boolean("insecure_tpc"),
        _text("serial"),
        _boolean("serial_given"),
        _integer("block_size"),
        _boolean("physical_block_size_hidden"),
        _integer("avail_threshold", nullable=True),
        _boolean("xen"),
        _text("rpm"),
        _boolean("read_only"),
        _boolean("legacy"),
    )
    op.create_table(
        "initiator_groups",
        _id(),
        _integer("tag"),
        _text("initiators"),
        _text("auth_network"),
        _text("comment"),
    )
    op.create_table(
        "credentials",
        _id(),
        _integer("tag"),
        _text("user"),
        _text("secret"),
        _text("peer_user"),
        _text("peer_secret"),
    )
    op.create_table(
        "portals",
        _id(),
        _integer("tag"),
        _text("comment"),
        _text("addresses"),
        _text("discovery_auth_method"),
        _integer("discovery_auth_group", nullable=True),
    )
    op.create_table(
        "targets",
        _id(),
        _text("name"),
        sa.Column("alias", sa.Text, nullable=True),
        _text("serial"),
        _boolean("serial_given"),
        _text("type"),
        _text("flags"),
        _text("initial_digest"),
        _integer("queue_depth"),
        _integer("logical_block_size"),
        _text("mode"),
    )
    op.create_table(
        "target_groups",
        _id(),
        _integer("target_id"),
        _integer("portal_id"),
        _integer("initiator_group_id", nullable=True),
        _text("auth_method"),
        _integer("auth_group", nullable=True),
        _text("initial_digest"),
    )
    op.create_table(
        "lun_mappings",
        _id(),
        _integer("target_id"),
        _integer("extent_id"),
        _integer("lun"),
    )
    op.create_table(
        "last_ids",
        sa.Column("collection", sa.Text, primary_key=True),
        _integer("last_id"),
    )
