"""``iscsi-targetd serve``: where options come from, who wins, and what an operator reads when wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from targetd.daemon.options import DECLARED, Address, Options, UsageError, describe, parse, read_memory
from tests.certificates import make_certificate

ROOT = Path(__file__).resolve().parent.parent.parent


def options(*arguments: str, environ: dict[str, str] | None = None) -> Options:
    result = parse(["serve", *arguments], environ or {}).options
    assert result is not None
    return result


def message(*arguments: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(UsageError) as error:
        parse(["serve", *arguments], environ or {})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "targetd.toml"
        path.write_text(text)
        return str(path)

    return write


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ISCSI_TARGETD_")}
    return subprocess.run(
        [sys.executable, "-m", "targetd", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean | environ,
        timeout=30,
        check=False,
    )


def test_defaults_are_those_of_the_design(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """design.md §2."""
    monkeypatch.chdir(tmp_path)
    assert options() == Options(
        state_dir=tmp_path / "state",
        portal=Address("0.0.0.0", 3260),
        api=Address("127.0.0.1", 8260),
        extent_roots=(),
        pools=(),
        workers=max(len(os.sched_getaffinity(0)) - 1, 1),
        io_engine="auto",
        memory_limit=read_memory("auto"),
        api_password_file=None,
        api_page_size=30,
        emulated_version=None,
        tls="off",
        tls_cert=None,
        tls_key=None,
        demo=False,
        log_level="info",
        log_format="text",
        config=None,
        check_config=False,
    )


def test_as_a_service_the_state_is_where_systemd_made_it() -> None:
    """systemd.exec(5), StateDirectory=."""
    environ = {"STATE_DIRECTORY": "/var/lib/iscsi-targetd:/var/lib/other"}
    assert options(environ=environ).state_dir == Path("/var/lib/iscsi-targetd")
    assert options("--state-dir", "/x", environ=environ).state_dir == Path("/x")


def test_the_nearer_source_wins(toml) -> None:
    """Command line, environment, file, default; a nearer list replaces the farther one."""
    config = toml(
        'state-dir = "/file"\nlog-level = "error"\nextent-root = ["/f1", "/f2"]\ndemo = true\n'
        'api = "127.0.0.1:1"\n'
    )
    environ = {
        "ISCSI_TARGETD_LOG_LEVEL": "Warning",
        "ISCSI_TARGETD_EXTENT_ROOT": "/e1:/e2",
        "ISCSI_TARGETD_CONFIG": config,
        "ISCSI_TARGETD_API": "",
    }
    far = options(environ=environ)
    assert far.state_dir == Path("/file")
    assert far.log_level == "warning"
    assert far.extent_roots == (Path("/e1"), Path("/e2"))
    assert far.demo
    assert far.api == Address("127.0.0.1", 1)
    near = options("--log-level=debug", "--extent-root=/c", "--no-demo", "--api=[::1]:2", environ=environ)
    assert (near.log_level, near.extent_roots, near.demo) == ("debug", (Path("/c"),), False)
    assert near.api == Address("::1", 2)


def test_every_option_can_be_given_in_every_place(tmp_path: Path, toml) -> None:
    """One declaration, three names; --config and --check-config have no place in a file."""
    secret = tmp_path / "password"
    secret.write_text("correct horse\n")
    texts = {
        "state-dir": "/s", "portal": "10.0.0.1:99", "api": "[::]:98", "extent-root": "/r",
        "api-password-file": str(secret), "demo": "true", "log-level": "debug", "log-format": "json",
        "pool": f"tank={tmp_path}", "workers": "3", "io-engine": "threads",
        "api-page-size": "0", "memory-limit": "512M",
        "emulated-version": "FreeNAS-11.2-U8", "tls": "auto",
    }  # fmt: skip
    in_file = {declared.name for declared in DECLARED if declared.metadata["in_file"]}
    assert in_file == texts.keys() | {"tls-cert", "tls-key"}
    flags = [f"--{name}" if name == "demo" else f"--{name}={text}" for name, text in texts.items()]
    variables = {f"ISCSI_TARGETD_{name.upper().replace('-', '_')}": text for name, text in texts.items()}
    document = toml("".join(f'{name} = "{text}"\n' for name, text in texts.items()))
    by_line, by_environment = options(*flags), options(environ=variables)
    by_file = options("--config", document)
    assert by_line == by_environment
    assert {f: getattr(by_file, f) for f in Options.__slots__ if f != "config"} == {
        f: getattr(by_line, f) for f in Options.__slots__ if f != "config"
    }


def test_workers_are_one_for_each_processor_but_the_first(toml) -> None:
    processors = len(os.sched_getaffinity(0))
    assert options().workers == options("--workers", "auto").workers == max(processors - 1, 1)
    assert options("--config", toml("workers = 7")).workers == 7
    for text in ("0", "-1", "257", "two", "1.5"):
        with pytest.raises(UsageError, match=r"--workers: .*neither auto nor a number from 1 to 256"):
            options(f"--workers={text}")
    with pytest.raises(UsageError, match="True is not a string"):
        options("--config", toml("workers = true"))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:3260", ("0.0.0.0", 3260)),
        ("192.0.2.1", ("192.0.2.1", 3260)),
        ("[::]:3261", ("::", 3261)),
        ("[2001:db8::1]", ("2001:db8::1", 3260)),
    ],
)
def test_portals_are_addresses_of_either_family(text: str, address: tuple[str, int]) -> None:
    portal = options("--portal", text).portal
    assert portal == address
    assert options("--portal", str(portal)).portal == portal


@pytest.mark.parametrize(
    "text", ["", ":3260", "::1:3260", "1.2.3.4:", "1.2.3.4:0", "1.2.3.4:65536", "[::1", "[::1]x", "[::1]:",
             "host:3260", "1.2.3.4:٣", "1.2.3:1", "1.2.3.4:-1"],
)  # fmt: skip
def test_what_is_no_portal_is_refused(text: str) -> None:
    assert message("--portal", text).startswith("--portal: ")


def test_the_api_may_have_a_name_and_any_free_port() -> None:
    assert options("--api", "localhost:0").api == Address("localhost", 0)


def test_unknown_variables_are_left_alone() -> None:
    """Kubernetes sets these for a service called iscsi-targetd."""
    environ = {"ISCSI_TARGETD_PORT": "tcp://10.0.0.1:3260", "ISCSI_TARGETD_SERVICE_HOST": "10.0.0.1"}
    assert options(environ=environ) == options()


FILES = {
    "portl = '0.0.0.0'": ": portl: there is no such option",
    "state_dir = '/x'": ": state_dir: there is no such option; did you mean state-dir?",
    "portal = 3260": ": portal: 3260 is not a string",
    "demo = 'perhaps'": ": demo: 'perhaps' is neither true nor false",
    "demo = 1": ": demo: 1 is not true or false",
    "extent-root = ['/a', 1]": ": extent-root: 1 is not a list of strings",
    "log-level = 'loud'": ": log-level: 'loud' is not one of debug, info, warning, error",
    "config = '/other'": ": config: belongs on the command line or in ISCSI_TARGETD_CONFIG",
    "portal = ": ": Invalid value (at end of document)",
    "api-password-file = '/nowhere/at/all'": ": api-password-file: cannot read '/nowhere/at/all'",
    "state-dir = ''": ": state-dir: the path is empty",
}


@pytest.mark.parametrize("text", FILES)
def test_a_wrong_file_is_named_with_its_key(toml, text: str) -> None:
    path = toml(text)
    assert message("--config", path).startswith(path + FILES[text])


def test_a_wrong_variable_is_named() -> None:
    environ = {"ISCSI_TARGETD_API": "nowhere:port"}
    assert message(environ=environ).startswith("ISCSI_TARGETD_API: port 'port'")


def test_certificate_and_key_come_together_and_fit(tmp_path: Path) -> None:
    some = tmp_path / "some.pem"
    some.write_text("no certificate\n")
    assert message("--tls-cert", str(some)) == "--tls-cert: needs --tls-key as well"
    environ = {"ISCSI_TARGETD_TLS_KEY": str(some)}
    assert message(environ=environ) == "ISCSI_TARGETD_TLS_KEY: needs --tls-cert as well"
    assert "--tls-cert: cannot use" in message("--tls-cert", str(some), environ=environ)


def test_a_certificate_with_its_key_is_taken(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    _, foreign = make_certificate(tmp_path, "other")
    taken = options("--tls-cert", str(certificate), "--tls-key", str(key))
    assert (taken.tls_cert, taken.tls_key) == (certificate, key)
    assert "cannot use" in message("--tls-cert", str(certificate), "--tls-key", str(foreign))


def test_a_password_file_must_hold_one(tmp_path: Path) -> None:
    """The password is never empty (design.md §2)."""
    empty = tmp_path / "empty"
    empty.write_text("\nsecond line\n")
    assert "holds no password" in message("--api-password-file", str(empty))


WRONG_LINES = {
    (): "say what to do",
    ("dance",): "invalid choice: 'dance'",
    ("serve", "--bogus"): "unrecognized arguments: --bogus",
    ("serve", "--port", "1.2.3.4"): "unrecognized arguments: --port",
    ("serve", "--portal"): "--portal: expected one argument",
    ("serve", "--portal", "1.2.3.4:x"): "--portal: port 'x'",
    ("serve", "--config", "/nowhere/x.toml"): "--config: cannot read '/nowhere/x.toml'",
}


@pytest.mark.parametrize("line", WRONG_LINES, ids=" ".join)
def test_a_wrong_command_line_is_one_line_and_exit_status_2(line: tuple[str, ...]) -> None:
    """design.md §2."""
    result = run(*line)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("iscsi-targetd: ")
    assert WRONG_LINES[line] in result.stderr


def test_check_config_says_what_holds_and_whence(toml) -> None:
    result = run(
        "serve", "--check-config", "--config", toml('portal = "192.0.2.7"'), ISCSI_TARGETD_LOG_FORMAT="json"
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert any(line.startswith("portal = 192.0.2.7:3260  (/") for line in lines)
    assert "log-format = json  (ISCSI_TARGETD_LOG_FORMAT)" in lines
    assert "api = 127.0.0.1:8260  (default)" in lines


def test_check_config_makes_nothing(tmp_path: Path) -> None:
    assert run("serve", "--check-config", "--state-dir", str(tmp_path / "state")).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_version_is_said_without_loading_the_daemon() -> None:
    """--version and usage errors answer at once."""
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("iscsi-targetd ")
    heavy = (
        "import sys\nimport targetd.__main__ as m; m.main(['--version']); m.main(['serve', '--bogus'])\n"
        "heavy = {'aiohttp', 'sqlalchemy', 'pydantic', 'asyncio', 'ssl', 'typer'}\n"
        "sys.exit(bool(heavy & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, check=False, timeout=30).returncode == 0


def test_description_names_every_option_but_itself() -> None:
    lines = describe(parse(["serve"], {}))
    assert [line.split(" = ")[0] for line in lines] == [
        declared.name for declared in DECLARED if declared.field != "check_config"
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [("64M", 64 << 20), ("1073741824", 1 << 30), ("2GiB", 2 << 30), ("3 gb", 3 << 30), ("1t", 1 << 40)],
)
def test_memory_is_told_in_bytes_or_with_a_unit(text: str, size: int) -> None:
    assert options(f"--memory-limit={text}").memory_limit == size


def test_memory_has_a_default_within_bounds() -> None:
    assert 64 << 20 <= options().memory_limit <= 4 << 30


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--memory-limit", "63M"),
        ("--memory-limit", "-1"),
        ("--memory-limit", "1X"),
        ("--memory-limit", "much"),
        ("--api-page-size", "-1"),
        ("--api-page-size", "1_0"),
        ("--api-page-size", "many"),
        ("--emulated-version", "11.2"),
        ("--emulated-version", "FreeNAS-"),
        ("--emulated-version", "FreeNAS-1\n2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(option: str, text: str) -> None:
    with pytest.raises(UsageError, match=option):
        options(f"{option}={text}")
