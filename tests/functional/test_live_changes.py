"""What the operator changes while sessions are open, and how initiators learn it: once each (SAM-5 §5.14)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from protocol import bhs
from protocol.enums import AsyncEvent, ScsiStatus
from tests import cdbs
from tests.daemon import HOST, Daemon, free_ports
from tests.functional.sessions import attention, capacity, daemon_in, log_in, read, write
from tests.initiator import ConnectionClosed, SocketInitiator

MIB = 1 << 20
CAPACITY_CHANGED, LUNS_CHANGED, INQUIRY_CHANGED = (0x2A, 0x09), (0x3F, 0x0E), (0x3F, 0x03)
MODE_CHANGED, MEDIUM_CHANGED, POWER_ON = (0x2A, 0x01), (0x28, 0x00), (0x29, 0x00)
NO_UNIT, NO_MEDIUM, PROTECTED, NO_BLOCK = (0x25, 0x00), (0x3A, 0x00), (0x27, 0x00), (0x21, 0x00)


def attentions(initiator: SocketInitiator, lun: int = 0) -> list[tuple[int, int]]:
    """All that TEST UNIT READY has to tell until it is GOOD."""
    found = []
    while (told := attention(initiator, lun)) is not None:
        found.append(told)
        assert len(found) < 8, found
    return found


def luns(initiator: SocketInitiator) -> list[int]:
    data = initiator.command(cdbs.report_luns(), read=65536).data
    return [int.from_bytes(data[at : at + 2], "big") for at in range(8, len(data), 8)]


def test_a_resized_extent_is_one_attention_and_no_logout(shared_daemon: Daemon) -> None:
    """SBC-3 §4.7: CAPACITY DATA HAS CHANGED, to every session, with all that was there."""
    disk = shared_daemon.create_disk("grows", "8MB")
    path = f"services/iscsi/extent/{disk.extent_id}/"
    with log_in(shared_daemon, disk.iqn, "one") as one, log_in(shared_daemon, disk.iqn, "two") as two:
        assert write(one, 0, b"\xa5" * 4096).good
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_filesize": "32MB"})
        for initiator in (one, two):
            assert attentions(initiator) == [CAPACITY_CHANGED]
            assert capacity(initiator) == 32 * MIB
            assert read(initiator, 0, 8) == b"\xa5" * 4096
            assert write(initiator, 32 * MIB // 512 - 8, bytes(4096)).good
            assert not initiator.asyncs
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_filesize": "32MB"})
        assert attentions(one) == []
        reply = shared_daemon.api("PUT", path, {"iscsi_target_extent_filesize": "16MB"})
        assert reply.status == 409, "in use, it does not shrink"
        assert attentions(one) == []
        assert capacity(one) == 32 * MIB
    shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_filesize": "16MB"})
    with log_in(shared_daemon, disk.iqn) as one:
        assert capacity(one) == 16 * MIB, "when nobody is, it does"
        assert read(one, 0, 8) == b"\xa5" * 4096
        assert one.command(cdbs.read10(16 * MIB // 512, 1), read=512).additional_sense == (0x21, 0x00)
    assert disk.path.stat().st_size == 32 * MIB, "and the file keeps what it has"


def test_luns_come_and_go_with_one_attention_each(shared_daemon: Daemon) -> None:
    """SPC-4 §6.33: REPORTED LUNS DATA HAS CHANGED, once per nexus however many units it sees (LUICLR)."""
    disk = shared_daemon.create_disk("inventory", "1MB")
    second = shared_daemon.create_disk("inventory-second", "1MB")
    third = shared_daemon.create_disk("inventory-third", "2MB")

    def show(extent: int, lun: int) -> int:
        fields = {"iscsi_target": disk.target_id, "iscsi_extent": extent, "iscsi_lunid": lun}
        return int(shared_daemon.create("targettoextent", **fields)["id"])

    with log_in(shared_daemon, disk.iqn) as initiator:
        shown = show(second.extent_id, 5)
        assert attentions(initiator) == [LUNS_CHANGED]
        assert luns(initiator) == [0, 5]
        assert attentions(initiator, 5) == [POWER_ON]
        show(third.extent_id, 300)
        assert attentions(initiator, 5) == [LUNS_CHANGED]
        assert attentions(initiator, 0) == []
        assert luns(initiator)[:2] == [0, 5] and len(luns(initiator)) == 3
        shared_daemon.delete("targettoextent", shown)
        assert attentions(initiator) == [LUNS_CHANGED]
        assert attention(initiator, 5) == NO_UNIT
        # Each change is told unasked, too (RFC 7143 §11.9.1, event 0); nobody is asked to leave.
        events = [pdu.expect(bhs.AsyncMessage).async_event for pdu in initiator.asyncs]
        assert events == [AsyncEvent.SCSI_EVENT] * 3


SURVIVED, GONE = ScsiStatus.GOOD, ScsiStatus.CHECK_CONDITION
UNDER_WAY = [
    ("target/{target}", {"iscsi_target_serial": "EDITED"}, SURVIVED),
    ("target/{target}", {"iscsi_target_flags": "ro"}, SURVIVED),
    ("extent/{extent}", {"iscsi_target_extent_serial": "EDITED"}, SURVIVED),
    ("targettoextent/{mapping}", {"iscsi_lunid": 4}, SURVIVED),
    ("targettoextent/{mapping}", {"iscsi_extent": "{other}"}, GONE),
    ("targettoextent/{mapping}", None, GONE),
    ("target/{target}", None, GONE),
    ("extent/{extent}", None, GONE),
]


@pytest.mark.parametrize(("path", "body", "status"), UNDER_WAY)
def test_a_command_under_way_is_answered_whatever_is_edited(
    shared_daemon: Daemon, path: str, body: dict[str, Any] | None, status: int
) -> None:
    """A write waits for its data meanwhile. Its status comes behind the data (RFC 7143 §11.4.2)."""
    disk = shared_daemon.create_disk("edited", "1MB")
    other = shared_daemon.create_disk("edited-other", "1MB")
    ids = {"target": disk.target_id, "extent": disk.extent_id, "mapping": disk.mapping_id}
    try:
        with log_in(shared_daemon, disk.iqn) as initiator:
            initiator.answer_r2ts = False
            data = b"\x5a" * 128 * 1024
            task = initiator.send_command(cdbs.write10(0, 256), data, unsolicited=0, immediate_data=0)
            r2t = initiator.wait_for_r2t(task)
            if body is None:
                shared_daemon.expect(204, "DELETE", f"services/iscsi/{path.format(**ids)}/")
            else:
                wanted = {
                    name: other.extent_id if value == "{other}" else value for name, value in body.items()
                }
                shared_daemon.expect(202, "PUT", f"services/iscsi/{path.format(**ids)}/", wanted)
            initiator.answer_r2ts = True
            initiator.answer_r2t(task, r2t)
            reply = initiator.wait(task)
            assert reply.status == status
            if status == GONE:
                assert reply.additional_sense == NO_UNIT, "and it is not to be tried again on another unit"
                assert disk.path.read_bytes()[:512] == other.path.read_bytes()[:512] == bytes(512)
    finally:
        for made in (disk, other):
            for resource, id in (("target", made.target_id), ("extent", made.extent_id)):
                shared_daemon.api("DELETE", f"services/iscsi/{resource}/{id}/")
            made.path.unlink(missing_ok=True)


def test_what_sessions_rely_on_is_changed_by_force_alone(shared_daemon: Daemon) -> None:
    """409 names who is logged in. By force a command under way ends without touching the other medium."""
    disk = shared_daemon.create_disk("forced", "2MB")
    path = f"services/iscsi/extent/{disk.extent_id}/"
    other = shared_daemon.extent_root / "forced-other.img"
    other.write_bytes(b"\x99" * 2 * MIB)
    same = shared_daemon.extent_root / "forced-link.img"
    same.hardlink_to(disk.path)
    changes = [
        ("iscsi_target_extent_path", str(other), [MEDIUM_CHANGED], NO_MEDIUM),
        ("iscsi_target_extent_blocksize", 4096, [CAPACITY_CHANGED], NO_BLOCK),
        ("iscsi_target_extent_filesize", "1MB", [CAPACITY_CHANGED], NO_BLOCK),
    ]
    with log_in(shared_daemon, disk.iqn, "one") as one, log_in(shared_daemon, disk.iqn, "two") as two:
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_path": str(same)})
        assert attentions(one) == [], "another name of the same file"
        one.answer_r2ts = False
        for field, value, told, sense in changes:
            lba = (2 * MIB - 128 * 1024) // (4096 if field.endswith("filesize") else 512)
            data = b"\x5a" * 128 * 1024
            cdb = cdbs.write10(lba, 32 if field.endswith("filesize") else 256)
            task = one.send_command(cdb, data, unsolicited=0, immediate_data=0)
            r2t = one.wait_for_r2t(task)
            refused = shared_daemon.expect(409, "PUT", path, {field: value})
            assert refused.keys() == {field}
            for name in (":one", ":two"):
                assert f"iqn.2003-01.org.example{name}" in refused[field][0]
            shared_daemon.expect(202, "PUT", f"{path}?force=1", {field: value})
            one.answer_r2t(task, r2t)
            assert one.wait(task).additional_sense == sense
            assert attentions(one) == attentions(two) == told
        assert other.read_bytes() == b"\x99" * 2 * MIB
    shared_daemon.delete_disk(disk)


def test_a_stopped_service_has_no_session_left(tmp_path: Path) -> None:
    """Initiators are asked to log out, then told that they are dropped; STOPPED: nobody writes any more."""
    service = "services/services/iscsitarget/"
    with daemon_in(tmp_path) as daemon:
        disk = daemon.create_disk("stopped", "1MB")
        leaves, stays = log_in(daemon, disk.iqn, "leaves"), log_in(daemon, disk.iqn, "stays")
        stays.answer_r2ts = False
        task = stays.send_command(cdbs.write10(0, 1), b"\x5a" * 512, unsolicited=0, immediate_data=0)
        r2t = stays.wait_for_r2t(task)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(daemon.expect, 200, "PUT", service, {"srv_enable": False})
            asked = leaves.wait_for_async().expect(bhs.AsyncMessage)
            assert asked.async_event == AsyncEvent.LOGOUT_REQUEST
            assert write(leaves, 8, b"\xa5" * 512).good, "it may flush what it has"
            leaves.logout()
            assert stopping.result()["srv_state"] == "STOPPED"
        assert daemon.expect(200, "GET", "services/iscsi/session/") == []
        before = disk.path.read_bytes()
        with pytest.raises(ConnectionClosed):
            stays.answer_r2t(task, r2t)
            stays.wait(task)
        events = [pdu.expect(bhs.AsyncMessage).async_event for pdu in stays.asyncs]
        assert events == [AsyncEvent.LOGOUT_REQUEST, AsyncEvent.SESSION_DROP]
        assert disk.path.read_bytes() == before
        assert before[8 * 512 : 9 * 512] == b"\xa5" * 512
        daemon.expect(200, "PUT", service, {"srv_enable": True})
        with log_in(daemon, disk.iqn) as again:
            assert read(again, 0, 1) == bytes(512)


def test_what_initiators_have_set_up_survives_edits_of_something_else(shared_daemon: Daemon) -> None:
    """RESERVE(6), mode parameters, and what is pending: the unit is the same one."""
    disk = shared_daemon.create_disk("keeps", "1MB")
    path = f"services/iscsi/target/{disk.target_id}/"
    with log_in(shared_daemon, disk.iqn, "one") as one, log_in(shared_daemon, disk.iqn, "two") as two:
        assert one.command(bytes((0x16, 0, 0, 0, 0, 0))).good
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_serial": "A", "iscsi_target_flags": "ro"})
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_serial": "B", "iscsi_target_flags": "rw"})
        assert attentions(one) == [MODE_CHANGED, INQUIRY_CHANGED], "each once"
        assert one.command(cdbs.inquiry(0x80), read=255).data[4:] == b"B0"
        assert [attention(two), attention(two)] == [MODE_CHANGED, INQUIRY_CHANGED]
        assert two.command(cdbs.test_unit_ready()).status == ScsiStatus.RESERVATION_CONFLICT
        assert write(one, 0, bytes(512)).good


def test_a_medium_made_removable_can_be_ejected_until_it_is_not(shared_daemon: Daemon) -> None:
    """INQUIRY DATA HAS CHANGED; and what was ejected is back when nobody could load it any more."""
    disk = shared_daemon.create_disk("removable", "1MB")
    path = f"services/iscsi/extent/{disk.extent_id}/"
    eject = cdbs.start_stop_unit(start=False, load_eject=True)
    with log_in(shared_daemon, disk.iqn) as initiator:
        assert initiator.command(eject).sense_key == 5
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_removable": True})
        assert attentions(initiator) == [INQUIRY_CHANGED]
        assert initiator.command(cdbs.inquiry(), read=255).data[1] == 0x80
        assert initiator.command(cdbs.prevent_allow(1)).good
        assert initiator.command(eject).additional_sense == (0x53, 0x02)
        assert initiator.command(cdbs.prevent_allow(0)).good
        assert initiator.command(eject).good
        assert attention(initiator) == NO_MEDIUM
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_removable": False})
        assert attentions(initiator) == [MEDIUM_CHANGED, INQUIRY_CHANGED]
        assert capacity(initiator) == MIB


def test_an_extent_made_read_only_refuses_the_next_write(shared_daemon: Daemon) -> None:
    disk = shared_daemon.create_disk("protected", "1MB")
    path = f"services/iscsi/extent/{disk.extent_id}/"
    with log_in(shared_daemon, disk.iqn) as initiator:
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_ro": True})
        assert attentions(initiator) == [MODE_CHANGED]
        reply = write(initiator, 0, bytes(512))
        assert (reply.sense_key, reply.additional_sense) == (7, PROTECTED)
        data = cdbs.unmap_parameters([(0, 8)])
        assert initiator.command(cdbs.unmap(len(data)), data).additional_sense == PROTECTED
        assert initiator.command(cdbs.inquiry(0xB2), read=255).data[5] & 0xE0 == 0xE0, "thin as before"
        shared_daemon.expect(202, "PUT", path, {"iscsi_target_extent_ro": False})
        assert attentions(initiator) == [MODE_CHANGED]
        assert write(initiator, 0, bytes(512)).good


@pytest.fixture
def second_portal(shared_daemon: Daemon) -> int:
    """The id of a portal group of its own, which is its tag."""
    (port,) = free_ports(1)
    return int(shared_daemon.create("portal", iscsi_target_portal_ips=[f"{HOST}:{port}"])["id"])


def test_report_target_port_groups_names_every_portal_group_of_the_target(
    shared_daemon: Daemon, second_portal: int
) -> None:
    """SPC-4 §6.37; as soon as the target is granted through another."""
    disk = shared_daemon.create_disk("paths", "1MB")

    def ports(initiator: SocketInitiator) -> list[int]:
        data = initiator.command(cdbs.report_target_port_groups(), read=1024).data
        return [int.from_bytes(data[at + 2 : at + 4], "big") for at in range(12, len(data), 4)]

    with log_in(shared_daemon, disk.iqn) as initiator:
        assert ports(initiator) == [1]
        group = shared_daemon.create(
            "targetgroup",
            iscsi_target=disk.target_id,
            iscsi_target_portalgroup=second_portal,
            iscsi_target_initiatorgroup=1,
            iscsi_target_authtype="None",
        )
        assert ports(initiator) == [1, second_portal]
        shared_daemon.delete("targetgroup", group["id"])
        assert ports(initiator) == [1]


def test_a_session_is_asked_to_negotiate_anew(shared_daemon: Daemon) -> None:
    """RFC 7143 §11.9.1, event 4: a longer MaxRecvDataSegmentLength holds on a connection that lives."""
    disk = shared_daemon.create_disk("negotiates", "8MB")
    globals_ = "services/iscsi/globalconfiguration/"
    before = shared_daemon.expect(200, "GET", globals_)["iscsi_maxrecdata"]
    with log_in(shared_daemon, disk.iqn, "speaker") as initiator:
        (session,) = [
            one
            for one in shared_daemon.expect(200, "GET", "services/iscsi/session/")
            if one["initiator_name"].endswith(":speaker")
        ]
        place = f"services/iscsi/session/{session['id']}/"
        shared_daemon.expect(202, "PUT", globals_, {"iscsi_maxrecdata": 4 * before})
        try:
            shared_daemon.expect(202, "POST", f"{place}negotiate/")
            asked = initiator.wait_for_async().expect(bhs.AsyncMessage)
            assert (asked.async_event, asked.parameter3) == (AsyncEvent.NEGOTIATION_REQUEST, 10)
            answer = initiator.text({"MaxRecvDataSegmentLength": "4096"})
            assert ("MaxRecvDataSegmentLength", str(4 * before)) in answer
            initiator.initiator.max_data_in = initiator.max_data_in = 4096
            initiator.max_data_out = 4 * before
            assert initiator.nop(b"\x5a" * 2 * before).data == b"\x5a" * 4096
            shown = shared_daemon.expect(200, "GET", place)
            assert shown["negotiated"]["MaxRecvDataSegmentLength"] == "4096"
            assert write(initiator, 0, b"\xa5" * MIB).good
            assert read(initiator, 0, MIB // 512) == b"\xa5" * MIB
        finally:
            shared_daemon.expect(202, "PUT", globals_, {"iscsi_maxrecdata": before})
