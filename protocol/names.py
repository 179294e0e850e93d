"""iSCSI names as text: what may stand in one, and the form in which two are compared.

A name is ``iqn.``, a year and month, and a reversed domain of that time, then whatever its owner wants
behind a colon; or ``eui.`` and 16 hexadecimal digits; or ``naa.`` and 16 or 32 (RFC 7143 §4.2.7.3 to
§4.2.7.5). The characters are those that RFC 3722 leaves: letters, digits, ``-``, ``.`` and ``:`` of ASCII,
and of the rest what its stringprep profile does not prohibit. Two names are the same if they are after its
mapping (case folding, NFKC).

What is given is judged before the mapping as well: a name is to be sent as it is compared, but for upper
case (RFC 7143 §4.2.7.2), and a character that the mapping would make vanish can only confuse whoever reads
the name.
"""

import re
import stringprep
from unicodedata import ucd_3_2_0

from protocol.limits import MAX_NAME

__all__ = ["MAX_NAME", "fold", "normalise"]

_ASCII = re.compile(r"[-A-Za-z0-9.:]*", re.ASCII)
_LABEL = "[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_FORMS = {
    "iqn.": (
        re.compile(rf"[0-9]{{4}}-(?:0[1-9]|1[0-2])\.{_LABEL}(?:\.{_LABEL})*(?::.*)?", re.ASCII | re.DOTALL),
        "a date YYYY-MM, a dot and a reversed domain, then anything after a colon",
    ),
    "eui.": (re.compile("[0-9a-f]{16}", re.ASCII), "16 hexadecimal digits"),
    "naa.": (re.compile("(?:[0-9a-f]{16}){1,2}", re.ASCII), "16 or 32 hexadecimal digits"),
}
"""Type → (what follows it, that in words)."""

_PROHIBITED = (
    stringprep.in_table_c12,
    stringprep.in_table_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)
"""RFC 3722 §5; of ASCII nothing but ``_ASCII`` is left over."""
_FULL_STOP = "\u3002"
"""Prohibited besides (RFC 3722 §5): it looks like the dot between labels."""


def normalise(name: str) -> str:
    """Check a whole iSCSI name (RFC 7143 §4.2.7, RFC 3722) and give the form in which names are compared.

    Raises:
        ValueError: it is none; the text says why, as what is said of the name.
    """
    if len(name.encode(errors="replace")) > MAX_NAME:
        raise ValueError(f"is longer than {MAX_NAME} bytes")
    _refuse_prohibited(name)
    folded = fold(name)
    if not name.isascii():
        _refuse_prohibited(folded)
        if any(map(stringprep.in_table_d1, folded)):
            # RFC 3454 §6: such text would have to begin and end with one of them, and no name does.
            raise ValueError("has characters written from right to left")
    form, words = _FORMS.get(folded[:4], (None, ""))
    if form is None:
        raise ValueError("does not begin with iqn., eui. or naa.")
    if not form.fullmatch(folded[4:]):
        raise ValueError(f"needs behind {folded[:4]} {words}")
    return folded


def fold(name: str) -> str:
    """The form in which names are compared (RFC 3722 §3, §4), of whatever text."""
    if name.isascii():
        return name.lower()
    mapped = "".join(stringprep.map_table_b2(c) for c in name if not stringprep.in_table_b1(c))
    return ucd_3_2_0.normalize("NFKC", mapped)


def _refuse_prohibited(text: str) -> None:
    if _ASCII.fullmatch(text):
        return
    for c in text:
        if c.isascii():
            wrong = not _ASCII.fullmatch(c)
        else:
            wrong = c == _FULL_STOP or any(prohibits(c) for prohibits in _PROHIBITED)
        if wrong:
            raise ValueError(f"has the character {c!a} (U+{ord(c):04X}), which no iSCSI name may have")
