"""Trains networks whose rollout is exact, and compares rollout with deleting tokens.

    python -m xattn.eval.studies exact-rollout

Minimal blocks without MLP, W_V and W_O, with the norm only inside QK, are linear in the tokens for
fixed A. A logit of a linear readout is therefore exactly the sum of the flows from each token, head by
head (:func:`xattn.blocks.minimal.contributions`). Trained on digits, such networks provide a ground
truth of flow.
The study compares it with effects: the change of the logit, with all A computed anew, if one token is
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xattn.backbone import load_backbone
from xattn.blocks.minimal import RESIDUALS, contributions
from xattn.correlation import spearman
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.digits import Training, load_digits, pixels_right, right, train
from xattn.eval.studies.models.block_net import BlockNet
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported, spread
from xattn.explainers import create_explainer


@dataclass(frozen=True)
class ExactRolloutConfig:
    """How the networks of the study are trained, and on how many digits tokens are deleted."""

    seeds: int = 3  # Networks of each kind: seeds 0, 1, ...
    epochs: int = 20  # Passes over the 1,437 digits.
    lr: float = 1e-2  # Peak of AdamW's rate; it rises for a tenth of the steps, then falls to 0.
    residual: Literal["average", "plain"] = "average"  # (x + A x) / 2, or x + A x.
    digits: int = 100  # Held-out digits whose tokens are deleted, one by one.

    def quick(self) -> ExactRolloutConfig:
        """One short training of each network; its figures mean nothing."""
        return replace(self, seeds=1, epochs=1, digits=8)


LAYERS = 2
NETWORKS: dict[str, dict[str, Any]] = {
    "symmetric-4-heads": {"qk": "symmetric", "heads": 4, "stem": "place"},
    "cholesky-1-head": {"qk": "cholesky", "heads": 1, "stem": "place"},
    "shared-1-head": {"qk": "symmetric", "heads": 1, "stem": "shared"},
}
"""Networks by name: how q and k are made, heads, and whether every position has its own embedding."""
MAPS = ("contribution", "rollout", "input_x_gradient", "integrated_gradients")
BOUNDS = {
    "symmetric-4-heads": "at least .94",
    "cholesky-1-head": "at least .92",
    "shared-1-head": ".60 to .72",
}
DEFAULTS = ExactRolloutConfig()


def study(
    output: OutputAt = "runs/study-exact-rollout",
    config: ExactRolloutConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and measure what is not finished yet, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    load_digits()
    rows = {name: partial(measure, name, config) for name in NETWORKS}
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(output, settings, rows, config.seeds)
    yield from reported(
        output, [*_report(found, config, pixels_right())], {"values": raw_rows(found)}
    )


def network(name: str, residual: str = "average") -> BlockNet:
    """An untrained network of :data:`NETWORKS` for digits: 4 x 4 tokens of 2 x 2 pixels, 64 wide."""
    options = {key: value for key, value in NETWORKS[name].items() if key != "stem"}
    options.update(mlp=False, vo=False, norm="qk", residual=residual)
    stem = NETWORKS[name]["stem"]
    return BlockNet("minimal", channels=1, depth=LAYERS, options=options, stem=stem, norm=False)


def measure(name: str, config: ExactRolloutConfig, split: Split, seed: int) -> dict[str, Any]:
    """Train the network ``name``, and measure it: accuracy, exactness, correlations with deletion."""
    net = network(name, config.residual)
    settings = Training(config.epochs, config.lr, weight_decay=0.01, seed=seed)
    seconds = train(net, settings, split)
    accuracy = right(net, split)
    net = net.double()
    images = split.score(load_digits()[1].images[: config.digits]).double()
    with torch.no_grad():
        tokens = net.tokens(images)
        logits = net.classify(net.mixed(tokens))
        flow = contributions(net.blocks, tokens, net.classifier.weight, net.grid)
        error = flow.sum(-1) + net.classifier.bias - logits
        mean_error = mean_head_logits(net, tokens) - logits
    classes = logits.argmax(1)
    effects = deletion(net, tokens, classes)
    maps = {
        "contribution": flow[torch.arange(len(flow)), classes],
        **_explained(net, images, classes),
    }
    return {
        "right": accuracy,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in net.parameters()),
        "error": float(error.abs().max()),
        "mean_head_error": float(mean_error.abs().max()),
        "largest_logit": float(logits.abs().max()),
        "correlations": {key: float(spearman(maps[key], effects).nanmean()) for key in MAPS},
    }


@torch.no_grad()
def deletion(net: BlockNet, tokens: Tensor, classes: Tensor) -> Tensor:
    """(B, N): the logit of ``classes`` minus its value without one of the ``tokens`` (B, N, C)."""
    rows = torch.arange(len(tokens))
    count = tokens.shape[1]

    def logit(x: Tensor) -> Tensor:
        return net.classify(net.mixed(x, (1, x.shape[1])))[rows, classes]

    without = [logit(torch.cat([tokens[:, :j], tokens[:, j + 1 :]], 1)) for j in range(count)]
    return logit(tokens)[:, None] - torch.stack(without, 1)


@torch.no_grad()
def mean_head_logits(net: BlockNet, tokens: Tensor) -> Tensor:
    """The logits (B, K) that result if every head is replaced by the mean of the heads, as in rollout."""
    x = tokens
    mixed = tokens
    for block in net.blocks:
        kept, added = RESIDUALS[block.residual]
        matrix = block.operator(x, net.grid, 0).rows(torch.arange(x.shape[1])).mean(1)
        mixed = kept * mixed + added * matrix @ mixed
        x = block(x, net.grid)
    return net.classify(mixed)


def _explained(net: BlockNet, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """The explainers' maps (B, N); maps over pixels are summed over the pixels of each token."""
    backbone = load_backbone(net)
    found = {}
    for name in MAPS[1:]:
        options: dict[str, Any] = {"start": "patches"} if name == "rollout" else {}
        maps = create_explainer(name, backbone, **options).attribute(images, classes)
        if maps.shape[-1] > net.grid[1]:
            maps = torch.nn.functional.avg_pool2d(maps, net.patch)
        found[name] = maps.flatten(1)
    return found


# ---------------------------------------------------------------------- report


def _report(found: Found, config: ExactRolloutConfig, pixels: float) -> Iterator[str]:
    yield (
        f"digits: 1,437 to train on, 360 to test; {config.seeds} seeds, {config.epochs} epochs, "
        f"{LAYERS} layers, residual {config.residual}"
    )
    yield "\n| network | right | aim | sum - logit | mean heads - logit | parameters | seconds |"
    yield "| :-- | --: | --: | --: | --: | --: | --: |"
    yield f"| logistic regression on pixels | {pixels:.3f} | .967 |  |  |  |  |"
    for name, runs in found.items():
        cells = [
            spread([run["right"] for run in runs]),
            BOUNDS[name],
            f"{max(run['error'] for run in runs):.1e}",
            f"{max(run['mean_head_error'] for run in runs):.1e}",
            f"{runs[0]['parameters']:,}",
            spread([run["seconds"] for run in runs], 1),
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    yield f"\nrank correlation with the deletion of a token, mean over {config.digits} digits\n"
    yield f"| network | {' | '.join(MAPS)} |"
    yield "| :-- |" + " --: |" * len(MAPS)
    for name, runs in found.items():
        values = [spread([run["correlations"][key] for run in runs], 2) for key in MAPS]
        yield f"| {name} | {' | '.join(values)} |"
