"""``xattn bench gpu``: it goes on where it stopped, past rows that fail; its checks see a wrong kernel."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xattn.cli import main
from xattn.eval.bench import gpu
from xattn.eval.bench.gpu import SECTIONS, Machine, headlines, report
from xattn.eval.bench.op_cases import Sizes, op_cases
from xattn.runtime.version import __version__

HERE = Machine(torch.device("cpu"), small=True)
DOCS = Path(__file__).resolve().parents[3] / "docs"


def rows_of(section, found=lambda section, row: {}):
    return dict(SECTIONS[section](HERE, found))


def few(monkeypatch, *chosen):
    """The run has these rows alone."""
    sections = {}
    for section, row, job in chosen:
        sections.setdefault(section, []).append((row, job))

    def made(rows):
        def section(here, find):
            """Words."""
            yield from rows

        return section

    monkeypatch.setattr(gpu, "SECTIONS", {name: made(rows) for name, rows in sections.items()})


def run(folder, *more):
    return main(["bench", "gpu", "--device", "cpu", "--small", "--out", str(folder), *more])


def fail():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def test_rows_that_fail_say_why_and_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    asked = []
    few(
        monkeypatch,
        ("right", "one", lambda: asked.append("one") or {"holds": True}),
        ("right", "two", fail),
        ("mechanisms", "dma; 64", lambda: {"forward ms": 2.0, "forward gain": 1.5}),
    )
    assert run(tmp_path) == 0
    state = json.loads((tmp_path / "results.json").read_text())
    assert [row["row"] for row in state["rows"]] == ["one", "two", "dma; 64"]
    assert state["running"] == [] and state["about"]["card"] == "a CPU"
    told = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert state["rows"][1]["failed"] == told
    page = (tmp_path / "report.md").read_text()
    assert f"| two |  | {told} |" in page and "pass | 2 | 1 | 1 of 1 |" in page
    assert (tmp_path / "times.png").stat().st_size > 5000
    assert run(tmp_path) == 0 and asked == ["one"]
    few(monkeypatch, ("right", "two", lambda: {"holds": False}))
    assert run(tmp_path, "--retry") == 0
    assert "pass | 2 |  | 1 of 2 |" in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(gpu, "about", lambda here: {"card": "another"})
    assert run(tmp_path) == 2
    assert "contains a run with a different card; give a new folder" in capsys.readouterr().err


def test_a_row_beyond_the_budget_keeps_what_was_measured_and_says_so(tmp_path, monkeypatch, capsys):
    # The first call of the one job has the compiler in it, the other one is as slow again.
    seconds = {"forward": iter([90.0, 5.0, 4.0, 6.0, 5.0]), "both": iter([90.0, 30.0])}
    monkeypatch.setattr(gpu, "seconds_of", lambda job: next(seconds[job]))
    budgets = []

    def rows(here, find):
        """Words."""
        budgets.append(here.budget)
        yield "slow; 64", lambda: here.both_ms(("forward", "both"))
        yield "fast; 64", lambda: {"forward ms": 2.0}

    monkeypatch.setattr(gpu, "SECTIONS", {"mechanisms": rows})
    assert run(tmp_path, "--budget", "80") == 0 and budgets == [80]
    slow, fast = json.loads((tmp_path / "results.json").read_text())["rows"]
    slow.pop("commit", None)
    assert slow.pop("failed") == "TimeoutError: 3 calls of 30 s each exceed the budget of 80 s"
    assert slow == {"section": "mechanisms", "row": "slow; 64", "forward ms": 5000.0}
    assert fast["forward ms"] == 2.0
    page = (tmp_path / "report.md").read_text()
    assert (
        "| row | forward ms | failed |\n| :-- | --: | :-- |\n| slow; 64 | 5,000 | Timeout" in page
    )
    assert run(tmp_path, "--budget", "0") == 2
    assert "budget: got 0.0; give a positive number of seconds" in capsys.readouterr().err


def test_the_report_names_the_commits_that_measured_its_rows(tmp_path, monkeypatch):
    chosen = []
    for commit, row in (("abc", "one"), ("def-dirty", "two"), ("abc", "three"), ("other", "one")):
        monkeypatch.setattr(gpu, "commit", lambda c=commit: {"commit": c})
        chosen = [*chosen, ("right", row, lambda: {"holds": True})]
        few(monkeypatch, *chosen)
        assert run(tmp_path) == 0
    page = (tmp_path / "report.md").read_text()
    assert ", commit abc, commit def-dirty\n" in page and page.count("abc") == 1


def test_the_commit_is_that_of_a_checkout_and_of_no_folder_around_a_package(tmp_path, monkeypatch):
    if found := gpu.commit():
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=DOCS.parent, text=True)
        assert head.startswith(found["commit"].removesuffix("-dirty"))
    (tmp_path / ".git").mkdir()
    package = tmp_path / "site-packages" / "xattn" / "eval" / "bench" / "gpu.py"
    monkeypatch.setattr(gpu, "__file__", str(package))
    assert gpu.commit() == {} and gpu.about(HERE)["xattn"] == __version__


def test_a_row_in_which_the_process_ended_is_passed_over_and_a_stopped_one_is_not(
    tmp_path, monkeypatch
):
    written = []

    def stopped():
        written.append((tmp_path / "results.json").read_bytes())
        raise KeyboardInterrupt

    few(monkeypatch, ("right", "one", stopped))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            list(gpu.bench(tmp_path, "cpu", True))
    assert len(written) == 2
    (tmp_path / "results.json").write_bytes(written[0])  # as a process that is killed leaves it
    few(monkeypatch, ("right", "one", stopped), ("right", "two", lambda: {"holds": True}))
    list(gpu.bench(tmp_path, "cpu", True))
    one, two = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert one["failed"] == "the process ended in this row" and two["holds"] and len(written) == 2


def test_where_cuda_no_longer_answers_the_run_goes_on_in_a_new_process(tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    started = []
    monkeypatch.setattr(Machine, "synchronize", broken)
    monkeypatch.setattr("os.execv", lambda *given: started.append(given))
    few(monkeypatch, ("right", "one", lambda: {"holds": True}))
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "xattn", "bench", "gpu", "--retry"])
    list(gpu.bench(tmp_path, "cpu", True))
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert "illegal memory access" in row["failed"]
    assert [given[1][1:] for given in started] == [["-m", "xattn", "bench", "gpu"]]


@pytest.mark.parametrize("job", ["pooling; bf16; 1 token", "softmax, causal; fp32; 21 tokens"])
def test_a_check_holds_and_sees_a_wrong_kernel(job, monkeypatch):
    check = rows_of("right")[job]
    assert check()["holds"] is True and check()["backend"] == "cpu"
    run = gpu.outputs_and_gradients

    def wrong(name, call, backend, given):
        found = run(name, call, backend, given)
        return [x * 1.1 if backend == "cpu" else x for x in found]

    monkeypatch.setattr(gpu, "outputs_and_gradients", wrong)
    assert check()["holds"] is False and check()["error"] > 0.05


def test_every_op_is_checked_with_more_heads_than_an_axis_of_a_grid_takes():
    names = {row.split("; ")[0] for row in dict(gpu._right(Machine(HERE.device, False), None))}
    assert names == {row.split("; ")[0] for row in rows_of("right")}
    assert Sizes(32769).batch * Sizes(32769).heads > 65535


def test_rates_and_shares_follow_from_the_time(monkeypatch):
    monkeypatch.setattr(Machine, "ms", lambda self, job: 2.0 if job() is None else 1.0)
    limits = {"fp32": {"TFLOP/s": 0.5}, "copy": {"GB/s": 1e9}}
    rows = rows_of("kernels", lambda section, row: limits.get(row, {}))
    found = rows["softmax, causal; fp32"]()
    # 4 heads of 128 x 128 / 2 pairs, 64 wide; two products of a multiplication and an addition each
    operations = 4 * 128 * 128 / 2 * 64 * 2 * 2
    assert found["forward TFLOP/s"] == pytest.approx(operations / 1e-3 / 1e12)
    assert found["forward share"] == pytest.approx(operations / 0.5e12 / 1e-3)
    assert found["backward ms"] == 1.0
    assert found["backward share"] == pytest.approx(2.5 * operations / 0.5e12 / 1e-3)
    moved = 4 * (4 + 2 + 2 + 4) * 128 * 64  # q, k and v, which have half the heads, the output
    assert found["forward GB/s"] == pytest.approx(moved / 1e-3 / 1e9)
    assert found["forward limit"] == "fp32"
    limits["tf32"] = {"TFLOP/s": 3.0}  # of which a product in float32 takes three
    found = rows["softmax, causal; fp32"]()
    assert found["forward share"] == pytest.approx(operations / 1e12 / 1e-3)
    assert found["forward limit"] == "tf32 / 3"
    limits["copy"] = {"GB/s": 1.0}
    found = rows["softmax, causal; fp32"]()
    assert found["forward share"] == pytest.approx(moved / 1e9 / 1e-3)
    assert found["forward limit"] == found["backward limit"] == "copy"


@pytest.mark.parametrize("sizes", gpu.LISTS)
def test_the_work_of_lists_is_that_of_the_blocks_in_them(sizes):
    lists = sizes.lists(torch.device("cpu"))
    entries = int((lists["index"] >= 0).sum())
    assert sizes.pairs == entries * lists["q_block"] * lists["k_block"]


def test_causal_products_are_timed_as_wide_as_heads_are():
    _, _, sizes, pairs = gpu.WORK["causal_product"]
    for z in sizes:
        given, _ = op_cases(HERE.normal(), replace(z, n=16))["causal_product"]()
        assert {x.shape[2] for x in given.values()} == {64}
        products = given["left"].shape[0] * z.n * 64 * 64  # of a sum (64, 64), read or written
        assert pairs(z) * z.width == products


def test_197_tokens_are_a_grid_and_a_class_token():
    rows = rows_of("mechanisms")
    name = next(row for row in rows if row.startswith("gna") and row.endswith("; 65"))
    found = rows[name]()
    assert found["forward ms"] > 0 and "graph ms" not in found


def test_a_gain_is_the_time_of_dense_attention_over_the_rows_own():
    found = {"forward ms": 2.0, "backward ms": 4.0, "both ms": 6.0, "graph ms": "none"}
    dense = {"forward ms": 4.0, "backward ms": 4.0, "both ms": 8.0, "graph ms": 1.0}
    gains = gpu._gains(found, dense)
    assert gains == {"forward gain": 2.0, "backward gain": 1.0, "both gain": 8.0 / 6.0}
    assert gpu._gains(found, {}) == {}


def test_the_page_of_docs_says_what_is_not_measured_as_the_command_would():
    page = (DOCS / "gpu.md").read_text(encoding="utf-8")
    assert "\n".join(headlines([])) in page
    assert "not measured on a GPU" in "\n".join(report({"card": "x"}, []))


def test_the_first_table_counts_rows_that_have_its_figure_or_failed():
    rows = [
        {"row": "dense; 64", "forward ms": 4.0},
        {"row": "a; 64", "forward gain": 2.0, "failed": "exceed the budget"},
        {"row": "b; 64", "failed": "out of memory"},
        {"row": "c; 64", "forward gain": 4.0, "both gain": 1.0},
    ]
    lines = list(headlines([{"section": "mechanisms", **row} for row in rows]))
    assert "| speed-up of mechanisms over flash attention, forward | 3 | 1 | 3 | 2 to 4 |" in lines
    assert "| the same, forward and backward | 3 | 2 | 1 | 1 to 1 |" in lines


def test_a_gpu_that_is_not_there_is_named(capsys, tmp_path):
    assert main(["bench", "gpu", "--out", str(tmp_path), "--device", "cuda:99"]) == 2
    assert "device: 'cuda:99' is not available here" in capsys.readouterr().err
    assert main(["bench", "gpu", "--out", str(tmp_path), "--device", "cada"]) == 2
    assert "device: got 'cada'; did you mean cuda" in capsys.readouterr().err
    assert main(["bench", "gpu"]) == 2
    assert "out: missing; give a folder" in capsys.readouterr().err


def test_the_rows_of_fidelity_and_of_attentive_heads():
    found = rows_of("published")["efficient_probe; multi-head"]()
    assert found["both gain"] > 0 and found["both published"] == 10
    found = next(job for row, job in rows_of("whole").items() if row.startswith("fidelity"))()
    assert math.isfinite(found["ratio"]) and found["holds"] == (found["ratio"] <= 1.1)
