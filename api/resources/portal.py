"""``portal``: groups of addresses that lead to the same targets (api-semantics §5.6)."""

from typing import Any

from api.fields import PORTAL
from api.resources.tagged import TaggedResource
from targetd.config import Configuration

__all__ = ["PortalResource"]


class PortalResource(TaggedResource):
    """Portal groups. Deleting one takes its grants along and closes its listeners."""

    declaration = PORTAL
    name = "portal"

    def show(self, config: Configuration, record: Any) -> dict[str, Any]:
        return self.declaration.render(record, status=self.engine.portal_status(record.id))
