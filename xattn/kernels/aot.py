"""Checks the Triton kernels by compiling them ahead of time for GPUs that need not be present.

Each kernel's registers, shared memory and spills are read from its cubin, for the tiles and options that a
launch would use. The roofline time, max(operations / peak, bytes / bandwidth) (Williams, Waterman,
Patterson 2009), is a lower bound for any implementation.
"""

from __future__ import annotations

import importlib
import random
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xattn.kernels.backend import HAS_TRITON, INSTALL, interpreted

OPS = (
    "softmax", "block_sparse", "grouped", "block_topk", "vecmat", "pooling", "covariance_solve",
    "local_linear", "softplus", "ragged_queries", "causal_product",
)  # fmt: skip
"""Folders of ``xattn.kernels`` with Triton kernels."""

SIZES = ("any", "16", "1")
"""The cases for which a launch compiles a kernel separately: integers with no particular divisor,
multiples of 16, or all equal to 1."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (16, 24, 32, 48, 64, 80, 96, 128)
"""Widths of heads; tiles are padded to powers of two, so each tile is compiled both full and with a
masked remainder."""
OTHER = {"PRECISION": "tf32", "UNIT": 1}
"""Alternatives that a launch may use instead of a case's constant: a single TF32 product for products
of float32, where PyTorch's products may do so, and rows that do not begin at a multiple of 8
elements."""


@dataclass(frozen=True)
class Case:
    """A kernel for tensors of one shape: the arguments of :func:`triton.compile`, and the work for the
    roofline."""

    kernel: Any
    signature: dict[str, str]
    """Argument name to type: "*bf16", "*fp16", "*fp32", "*i32", "i32", "i64", "fp32" or "constexpr"."""
    constants: dict[str, Any]
    """Value of every constexpr."""
    num_warps: int
    num_stages: int
    label: str
    """The name in the table, for example "softmax forward bf16 D=64"."""
    operations: float
    """Floating-point operations of the launch."""
    bytes: float
    """The smallest number of bytes that it reads and writes."""
    sizes: tuple[str, ...] = SIZES
    """The ``SIZES`` that launches compile it for."""

    @property
    def half(self) -> bool:
        """Whether the kernel reads or writes half precision."""
        return any(kind in ("*bf16", "*fp16") for kind in self.signature.values())


@dataclass(frozen=True)
class Target:
    """A GPU with its published figures."""

    name: str
    tensor: float
    """Dense operations per second in bfloat16 or float16 with float32 sums."""
    single: float
    """Operations per second in float32, by its own units or by three products in TF32 ("tf32x3"),
    whichever is faster."""
    bandwidth: float
    """Bytes per second."""
    shared: int
    """Bytes of shared memory per program."""


TARGETS = {
    80: Target("A100 40 GB (sm_80)", 312e12, 52e12, 1.555e12, 163 * 1024),
    86: Target("A10 (sm_86)", 125e12, 31.2e12, 600e9, 99 * 1024),
    90: Target("H100 SXM (sm_90)", 989e12, 165e12, 3.35e12, 227 * 1024),
    120: Target("RTX 5090 (sm_120)", 209.5e12, 104.8e12, 1.792e12, 99 * 1024),
}


@dataclass(frozen=True)
class Report:
    """The resources of one kernel on one target; memory in bytes."""

    label: str
    """The label of the case, followed by its ``SIZES``."""
    capability: int
    registers: int
    """Registers per thread."""
    shared: int
    """Shared memory per program."""
    stack: int
    """Local memory per thread, mainly spilled registers."""
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
    sizes: tuple[str, ...] = SIZES,
) -> Case:
    """Make a case from the keyword arguments of a launch.

    Args:
        kernel: arguments whose names end in ``_ptr`` are pointers: to float32 for names in ``wide``, to
            int32 for names in ``integers``, and otherwise to ``dtype``, which is one of ``DTYPES``.
            ``scale`` is a float32, and every other argument is an int32.
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
    return Case(kernel, signature, constants, warps, stages, label, operations, bytes, sizes)


def cases() -> Iterator[Case]:
    """Yield the cases of every op. Each is followed by its variants with a constant from ``OTHER``, which
    are compiled only for the sizes "any"."""
    for op in OPS:
        for case in importlib.import_module(f"xattn.kernels.{op}.triton").compile_cases():
            yield case
            for name, other in OTHER.items():
                if name in case.constants and not (case.half and other == "tf32"):
                    change = {"constants": {**case.constants, name: other}, "sizes": ("any",)}
                    yield replace(case, label=f"{case.label} {name}={other}", **change)


def compile_case(case: Case, capability: int, sizes: str = "any") -> Report:
    """Compile for ``capability`` (one of ``TARGETS``) in the same way as a launch with ``sizes`` (one of
    ``SIZES``).

    Pointers count as aligned to 16 bytes, like PyTorch's.

    Raises:
        ValueError: Triton is missing, runs in its interpreter, or lacks ``cuobjdump``.
    """
    tool = _cuobjdump()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants = dict(case.signature), dict(case.constants)
    divisible = []
    for at, (name, kind) in enumerate(case.signature.items()):
        whole = kind in ("i32", "i64")
        if kind.startswith("*") or (whole and sizes == "16"):
            divisible.append(at)
        elif whole and sizes == "1":
            signature[name], constants[name] = "constexpr", 1
    source = ASTSource(
        case.kernel, signature, constants, {(at,): [["tt.divisibility", 16]] for at in divisible}
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
        f"{case.label}, sizes {sizes}",
        capability,
        registers,
        static + compiled.metadata.shared,
        stack,
        local,
        len(cubin),
        roofline(case, TARGETS[capability]),
    )


def resources(cubin: bytes, tool: Path) -> tuple[int, int, int, int]:
    """Return registers, stack, static shared memory and local memory, as ``cuobjdump -res-usage`` reports
    them."""
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
    """Return a lower bound of the time of ``case`` on ``target``, in seconds."""
    peak = target.tensor if case.half else target.single
    return max(case.operations / peak, case.bytes / target.bandwidth)


def check(reports: Iterable[Report]) -> list[str]:
    """Return one line per problem: spilled registers, or more shared memory than the target has."""
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


def bench(filter: str | None = None, limit: int | None = None) -> Iterator[str]:
    """Lines of the table of kernels for all targets and sizes, followed by the spills of each kernel.

    ``filter`` is one or several words; only kernels whose labels contain all of them are compiled. A label
    ends with the target, such as "sm_80". If ``limit`` is given, only this many kernels are compiled, drawn
    with seed 0.

    Raises:
        ValueError: at the end, if any kernel fails :func:`check`.
    """
    _cuobjdump()
    words = (filter or "").split()
    chosen = [
        (case, capability, sizes)
        for case in cases()
        for capability in TARGETS
        for sizes in case.sizes
        if all(word in f"{case.label}, sizes {sizes} sm_{capability}" for word in words)
    ]
    if not chosen:
        raise ValueError(
            f"filter: no kernel's label contains {filter!r}; try one of {', '.join(OPS)}"
        )
    if limit is not None and limit < len(chosen):
        yield f"{limit} of {len(chosen)} compilations, drawn with seed 0"
        yield ""
        chosen = random.Random(0).sample(chosen, limit)
    reports: list[Report] = []

    def compiled() -> Iterator[Report]:
        for one in chosen:
            reports.append(compile_case(*one))
            yield reports[-1]

    yield from table(compiled())
    yield ""
    yield from by_kernel(reports)
    if failures := check(reports):
        raise ValueError(
            f"{len(failures)} of {len(reports)} compilations spill or need more shared memory than "
            f"there is; the first: {failures[0]}"
        )


def by_kernel(reports: Iterable[Report]) -> Iterator[str]:
    """Lines of a list: for each kernel, the number of compilations that spill, and the largest spill in
    bytes per thread."""
    found: dict[str, list[int]] = {}
    for report in reports:
        name = re.split(r" (?:bf16|fp16|fp32)", report.label)[0]
        found.setdefault(name, []).append(report.stack + report.local)
    for name, spilled in found.items():
        some = sum(count > 0 for count in spilled)
        most = f"{some}, at most {max(spilled)} bytes" if some else "none"
        yield f"- {name}: {len(spilled)} compilations, spills: {most}"


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
