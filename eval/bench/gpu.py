"""Runs all benchmarks on a GPU: whether the kernels are correct, how fast they are, and what layers cost.

    xattn bench gpu --out gpu/
    xattn bench gpu --out small/ --device cpu --small    (the same code with small sizes)

Each row is measured separately. If a measurement fails, for example because memory is exhausted, the reason
is stored in the row, and the next row is measured. A run can be resumed from ``results.json``, even after a
crash; the row during which it crashed then counts as failed.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xattn.attention import mechanism_class
from xattn.attention.model.spec import format_mechanism
from xattn.backbone import load_backbone
from xattn.eval.bench import attention, published, speed
from xattn.eval.bench.op_cases import (
    WITHOUT_TRITON,
    Sizes,
    cast_case,
    op_cases,
    outputs_and_gradients,
)
from xattn.eval.evaluation.engine import evaluate
from xattn.heads import create_head
from xattn.heads.attended import Tokens
from xattn.kernels.aot import DTYPES
from xattn.runtime.devices import check_available
from xattn.runtime.files import atomic_file
from xattn.runtime.measuring import Job, forward_and_both, ratios, seconds_of
from xattn.runtime.process import keep_memory

NOT_MEASURED = "not measured on a GPU"
PACKAGES = ("torch", "triton", "xattn", "timm", "flash-attn", "natten", "flash-linear-attention")
HEADLINES = (
    ("right", "holds", "checks of ops against float64 that pass"),
    ("limits", "TFLOP/s", "speed of the card in matrix products, TFLOP/s"),
    ("limits", "GB/s", "speed of the card in copies, GB/s"),
    ("kernels", "forward share", "share of these limits that kernels reach, forward"),
    ("kernels", "backward share", "share of these limits that kernels reach, backward"),
    ("mechanisms", "forward gain", "speed-up of mechanisms over flash attention, forward"),
    ("mechanisms", "graph gain", "the same as CUDA graphs"),
    ("mechanisms", "both gain", "the same, forward and backward"),
    ("published", "forward gain", "speed-up at the papers' settings over dense attention, forward"),
    ("published", "both gain", "the same, forward and backward"),
    ("whole", "holds", "ratios for explaining, training and fidelity that are within their limits"),
)  # fmt: skip
Cells = dict[str, Any]
Find = Callable[[str, str], Cells]
"""A function (section, row) -> the cells of a row that was measured earlier; empty if there are none."""
Rows = Iterator[tuple[str, Callable[[], Cells]]]
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Machine:
    """The device on which to measure, and whether to use small sizes."""

    device: torch.device
    small: bool
    budget: float = 60.0
    """The largest number of seconds that the calls for a single measured time may take."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32

    def normal(self) -> Callable[..., Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        options: Any = {"generator": generator, "device": self.device, "dtype": torch.float64}
        return lambda *shape: torch.randn(*shape, **options)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def ms(self, job: Job) -> float:
        """The median time of a call in milliseconds.

        On a GPU, it is measured with CUDA events and a cold cache; on a CPU, with a clock.

        Raises:
            TimeoutError: the calls would take longer than the budget.
        """
        calls = 8 if self.cuda else 3  # the smallest number of calls that a measurement needs
        took = seconds_of(job)
        if calls * took > self.budget:  # the first call may include compilation
            took = seconds_of(job)
        if calls * took > self.budget:
            raise TimeoutError(
                f"{calls} calls of {took:.3g} s each exceed the budget of {self.budget:g} s"
            )
        if self.cuda:
            return import_module("triton.testing").do_bench(job, rep=200, return_mode="median")
        return 1e3 * statistics.median(seconds_of(job) for _ in range(3))

    def both_ms(self, jobs: tuple[Job, Job]) -> Cells:
        """The times of a forward pass, and of a forward and backward pass.

        If a measurement exceeds the budget, its time and all later ones are left out, and the reason is
        recorded.
        """
        found: Cells = {}
        try:
            found["forward ms"] = forward = self.ms(jobs[0])
            both = self.ms(jobs[1])
            found |= {"backward ms": both - forward} if both > forward else {}
            found["both ms"] = both
            found |= {"graph ms": self.graph_ms(jobs[0])} if self.cuda else {}
        except TimeoutError as error:
            found["failed"] = _why(error)
        return found

    def graph_ms(self, job: Job) -> float | str:
        """The time of ``job`` as a CUDA graph, which excludes the time that the host needs to launch
        kernels.

        If the job cannot be captured, the result is a text with the reason.
        """
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            job()
        torch.cuda.current_stream().wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                job()
        except RuntimeError as error:
            return f"none: {str(error).splitlines()[0][:80]}"
        return self.ms(graph.replay)


# ---------------------------------------------------------------- right


def _right(here: Machine, find: Find) -> Rows:
    """The largest error of the outputs and gradients of an op, relative to the largest value in float64.

    A check holds if this error is at most three times the error of plain PyTorch in the same type, plus
    1e-5 (1e-2 in half precision)."""
    of = partial(Sizes, iterations=40)
    sizes = {"21 tokens": of(), "1 token": of(n=1, s=1), "34 heads": of(17, n=9, s=11)}
    if not here.small:
        sizes |= {
            "197 tokens": of(2, 3, 197, 197, 64, 64),
            "65,538 heads": of(32769, n=9, s=11),
        }
    places = {label: (here, size) for label, size in sizes.items()}
    if here.cuda and torch.cuda.device_count() > 1:
        places["device 1"] = (Machine(torch.device("cuda", 1), here.small), of())
    for label, (place, size) in places.items():
        for name in op_cases(place.normal(), size):
            for kind in DTYPES:
                yield f"{name}; {kind}; {label}", partial(_check, place, name, kind, size)


def _check(here: Machine, name: str, kind: str, sizes: Sizes) -> Cells:
    given, call = op_cases(here.normal(), sizes)[name]()
    given = cast_case(name, given, DTYPES[kind])
    backend = "triton" if here.cuda and name not in WITHOUT_TRITON else "cpu"
    run = partial(outputs_and_gradients, name, call)
    exact = run("reference", {key: x.double() for key, x in given.items()})
    near, found = run("reference", given), run(backend, given)
    errors = []
    # If a gradient is zero apart from rounding errors, its largest value must not be used as a divisor.
    least = max(1e-30, 0.1 * max(x.abs().max().item() for x in exact if x.is_floating_point()))
    for value, other, true in zip(found, near, exact, strict=True):
        if true.is_floating_point():
            top = true.abs().max().clamp_min(least)
            errors.append([((x.double() - true).abs().max() / top).item() for x in (value, other)])
    slack = 1e-5 if kind == "fp32" else 1e-2
    error, plain = (max(column) for column in zip(*errors, strict=True))
    holds = all(own <= 3 * other + slack for own, other in errors)
    return {"backend": backend, "error": error, "plain PyTorch": plain, "holds": holds}


# ---------------------------------------------------------------- kernels


def _limits(here: Machine, find: Find) -> Rows:
    """The speed that the card reaches in products of large matrices and in copies. Products in fp32 follow
    the IEEE standard; in tf32, the factors are rounded."""
    n, size = (256, 2**24) if here.small else (8192, 2**30)

    def product(dtype: torch.dtype, precision: str = "highest") -> Cells:
        a = torch.randn(n, n, device=here.device).to(dtype)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return {"sizes": f"{n} x {n}", "TFLOP/s": 2e-9 * n**3 / here.ms(lambda: a @ a)}
        finally:
            torch.set_float32_matmul_precision(before)

    def copy() -> Cells:
        a, b = torch.empty(2, size, dtype=torch.uint8, device=here.device)
        return {"sizes": f"{size:,} bytes", "GB/s": 2e-6 * size / here.ms(lambda: b.copy_(a))}

    for kind, dtype in DTYPES.items():
        yield kind, partial(product, dtype)
    if here.cuda:
        yield "tf32", partial(product, torch.float32, "high")
    yield "copy", copy


def _limit(find: Find, kind: str) -> tuple[float, str]:
    """The TFLOP/s that kernels can reach (0 if unknown), and the type in which they reach it.

    Kernels compute a product of float32 numbers as three products in TF32, unless the card is faster
    without.
    """
    reached = {x: find("limits", x).get("TFLOP/s", 0.0) for x in (kind, "tf32")}
    own = reached[kind], kind
    return max(own, (reached["tf32"] / 3, "tf32 / 3")) if kind == "fp32" else own


DENSE = Sizes(1, 12, 4096, 4096, 64, 64), Sizes(1, 2, 128, 128, 64, 64)
LISTS = Sizes(1, 12, 16384, 16384, 64, 64, 64, 64, 8), Sizes(1, 2, 128, 128, 64, 64, 16, 16, 4)
BLOCKS = Sizes(1, 12, 4096, 256, 64, 64, 64, 64), Sizes(1, 2, 128, 16, 64, 64, 16, 16)
WIDE = Sizes(4, 1, 4096, 4096, 768, 384), Sizes(1, 1, 128, 128, 96, 48)
# For each case: the number of products of width D per query-key pair, forward and backward (counted as in
# compile_cases; for softmax backward, the 5 that are needed), the sizes, and the number of pairs.
WORK: dict[str, tuple[int, int, tuple[Sizes, Sizes], Callable[[Sizes], float]]] = {
    "softmax, causal": (2, 5, DENSE, lambda z: z.heads * z.n**2),
    "block_sparse, all of the lists": (2, 5, LISTS, lambda z: 2 * z.heads * z.pairs),
    "grouped, all alike": (2, 5, LISTS, lambda z: 2 * z.heads * z.pairs),
    "ragged_queries": (2, 5, DENSE, lambda z: 0.4 * z.heads * z.n**2),
    "vecmat": (1, 0, DENSE, lambda z: z.heads * z.n**2 / 2),
    "vecmat, by gradients": (2, 0, DENSE, lambda z: z.heads * z.n**2 / 2),
    "covariance_solve": (15, 25, DENSE, lambda z: z.heads * z.n**2 / 2),
    "local_linear": (3, 11, DENSE, lambda z: z.heads * z.n**2 / 2),
    "softplus": (3, 8, DENSE, lambda z: z.heads * z.n**2 / 2),
    "causal_product": (2, 6, DENSE, lambda z: z.heads * z.n * z.values),
    "pooling": (2, 4, WIDE, lambda z: 12 * z.batch * z.n),
    "block_topk": (1, 0, BLOCKS, lambda z: 2 * z.heads * z.n * z.s),
}  # fmt: skip


def _kernels(here: Machine, find: Find) -> Rows:
    """The speed of each kernel as a share of the speed that the card reaches in matrix products or in
    copies, whichever of the two is the limit. The bytes include inputs, outputs and gradients."""
    for name in WORK:
        for kind in DTYPES:
            yield f"{name}; {kind}", partial(_kernel, here, find, name, kind)


def _kernel(here: Machine, find: Find, name: str, kind: str) -> Cells:
    forward, backward, both_sizes, pairs = WORK[name]
    z = both_sizes[here.small]
    given, call = op_cases(here.normal(), z)[name]()
    given = {key: x.requires_grad_() for key, x in cast_case(name, given, DTYPES[kind]).items()}

    def run(*tensors: Tensor) -> Tensor:
        options = dict(zip(given, tensors, strict=True))
        out = call(**options, backend="triton" if here.cuda else "cpu")
        return out[-1 if name == "block_topk" else 0] if isinstance(out, tuple) else out

    with torch.no_grad():
        grad = torch.randn_like(run(*given.values()))
    jobs = forward_and_both(run, list(given.values()), grad)
    sizes = [f"{key} {' x '.join(map(str, x.shape))}" for key, x in given.items()]
    found: Cells = {"sizes": ", ".join(sizes[:2])}
    found |= here.both_ms(jobs) if backward else {"forward ms": here.ms(jobs[0])}
    (peak, limit), band = _limit(find, kind), find("limits", "copy").get("GB/s")
    moved = sum(x.nbytes for x in (*given.values(), grad))
    for which, products, bytes in (("forward", forward, moved), ("backward", backward, 2 * moved)):
        if ms := found.get(f"{which} ms"):
            done, gigabytes = 2e-9 * products * pairs(z) * z.width, 1e-6 * bytes
            found |= {f"{which} TFLOP/s": done / ms, f"{which} GB/s": gigabytes / ms}
            if peak and band:
                least, by = max((done / peak, limit), (gigabytes / band, "copy"))
                found |= {f"{which} share": least / ms, f"{which} limit": by}
    return found


# ---------------------------------------------------------------- layers


def _mechanisms(here: Machine, find: Find) -> Rows:
    """Mechanisms compared with flash attention, for one image and 6 heads of width 64, in bfloat16 on a
    GPU. 197 tokens are 14 x 14 patches and a class token. "Both" means a forward and a backward pass."""
    for n in (65, 256) if here.small else (197, 1024, 4096, 16384, 65536):
        yield f"{attention.DENSE}; {n}", partial(_mechanism, here, find, n)
        for name in attention.default_mechanisms():
            for options in mechanism_class(name).entry.bench:
                job = partial(_mechanism, here, find, n, name, options)
                yield f"{format_mechanism(name, options)}; {n}", job


def _mechanism(
    here: Machine, find: Find, n: int, name: str = "", options: Mapping[str, Any] | None = None
) -> Cells:
    made, _ = attention.jobs(
        [name] if name else [], n, str(here.device), here.dtype, low_rank=False, lists=False,
        options=[options or {}],
    )  # fmt: skip
    jobs = list(made.values())[-1]  # the mechanism or, without a name, dense attention
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if here.cuda and not name else nullcontext():
        found = here.both_ms(jobs)
    return found | _gains(found, find("mechanisms", f"{attention.DENSE}; {n}"))


def _gains(found: Cells, dense: Cells) -> Cells:
    """The speed-ups over the times in ``dense``, an earlier row."""
    pairs = {x: (dense.get(f"{x} ms"), found.get(f"{x} ms")) for x in (*PASSES, "graph")}
    return {
        f"{x} gain": a / b
        for x, (a, b) in pairs.items()
        if isinstance(a, float) and isinstance(b, float)
    }


def _published(here: Machine, find: Find) -> Rows:
    """The settings of papers, compared with dense attention and with other libraries that are installed."""
    for setting in published.SETTINGS:
        for what in (attention.DENSE, published.OURS, *published.other_libraries(setting)):
            row = f"{setting.mechanism}; {what}"
            yield row, partial(_setting, here, find, setting, what)
    yield "efficient_probe; multi-head", partial(_probe, here)


def _setting(here: Machine, find: Find, setting: published.Setting, what: str) -> Cells:
    s = setting.shrunk() if here.small else setting
    found: Cells = {"tokens": " x ".join(map(str, s.grid))}
    found["heads"] = f"{s.heads} of {s.width}, {s.kv_heads} of keys"
    found |= here.both_ms(published.layer_of(s, here.device, here.dtype).jobs(what))
    found |= _gains(found, find("published", f"{setting.mechanism}; {attention.DENSE}"))
    if what == published.OURS:
        found |= {f"{x} published": getattr(s, x) or "" for x in PASSES}
        found["options"] = ", ".join(f"{key}={value}" for key, value in s.options.items())
        found["published figures are of"] = s.against
    return found


def _probe(here: Machine) -> Cells:
    """A training step of the pooling of efficient probing, compared with multi-head attention."""
    name, batch = ("vit_tiny_patch16_224", 2) if here.small else ("vit_base_patch16_224", 64)
    backbone = load_backbone(name, weights=None, device=here.device)
    head: Any = create_head("efficient_probe", backbone, queries=32, norm=False).to(here.device)
    width, query = backbone.channels[-1], torch.zeros(batch, 1, backbone.channels[-1])
    x = torch.randn(batch, 196, width).to(here.device)
    tokens = Tokens((x,) * head.num_taps, x[:, :1], (14, 14))
    other = nn.MultiheadAttention(width, 32, bias=False, batch_first=True).to(here.device)
    query = query.to(here.device)

    def step(module: nn.Module, pool: Callable[[], Tensor]) -> Job:
        def job() -> None:
            module.zero_grad(set_to_none=True)
            pool().sum().backward()

        return job

    ours = here.ms(step(head, lambda: head.pooled(head.attend(tokens))))
    base = here.ms(step(other, lambda: other(query, x, x, need_weights=False)[0]))
    found: Cells = {"tokens": "196", "heads": f"32 queries, {width} wide, batch {batch}"}
    found |= {"both ms": ours, "both gain": base / ours, "both published": 10.0}
    return {**found, "published figures are of": "at most, over multi-head cross-attention"}


# ---------------------------------------------------------------- whole


def _whole(here: Machine, find: Find) -> Rows:
    """Explaining, training and measuring fidelity, as ratios of times from the same run."""
    batches, rounds = ((1, 2), 1) if here.small else ((1, 8, 32), 15)
    for name in speed.TARGETS[:1] if here.small else (*speed.TARGETS, "resnet50"):
        for job in ("explain", "train"):
            options = {"job": job, "backbones": (name,), "batches": batches, "rounds": rounds}
            yield f"{job}; {name}", partial(_ratios, here, options)
    yield f"fidelity; {speed.TARGETS[0]}", partial(_fidelity, here, rounds)


def _ratios(here: Machine, options: Cells) -> Cells:
    lines = list(speed.bench(**options, device=str(here.device)))
    ends = [line.split("|")[-2].strip() for line in lines if line.startswith("| ")]
    return {"holds": "no" not in ends, "lines": lines}


class FixedMaps:
    """An explainer that returns smooth maps without forward passes, so that only the metric is timed."""

    is_mask, forwards = False, 0

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(inputs.mean(1, keepdim=True), 32)


def _fidelity(here: Machine, rounds: int) -> Cells:
    """The time of AD, IC, ADD and AG at three levels, divided by the time of their 7 passes per image."""
    backbone = load_backbone(speed.TARGETS[0], weights=None, device=here.device)
    batch = 2 if here.small else 64
    images = torch.rand(batch, 3, *backbone.preprocessing.input_size)
    moved = images.to(here.device)

    @torch.no_grad()
    def passes() -> None:
        for _ in range(7):
            backbone.logits(moved)

    def metric() -> None:
        evaluate(backbone, {"given": FixedMaps()}, images, max_forward_batch=batch, progress=False)

    ratio = ratios({"passes": passes, "metric": metric}, "passes", rounds)["metric"]
    return {"ratio": ratio, "at most": 1.1, "holds": ratio <= 1.1}


SECTIONS: dict[str, Callable[[Machine, Find], Rows]] = {
    "right": _right,
    "limits": _limits,
    "kernels": _kernels,
    "mechanisms": _mechanisms,
    "published": _published,
    "whole": _whole,
}


# ---------------------------------------------------------------- the run and its report


class Results:
    """The measurements, stored in ``results.json``."""

    def __init__(self, folder: Path, about: Cells, retry: bool) -> None:
        self.path, self.about, self.commit = folder / "results.json", about, commit()
        self.rows: list[Cells] = []
        if self.path.is_file():
            known = json.loads(self.path.read_text(encoding="utf-8"))
            other = [key for key in about if known["about"].get(key) != about[key]]
            if other:
                raise ValueError(
                    f"out: {folder} contains a run with a different {', '.join(other)}; give a new folder"
                )
            crashed = [{**x, "failed": "the process ended in this row"} for x in known["running"]]
            self.rows = [x for x in known["rows"] + crashed if not (retry and "failed" in x)]

    def find(self, section: str, row: str) -> Cells:
        return next((x for x in self.rows if (x["section"], x["row"]) == (section, row)), {})

    def save(self, *running: Cells) -> None:
        state = {"about": self.about, "running": running, "rows": self.rows}
        with atomic_file(self.path, "out") as path:
            path.write_text(json.dumps(state, indent=1), encoding="utf-8")

    def measure(self, section: str, row: str, job: Callable[[], Cells], here: Machine) -> Cells:
        """Measure a row, or record why it failed.

        If CUDA no longer works afterwards, this process is replaced by a new one that resumes the run.
        """
        found: Cells = {"section": section, "row": row, **self.commit}
        self.save(found)
        try:
            found |= job()
            here.synchronize()
        except Exception as error:
            found["failed"] = _why(error)
        except BaseException:  # stopped by the user; the row is measured when the run is resumed
            self.save()
            raise
        self.rows.append(found)
        self.save()
        gc.collect()
        try:
            here.synchronize()
        except RuntimeError:
            # Without --retry, the row that failed is not measured again, so this cannot go on forever.
            again = [word for word in sys.orig_argv[1:] if word != "--retry"]
            os.execv(sys.executable, [sys.executable, *again])
        if here.cuda:
            torch.cuda.empty_cache()
        return found


def bench(
    out: Path, device: str = "cuda", small: bool = False, retry: bool = False, budget: float = 60.0
) -> Iterator[str]:
    """Yield the rows as they are measured, and write a report; for the arguments, see ``xattn bench
    --help``.

    Raises:
        ValueError: there is no such device, or ``out`` contains a run from a different machine.
    """
    check_available(device)
    here = Machine(torch.device(device), small, budget)
    if here.device.index is not None:
        torch.cuda.set_device(here.device)
    keep_memory()
    out = Path(out)
    results = Results(out, about(here), retry)
    for section, rows in SECTIONS.items():
        for row, job in rows(here, results.find):
            if not results.find(section, row):
                found = results.measure(section, row, job, here)
                cells = [f"{x} {_word(found[x])}" for x in found if x not in ("lines", "commit")]
                yield ", ".join(cells)
    lines = report(results.about, results.rows)
    with atomic_file(out / "report.md", "out") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(results.rows, out / "times.png")
    yield f"report: {out / 'report.md'}"


def about(here: Machine) -> Cells:
    """Facts about the machine and the software on which the figures depend."""
    found: Cells = {"card": "a CPU", "device": str(here.device), "small sizes": here.small}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found |= {"python": platform.python_version(), "CPU threads": torch.get_num_threads()}
    if here.cuda:
        card = torch.cuda.get_device_properties(here.device)
        found["card"] = (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}"
        )
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {"CUDA": torch.version.cuda, "driver": driver or "unknown"}
    return found


def commit() -> Cells:
    """The commit of this checkout; empty if the code is not in a git repository.

    It is stored for each row, since the code may change before a run is resumed.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {}
    said = _said("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*")
    return {"commit": said} if said else {}


def _said(*command: str) -> str:
    """The first line of a program's output; "" if there is no such program."""
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    return ""


def report(about: Cells, rows: list[Cells]) -> Iterator[str]:
    """Yield the lines of a report in Markdown."""
    yield f"# xattn on {about['card']}\n"
    commits = dict.fromkeys(f"commit {row['commit']}" for row in rows if "commit" in row)
    yield ", ".join([*(f"{key} {_word(x)}" for key, x in about.items()), *commits]) + "\n"
    if about.get("small sizes"):
        yield "The sizes are small, so the times on this page do not show how fast anything is.\n"
    yield from headlines(rows)
    for section, made in SECTIONS.items():
        own = [row for row in rows if row["section"] == section]
        yield f"\n## {section.capitalize()}\n\n{' '.join((made.__doc__ or '').split())}\n"
        if not own:
            continue
        columns = list(dict.fromkeys(key for row in own for key in row))
        columns = [key for key in columns if key not in ("section", "lines", "commit")]
        yield f"| {' | '.join(columns)} |"
        words = {key for row in own for key, x in row.items() if x and isinstance(x, str)}
        yield f"|{'|'.join(' :-- ' if key in words else ' --: ' for key in columns)}|"
        for row in own:
            yield f"| {' | '.join(_word(row.get(key, '')) for key in columns)} |"
        for row in own:
            if "lines" in row:
                yield "\n".join([f"\n### {row['row']}\n", *row["lines"]])


def headlines(rows: list[Cells]) -> Iterator[str]:
    """Yield the lines of a table with the main results; results that are missing are marked as such."""
    yield "| quantity | rows | failed | median | range |\n| :-- | --: | --: | --: | :-- |"
    for section, key, what in HEADLINES:
        own = [row for row in rows if row["section"] == section]
        if section == "published":  # without the rows of other libraries
            own = [row for row in own if row["row"].endswith(f"; {published.OURS}")]
        values = [row[key] for row in own if isinstance(row.get(key), float | int)]
        failed = sum("failed" in row and key not in row for row in own)
        cells = [NOT_MEASURED, ""]
        if values and key == "holds":
            cells = [f"{sum(values)} of {len(values)}", ""]
        elif values:
            cells = [
                _word(statistics.median(values)),
                f"{_word(min(values))} to {_word(max(values))}",
            ]
        count = len(values) + failed
        yield f"| {' | '.join([what, str(count or ''), str(failed or ''), *cells])} |"


def draw(rows: list[Cells], path: Path) -> None:
    """Plot the forward time of each mechanism over the number of tokens."""
    times: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["section"] == "mechanisms" and "forward ms" in row:
            name, n = row["row"].split("; ")
            times.setdefault(name, []).append((int(n), row["forward ms"] / 1e3))
    if times:
        attention.draw(times, path)


def _word(x: Any) -> str:
    if isinstance(x, bool):
        return "yes" if x else "no"
    if not isinstance(x, float):
        return str(x).replace("|", "/")
    return f"{x:,.0f}" if 1000 <= x < 1e6 else f"{x:.3g}"


def _why(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:160] if said else ''}"
