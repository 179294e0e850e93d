"""TrueNAS' API as a whole: its table of methods and the two ways to call them."""

from dataclasses import dataclass

from api.auth import Authenticator
from api.keys import KeyRing
from api.v2.datasets import DatasetMethods
from api.v2.iscsi import iscsi_methods
from api.v2.jobs import Jobs
from api.v2.methods import Table
from api.v2.rest import RestResource
from api.v2.rpc import RpcResource
from api.v2.snapshots import SnapshotMethods
from api.v2.system import SystemMethods
from targetd.interface import Datasets, Engine, Storage

__all__ = ["TrueNas", "truenas_resources"]


@dataclass(frozen=True, slots=True)
class TrueNas:
    """What TrueNAS' API needs beside the engine."""

    storage: Storage
    datasets: Datasets
    version: str = ""
    """What ``system.version`` tells, by which clients choose their dialect; empty: the default."""


def truenas_resources(
    engine: Engine, authenticator: Authenticator, keys: KeyRing, truenas: TrueNas, daemon_version: str
) -> tuple[RestResource, RpcResource]:
    """REST v2.0 and JSON-RPC over one table of methods."""
    jobs = Jobs()
    volumes = DatasetMethods(engine, truenas.storage, truenas.datasets)
    system = SystemMethods(
        engine, authenticator, keys, jobs, daemon_version=daemon_version, version=truenas.version
    )
    table = Table(iscsi_methods(engine))
    table.add(volumes.methods())
    table.add(SnapshotMethods(engine, truenas.datasets, jobs).methods())
    table.add(system.methods())
    return RestResource(table, daemon_version), RpcResource(table, jobs)
