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
        daemon.wait_for_line("the log level stays as it was")
        config.write_text('log-level = "debug"\n', encoding="utf-8")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for_line("SIGHUP: log level debug")
        assert daemon.terminate() == 0
    finally:
        daemon.kill9()
