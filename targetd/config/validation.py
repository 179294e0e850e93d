"""What makes a configuration valid: rules within one object, between objects, and ``validate``.

What one field may hold by itself is declared with the field (``fields.py``). Here is what holds between
fields and between objects, each with the text its clients match on (api-semantics §2.1, §4 to §6).

Two kinds of rule: *standing* rules hold for every stored configuration. Rules *of writing* are asked only
of what a change touches, because a later change elsewhere may rightly break them: a credential can be
deleted while a grant still names its tag, and that grant then refuses every login (§6.4).

A change is judged by what it wrote, and what stands beside that is looked up: it costs the same among many.
"""

import ipaddress
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from protocol import names
from targetd.config.editing import Change, diff
from targetd.config.errors import WHOLE, ConfigError, Problem, Where
from targetd.config.fields import INVALID_CHOICE, REQUIRED, check_value, rules, well_typed
from targetd.config.indexes import (
    EXTENTS_BY_NAA,
    REFERENCES,
    REFERRING,
    TARGETS_BY_NAME,
    Index,
    credentials_by_tag,
    full_name,
)
from targetd.config.parsing import parse_size, split_address, split_location
from targetd.config.resources import (
    BLOCK_SIZES,
    GLOBALS,
    SIZED,
    VOLATILE,
    AuthCredential,
    Collection,
    Configuration,
    Extent,
    GlobalConfiguration,
    Portal,
    Resource,
    objects,
)
from targetd.config.serials import MAPPINGS_AT, shared_serials

__all__ = ["MAX_NAME_BYTES", "validate"]

MAX_NAME_BYTES = 223
"""An iSCSI name, in UTF-8 (RFC 7143 §4.2.7)."""
ADDRESS_IN_USE = "This IP and port are already in use."

# -- Within one object ---------------------------------------------------------------------------------

Found: TypeAlias = Iterator[tuple[str, str]]
"""(attribute, message)"""


def _of_globals(g: GlobalConfiguration) -> Found:
    if g.first_burst_length > g.max_burst_length:
        yield (
            "first_burst_length",
            f"This value must not exceed the maximum burst length ({g.max_burst_length}).",
        )
    if g.luc_enabled:
        for attribute in ("luc_ip", "luc_port"):
            if not getattr(g, attribute):
                yield attribute, REQUIRED


def _of_extent(extent: Extent) -> Found:
    if not extent.path.startswith("/"):
        yield "path", "Enter an absolute path."
    elif extent.path.endswith("/"):
        yield "path", "You need to specify a filepath, not a directory."
    elif extent.type in VOLATILE and not extent.path.startswith(f"/{extent.type.lower()}/"):
        yield "path", f"A {extent.type} extent has no path; leave it out."
    if extent.allocate and extent.type != "File":
        yield "allocate", "A device has all its space already."
    try:
        text, size = parse_size(extent.file_size)
    except ValueError as error:
        yield "file_size", str(error)
        return
    if extent.type not in SIZED and size:
        yield "file_size", "The size of a device is its own; use 0."
    elif extent.type in VOLATILE and not size:
        yield "file_size", f"A {extent.type} extent has nothing that could tell its size."
    elif (text, size) != (extent.file_size, extent.size_bytes):
        yield "file_size", f"{extent.file_size} is not the normal form of {extent.size_bytes} bytes."
    elif extent.block_size in BLOCK_SIZES and size % extent.block_size:
        yield "file_size", "File size must be a multiple of block size"


def _of_credential(user: AuthCredential) -> Found:
    if user.peer_user and not user.peer_secret:
        yield "peer_secret", "The peer secret is required if you set a peer user."
    if user.peer_secret and not user.peer_user:
        yield "peer_secret", "The peer user is required if you set a peer secret."
    if user.peer_secret and user.peer_secret == user.secret:
        yield "peer_secret", "The peer secret cannot be the same as user secret."


def _of_portal(portal: Portal) -> Found:
    for text in portal.addresses:
        try:
            split_address(text)
        except ValueError as error:
            yield "addresses", str(error)
    for text in portal.advertised:
        try:
            split_location(text)
        except ValueError as error:
            yield "advertised", str(error)


_WITHIN: Mapping[type, Callable[[Any], Found]] = {
    GlobalConfiguration: _of_globals,
    Extent: _of_extent,
    AuthCredential: _of_credential,
    Portal: _of_portal,
}

_AUTH_REQUIRED = "This field is required if {} is set to CHAP or CHAP Mutual."
_METHOD_NAMES = {
    "discovery_auth_method": "discovery authentication method",
    "luc_auth_method": "the logical unit controller's authentication method",
    "auth_method": "the authentication method",
}


def _method(obj: GlobalConfiguration | Resource, attribute: str) -> str:
    """The authentication that an object asks for; the controller asks for none while it is off (§5.1)."""
    if attribute == "luc_auth_method":
        controller = cast(GlobalConfiguration, obj)
        return (controller.luc_auth_method or "CHAP") if controller.luc_enabled else "None"
    return cast(str, getattr(obj, attribute))


def _well_typed(obj: GlobalConfiguration | Resource) -> bool:
    return all(well_typed(rule, getattr(obj, name)) for name, rule in rules(type(obj)).items())


def _alone(obj: GlobalConfiguration | Resource) -> Found:
    """All that is wrong with the object whatever stands beside it."""
    told = set()
    for attribute, rule in rules(type(obj)).items():
        message = check_value(rule, getattr(obj, attribute))
        if message is not None:
            told.add(attribute)
            yield attribute, message
    if not _well_typed(obj):
        return
    for attribute, rule in rules(type(obj)).items():
        if rule.auth_tag is None or getattr(obj, attribute) is not None:
            continue
        if _method(obj, rule.auth_tag.method).startswith("CHAP"):
            yield attribute, _AUTH_REQUIRED.format(_METHOD_NAMES[rule.auth_tag.method])
    if type(obj) in _WITHIN:
        yield from (wrong for wrong in _WITHIN[type(obj)](obj) if wrong[0] not in told)


# -- Between objects -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Unique:
    """No two objects may stand under the same key of an index."""

    index: Index[Any, Any]
    attribute: str
    message: Callable[[Any], str]


_UNIQUE = (
    _Unique(Index("targets", lambda _, t: t.alias or None), "alias", lambda t: "Target alias already exists"),
    _Unique(Index("extents", lambda _, e: e.name), "name", lambda e: "Extent name must be unique"),
    _Unique(EXTENTS_BY_NAA, "naa", lambda e: "Extent NAA must be unique"),
    _Unique(
        MAPPINGS_AT,
        "lun",
        lambda m: "LUN ID is already being used for this target.",
    ),
    _Unique(
        Index("lun_mappings", lambda _, m: (m.target_id, m.extent_id)),
        "target_id",
        lambda m: "Extent is already in this target.",
    ),
    _Unique(
        Index("target_groups", lambda _, x: (x.target_id, x.portal_id)),
        "portal_id",
        lambda x: f"Portal {x.portal_id} cannot be duplicated on a target",
    ),
    _Unique(Index("portals", lambda _, p: p.tag), "tag", lambda p: "Portal tag is already in use."),
    _Unique(
        Index("initiator_groups", lambda _, i: i.tag),
        "tag",
        lambda i: "Initiator group tag is already in use.",
    ),
)


def _plain_path(path: str) -> str:
    # normpath costs as much as all the rest of the comparison, and nearly every path is plain already
    return posixpath.normpath(path) if "//" in path or "/." in path else path


_EXTENTS_BY_PATH: Index[str, Extent] = Index("extents", lambda _, extent: _plain_path(extent.path))


def _sharing(
    config: Configuration, index: Index[Any, Any], written: Mapping[int, Any] | None
) -> Iterator[list[int]]:
    """Ids of those that share a key, lowest first; only keys of what was written, if that is given."""
    groups = index.of(config)
    keys = groups if written is None else {index.key(config.globals, obj) for obj in written.values()}
    for key in keys:
        ids = [member.id for member in groups.get(key, ())]
        if len(ids) > 1:
            yield ids


def _guilty(ids: Sequence[int], written: Mapping[int, object]) -> Sequence[int]:
    """Of those that clash, the ones to tell: those just written, but for the first if all of them were."""
    told = [id for id in ids if id in written]
    return told[1:] if len(told) == len(ids) else told


def _clashes(config: Configuration, changes: Mapping[Collection, Change]) -> Iterator[Problem]:
    for rule in _UNIQUE:
        collection = rule.index.collection
        if collection not in changes:
            continue
        members, written = objects(config, collection), changes[collection].written
        for ids in _sharing(config, rule.index, written):
            for id in _guilty(ids, written):
                yield Problem(collection, rule.attribute, rule.message(members[id]), id)


def _full_names(
    config: Configuration,
    changes: Mapping[Collection, Change],
    renamed: bool,
    since: Configuration | None,
) -> Iterator[Problem]:
    """Full names are unique and iSCSI names, no longer than one may be (§4).

    A new basename renames targets that nobody wrote; it is then the basename that is wrong.
    """
    if "targets" not in changes and not renamed:
        return
    written = changes["targets"].written if "targets" in changes else {}

    def problem(id: int, message: str) -> Problem:
        return (
            Problem("targets", "name", message, id)
            if id in written
            else Problem(GLOBALS, "basename", message)
        )

    for ids in _sharing(config, TARGETS_BY_NAME, None if renamed else written):
        yield from (problem(id, "Target name already exists") for id in _guilty(ids, written) or ids[1:])
    for id in config.targets if renamed else written:
        target = config.targets[id]
        name = full_name(config.globals, target)
        if check_value(rules(type(target))["name"], target.name) is not None:
            continue  # told already
        if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
            yield problem(id, f"The full name {name} is longer than {MAX_NAME_BYTES} bytes.")
        elif since is not None and not _had_name(since, id, name):
            # A rule of writing: what an older release has stored is served, and may be edited.
            try:
                names.normalise(name)
            except ValueError as error:
                yield problem(id, f"{name} is no iSCSI name: it {error}.")


def _had_name(config: Configuration, id: int, name: str) -> bool:
    return id in config.targets and full_name(config.globals, config.targets[id]) == name


def _shared_paths(config: Configuration, changes: Mapping[Collection, Change]) -> Iterator[Problem]:
    """The same file or device in two extents, unless both only read (§6.1)."""
    if "extents" not in changes:
        return
    extents, written = config.extents, changes["extents"].written
    for ids in _sharing(config, _EXTENTS_BY_PATH, written):
        if all(extents[id].read_only for id in ids):
            continue
        for id in _guilty(ids, written):
            other = next(extents[i] for i in ids if i != id)
            yield Problem("extents", "path", f"This path is already used by extent {other.name}.", id)


def _shared_addresses(config: Configuration, changes: Mapping[Collection, Change]) -> Iterator[Problem]:
    """(IP, port) unique over all portals (§5.6); no wildcard beside others of its family and port (§7.4)."""
    if "portals" not in changes:
        return
    written = changes["portals"].written
    users: dict[tuple[int, int], dict[str, list[int]]] = {}
    for portal in config.portals.values():
        for text in portal.addresses:
            try:
                host, port = split_address(text)
            except ValueError:
                continue
            address = ipaddress.ip_address(host)
            users.setdefault((address.version, port), {}).setdefault(host, []).append(portal.id)
    for (_, port), hosts in users.items():
        for ids in hosts.values():
            if len(ids) > 1:
                for id in _guilty(ids, written):
                    yield Problem("portals", WHOLE, ADDRESS_IN_USE, id)
        wildcard = next((host for host in hosts if host in ("0.0.0.0", "::")), None)
        if wildcard and len(hosts) > 1:
            involved = sorted({id for ids in hosts.values() for id in ids})
            for id in [i for i in involved if i in written][-1:]:
                message = f"{wildcard} port {port} cannot be mixed with other addresses on the same port."
                yield Problem("portals", "addresses", message, id)


def _redirected_again(config: Configuration, changes: Mapping[Collection, Change]) -> Iterator[Problem]:
    """A login is sent on once: not to a portal that sends it on in turn, and perhaps back to the first."""
    if "portals" not in changes:
        return
    redirecting = [portal for portal in config.portals.values() if portal.redirect]
    there = {split_address(text): portal for portal in redirecting for text in portal.addresses}
    for portal in redirecting:
        other = there.get(split_location(portal.redirect), portal)
        if other is not portal:
            for id in [id for id in (portal.id, other.id) if id in changes["portals"].written][:1]:
                message = f"Portal {other.id}, where portal {portal.id} sends logins, sends them on too."
                yield Problem("portals", "redirect", message, id)


def _dangling(config: Configuration, changes: Mapping[Collection, Change]) -> Iterator[Problem]:
    for collection, attribute, target in REFERENCES:
        there = objects(config, target)
        members = dict(changes[collection].written) if collection in changes else {}
        if target in changes and changes[target].removed:
            naming = REFERRING[collection, attribute].of(config)
            members |= {obj.id: obj for id in changes[target].removed for obj in naming.get(id, ())}
        for id, member in members.items():
            value = getattr(member, attribute)
            if value is not None and value not in there:
                yield Problem(collection, attribute, INVALID_CHOICE.format(value), id)


def _tags_as_written(
    config: Configuration, where: Where, obj: Any, was: Any, id: int | None
) -> Iterator[Problem]:
    """A rule of writing: the tag must exist, and hold users that can prove what the method asks (§5.8)."""
    for attribute, rule in rules(type(obj)).items():
        if rule.auth_tag is None:
            continue
        tag, method = getattr(obj, attribute), _method(obj, rule.auth_tag.method)
        if tag is None or check_value(rule, tag) is not None:
            continue
        if was and (getattr(was, attribute), _method(was, rule.auth_tag.method)) == (tag, method):
            continue
        users = credentials_by_tag(config).get(tag)
        if not users:
            yield Problem(where, attribute, INVALID_CHOICE.format(tag), id)
        elif method == "CHAP Mutual" and not all(user.peer_user for user in users):
            message = f"CHAP Mutual needs a peer user and a peer secret for every user of group {tag}."
            yield Problem(where, attribute, message, id)


def validate(config: Configuration, since: Configuration | None = None) -> None:
    """Find everything wrong with a configuration.

    Args:
        config: to be judged.
        since: a valid configuration that this one was made from. Then only what changed is looked at, and
            the rules of writing are asked of it. Without it, the standing rules are asked of everything.

    Raises:
        ConfigError: with every problem found. Of objects that clash, those just written are named.
    """
    changes = diff(since or Configuration(), config)
    written: list[tuple[Where, int | None, GlobalConfiguration | Resource, Any]] = []
    if since is None or since.globals != config.globals:
        written.append((GLOBALS, None, config.globals, since and since.globals))
    for collection, change in changes.items():
        before: Mapping[int, Resource] = {} if since is None else objects(since, collection)
        written.extend((collection, id, obj, before.get(id)) for id, obj in change.written.items())

    problems = [
        Problem(where, attribute, message, id)
        for where, id, obj, _ in written
        for attribute, message in _alone(obj)
    ]
    # what stands beside what is asked only where everything is at least of the type that it should be
    if all(_well_typed(obj) for _, _, obj, _ in written):
        renamed = since is None or since.globals.basename != config.globals.basename
        problems.extend(_full_names(config, changes, renamed, since))
        problems.extend(_clashes(config, changes))
        problems.extend(_shared_paths(config, changes))
        problems.extend(_shared_addresses(config, changes))
        problems.extend(_dangling(config, changes))
        if since is not None:
            problems.extend(shared_serials(config, changes, since))
            for where, id, obj, was in written:
                problems.extend(_tags_as_written(config, where, obj, was, id))
    if not problems:  # of addresses that can be read
        problems.extend(_redirected_again(config, changes))
    if problems:
        raise ConfigError(problems)
