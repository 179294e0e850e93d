"""``authcredential``: CHAP users; those that share a tag are a group (api-semantics §5.4)."""

import logging
from typing import Any

from api.fields import AUTH_CREDENTIAL
from api.resources.collection import CollectionResource, Draft
from targetd.config import Configuration

__all__ = ["AuthCredentialResource"]

log = logging.getLogger("api")

COMMON_LENGTHS = range(12, 17)
"""What initiators of several makers insist on; RFC 7143 §9.2.1 wants at least 96 random bits."""


class AuthCredentialResource(CollectionResource):
    """Credentials. They are referred to by tag, so deleting one takes nothing along."""

    declaration = AUTH_CREDENTIAL
    name = "authcredential"

    def settle(self, draft: Draft, config: Configuration, stored: Any | None) -> None:
        if draft.creating:
            draft.values.setdefault("tag", 1)
        for attribute in ("secret", "peer_secret"):
            secret = draft.values.get(attribute)
            if secret and len(secret) not in COMMON_LENGTHS:
                log.warning(
                    "the %s of CHAP user %.64r has %d characters; some initiators take only 12 to 16",
                    attribute.replace("_", " "),
                    draft.values.get("user", stored.user if stored else ""),
                    len(secret),
                )
