"""The resources as the admin command has them: each is its declaration, where it is, and what names it.

A field is called by its attribute in the model; a reference drops its ``_id`` (``--target``), since a name
will do where there is one. Everything else about a field comes from ``api.fields``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from api.document import GLOBALS_KIND, KINDS, Kind, field_name
from api.schema import Column
from targetd.ctl.client import Client, CtlError, UsageError

__all__ = ["BY_COLLECTION", "GLOBALS", "RESOURCES", "Resource", "field_name", "option_name"]


def option_name(column: Column) -> str:
    """As on the command line. A secret is read from a file: a command line is for all to see."""
    name = "--" + field_name(column).replace("_", "-")
    return f"{name}-file" if column.secret else name


@dataclass(frozen=True)
class Resource(Kind):
    """One resource of the API."""

    @property
    def path(self) -> str:
        """Below ``/api/v1.0/``."""
        return f"services/iscsi/{self.name}"

    @property
    def outputs(self) -> tuple[Column, ...]:
        """What is shown."""
        return tuple(column for column in self.declaration.columns if not column.write_only)

    @cached_property
    def option_names(self) -> Mapping[str, str]:
        """Wire name → option."""
        return {column.wire: option_name(column) for column in self.declaration.columns}

    @property
    def is_named(self) -> bool:
        """One text names an object."""
        return self.key == ("name",)

    def find(self, client: Client, text: str) -> dict[str, Any]:
        """The object with this id or, where objects have names, this name.

        Raises:
            CtlError: there is none.
        """
        if text.isascii() and text.isdigit():
            found = client.get(f"{self.path}/{text}/")
            if found is None:
                raise CtlError(f"there is no {self.name} with id {text}")
            return dict(found)
        if not self.is_named:
            raise UsageError(f"{text!r} is no id; a {self.name} is chosen by its id")
        wire = self.declaration.by_attribute["name"].wire
        for candidate in client.all(self.path):
            if str(candidate[wire]).lower() == text.lower():
                return candidate
        raise CtlError(f"there is no {self.name} named {text!r}")


GLOBALS = Resource(GLOBALS_KIND.name, GLOBALS_KIND.declaration, GLOBALS_KIND.key)
RESOURCES = tuple(Resource(kind.name, kind.declaration, kind.key) for kind in KINDS)
"""Each after those it refers to."""

BY_COLLECTION = {resource.declaration.collection: resource for resource in RESOURCES}
