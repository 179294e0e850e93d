"""The list of initiator names of a group: which entry is about whom, and which about nobody (§7.4)."""

from collections.abc import Iterator

from protocol import names
from targetd.config.parsing import split_list

__all__ = ["EVERYBODY", "entries_about", "futile_entries", "matching_entry"]

EVERYBODY = "all"
"""The entry that is about every initiator, as it is compared."""


def entries_about(initiators: str) -> Iterator[tuple[str, bool]]:
    """(name as it is compared, or ``EVERYBODY``; whether it is let in) of every entry, in their order. The
    first that is about an initiator decides."""
    for entry in split_list(initiators):
        yield _about(entry), not entry.startswith("!")


def matching_entry(initiators: str, initiator_name: str) -> str | None:
    """The first entry that is about this initiator; one that begins with ``!`` denies it."""
    wanted = (EVERYBODY, names.fold(initiator_name))
    return next((entry for entry in split_list(initiators) if _about(entry) in wanted), None)


def futile_entries(initiators: str) -> list[str]:
    """What is to be said of entries that can never match anybody, one sentence each."""
    found = []
    seen: dict[str, str] = {}
    for entry in split_list(initiators):
        about = _about(entry)
        if EVERYBODY in seen or about in seen:
            earlier = seen.get(EVERYBODY) or seen[about]
            found.append(f"{entry} is never asked: {earlier} before it is about the same.")
        elif about != EVERYBODY:
            try:
                names.normalise(about)
            except ValueError as error:
                found.append(f"{entry} can match no initiator: the name {error}.")
        seen.setdefault(about, entry)
    return found


def _about(entry: str) -> str:
    return names.fold(entry.removeprefix("!"))
