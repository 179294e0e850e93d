"""iSCSI names (RFC 7143 §4.2.7, RFC 3722)."""

import pytest

from protocol.names import fold, normalise

IQN = "iqn.2026-11.com.example"


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        (IQN, IQN),
        ("iqn.1991-05.com.microsoft:fake-host", None),
        ("iqn.1993-08.org.debian:01:0123456789ab", None),
        ("IQN.2026-11.COM.Example:Disk", f"{IQN}:disk"),
        (f"{IQN}:\u6d4b\u8bd5", None),  # letters of other scripts are letters
        (f"{IQN}:\uff24isk", f"{IQN}:disk"),  # fullwidth D: NFKC
        (f"{IQN}:Stra\u00dfe", f"{IQN}:strasse"),  # folded
        ("eui.02004567A425678D", "eui.02004567a425678d"),
        ("naa.52004567BA64678D", "naa.52004567ba64678d"),
        ("naa.62004567BA64678D0123456789ABCDEF", "naa.62004567ba64678d0123456789abcdef"),
        (IQN + ":" + "x" * (223 - len(IQN) - 1), None),
    ],
)
def test_a_name_and_the_form_in_which_it_is_compared(name: str, compared: str | None) -> None:
    assert normalise(name) == fold(name) == (compared or name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "does not begin with"),
        ("nonsense", "does not begin with"),
        ("iqn", "does not begin with"),
        ("iqn.", "a date YYYY-MM"),
        ("iqn.foo", "a date YYYY-MM"),
        ("iqn.2026-11", "a date YYYY-MM"),
        ("iqn.2026-11.", "a date YYYY-MM"),
        ("iqn.2026-13.com.example", "a date YYYY-MM"),
        ("iqn.2026-00.com.example", "a date YYYY-MM"),
        ("iqn.26-11.com.example", "a date YYYY-MM"),
        ("iqn.2026-11.com..example", "a date YYYY-MM"),
        ("iqn.2026-11.-com.example", "a date YYYY-MM"),
        ("iqn.\u0662\u0660\u0662\u0666-11.com.example", "right to left|a date"),
        ("eui.", "16 hexadecimal digits"),
        ("eui.0200", "16 hexadecimal digits"),
        ("eui.02004567a425678g", "16 hexadecimal digits"),
        ("eui.02004567a425678d:x", "16 hexadecimal digits"),
        ("naa.xyz", "16 or 32"),
        ("naa.52004567ba64678", "16 or 32"),
        ("naa.52004567ba64678d0", "16 or 32"),
        (f"{IQN}:a b", r"U\+0020"),
        (f"{IQN}:a_b", r"U\+005F"),
        (f"{IQN}:a/b", r"U\+002F"),
        (f"{IQN}:a#b", r"U\+0023"),
        (f"{IQN}:a%sb", r"U\+0025"),
        (f"{IQN}:a*", r"U\+002A"),
        (f"{IQN}:a\n", r"U\+000A"),
        (f"{IQN}:\x7f", r"U\+007F"),
        (f"{IQN}:\u00a0", r"U\+00A0"),  # spaces of C.1.2
        (f"{IQN}:\u2009", r"U\+2009"),
        (f"{IQN}:\u3000", r"U\+3000"),
        (f"{IQN}:\u180e", r"U\+180E"),  # what is not seen
        (f"{IQN}:\u200d", r"U\+200D"),
        (f"{IQN}:\ufeff", r"U\+FEFF"),
        (f"{IQN}:\u0085", r"U\+0085"),
        (f"{IQN}:\u3002", r"U\+3002"),  # a full stop like the one between labels
        (f"{IQN}:\uff0f", r"U\+002F"),  # what the mapping makes a solidus of
        (f"{IQN}:\ue000", r"U\+E000"),  # private use
        (f"{IQN}:\ufffd", r"U\+FFFD"),
        (f"{IQN}:\u2ff0", r"U\+2FF0"),
        (f"{IQN}:\u0341", r"U\+0341"),
        (f"{IQN}:\u202e", r"U\+202E"),
        (f"{IQN}:\U000e0061", r"U\+E0061"),
        (f"{IQN}:\ud800", r"U\+D800"),
        (f"{IQN}:\u05d0", "right to left"),
        (IQN + ":" + "x" * (224 - len(IQN) - 1), "longer than 223 bytes"),
        (IQN + ":" + "\u6d4b" * 70, "longer than 223 bytes"),
    ],
)
def test_what_is_no_name_and_why(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        normalise(name)
