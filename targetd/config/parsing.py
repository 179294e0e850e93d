"""Text forms that clients write: lists, addresses, networks, sizes. Pure functions from text.

Sections are those of the API's semantics (``§5.6`` …), as everywhere in this package.
"""

import ipaddress
import re

__all__ = [
    "BAD_SIZE",
    "DEFAULT_PORT",
    "is_address",
    "is_wildcard",
    "join_location",
    "parse_network",
    "parse_size",
    "read_whole",
    "split_address",
    "split_list",
    "split_location",
]

DEFAULT_PORT = 3260
NOT_A_NUMBER = "Enter a whole number."
BAD_SIZE = "This value can be a size in bytes, or can be postfixed with KB, MB, GB, TB"


_WHOLE = re.compile(r"-?[0-9]{1,24}", re.ASCII)
"""24 digits are more than any field holds."""


def read_whole(text: str) -> int:
    """A whole number as people write one: digits of ASCII, a minus before them, nothing else. ``int`` takes
    more: underscores, blanks, a plus and the digits of every script.

    Raises:
        ValueError: it is none.
    """
    if not _WHOLE.fullmatch(text):
        raise ValueError(NOT_A_NUMBER)
    return int(text)


def split_list(text: str) -> list[str]:
    """The entries of a list as clients write one: separated by blanks, commas or newlines (§5.3)."""
    return text.replace(",", " ").split()


def split_address(text: str, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """``IP:PORT`` → (address in its canonical form, port). Without a port: 3260 (§5.6), or what is given.

    ``[v6]:port`` and ``[v6]`` are clear. A bare v6 address is split at its last colon when what stands
    before it is a whole address too, as FreeNAS wrote them: ``::1:3260`` is port 3260 on ``::1``.

    Raises:
        ValueError: no such form; the text says what is wrong with which part.
    """
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    if bracketed:
        host, port = bracketed[1], bracketed[2]
        if ":" not in host:
            raise ValueError(f"{text}: brackets are for IPv6 addresses.")
    elif text.count(":") > 1:
        host, port = text, None
        head, _, tail = text.rpartition(":")
        if is_address(head) and _WHOLE.fullmatch(tail):
            host, port = head, tail
    else:
        host, colon, tail = text.partition(":")
        port = tail if colon else None
    try:
        address = str(ipaddress.ip_address(host))
    except ValueError:
        raise ValueError(f"{text}: enter a valid IPv4 or IPv6 address, and a port after a colon.") from None
    if port is None:
        return address, default_port
    if not (_WHOLE.fullmatch(port) and 1 <= int(port) <= 65535):
        raise ValueError(f"{text}: the port must be between 1 and 65535.")
    return address, int(port)


_LABEL = r"[A-Za-z0-9](?:[-A-Za-z0-9]{0,61}[A-Za-z0-9])?"
_NAME_AND_PORT = re.compile(rf"((?:{_LABEL}\.)*(?![0-9]+(?::|$)){_LABEL})(?::([0-9]{{1,5}}))?")


def split_location(text: str) -> tuple[str, int]:
    """Where an initiator is to go: as ``split_address``, or a host name (RFC 1123 §2.1) in place of the IP
    address; it is what TargetAddress may say (RFC 7143 §13.8).

    Raises:
        ValueError: no such form; the text says what is wrong with which part.
    """
    if "," in text:
        raise ValueError(f"{text}: leave out the portal group tag; it is added where one belongs.")
    if "%" in text:
        raise ValueError(f"{text}: a zone means nothing to another host.")
    name = _NAME_AND_PORT.fullmatch(text)
    if name is None or is_address(name[1]):
        return split_address(text)
    port = int(name[2] or DEFAULT_PORT)
    if len(name[1]) > 253 or not 1 <= port <= 65535:
        raise ValueError(f"{text}: a host name has at most 253 characters, a port is between 1 and 65535.")
    return name[1].lower(), port


def join_location(host: str, port: int) -> str:
    """The form on the wire: IPv6 addresses in brackets, the port always."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Every address of a family."""
    return host in ("0.0.0.0", "::")


def parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """One mask of an initiator group: ``ALL`` → None, else ``a.b.c.d[/n]``, ``v6[/n]``, ``[v6][/n]`` (§7.4).

    Raises:
        ValueError: none of these.
    """
    if text.upper() == "ALL":
        return None
    try:
        return ipaddress.ip_network(re.sub(r"^\[([^\]]*)\]", r"\1", text), strict=False)
    except ValueError:
        raise ValueError(f"{text} is not a valid IP address or network.") from None


_SIZE = re.compile(r"([0-9]{1,19})\s*(?:([KMGTP])(I?)B?|B)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> tuple[str, int]:
    """A size as clients write it → (normalised text, bytes); units are powers of 1024 (§6.2).

    The unit stays the client's: ``10 mb`` → ``10MB``, ``1 gib`` → ``1GiB``, ``2G`` → ``2G``. Nothing of
    anything is ``0``, which means auto.

    Raises:
        ValueError: no size, or one that no file can have (2⁶³ bytes and more).
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(BAD_SIZE)
    number, prefix, binary = int(match[1]), (match[2] or "").upper(), match[3]
    size = number << (10 * (" KMGTP".index(prefix) if prefix else 0))
    if size >= 2**63:
        raise ValueError(BAD_SIZE)
    if not size:
        return "0", 0
    ending = "B" if text.strip()[-1] in "bB" else ""
    return f"{number}{prefix}{'i' if binary else ''}{ending if prefix else ''}", size


def is_address(text: str) -> bool:
    """Whether this is an IPv4 or IPv6 address without a port."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
