"""The ahead-of-time check: no kernel of the sample spills, and one that did would be named."""

import os
import re
import subprocess
import sys
from itertools import product

import pytest

from xattn.cli import main
from xattn.kernels import aot
from xattn.kernels.backend import HAS_TRITON, WIDEST

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def compile_in_a_process(code, cache):
    """Run ``code`` where Triton compiles; here it interprets."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**kept, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )


def bench(filter, *more):
    line = ["bench", "kernels", "--aot", "--filter", filter, *more]
    return f"import xattn.cli\nexit(xattn.cli.main({line}))"


# Few of all cases, because compiling takes long: `xattn bench kernels --aot` compiles every one.
SAMPLE = [
    ("softmax forward bf16 D=16", 80, "16"),
    ("softmax dkv fp32 D=64", 86, "any"),
    ("block_sparse forward fp16 D=24 box", 90, "1"),
    ("block_sparse dkv bf16 D=64", 120, "16"),
    ("grouped dkv fp32 D=48", 90, "any"),
    ("block_topk lse bf16 D=48", 86, "16"),
    ("block_topk topk fp32 D=32", 80, "1"),
    ("vecmat bf16 D=64 R=1", 120, "1"),
    ("vecmat fp32 D=16 R=16", 80, "16"),
    ("pooling scores bf16 D=768", 90, "16"),
    ("pooling spread fp32 D=768", 86, "1"),
    ("covariance_solve rows fp32 D=128", 80, "any"),
    ("local_linear forward fp32 D=32", 120, "16"),
    ("softplus dq bf16 D=64", 90, "16"),
    ("ragged_queries dkv bf16 D=64 causal", 90, "any"),
    ("causal_product product bf16 D=48", 80, "any"),
]


@needs_triton
def test_kernels_neither_spill_nor_need_more_shared_memory_than_there_is(tmp_path):
    assert {label.split()[0] for label, _, _ in SAMPLE} == {*aot.OPS}
    assert {x for _, x, _ in SAMPLE} == {*aot.TARGETS} and {x for *_, x in SAMPLE} == {*aot.SIZES}
    code = f"""
from xattn.kernels import aot
cases = {{case.label: case for case in aot.cases()}}
reports = [aot.compile_case(cases[label], *how) for label, *how in {SAMPLE}]
print(*aot.table(reports), *aot.check(reports), sep="\\n")
"""
    run = compile_in_a_process(code, tmp_path)
    assert run.returncode == 0, run.stderr
    _, _, *rows = run.stdout.splitlines()
    assert len(rows) == len(SAMPLE), rows  # a line more for each problem
    for line, (label, capability, sizes) in zip(rows, SAMPLE, strict=True):
        name, target, registers, shared, stack, local, cubin, microseconds = line.split("|")[1:-1]
        assert (name.strip(), target.strip()) == (
            f"{label}, sizes {sizes}",
            aot.TARGETS[capability].name,
        )
        assert 16 <= int(registers) <= 255 and 1 < float(cubin)
        assert int(stack) == int(local) == 0 and float(shared) >= 0 and float(microseconds) > 0


@needs_triton
def test_a_kernel_that_spills_is_named_and_the_command_fails(tmp_path):
    few_registers = """
import triton
compile = triton.compile
triton.compile = lambda *given, options, **more: compile(*given, options={**options, "maxnreg": 32}, **more)
"""
    label = "softmax forward bf16 D=16 bias causal, sizes any"
    run = compile_in_a_process(few_registers + bench(f"{label} sm_80"), tmp_path)
    assert run.returncode == 2 and run.stdout.count("\n") == 5  # the table is complete
    assert "- softmax forward: 1 compilations, spills: 1, at most" in run.stdout
    assert (
        f"1 of 1 compilations spill or need more shared memory than there is; the first: {label} on A100 40 GB (sm_80) spills: stack"
        in run.stderr
    )


@needs_triton
def test_a_sample_says_of_how_many(tmp_path):
    run = compile_in_a_process(bench("softmax forward bf16 D=16 bias", "--limit", "1"), tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.match(r"1 of \d\d+ compilations, drawn with seed 0\n", run.stdout)
    assert "- softmax forward: 1 compilations, spills: none" in run.stdout


@needs_triton
def test_every_op_has_cases_of_all_widths_and_types_under_its_name():
    cases = list(aot.cases())
    labels = [case.label for case in cases]
    assert len(set(labels)) == len(labels)
    for op in aot.OPS:
        widths = (768, 1536) if op == "pooling" else aot.WIDTHS
        dtypes = ("fp32",) if op == "covariance_solve" else aot.DTYPES  # it converts half precision
        for dtype, width in product(dtypes, widths):
            words = (op, f"{dtype} D={width}")
            assert any(all(word in f"{label} " for word in words) for label in labels), words
    assert max(aot.WIDTHS) == WIDEST  # the widest heads that a launch takes
    for name, other in aot.OTHER.items():
        assert any(case.constants.get(name) == other for case in cases)
    for case in cases:
        assert list(case.signature) == case.kernel.arg_names
        assert {n for n, kind in case.signature.items() if kind == "constexpr"} == {*case.constants}
        assert case.operations > 0 and case.bytes > 0


def report(**change):
    values = {
        "label": "k",
        "capability": 80,
        "registers": 64,
        "shared": 1024,
        "stack": 0,
        "local": 0,
    }
    return aot.Report(**{**values, "cubin": 2048, "roofline": 3e-6, **change})


def test_stack_local_and_shared_memory_are_checked_for_each_target():
    assert aot.check([report(), report(capability=90, shared=227 * 1024)]) == []
    failures = aot.check([report(stack=8), report(local=16), report(shared=163 * 1024 + 1)])
    assert [text.split(" on ")[1] for text in failures] == [
        "A100 40 GB (sm_80) spills: stack 8, local 0 bytes",
        "A100 40 GB (sm_80) spills: stack 0, local 16 bytes",
        "A100 40 GB (sm_80) needs 166913 bytes of shared memory",
    ]
    assert list(
        aot.by_kernel([report(label="a b bf16 D=8"), report(label="a b fp32", stack=8)])
    ) == ["- a b: 2 compilations, spills: 1, at most 8 bytes"]
    assert (
        list(aot.table([report()]))[2]
        == "| k | A100 40 GB (sm_80) | 64 | 1.0 | 0 | 0 | 2.0 | 3.00 |"
    )


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    def case(kind, operations, bytes):
        return aot.Case(None, {"q_ptr": kind}, {}, 4, 2, "", operations, bytes)

    a100, h100 = aot.TARGETS[80], aot.TARGETS[90]
    assert aot.roofline(case("*bf16", 312e12, 1), a100) == 1
    assert aot.roofline(case("*fp32", h100.single, 1), h100) == 1
    assert aot.roofline(case("*bf16", 1, 3.35e12), h100) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "bench kernels: give --aot"),
        (["--aot"], "TRITON_INTERPRET=1 replaces the compiler" if HAS_TRITON else "not installed"),
    ],
)
def test_the_command_says_what_it_needs(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", "kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


@needs_triton
def test_a_filter_that_no_kernel_meets_and_a_wheel_without_cuobjdump_are_refused(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(aot, "interpreted", lambda: False)
    with pytest.raises(
        ValueError, match="filter: no kernel's label contains 'softmx'; try one of softmax"
    ):
        list(aot.bench("softmx"))
    import triton

    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match="cuobjdump is missing; install a Triton wheel"):
        list(aot.bench())


def test_a_cubin_without_resource_usage_is_refused():
    with pytest.raises(ValueError, match="no resource usage in '-res-usage"):
        aot.resources(b"", "echo")
