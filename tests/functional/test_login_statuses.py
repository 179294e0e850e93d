"""Login statuses that come of what an operator changes while somebody logs in (RFC 7143 §11.13.5).

What the protocol decides by itself is in ``tests/protocol/test_login.py`` and ``test_session.py``,
redirections are in ``test_redirection.py``.
"""

from collections.abc import Callable

import pytest

from protocol import bhs
from protocol.enums import LoginStatus
from tests.daemon import HOST, Daemon, Disk
from tests.initiator import INITIATOR_NAME, LoginFailed, SocketInitiator

SERVICE = "services/services/iscsitarget/"


def stop_the_service(daemon: Daemon, disk: Disk) -> None:
    daemon.expect(200, "PUT", SERVICE, {"srv_enable": False})


def remove_the_portal(daemon: Daemon, disk: Disk) -> None:
    daemon.delete("portal", 1)


def remove_the_target(daemon: Daemon, disk: Disk) -> None:
    daemon.delete("target", disk.target_id)


def deny_the_initiator(daemon: Daemon, disk: Disk) -> None:
    body = {"iscsi_target_initiator_initiators": "!ALL"}
    daemon.expect(202, "PUT", "services/iscsi/authorizedinitiator/1/", body)


def send_it_on(daemon: Daemon, disk: Disk) -> None:
    body = {"iscsi_target_redirect": "192.0.2.1", "iscsi_target_redirect_permanent": True}
    daemon.expect(202, "PUT", f"services/iscsi/target/{disk.target_id}/", body)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (stop_the_service, LoginStatus.SERVICE_UNAVAILABLE),
        (remove_the_portal, LoginStatus.SERVICE_UNAVAILABLE),
        (remove_the_target, LoginStatus.TARGET_REMOVED),
        (deny_the_initiator, LoginStatus.TARGET_REMOVED),
        (send_it_on, LoginStatus.TARGET_MOVED_PERMANENTLY),
    ],
)
def test_a_change_in_the_middle_of_a_login(
    daemon: Daemon, change: Callable[[Daemon, Disk], None], expected: LoginStatus
) -> None:
    """The change is in force when its answer comes, so the login that ends afterwards is judged by it."""
    disk = daemon.create_disk("disk", "1MB")
    names = {"InitiatorName": INITIATOR_NAME, "SessionType": "Normal", "TargetName": disk.iqn}
    with SocketInitiator((HOST, daemon.portal_port)) as initiator:

        def say(keys: dict[str, str], *, transit: bool) -> LoginStatus:
            request = initiator.initiator.login_request(keys, initiator_task_tag=5, transit=transit)
            header = initiator.request(request).expect(bhs.LoginResponse)
            return LoginStatus(header.status_class << 8 | header.status_detail)

        assert say(names, transit=False) == LoginStatus.SUCCESS
        change(daemon, disk)
        assert say({}, transit=True) == expected
        assert initiator.wait_closed() == []


def test_a_session_does_not_span_portals(daemon: Daemon) -> None:
    """0208h: it exists, but not for connections through this portal group."""
    disk = daemon.create_disk("disk", "1MB")
    made = daemon.create("portal", iscsi_target_portal_ips=[f"127.0.0.2:{daemon.portal_port}"])
    daemon.create("targetgroup", iscsi_target=disk.target_id, iscsi_target_portalgroup=made["id"])
    with SocketInitiator((HOST, daemon.portal_port)) as one:
        one.login(disk.iqn)
        with SocketInitiator(("127.0.0.2", daemon.portal_port), session=one.session, cid=2) as two:
            with pytest.raises(LoginFailed) as failed:
                two.login(disk.iqn)
            assert failed.value.status == LoginStatus.CANNOT_INCLUDE_IN_SESSION
        one.nop(b"still here")
