"""Measures how pruning changes a network: its accuracy, predictions, parameters and throughput.

:func:`write` saves the pruned network together with these figures, see :mod:`xattn.backbone.pruning`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xattn.backbone import Backbone
from xattn.backbone.fingerprint import sha256
from xattn.backbone.pruning import save_pruned
from xattn.config import PruneConfig
from xattn.eval.bootstrap import mean_interval
from xattn.photos.base import Data
from xattn.photos.labels import true_classes
from xattn.runtime.measuring import processor_clock, times
from xattn.runtime.tables import markdown
from xattn.training.pruning_run import PruneResult, split

STAGES = {
    "whole": "whole network",
    "routed": "with routers",
    "cut": "pruned",
    "trained": "pruned and trained",
}
BATCH, ROUNDS = 16, 5  # defaults for measuring throughput


def check_can_be_saved(backbone: Backbone) -> None:
    """Raise a ``ValueError`` unless timm can create the network from its name."""
    import timm

    if not timm.is_model(backbone.name):
        raise ValueError(
            f"backbone: {backbone.name} is not a timm model, so the saved network could not be loaded "
            "again; choose a timm ViT, such as vit_tiny_patch16_224"
        )


def held_out_classes(
    whole: Backbone, data: Data, validation: Data | None, labels: str | None
) -> dict[str, int]:
    """The true classes of the held-out photos, by photo name.

    Photos without a known class are left out. The result is empty if ``labels`` is None or the network has
    no classes. For the format of ``labels``, see :func:`xattn.photos.labels.true_classes`.

    Raises:
        ValueError: the labels are damaged, or no photo is labelled with a class of the network.
        FileNotFoundError: there is no such file.
    """
    if labels is None or not whole.has_classes:
        return {}
    photos = split(data, validation)[1]
    names = [photos.name(i) for i in range(len(photos))]
    found = [number for number, _ in true_classes(names, labels, whole.class_names)]
    known = {name: n for name, n in zip(names, found, strict=False) if n is not None}
    if not known:
        raise ValueError(
            f"labels: none of {len(names)} photos is labelled with a class of {whole.name}; leave out "
            f"the labels"
        )
    return known


def write(
    folder: str | Path,
    whole: Backbone,
    result: PruneResult,
    classes: Mapping[str, int],
    config: PruneConfig,
) -> tuple[Path, list[str]]:
    """Write the pruned network and its figures; return the folder and the lines of a report.

    Args:
        whole: the network before pruning.
        classes: the true classes of held-out photos, by photo name; accuracy is measured only on these.

    Raises:
        ValueError: the network cannot be rebuilt from its name, or ``folder`` contains other files.
        OSError: ``folder`` cannot be written.
    """
    check_can_be_saved(whole)
    figures = measure_stages(whole, result, classes)
    preprocessing = asdict(whole.preprocessing)
    preprocessing["input_size"] = [3, *whole.preprocessing.input_size]
    record = {
        "backbone": {"name": whole.name, "sha256": whole.fingerprint},
        "pruning": result.pruning.record(),
        "sha256": sha256(result.backbone.model),
        "num_classes": int(getattr(whole.model, "num_classes", whole.num_classes)),
        "preprocessing": preprocessing,
        "training": {
            "photos": result.learned,
            "steps": result.steps,
            "processor_seconds": round(result.seconds, 1),
            "losses": {name: round(value, 6) for name, value in result.losses.items()},
            "config": asdict(config),
        },
        "changes": {str(i): [round(x, 6) for x in v] for i, v in result.changes.items()},
        "usage": {str(i): [round(x, 4) for x in v] for i, v in result.usage.items()},
        "results": figures,
    }
    path = save_pruned(folder, result.backbone.model.state_dict(), record)
    return path, report_lines(result, figures)


def measure_stages(
    whole: Backbone, result: PruneResult, classes: Mapping[str, int]
) -> dict[str, Any]:
    """Figures of each stage of pruning on the held-out photos, and the size and speed of the networks
    before and after pruning."""
    index = [i for i, name in enumerate(result.photos) if name in classes]
    truth = np.array([classes[result.photos[i]] for i in index])
    found: dict[str, Any] = {"photos": len(result.photos), "labelled": len(index), "stages": {}}
    for stage, answers in result.answers.items():
        figures: dict[str, Any] = {"cosine": round(float(answers.cosine.mean()), 4)}
        if whole.has_classes:
            figures["same"] = _interval(answers.same.numpy())
        if index:
            figures["accuracy"] = _interval(answers.classes.numpy()[index] == truth)
        found["stages"][stage] = figures
    networks = {"whole": whole, "pruned": result.backbone}
    speeds = throughput(networks)
    found["networks"] = {
        name: {
            "parameters": sum(p.numel() for p in network.model.parameters()),
            "images_per_second": round(speeds[name], 2),
        }
        for name, network in networks.items()
    }
    return found


def _interval(values: Any) -> dict[str, float]:
    """A mean with its 95 % bootstrap interval."""
    found = mean_interval(np.asarray(values, dtype=np.float64))
    return {"mean": round(found.mean, 4), "lo": round(found.lo, 4), "hi": round(found.hi, 4)}


@torch.inference_mode()
def throughput(
    networks: dict[str, Backbone], batch: int = BATCH, rounds: int = ROUNDS
) -> dict[str, float]:
    """Images per second of each network; the networks take turns in each round of timing.

    On a CPU, this is processor time and not elapsed time.
    """
    first = next(iter(networks.values()))
    size = (batch, first.mean.shape[1], *first.preprocessing.input_size)
    images = torch.rand(size, generator=torch.Generator().manual_seed(0), device="cpu")
    images = images.to(first.device, next(first.model.parameters()).dtype)
    jobs = {name: partial(network.logits, images) for name, network in networks.items()}
    took = times(jobs, rounds, clock=processor_clock())
    return {name: batch / statistics.median(seconds) for name, seconds in took.items()}


def report_lines(result: PruneResult, figures: dict[str, Any]) -> list[str]:
    """The lines of a report: a Markdown table of the stages, and the effect and usage of single heads."""
    found = [
        f"{result.pruning}",
        f"trained on {result.learned} photos in {result.steps} steps, {result.seconds:.0f} s of "
        f"processor time; measured on {figures['photos']} other photos",
        "",
    ]
    table = []
    networks = {"whole": "whole", "cut": "pruned", "trained": "pruned"}
    for stage, name in STAGES.items():
        if stage not in figures["stages"]:
            continue
        of = figures["stages"][stage]
        size = figures["networks"].get(networks.get(stage, ""))
        sizes = (
            (f"{size['parameters']:,}", f"{size['images_per_second']:.1f}") if size else ("-", "-")
        )
        shares = _percent(of.get("accuracy")), _percent(of.get("same"))
        table.append((name, *shares, f"{of['cosine']:.3f}", *sizes))
    titles = "network", "top-1, %", "same class, %", "cosine of tokens", "parameters", "images/s"
    found += markdown(titles, table)
    for title, rows in (
        ("change of the output when each head is removed", result.changes),
        ("usage of each head", result.usage),
    ):
        for i, values in rows.items():
            found.append(f"block {i}, {title}: {', '.join(f'{x:.3f}' for x in values)}")
    return found


def _percent(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "-"
    return f"{100 * interval['mean']:.1f} [{100 * interval['lo']:.1f}, {100 * interval['hi']:.1f}]"
