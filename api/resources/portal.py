"""``portal``: groups of addresses that lead to the same targets (api-semantics §5.6)."""

from api.fields import PORTAL
from api.resources.tagged import TaggedResource

__all__ = ["PortalResource"]


class PortalResource(TaggedResource):
    """Portal groups. Deleting one takes its grants along and closes its listeners."""

    declaration = PORTAL
    name = "portal"
