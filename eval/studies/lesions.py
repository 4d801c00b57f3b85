"""Lesions in the MNI152 template: attention-gated U-Nets beside a plain one, and where their gates point.

    python -m xattn.eval.studies lesions

AGUNet, DAUNet and a plain U-Net are trained on slices of 64 x 64 pixels; AGUNet and the plain one also
on faint lesions and on patches of volumes. All train on the same samples for the same number of steps.
The gates of the slice networks are measured level by level. The networks are saved for
``xattn explain -b``, and slices with their masks for ``xattn compare --annotations``.

The module also measures where these gates point: psi by level and sign, and the explainer ``gates``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.segmentation import dice_score

from xattn.backbone.loading import load_backbone
from xattn.eval.bootstrap import mean_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.models.lesions import FAINT, SLICES, VOLUMES, Samples, samples, template
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported, spread
from xattn.eval.studies.small_training import minimize, single_thread
from xattn.explainers.gates import Gates
from xattn.models.agunet import AGUNet
from xattn.models.masks import MaskClassifier, load_network, mask_loss, predict_tiles, save_network
from xattn.models.volumes import TILE, volume_gates
from xattn.pictures.overlay import SEQUENTIAL, colorize
from xattn.runtime.files import atomic_file, check_folder, write_text

CLASSES = ("no lesion", "lesion")


def measure_gates(net: AGUNet, chosen: Samples, tests: Samples, split: Split) -> dict[str, Any]:
    """For each level, psi inside and outside of lesions; and for each test image with a lesion, whether the
    maximum of each map lies in it, as ``hits`` by map.

    The maps are psi and 1 - psi of each level; ``chosen``, the level and sign that hit the most lesions of
    the samples ``chosen``; ``gradient``, psi times its gradient; the mask's probabilities; and the image.
    """
    images, masks = _with_lesion(split.choose(chosen))
    signed = _signed(_levels(net, images))
    best = max(signed, key=lambda name: float(np.mean(pointing(signed[name], masks).tolist())))
    images, masks = _with_lesion(split.score(tests))
    levels = _levels(net, images)
    gradient = Gates(load_backbone(MaskClassifier(net), class_names=CLASSES), form="gradient")
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
    """The images and masks of samples with a lesion."""
    kept = samples.radii > 0
    return samples.images[kept], samples.masks[kept]


@torch.no_grad()
def _levels(net: AGUNet, images: Tensor) -> list[Tensor]:
    """psi of each level, resized to the images."""
    parts = zip(*(net.outputs(x).gates for x in images.split(50)), strict=True)
    return [F.interpolate(torch.cat(g), images.shape[2:], mode="bilinear") for g in parts]


def _signed(levels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Maps that are largest where psi is largest, and maps that are largest where psi is smallest."""
    maps = {f"level {i}, argmax": g for i, g in enumerate(levels)}
    return maps | {f"level {i}, argmin": -g for i, g in enumerate(levels)}


def measure_volume_gates(
    net: AGUNet, chosen: Samples, tests: Samples, split: Split
) -> dict[str, Any]:
    """``hits``: whether the maximum of psi times its gradient, computed by tiles, lies in the lesion."""
    images, masks = _with_lesion(split.score(tests))
    maps = torch.stack([volume_gates(net, image)[1][None] for image in images])
    return {"hits": {"gradient": pointing(maps, masks).tolist()}}


def choice(best: str) -> dict[str, Any]:
    """The form and level of the explainer ``gates`` for a choice such as "level 1, argmin".

    >>> choice("level 1, argmin")
    {'form': 'minus', 'level': 1}
    """
    level, sign = best.removeprefix("level ").split(", ")
    return {"form": "plus" if sign == "argmax" else "minus", "level": int(level)}


def pointing(maps: Tensor, masks: Tensor) -> Tensor:
    """(n,): the share of each map's maxima that lie in its mask; both are (n, 1, H, W)."""
    flat, inside = maps.flatten(1), masks.flatten(1)
    largest = flat == flat.amax(1, keepdim=True)
    return (largest * inside).sum(1) / largest.sum(1)


def inside_outside(maps: Tensor, masks: Tensor) -> list[float]:
    """The means of the maps inside and outside of lesions, over all images."""
    inside = float((maps * masks).sum() / masks.sum())
    return [inside, float((maps * (1 - masks)).sum() / (1 - masks).sum())]


def draw_gates(nets: Sequence[AGUNet], tests: Samples, path: Path, columns: int = 6) -> None:
    """Draw slices with a lesion: the slice, its lesion, psi at level 1 of each network, and psi times the
    gradient of the first network."""
    kept = (tests.radii > 0).nonzero()[:columns, 0]
    images, masks = tests.images[kept], tests.masks[kept]
    colour = images.expand(-1, 3, -1, -1)
    rows = [images, masks]
    backbones = [load_backbone(MaskClassifier(net), class_names=CLASSES) for net in nets]
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


Part = Literal["slices", "faint", "volumes"]


@dataclass(frozen=True)
class LesionConfig:
    """Settings of the lesion study; training samples have seed 0, other samples seeds 1 and 2."""

    parts: tuple[Part, ...] = ("slices", "faint", "volumes")
    """Parts: plain lesions in slices, faint ones, and volumes; parts left out can be added later."""
    seeds: int = 3  # Networks of each kind on slices: seeds 0, 1, ...
    volume_seeds: int = 1  # Networks of each kind on volumes.
    slices: int = 1_300  # Slices to train on.
    tests: int = 200
    """Slices to test on; as many others serve to choose the threshold and the gates' level and sign."""
    epochs: int = 4  # Passes over the slices.
    batch_size: int = 8  # Slices per step.
    lr: float = 1e-2  # Peak of AdamW's rate; it rises for a tenth of the steps, then falls to 0.
    volumes: int = 90  # Volumes to train on.
    volume_tests: int = 20  # Volumes to test on, and others to choose the threshold by.
    steps: int = 400  # Steps of four patches of 32 x 32 x 32 voxels, two of them on a lesion.

    def quick(self) -> LesionConfig:
        """A few steps on a few samples; its figures mean nothing."""
        return replace(
            self, seeds=1, slices=32, tests=24, epochs=1, volumes=4, volume_tests=2, steps=1
        )


DEFAULTS = LesionConfig()
KINDS = {"slices": SLICES, "faint": FAINT, "volumes": VOLUMES}
PLAIN = {"gates": False, "multi_scale": False, "deep_supervision": False}
NETS: dict[str, dict[str, Any]] = {"agunet": {}, "daunet": {"dual": True}, "unet": PLAIN}
TITLES = {"agunet": "AGUNet", "daunet": "DAUNet", "unet": "plain U-Net"}
PATCHES = 4  # per step
PHOTOS = 40  # slices that are written as pictures, with their masks
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
FOUND = 0.25  # Dice from which a lesion is found
SMALL = {"slices": 5.0, "faint": 5.0, "volumes": 4.0}  # radius below which a lesion is small


def study(
    output: OutputAt = "runs/study-lesions", config: LesionConfig = DEFAULTS, quick: Quick = False
) -> Iterator[str]:
    """Train and measure what is not finished yet, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    template(SLICES.spacing)
    untold = ("parts", "seeds", "volume_seeds")
    settings = {key: value for key, value in asdict(config).items() if key not in untold}
    lines: list[str] = []
    every: Found = {}
    for part in config.parts:
        names = [name for name in NETS if name != "daunet" or part == "slices"]
        rows = {f"{part}-{n}": partial(measure, output, config, part, n) for n in names}
        seeds = config.volume_seeds if part == "volumes" else config.seeds
        found = measure_rows(output, settings, rows, seeds)
        every |= found
        lines += [*part_lines(part, found)]
        if part != "volumes":
            tests = samples(2, config.tests, KINDS[part])
            write_photos(tests, output / f"photos-{part}")
            folders = [output / "networks" / f"{part}-agunet-{seed}" for seed in range(seeds)]
            draw_gates([load_network(f) for f in folders], tests, output / f"gates-{part}.jpg")
            lines += gate_lines({name: found[f"{part}-{name}"] for name in names if name != "unet"})
    yield from reported(output, lines, {"values": raw_rows(every)})


def measure(
    output: Path, config: LesionConfig, part: str, name: str, split: Split, seed: int
) -> dict[str, Any]:
    """Train a network, save it in ``output``, and test it.

    Returns:
        CPU ``seconds`` of training; the ``threshold``, chosen on other samples; for each test sample, its
        ``dice`` (1 if there is no lesion and none is predicted), its lesion's ``radius`` or 0, and the
        voxels of each predicted component that meets no lesion (``wrong``); and the ``gates``.
    """
    kind = KINDS[part]
    volumes = len(kind.size) == 3
    counts = (config.volumes, config.volume_tests) if volumes else (config.slices, config.tests)
    seen, chosen, tests = (
        samples(which, count, kind) for which, count in enumerate((*counts, counts[1]))
    )
    net = network(name, volumes)
    with single_thread():
        train = train_volumes if volumes else train_slices
        seconds = train(net, split.fit(seen), config, seed)
        predict = predict_volumes if volumes else predict_slices
        chosen = split.choose(chosen)
        threshold = best_threshold(predict(net, chosen.images), chosen.masks)
        tests = split.score(tests)
        masks = (predict(net, tests.images) > threshold).float()
        found: dict[str, Any] = {
            "seconds": seconds,
            "parameters": sum(p.numel() for p in net.parameters()),
            "threshold": threshold,
            "dice": dice(masks, tests.masks).tolist(),
            "radius": tests.radii.tolist(),
            "wrong": [wrong_components(*pair) for pair in zip(masks, tests.masks, strict=True)],
        }
        if net.gates:
            gates = measure_volume_gates if volumes else measure_gates
            found["gates"] = gates(net, chosen, tests, split)
    about: dict[str, Any] = {"threshold": threshold, "classes": list(CLASSES), "size": kind.size}
    if volumes:
        about.update(spacing=kind.spacing, tile=TILE)
    elif net.gates:
        about["gates"] = choice(found["gates"]["best"])
    save_network(net, output / "networks" / f"{part}-{name}-{seed}", about)
    return found


def network(name: str, volumes: bool) -> AGUNet:
    """The network of a row, untrained."""
    if volumes:
        return AGUNet(3, filters=(8, 16, 32), norm="instance", **NETS[name])
    return AGUNet(2, filters=(8, 16, 32, 64), **NETS[name]).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


# ---------------------------------------------------------------------- training


def train_slices(net: AGUNet, seen: Samples, config: LesionConfig, seed: int) -> float:
    """Train on whole slices and return the CPU seconds."""
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(config.epochs):
            order = torch.randperm(len(seen.images), generator=generator)
            whole = len(order) - len(order) % min(config.batch_size, len(order))
            for batch in order[:whole].split(config.batch_size):
                images = seen.images[batch].contiguous(memory_format=torch.channels_last)
                yield images, seen.masks[batch]

    size = min(config.batch_size, len(seen.images))
    return fit(net, batches(), config.epochs * (len(seen.images) // size), config.lr)


def train_volumes(net: AGUNet, seen: Samples, config: LesionConfig, seed: int) -> float:
    """Train on patches, half of them centred on lesion voxels, and return the CPU seconds."""
    rng = np.random.default_rng(seed)
    held = [i for i, radius in enumerate(seen.radii.tolist()) if radius]

    def patch(on_lesion: bool) -> tuple[Tensor, Tensor]:
        i = rng.choice(held) if on_lesion and held else rng.integers(len(seen.images))
        sides = seen.images.shape[2:]
        corner = [int(rng.integers(side - t + 1)) for side, t in zip(sides, TILE, strict=True)]
        places = seen.masks[i, 0].nonzero()
        if on_lesion and len(places):
            at = (places[rng.integers(len(places))] + torch.tensor(rng.integers(-8, 9, 3))).tolist()
            corner = [
                min(max(a - t // 2, 0), side - t)
                for a, t, side in zip(at, TILE, sides, strict=True)
            ]
        place = (slice(None), *(slice(a, a + t) for a, t in zip(corner, TILE, strict=True)))
        return seen.images[i][place], seen.masks[i][place]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(config.steps):
            images, masks = zip(*(patch(2 * k < PATCHES) for k in range(PATCHES)), strict=True)
            yield torch.stack(images), torch.stack(masks)

    return fit(net, batches(), config.steps, config.lr)


def fit(net: AGUNet, batches: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float) -> float:
    """Train on ``batches`` of images and masks and return the CPU seconds."""
    losses = (mask_loss(net.outputs(images), masks) for images, masks in batches)
    return minimize(net, losses, steps, lr, weight_decay=1e-2)


# ---------------------------------------------------------------------- testing


@torch.no_grad()
def predict_slices(net: AGUNet, images: Tensor) -> Tensor:
    """Probabilities (n, 1, H, W)."""
    return torch.cat([net(batch).sigmoid() for batch in images.split(50)])


def predict_volumes(net: AGUNet, images: Tensor) -> Tensor:
    """Probabilities (n, 1, D, H, W), by tiles."""
    return torch.stack([predict_tiles(net, image, TILE).sigmoid() for image in images])


def dice(masks: Tensor, truth: Tensor) -> Tensor:
    """(n,): the Dice score, which is 1 where both are empty."""
    found = dice_score(masks.long(), truth.long(), 1, average="none", input_format="one-hot")
    empty = (masks.flatten(1).sum(1) == 0) & (truth.flatten(1).sum(1) == 0)
    return torch.where(empty, 1.0, found.flatten().nan_to_num(0.0))


def best_threshold(probabilities: Tensor, truth: Tensor) -> float:
    """The threshold with the best mean Dice."""
    means = [float(dice((probabilities > t).float(), truth).mean()) for t in THRESHOLDS]
    return THRESHOLDS[int(np.argmax(means))]


def wrong_components(mask: Tensor, truth: Tensor) -> list[int]:
    """Sizes of the components of ``mask`` that meet no lesion."""
    from scipy.ndimage import label

    parts, count = label(mask[0].numpy() > 0)
    met = set(np.unique(parts[truth[0].numpy() > 0]).tolist())
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    return [int(sizes[i]) for i in range(1, count + 1) if i not in met]


def write_photos(tests: Samples, folder: Path, count: int = PHOTOS) -> None:
    """Write the first ``count`` slices with a lesion for ``xattn compare --annotations``."""
    for part in ("images", "masks"):
        check_folder(folder / part)
    held = [i for i, radius in enumerate(tests.radii.tolist()) if radius][:count]
    for i in held:
        for part, values in (("images", tests.images[i] * 255), ("masks", tests.masks[i])):
            with atomic_file(folder / part / f"slice-{i:03d}.png") as temporary:
                image = Image.fromarray(values[0].round().byte().numpy())
                image.save(temporary, format="PNG")
    write_text(folder / "classes.yaml", f"classes:\n  1: {CLASSES[1]}\n")


# ---------------------------------------------------------------------- report


def part_lines(part: str, found: Found) -> Iterator[str]:
    """The lines of a part's table."""
    what = {"slices": "slices", "faint": "slices with faint lesions", "volumes": "volumes"}[part]
    first = next(iter(found.values()))[0]
    clean = sum(radius == 0 for radius in first["radius"])
    seeds = len(next(iter(found.values())))
    yield f"## {what}\n"
    yield (
        f"{len(first['radius'])} {what}, {clean} of them clean; seeds: {seeds}. Means over seeds with 95 % "
        f"intervals over {what}; small: radius below {SMALL[part]:g}; found: Dice of at least {FOUND:g}; "
        f"false alarm: any pixel on a clean one."
    )
    yield (
        "\n| network | Dice | found | small ones found | false alarms | threshold | parameters | CPU "
        "seconds |\n| :-- | --: | --: | --: | --: | --: | --: | --: |"
    )
    for name, records in found.items():
        scores, radius = np.array([r["dice"] for r in records]), np.array(first["radius"])
        cells = [
            TITLES[name.partition("-")[2]],
            interval_text(scores[:, radius > 0]),
            interval_text(scores[:, radius > 0] >= FOUND),
            interval_text(scores[:, (radius > 0) & (radius < SMALL[part])] >= FOUND),
            interval_text(scores[:, radius == 0] < 1),
            spread([r["threshold"] for r in records], 2),
            f"{records[0]['parameters']:,}",
            spread([r["seconds"] for r in records], 0),
        ]
        yield "| " + " | ".join(cells) + " |"
    if part == "volumes":
        yield from _components(found)
        for name, records in found.items():
            if "gates" in records[0]:
                hits = interval_text([r["gates"]["hits"]["gradient"] for r in records])
                title = TITLES[name.partition("-")[2]]
                yield f"\nLargest place of psi times gradient in the lesion, {title}: {hits}."
    yield ""


def interval_text(values: Any) -> str:
    """The mean of ``values`` (seeds, n) over seeds and samples, with an interval over samples."""
    per_sample = np.asarray(values, dtype=np.float64).mean(0)
    return mean_interval(per_sample).text(3) if len(per_sample) else ""


def _components(found: Found) -> Iterator[str]:
    """Falsely marked components per volume, by size."""
    bins = ((1, 3), (4, 15), (16, 10**9))
    yield ""
    sizes = "1 to 3 voxels | 4 to 15 | 16 and more"
    yield f"| falsely marked components per volume | {sizes} | clean volumes with one |"
    yield "| :-- | --: | --: | --: | --: |"
    for name, records in found.items():
        every: list[Sequence[int]] = [w for r in records for w in r["wrong"]]
        clean = [w for r in records for w, c in zip(r["wrong"], r["radius"], strict=True) if not c]
        counts = [
            np.mean([sum(least <= size <= most for size in w) for w in every])
            for least, most in bins
        ]
        cells = [TITLES[name.partition("-")[2]], *(f"{count:.2f}" for count in counts)]
        yield "| " + " | ".join([*cells, f"{sum(map(bool, clean))} of {len(clean)}"]) + " |"
