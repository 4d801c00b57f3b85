"""Mutation testing: a seeded sample of small faults in the code, and whether a test notices each.

    make mutants                                              # COUNT, SEED, WORKERS and PARTS
    .venv/bin/python tests/mutants.py --only 3fa9c1b2d4       # one fault again

A fault (mutant) is one changed expression or removed statement in a function of :data:`PARTS`; defaults,
decorators, annotations and error messages stay. The tests are collected once. For a mutant a fork of that
process gives the function the code with the fault and runs tests until one fails: first those named after
its module, class or function, then those of files that import or name it, then the others of the part, for
so many seconds of processor time. A crash or a spent limit kills too. No file is changed; processes that a
test starts import the module with the fault. Results are kept in ``build/mutants``: a stopped run goes on,
and survivors are tried again. The sample depends on the text of each function alone, so that changes
elsewhere leave it as it is. A mutant that changes nothing a test could see stands with the reason in
``equivalent_mutants.txt``. Python 3.11 or newer.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from itertools import chain, islice, zip_longest
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from module_imports import ROOT, imports, module_names

WORK = ROOT / "build" / "mutants"
PARTS = {  # folder of the code, folders of the tests
    "explainers": ("xattn/explainers", "tests/explainers"),
    "metrics": ("eval/metrics", "tests/eval/metrics", "tests/eval/fills"),
    "heads": ("xattn/heads", "tests/heads"),
    "training": ("xattn/training", "tests/training"),
    "packs": ("xattn/packs", "tests/packs", "tests/explaining", "tests/places"),
    "studies": ("eval/studies", "tests/eval/studies", "tests/eval/bench"),
}
ERROR = "not run: "
LIMIT, MEMORY = 1200, 14 * 2**30  # seconds of processor time, bytes
OPERATORS = {
    getattr(ast, names.split()[0]): [getattr(ast, name) for name in names.split()[1:]]
    for names in (
        "Lt LtE Gt, LtE Lt GtE, Gt GtE Lt, GtE Gt LtE, Eq NotEq, NotEq Eq, Is IsNot, IsNot Is, In NotIn, "
        "NotIn In, Add Sub, Sub Add, Mult Div, Div Mult, FloorDiv Mult, Mod FloorDiv, Pow Mult, "
        "BitAnd BitOr, BitOr BitAnd, And Or, Or And"
    ).split(", ")
}
PAIRS = (
    "argmax argmin, max min, amax amin, maximum minimum, mean sum, floor ceil, any all, "
    "clamp_min clamp_max, cumsum cumprod, triu tril"
)
CALLS = {a: b for p in PAIRS.split(", ") for a, b in (p.split(), p.split()[::-1])}


@dataclass(frozen=True)
class Mutant:
    id: str
    part: str
    path: str  # from the root
    function: str
    kind: str
    start: int
    end: int  # of the bytes that ``text`` replaces
    text: str

    def source(self) -> bytes:
        """The whole file with the fault."""
        source = source_of(self.path)
        return source[: self.start] + self.text.encode() + source[self.end :]

    def __str__(self) -> str:
        texts = (s.decode().splitlines() for s in (source_of(self.path), self.source()))
        lines = list(difflib.unified_diff(*texts, n=0, lineterm=""))[2:]
        return "\n    ".join([f"{self.id} {self.path} {self.function} ({self.kind})", *lines])


@cache
def source_of(path: str) -> bytes:
    """A file as it was at the start: what changes meanwhile is not what was imported."""
    return (ROOT / path).read_bytes()


def functions(tree: ast.AST, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every function with its qualified name, an outer one before those inside it."""
    for node in ast.iter_child_nodes(tree):
        inner = name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{name}.{node.name}" if name else node.name
            if not isinstance(node, ast.ClassDef):
                yield inner, node
        yield from functions(node, inner)


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """(kind of fault, what is replaced, what stands in its place)."""
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    call = call and "super()" not in ast.unparse(node)  # of which the code keeps a cell
    targets = node.targets if isinstance(node, ast.Assign) else []
    stored = targets and not any(isinstance(t, ast.Name | ast.Tuple) for t in targets)
    if call or stored or isinstance(node, ast.AugAssign | ast.Raise | ast.Continue):
        yield "removed", node, ast.Pass()
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for kind, op in zip(("compare", "flip"), OPERATORS[type(node.ops[0])], strict=False):
            yield kind, node, ast.Compare(node.left, [op()], node.comparators)
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        other = copy(node)
        other.op = OPERATORS[type(node.op)][0]()
        yield "arithmetic" if isinstance(node, ast.BinOp) else "logic", node, other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "sign", node, node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        number = type(node.value) is int
        other = ast.Constant(node.value + 1 if number else not node.value)
        yield "constant" if number else "boolean", node, other
    elif isinstance(node, ast.Attribute) and node.attr in CALLS:
        yield "call", node, ast.Attribute(node.value, CALLS[node.attr], node.ctx)
    elif isinstance(node, ast.Name) and node.id in CALLS:
        yield "call", node, ast.Name(CALLS[node.id], node.ctx)
    elif isinstance(node, ast.IfExp):
        other = ast.UnaryOp(ast.Not(), node.test)
        yield "condition", node, ast.IfExp(other, node.body, node.orelse)
    elif isinstance(node, ast.If | ast.While):
        yield "condition", node.test, ast.UnaryOp(ast.Not(), node.test)


def sites(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and what is in it, without inner functions and what is not mutated."""
    yield node
    left_out = ast.JoinedStr | ast.Raise | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    strict = isinstance(node, ast.keyword) and node.arg == "strict"
    warning = isinstance(node, ast.Call) and "warn" in ast.unparse(node.func)
    if not (isinstance(node, left_out) or strict or warning):
        types = getattr(node, "annotation", None)
        for child in ast.iter_child_nodes(node):
            if child is not types and not isinstance(child, ast.arguments):
                yield from sites(child)


def mutants_of(part: str, path: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    source, starts = source_of(path), [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen: dict[str, int] = defaultdict(int)
    for name, function in functions(ast.parse(source)):
        for site in chain.from_iterable(map(sites, function.body)):
            for kind, node, other in changes(site):
                start = starts[node.lineno - 1] + node.col_offset
                end = starts[node.end_lineno - 1] + node.end_col_offset
                text = ast.unparse(ast.fix_missing_locations(other))
                new = text if isinstance(other, ast.Pass) else f"({text})"
                key = "|".join((path, name, kind, source[start:end].decode(), text))
                seen[key] += 1
                id = sha1(f"{key}|{seen[key]}".encode()).hexdigest()[:10]
                yield Mutant(id, part, path, name, kind, start, end, new)


def sample(count: int, seed: int) -> list[Mutant]:
    """``count`` mutants, as many of each part, the kinds of fault in turn."""
    found = []
    for part, (folder, *_) in PARTS.items():
        kinds = defaultdict(list)
        for path in sorted((ROOT / folder).rglob("*.py")):
            for mutant in mutants_of(part, str(path.relative_to(ROOT))):
                kinds[mutant.kind].append(mutant)
        for of_kind in kinds.values():
            of_kind.sort(key=lambda m: sha1(f"{seed}|{m.id}".encode()).hexdigest())
        turns = chain.from_iterable(zip_longest(*(kinds[k] for k in sorted(kinds))))
        found.append(list(islice(filter(None, turns), -(-count // len(PARTS)))))
    return list(filter(None, chain.from_iterable(zip_longest(*found))))[:count]


def code_of(code: CodeType, name: str) -> Iterator[CodeType]:
    """The code of the functions and methods of a qualified name, in a module's."""
    if code.co_qualname == name:
        yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from code_of(inner, name)


@cache
def live() -> dict[tuple[str, str], list[FunctionType]]:
    """The functions of this process by file and qualified name."""
    found = defaultdict(list)
    for item in gc.get_objects():
        if type(item) is FunctionType:
            found[item.__code__.co_filename, item.__code__.co_qualname].append(item)
    return found


def put_in(mutant: Mutant) -> bool:
    """Give the live function, from the outermost one on, the code with the fault, if there is one."""
    path, source = str(ROOT / mutant.path), source_of(mutant.path)
    line = source[: mutant.start].count(b"\n") + 1
    name = next(n for n, f in functions(ast.parse(source)) if f.lineno <= line <= f.end_lineno)
    code = list(code_of(compile(mutant.source(), path, "exec"), name))
    for function in live()[path, name]:
        alike = [c for c in code if c.co_firstlineno == function.__code__.co_firstlineno]
        function.__code__ = (alike or code)[0]
    return bool(live()[path, name])


STARTED = """
import importlib.machinery as machinery, importlib.util as util, sys
class Loader(machinery.SourceFileLoader):
    def get_code(self, name):
        return compile({source!r}, self.path, "exec")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            return util.spec_from_file_location(name, {path!r}, loader=Loader(name, {path!r}))
sys.meta_path.insert(0, Finder())
"""  # the sitecustomize.py of processes that a test starts


class Loop:
    """A pytest plugin: in place of the collected tests, those that matter run for each mutant."""

    def __init__(self, mutants: list[Mutant], workers: int, seconds: float) -> None:
        self.mutants, self.workers, self.seconds, self.failed = mutants, workers, seconds, False
        self.sound: dict[str, bool] = {}  # whether a test passes without a fault
        self.names = module_names()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        for name, path in self.names.items():  # all live before the first fork
            if any(str(path).startswith(f"{ROOT / folder}/") for folder, *_ in PARTS.values()):
                importlib.import_module(name)
        live()
        pids = []
        for worker in range(self.workers):
            pids.append(os.fork())
            if pids[-1] == 0:
                try:
                    for mutant in self.mutants[worker :: self.workers]:
                        self.attempt(session, mutant)
                finally:
                    os._exit(0)
        for pid in pids:
            os.waitpid(pid, 0)
        return True

    def attempt(self, session: Any, mutant: Mutant) -> None:
        chosen = self.order(session.items, mutant)
        killer = in_child(session, lambda: self.first_failure(chosen, mutant))
        if killer and killer.startswith(ERROR):
            return print(mutant, killer, file=sys.__stderr__, flush=True)
        if killer:
            item = next(i for i in session.items if i.nodeid == killer)
            if killer not in self.sound:
                self.sound[killer] = in_child(session, lambda: self.first_failure([item])) == ""
            if not self.sound[killer]:
                chosen.remove(item)
                session.items.remove(item)
                return self.attempt(session, mutant)
        row = {"id": mutant.id, "status": "survived" if killer == "" else "killed"}
        row["by"] = "crash or time limit" if killer is None else killer
        with (WORK / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*row.values(), mutant.path, mutant.function, file=sys.__stderr__, flush=True)

    def order(self, items: list[Any], mutant: Mutant) -> list[Any]:
        """The tests of the mutant's part: those named after its module, class or function, first after most
        of these; those of files that name or import one of these; the others."""
        module = next(name for name, path in self.names.items() if path == ROOT / mutant.path)
        words = [word for word in mutant.function.split(".") if not word.startswith("_")]
        plain = [plain_text(word) for word in (Path(mutant.path).stem, *words)]
        ranked = []
        for number, item in enumerate(items):
            if item.nodeid.startswith(PARTS[mutant.part][1:]):
                text, used = of_file(item.path)
                named = sum(word in plain_text(item.nodeid) for word in plain)
                told = module in used or any(word in text for word in words)
                ranked.append((-named, not told, number))
        return [items[number] for *_, number in sorted(ranked)]

    def first_failure(self, items: list[Any], mutant: Mutant | None = None) -> str:
        """The test that fails first; empty where none does in the time that a mutant is given."""
        if mutant is not None:
            assert put_in(mutant)
            path = ROOT / mutant.path
            name = next(name for name, own in self.names.items() if own == path)
            text = STARTED.format(source=mutant.source(), name=name, path=str(path))
            folder = Path(os.environ["PYTEST_DEBUG_TEMPROOT"])
            (folder / "sitecustomize.py").write_text(text)
            os.environ["PYTHONPATH"] = str(folder)
        start = time.process_time()
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return item.nodeid
            if time.process_time() - start > self.seconds:
                break
        return ""


def plain_text(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


@cache
def of_file(path: Path) -> tuple[str, set[str]]:
    """The text of a test file, and the modules that it imports."""
    text = path.read_text()
    return text, imports(ast.parse(text), module_names())


def in_child(session: Any, action: Callable[[], str]) -> str | None:
    """What ``action`` returns in a fork; None if it dies or its time is up."""
    own = WORK / f"own-{os.getpid()}"
    own.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.environ["PYTEST_DEBUG_TEMPROOT"] = str(own)
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            plugins = session.config.pluginmanager
            plugins.unregister(name="terminalreporter")
            capture = plugins.getplugin("capturemanager")
            capture.stop_global_capturing()
            capture.start_global_capturing()
            (own / "answer").write_text(action())
        except Exception as error:  # of this script, or of pytest
            (own / "answer").write_text(f"{ERROR}{error!r}")
        finally:
            os._exit(0)
    end = time.monotonic() + 10 * LIMIT  # for what hangs
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.05)
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests started
    answer = (own / "answer").read_text() if (own / "answer").exists() else None
    shutil.rmtree(own, ignore_errors=True)
    return answer


def results() -> dict[str, dict[str, str]]:
    """The last row of each mutant."""
    path = WORK / "results.jsonl"
    return {row["id"]: row for row in map(json.loads, path.open() if path.exists() else [])}


def report(mutants: list[Mutant], equivalent: dict[str, str]) -> float:
    """Print the survivors and the table; the percentage killed of those that could be noticed."""
    known = results()
    status = {m.id: known[m.id]["status"] if m.id in known else "not run" for m in mutants}
    status |= {m.id: "equivalent" for m in mutants if m.id in equivalent}
    for m in mutants:
        if status[m.id] == "survived":
            print(f"\nsurvived: {m}")
    words, percent = ("killed", "survived", "equivalent", "not run"), 100.0
    print(f"\n{'part':<12}{'mutants':>12}", *(f"{word:>11}" for word in words), f"{'% killed':>11}")
    for part in [*PARTS, "all"]:
        found = [status[m.id] for m in mutants if part in (m.part, "all")]
        counts = [found.count(word) for word in words]
        percent = 100 * counts[0] / max(1, counts[0] + counts[1])
        print(f"{part:<12}{len(found):>12}", *(f"{c:>11}" for c in counts), f"{percent:>11.1f}")
    return percent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="of tests for a mutant")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--only", nargs="+", help="ids of mutants to try again")
    parser.add_argument("--report", action="store_true", help="print what is known, run nothing")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    mutants = [m for m in sample(options.count, options.seed) if m.part in options.parts]
    lines = (ROOT / "tests" / "equivalent_mutants.txt").read_text().splitlines()
    equivalent = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    known = results()
    todo = [m for m in mutants if m.id not in known]
    todo += [m for m in mutants if known.get(m.id, {}).get("status") == "survived"]
    if options.only:
        todo = [m for m in mutants if m.id in options.only]
    todo = [m for m in todo if m.id not in equivalent]
    if todo and not options.report:
        import pytest

        os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        folders = [f for part in options.parts for f in PARTS[part][1:]]
        loop = Loop(todo, options.workers, options.seconds)
        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *folders], plugins=[loop])
    return 0 if report(mutants, equivalent) >= 97 else 1


if __name__ == "__main__":
    sys.exit(main())
