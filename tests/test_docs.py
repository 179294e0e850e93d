"""Documents name files, classes and functions that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("docs/architecture.md", "CONTRIBUTING.md")
_NAMED = re.compile(
    r"`((?:api|bench|docs|packaging|protocol|scripts|storage|targetd|tests)/[\w/.-]*)(?:: ([\w.]+))?`"
)


def named(document: str) -> list[tuple[str, str]]:
    """(path, class or function) of everything that a document names."""
    return _NAMED.findall((ROOT / document).read_text(encoding="utf-8"))


def defined(path: Path) -> set[str]:
    """Names of a module's classes and functions, methods as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
            found |= {
                f"{node.name}.{inner.name}"
                for inner in getattr(node, "body", ())
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_is_there(document: str) -> None:
    found = named(document)
    assert found, "the document names nothing"
    missing = [path for path, _ in found if not (ROOT / path).exists()]
    missing += [f"{path}: {name}" for path, name in found if name and name not in defined(ROOT / path)]
    assert missing == []
