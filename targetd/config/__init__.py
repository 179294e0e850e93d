"""The configuration as immutable data, and what makes one valid. Does no I/O.

Every resource of the API is one frozen dataclass here; a ``Configuration`` is all of them at one
moment. A change makes a new ``Configuration`` from the old (``add``, ``replace_object``, ``remove``);
nothing is ever edited in place, so the engine and the API may hold on to what they have been given.

``id`` is the database identity: positive, never reused. ``tag`` is the group number that people see;
other objects refer to a credential group by tag and to everything else by id.

    forms.py      text that clients write: addresses, networks, sizes
    fields.py     how a field is declared, and the declaration as data
    members.py    collections that know what they were made from
    resources.py  the resources, the Configuration
    lookups.py    who has this name, what names that id
    initiators.py who an entry of an initiator group is about
    errors.py     ConfigError: everything wrong, by object and attribute
    edits.py      new configurations from old, identifiers, differences
    serials.py    what units show in VPD page 80h
    checks.py     validate

Import from here; the modules within are nobody else's business.
"""

from targetd.config.editing import (
    Change,
    Changes,
    add,
    default_target_serial,
    diff,
    extent_serial_given,
    fresh,
    make_extent_serial,
    make_naa,
    next_id,
    next_lun,
    next_tag,
    normalise,
    remove,
    replace_object,
    target_serial_given,
)
from targetd.config.errors import WHOLE, ConfigError, Problem
from targetd.config.fields import (
    INVALID_CHOICE,
    NOT_A_NUMBER,
    REQUIRED,
    AuthTag,
    FieldRule,
    OneOf,
    Range,
    Reference,
    Text,
    check_value,
    rules,
)
from targetd.config.indexes import (
    TARGETS_BY_NAME,
    credentials_by_tag,
    extents_by_naa,
    first_group,
    full_name,
    groups_by_portal,
    groups_by_target,
    mappings_by_extent,
    mappings_by_target,
    target_named,
)
from targetd.config.initiators import EVERYBODY, entries_about, futile_entries, matching_entry
from targetd.config.parsing import (
    is_wildcard,
    join_location,
    parse_network,
    parse_size,
    read_whole,
    split_address,
    split_list,
    split_location,
)
from targetd.config.resources import (
    BLOCK_SIZES,
    COLLECTIONS,
    DIGESTS,
    GLOBALS,
    MAX_LENGTH,
    MAX_LUN,
    MAX_TAG,
    RPMS,
    SIZED,
    VOLATILE,
    AuthChoice,
    AuthCredential,
    ChapAlgorithm,
    Collection,
    Configuration,
    Extent,
    ExtentType,
    GlobalConfiguration,
    InitiatorGroup,
    LunMapping,
    Portal,
    Resource,
    Target,
    TargetGroup,
    objects,
)
from targetd.config.serials import unit_serial
from targetd.config.validation import MAX_NAME_BYTES, validate

__all__ = [
    "BLOCK_SIZES",
    "COLLECTIONS",
    "DIGESTS",
    "EVERYBODY",
    "GLOBALS",
    "INVALID_CHOICE",
    "MAX_LENGTH",
    "MAX_LUN",
    "MAX_NAME_BYTES",
    "MAX_TAG",
    "NOT_A_NUMBER",
    "REQUIRED",
    "RPMS",
    "SIZED",
    "TARGETS_BY_NAME",
    "VOLATILE",
    "WHOLE",
    "AuthChoice",
    "AuthCredential",
    "AuthTag",
    "Change",
    "Changes",
    "ChapAlgorithm",
    "Collection",
    "ConfigError",
    "Configuration",
    "Extent",
    "ExtentType",
    "FieldRule",
    "GlobalConfiguration",
    "InitiatorGroup",
    "LunMapping",
    "OneOf",
    "Portal",
    "Problem",
    "Range",
    "Reference",
    "Resource",
    "Target",
    "TargetGroup",
    "Text",
    "add",
    "check_value",
    "credentials_by_tag",
    "default_target_serial",
    "diff",
    "entries_about",
    "extent_serial_given",
    "extents_by_naa",
    "first_group",
    "fresh",
    "full_name",
    "futile_entries",
    "groups_by_portal",
    "groups_by_target",
    "is_wildcard",
    "join_location",
    "make_extent_serial",
    "make_naa",
    "mappings_by_extent",
    "mappings_by_target",
    "matching_entry",
    "next_id",
    "next_lun",
    "next_tag",
    "normalise",
    "objects",
    "parse_network",
    "parse_size",
    "read_whole",
    "remove",
    "replace_object",
    "rules",
    "split_address",
    "split_list",
    "split_location",
    "target_named",
    "target_serial_given",
    "unit_serial",
    "validate",
]
