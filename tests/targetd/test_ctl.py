"""``iscsi-targetctl`` against the real API over an engine in memory."""

import asyncio
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from api.app import COLLECTIONS, make_app
from api.auth import Account, Authenticator, hash_password
from targetd.config import Configuration, unit_serial
from targetd.ctl import main, progress
from targetd.ctl.client import Client, CtlError
from targetd.ctl.document import dumps, loads
from targetd.ctl.resources import RESOURCES
from targetd.interface import ConnectionStatus, SessionStatus, Statistics, Work
from tests.api.engine import MemoryEngine
from tests.certificates import make_certificate

PASSWORD = "correct horse"
_HASH = hash_password(PASSWORD)


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ctl = Callable[..., Awaitable[Result]]


@pytest.fixture
def engine() -> MemoryEngine:
    return MemoryEngine()


async def served(engine: MemoryEngine, tls: ssl.SSLContext | None = None) -> TestServer:
    accounts = {"root": Account("root", _HASH), "viewer": Account("viewer", _HASH, read_only=True)}
    app = make_app(engine, Authenticator(accounts), version="0.1.0")
    server = TestServer(app, scheme="https" if tls else "http")
    await server.start_server(ssl=tls)
    return server


@pytest.fixture
async def url(engine: MemoryEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[str]:
    server = await served(engine)
    password = tmp_path / "api-password"
    password.write_text(PASSWORD + "\n")
    for name in [name for name in os.environ if name.startswith("ISCSI_TARGET")]:
        monkeypatch.delenv(name)
    address = f"http://{server.host}:{server.port}"
    monkeypatch.setenv("ISCSI_TARGETCTL_URL", address)
    monkeypatch.setenv("ISCSI_TARGETCTL_PASSWORD_FILE", str(password))
    yield address
    await server.close()


@pytest.fixture
def ctl(url: str, capsys: pytest.CaptureFixture[str]) -> Ctl:
    async def run(*arguments: object) -> Result:
        status = await asyncio.to_thread(main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


async def good(ctl: Ctl, *arguments: object) -> Result:
    result = await ctl(*arguments)
    assert (result.status, result.err) == (0, "")
    return result


async def furnish(ctl: Ctl, tmp_path: Path) -> None:
    """One object of each kind; portal 1 and initiator group 1 are there from the start."""
    secret, peer = tmp_path / "secret", tmp_path / "peer"
    secret.write_text("twelve-chars\n")
    peer.write_text("other-twelve\n")
    await good(
        ctl, "authcredential", "create", "--tag", 7, "--user", "joe", "--secret-file", secret,
        "--peer-user", "tgt", "--peer-secret-file", peer,
    )  # fmt: skip
    await good(
        ctl, "extent", "create", "--name", "disk0", "--type", "File", "--path", "/mnt/disk0",
        "--file-size", "10 mb", "--read-only",
    )  # fmt: skip
    await good(ctl, "target", "create", "--name", "t0", "--alias", "The 'first'")
    await good(
        ctl, "targetgroup", "create", "--target", "t0", "--portal", 1, "--initiator-group", 1,
        "--auth-method", "CHAP", "--auth-group", 7,
    )  # fmt: skip
    await good(ctl, "targettoextent", "create", "--target", "T0", "--extent", "disk0")


def test_every_resource_of_the_api_has_its_command() -> None:
    """One declaration per resource; names are those of the URLs."""
    assert {(resource.name, id(resource.declaration)) for resource in RESOURCES} == {
        (collection.name, id(collection.declaration)) for collection in COLLECTIONS
    }


async def test_objects_are_made_shown_changed_and_deleted(ctl: Ctl, tmp_path: Path) -> None:
    await furnish(ctl, tmp_path)
    shown = (await good(ctl, "extent", "show", "disk0", "--json")).json
    assert shown["iscsi_target_extent_filesize"] == "10MB"
    assert shown["iscsi_target_extent_ro"] is True
    changed = await good(ctl, "extent", "update", "disk0", "--file-size", "20MB", "--no-read-only")
    assert "20MB" in changed.out
    mapping = (await good(ctl, "--json", "targettoextent", "show", 1)).json
    assert (mapping["iscsi_target"], mapping["iscsi_extent"], mapping["iscsi_lunid"]) == (1, shown["id"], 0)
    await good(ctl, "extent", "delete", "disk0")
    assert (await good(ctl, "targettoextent", "list", "--json")).json == []
    assert (await good(ctl, "target", "list", "--json")).json[0]["iscsi_target_name"] == "t0"


async def test_files_go_only_when_asked_for(ctl: Ctl, engine: MemoryEngine, tmp_path: Path) -> None:
    for name in ("kept", "gone"):
        await good(
            ctl, "extent", "create", "--name", name, "--type", "File", "--path", f"/mnt/{name}",
            "--file-size", "1MB",
        )  # fmt: skip
    await good(ctl, "extent", "delete", "kept")
    assert not engine.discarded
    await good(ctl, "extent", "delete", "--file", "gone")
    assert engine.discarded == {2}


async def test_tables_are_one_line_an_object_and_hold_no_secret(ctl: Ctl, tmp_path: Path) -> None:
    """design.md §6: secrets never on a screen that nobody asked for them."""
    await furnish(ctl, tmp_path)
    for resource in RESOURCES:
        for option in ([], ["--all"]):
            lines = (await good(ctl, resource.name, "list", *option)).out.splitlines()
            assert len(lines) == 2
            assert lines[0].split()[0] == "id"
            assert "twelve" not in "".join(lines)
    shown = await good(ctl, "authcredential", "show", 1)
    assert "***" in shown.out
    assert "twelve" not in shown.out
    assert (await good(ctl, "authcredential", "show", 1, "--json")).json[
        "iscsi_target_auth_secret"
    ] == "twelve-chars"


async def test_extents_and_targets_are_changed_by_force(
    ctl: Ctl, engine: MemoryEngine, tmp_path: Path
) -> None:
    await good(ctl, "extent", "create", "--name", "e", "--type", "Memory", "--file-size", "1MB")
    await good(ctl, "target", "create", "--name", "t")
    await good(ctl, "extent", "update", "e", "--block-size", "4096")
    assert engine.forced == 0
    await good(ctl, "extent", "update", "e", "--block-size", "512", "--force")
    await good(ctl, "target", "update", "t", "--logical-block-size", "4096", "--force")
    assert engine.forced == 2
    document = tmp_path / "document.toml"
    document.write_text(dumps({"format": 1, "extent": [{"name": "e", "block_size": 2048}]}), encoding="utf-8")
    await good(ctl, "import", document, "--force")
    assert engine.forced == 3


async def test_what_a_terminal_would_obey_does_not_reach_it(ctl: Ctl) -> None:
    await good(ctl, "portal", "update", 1, "--comment", "red [bold]x[/bold]\n\ttab")
    for command in ("list", "show 1"):
        text = (await good(ctl, "portal", *command.split())).out
        assert "red [bold]x[/bold]\\n\\ttab" in text


async def test_the_global_configuration_is_shown_and_changed(ctl: Ctl) -> None:
    await good(
        ctl, "globalconfiguration", "update", "--basename", "iqn.2016-04.com.example",
        "--luc-enabled", "--luc-auth-method", "None",
    )  # fmt: skip
    shown = await good(ctl, "globalconfiguration", "show")
    assert "iqn.2016-04.com.example" in shown.out
    answer = (await good(ctl, "globalconfiguration", "show", "--json")).json
    assert answer["iscsi_toggleluc"] is True


async def test_the_service_is_stopped_and_started(ctl: Ctl, engine: MemoryEngine) -> None:
    await good(ctl, "service", "stop")
    assert not engine.configuration.service_enabled
    assert (await good(ctl, "service", "start", "--json")).json["srv_state"] == "RUNNING"
    assert "running" in (await good(ctl, "service", "show")).out


WRONG = {
    "extent create --name a --type Tape --path /mnt/a": (1, "--type: Select a valid choice. Tape"),
    "extent create --name a": (1, "--type: This field is required."),
    "extent show 99": (1, "there is no extent with id 99"),
    "extent show nobody": (1, "there is no extent named 'nobody'"),
    "extent update 1": (2, "say what to change"),
    "portal show first": (2, "'first' is no id"),
    "targetgroup create --target nobody --portal 1": (1, "--target: there is no target named 'nobody'"),
    "authcredential create --user u --secret-file /nowhere": (2, "--secret-file: cannot read /nowhere"),
    "globalconfiguration update --max-sessions 0": (1, "--max-sessions: This value must be between"),
    "session drop 4": (1, "there is no services/iscsi/session/4"),
    "import /nowhere": (2, "cannot read /nowhere"),
    "--url ftp://x extent list": (2, "--url: 'ftp://x' is not http://"),
    "--url http://127.0.0.1:1 extent list": (1, "cannot reach http://127.0.0.1:1: Connection refused"),
    "--user nobody extent list": (1, "does not accept the password of 'nobody'"),
    "--password-file /nowhere extent list": (2, "--password-file: cannot read /nowhere"),
    "--user viewer target create --name x": (1, ""),
}


@pytest.mark.parametrize("line", WRONG)
async def test_errors_name_the_field_and_the_exit_status_tells_the_kind(ctl: Ctl, line: str) -> None:
    """1 failed, 2 usage; nothing on standard output."""
    result = await ctl(*line.split())
    status, text = WRONG[line]
    assert (result.status, result.out) == (status, "")
    assert result.err.startswith("iscsi-targetctl: ")
    assert text in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("line", ["dance", "extent dance", "extent create --bogus", "session show x"])
async def test_a_wrong_command_line_is_usage(ctl: Ctl, line: str) -> None:
    assert (await ctl(*line.split())).status == 2


async def test_https_is_verified_against_the_authority_named(
    ctl: Ctl, engine: MemoryEngine, tmp_path: Path
) -> None:
    """The password goes to nobody else."""
    certificate, key = make_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server = await served(engine, tls)
    url = f"https://127.0.0.1:{server.port}"
    refused = await ctl("--url", url, "portal", "list")
    assert refused.status == 1
    assert "--ca-file names what to trust" in refused.err
    await good(ctl, "--url", url, "--ca-file", certificate, "portal", "list")
    missing = await ctl("--url", url, "--ca-file", tmp_path / "none", "portal", "list")
    assert (missing.status, missing.out) == (2, "")
    await server.close()


def working(done: int) -> Statistics:
    return Statistics(work=(Work("sanitize", 3, "disk\x1b[1m", done, 1 << 30),))


async def test_work_is_shown_until_it_is_done(
    ctl: Ctl, url: str, engine: MemoryEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    """On no terminal once; on one, bars that end with the work."""
    engine.counted = working(1 << 29)
    assert "sanitize  disk\\x1b[1m  512.0 MiB  1.0 GiB" in (await good(ctl, "work")).out
    assert (await good(ctl, "work", "--json")).json[0]["done"] == 1 << 29

    looks = [working(1 << 28), working(1 << 29), Statistics()]

    async def statistics() -> Statistics:
        return looks.pop(0)

    engine.statistics = statistics  # type: ignore[method-assign]
    client = Client(url, "root", PASSWORD)
    await asyncio.to_thread(progress.watch, client)
    client.close()
    shown = capsys.readouterr().err
    assert "sanitize disk\\x1b[1m" in shown
    assert "1.0/1.0 GiB" in shown
    assert looks == []


async def test_a_request_that_takes_its_time_has_a_bar_and_its_own_end(
    url: str, engine: MemoryEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.counted = working(1 << 29)
    looked = threading.Event()

    async def statistics() -> Statistics:
        looked.set()
        return engine.counted

    def work() -> str:
        assert looked.wait(60)
        return "made"

    def failing() -> str:
        raise CtlError("no room")

    engine.statistics = statistics  # type: ignore[method-assign]
    client = Client(url, "root", PASSWORD)
    assert await asyncio.to_thread(progress.during, client, work) == "made"
    assert "sanitize disk" in capsys.readouterr().err
    with pytest.raises(CtlError, match="no room"):
        await asyncio.to_thread(progress.during, client, failing)
    client.close()


async def test_a_connection_that_the_daemon_closed_meanwhile_is_opened_again(
    engine: MemoryEngine, url: str
) -> None:
    """A GET is repeated; a write is not, since it may have been carried out."""
    client = Client(url, "root", PASSWORD)

    def twice() -> list[int]:
        first = len(client.all("services/iscsi/portal"))
        assert client._connection.sock is not None
        client._connection.sock.shutdown(socket.SHUT_RDWR)
        return [first, len(client.all("services/iscsi/portal"))]

    assert await asyncio.to_thread(twice) == [1, 1]
    client.close()


async def test_no_option_takes_a_secret_itself(ctl: Ctl) -> None:
    """design.md §6: never in the process list."""
    text = (await good(ctl, "authcredential", "create", "--help")).out
    assert "--secret-file" in text
    assert "--secret " not in text


def session(**changes: Any) -> SessionStatus:
    values: dict[str, Any] = {
        "id": 4, "initiator_name": "iqn.2016-04.com.example:\x1b[2Jhost", "initiator_alias": "",
        "target_id": 1, "target_name": "iqn.2016-04.com.example:t0", "target_portal_group_tag": 1,
        "isid": "0x800000000001", "tsih": 9, "user": "joe",
        "connections": (ConnectionStatus(1, "192.0.2.1:5000", "192.0.2.2:3260", "None", "CRC32C"),),
        "negotiated": {"MaxBurstLength": 262144}, "luns": (0, 1), "commands": 10, "bytes_read": 4096,
        "bytes_written": 3 * 2**30, "age_s": 60.0, "idle_s": 2.4,
    }  # fmt: skip
    return SessionStatus(**values | changes)


async def test_sessions_are_listed_and_dropped(ctl: Ctl, engine: MemoryEngine) -> None:
    engine.open_sessions = {4: session(), 5: session(id=5)}
    listed = (await good(ctl, "session", "list")).out
    assert len(listed.splitlines()) == 3
    assert "\x1b" not in listed
    assert "3.0 GiB" in listed
    assert "192.0.2.1:5000" in listed
    shown = (await good(ctl, "session", "show", 4)).out
    assert "MaxBurstLength" in shown
    assert "\x1b" not in shown
    await good(ctl, "session", "negotiate", 5)
    assert engine.negotiated == [5]
    await good(ctl, "session", "drop", 4, 5)
    assert (await good(ctl, "session", "list", "--json")).json == []


# -- the whole configuration ------------------------------------------------------------------------


async def test_an_export_imports_into_another_daemon_and_then_changes_nothing(
    ctl: Ctl, engine: MemoryEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects are named by what they are called, so ids may differ."""
    await furnish(ctl, tmp_path)
    await good(ctl, "globalconfiguration", "update", "--basename", "iqn.2016-04.com.example")
    await good(ctl, "service", "stop")
    file = tmp_path / "all.toml"
    file.write_text("")
    file.chmod(0o644)
    await good(ctl, "export", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (await good(ctl, "import", file)).out == "nothing to change\n"

    other = MemoryEngine()
    server = await served(other)
    monkeypatch.setenv("ISCSI_TARGETCTL_URL", f"http://{server.host}:{server.port}")
    for name in ("x", "y"):  # so that ids differ from the first daemon's
        await good(ctl, "target", "create", "--name", name)
    await good(
        ctl, "extent", "create", "--name", "disk9", "--type", "File", "--path", "/mnt/disk9",
        "--file-size", "1MB",
    )  # fmt: skip
    steps = (await good(ctl, "import", "--dry-run", "--json", file)).json
    assert [step["action"] for step in steps].count("create") == 5
    applied = other.applied
    await good(ctl, "import", file)
    assert other.applied > applied
    assert (await good(ctl, "import", "--dry-run", file)).out == "nothing to change\n"
    again = (await good(ctl, "export")).out
    assert 'target = "t0"' in again
    assert other.configuration.globals == engine.configuration.globals
    assert not other.configuration.service_enabled

    left = await good(ctl, "import", "--delete", "--dry-run", file)
    assert sorted(line for line in left.out.splitlines()) == ["- extent disk9", "- target x", "- target y"]
    await good(ctl, "import", "--delete", file)
    assert (await good(ctl, "export")).out == file.read_text()
    await server.close()


async def test_a_rebuilt_daemon_shows_its_disks_under_the_identifiers_that_they_had(
    ctl: Ctl, engine: MemoryEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NAA identifiers, serial numbers, and whether the extent's or the target's is shown."""
    for target, serial in (("chosen", "CHOSEN"), ("made", "")):
        await good(ctl, "target", "create", "--name", target, "--serial", serial)
    for name, serial in (("a", ""), ("b", "MINE"), ("c", "")):
        await good(
            ctl, "extent", "create", "--name", name, "--type", "File", "--path", f"/mnt/{name}",
            "--file-size", "1MB", "--serial", serial,
        )  # fmt: skip
    for target, extent in (("chosen", "a"), ("chosen", "b"), ("made", "c")):
        await good(ctl, "targettoextent", "create", "--target", target, "--extent", extent)
    file = tmp_path / "all.toml"
    await good(ctl, "export", file)

    other = MemoryEngine()
    server = await served(other)
    monkeypatch.setenv("ISCSI_TARGETCTL_URL", f"http://{server.host}:{server.port}")
    await good(ctl, "target", "create", "--name", "x")  # so that ids differ
    await good(ctl, "import", "--delete", file)

    def shown(config: Configuration) -> dict[tuple[str, int], tuple[str, str]]:
        found = {}
        for mapping in config.lun_mappings.values():
            extent, target = config.extents[mapping.extent_id], config.targets[mapping.target_id]
            found[target.name, mapping.lun] = (extent.naa, unit_serial(extent, target, mapping.lun))
        return found

    assert shown(other.configuration) == shown(engine.configuration)
    assert {serial for _, serial in shown(other.configuration).values()} >= {"CHOSEN0", "MINE"}
    await server.close()


async def test_a_dry_run_shows_the_difference_and_sends_nothing(
    ctl: Ctl, engine: MemoryEngine, tmp_path: Path
) -> None:
    await furnish(ctl, tmp_path)
    text = (await good(ctl, "export")).out
    changed = (
        text.replace('file_size = "10MB"', 'file_size = "20 mb"')
        .replace("twelve-chars", "a-new-secret")
        .replace("alias = \"The 'first'\"", 'alias = ""')
    )
    file = tmp_path / "changed.toml"
    file.write_text(changed + '\n[[target]]\nname = "T1"\n')
    applied = engine.applied
    result = await good(ctl, "import", "--dry-run", file)
    assert engine.applied == applied
    assert result.out.splitlines() == [
        "~ authcredential 7/joe",
        "    secret: *** -> ***",
        "~ extent disk0",
        '    file_size: "10MB" -> "20MB"',
        "~ target t0",
        '    alias: "The \'first\'" -> ""',
        "+ target t1",
        '    name = "t1"',
    ]
    await good(ctl, "import", file)
    assert (await good(ctl, "target", "show", "t0", "--json")).json["iscsi_target_alias"] is None
    assert (await good(ctl, "import", file)).out == "nothing to change\n"


async def test_an_export_without_secrets_leaves_them_as_they_are(ctl: Ctl, tmp_path: Path) -> None:
    await furnish(ctl, tmp_path)
    text = (await good(ctl, "export", "--no-secrets")).out
    assert "twelve" not in text
    file = tmp_path / "open.toml"
    file.write_text(text)
    assert (await good(ctl, "import", file)).out == "nothing to change\n"


DOCUMENTS = {
    "": "format: None is not 1",
    "format = 2": "format: 2 is not 1",
    "format = 1\n[[disk]]": "disk: there is no such resource",
    "format = 1\n[extent]": "extent: is a list; begin each with [[extent]]",
    "format = 1\n[[extent]]\nnme = 'a'": "extent 1: nme: There is no such field.",
    "format = 1\n[[extent]]\ncomment = 'a'": "extent 1: name: it is named by this",
    "format = 1\n[[extent]]\nname = 'a'\nfile_size = 'big'": "extent 1: file_size: This value can be a size",
    "format = 1\n[[extent]]\nname = 'a'\n[[extent]]\nname = 'a'": "extent 2: name: the same as of another",
    "format = 1\n[[targettoextent]]\ntarget = 'no'\nextent = 'no'": "targettoextent no/no: target: there",
    "format = 1\n[[targetgroup]]\ntarget = true\nportal = 1": "targetgroup 1: target: Name what is meant.",
    "format = 1\n[globalconfiguration]\nr2t = 'many'": "globalconfiguration: r2t: Enter a whole number.",
    "format = 1\n[service]\nenabled = 'yes'": "service: enabled: true or false",
    "format = ": ".toml: Invalid value",
}


@pytest.mark.parametrize("text", DOCUMENTS)
async def test_a_wrong_document_is_refused_before_anything_is_sent(
    ctl: Ctl, engine: MemoryEngine, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    result = await ctl("import", file)
    assert (result.status, result.out, engine.applied) == (1, "", 0)
    assert DOCUMENTS[text] in result.err


async def test_an_import_is_done_as_a_whole_or_not_at_all(
    ctl: Ctl, engine: MemoryEngine, tmp_path: Path
) -> None:
    """What is refused is told by object and field, by a dry run too."""
    file = tmp_path / "half.toml"
    file.write_text(
        'format = 1\n[[extent]]\nname = "a"\ntype = "File"\npath = "/mnt/a"\nfile_size = "1MB"\n'
        '[[extent]]\nname = "b"\ntype = "File"\npath = "/mnt/a"\nfile_size = "1MB"\n'
        '[[target]]\nname = "t"\n'
    )
    before = engine.configuration
    for options in ((), ("--dry-run",)):
        result = await ctl("import", *options, file)
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith("iscsi-targetctl: extent b: path: This path is already used by extent a")
        assert engine.configuration is before
    first, second = file.read_text().rsplit("/mnt/a", 1)
    file.write_text(first + "/mnt/b" + second)
    foreseen = (await good(ctl, "import", "--dry-run", file)).out
    assert engine.configuration is before
    done = (await good(ctl, "import", file)).out
    assert done == foreseen
    assert [line for line in done.splitlines() if line[0] == "+"] == [
        "+ extent a",
        "+ extent b",
        "+ target t",
    ]
    assert engine.applied == 1


def test_any_text_survives_the_document() -> None:
    """TOML basic strings: quotes, backslashes, controls, DEL, what is beyond the BMP."""
    text = "".join(map(chr, range(160))) + "\\\"'é\u2028😀"
    document = {"format": 1, "target": [{"name": text, "list": [text, text], "n": 5, "yes": True}]}
    assert loads(dumps(document)) == document


def test_a_command_starts_without_what_it_does_not_need() -> None:
    """Standard library HTTP, so that a command starts fast."""
    code = (
        "import sys\nfrom targetd.ctl import commands\n"
        "sys.exit(bool({'aiohttp', 'sqlalchemy', 'pydantic', 'asyncio', 'rich'} & sys.modules.keys()))"
    )
    root = Path(__file__).resolve().parent.parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False, timeout=30).returncode == 0
