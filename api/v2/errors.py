"""What a method may raise, and its form on either wire."""

import errno
from collections.abc import Mapping, Sequence
from typing import Final

__all__ = ["ENOTAUTHENTICATED", "ArgumentsError", "CallError", "errname", "fields_of"]

ENOTAUTHENTICATED: Final = 207
"""TrueNAS' own number: nobody is logged in on this connection."""


def errname(number: int) -> str:
    """``EINVAL`` for 22."""
    return "ENOTAUTHENTICATED" if number == ENOTAUTHENTICATED else errno.errorcode.get(number, "EINVAL")


class CallError(Exception):
    """A method cannot be carried out; nothing has changed.

    Args:
        message: for whoever called; clients match on some of them.
        number: of ``errno``.
    """

    def __init__(self, message: str, number: int = errno.EINVAL) -> None:
        super().__init__(message)
        self.message = message
        self.number = number

    @property
    def reason(self) -> str:
        """As TrueNAS prints it: ``[EINVAL] message``."""
        return f"[{errname(self.number)}] {self.message}"


class ArgumentsError(CallError):
    """Arguments are wrong: (argument.field, message, number of ``errno``) for each."""

    def __init__(self, errors: Sequence[tuple[str, str, int]]) -> None:
        super().__init__("; ".join(f"{field}: {message}" for field, message, _ in errors))
        self.errors = list(errors)

    @property
    def reason(self) -> str:
        return "\n".join(f"[{errname(number)}] {field}: {message}" for field, message, number in self.errors)


def fields_of(argument: str, errors: Mapping[str, Sequence[str]], names: Mapping[str, str]) -> ArgumentsError:
    """Errors of API v1.0, by its wire names, as errors of a method's argument.

    Args:
        names: wire name of v1.0 → field of the argument.
    """
    found: list[tuple[str, str, int]] = []
    for wire, messages in errors.items():
        field = names.get(wire)
        where = f"{argument}.{field}" if field else argument
        found.extend((where, message, errno.EINVAL) for message in messages)
    return ArgumentsError(found)
