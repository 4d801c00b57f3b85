"""How the code is laid out: imports, lengths of files and functions, entries of folders."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

from module_imports import imports, module_names

ROOT = Path(__file__).resolve().parents[1]
# Parts, each with the parts it may import from.
LAYERS = {
    "xattn.kernels": set(),
    "xattn": {"xattn.kernels"},
    "xattn.models": {"xattn.kernels", "xattn"},
    "xattn.eval": {"xattn.kernels", "xattn"},
    "xattn.app": {"xattn.kernels", "xattn", "xattn.models", "xattn.eval"},
    "xattn.cli": {"xattn.kernels", "xattn", "xattn.models", "xattn.eval", "xattn.app"},
    "xattn.eval.studies": {"xattn.kernels", "xattn", "xattn.models", "xattn.eval", "xattn.cli"},
}
# Imports that reach upwards, each for a reason.
UPWARD = {
    ("xattn", "xattn.eval"): "evaluate is a public name of the package",
    ("xattn", "xattn.app.serving.session"): "and so is open_viewer",
    ("xattn.__main__", "xattn.cli"): "python -m xattn is the command line",
    ("xattn.app.models", "xattn.cli.model"): "the viewer takes the options of xattn explain",
    ("xattn.app.models", "xattn.cli.detections"): "and those of its --detector",
    ("xattn.app.jobs.child", "xattn.cli"): "a job's process runs a command line",
}
LONGEST_FUNCTION, LONGEST_KERNEL, LONGEST_FILE, MOST_ENTRIES = 80, 100, 800, 20


MODULES = module_names()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
IMPORTS = {name: imports(tree, MODULES) - {name} for name, tree in TREES.items()}


def layer(name: str) -> str:
    return max((part for part in LAYERS if f"{name}.".startswith(f"{part}.")), key=len)


def test_imports_run_downwards_only():
    upward = {
        (name, found)
        for name, all_of in IMPORTS.items()
        for found in all_of
        if layer(found) != layer(name) and layer(found) not in LAYERS[layer(name)]
    }
    assert upward == set(UPWARD)


def folder(name: str) -> str:
    """The room of the house that a module lies in: a folder of xattn, xattn.eval, the viewer or its pages."""
    parts = name.split(".")
    depth = 4 if parts[1:3] == ["app", "pages"] else 3 if parts[1:2] in (["eval"], ["app"]) else 2
    return ".".join(parts[:depth])


def test_folders_import_each_other_in_one_direction():
    arrows = {
        (folder(name), folder(found))
        for name, all_of in IMPORTS.items()
        for found in all_of
        if folder(name) != folder(found) and (name, found) not in UPWARD
    }
    graph: dict[str, set[str]] = {}
    for a, b in arrows:
        if "xattn" not in (a, b):  # the names that xattn itself exports are lazy
            graph.setdefault(a, set()).add(b)
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is a circle


def test_nothing_inside_imports_the_public_facade():
    for name, all_of in IMPORTS.items():
        assert "xattn" not in all_of, f"{name} imports from xattn itself; name the module"


def test_there_is_no_import_cycle():
    """Late imports count, and those for types alone; the names that xattn itself exports are lazy."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for found in sorted(IMPORTS[name]):
                visit(found, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_a_folder_holds_at_most_twenty_entries():
    """But for folders of one file a mechanism or study, and the viewer's parts in JavaScript."""
    folders = {path.parent for path in MODULES.values()}
    folders -= {
        ROOT / name for name in ("xattn/attention/mechanisms", "eval/studies", "app/components")
    }
    ignored = {"__pycache__", "__init__.py", "py.typed"}
    entries = {folder: {p.name for p in folder.iterdir()} - ignored for folder in folders}
    assert not {str(k): sorted(v) for k, v in entries.items() if len(v) > MOST_ENTRIES}


def example_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of the docstring's example, which nobody has to follow."""
    _, header, example = (ast.get_docstring(node) or "").partition("\nExample:\n")
    return len(example.splitlines()) + 2 if header else 0


def test_files_and_functions_have_a_readable_length():
    too_long = []
    for name, path in MODULES.items():
        lines = len(path.read_text().splitlines())
        if lines > LONGEST_FILE:
            too_long.append(f"{name}: {lines} lines")
        for node in ast.walk(TREES[name]):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            decorators = [ast.unparse(d) for d in node.decorator_list]
            kernel = any(d.startswith(("triton.jit", "triton.autotune")) for d in decorators)
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None
            lines = node.end_lineno - first + 1 - example_lines(node)
            if lines > (LONGEST_KERNEL if kernel else LONGEST_FUNCTION):
                too_long.append(f"{name}.{node.name}: {lines} lines")
    assert not too_long, too_long


def test_no_private_name_is_imported_from_another_module():
    private = [
        f"{name}:{node.lineno}: {alias.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xattn")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not private, private
