"""QEMU's block layer against the real daemon: real images in and out, and live changes meanwhile."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.daemon import HOST, Daemon
from tests.interop.peers import needs, run
from tests.interop.rawsession import RawSession


def _missing_driver() -> str:
    """qemu-utils without qemu-block-extra knows no iscsi:// URLs."""
    if shutil.which("qemu-img") is None:
        return "not installed: qemu-img"
    known = subprocess.run(["qemu-img", "--help"], capture_output=True, text=True, check=False).stdout
    return "" if " iscsi" in known else "qemu-img has no iscsi driver (Debian: qemu-block-extra)"


pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(bool(_missing_driver()), reason=_missing_driver() or "all there"),
    needs("mke2fs", "iscsi-ls"),
]

IMAGE_MIB = 256
INITIATOR = "iqn.2003-01.org.example:qemu-tests"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real ext4 file system of 256 MiB over a directory tree: data, holes and metadata."""
    directory = tmp_path_factory.mktemp("image")
    tree = directory / "tree"
    noise = random.Random(7143)
    for folder in ("a", "a/deep", "b"):
        (tree / folder).mkdir(parents=True)
        for number in range(8):
            (tree / folder / f"noise{number}").write_bytes(noise.randbytes(5 << 20))
            (tree / folder / f"text{number}").write_text(f"{folder} {number}\n" * 5000)
    with (tree / "b/sparse").open("wb") as sparse:
        sparse.truncate(64 << 20)
    (tree / "b/link").symlink_to("../a/deep/text1")
    path = directory / "image.raw"
    run("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(path), f"{IMAGE_MIB}M").ok()
    assert path.stat().st_size == IMAGE_MIB << 20
    return path


def copy_in(image: Path, url: str) -> None:
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), url).ok()


def copy_out(url: str, path: Path) -> None:
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(path)).ok()


def assert_same(image: Path, url: str, scratch: Path) -> None:
    """The LUN holds the image: as qemu compares, as a copy of it, and as a sound file system."""
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), url).ok()
    copy_out(url, scratch)
    run("cmp", str(image), str(scratch)).ok()
    run("e2fsck", "-f", "-n", str(scratch)).ok()


def test_image_goes_in_comes_back_and_survives_kill_9(daemon: Daemon, image: Path, tmp_path: Path) -> None:
    disk = daemon.create_disk("image", f"{IMAGE_MIB}MB")
    copy_in(image, disk.url)
    assert_same(image, disk.url, tmp_path / "back.raw")
    daemon.kill9()
    daemon.start()
    assert_same(image, disk.url, tmp_path / "again.raw")
    assert daemon.restart().alive()
    assert_same(image, disk.url, tmp_path / "third.raw")


def test_unwritten_disk_reads_as_zeros(shared_daemon: Daemon) -> None:
    disk = shared_daemon.create_disk("zeros", "16MB")
    run("qemu-io", "-f", "raw", "-c", "read -P 0 0 16M", disk.url).ok()


PATTERNS = [
    # name, qemu-io commands
    ("single-block", ["write -P 0x11 0 512", "read -P 0x11 0 512", "read -P 0 512 512"]),
    ("last-block", ["write -P 0x22 67108352 512", "read -P 0x22 67108352 512", "read -P 0 62M 1M"]),
    ("odd-length", ["write -P 0x33 1536 3584", "read -P 0x33 1536 3584", "read -P 0 0 1536"]),
    ("large", ["write -P 0x44 1M 32M", "flush", "read -P 0x44 1M 32M", "read -P 0 33M 1M"]),
    ("fua", ["write -f -P 0x55 0 64k", "read -P 0x55 0 64k"]),
    (
        "overwrite",
        ["write -P 0x66 0 1M", "write -P 0x77 256k 256k", "read -P 0x66 0 256k", "read -P 0x77 256k 256k"],
    ),
    (
        "zero",
        [
            "write -P 0x88 0 4M",
            "write -z 1M 1M",
            "read -P 0x88 0 1M",
            "read -P 0 1M 1M",
            "read -P 0x88 2M 2M",
        ],
    ),
    ("zero-unmap", ["write -P 0x99 0 4M", "write -z -u 1M 1M", "read -P 0 1M 1M", "read -P 0x99 2M 2M"]),
    ("discard", ["write -P 0xaa 0 8M", "discard 1M 4M", "read -P 0 1M 4M", "read -P 0xaa 5M 3M"]),
    (
        "deep",
        [f"aio_write -P {0x40 + n:#x} {n}M 1M" for n in range(32)]
        + ["aio_flush"]
        + [f"aio_read -P {0x40 + n:#x} {n}M 1M" for n in range(32)]
        + ["aio_flush"],
    ),
]


@pytest.mark.parametrize(("name", "commands"), PATTERNS, ids=[name for name, _ in PATTERNS])
def test_pattern_written_is_pattern_read(shared_daemon: Daemon, name: str, commands: list[str]) -> None:
    disk = shared_daemon.create_disk(f"pattern-{name}", "64MB")
    arguments = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", "-d", "unmap", *arguments, disk.url).ok()
    assert "failed" not in said, said


def test_discard_gives_space_back_to_the_host(shared_daemon: Daemon) -> None:
    """UNMAP punches holes that ``du`` can see (design.md §4)."""
    disk = shared_daemon.create_disk("shrinking", "64MB")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 32M", "-c", "flush", disk.url).ok()
    full = disk.path.stat().st_blocks
    assert full * 512 >= 32 << 20
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 0 32M", disk.url).ok()
    assert disk.path.stat().st_blocks < full // 4


def test_read_only_extent_refuses_writes(shared_daemon: Daemon) -> None:
    """DATA PROTECT 27h/00h; reads go on."""
    disk = shared_daemon.create_disk("frozen", "8MB")
    run("qemu-io", "-f", "raw", "-c", "write -P 0xcd 0 1M", disk.url).ok()
    shared_daemon.expect(
        202, "PUT", f"services/iscsi/extent/{disk.extent_id}/", {"iscsi_target_extent_ro": True}
    )
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0xcd 0 1M", disk.url).ok()
    run("qemu-io", "-f", "raw", "-c", "write -P 0xee 0 1M", disk.url).refused()
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0xcd 0 1M", disk.url).ok()


def test_chap_disk_takes_an_image(shared_daemon: Daemon, image: Path) -> None:
    shared_daemon.create(
        "authcredential",
        iscsi_target_auth_tag=3,
        iscsi_target_auth_user="qemu",
        iscsi_target_auth_secret="qemus-secret-1",
    )
    disk = shared_daemon.create_disk(
        "secured",
        f"{IMAGE_MIB}MB",
        target={"iscsi_target_authtype": "CHAP", "iscsi_target_authgroup": 3},
    )
    run("qemu-img", "info", disk.url).refused()
    url = shared_daemon.url(disk.iqn, user="qemu", secret="qemus-secret-1")
    copy_in(image, url)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), url).ok()


def test_copy_does_not_notice_live_changes(daemon: Daemon, image: Path) -> None:
    """Create, list, change, delete through the API while a copy runs (style.md, "How one REST PUT flows")."""
    disk = daemon.create_disk("busy", f"{IMAGE_MIB}MB")
    unrelated = daemon.create_disk("unrelated", "8MB")
    with (
        RawSession((HOST, daemon.portal_port), INITIATOR, unrelated.iqn) as session,
        subprocess.Popen(
            # The rate, in bytes per second, makes the copy outlast the changes.
            ["qemu-img", "convert", "-n", "-r", "30M", "-f", "raw", "-O", "raw", str(image), disk.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as copy,
    ):
        try:
            assert session.status == 0
            made = daemon.create_disk("newcomer", "8MB")
            listing = run("iscsi-ls", "-s", daemon.url()).ok()
            assert made.iqn in listing and disk.iqn in listing

            path = "services/iscsi/globalconfiguration/"
            daemon.expect(202, "PUT", path, {"iscsi_nopinint": 17})
            assert daemon.expect(200, "GET", path)["iscsi_nopinint"] == 17

            before = daemon.expect(200, "GET", f"services/iscsi/target/{disk.target_id}/")
            refused = daemon.expect(
                409,
                "PUT",
                f"services/iscsi/target/{disk.target_id}/",
                {"iscsi_target_name": "renamed", "iscsi_target_queue_depth": "deep"},
            )
            assert "iscsi_target_queue_depth" in refused
            assert daemon.expect(200, "GET", f"services/iscsi/target/{disk.target_id}/") == before

            (own,) = [
                one
                for one in daemon.expect(200, "GET", "services/iscsi/session/")
                if one["target_id"] == disk.target_id
            ]
            # libiscsi answers by logging out and in again, with its commands (RFC 7143 §11.9.1, event 4).
            daemon.expect(202, "POST", f"services/iscsi/session/{own['id']}/negotiate/")

            daemon.delete("target", unrelated.target_id)
            session.until_closed()
            assert unrelated.iqn not in run("iscsi-ls", daemon.url()).ok()

            assert copy.poll() is None, "the copy was over before the changes were"
            said, _ = copy.communicate(timeout=60)
            assert copy.returncode == 0, said.decode()
        finally:
            copy.kill()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), disk.url).ok()


REFUSED_PUTS = [
    # resource, fields, field that must be named
    ("globalconfiguration", {"iscsi_firstburst": 1, "iscsi_nopinint": 5}, "iscsi_firstburst"),
    ("globalconfiguration", {"iscsi_maxsesh": 0, "iscsi_iotimeout": 9}, "iscsi_maxsesh"),
    ("globalconfiguration", {"iscsi_discoveryauthmethod": "Maybe"}, "iscsi_discoveryauthmethod"),
    (
        "extent",
        {"iscsi_target_extent_blocksize": 3, "iscsi_target_extent_comment": "x"},
        "iscsi_target_extent_blocksize",
    ),
    ("extent", {"iscsi_target_extent_filesize": "many"}, "iscsi_target_extent_filesize"),
    ("target", {"iscsi_target_flags": "wr", "iscsi_target_alias": "x"}, "iscsi_target_flags"),
    ("target", {"iscsi_target_portalgroup": 4711}, "iscsi_target_portalgroup"),
]


@pytest.mark.parametrize(("resource", "fields", "named"), REFUSED_PUTS)
def test_put_that_fails_validation_changes_nothing(
    shared_daemon: Daemon, resource: str, fields: dict[str, object], named: str
) -> None:
    """409 with a message per field (api-semantics §2.1), and the LUN stays as it is."""
    name = f"steady{REFUSED_PUTS.index((resource, fields, named))}"
    disk = shared_daemon.create_disk(name, "8MB")
    identity = {"extent": f"{disk.extent_id}/", "target": f"{disk.target_id}/"}.get(resource, "")
    path = f"services/iscsi/{resource}/{identity}"
    before = shared_daemon.expect(200, "GET", path)
    assert named in shared_daemon.expect(409, "PUT", path, fields)
    assert shared_daemon.expect(200, "GET", path) == before
    run("qemu-io", "-f", "raw", "-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M", disk.url).ok()
