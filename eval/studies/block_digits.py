"""Blocks without plain attention on digits: NiNformer, HyperZZW and SHRP, each beside its baselines.

    python -m xattn.eval.studies blocks

NiNformer is also tested without its gate, on permuted tokens, and, once trained, at twice the grid.
HyperZZW is compared with its stem alone. SHRP is also trained without the penalty, and every SHRP
network is tested before and after pruning.

A picture shows maps of the trained networks on a few digits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from xattn.attention.record import record
from xattn.backbone import load_backbone
from xattn.blocks.hyperzzw import HyperZZWBlock, slow_loss
from xattn.blocks.shrp import ShrpBlock
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.digits import Training, load_digits, pixels_right, right, train
from xattn.eval.studies.map_tiles import map_tile
from xattn.eval.studies.models.block_net import BlockNet
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported, spread
from xattn.explainers import create_explainer
from xattn.pictures.contact_sheet import Cell, Row, contact_sheet_image
from xattn.pictures.overlay import DIVERGING, SEQUENTIAL
from xattn.pictures.scales import Legend
from xattn.runtime.files import atomic_file

SHOWN = (0, 3, 6, 8)  # classes; the first held-out digit of each is shown
SIDE = 144  # pixels of a tile
GRADIENT = "gradient x gate"
LEGENDS = (
    Legend("least", "greatest", "of each map"),
    Legend("against", "for", "the class, gradient x gate", cmap=DIVERGING),
)


def _digits() -> Tensor:
    _, held_out = load_digits()
    first = [int((held_out.labels == k).nonzero()[0]) for k in SHOWN]
    return held_out.images[first]


def block_maps(net: BlockNet, split: Split) -> dict[str, Any]:
    """The classes that ``net`` predicts for the digits of the picture, and its last block's maps
    (n, h, w) of them, by name."""
    images = split.score(_digits())
    with torch.no_grad(), record(net) as calls:
        classes = net(images).argmax(1)
    maps = {name: values.mean(1) for name, values in calls[-1].maps.items()}
    if "gate" in maps:
        layer = f"blocks.{len(net.blocks) - 1}.gating"
        hires = create_explainer("hirescam", load_backbone(net), layer=layer, relu=False)
        maps[GRADIENT] = hires.attribute(images, classes)[:, 0]
    return {"classes": classes.tolist(), "maps": {k: m.tolist() for k, m in maps.items()}}


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the maps that :func:`block_maps` gives for each network: a line for each digit."""
    rows = []
    for i, image in enumerate(_digits()):
        cells = [Cell(_tile(image[0]), f"digit {SHOWN[i]}")]
        pale = _tile(image[0], 0.5)
        for name, of in found.items():
            cells += [_cell(pale, name, title, of, i) for title in of["maps"]]
        rows.append(Row("", cells))
    sheet = contact_sheet_image(rows, side=SIDE, legends=LEGENDS)
    with atomic_file(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def _tile(ink: Tensor, strength: float = 1.0) -> Image.Image:
    pixels = Image.fromarray((255 * (1 - strength * ink)).byte().numpy())
    return pixels.resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB")


def _cell(tile: Image.Image, name: str, title: str, of: Mapping[str, Any], i: int) -> Cell:
    maps: Mapping[str, Sequence[Any]] = of["maps"]
    heading, colours = f"{name}: {title}", SEQUENTIAL
    if title == GRADIENT:
        heading, colours = title, DIVERGING
    cell = map_tile(tile, heading, torch.tensor(maps[title][i]), colours)
    return Cell(cell.image, cell.title, f"class {of['classes'][i]}; {cell.detail}")


@dataclass(frozen=True)
class BlockStudyConfig:
    """Settings of the block study: seeds, training and the SHRP penalty."""

    seeds: int = 3  # Networks of each kind: seeds 0, 1, ...
    ninformer_epochs: int = 20  # Passes over the 1,437 digits, with the gate and without.
    hyperzzw_epochs: int = 25  # Passes, also for the stem alone.
    shrp_epochs: int = 45  # Passes, with the penalty and without.
    usage_entropy: float = 0.3  # Weight of the penalty on SHRP's routers.
    slow_loss: float = 0.0  # Weight of the loss on differences of HyperZZW's kernels.

    def quick(self) -> BlockStudyConfig:
        """One short training of each network; its figures mean nothing."""
        return replace(self, seeds=1, ninformer_epochs=1, hyperzzw_epochs=1, shrp_epochs=1)


DEFAULTS = BlockStudyConfig()
DRAWN = ("ninformer", "hyperzzw", "shrp")
Run = Mapping[str, Any]
Measured = tuple[dict[str, Any], BlockNet]
"""The figures of a trained network, and the network whose maps are drawn."""


def study(
    output: OutputAt = "runs/study-blocks",
    config: BlockStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and measure what is not finished yet, write report.md and maps.png, and yield the
    report's lines."""
    config = config.quick() if quick else config
    output = Path(output)
    load_digits()
    measures: dict[str, Callable[[Split, int], Measured]] = {
        "ninformer": partial(measure_ninformer, config, True),
        "ninformer-no-gate": partial(measure_ninformer, config, False),
        "hyperzzw": partial(measure_hyperzzw, config, 2),
        "hyperzzw-stem": partial(measure_hyperzzw, config, 0),
        "shrp": partial(measure_shrp, config, config.usage_entropy),
        "shrp-no-penalty": partial(measure_shrp, config, 0.0),
    }
    rows = {name: partial(_with_maps, name, measure) for name, measure in measures.items()}
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(output, {**settings, "digits": SHOWN}, rows, config.seeds)
    draw({name: found[name][0]["shown"] for name in DRAWN}, output / "maps.png")
    lines = [*_report(found, config, pixels_right())]
    measured = {
        name: [{key: value for key, value in run.items() if key != "shown"} for run in runs]
        for name, runs in found.items()
    }
    yield from reported(output, lines, {"values": raw_rows(measured)}, output / "maps.png")


def _with_maps(
    name: str, measure: Callable[[Split, int], Measured], split: Split, seed: int
) -> dict[str, Any]:
    """The figures of a network, with its maps if the picture shows them."""
    found, net = measure(split, seed)
    return {**found, "shown": block_maps(net, split)} if name in DRAWN and not seed else found


# ---------------------------------------------------------------------- NiNformer


def ninformer(gate: bool = True) -> BlockNet:
    """A NiNformer with two blocks on 4 x 4 tokens of 2 x 2 pixels."""
    options = {"grid": (4, 4), "token_hidden": 32, "gate": gate}
    return BlockNet("ninformer", channels=1, options=options)


def measure_ninformer(config: BlockStudyConfig, gate: bool, split: Split, seed: int) -> Measured:
    """Train a NiNformer; test it on the digits, on permuted tokens, and on 8 x 8 tokens of digits
    twice as large."""
    net = ninformer(gate)
    seconds = train(net, Training(config.ninformer_epochs, seed=seed), split)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))

    def permuted(images: Tensor) -> Tensor:
        return net.classify(net.mixed(net.tokens(images)[:, order]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that it is untuned, which is the point here
        larger = net.at_size(16)

    def twice(images: Tensor) -> Tensor:
        return larger(F.interpolate(images, scale_factor=2, mode="bilinear"))

    networks = {"right": net, "permuted": permuted, "twice": twice}
    found = {name: right(network, split) for name, network in networks.items()}
    return {**found, **_about(net, seconds)}, net


# ---------------------------------------------------------------------- HyperZZW


def hyperzzw(depth: int = 2) -> BlockNet:
    """HyperZZW blocks on 8 x 8 tokens, one per pixel, after a convolution; with depth 0, the stem alone."""
    name = "hyperzzw" if depth else ""
    return BlockNet(name, channels=1, patch=1, dim=32, depth=depth, stem="conv")


def measure_hyperzzw(config: BlockStudyConfig, depth: int, split: Split, seed: int) -> Measured:
    """Train HyperZZW, and compare every second place of its 15 x 15 kernels with its 8 x 8 kernels."""
    net = hyperzzw(depth)
    extra = None
    if config.slow_loss and depth > 1:

        def extra(made: nn.Module) -> Tensor:
            return config.slow_loss * slow_loss(_hyper(net), net.grid)

    seconds = train(net, Training(config.hyperzzw_epochs, seed=seed), split, extra)
    found = {"right": right(net, split), **_about(net, seconds)}
    with torch.no_grad():
        gaps = [
            float((block.kernel((15, 15))[:, ::2, ::2] - block.kernel((8, 8))).abs().max())
            for block in _hyper(net)
        ]
    if gaps:
        found["kernel_gap"] = max(gaps)
    return found, net


def _hyper(net: BlockNet) -> list[HyperZZWBlock]:
    return [block for block in net.blocks if isinstance(block, HyperZZWBlock)]


# ---------------------------------------------------------------------- SHRP


def shrp() -> BlockNet:
    """A SHRP network with three blocks of 8 heads on 4 x 4 tokens of 2 x 2 pixels."""
    return BlockNet("shrp", channels=1, depth=3, options={"heads": 8, "hidden": 64})


def measure_shrp(config: BlockStudyConfig, penalty: float, split: Split, seed: int) -> Measured:
    """Train SHRP with a penalty on the entropy of usage, prune it to the most used head of each layer,
    and return the figures with the pruned network."""
    net = shrp()
    seconds = train(net, Training(config.shrp_epochs, lr=4e-3, seed=seed, aux=penalty), split)
    one_head = pruned(net)
    usage = [float(b.usage.max()) for b in net.blocks if isinstance(b, ShrpBlock)]
    whole, blocks = _size(net), _size(net.blocks)
    transformer = 3 * 12 * net.dim**2  # attention and an MLP of 4 C, without biases and norms
    found = {
        "right": right(net, split),
        "pruned": right(one_head, split),
        "usage": usage,
        "parameters_pruned": _size(one_head),
        "share": _size(one_head) / whole,
        "share_of_blocks": _size(one_head.blocks) / blocks,
        "share_of_transformer": _size(one_head.blocks) / transformer,
    }
    return {**found, **_about(net, seconds)}, one_head


def pruned(net: BlockNet) -> BlockNet:
    """A copy in which each block keeps only its most used head."""
    made = copy.deepcopy(net)
    for i, block in enumerate(made.blocks):
        if isinstance(block, ShrpBlock):
            made.blocks[i] = block.pruned()
    return made


# ---------------------------------------------------------------------- report


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _about(net: BlockNet, seconds: float) -> dict[str, Any]:
    return {"parameters": _size(net), "seconds": seconds}


def _report(found: Found, config: BlockStudyConfig, pixels: float) -> Iterator[str]:
    yield f"digits: 1,437 to train on, 360 to test; {config.seeds} seeds"
    yield "\n| network | measured | | aim |"
    yield "| :-- | :-- | --: | :-- |"
    yield f"| logistic regression on pixels | right | {pixels:.3f} | .967 |"
    for name, measures in ROWS.items():
        for key, (title, asked, decimals) in measures.items():
            values = [value for run in found[name] for value in _values(run, key)]
            cell = f"{max(values):.1e}" if decimals is None else spread(values, decimals)
            yield f"| {name} | {title} | {cell} | {asked} |"


def _values(run: Run, key: str) -> list[float]:
    value = run["right"] - run["pruned"] if key == "cost" else run[key]
    return value if isinstance(value, list) else [value]


Measure = tuple[str, str, int | None]
"""Title, aim (if any) and decimals of each figure; None decimals: only the largest value is shown."""
SHRP: dict[str, Measure] = {
    "right": ("right, routed", "at least .93", 3),
    "pruned": ("right, pruned", "at least .93", 3),
    "cost": ("routed less pruned", "at most .01", 3),
    "usage": ("usage of the kept head, by layer", "at least .95", 3),
    "share": ("parameters, pruned / routed", "at most .40", 2),
    "share_of_blocks": ("of the blocks alone", "", 2),
    "share_of_transformer": ("of the blocks / of transformer blocks", "", 2),
    "seconds": ("seconds", "at most 40", 1),
}
ROWS: dict[str, dict[str, Measure]] = {
    "ninformer": {
        "right": ("right", "at least .98", 3),
        "permuted": ("right, tokens permuted", "at most .3", 3),
        "twice": ("right, untuned on 8 x 8 tokens", "an earlier trial: .50", 3),
        "parameters": ("parameters", "", 0),
        "seconds": ("seconds", "at most 20", 1),
    },
    "ninformer-no-gate": {"right": ("right", "an earlier trial: .978", 3)},
    "hyperzzw": {
        "right": ("right", "at least .97", 3),
        "parameters": ("parameters", "at most 25,000", 0),
        "kernel_gap": ("kernels, every second of 15 x 15 less 8 x 8", "at most 1e-6", None),
        "seconds": ("seconds", "", 1),
    },
    "hyperzzw-stem": {
        "right": ("right", "an earlier trial: .68", 3),
        "parameters": ("parameters", "", 0),
    },
    "shrp": SHRP,
    "shrp-no-penalty": {
        "right": ("right, routed", "", 3),
        "pruned": ("right, pruned", "", 3),
        "cost": ("routed less pruned", "an earlier trial: .18", 3),
        "usage": ("usage of the kept head, by layer", "an earlier trial: .3 to .5", 3),
    },
}
