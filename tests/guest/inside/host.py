"""Requests to the stage on the host side: make a disk, cut a wire, stop the daemon, report.

One connection carries one request and its answer, each a line of JSON.
"""

import json
import socket
from typing import Any

from tests.guest.inside.checks import CheckFailedError, CheckSkippedError
from tests.guest.wires import CONTROL, CONTROL_PORT

REQUEST_LIMIT_S = 390.0
_address = (CONTROL.address, CONTROL_PORT)


def ask(call: str, **arguments: Any) -> Any:
    """The stage's answer. CheckFailedError with its words if it could not; CheckSkippedError if it
    never can."""
    with socket.create_connection(_address, timeout=REQUEST_LIMIT_S) as connection:
        connection.sendall(json.dumps({"call": call, "arguments": arguments}).encode() + b"\n")
        with connection.makefile("rb") as answers:
            line = answers.readline()
    answer = json.loads(line) if line else {"failed": f"the stage broke off at {call}"}
    if "unsupported" in answer:
        raise CheckSkippedError(answer["unsupported"])
    if "failed" in answer:
        raise CheckFailedError(f"host side, {call}: {answer['failed']}")
    return answer.get("result")
