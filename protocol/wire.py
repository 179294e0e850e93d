"""Turns a declared layout into a compiled ``Struct``. Knows no PDU.

A header is declared once, as a class whose annotations name the fields in wire order and whose
decorator gives the layout. From that come parse, build, repr and equality; a declaration whose
layout and fields disagree fails at import.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from struct import Struct
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

BHS_LENGTH = 48
"""Bytes in a Basic Header Segment (RFC 7143 §11.2.1)."""

Readable = bytes | bytearray | memoryview
"""What can be parsed from without a copy."""


class Header:
    """One Basic Header Segment: 48 bytes, all integers big-endian."""

    __slots__ = ()

    OPCODE: ClassVar[int]
    LAYOUT: ClassVar[Struct]

    @classmethod
    def parse(cls, buffer: Readable, at: int = 0) -> Self:
        """Read the 48 bytes at ``buffer[at:]``; raises ``struct.error`` when there are fewer."""
        return cls(*cls.LAYOUT.unpack_from(buffer, at))

    def build(self) -> bytes:
        """The 48 bytes; raises ``struct.error`` when a value does not fit its field."""
        names: tuple[str, ...] = self.__slots__
        return self.LAYOUT.pack(*[getattr(self, name) for name in names])

    @property
    def data_segment_length(self) -> int:
        """DataSegmentLength in bytes, without padding (RFC 7143 §11.2.1.6)."""
        lengths: int = self.lengths  # type: ignore[attr-defined]  # every declared header has it
        return lengths & 0xFFFFFF


H = TypeVar("H", bound=Header)


@dataclass_transform(eq_default=True)
def bhs(opcode: int, layout: str) -> Callable[[type[H]], type[H]]:
    """Declare a header: ``layout`` is in ``struct`` notation, one code a field, ``x`` for reserved."""

    def declare(cls: type[H]) -> type[H]:
        made: Any = dataclass(slots=True)(cls)
        compiled = Struct(layout)
        names = [field.name for field in fields(made)]
        values = compiled.unpack(bytes(compiled.size))
        if compiled.size != BHS_LENGTH or len(values) != len(names):
            raise TypeError(
                f"{cls.__name__}: layout gives {compiled.size} bytes, {len(values)} values; fields {names}"
            )
        made.OPCODE = opcode
        made.LAYOUT = compiled
        return made  # type: ignore[no-any-return]  # dataclass(slots=True) makes a new class of the same shape

    return declare
