"""``target``: flat as in the specification, with grants behind it (api-semantics §5.5, §5.8).

A target owns a list of grants (``targetgroup``). Portal group, initiator group and authentication of the
flat form are those of the *first* grant: reading shows them, writing creates or changes that grant. A
target without any is what all later clients create; it shows nulls there, and nobody can log in.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from api.fields import TARGET
from api.resources.collection import CollectionResource, Draft
from targetd.config import (
    REQUIRED,
    ConfigError,
    Configuration,
    Target,
    TargetGroup,
    add,
    default_target_serial,
    first_group,
    next_id,
    replace_object,
    target_serial_given,
)

__all__ = ["TargetResource"]

GRANT = frozenset({"portal_id", "initiator_group_id", "auth_method", "auth_group"})
"""Attributes of the grant; all others are the target's."""
DEFAULT_METHOD = "Auto"
"""Of a flat target, as the specification prints it; ``targetgroup`` starts with None."""


class TargetResource(CollectionResource):
    """Targets. Deleting one takes its grants and LUNs along and ends its sessions."""

    declaration = TARGET
    name = "target"
    forcible = True
    also_owns = frozenset({"target_groups"})

    def order(self, record: Any) -> Any:
        return record.name

    def show(self, config: Configuration, record: Any) -> dict[str, Any]:
        group = first_group(config, record.id)
        body: dict[str, Any] = {"id": record.id}
        for column in self.declaration.columns:
            source = group if column.attribute in GRANT else record
            body[column.wire] = None if source is None else getattr(source, column.attribute)
        return body

    def settle(self, draft: Draft, config: Configuration, stored: Any | None) -> None:
        group = first_group(config, stored.id) if stored else None
        for attribute in _lacking(draft.values, group):
            draft.errors.setdefault(self.declaration.by_attribute[attribute].wire, [REQUIRED])
            # another in its place for the trial run that looks for further errors
            draft.values.pop(attribute, None)
            if group is None and config.portals:
                draft.values[attribute] = min(config.portals)

    def create(self, config: Configuration, id: int, values: Mapping[str, Any]) -> Configuration:
        own, grant = _split(values)
        serial = own.pop("serial", "")
        target = super().create(
            config,
            id,
            {
                **own,
                "serial": serial or default_target_serial(id),
                "serial_given": target_serial_given(serial),
            },
        )
        return _with_grant(target, id, None, grant)

    def update(self, config: Configuration, stored: Target, values: Mapping[str, Any]) -> Configuration:
        own, grant = _split(values)
        serial = own.get("serial", stored.serial)
        if not serial:
            own |= {"serial": default_target_serial(stored.id), "serial_given": False}
        elif serial != stored.serial:
            own["serial_given"] = target_serial_given(serial)
        changed = super().update(config, stored, own)
        return _with_grant(changed, stored.id, first_group(config, stored.id), grant)


def _split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {attribute: value for attribute, value in values.items() if attribute not in GRANT}
    return own, {attribute: values[attribute] for attribute in GRANT if attribute in values}


def _lacking(values: Mapping[str, Any], group: TargetGroup | None) -> list[str]:
    """Flat attributes that must be there: a grant has a portal group and a method, and never loses them."""
    if group is None:
        # the method that a grant has anyway asks for none: clients send every documented default
        wanted = any(values.get(name) not in (None, DEFAULT_METHOD) for name in GRANT)
        return ["portal_id"] if wanted and values.get("portal_id") is None else []
    return [name for name in ("portal_id", "auth_method") if values.get(name, group) is None]


def _with_grant(
    config: Configuration, target_id: int, group: TargetGroup | None, grant: Mapping[str, Any]
) -> Configuration:
    lacking = _lacking(grant, group)
    if lacking:  # another request has removed the first grant since this one was read
        raise ConfigError.one("target_groups", lacking[0], REQUIRED)
    if group is not None:
        return replace_object(config, "target_groups", replace(group, **grant))
    if grant.get("portal_id") is None:
        return config
    made = TargetGroup(
        id=next_id(config, "target_groups"),
        target_id=target_id,
        **{**grant, "auth_method": grant.get("auth_method") or DEFAULT_METHOD},
    )
    return add(config, "target_groups", made)
