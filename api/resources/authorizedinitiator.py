"""``authorizedinitiator``: who may log in, and from where (api-semantics §5.3)."""

from typing import Any

from api.fields import INITIATOR_GROUP
from api.resources.tagged import TaggedResource
from targetd.config import Configuration, futile_entries

__all__ = ["AuthorizedInitiatorResource"]


class AuthorizedInitiatorResource(TaggedResource):
    """Initiator groups. Deleting one takes the grants that named it along, which never widens access."""

    declaration = INITIATOR_GROUP
    name = "authorizedinitiator"

    def show(self, config: Configuration, record: Any) -> dict[str, Any]:
        return self.declaration.render(record, warning=" ".join(futile_entries(record.initiators)))
