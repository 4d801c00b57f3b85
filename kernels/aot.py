"""Ahead-of-time check of the Triton kernels: compilation for GPUs that need not be present.

Each kernel's registers, shared memory and spills are read from its cubin, for the tiles and options
that its launch would use; the roofline time, max(operations / peak, bytes / bandwidth) (Williams, Waterman,
Patterson 2009), is a lower bound for any implementation.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xattn.kernels.backend import HAS_TRITON, INSTALL, interpreted

OPS = (
    "softmax", "block_sparse", "grouped", "block_topk", "vecmat", "pooling", "covariance_solve",
    "local_linear", "softplus", "ragged_queries",
)  # fmt: skip
"""Folders of ``xattn.kernels`` with Triton kernels."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (16, 24, 32, 48, 64, 80, 96, 128)
"""Of heads; tiles are padded to powers of two, so each tile is met full and with a masked rest."""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: what :func:`triton.compile` needs, and its work for the roofline."""

    kernel: Any
    signature: dict[str, str]
    """Argument name to type: "*bf16", "*fp16", "*fp32", "*i32", "i32", "i64", "fp32" or "constexpr"."""
    constants: dict[str, Any]
    """Value of every constexpr."""
    num_warps: int
    num_stages: int
    label: str
    """For the table, for example "softmax forward bf16 D=64"."""
    operations: float
    """Floating-point operations of the launch."""
    bytes: float
    """The least number of bytes that it reads and writes."""


@dataclass(frozen=True)
class Target:
    """A GPU by its published figures."""

    name: str
    tensor: float
    """Dense operations per second in bfloat16 or float16 with float32 sums."""
    single: float
    """Operations per second in float32 outside the tensor cores, as with input_precision="ieee"."""
    bandwidth: float
    """Bytes per second."""
    shared: int
    """Bytes of shared memory per program."""


TARGETS = {
    80: Target("A100 40 GB (sm_80)", 312e12, 19.5e12, 1.555e12, 163 * 1024),
    90: Target("H100 SXM (sm_90)", 989e12, 67e12, 3.35e12, 227 * 1024),
}


@dataclass(frozen=True)
class Report:
    """The resources of one kernel on one target; memory in bytes."""

    label: str
    capability: int
    registers: int
    """Per thread."""
    shared: int
    """Per program."""
    stack: int
    """Per thread: mainly spilled registers."""
    local: int
    cubin: int
    roofline: float
    """A lower bound of the launch's time in seconds."""


def make_case(
    kernel: Any,
    dtype: str,
    options: dict[str, Any],
    label: str,
    operations: float,
    bytes: float,
    wide: Iterable[str] = (),
    integers: Iterable[str] = (),
) -> Case:
    """A case from the keyword arguments of a launch.

    Args:
        kernel: arguments that end in ``_ptr`` are pointers to ``dtype``, one of ``DTYPES``, those
            in ``wide`` to float32, those in ``integers`` to int32; ``scale`` is float32, and every
            other argument an int32.
        options: every constexpr and the launch options.
    """
    constants = {name: options[name] for name in kernel.arg_names if name in options}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = "fp32" if name in wide else "i32" if name in integers else dtype
            signature[name] = f"*{kind}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    warps, stages = options["num_warps"], options["num_stages"]
    return Case(kernel, signature, constants, warps, stages, label, operations, bytes)


def cases() -> Iterator[Case]:
    """The cases of every op."""
    for op in OPS:
        yield from importlib.import_module(f"xattn.kernels.{op}.triton").compile_cases()


def compile_case(case: Case, capability: int) -> Report:
    """Compile for ``capability``, 80 or 90.

    Pointers count as aligned to 16 bytes, like PyTorch's, and sizes as divisible by nothing in particular.

    Raises:
        ValueError: Triton is missing, runs in its interpreter, or was installed without ``cuobjdump``.
    """
    tool = _cuobjdump()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    pointers = [i for i, name in enumerate(names) if case.signature[name].startswith("*")]
    source = ASTSource(
        case.kernel,
        case.signature,
        case.constants,
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": True,
        },
    )
    cubin = compiled.asm["cubin"]
    registers, stack, static, local = resources(cubin, tool)
    return Report(
        case.label,
        capability,
        registers,
        static + compiled.metadata.shared,
        stack,
        local,
        len(cubin),
        roofline(case, TARGETS[capability]),
    )


def resources(cubin: bytes, tool: Path) -> tuple[int, int, int, int]:
    """Registers, stack, static shared memory and local memory, from ``cuobjdump -res-usage``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", run.stdout)
    if found is None:
        raise ValueError(f"{tool}: no resource usage in {(run.stdout + run.stderr)[:500]!r}")
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack, shared, local


def roofline(case: Case, target: Target) -> float:
    """A lower bound of the time of ``case`` on ``target``, in seconds."""
    half = any(kind in ("*bf16", "*fp16") for kind in case.signature.values())
    peak = target.tensor if half else target.single
    return max(case.operations / peak, case.bytes / target.bandwidth)


def check(reports: Iterable[Report]) -> list[str]:
    """One line per problem: spilled registers, or more shared memory than the target has."""
    failures = []
    for report in reports:
        target = TARGETS[report.capability]
        where = f"{report.label} on {target.name}"
        if report.stack or report.local:
            failures.append(f"{where} spills: stack {report.stack}, local {report.local} bytes")
        if report.shared > target.shared:
            failures.append(f"{where} needs {report.shared} bytes of shared memory")
    return failures


def table(reports: Iterable[Report]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| kernel | target | registers | shared KiB | stack | local | cubin KiB | roofline µs |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for r in reports:
        yield (
            f"| {r.label} | {TARGETS[r.capability].name} | {r.registers} | {r.shared / 1024:.1f} "
            f"| {r.stack} | {r.local} | {r.cubin / 1024:.1f} | {r.roofline * 1e6:.2f} |"
        )


def bench(filter: str | None = None) -> Iterator[str]:
    """Lines of the table of all kernels, or of those whose label contains each word of ``filter``.

    Raises:
        ValueError: raised at the end if kernels fail :func:`check`, with their names.
    """
    _cuobjdump()
    words = (filter or "").split()
    chosen = [case for case in cases() if all(word in case.label for word in words)]
    if not chosen:
        raise ValueError(
            f"filter: no kernel's label contains {filter!r}; try one of {', '.join(OPS)}"
        )
    reports: list[Report] = []

    def compiled() -> Iterator[Report]:
        for case in chosen:
            for capability in TARGETS:
                reports.append(compile_case(case, capability))
                yield reports[-1]

    yield from table(compiled())
    if failures := check(reports):
        raise ValueError("; ".join(failures))


def _cuobjdump() -> Path:
    if not HAS_TRITON:
        raise ValueError(f"bench kernels: {INSTALL}")
    if interpreted():
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler; unset it to compile kernels")
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        raise ValueError(f"{tool} is missing; install a Triton wheel that carries it")
    return tool
