"""What portal groups and initiator groups share: a number for people (api-semantics §5.3, §5.6, §11).

A POST takes a number that is free, and the lowest free one otherwise: FreeNAS ignored the number in a
POST, so clients that send one which is taken must not fail. Afterwards it stays as it is until a PUT
names another; a taken one is then an error.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from api.resources.collection import CollectionResource
from targetd.config import Configuration, InitiatorGroup, Portal, next_tag, objects

__all__ = ["TaggedResource"]


class TaggedResource(CollectionResource):
    """A collection whose objects carry a ``tag``."""

    def create(self, config: Configuration, id: int, values: Mapping[str, Any]) -> Configuration:
        tag = values.get("tag")
        members = cast(Mapping[int, Portal | InitiatorGroup], objects(config, self.collection))
        if tag is None or any(member.tag == tag for member in members.values()):
            tag = next_tag(config, cast(Literal["portals", "initiator_groups"], self.collection))
        return super().create(config, id, {**values, "tag": tag})

    def update(self, config: Configuration, stored: Any, values: Mapping[str, Any]) -> Configuration:
        if values.get("tag", stored.tag) is None:
            values = {**values, "tag": stored.tag}
        return super().update(config, stored, values)
