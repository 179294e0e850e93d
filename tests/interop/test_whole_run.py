"""Wireshark as a second reader of everything the daemon said while the other tests ran.

This test comes last, however the run was chosen, and only where it is chosen is anything recorded
(``tests.recording``): all of the beginning of every connection over loopback. What does not pass there, as
between network namespaces, is not seen. What the tests send may be garbage of purpose; what comes from a
portal may not.
"""

import pytest

from tests.conftest import Recorder
from tests.interop.dissection import Capture
from tests.interop.peers import needs
from tests.recording import portals

pytestmark = [pytest.mark.interop, pytest.mark.last, needs("tshark", "dumpcap")]


@pytest.mark.timeout(900)
def test_nothing_that_daemons_sent_in_this_run_is_malformed(recorder: Recorder | None) -> None:
    """RFC 7143 §11, SPC-4, SBC-3 as the dissectors of Wireshark know them: no malformed PDU and no expert
    error in what comes from a portal."""
    if recorder is None:
        pytest.skip("only root can capture")
    recorder.stop()
    with recorder.path.open("rb") as file:
        capture = Capture(recorder.path, portals(file, recorder.low, recorder.high))
    if not capture.ports:
        pytest.skip("no other test that talks iSCSI was chosen")
    assert capture.opcodes_sent() >= {0x23}
    found = capture.complaints()
    assert not found, found[:20]
