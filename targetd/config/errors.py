"""What is wrong with a configuration, by object and attribute; the names are the model's."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from targetd.config.resources import Collection

__all__ = ["WHOLE", "ConfigError", "Problem"]

Where = Collection | Literal["globals"]

WHOLE = ""
"""Stands where an attribute's name stands when the message is about the object as a whole."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one object."""

    collection: Where
    attribute: str
    """Of the model, or ``WHOLE``."""
    message: str
    id: int | None = None
    """Of the object; None for the globals, and where there is no object yet."""


class ConfigError(ValueError):
    """A configuration that cannot be: everything wrong with it, by object and attribute."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__(
            "; ".join(
                f"{p.collection}{'' if p.id is None else f' {p.id}'}"
                f"{f'.{p.attribute}' if p.attribute else ''}: {p.message}"
                for p in self.problems
            )
        )

    @classmethod
    def one(cls, collection: Where, attribute: str, message: str, id: int | None = None) -> "ConfigError":
        """Only this."""
        return cls((Problem(collection, attribute, message, id),))

    def fields(self, collection: Where) -> dict[str, list[str]]:
        """Attribute (or ``WHOLE``) → messages, for the objects of one collection."""
        found: dict[str, list[str]] = {}
        for problem in self.problems:
            if problem.collection == collection:
                found.setdefault(problem.attribute, []).append(problem.message)
        return found
