"""What the methods of ``iscsi.*`` are given, as pydantic models: TrueNAS' names, types and defaults.

A ``…Create`` says which fields must be there; a ``…Update`` changes those named. What TrueNAS has and
we cannot honour is not declared, or has one value only, so that it is refused and never ignored.
"""

from typing import Literal

from pydantic import Field

from api.v2.methods import Model

__all__ = [
    "AuthCreate",
    "AuthUpdate",
    "ExtentCreate",
    "ExtentUpdate",
    "GlobalUpdate",
    "InitiatorUpdate",
    "Listen",
    "PortalCreate",
    "PortalUpdate",
    "TargetCreate",
    "TargetExtentCreate",
    "TargetExtentUpdate",
    "TargetGroupEntry",
    "TargetUpdate",
]


class TargetGroupEntry(Model):
    """One grant of a target."""

    portal: int
    initiator: int | None = None
    authmethod: Literal["NONE", "CHAP", "CHAP_MUTUAL"] = "NONE"
    auth: int | None = None


class TargetUpdate(Model):
    name: str | None = None
    alias: str | None = None
    mode: Literal["ISCSI"] = "ISCSI"
    groups: list[TargetGroupEntry] = Field(default_factory=list)


class TargetCreate(TargetUpdate):
    name: str


class ExtentUpdate(Model):
    name: str | None = None
    type: Literal["DISK", "FILE"] = "DISK"
    disk: str | None = None
    path: str | None = None
    serial: str | None = None
    filesize: int | str = 0
    blocksize: Literal[512, 1024, 2048, 4096] = 512
    pblocksize: bool = False
    avail_threshold: int | None = None
    comment: str = ""
    insecure_tpc: bool = True
    xen: bool = False
    rpm: Literal["UNKNOWN", "SSD", "5400", "7200", "10000", "15000"] = "SSD"
    ro: bool = False
    enabled: Literal[True] = True


class ExtentCreate(ExtentUpdate):
    name: str


class TargetExtentUpdate(Model):
    target: int | None = None
    extent: int | None = None
    lunid: int | None = None


class TargetExtentCreate(TargetExtentUpdate):
    target: int
    extent: int


class Listen(Model):
    ip: str
    port: int | None = None


class PortalUpdate(Model):
    comment: str = ""
    listen: list[Listen] = Field(default_factory=list)


class PortalCreate(PortalUpdate):
    listen: list[Listen]


class InitiatorUpdate(Model):
    initiators: list[str] = Field(default_factory=list)
    auth_network: list[str] = Field(default_factory=list)
    comment: str = ""


class AuthUpdate(Model):
    tag: int | None = None
    user: str | None = None
    secret: str | None = None
    peeruser: str = ""
    peersecret: str = ""
    discovery_auth: Literal["NONE"] = "NONE"


class AuthCreate(AuthUpdate):
    tag: int
    user: str
    secret: str


class GlobalUpdate(Model):
    basename: str | None = None
    isns_servers: list[str] = Field(default_factory=list)
    pool_avail_threshold: int | None = None
    alua: Literal[False] = False
    iser: Literal[False] = False
