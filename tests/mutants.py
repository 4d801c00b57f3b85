"""Mutation testing: a seeded sample of small faults in the code, and whether a test notices each.

    make mutants                                              # COUNT, SEED, WORKERS and PARTS
    .venv/bin/python tests/mutants.py --only 3fa9c1b2d4       # one fault again

A fault (mutant) is one changed expression or removed statement in a function of :data:`PARTS`; defaults,
decorators, annotations and error messages stay. In a copy of the tree, test files run once under
coverage, which tells the tests that reach each function; for a mutant these run, first in the files named
after its module and those that import it. A failure, a crash or a spent time limit kills it. Results are
kept in ``build/mutants``: a stopped run goes on, and survivors are tried again. The sample depends on the
text of each function alone, so that changes elsewhere leave it as it is. A mutant that changes nothing a
test could see stands with the reason in ``equivalent_mutants.txt``.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from hashlib import sha1
from itertools import accumulate, chain, islice, zip_longest
from pathlib import Path
from typing import Any

from module_imports import PACKAGES, ROOT, imports, module_names

WORK = ROOT / "build" / "mutants"
PARTS = {  # folder of the code, folders of the tests
    "explainers": ("xattn/explainers", "tests/explainers"),
    "metrics": ("eval/metrics", "tests/eval/metrics", "tests/eval/fills"),
    "heads": ("xattn/heads", "tests/heads"),
    "training": ("xattn/training", "tests/training"),
    "packs": ("xattn/packs", "tests/packs", "tests/explaining"),
    "studies": ("eval/studies", "tests/eval/studies"),
}
QUICK, MOST = 10.0, 40.0  # seconds of a test file that runs as a whole, and of the tests of another
LIMIT, MEMORY = 1200, 14 * 2**30  # seconds of processor time, bytes
WARM = ("torch", "torchvision", "timm", "captum", "torchmetrics", "accelerate", "pandas", "pytest")
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

    def within(self, source: bytes) -> bytes:
        """The whole file with the fault."""
        return source[: self.start] + self.text.encode() + source[self.end :]

    def __str__(self) -> str:
        source = (ROOT / self.path).read_bytes()
        texts = (text.decode().splitlines() for text in (source, self.within(source)))
        lines = list(difflib.unified_diff(*texts, n=0, lineterm=""))[2:]
        return "\n    ".join([f"{self.id} {self.path} {self.function} ({self.kind})", *lines])


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
    source, starts = (ROOT / path).read_bytes(), [0]
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


def copy_tree(worker: int) -> Path:
    """A copy of the tracked and new files, whose ``xattn`` is whole without an installation."""
    tree = WORK / f"tree{worker}"
    shutil.rmtree(tree, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for folder, package in PACKAGES.items():
        if "." in package:
            (tree / package.replace(".", "/")).symlink_to(tree / folder)
    return tree


def in_child(tree: Path, action: Callable[[], Any]) -> Any:
    """What ``action`` returns in a fork that works in ``tree``; None if it dies or its time is up."""
    answer = tree.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.chdir(tree)
            os.environ["PYTHONPATH"] = str(tree)
            sys.path.insert(0, str(tree))
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.alarm(10 * LIMIT)  # ends what hangs
            output = os.open(tree.with_suffix(".output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            answer.write_text(json.dumps(action()))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests started
    return json.loads(answer.read_text()) if answer.exists() else None


class Recorder:
    """A pytest plugin: seconds of the tests that pass, what failed first, and whose code runs."""

    def __init__(self, switch: Callable[[str], None] = lambda test: None) -> None:
        self.switch, self.failed, self.start = switch, "", 0.0
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.switch(nodeid)
        self.start = time.process_time()

    def pytest_runtest_logfinish(self) -> None:
        self.switch("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid
        elif report.when == "call" and report.passed:
            self.seconds[report.nodeid] = round(time.process_time() - self.start, 2)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid or "collection"

    def run(self, *arguments: str) -> None:
        import pytest

        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments], plugins=[self])


def first_failure(tests: list[str]) -> str:
    recorder = Recorder()
    recorder.run("-x", *tests)
    return recorder.failed


def reached(name: str) -> dict[str, Any]:
    """Run one test file under coverage: the seconds of its tests, and their numbers by function."""
    import coverage

    measured = coverage.Coverage(
        None, source=[f"{code}/" for code, *_ in PARTS.values()], config_file=False
    )
    recorder = Recorder(measured.switch_context)
    with measured.collect():
        recorder.run(name)
    data, by_function = measured.get_data(), defaultdict(set)
    number = {test: i for i, test in enumerate(recorder.seconds)}
    for path in data.measured_files():
        found = list(functions(ast.parse(Path(path).read_text())))
        for line, tests in data.contexts_by_lineno(path).items():
            inside = [n for n, f in found if f.body[0].lineno <= line <= f.end_lineno]
            if inside:
                by_function[f"{os.path.relpath(path)}::{inside[-1]}"].update(tests)
    numbers = {f: sorted(number[t] for t in ts if t in number) for f, ts in by_function.items()}
    return {"seconds": recorder.seconds, "reached": numbers, "failed": recorder.failed}


def content(*names: str, tree: Path = ROOT) -> str:
    return sha1(b"".join((tree / n).read_bytes() for n in names)).hexdigest()[:12]


def kept(name: str, key: str) -> dict[str, dict[str, Any]]:
    """The last row of each ``key`` in a file of results."""
    path = WORK / name
    return {row[key]: row for row in map(json.loads, path.open() if path.exists() else [])}


def keep(name: str, row: dict[str, Any], *shown: Any) -> None:
    with (WORK / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(*shown, flush=True)


def test_files(mutant: Mutant) -> list[str]:
    """The test files of the mutant's part, first those of its module's name, then those that import it."""
    names = module_names()
    module = next(name for name, path in names.items() if path == ROOT / mutant.path)
    ranked = []
    for folder in PARTS[mutant.part][1:]:
        for path in sorted((ROOT / folder).rglob("test_*.py")):
            named = Path(mutant.path).stem.strip("_") in path.stem
            imported = module in imports(ast.parse(path.read_text()), names)
            ranked.append((not named, not imported, str(path.relative_to(ROOT))))
    return [name for *_, name in sorted(ranked)]


def map_of(tree: Path, name: str) -> dict[str, Any]:
    """What a test file reaches, measured where its text is new."""
    row = kept("map.jsonl", "file").get(name, {})
    if row.get("content") != content(name, tree=tree):
        found = in_child(tree, lambda: reached(name))
        found = found or {"seconds": {}, "reached": {}, "failed": "crash or time limit"}
        row = {"file": name, "content": content(name, tree=tree), **found}
        keep("map.jsonl", row, f"{name}: {len(row['seconds'])} tests", row["failed"])
    return row


def tests_of(mutant: Mutant, row: dict[str, Any]) -> list[str]:
    """The tests of a file that reach the mutant's function; of a quick file all, if some do."""
    numbers = row["reached"].get(f"{mutant.path}::{mutant.function}")
    if numbers is None:
        return []
    if sum(row["seconds"].values()) < QUICK:  # also those that share what another test made
        return [row["file"]]
    timed = list(row["seconds"].items())
    reaching = sorted((timed[number][1], timed[number][0]) for number in numbers)
    totals = accumulate(seconds for seconds, _ in reaching)
    return [test for total, (_, test) in zip(totals, reaching, strict=True) if total < MOST]


def try_mutant(tree: Path, mutant: Mutant) -> None:
    found = [tests_of(mutant, map_of(tree, name)) for name in test_files(mutant)]
    path = tree / mutant.path
    times, original = path.stat(), path.read_bytes()
    path.write_bytes(mutant.within(original))
    killer = in_child(tree, lambda: next(filter(None, map(first_failure, filter(None, found))), ""))
    path.write_bytes(original)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    row = {"id": mutant.id, "status": "survived" if killer == "" else "killed"}
    row["by"] = "crash or time limit" if killer is None else killer
    keep("results.jsonl", row, *row.values(), mutant.path, mutant.function)


def try_all(tree: Path, mutants: list[Mutant]) -> None:
    for mutant in mutants:
        try_mutant(tree, mutant)


def in_workers(count: int, task: Callable[[Path, list[Any]], None], items: list[Any]) -> None:
    """``task(tree, share)`` in ``count`` forks, each with its own copy of the tree."""
    for module in WARM if items else ():
        __import__(module)
    pids = []
    for worker in range(count if items else 0):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                task(copy_tree(worker), items[worker::count])
            finally:
                os._exit(0)
    for pid in pids:
        os.waitpid(pid, 0)


def report(mutants: list[Mutant], equivalent: dict[str, str]) -> float:
    """Print the survivors and the table; the percentage killed of those that could be noticed."""
    results = kept("results.jsonl", "id")
    status = {m.id: results[m.id]["status"] if m.id in results else "not run" for m in mutants}
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
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--only", nargs="+", help="ids of mutants to try again")
    parser.add_argument("--report", action="store_true", help="print what is known, run nothing")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    sys.dont_write_bytecode = False  # in the copies, where each mutant starts anew
    mutants = [m for m in sample(options.count, options.seed) if m.part in options.parts]
    lines = (ROOT / "tests" / "equivalent_mutants.txt").read_text().splitlines()
    equivalent = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    if not options.report:
        results = kept("results.jsonl", "id")
        unknown = [m for m in mutants if m.id not in results]
        survived = [m for m in mutants if results.get(m.id, {}).get("status") == "survived"]
        todo = [m for m in mutants if m.id in options.only] if options.only else unknown + survived
        in_workers(options.workers, try_all, [m for m in todo if m.id not in equivalent])
    return 0 if report(mutants, equivalent) >= 97 else 1


if __name__ == "__main__":
    sys.exit(main())
