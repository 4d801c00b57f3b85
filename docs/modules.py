"""Write ``docs/modules.md``: every module with its purpose and its neighbours, read from the code.

python docs/modules.py
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "modules.md"
FOLDERS = {"xattn": "", "kernels": "kernels", "models": "models", "eval": "eval", "app": "app"}
SHOWN = 6  # neighbours in a cell

# Packages with one file for each of a kind, which only the package's list of them imports.
KINDS = {
    "attention": "mechanism",
    "heads": "head",
    "explainers": "method",
    "eval.metrics": "metric",
}
LISTS = {"eval.metrics": "eval.metrics.registry"}

INTRODUCTION = """# Modules

Every Python file: the first sentence of its docstring, the modules of xattn that it imports, and
those that import it; `a.b` is `xattn.a.b`. [design.md](design.md) says how the parts work together.
Heads, explainers, mechanisms and metrics that no other file imports are not listed one by one: each
file is named after the one thing in it, and `a.*` stands for them. Written by `python docs/modules.py`.
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
    return text.replace("|", "\\|").replace("``", "`")


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


def cell(modules: set[str]) -> str:
    """Module names for a table cell."""
    shown = sorted(modules)
    more = f", and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(f"`{name}`" for name in shown[:SHOWN]) + more


def page() -> str:
    """The whole page."""
    names = module_names()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in names.items()}
    uses = {name: imports(tree, names) - {name} for name, tree in trees.items()}
    used: dict[str, set[str]] = defaultdict(set)
    for name, found in uses.items():
        for other in found:
            used[other].add(name)
    alone = {
        name
        for name in names
        if (package := name.rpartition(".")[0]) in KINDS
        and used[name] <= {package, LISTS.get(package, package)}
        and name not in LISTS.values()
    }
    for name in names:
        used[name] = {
            f"{n.rpartition('.')[0]}.*" if n in alone else n or "xattn" for n in used[name]
        }
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
                if text := purpose(trees[name]):
                    lines.append(f"{text}\n")
                continue
            if name in alone:
                continue
            rows.append(
                f"| `{path.name}` | {purpose(trees[name])} | {cell(uses[name])} | {cell(used[name])} |"
            )
        kinds = {KINDS[name.rpartition(".")[0]] for name in folders[folder] if name in alone}
        for kind in kinds:
            lines.append(f"A file per {kind}, named after it, and:\n")
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
