"""I/O limits through the API, on live sessions. By order of events: what a limit of one a second holds is let
go when the limit is lifted, long before a second for each would have passed."""

from tests import cdbs
from tests.daemon import Daemon
from tests.faults.kit import lun_of, pattern

HELD = 200


def limit(daemon: Daemon, extent_id: int, **limits: int) -> None:
    fields = {f"iscsi_target_extent_{name}_limit": value for name, value in limits.items()}
    shown = daemon.expect(202, "PUT", f"services/iscsi/extent/{extent_id}/", fields)
    assert all(shown[name] == value for name, value in fields.items())


def test_limits_are_set_held_and_lifted_live(shared_daemon: Daemon) -> None:
    daemon = shared_daemon
    disk, other = daemon.create_disk("limited", "4MB"), daemon.create_disk("free", "4MB")
    with lun_of(daemon, disk) as lun, lun_of(daemon, other) as beside:
        assert lun.write(0, pattern(0, 8)).good
        limit(daemon, disk.extent_id, iops=1, bandwidth=0)
        tasks = [lun.send_command(cdbs.read10(0, 8), read=4096) for _ in range(20)]
        assert lun.wait(tasks[0]).data == pattern(0, 8)
        assert lun.do(cdbs.test_unit_ready()).good
        for number in range(HELD):
            assert beside.write(number, pattern(number)).good
        assert not tasks[-1].done
        assert lun.task_management(1, task=tasks[-1]) == 0
        tasks.pop()
        limit(daemon, disk.extent_id, iops=0)
        assert all(lun.wait(task).data == pattern(0, 8) for task in tasks)
        limit(daemon, disk.extent_id, bandwidth=4096)
        tasks = [lun.send_command(cdbs.write10(8 * i, 8), pattern(i, 8)) for i in range(16)]
        assert lun.do(cdbs.test_unit_ready()).good
        assert not all(task.done for task in tasks)
        limit(daemon, disk.extent_id, bandwidth=1 << 30)
        assert all(lun.wait(task).good for task in tasks)
    daemon.delete_disk(disk)
    daemon.delete_disk(other)


def test_limits_survive_a_restart(daemon: Daemon) -> None:
    disk = daemon.create_disk("kept", "1MB", extent={"iscsi_target_extent_iops_limit": 7})
    daemon.restart()
    shown = daemon.expect(200, "GET", f"services/iscsi/extent/{disk.extent_id}/")
    assert shown["iscsi_target_extent_iops_limit"] == 7
    with lun_of(daemon, disk) as lun:
        assert lun.write(0, pattern(0)).good
