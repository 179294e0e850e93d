"""Schemathesis reads the OpenAPI documents and asks the real daemon everything it can think of.

No request may cause a 500, an answer that the document does not have, or none at all. Whether what it thinks
right or wrong is taken or refused is not asked: the coercions of api-semantics §2 are wider than a schema.
"""

import sys
from pathlib import Path

import pytest

from tests.daemon import HOST, Daemon
from tests.interop.peers import run

pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra dev)")

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
)
PLACES = """
[parameters]
"path.id" = 1
"path.pool" = "tank"
"path.zvol" = "kept"
"path.dataset" = "tank"
"path.name" = "iscsitarget"
"path.user" = "kept"

[[operations]]
include-method = "DELETE"
[operations.parameters]
"path.id" = 2
"path.zvol" = "doomed"
"path.user" = "doomed"
"""
"""What there is: so that requests reach more than the 404. What is deleted is something else."""


def furnish(daemon: Daemon) -> None:
    """Two of everything."""
    for number, name in ((1, "kept"), (2, "doomed")):
        daemon.expect(201, "POST", "account/users/", {"name": name, "password": "long enough"})
        daemon.expect(202, "POST", "storage/volume/tank/zvols/", {"name": name, "volsize": "1M"})
        if number > 1:
            daemon.create("portal", iscsi_target_portal_comment=name)
            daemon.create("authorizedinitiator", iscsi_target_initiator_comment=name)
        daemon.create("authcredential", iscsi_target_auth_user=name, iscsi_target_auth_secret="twelve-chars")
        daemon.create_disk(name, "1MB")


STATELESS = tuple(name for name in CHECKS if name not in ("use_after_free", "ensure_resource_availability"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("document", "checks"),
    [("/api/v1.0/openapi.json", CHECKS), ("/api/v2.0/openapi.json", STATELESS)],
    ids=["v1", "v2"],
)
def test_every_response_matches_the_document(tmp_path: Path, document: str, checks: tuple[str, ...]) -> None:
    pool = tmp_path / "tank"
    pool.mkdir()
    config = tmp_path / "schemathesis.toml"
    config.write_text(PLACES)
    daemon = Daemon(tmp_path / "daemon", ["--pool", f"tank={pool}"])
    try:
        daemon.start()
        furnish(daemon)
        tool = Path(sys.executable).with_name("schemathesis")
        ran = run(
            *(str(tool), "--config-file", str(config), "run"),
            *("--url", f"http://{HOST}:{daemon.api_port}", "--auth", f"root:{daemon.password}"),
            *("--checks", ",".join(checks), "--phases", "coverage,fuzzing", "--max-examples", "3"),
            *("--seed", "7143", "--generation-database", "none", "--no-shrink", "--continue-on-failure"),
            *("--request-timeout", "60", "--no-color", "--warnings", "off"),
            f"http://{HOST}:{daemon.api_port}{document}",
            limit_s=1500,
            directory=tmp_path,  # where it keeps what it wants to try again
        )
        print(ran.ok())
        assert daemon.alive()
        assert not daemon.tracebacks()
        assert daemon.expect(200, "GET", "/healthz") == {"status": "ok"}
    finally:
        daemon.kill9()
