"""No field is accepted and ignored: what reads each of them, or why it needs no reader."""

import ast
from functools import cache
from pathlib import Path

import pytest

from api.fields import DECLARATIONS
from api.schema import Column
from targetd.config import check_value

ROOT = Path(__file__).resolve().parents[2]

PEOPLE = "people"
"""Text for people, who read it through the API."""
ONE_VALUE = "one value"
"""There is one value, and every other is refused."""
INPUT = "input"
"""Another way to say another field."""
TOLD = "told"
"""Read only: the daemon says it."""

ACCESS, EXTENTS, RUNTIME = "targetd/net/access.py", "targetd/engine/extents.py", "targetd/engine/runtime.py"
LUC, ISNS, INDEXES = "targetd/luc/server.py", "targetd/isns/registration.py", "targetd/config/indexes.py"

READ_BY: dict[str, dict[str, str]] = {
    "GlobalConfiguration": {
        "basename": INDEXES,
        "discovery_auth_method": ACCESS,
        "discovery_auth_group": ACCESS,
        "chap_weakest": ACCESS,
        "io_timeout_s": "targetd/net/server.py",
        "nop_in_interval_s": "targetd/net/server.py",
        "max_sessions": "protocol/session.py",
        "max_connections": ACCESS,
        "r2t": ACCESS,
        "max_outstanding_r2t": ACCESS,
        "first_burst_length": ACCESS,
        "max_burst_length": ACCESS,
        "max_recv_data_segment_length": ACCESS,
        "default_time2wait": ACCESS,
        "default_time2retain": ACCESS,
        "luc_enabled": LUC,
        "luc_ip": LUC,
        "luc_port": LUC,
        "luc_auth_network": LUC,
        "luc_auth_method": LUC,
        "luc_auth_group": LUC,
        "isns_servers": ISNS,
        "pool_avail_threshold": RUNTIME,
    },
    "Extent": {
        "name": EXTENTS,
        "type": EXTENTS,
        "path": EXTENTS,
        "disk": INPUT,  # the path
        "file_size": INPUT,  # size_bytes
        "comment": PEOPLE,
        "naa": EXTENTS,
        "insecure_tpc": EXTENTS,
        "serial": EXTENTS,
        "block_size": EXTENTS,
        "physical_block_size_hidden": EXTENTS,
        "avail_threshold": EXTENTS,
        "xen": EXTENTS,
        "rpm": EXTENTS,
        "read_only": EXTENTS,
        "removable": EXTENTS,
        "legacy": TOLD,
        "allocate": EXTENTS,
        "iops_limit": RUNTIME,
        "bandwidth_limit": RUNTIME,
        "status": TOLD,
    },
    "AuthorizedInitiator": {
        "tag": ACCESS,  # in what is said of a refusal
        "initiators": ACCESS,
        "auth_network": ACCESS,
        "comment": PEOPLE,
        "warning": TOLD,
    },
    "AuthCredential": {
        "tag": INDEXES,
        "user": ACCESS,
        "secret": ACCESS,
        "peer_user": ACCESS,
        "peer_secret": ACCESS,
    },
    "Target": {
        "name": INDEXES,
        "alias": ACCESS,
        "serial": EXTENTS,
        "type": ONE_VALUE,
        "flags": EXTENTS,
        "portal_id": ACCESS,
        "initiator_group_id": ACCESS,
        "auth_method": ACCESS,
        "auth_group": ACCESS,
        "initial_digest": ACCESS,
        "queue_depth": ACCESS,
        "logical_block_size": EXTENTS,
        "mode": ONE_VALUE,
        "redirect": ACCESS,
        "redirect_permanent": ACCESS,
        "error_recovery_level": ACCESS,
    },
    "TargetGroup": {
        "target_id": "targetd/net/discovery.py",
        "portal_id": ACCESS,
        "initiator_group_id": ACCESS,
        "auth_method": ACCESS,
        "auth_group": ACCESS,
        "initial_digest": ACCESS,
    },
    "Portal": {
        "tag": PEOPLE,  # a number for them; everything else refers to the id
        "comment": PEOPLE,
        "addresses": "targetd/net/portals.py",
        "advertised": ACCESS,
        "redirect": ACCESS,
        "redirect_permanent": ACCESS,
        "discovery_auth_method": ACCESS,
        "discovery_auth_group": ACCESS,
        "status": TOLD,
    },
    "TargetToExtent": {"target_id": RUNTIME, "extent_id": RUNTIME, "lun": RUNTIME},
}
"""Resource → attribute → the file that reads it and does something by it."""


@cache
def attributes_read(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    )


def test_every_field_of_every_resource_is_in_the_table() -> None:
    declared = {each.title: {column.attribute for column in each.columns} for each in DECLARATIONS}
    assert declared == {title: set(fields) for title, fields in READ_BY.items()}


FIELDS = [(each.title, column) for each in DECLARATIONS for column in each.columns]


@pytest.mark.parametrize(("title", "column"), FIELDS, ids=[f"{title}.{c.attribute}" for title, c in FIELDS])
def test_what_the_table_says_of_a_field_is_so(title: str, column: Column) -> None:
    reader = READ_BY[title][column.attribute]
    if reader == TOLD:
        assert column.read_only
    elif reader == ONE_VALUE:
        assert column.rule.choices is not None and len(column.rule.choices) == 1
        assert check_value(column.rule, "anything else") is not None
    elif reader not in (PEOPLE, INPUT):
        assert column.attribute in attributes_read(reader)


def test_no_help_text_says_that_a_field_is_only_kept() -> None:
    for title, column in FIELDS:
        text = column.help_text.lower()
        assert "kept and shown" not in text, (title, column.wire)
        assert "kept for clients" not in text, (title, column.wire)
        assert "not used" not in text, (title, column.wire)
