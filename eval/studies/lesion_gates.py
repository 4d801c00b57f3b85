"""Where the gates of a network on slices point: psi by level and sign, and the explainer ``gates``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from xattn.backbone.loading import load_backbone
from xattn.eval.bootstrap import mean_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.models.lesions import Samples
from xattn.explainers.gates import Gates
from xattn.models.agunet import AGUNet
from xattn.models.masks import MaskClassifier
from xattn.models.volumes import volume_gates
from xattn.pictures.overlay import SEQUENTIAL, colorize
from xattn.runtime.files import atomic_file

CLASSES = ("no lesion", "lesion")


def measure_gates(net: AGUNet, chosen: Samples, tests: Samples, split: Split) -> dict[str, Any]:
    """Of each level psi inside and outside of the lesion, and for each test with a lesion whether a map's
    largest place lies in it: ``hits`` by map.

    Maps: psi and 1 - psi of each level; ``chosen``, the level and sign that hit most lesions of ``chosen``;
    ``gradient``, psi times its gradient; and beside them the mask's probabilities and the image itself.
    """
    images, masks = _with_lesion(split.choose(chosen))
    signed = _signed(_levels(net, images))
    best = max(signed, key=lambda name: float(np.mean(pointing(signed[name], masks).tolist())))
    images, masks = _with_lesion(split.score(tests))
    levels = _levels(net, images)
    gradient = Gates(load_backbone(MaskClassifier(net), classes=CLASSES), form="gradient")
    maps = _signed(levels)
    maps["gradient"] = gradient.attribute(images.expand(-1, 3, -1, -1), CLASSES.index("lesion"))
    with torch.no_grad():
        maps["mask"] = torch.cat([net(x) for x in images.split(50)])
    maps["image"] = images
    hits = {name: pointing(values, masks).tolist() for name, values in maps.items()}
    return {
        "levels": [inside_outside(g, masks) for g in levels],
        "area": masks.flatten(1).mean(1).tolist(),
        "best": best,
        "hits": {**hits, "chosen": hits[best]},
    }


def _with_lesion(samples: Samples) -> tuple[Tensor, Tensor]:
    """Images and masks of the samples that have one."""
    kept = samples.radii > 0
    return samples.images[kept], samples.masks[kept]


@torch.no_grad()
def _levels(net: AGUNet, images: Tensor) -> list[Tensor]:
    """psi of each level, as large as the images."""
    parts = zip(*(net.outputs(x).gates for x in images.split(50)), strict=True)
    return [F.interpolate(torch.cat(g), images.shape[2:], mode="bilinear") for g in parts]


def _signed(levels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Maps that are largest where psi is, and where it is smallest."""
    maps = {f"level {i}, argmax": g for i, g in enumerate(levels)}
    return maps | {f"level {i}, argmin": -g for i, g in enumerate(levels)}


def measure_volume_gates(
    net: AGUNet, chosen: Samples, tests: Samples, split: Split
) -> dict[str, Any]:
    """Whether the largest place of psi times its gradient, by tiles, lies in the lesion: ``hits``."""
    images, masks = _with_lesion(split.score(tests))
    maps = torch.stack([volume_gates(net, image)[1][None] for image in images])
    return {"hits": {"gradient": pointing(maps, masks).tolist()}}


def choice(best: str) -> dict[str, Any]:
    """Form and level of the explainer ``gates`` for "level 1, argmin".

    >>> choice("level 1, argmin")
    {'form': 'minus', 'level': 1}
    """
    level, sign = best.removeprefix("level ").split(", ")
    return {"form": "plus" if sign == "argmax" else "minus", "level": int(level)}


def pointing(maps: Tensor, masks: Tensor) -> Tensor:
    """(n,): share of a map's largest places that lie in the mask; both (n, 1, H, W)."""
    flat, inside = maps.flatten(1), masks.flatten(1)
    largest = flat == flat.amax(1, keepdim=True)
    return (largest * inside).sum(1) / largest.sum(1)


def inside_outside(maps: Tensor, masks: Tensor) -> list[float]:
    """Means over lesions and over all else, of all images."""
    inside = float((maps * masks).sum() / masks.sum())
    return [inside, float((maps * (1 - masks)).sum() / (1 - masks).sum())]


def draw_gates(nets: Sequence[AGUNet], tests: Samples, path: Path, columns: int = 6) -> None:
    """A picture of slices with a lesion: the slice, its lesion, psi of level 1 of each network, and psi
    times the gradient of the first."""
    kept = (tests.radii > 0).nonzero()[:columns, 0]
    images, masks = tests.images[kept], tests.masks[kept]
    colour = images.expand(-1, 3, -1, -1)
    rows = [images, masks]
    backbones = [load_backbone(MaskClassifier(net), classes=CLASSES) for net in nets]
    lesion = CLASSES.index("lesion")
    rows += [Gates(b, form="plus", level=1).attribute(colour, lesion) for b in backbones]
    rows.append(Gates(backbones[0], form="gradient").attribute(colour, lesion))
    side = 2 * images.shape[-1]
    sheet = Image.new("RGB", (side * len(kept), side * len(rows)))
    for y, row in enumerate(rows):
        every = F.interpolate(row.detach(), (side, side), mode="bilinear")[:, 0]
        for x, values in enumerate(every.numpy()):
            span = values - values.min() if y > 1 else values
            shares = span / max(float(span.max()), 1e-12) if y > 1 else values
            drawn = colorize(shares, "gray" if y < 2 else SEQUENTIAL)
            sheet.paste(Image.fromarray(drawn), (side * x, side * y))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="JPEG", quality=85)


def gate_lines(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Tables of the networks' gates; ``found`` has the records of each network by name."""
    every = {name: [r["gates"] for r in records if "gates" in r] for name, records in found.items()}
    every = {name: gates for name, gates in every.items() if gates}
    if not every:
        return
    names = {"agunet": "AGUNet", "daunet": "DAUNet"}
    yield "### gates"
    yield ""
    yield "| psi, seed by seed | inside, outside | argmax in the lesion | argmin |"
    yield "| :-- | --: | --: | --: |"
    for name, gates in every.items():
        for i in range(len(gates[0]["levels"])):
            means = "; ".join(f"{a:.2f}, {b:.2f}" for a, b in (g["levels"][i] for g in gates))
            signs = [
                "; ".join(f"{np.mean(g['hits'][f'level {i}, {sign}']):.2f}" for g in gates)
                for sign in ("argmax", "argmin")
            ]
            yield f"| {names[name]}, level {i} | {means} | {signs[0]} | {signs[1]} |"
    yield ""
    yield "| map: largest place in the lesion | " + " | ".join(names[n] for n in every) + " |"
    yield "| :-- |" + " --: |" * len(every)
    rows = {
        "gradient": "psi times gradient",
        "chosen": "`gates`: psi, level and sign chosen on other slices",
        "mask": "control: the mask's probabilities",
        "image": "baseline: the brightest pixel",
    }
    for key, title in rows.items():
        cells = [_told([g["hits"][key] for g in gates]) for gates in every.values()]
        yield f"| {title} | " + " | ".join(cells) + " |"
    area = [_told([g["area"] for g in gates]) for gates in every.values()]
    yield "| chance: the lesion's share of the slice | " + " | ".join(area) + " |"
    for name, gates in every.items():
        yield f"\nChosen of {names[name]}, seed by seed: {'; '.join(g['best'] for g in gates)}."
    yield ""


def _told(values: Sequence[Sequence[float]]) -> str:
    return mean_interval(np.mean(values, axis=0)).text(3)
