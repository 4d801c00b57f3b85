"""Compares the cost of metrics with that of the bare forward passes they need, as ratios within a run.

    python -m xattn.eval.studies bench-fidelity

Each round runs every job once, in turn, and ratios are taken within a round. The maps are given, so only
metrics, scheduler and state are timed. Both sides run the same passes in micro-batches of equal size,
with images of realistic size and random weights.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone, load_backbone
from xattn.eval.bench.gpu import FixedMaps
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.fills.imputation import impute
from xattn.eval.functional import quantile, saliency
from xattn.eval.metrics.base import PerturbationMetric
from xattn.eval.metrics.registry import create_metric
from xattn.eval.metrics.road import RoadMetric
from xattn.runtime.measuring import Job, keep_rounds, median_ratio, times
from xattn.runtime.process import keep_memory

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


def photos_like(backbone: Backbone, count: int) -> Tensor:
    """(count, 3, H, W) smooth random images with some noise."""
    generator = torch.Generator().manual_seed(0)
    size = backbone.preprocessing.input_size
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return (smooth + 0.05 * torch.randn(count, 3, *size, generator=generator)).clamp(0, 1)


def study(
    model: str = "tf_efficientnet_lite0", rounds: int = 7, batches: Sequence[int] = (16, 32)
) -> Iterator[str]:
    """Yield the lines of the tables as they are measured."""
    kept = keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield f"{device}, {torch.get_num_threads()} threads, raised allocator thresholds: {kept}"
    backbone = load_backbone(model, weights=None, device=device)
    backbone.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = _best_batch(backbone, batches)
    yield f"{model}, micro-batches of {batch}\n"
    yield "| job | of | median ratio | rounds | at most | holds |"
    yield "| :-- | :-- | --: | :-- | --: | :-- |"
    yield from _metric_rows(backbone, batch, rounds)
    yield from _road_rows(backbone, batch, rounds)
    yield from _scaling_row(model)
    yield "\npeak memory of one process per row, in MB; in parentheses, the difference from the first row\n"
    yield "| images | steps | explainers | peak |"
    yield "| --: | --: | --: | --: |"
    yield from _memory_rows(model)


def _best_batch(backbone: Backbone, batches: Sequence[int]) -> int:
    """The batch size whose passes are fastest."""
    images = photos_like(backbone, max(batches)).to(backbone.device)
    jobs = {str(size): _passes(backbone, images, 2 * max(batches), size) for size in batches}
    took = times(jobs, 3, of="batch size")
    return int(min(took, key=lambda size: statistics.median(took[size])))


def _passes(backbone: Backbone, images: Tensor, count: int, batch: int) -> Job:
    """``count`` bare forward passes in micro-batches."""
    full = images[:batch] if len(images) >= batch else images.repeat(batch, 1, 1, 1)[:batch]

    @torch.no_grad()
    def job() -> None:
        for _ in range(-(-count // batch)):
            backbone.logits(full)

    return job


def _evaluation(backbone: Backbone, images: Tensor, probe: PerturbationMetric, batch: int) -> Job:
    def job() -> None:
        evaluate(
            backbone,
            {"given": FixedMaps()},
            images,
            metrics=[probe],
            max_forward_batch=batch,
            progress=False,
        )

    return job


def _metric_rows(backbone: Backbone, batch: int, rounds: int) -> Iterator[str]:
    mean = tuple(backbone.preprocessing.mean)
    curves = create_metric("insertion-deletion", None, mean)
    cases = (
        ("AD, IC, ADD, AG at three levels", create_metric("masking"), 2 * batch, 7, 1.1),
        ("insertion and deletion, 56 steps each", curves, 4, 112, 1.15),
    )
    for label, probe, count, passes, most in cases:
        images = photos_like(backbone, count)
        jobs = {
            "job": _evaluation(backbone, images, probe, batch),
            "floor": _passes(backbone, images, count * passes, batch),
        }
        took = times(jobs, rounds, of=label)
        yield _row(label, f"{passes} passes per image", took["job"], took["floor"], most)


def _road_rows(backbone: Backbone, batch: int, rounds: int) -> Iterator[str]:
    image = photos_like(backbone, 1)
    grey, _ = saliency(FixedMaps().attribute(image, image), image.shape[-2:])
    removed = torch.stack(
        [grey[0] >= quantile(grey.flatten(1), 1 - level).view(1, 1, 1) for level in LEVELS]
    )
    jobs: dict[str, Job] = {"ours": lambda: impute(image, removed, noise=0.01, seed=0)}
    library = _library_imputer(image, removed)
    if library is not None:
        jobs["library"] = library
    took = times(jobs, rounds, of="ROAD imputation, 7 levels")
    if library is not None:
        ratios = [b / a for a, b in zip(took["ours"], took["library"], strict=True)]
        yield (
            f"| ROAD imputation, 7 levels | faster than pytorch-grad-cam's | "
            f"{statistics.median(ratios):.1f}x | {min(ratios):.1f} to {max(ratios):.1f} | "
            f"at least 8x | {'yes' if statistics.median(ratios) >= 8 else 'no'} |"
        )
    else:
        yield "| ROAD imputation, 7 levels | pytorch-grad-cam is not installed | | | | |"
    images = photos_like(backbone, 4)
    jobs = {
        "job": lambda: _morf(backbone, images, RoadMetric(), batch),
        "floor": _passes(backbone, images, 8 * len(images), batch),
    }
    took = times(jobs, rounds, of="ROAD, MoRF in total")
    yield _row("ROAD, MoRF in total", "8 passes per image", took["job"], took["floor"], 6)


def _morf(backbone: Backbone, images: Tensor, probe: Any, batch: int) -> None:
    """Run only the probe's first requests, which are those of MoRF."""
    grey, _ = saliency(FixedMaps().attribute(images, images), images.shape[-2:])
    flat = grey.flatten(1)
    perturbed = [images]
    for i in range(len(images)):
        cuts = [quantile(flat[i : i + 1], 1 - level) for level in probe.levels]
        removed = torch.stack([grey[i] >= cut for cut in cuts])
        perturbed.append(impute(images[i : i + 1], removed, noise=probe.noise, seed=0))
    with torch.no_grad():
        for part in torch.cat(perturbed).split(batch):
            backbone.probabilities(backbone.logits(part.to(backbone.device)))


def _library_imputer(image: Tensor, removed: Tensor) -> Callable[[], None] | None:
    """pytorch-grad-cam's imputer on the same masks, level by level; None if it is not installed."""
    try:
        from pytorch_grad_cam.metrics.road import NoisyLinearImputer
    except ImportError:
        return None
    imputer = NoisyLinearImputer(noise=0.01)

    def job() -> None:
        for mask in removed:
            imputer(image[0], (~mask[0]).float())

    return job


# ---------------------------------------------------------------- separate processes

_JOB = """
import sys, time
from pathlib import Path
import torch
from xattn.runtime.process import keep_memory
from xattn.backbone import load_backbone
from xattn.runtime.distributed import leave_group, processes
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.bench.gpu import FixedMaps
from xattn.eval.studies.benches.fidelity import photos_like
from xattn.eval.metrics import create_metric

name, count, steps, explainers = sys.argv[1], *map(int, sys.argv[2:5])
keep_memory()
torch.set_num_threads(1)
torch.manual_seed(0)  # of the random weights
backbone = load_backbone(name, weights=None)
backbone.model.to(memory_format=torch.channels_last)
ranks, rank = processes(backbone.device)
one = photos_like(backbone, 8)
images = (one[i % 8] * (1 - 0.001 * (i // 8)) for i in range(count))
probe = create_metric("insertion-deletion", steps=steps)
def run(images):
    return evaluate(backbone, {str(i): FixedMaps() for i in range(explainers)}, images,
                    metrics=["masking", probe], max_forward_batch=8, progress=False)
run(one)
started = time.perf_counter()
results = run(images)
seconds = time.perf_counter() - started
if rank == 0:
    # ru_maxrss would include the peak of the process that started this one
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    total = sum(results.mean("0", m) for m in ("insertion", "deletion"))
    print(f"{seconds} {peak} {total!r}")
leave_group()
"""


def _own_process(name: str, count: int, steps: int, explainers: int, ranks: int = 1) -> list[float]:
    """The seconds, peak MB and sum of two means of an evaluation in separate single-threaded processes."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.py"
        script.write_text(_JOB, encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *(launcher if ranks > 1 else []), str(script)]
        command += [name, str(count), str(steps), str(explainers)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench: a process failed: {done.stderr.strip()[-500:]}")
    return [float(v) for v in done.stdout.split()[-3:]]


def _scaling_row(name: str) -> Iterator[str]:
    ratios, equal = [], True
    for _ in range(3):
        one, two = (_own_process(name, 64, 28, 1, ranks) for ranks in (1, 2))
        keep_rounds("processes", "1", one[:1])
        keep_rounds("processes", "2", two[:1])
        ratios.append(two[0] / one[0])
        equal = equal and one[2] == two[2]
    middle = statistics.median(ratios)
    yield (
        f"| 2 processes of one thread, {'equal' if equal else 'OTHER'} values | 1 such process | "
        f"{middle:.2f}x | {min(ratios):.2f} to {max(ratios):.2f} | 0.60x | "
        f"{'yes' if middle <= 0.6 and equal else 'no'} |"
    )


def _memory_rows(name: str) -> Iterator[str]:
    base = None
    for count, steps, explainers in (
        (8, 14, 1),
        (32, 14, 1),
        (128, 14, 1),
        (8, 56, 1),
        (8, 224, 1),
        (8, 14, 4),
        (8, 14, 16),
    ):
        peak = _own_process(name, count, steps, explainers)[1]
        keep_rounds(
            f"{count} images, {steps} steps, {explainers} explainers", "", [peak], "peak MB"
        )
        base = peak if base is None else base
        yield f"| {count} | {steps} | {explainers} | {peak:.0f} ({peak - base:+.0f}) |"


def _row(label: str, of: str, job: list[float], floor: list[float], most: float) -> str:
    ratio = median_ratio(job, floor)
    each = [a / b for a, b in zip(job, floor, strict=True)]
    return (
        f"| {label} | {of} | {ratio:.2f}x | {min(each):.2f} to {max(each):.2f} | {most:.2f}x | "
        f"{'yes' if ratio <= most else 'no'} |"
    )
