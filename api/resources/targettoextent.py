"""``targettoextent``: extents as LUNs of targets (api-semantics §5.7, §6.5)."""

from collections.abc import Mapping
from typing import Any

from api.fields import LUN_MAPPING
from api.resources.collection import CollectionResource
from targetd.config import Configuration, next_lun

__all__ = ["TargetToExtentResource"]


class TargetToExtentResource(CollectionResource):
    """LUNs. A number that is not given is settled at creation and never moves."""

    declaration = LUN_MAPPING
    name = "targettoextent"
    goes_by_cascade = True

    def order(self, record: Any) -> Any:
        return record.target_id, record.lun, record.id

    def create(self, config: Configuration, id: int, values: Mapping[str, Any]) -> Configuration:
        lun = values.get("lun")
        if lun is None:
            lun = next_lun(config, values["target_id"])
        return super().create(config, id, {**values, "lun": lun})

    def update(self, config: Configuration, stored: Any, values: Mapping[str, Any]) -> Configuration:
        if values.get("lun", stored.lun) is None:
            values = {**values, "lun": stored.lun}
        return super().update(config, stored, values)
