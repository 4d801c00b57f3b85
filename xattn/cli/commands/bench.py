"""``xattn bench``: measure costs as ratios; each job has its own module."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from xattn.cli.checks import check_device, check_images
from xattn.cli.shared import Images
from xattn.runtime.arguments import Argument
from xattn.runtime.option_checks import AnyExcept, AppliesIf, Count

BACKBONES = ("tf_efficientnet_lite0", "vit_base_patch16_224", "resnet50")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure what explaining and training cost relative to the backbone alone, as ratios of times
    measured in the same run."""

    option_rules: ClassVar = (
        AppliesIf("images", job=["folder", "all"]),
        AppliesIf("backbones", job=["explain", "train", "folder", "all"]),
        AppliesIf("batches", job=["explain", "train", "all"]),
        AppliesIf("rounds", job=["explain", "train", "folder", "attention", "all"]),
        AppliesIf("aot", "filter", "limit", job="kernels"),
        AppliesIf("tokens", "only", "plot", job="attention"),
        AppliesIf("out", "small", "retry", "budget", job="gpu"),
        AppliesIf("device", job=["explain", "train", "folder", "all", "gpu"]),
        AppliesIf("raw", job=AnyExcept("gpu")),
    )

    job: Annotated[
        Literal["explain", "train", "folder", "attention", "kernels", "gpu", "all"],
        Argument(positional=True),
    ] = "all"
    """What to measure. explain: explaining relative to a forward pass; train: a training step relative to
    its lower bound; folder: images per second; all: these three; attention: mechanisms relative to dense
    attention; kernels: Triton kernels; gpu: the checks and measurements for the first hour on a GPU, with
    a report."""
    images: Images = ()
    """A folder of photos for the job "folder"; by default JPEG photos of 500 x 375 are created."""
    backbones: tuple[str, ...] = ()
    """timm models, which get random weights; by default tf_efficientnet_lite0, vit_base_patch16_224 and
    resnet50."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes; training steps are measured only at those above 1."""
    rounds: int | None = None
    """Number of rounds, of which the median is reported; by default 5 to 15, depending on the job."""
    aot: bool = False
    """For the job "kernels": compile the kernels for sm_80, 86, 90 and 120 (no GPU is needed) and check
    register spills and shared memory. This takes hours; use --filter to select some of the kernels."""
    filter: str | None = None
    """For the job "kernels": compile only those whose label contains each of these words, for example
    "softmax bf16 sm_90"."""
    limit: Count | None = None
    """For the job "kernels": compile only this many of them, drawn at random."""
    tokens: tuple[int, ...] = ()
    """For the job "attention": numbers of tokens, which must be square numbers; by default 256 1024 4096
    16384, and more on a GPU."""
    only: tuple[str, ...] = ()
    """For the job "attention": measure only these mechanisms, in addition to dense attention and lists of
    blocks; by default all."""
    plot: Path | None = None
    """For the job "attention": a .png or .svg file for a plot of time against the number of tokens."""
    out: Path | None = None
    """For the job "gpu": a folder for report.md, results.json and times.png; if it holds an unfinished
    run, that run is continued."""
    device: str | None = None
    """cuda, cuda:1 or cpu; by default the GPU, if there is one."""
    small: bool = False
    """For the job "gpu": use small sizes, which take minutes on a CPU."""
    retry: bool = False
    """For the job "gpu": measure rows that failed again."""
    budget: float = 60.0
    """For the job "gpu": time limit in seconds for the calls of one measurement; a measurement that would
    take longer is skipped, and its row says so."""
    raw: Path | None = None
    """A .csv file for the measurements of every round; for the job "kernels", for its table."""

    @property
    def folder(self) -> Path | None:
        return Path(self.images[0]) if self.images else None

    def check(self) -> None:
        if self.device is not None:
            check_device(self.device)
        if self.images:
            check_images(self.images)
        if len(self.images) > 1:
            raise ValueError(
                f"images: got more than one folder, such as {self.images[-1]}; give only one"
            )
        if self.job == "kernels" and not self.aot:
            raise ValueError("bench kernels: give --aot, which only compiles and measures no times")
        if not self.budget > 0:
            raise ValueError(f"budget: got {self.budget}; give a positive number of seconds")
        if self.job == "gpu" and self.out is None:
            raise ValueError("out: missing; give a folder for the report with --out")

    def run(self) -> None:
        from xattn.runtime.measuring import keep_table, record_rounds

        module, arguments = JOBS[self.job]
        lines = []
        with record_rounds(self.raw):
            for line in importlib.import_module(module).bench(**arguments(self)):
                print(line, flush=True)
                lines.append(line)
            if self.job == "kernels":
                keep_table(lines)


def _speed(options: Bench) -> dict[str, Any]:
    given: dict[str, Any] = {"job": options.job, "backbones": options.backbones or BACKBONES}
    given["device"] = options.device
    if options.job != "folder":
        given["batches"] = options.batches
    if options.job in ("folder", "all"):
        given["data"] = options.folder
    return {**given, "rounds": _rounds(options, 5 if options.job == "folder" else 15)}


def _rounds(options: Bench, default: int) -> int:
    return default if options.rounds is None else options.rounds


def _attention(options: Bench) -> dict[str, Any]:
    given = {"names": options.only, "tokens": options.tokens, "plot": options.plot}
    return {**given, "rounds": _rounds(options, 5)}


GPU = ("out", "small", "retry", "budget")
# For each job a module, whose ``bench`` yields the lines to print, and its arguments. The module is
# imported when its job runs.
JOBS: dict[str, tuple[str, Callable[[Bench], dict[str, Any]]]] = {
    **dict.fromkeys(("explain", "train", "folder", "all"), ("xattn.eval.bench.speed", _speed)),
    "attention": ("xattn.eval.bench.attention", _attention),
    "kernels": ("xattn.kernels.aot", lambda o: {"filter": o.filter, "limit": o.limit}),
    "gpu": (
        "xattn.eval.bench.gpu",
        lambda o: {"device": o.device or "cuda", **{x: getattr(o, x) for x in GPU}},
    ),
}
