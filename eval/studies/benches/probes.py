"""Measures the cost of training a probing head, from cached features and with attention training.

python -m xattn.eval.studies bench-probe
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from xattn.backbone import Backbone, load_backbone
from xattn.config import ProbeConfig
from xattn.eval.bench.random_photos import write_photos
from xattn.eval.probing.probe_table import move_tokens
from xattn.eval.probing.runner import new_head
from xattn.heads import AttentiveHead
from xattn.runtime.measuring import median_ratio, times
from xattn.training.attention_training import create_perturbation, head_loss
from xattn.training.features import Features, cache_features
from xattn.training.probe import create_optimizer

BACKBONES = ("tf_efficientnet_lite0", "vit_base_patch16_224")


def study(
    backbones: Sequence[str] = BACKBONES, rounds: int = 7, data: Path | None = None
) -> Iterator[str]:
    """Yield the lines of two tables: epochs through the backbone and from features, and training steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield f"{device}, {torch.get_num_threads()} threads; weights are random"
    with tempfile.TemporaryDirectory() as temporary:
        folder = data or write_photos(Path(temporary))
        for name in backbones:
            backbone = load_backbone(name, weights=None, taps=("head",), device=device)
            features = cache_features(backbone, folder, Path(temporary) / name, progress=False)
            yield f"\n{name}: {len(features)} photos, grid {features.grid[0]} x {features.grid[1]}\n"
            yield "| head | epoch through the backbone / from features | wanted |"
            yield "| :-- | --: | --: |"
            for head in ("gap", "efficient_probe", "abmilp"):
                ratio = epoch_ratio(
                    new_head(head, backbone, {}, ["a", "b"], 0), backbone, features, rounds
                )
                yield f"| {head} | {ratio:.1f}x | at least 20x |"
            yield "\n| head | training | step / plain step | wanted |"
            yield "| :-- | :-- | --: | --: |"
            for head in ("efficient_probe", "abmilp"):
                ratios = step_ratios(
                    new_head(head, backbone, {}, ["a", "b"], 0),
                    features,
                    rounds,
                    of=f"{name}, {head}",
                )
                for training, ratio in ratios.items():
                    wanted = {"at": "at most 3.2x", "vat": "at most 4.5x"}.get(training, "")
                    yield f"| {head} | {training} | {ratio:.2f}x | {wanted} |"


def epoch_ratio(
    head: AttentiveHead, backbone: Backbone, features: Features, rounds: int, batch: int = 16
) -> float:
    """The time of an epoch of ``head`` through ``backbone``, divided by that of one from ``features``.

    Photos are decoded beforehand, so that the ratio covers only the passes."""
    index = list(range(len(features)))
    parts = [index[i : i + batch] for i in range(0, len(index), batch)]
    size = backbone.preprocessing.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *size, generator=generator).to(backbone.device)
    step = _stepper(head, "none")

    def cached() -> None:
        for part in parts:
            step(head.tokens(features.taps(part)))

    def through() -> None:
        for part in parts:
            with torch.no_grad():
                taps = backbone(images[: len(part)])
            step(head.tokens(taps))

    took = times({"through": through, "cached": cached}, rounds, of=f"{backbone.name}, {head.name}")
    return median_ratio(took["through"], took["cached"])


def step_ratios(
    head: AttentiveHead, features: Features, rounds: int, batch: int = 32, of: str = ""
) -> dict[str, float]:
    """How long a step takes with each kind of attention training, as a multiple of a plain step."""
    tokens = head.tokens(features.taps([i % len(features) for i in range(batch)]))
    kinds = ("none", "random", "at", "iat", "vat", "ivat")

    def repeated(kind: str) -> Callable[[], None]:
        step = _stepper(head, kind)

        def run() -> None:
            for _ in range(5):
                step(tokens)

        return run

    took = times({kind: repeated(kind) for kind in kinds}, rounds, warmup=2, of=of)
    return {kind: median_ratio(took[kind], took["none"]) for kind in kinds[1:]}


def _stepper(head: AttentiveHead, kind: str) -> Callable[[Any], None]:
    """A training step like those of :func:`~xattn.training.probe.probe`, with labels 0 and 1 in turn."""
    optimizer = create_optimizer(head, ProbeConfig("small", lr=1e-4))
    perturbation = create_perturbation(kind, **({} if kind == "none" else {"epsilon": 1.0}))
    head.train()

    def step(tokens: Any) -> None:
        attended = head.attend(move_tokens(tokens, head))
        target = torch.arange(len(attended.values), device=attended.values.device) % 2
        loss = head_loss(perturbation, head, attended, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step
