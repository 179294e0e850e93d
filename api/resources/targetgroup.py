"""``targetgroup``: grants (api-semantics §5.8)."""

from api.fields import TARGET_GROUP
from api.resources.collection import CollectionResource

__all__ = ["TargetGroupResource"]


class TargetGroupResource(CollectionResource):
    """Grants. The oldest of a target is the one that the flat fields of ``target`` show and change."""

    declaration = TARGET_GROUP
    name = "targetgroup"
    goes_by_cascade = True
