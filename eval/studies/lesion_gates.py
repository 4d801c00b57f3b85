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
from xattn.explainers.gates import Gates
from xattn.models.agunet import AGUNet
from xattn.models.lesions import Samples
from xattn.models.masks import MaskClassifier
from xattn.models.volumes import volume_gates
from xattn.pictures.overlay import SEQUENTIAL, colorize
from xattn.runtime.files import atomic_file

CLASSES = ("no lesion", "lesion")


def measure_gates(net: AGUNet, chosen: Samples, tests: Samples) -> dict[str, Any]:
    """Of each level psi inside and outside of the lesion, and for each test with a lesion whether a map's
    largest place lies in it: ``hits`` by map.

    Maps: psi and 1 - psi of each level; ``chosen``, the level and sign that hit most lesions of ``chosen``;
    ``gradient``, psi times its gradient; and beside them the mask's probabilities and the image itself.
    """
    classifier = MaskClassifier(net)
    backbone = load_backbone(classifier, classes=CLASSES)
    gradient = Gates(backbone, form="gradient")
    found: dict[str, Any] = {"levels": []}
    hits: dict[str, dict[str, list[float]]] = {}
    for which, group in (("chosen", chosen), ("tests", tests)):
        kept = group.radii > 0
        images, masks = group.images[kept], group.masks[kept]
        with torch.no_grad():
            levels = [
                torch.cat(parts)
                for parts in zip(*(net.outputs(x).gates for x in images.split(50)), strict=True)
            ]
            inner = torch.cat([net(x) for x in images.split(50)])
        up = [F.interpolate(g, images.shape[2:], mode="bilinear") for g in levels]
        maps = {f"level {i}, argmax": g for i, g in enumerate(up)}
        maps |= {f"level {i}, argmin": -g for i, g in enumerate(up)}
        maps["gradient"] = gradient.attribute(images.expand(-1, 3, -1, -1), CLASSES.index("lesion"))
        maps.update({"mask": inner, "image": images})
        hits[which] = {name: pointing(values, masks).tolist() for name, values in maps.items()}
        if which == "tests":
            found["levels"] = [inside_outside(g, masks) for g in up]
            found["area"] = masks.flatten(1).mean(1).tolist()
    psi = [name for name in hits["chosen"] if name.startswith("level")]
    best = max(psi, key=lambda name: float(np.mean(hits["chosen"][name])))
    hits["tests"]["chosen"] = hits["tests"][best]
    return {**found, "best": best, "hits": hits["tests"]}


def measure_volume_gates(net: AGUNet, chosen: Samples, tests: Samples) -> dict[str, Any]:
    """Whether the largest place of psi times its gradient, by tiles, lies in the lesion: ``hits``."""
    kept = tests.radii > 0
    images, masks = tests.images[kept], tests.masks[kept]
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
