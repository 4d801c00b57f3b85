"""Which modules of xattn each file imports, read from the code without importing it."""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "xattn": "xattn",
    "models": "xattn.models",
    "eval": "xattn.eval",
    "app": "xattn.app",
}  # by folder


def module_names() -> dict[str, Path]:
    """Path by full module name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(tree: ast.Module, names: Collection[str]) -> set[str]:
    """The modules of xattn that a file imports: at its top, in functions, and for types alone.

    Raises:
        ValueError: a relative import, or one of a module that is not there.
    """
    found = set()
    for node in ast.walk(tree):
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: import by the full path")
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            wanted = [name if name in names else str(node.module) for name in whole]
        for name in wanted:
            if name.partition(".")[0] == "xattn":
                if name not in names:
                    raise ValueError(f"line {node.lineno}: no module {name}")
                found.add(name)
    return found
