"""Discovery, login in every way that open-iscsi offers, and what the admin's tools say of the disk."""

import json
import re
import subprocess

from tests.guest.inside import host, iscsi
from tests.guest.inside.checks import check, require
from tests.guest.inside.iscsi import ALICE, BOB, Node, chap, disk, logged_in, make_disk
from tests.guest.inside.shell import attempt, run
from tests.guest.wires import PORTALS

USER, SECRET = "alice", "alices-secret1"
PEER_USER, PEER_SECRET = "target", "targets-secret"
WRONG = "wrong-secret-00"
TAG = 7
AUTHENTICATION_FAILED = "login failed due to authorization failure"
"""open-iscsi's words for status 0201h and 0202h (iscsiadm's exit status 24)."""
LOGIN_FAILED = "encountered non-retryable iSCSI login failure"
"""And for whatever else the login fails for, without another try (exit status 19)."""

WCE = 0x04
"""In byte 2 of the caching mode page (SBC-3 §6.5.5)."""

_prepared = False


def credentials() -> int:
    """The tag of a group with one account and its peer, made once."""
    global _prepared
    if not _prepared:
        host.ask(
            "credential", tag=TAG, user=USER, secret=SECRET, peer_user=PEER_USER, peer_secret=PEER_SECRET
        )
        _prepared = True
    return TAG


def chap_disk(method: str = "CHAP") -> str:
    return str(make_disk("16MB", method=method, credentials=credentials())["iqn"])


def accepted(iqn: str, **settings: str) -> str:
    """A login that must succeed and give a disk that can be read."""
    with logged_in(iqn, **settings) as node:
        run("dd", f"if={node.disk()}", "of=/dev/null", "bs=1M", "count=4", "iflag=direct")
        return node.session().name


def refused(iqn: str, words: str = AUTHENTICATION_FAILED, initiator: str = ALICE, **settings: str) -> None:
    """A login that must be refused in these words, and leave no session."""
    node = Node(iqn, initiator=initiator, settings={**settings, "node.session.initial_login_retry_max": 1})
    node.record().try_login().refused(words)
    require(not node.sessions(), "a session is there after a refused login")
    node.forget()


# -- discovery ----------------------------------------------------------------------------------


@check
def discovery_lists_targets_and_portals() -> None:
    """SendTargets through `iscsiadm -m discovery`: every target with every portal."""
    iqns = [make_disk("16MB")["iqn"] for _ in range(3)]
    found = run("iscsiadm", "-m", "discovery", "-t", "st", "-p", PORTALS[0])
    for iqn in iqns:
        for portal in PORTALS:
            require(re.search(rf"^{re.escape(portal)},1 {re.escape(iqn)}$", found, re.MULTILINE), found)


@check
def discovery_leaves_out_what_is_not_for_us() -> None:
    """A target for another initiator name is not listed, and a login to it is refused."""
    iqn = make_disk("16MB", initiators=[BOB])["iqn"]
    make_disk("16MB")
    found = run("iscsiadm", "-m", "discovery", "-t", "st", "-p", PORTALS[0])
    require(iqn not in found, found)
    refused(iqn, LOGIN_FAILED)
    with logged_in(iqn, initiator=BOB) as node:
        node.disk()


@check
def discovery_can_ask_for_chap() -> None:
    """Discovery with CHAP as the portal demands it; refused without."""
    credentials()
    portal = "services/iscsi/portal/1/"
    wanted = {
        "iscsi_target_portal_discoveryauthmethod": "CHAP",
        "iscsi_target_portal_discoveryauthgroup": TAG,
    }
    host.ask("api", method="PUT", path=portal, body=wanted)
    record = ("iscsiadm", "-m", "discoverydb", "-t", "st", "-p", PORTALS[1])
    try:
        run(*record, "-o", "new")
        attempt(*record, "--discover").refused("authorization failure")
        for key, value in {"authmethod": "CHAP", "username": USER, "password": SECRET}.items():
            run(*record, "-o", "update", "-n", f"discovery.sendtargets.auth.{key}", "-v", value)
        require(PORTALS[1] in run(*record, "--discover"), "nothing discovered")
    finally:
        back = {"iscsi_target_portal_discoveryauthmethod": "None"}
        host.ask("api", method="PUT", path=portal, body=back)
        attempt(*record, "-o", "delete")


# -- login --------------------------------------------------------------------------------------


@check
def login_without_chap() -> None:
    """`iscsiadm -m node --login` on both portals; the disk is there and can be read."""
    iqn = make_disk("16MB")["iqn"]
    for portal in PORTALS:
        with logged_in(iqn, portal) as node:
            run("dd", f"if={node.disk()}", "of=/dev/null", "bs=1M", "iflag=direct")


@check
def login_to_an_unknown_target_is_refused() -> None:
    """Status 0203h, and the initiator gives up at once."""
    refused("iqn.2003-01.org.example:no-such-target", LOGIN_FAILED)


def one_algorithm(name: str) -> None:
    iqn = chap_disk()
    accepted(iqn, **chap(user=USER, secret=SECRET, algorithms=name))
    refused(iqn, **chap(user=USER, secret=WRONG, algorithms=name))
    mutual = chap(user=USER, secret=SECRET, peer_user=PEER_USER, peer_secret=PEER_SECRET, algorithms=name)
    accepted(chap_disk("CHAP Mutual"), **mutual)


@check
def chap_with_md5() -> None:
    """CHAP one way and mutual with MD5 alone offered; a wrong secret is refused."""
    one_algorithm("MD5")


@check
def chap_with_sha1() -> None:
    """The same with SHA1."""
    one_algorithm("SHA1")


@check
def chap_with_sha256() -> None:
    """The same with SHA256."""
    one_algorithm("SHA256")


@check
def chap_with_sha3_256() -> None:
    """The same with SHA3-256."""
    one_algorithm("SHA3-256")


@check
def chap_with_every_algorithm_offered() -> None:
    """The default order of preference of open-iscsi, strongest first."""
    accepted(chap_disk(), **chap(user=USER, secret=SECRET, algorithms="SHA3-256,SHA256,SHA1,MD5"))


@check
def chap_refuses_strangers() -> None:
    """Unknown user, no CHAP at all, and one way where mutual is demanded."""
    iqn = chap_disk()
    refused(iqn, **chap(user="nobody", secret=SECRET))
    refused(iqn)
    refused(chap_disk("CHAP Mutual"), **chap(user=USER, secret=SECRET))


@check
def chap_mutual_unmasks_a_false_target() -> None:
    """The initiator leaves when the target cannot prove itself."""
    mutual = chap(user=USER, secret=SECRET, peer_user=PEER_USER, peer_secret=WRONG)
    refused(chap_disk("CHAP Mutual"), LOGIN_FAILED, **mutual)


@check
def negotiated_values_are_what_both_asked_for() -> None:
    """InitialR2T, ImmediateData and burst lengths of the session in sysfs follow the node record."""
    settings = {
        "node.session.iscsi.InitialR2T": "No",
        "node.session.iscsi.ImmediateData": "Yes",
        "node.session.iscsi.FirstBurstLength": 65536,
        "node.session.iscsi.MaxBurstLength": 131072,
    }
    with logged_in(make_disk("16MB")["iqn"], **settings) as node:
        session = node.session()
        seen = {
            key: (session / key).read_text().strip()
            for key in ("initial_r2t", "immediate_data", "first_burst_len", "max_burst_len")
        }
        wanted = {
            "initial_r2t": "0",
            "immediate_data": "1",
            "first_burst_len": "65536",
            "max_burst_len": "131072",
        }
        require(seen == wanted, f"{seen} instead of {wanted}")


@check
def writes_work_in_every_mode_of_sending_data() -> None:
    """All four combinations of InitialR2T and ImmediateData carry large and small writes."""
    iqn = make_disk("16MB")["iqn"]
    for initial_r2t in ("Yes", "No"):
        for immediate in ("Yes", "No"):
            settings = {
                "node.session.iscsi.InitialR2T": initial_r2t,
                "node.session.iscsi.ImmediateData": immediate,
            }
            with logged_in(iqn, **settings) as node:
                device = node.disk()
                for block in ("4k", "1M"):
                    run(
                        *("fio", "--name=modes", f"--filename={device}", "--rw=write", f"--bs={block}"),
                        *("--size=8M", "--direct=1", "--ioengine=libaio", "--iodepth=8"),
                        *("--verify=crc32c", "--verify_fatal=1"),
                    )


# -- what the tools say -------------------------------------------------------------------------


@check
def lsblk_shows_size_model_and_transport() -> None:
    """`lsblk` and `lsscsi`: size, transport, block sizes, discard limits as the extent has them."""
    with disk("48MB") as (_, device):
        columns = "SIZE,TRAN,LOG-SEC,PHY-SEC,DISC-MAX,DISC-GRAN,RO,VENDOR,SERIAL,WWN"
        shown = json.loads(run("lsblk", "--json", "--bytes", "--nodeps", "-o", columns, device))
        told = shown["blockdevices"][0]
        require(int(told["size"]) == 48 << 20, f"size {told}")
        require(told["tran"] == "iscsi", f"transport {told}")
        require(int(told["log-sec"]) == 512 and int(told["phy-sec"]) == 4096, f"sectors {told}")
        require(int(told["disc-max"]) > 0 and int(told["disc-gran"]) > 0, f"discard {told}")
        require(told["ro"] is False, f"read-only {told}")
        require(told["serial"] and told["wwn"], f"names {told}")
        require("disk" in run("lsscsi", "-t"), "lsscsi shows no disk")


@check
def udev_names_the_disk_by_path_and_id() -> None:
    """The links under /dev/disk/by-path and by-id that fstab lines use."""
    made = make_disk("16MB")
    with logged_in(made["iqn"]) as node:
        device = node.disk()
        links = run("udevadm", "info", "--query=symlink", f"--name={device}")
        require(f"disk/by-path/ip-{PORTALS[0]}-iscsi-{made['iqn']}-lun-{iscsi.first_lun}" in links, links)
        require("disk/by-id/scsi-3" in links and "disk/by-id/wwn-0x" in links, links)


@check
def udev_tells_two_luns_apart_whatever_their_target_is_called() -> None:
    """Two LUNs each of targets whose names have 36, 51, 63, 96 and 200 characters: `scsi_id`, which udev asks
    where sg3-utils' rules are not installed, takes ID_SERIAL from the NAA identifier, and by-id has both."""
    settings = "services/iscsi/globalconfiguration/"
    basename = host.ask("api", method="GET", path=settings)["iscsi_basename"]
    long_basename = f"{basename}:{'b' * (119 - len(basename))}"
    try:
        for length in (len(basename) + 7, 51, 63, 96, 200):
            made = make_disk("16MB", luns=2)
            base = long_basename if length > 120 else basename
            host.ask("api", method="PUT", path=settings, body={"iscsi_basename": base})
            name = "n" * (length - len(base) - 1)
            target = f"services/iscsi/target/{made['target_id']}/"
            host.ask("api", method="PUT", path=target, body={"iscsi_target_name": name})
            with logged_in(f"{base}:{name}") as node:
                for lun in made["luns"]:
                    device = node.disk(lun["lun"])
                    said = run("udevadm", "info", "--query=property", f"--name={device}")
                    properties = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
                    expected = f"3{lun['naa'].removeprefix('0x')}"
                    found = properties.get("ID_SERIAL")
                    require(found == expected, f"{length} characters: {found}, not {expected}\n{said}")
                    link = f"/dev/disk/by-id/scsi-{expected}"
                    require(link in properties["DEVLINKS"].split(), f"no {link}\n{said}")
    finally:
        host.ask("api", method="PUT", path=settings, body={"iscsi_basename": basename})


@check
def sg_inq_names_the_disk() -> None:
    """Standard INQUIRY by `sg_inq`: type, versions, serial number."""
    with disk() as (_, device):
        said = run("sg_inq", device)
        require("PDT=0" in said or "Peripheral device type: disk" in said, said)
        require("CmdQue=1" in said, said)
        require("Unit serial number:" in said, said)


@check
def sg_vpd_decodes_every_page() -> None:
    """`sg_vpd -a`, then every supported page by itself, without a complaint from the decoder."""
    with disk() as (_, device):
        said = run("sg_vpd", "--all", device)
        listed = subprocess.run(
            ["sg_vpd", "--page=sv", "--raw", device], capture_output=True, check=True, timeout=60
        ).stdout
        pages = [f"{page:02x}" for page in listed[4:]]
        require("83" in pages and "b2" in pages, f"pages {pages}")
        for page in pages:
            said += run("sg_vpd", f"--page=0x{page}", device)
        for word in ("malformed", "too short", "truncated", "bad length", "error"):
            require(word not in said.lower(), f"{word!r} in {said}")
        return f"{len(pages)} pages"


@check
def sg_readcap_agrees_with_the_kernel() -> None:
    """READ CAPACITY (10) and (16)."""
    with disk("48MB") as (_, device):
        for form in ([], ["--long"]):
            said = run("sg_readcap", *form, device)
            require("Last LBA=98303" in said.replace("Last logical block address", "Last LBA"), said)
        require("lbpme=1" in said and "lbprz=1" in said, said)


@check
def sg_modes_decodes_every_page() -> None:
    """MODE SENSE (6) and (10), current, changeable, default and saved values."""
    with disk() as (_, device):
        for control in range(4):
            said = run("sg_modes", "--all", f"--control={control}", device)
            require("Caching" in said and "Control" in said, said)
        run("sg_modes", "--six", "--all", device)


@check
def write_cache_can_be_turned_off_and_on() -> None:
    """MODE SELECT of the caching page, sent by the kernel's own `cache_type`."""
    with disk() as (node, device):
        lun = node.lun_path()
        assert lun is not None
        # The kernel sends MODE SELECT itself when it is told another mode.
        cache_type = next((lun / "scsi_disk").iterdir()) / "cache_type"
        before = cache_type.read_text().strip()
        require(before == "write back", f"a new disk says {before!r}")
        for words in ("write through", "write back"):
            cache_type.write_text(words)
            said = run("sg_modes", "--page=8", device)
            page = re.search(r"^ 00 +[08]8 12 ([0-9a-f]{2}) ", said, re.MULTILINE)
            require(page, said)
            require(bool(int(page[1], 16) & WCE) == (words == "write back"), said)


@check
def sg_logs_decodes_every_page() -> None:
    """LOG SENSE: the list of pages, and each of them."""
    with disk() as (_, device):
        said = run("sg_logs", "--all", device)
        require("Supported log pages" in said, said)
        for word in ("malformed", "too short", "truncated"):
            require(word not in said.lower(), f"{word!r} in {said}")


@check
def sg_opcodes_lists_what_the_disk_can_do() -> None:
    """REPORT SUPPORTED OPERATION CODES and TASK MANAGEMENT FUNCTIONS."""
    with disk() as (_, device):
        said = run("sg_opcodes", device)
        for command in (
            "Inquiry",
            "Read(16)",
            "Write(10)",
            "Unmap",
            "Compare and write",
            "Persistent reserve",
        ):
            require(command.lower() in said.lower(), f"no {command} in {said}")
        run("sg_opcodes", "--rctd", device)
        run("sg_opcodes", "--opcode=0x28", device)
        run("sg_opcodes", "--tmf", device)


@check
def sg_luns_lists_the_luns() -> None:
    """REPORT LUNS with every SELECT REPORT that `sg_luns` knows."""
    made = make_disk("16MB", luns=3)
    with logged_in(made["iqn"]) as node:
        device = node.generic()
        said = run("sg_luns", "--decode", device)
        for lun in made["luns"]:
            require(re.search(rf"lun={lun['lun']}\b", said), said)
        for select in (0, 1, 2):
            run("sg_luns", f"--select={select}", device)


@check
def more_tools_are_satisfied() -> None:
    """sg_turs, sg_requests, sg_sync, sg_verify, sg_start, sg_get_lba_status, sg_rtpg, sg_timestamp, sg_ident
    and sg_reset end with success."""
    commands = [
        ("sg_turs", "--num=20"),
        ("sg_requests",),
        ("sg_requests", "--desc"),
        ("sg_sync",),
        ("sg_verify", "--lba=0", "--count=64"),
        ("sg_start", "--start"),
        ("sg_get_lba_status", "--lba=0"),
        ("sg_rtpg", "--decode"),
        ("sg_timestamp",),
        ("sg_ident",),
    ]
    with disk() as (_, device):
        for command, *options in commands:
            run(command, *options, device)
        run("sg_reset", "--device", "--no-escalate", device)
        # The reset leaves a unit attention, reported once.
        attempt("sg_turs", device)
        run("sg_turs", device)
