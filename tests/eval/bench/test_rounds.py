"""Raw values of benchmarks: every job keeps a line for each round, which ``--raw`` writes."""

import ast
import csv
import importlib
import inspect

import pytest

from xattn.cli.commands.bench import JOBS
from xattn.eval.studies.__main__ import STUDIES
from xattn.runtime.measuring import keep_rounds, keep_table, record_rounds, times

MODULES = {module for module, _ in JOBS.values()}
MODULES |= {f"xattn.eval.studies.{name}" for name, _ in STUDIES.values() if "benches" in name}


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_round_is_a_line(tmp_path):
    ticks = iter([0, 9, 0, 9, 0, 1, 0, 2, 0, 3, 0, 4])  # the first round warms up
    jobs = {"fast": lambda: None, "slow": lambda: None}
    with record_rounds(tmp_path / "raw.csv"):
        took = times(jobs, 2, warmup=1, clock=lambda: float(next(ticks)), of="row")
        keep_rounds("memory", "", [12.5], "MB")
    assert took == {"fast": [1, 3], "slow": [2, 4]}
    cells = [tuple(row.values()) for row in rows_of(tmp_path / "raw.csv")]
    assert cells == [
        ("row", "fast", "0", "1", "s"),
        ("row", "fast", "1", "3", "s"),
        ("row", "slow", "0", "2", "s"),
        ("row", "slow", "1", "4", "s"),
        ("memory", "", "0", "12.5", "MB"),
    ]


def test_nothing_is_kept_without_a_file_or_after_an_error(tmp_path):
    with record_rounds(None):
        keep_rounds("row", "job", [1.0])
    with pytest.raises(KeyboardInterrupt), record_rounds(tmp_path / "raw.csv"):
        keep_rounds("row", "job", [1.0])
        raise KeyboardInterrupt
    keep_rounds("row", "job", [1.0])
    with pytest.raises(ValueError, match=r"^raw: got no rows for .*; nothing was measured"):
        with record_rounds(tmp_path / "raw.csv"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_printed_table_is_kept_by_its_columns(tmp_path):
    with record_rounds(tmp_path / "raw.csv"):
        keep_table(["before", "| kernel | stack |", "|---|---:|", "| softmax, bf16 | 0 |"])
    assert rows_of(tmp_path / "raw.csv") == [{"kernel": "softmax, bf16", "stack": "0"}]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_job_keeps_its_rounds(name):
    """What is timed is told which row of the table it is of."""
    if name in ("xattn.kernels.aot", "xattn.eval.bench.gpu"):
        return  # their tables are kept as they are
    tree = ast.parse(inspect.getsource(importlib.import_module(name)))
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [(getattr(node.func, "id", ""), {k.arg for k in node.keywords}) for node in called]
    timed = [keys for name, keys in named if name in ("times", "ratios", "measure")]
    assert all("of" in keys for keys in timed)
    assert timed or any(name == "keep_rounds" for name, _ in named)
