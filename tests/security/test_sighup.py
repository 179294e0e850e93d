"""SIGHUP: what it reads again, and that it never ends the daemon."""

import signal
from pathlib import Path

from tests.daemon import Daemon


def test_sighup_reads_the_log_level_again(tmp_path: Path) -> None:
    """Also without TLS, where the default action of the signal would end the process; a file that is
    wrong leaves things as they were."""
    config = tmp_path / "targetd.toml"
    config.write_text('log-level = "info"\n', encoding="utf-8")
    daemon = Daemon(tmp_path, options=("--config", str(config)))
    try:
        daemon.start()
        assert daemon.process is not None
        config.write_text('log-level = "nonsense"\n', encoding="utf-8")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_line("all options stay as they were")
        config.write_text('log-level = "debug"\n', encoding="utf-8")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_line("options were read again; log level debug")
        assert daemon.terminate() == 0
    finally:
        daemon.kill9()


class Configured(Daemon):
    """Roots of extents come from the file: the command line would win."""

    def arguments(self) -> list[str]:
        words = super().arguments()
        at = words.index("--extent-root")
        return words[:at] + words[at + 2 :]


def test_sighup_changes_what_can_change_and_names_what_waits(tmp_path: Path) -> None:
    """Another password of the API and another root for extents are in force at once; the address of the API
    is not, and the operator is told so."""
    config, password = tmp_path / "targetd.toml", tmp_path / "password"
    further = tmp_path / "further"
    further.mkdir()
    password.write_text("the first one\n", encoding="utf-8")
    lines = [f'api-password-file = "{password}"']
    config.write_text("\n".join([*lines, f'extent-root = ["{tmp_path}/none"]']), encoding="utf-8")
    daemon = Configured(tmp_path, options=("--config", str(config)))
    extent = {
        "iscsi_target_extent_name": "x",
        "iscsi_target_extent_type": "File",
        "iscsi_target_extent_path": str(further / "x.img"),
        "iscsi_target_extent_filesize": "1MB",
    }
    path = "services/iscsi/extent/"
    try:
        daemon.start()
        assert daemon.process is not None
        assert daemon.api("POST", path, extent, password="the first one").status == 409
        password.write_text("the second one\n", encoding="utf-8")
        config.write_text(
            "\n".join([*lines, f'extent-root = ["{further}"]', f'pool = ["more={further}"]']),
            encoding="utf-8",
        )
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_line("pool has changed; that waits for the next start")
        daemon.wait_for_line("options were read again")
        assert daemon.api("GET", path, password="the first one").status == 401
        assert daemon.api("POST", path, extent, password="the second one").status == 201
        password.write_text("\n", encoding="utf-8")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_line("all options stay as they were", "holds no password")
        assert daemon.api("GET", path, password="the second one").status == 200
    finally:
        daemon.kill9()
