"""Log lines: fields, one line a record, and no secrets."""

import io
import json
import logging
import sys

import pytest

from targetd.system.logs import JsonFormatter, TextFormatter, bind, redact, set_up


@pytest.fixture
def logger() -> logging.Logger:
    """A logger of its own, so that pytest's handlers stay."""
    return logging.Logger("iscsi.test", logging.DEBUG)


def lines(logger: logging.Logger, formatter: logging.Formatter) -> io.StringIO:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    return stream


def test_a_line_names_connection_initiator_and_tag(logger: logging.Logger) -> None:
    text, structured = lines(logger, TextFormatter()), lines(logger, JsonFormatter())
    connection = bind(bind(logger, connection=3), initiator="iqn.2016-04.com.example:a b")
    connection.warning("%d bytes too many", 5, extra={"tag": 0x10, "lun": 0})
    assert text.getvalue().endswith(
        'WARNING iscsi.test: 5 bytes too many connection=3 initiator="iqn.2016-04.com.example:a b" '
        "lun=0 tag=0x10\n"
    )
    entry = json.loads(structured.getvalue())
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "warning",
        "logger": "iscsi.test",
        "message": "5 bytes too many",
        "connection": 3,
        "initiator": "iqn.2016-04.com.example:a b",
        "lun": 0,
        "tag": "0x10",
    }


def test_a_field_that_no_line_has_is_a_mistake(logger: logging.Logger) -> None:
    with pytest.raises(TypeError):
        bind(logger, conection=1)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_what_a_peer_chose_cannot_begin_a_line_of_its_own(
    logger: logging.Logger, formatter: logging.Formatter
) -> None:
    stream = lines(logger, formatter)
    bind(logger, initiator="iqn\n2026 forged").info("name is %s", "\x1b[2Jx\r\ny\x9b\u2028z")
    assert stream.getvalue().count("\n") == 1
    assert not any(character in stream.getvalue() for character in "\x1b\r\x9b\u2028")


@pytest.mark.parametrize(
    "text",
    [
        "CHAP_R=0xS3CRET", "iscsi_target_auth_secret: 'S3CRET'", '{"iscsi_target_auth_peersecret": "S3CRET"}',
        "Authorization: Basic S3CRET==", "password=S3CRET", "{'Authorization': 'Basic S3CRET'}",
        "AuthCredential(user='u', secret='S3CRET with blanks')", "x-PassWd: S3CRET", "Chap_C = S3CRET",
        "ſecret=S3CRET",
    ],
)  # fmt: skip
@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_secrets_that_slip_in_are_masked(
    logger: logging.Logger, formatter: logging.Formatter, text: str
) -> None:
    """design.md §6: never in logs."""
    stream = lines(logger, formatter)
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("got %s", text)
    assert "S3CRET" not in stream.getvalue()
    assert "***" in stream.getvalue()


def test_masked_json_is_json_still(logger: logging.Logger) -> None:
    """Records of the audit are."""
    stream = lines(logger, TextFormatter())
    logger.info("%s", json.dumps({"password": 'S3C"RET', "secret": "***", "user": "u"}))
    text = stream.getvalue()
    assert json.loads(text[text.index("{") :]) == {"password": "***", "secret": "***", "user": "u"}


def test_ordinary_words_stay(logger: logging.Logger) -> None:
    stream = lines(logger, TextFormatter())
    logger.info("the secret of user u is 6 characters long; authorization refused: no such user")
    assert "***" not in stream.getvalue()


def test_set_up_replaces_what_was_there() -> None:
    root = logging.getLogger()
    before, level, raising = list(root.handlers), root.level, logging.raiseExceptions
    stream = io.StringIO()
    try:
        set_up("warning", "json", stream)
        set_up("warning", "json", stream)
        logging.getLogger("a").warning("once")
        logging.getLogger("a").info("never")
        assert json.loads(stream.getvalue())["message"] == "once"
        set_up()
        assert root.handlers[0].stream is sys.stderr  # type: ignore[attr-defined]
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
        logging.raiseExceptions = raising
        logging.captureWarnings(False)


@pytest.mark.parametrize(
    "message",
    [
        "a" * 1_000_000 + "-passw",
        "x-secret-" * 100_000,
        "secret" + " " * 1_000_000,
        'secret="' * 100_000 + "x",
    ],
)
def test_a_line_that_a_peer_made_long_is_searched_for_secrets_in_linear_time(
    logger: logging.Logger, message: str
) -> None:
    """In more than linear time this would not end."""
    stream = lines(logger, JsonFormatter())
    logger.info("%s", message)
    assert json.loads(stream.getvalue())["message"][:6] == message[:6]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ('peer_secret="abc', 'peer_secret="***"'),
        ("my-old-Password: 'a\\'b", "my-old-Password: '***'"),
        ('secret="a\nb" next', 'secret="***" next'),
        ("user-secret = hush, and more", "user-secret = ***, and more"),
    ],
)
def test_a_secret_is_masked_also_where_its_quote_does_not_end(message: str, shown: str) -> None:
    assert redact(message) == shown
