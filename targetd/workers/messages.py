"""What the front and its workers say to each other, and its form on the socket.

A message is one of the classes below, pickled: both ends are the same program of the same user, started by
each other. Yet one of them faces the network, so only what is listed in ``_PLAIN`` can come out of a message:
plain data without behaviour.
"""

import io
import pickle
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

from protocol.scsi import registrations
from storage.identity import Medium, Part
from targetd import interface
from targetd.config import (
    Collection,
    Configuration,
    GlobalConfiguration,
    Problem,
    Resource,
    objects,
    resources,
)
from targetd.engine.media import Found

__all__ = [
    "Adopt",
    "Answer",
    "Ask",
    "ConnectionClosed",
    "Decide",
    "Delta",
    "EventRaised",
    "LoggedIn",
    "Persist",
    "Persisted",
    "Prepared",
    "Start",
    "decode",
    "encode",
]


@dataclass(frozen=True, slots=True)
class Delta:
    """What becomes of one worker's share of the configuration."""

    globals: GlobalConfiguration
    service_enabled: bool
    written: dict[Collection, dict[int, Resource]]
    removed: dict[Collection, tuple[int, ...]]

    def applied_to(self, config: Configuration) -> Configuration:
        """The share as it is then."""
        changed = {}
        for collection in {*self.written, *self.removed}:
            members = {**objects(config, collection), **self.written.get(collection, {})}
            for id in self.removed.get(collection, ()):
                del members[id]
            changed[collection] = members
        return replace(
            config,
            globals=self.globals,
            service_enabled=self.service_enabled,
            **changed,  # type: ignore[arg-type]  # the collections are fields of these very names
        )


# -- from the front ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The first message: what a worker is. Paths as text."""

    index: int
    """From 1 up, in logs and metrics."""
    workers: int
    extent_roots: tuple[str, ...]
    pools: dict[str, str]
    own_files: tuple[str, ...]
    """What no extent may have: the state directory, then files; empty: nothing is told."""
    log_level: str
    log_format: str
    io_engine: str
    data_memory: int
    """Bytes, of this process."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Do something, or say something; one ``Answer`` follows."""

    number: int
    what: str
    """Of ``worker.SERVICES``."""
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Decide:
    """What becomes of the change that was prepared."""

    commit: bool


@dataclass(frozen=True, slots=True)
class Adopt:
    """A connection, whose descriptor comes along. Its login is read again from its beginning."""

    number: int
    """Of the connection, and of the session that it may begin."""
    portal_id: int
    peer: str
    local: str
    since: float
    """When it was accepted, on the monotonic clock of the host."""
    received: bytes = field(repr=False)
    """All that has come so far."""
    answered: int
    """Bytes that the front has said to that already, and which must not be said again."""


@dataclass(frozen=True, slots=True)
class Persisted:
    """``Persist`` was done, or why not."""

    number: int
    error: str = ""


# -- from a worker ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """To an ``Ask``."""

    number: int
    value: Any = None
    problems: tuple[Problem, ...] = ()
    """What a ``ConfigError`` said."""
    failure: str = ""
    """Anything else that went wrong: the name of the error; the worker has logged the rest."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The change under way can be put in force: ``Decide`` is awaited."""


@dataclass(frozen=True, slots=True)
class Persist:
    """What a logical unit wants to have kept, durably; ``Persisted`` is awaited."""

    number: int
    key: str
    value: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A connection that was handed over is no longer at login."""

    number: int


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """It is closed."""

    number: int


@dataclass(frozen=True, slots=True)
class EventRaised:
    """Something for the event stream."""

    event: interface.Event


# -- on the socket ----------------------------------------------------------------------------------

_PLAIN = {
    (cls.__module__, cls.__qualname__)
    for module in (interface, resources)
    for cls in vars(module).values()
    if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == module.__name__
} | {
    (cls.__module__, cls.__qualname__)
    for cls in (
        *(
            Adopt,
            Answer,
            Ask,
            Decide,
            Delta,
            ConnectionClosed,
            EventRaised,
            Persist,
            Persisted,
            LoggedIn,
            Prepared,
            Start,
        ),
        *(Problem, registrations.State, registrations.Type, Found, Medium, Part),
    )
}
"""(module, name) of every class that can be in a message."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a message")


def encode(message: object) -> bytes:
    """The message as bytes."""
    return pickle.dumps(message, protocol=5)


def decode(data: bytes | bytearray | memoryview) -> object:
    """The message of these bytes.

    Raises:
        pickle.UnpicklingError: there is something else in it than plain data.
    """
    return _Reader(io.BytesIO(data)).load()
