"""Log lines as text or JSON, with the fields that tell whose they are.

A line about a connection names it (by its number in its process), its initiator and its target; one about a
command its LUN and task tag. ``bind(log, connection=3, …)`` gives a logger that adds them to each line, and
``bind`` again adds more; what knows nothing of this module gives them as ``extra``. What a peer chose (a
name, a key) may hold anything, so control characters are escaped: one record is one line, but for a traceback
in text.

Secrets do not get here. Whoever logs a thing that holds one must leave it out; ``REDACTED`` below is
only the net under the rope.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, TextIO

__all__ = ["FIELDS", "JsonFormatter", "TextFormatter", "bind", "set_up"]

FIELDS = ("connection", "peer", "initiator", "target", "lun", "tag", "worker")
"""Fields of a line, in the order in which text shows them."""

REDACTED = re.compile(
    r"""(?isx)
    ( (?: chap_r | chap_c | (?<![\w-]) [\w-]* (?: secret | password | passwd ) ) ["']? \s*+ [=:] \s*+
      | authorization ["']? \s*+ [=:] \s*+ ["']? (?: basic | bearer | token ) \s++ )
    (?: (["']) (?: \\. | (?!\2) [^\\] )*+ (?: \2 | \\? \Z ) | [^\s,;}\]"']++ )
    """
)
"""``name=value`` and ``name: value`` of what must not be told, as text, JSON or repr; a quoted value that is
not closed goes to the end. It takes linear time, as peers choose what is logged: a name is looked at from its
beginning only, and what is repeated is not given back."""

SUSPECT = ("chap_r", "chap_c", "secret", "passw", "authorization")
"""Each thing that ``REDACTED`` finds holds one of these, in whatever case. To look for them first costs
0.6 µs a line, the expression 65 to 110; a login has a few lines."""

CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}

Logger = logging.Logger | logging.LoggerAdapter[Any]


def redact(text: str) -> str:
    """The text with the values of secrets masked; what was quoted stays so, and JSON stays JSON."""
    if text.isascii():  # beyond ASCII the expression knows more letters for one (ſ for s)
        lowered = text.lower()
        if not any(word in lowered for word in SUSPECT):
            return text
    return REDACTED.sub(lambda found: f"{found[1]}{found[2] or ''}***{found[2] or ''}", text)


def clean(value: object) -> str:
    """The value on one line, without what a terminal would obey."""
    return str(value).translate(CONTROL)


class _Bound(logging.LoggerAdapter[logging.Logger]):
    """Adds its fields to those of the call; ``LoggerAdapter`` of itself would replace them (before 3.13)."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


def bind(logger: Logger, **fields: object) -> logging.LoggerAdapter[logging.Logger]:
    """A logger whose lines carry these fields (of ``FIELDS``), and those of ``logger`` if it has some."""
    unknown = fields.keys() - set(FIELDS)
    if unknown:
        raise TypeError(f"no fields of a log line: {', '.join(sorted(unknown))}")
    if isinstance(logger, logging.LoggerAdapter):
        already: Mapping[str, object] = logger.extra or {}
        return _Bound(logger.logger, {**already, **fields})
    return _Bound(logger, fields)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The fields that the record carries; tags as the hexadecimal that a packet dump shows."""
    found = {name: getattr(record, name) for name in FIELDS if getattr(record, name, None) is not None}
    tag = found.get("tag")
    if isinstance(tag, int):
        found["tag"] = f"{tag:#x}"
    return found


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class TextFormatter(logging.Formatter):
    """``time LEVEL logger: message field=value …``; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = f"{_time(record)} {record.levelname} {record.name}: {clean(record.getMessage())}"
        for name, value in fields_of(record).items():
            text = clean(value)
            line += f" {name}={json.dumps(text) if ' ' in text or not text else text}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            line += "\n" + record.stack_info
        return redact(line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        for name, value in fields_of(record).items():
            entry[name] = value if isinstance(value, int | float) else redact(str(value))
        if (audit := getattr(record, "audit", None)) is not None:
            entry["audit"] = audit
        if record.exc_info:
            entry["exception"] = redact(self.formatException(record.exc_info))
        if record.stack_info:
            entry["stack"] = redact(record.stack_info)
        return json.dumps(entry)


def _name_worker(worker: int, record: logging.LogRecord) -> bool:
    record.worker = worker
    return True


FORMATTERS: dict[str, type[logging.Formatter]] = {"text": TextFormatter, "json": JsonFormatter}


def set_up(
    level: str = "info", style: str = "text", stream: TextIO | None = None, worker: int | None = None
) -> None:
    """Send everything from ``level`` up to ``stream`` (standard error), and nowhere else.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        style: ``text`` or ``json``.
        worker: which of the worker processes this is.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(FORMATTERS[style]())
    if worker is not None:
        handler.addFilter(partial(_name_worker, worker))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for chatty in ("alembic", "aiosqlite", "sqlalchemy", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    # A peer that goes away while a line is written is no reason to print a traceback about logging.
    logging.raiseExceptions = False
