"""Write ``docs/modules.md``: every module with its purpose and its neighbours, read from the code.

python docs/modules.py
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "modules.md"
FOLDERS = {"xattn": "", "kernels": "kernels", "models": "models", "eval": "eval", "app": "app"}
SHOWN = 10  # importers in a cell
BAR = "\\|"  # a bar within a table cell

INTRODUCTION = """# Modules

Every Python file: the first sentence of its docstring, the modules of xattn that it imports, and
those that import it; `a.b` is `xattn.a.b`. [design.md](design.md) says how the parts work together.
Written by `python docs/modules.py`.
"""


def module_names() -> dict[str, Path]:
    """Path by module name, without the leading ``xattn.``."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((*package.split("."), *parts)).strip(".")
            found[name.removesuffix(".__init__").removesuffix("__init__")] = path
    return found


def purpose(tree: ast.Module) -> str:
    """The first sentence of the docstring, on one line."""
    text = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def imports(tree: ast.Module, names: dict[str, Path]) -> set[str]:
    """The modules of xattn that a file imports."""
    found = set()
    for node in ast.walk(tree):
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [n for n in whole if n.removeprefix("xattn.") in names]
            wanted = inside or [node.module or ""]
        for name in wanted:
            if name.startswith("xattn.") and name.removeprefix("xattn.") in names:
                found.add(name.removeprefix("xattn."))
    return found


def listed(modules: set[str], most: int | None = None) -> str:
    """Module names, at most so many of them."""
    names = [f"`{name or 'xattn'}`" for name in sorted(modules)]
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
        folders, key=lambda f: (list(FOLDERS).index(f.relative_to(ROOT).parts[0]), f)
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
