"""``authorizedinitiator``: who may log in, and from where (api-semantics §5.3)."""

from api.fields import INITIATOR_GROUP
from api.resources.tagged import TaggedResource

__all__ = ["AuthorizedInitiatorResource"]


class AuthorizedInitiatorResource(TaggedResource):
    """Initiator groups. Deleting one takes the grants that named it along, which never widens access."""

    declaration = INITIATOR_GROUP
    name = "authorizedinitiator"
