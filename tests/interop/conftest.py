"""What the tests with system peers share: finding the peers, running them, and the conformance table."""

import pytest

from tests.interop.libiscsi_expected import explained, outdated
from tests.interop.libiscsi_suite import Outcome, Result, table

SUITE_RESULTS = pytest.StashKey[list[Result]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUITE_RESULTS] = []


@pytest.fixture(scope="session")
def suite_results(pytestconfig: pytest.Config) -> list[Result]:
    """Where the conformance tests leave their results for the table at the end."""
    return pytestconfig.stash[SUITE_RESULTS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(SUITE_RESULTS, [])
    if not results:
        return
    terminalreporter.section("libiscsi conformance suite")
    terminalreporter.write_line(table(results))
    for result in results:
        if result.outcome is not Outcome.PASSED:
            why = explained(result) or "UNEXPECTED"
            terminalreporter.write_line(f"{result.outcome} {result.test}: {why} ({result.reason})")
    for line in outdated(results):
        terminalreporter.write_line(line)
