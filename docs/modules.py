"""Write ``docs/modules.md``: every module with its purpose and its neighbours, read from the code.

python docs/modules.py
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "modules.md"
PACKAGES = {
    "xattn": "xattn",
    "kernels": "xattn.kernels",
    "models": "xattn.models",
    "eval": "xattn.eval",
    "app": "xattn.app",
}  # by folder
SHOWN = 10  # importers in a cell
BAR = "\\|"  # a bar within a table cell

INTRODUCTION = """# Modules

Every Python file: the first sentence of its docstring, the modules of xattn that it imports, and
those that import it; `a.b` is `xattn.a.b`. [design.md](design.md) says how the parts work together.
Written by `python docs/modules.py`.
"""


def module_names() -> dict[str, Path]:
    """Path by full module name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def purpose(tree: ast.Module) -> str:
    """The first sentence of the docstring, on one line."""
    text = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


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


def listed(modules: set[str], most: int | None = None) -> str:
    """Module names, at most so many of them."""
    names = [f"`{name.removeprefix('xattn.')}`" for name in sorted(modules)]
    more = f", and {len(names) - most} more" if most and len(names) > most else ""
    return ", ".join(names[:most]) + more


def page() -> str:
    """The whole page."""
    names = module_names()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in names.items()}
    uses = {name: imports(tree, names) - {name} for name, tree in trees.items()}
    used: dict[str, set[str]] = defaultdict(set)
    for name, found in uses.items():
        for other in found:
            used[other].add(name)
    folders: dict[Path, list[str]] = defaultdict(list)
    for name, path in names.items():
        folders[path.parent].append(name)
    lines = [INTRODUCTION]
    for folder in sorted(
        folders, key=lambda f: (list(PACKAGES).index(f.relative_to(ROOT).parts[0]), f)
    ):
        lines.append(f"## `{folder.relative_to(ROOT).as_posix()}/`\n")
        rows = []
        for name in folders[folder]:
            path = names[name]
            if path.name == "__init__.py":
                lines.append(f"{purpose(trees[name])}\n")
                if used[name]:
                    lines.append(
                        f"The package itself is imported by {listed(used[name], SHOWN)}.\n"
                    )
                continue
            cells = f"`{path.name}`", purpose(trees[name]).replace("|", BAR), listed(uses[name])
            rows.append(f"| {' | '.join(cells)} | {listed(used[name], SHOWN)} |")
        if rows:
            lines += [
                "| file | is | imports | imported by |",
                "| :-- | :-- | :-- | :-- |",
                *rows,
                "",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
