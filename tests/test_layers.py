"""Arrows of import point one way: the table below is the picture, and this test keeps it true.

Modules are matched by the longest prefix. ``allowed`` names what of ours a module may import besides
itself and what lies below it; ``TYPE_CHECKING`` imports count too, since a type is knowledge as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "storage", "api", "targetd")

ALLOWED: dict[str, tuple[str, ...]] = {
    # prefix of the importing module → prefixes it may import
    "protocol": ("protocol",),
    "protocol.enums": (),
    "protocol.wire": (),
    "protocol.digest": (),
    "protocol.limits": (),
    "protocol.names": ("protocol.limits",),
    "protocol.serial": (),
    "protocol.bhs": ("protocol.enums", "protocol.wire"),
    "protocol.scsi": ("protocol.scsi", "protocol.enums", "protocol.wire", "storage.base"),
    "storage": ("storage",),
    "storage.base": (),
    "api": (
        "api",
        "targetd.config",
        "targetd.interface",
        "targetd.persistence.interface",
        "targetd.system.pieces",
        "targetd.system.threads",
    ),
    "targetd": ("targetd", "protocol", "storage", "api"),
    "targetd.config": ("targetd.config", "protocol.names"),
    "targetd.interface": ("targetd.config",),
    "targetd.persistence.interface": ("targetd.config",),
    "targetd.persistence.store": (
        "targetd.config",
        "targetd.persistence.interface",
        "targetd.persistence.store",
        "targetd.persistence.migrations",
        "targetd.system.threads",
    ),
    "targetd.persistence.migrations": ("targetd.persistence.migrations",),
    "targetd.engine.runtime": ("targetd", "protocol", "storage"),
    "targetd.net.server": ("targetd", "protocol", "storage"),
}

PRIVATE: dict[str, tuple[str, ...]] = {
    # ours → the only ones that may import it
    "targetd.daemon.main": ("targetd.__main__",),
    "targetd.__main__": (),
}

FOREIGN: dict[str, tuple[str, ...]] = {
    # library → the only ones of ours that may import it
    "asyncio": ("api", "targetd"),
    "socket": ("targetd", "api.server"),
    "select": ("targetd",),
    "time": ("storage", "targetd", "api"),
    "mmap": ("storage.mapping", "storage.mapped_writes", "storage.uring"),
    "aiohttp": ("api", "targetd.daemon.main", "targetd.ctl"),
    "sqlalchemy": ("targetd.persistence.store", "targetd.persistence.migrations"),
    "alembic": ("targetd.persistence.store", "targetd.persistence.migrations"),
    "aiosqlite": ("targetd.persistence.store",),
    "sqlite3": ("targetd.persistence.store",),
    "typer": ("targetd.__main__", "targetd.ctl"),
    "pyroute2": ("targetd",),
    "prometheus_client": ("api.metrics",),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


MODULES = modules()


def below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import; ``from a import b`` gives ``a.b`` where b is a module."""
    names = {name for name, _ in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names else node.module


def rule(module: str) -> tuple[str, ...]:
    return ALLOWED[max((prefix for prefix in ALLOWED if below(module, prefix)), key=len)]


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_a_module_imports_only_what_the_table_allows(module: str, path: Path) -> None:
    """House style, "The layout"."""
    wrong = []
    for imported in imports(path):
        if imported.partition(".")[0] in PACKAGES:
            if below(imported, module) or imported in {module.rpartition(".")[0]}:
                continue
            if not any(below(imported, prefix) for prefix in rule(module)):
                wrong.append(f"{imported} (allowed: {', '.join(rule(module)) or 'nothing of ours'})")
            for private, users in PRIVATE.items():
                if below(imported, private) and module not in users:
                    wrong.append(f"{imported} (only for {', '.join(users) or 'nobody'})")
        for library, users in FOREIGN.items():
            if below(imported, library) and not any(below(module, user) for user in users):
                wrong.append(f"{imported} (only for {', '.join(users)})")
    assert not wrong, f"{path.relative_to(ROOT)} imports " + "; ".join(wrong)


def test_every_rule_in_the_table_names_what_exists_or_its_package_does() -> None:
    """A rule for a package that is gone would be a picture of nothing."""
    assert {prefix.partition(".")[0] for prefix in [*ALLOWED, *PRIVATE]} == set(PACKAGES)
