"""libiscsi's conformance suite against the real daemon: every test, each on a fresh logical unit.

A test here is one suite of the tool, so ``pytest -k Reserve6`` runs what its name says. The outcome of
every single test is compared with ``libiscsi_expected``; the table is printed at the end of the run.
"""

import itertools

import pytest

from tests.daemon import Daemon
from tests.interop.libiscsi_expected import KITS, explained, kit_of
from tests.interop.libiscsi_suite import (
    TOOL,
    Outcome,
    Result,
    installed,
    list_tests,
    matches,
    read_outcome,
    run_test,
    run_tests,
)

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not installed(), reason=f"{TOOL} is not installed (Debian: libiscsi-bin)"),
]

JOBS = 2
TAG = 1
"""Of the group that holds the users of the kits."""
SIZE = 256 << 20
"""Bytes; 65536 to 2**21 - 1 blocks, and enough for two of the longest EXTENDED COPY segments."""
TESTS = list_tests() if installed() else []
SUITES = list(dict.fromkeys(test.partition(".")[0] for test in TESTS))
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def patient_daemon(shared_daemon: Daemon) -> Daemon:
    """Without keepalive pings: Sanitize.Reset sleeps for a minute at a time and answers none."""
    shared_daemon.expect(202, "PUT", "services/iscsi/globalconfiguration/", {"iscsi_nopinint": 0})
    for kit in KITS.values():
        if kit.account is not None:
            user, secret = kit.account
            shared_daemon.create(
                "authcredential",
                iscsi_target_auth_tag=TAG,
                iscsi_target_auth_user=user,
                iscsi_target_auth_secret=secret,
            )
    return shared_daemon


def run_on_fresh_unit(daemon: Daemon, test: str, kind: str) -> Result:
    """Make the kind of LUN that the test needs, run it there, take the LUN away."""
    name = f"suite{next(_numbers)}"
    with (daemon.extent_root / f"{name}.img").open("wb") as file:
        file.truncate(SIZE)
    kit = KITS[kind]
    user, secret = kit.account or ("", "")
    target = {"iscsi_target_authtype": "CHAP", "iscsi_target_authgroup": TAG} if kit.account else None
    disk = daemon.create_disk(name, "0", extent=kit.extent, target=target)
    try:
        return run_test(test, [daemon.url(disk.iqn, 0, user=user, secret=secret)])
    finally:
        daemon.delete_disk(disk)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("suite", SUITES)
def test_suite_has_no_unexpected_outcome(
    patient_daemon: Daemon, suite: str, suite_results: list[Result]
) -> None:
    """SPC, SBC and RFC 7143 as libiscsi's test-tool reads them."""
    tests = [test for test in TESTS if matches(test, suite)]
    results = run_tests(tests, JOBS, lambda test: run_on_fresh_unit(patient_daemon, test, kit_of(test)))
    suite_results.extend(results)
    assert patient_daemon.alive()
    surprises = [result for result in results if explained(result) is None]
    if surprises:
        pytest.fail(
            "\n\n".join(f"{r.outcome} {r.test}: {r.reason}\n{r.output[-3000:]}" for r in surprises),
            pytrace=False,
        )


@pytest.mark.parametrize("kit", KITS)
def test_every_kit_of_logical_unit_can_be_had(patient_daemon: Daemon, kit: str) -> None:
    """Even where this release of the tool has no test for it."""
    result = run_on_fresh_unit(patient_daemon, "TestUnitReady.Simple", kit)
    assert result.outcome is Outcome.PASSED, result


def test_tool_lists_each_test_once() -> None:
    assert len(TESTS) == len(set(TESTS)) >= 200


def test_unreachable_target_is_reported_as_broken_not_as_passed() -> None:
    """The discard port of loopback: nobody listens, so set-up must fail and be seen to fail."""
    result = run_test("TestUnitReady.Simple", ["iscsi://127.0.0.1:9/iqn.2003-01.org.example:none/0"], 20)
    assert result.outcome in (Outcome.BROKEN, Outcome.HUNG)


LOGS = [
    # exit status, what the tool printed, outcome, reason
    (0, "passed\n   tests      1      1      1      0        0\n", Outcome.PASSED, ""),
    (
        0,
        "    [SKIPPED] X is not implemented.\npassed\n   tests      1      1      1      0        0\n",
        Outcome.SKIPPED,
        "X is not implemented.",
    ),
    (
        1,
        "    [FAILED] bad\nFAILED\n    1. test_a.c:38  - CU_ASSERT_EQUAL(_r,0)    Send PRIN/READ_KEYS\n"
        "   tests      1      1      0      1        0\n",
        Outcome.FAILED,
        "bad; test_a.c:38  - CU_ASSERT_EQUAL(_r,0)",
    ),
    (0, "   tests      0      0      0      0        0\n", Outcome.BROKEN, "the tool knows no such test"),
    (255, "Login Failed. Target not found(515)\n", Outcome.BROKEN, "Login Failed. Target not found(515)"),
    (-11, "", Outcome.BROKEN, "the tool died of signal 11"),
]


@pytest.mark.parametrize(("status", "output", "outcome", "reason"), LOGS)
def test_outcome_is_read_from_log_and_exit_status(
    status: int, output: str, outcome: Outcome, reason: str
) -> None:
    assert read_outcome(status, output) == (outcome, reason)
