"""What is left of a network, and of its explanations, when attention carries no content.

    python -m xattn.eval.studies controls photos/ --labels classes.json -b vit_tiny_patch16_224 \\
        --weights FILE

Controls (:mod:`xattn.attention.mechanisms.controls`) take the place of attention in blocks of a trained
ViT, and its accuracy is measured. Maps of the network are compared with those of a copy whose queries and
keys are made by permuted weights, and with the network's own of another photo. Small networks are trained
with a control from the start, on digits and on recall of a value by its key
(:mod:`~xattn.eval.studies.control_tasks`).

What is finished stays in the output folder, and the same command goes on there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.attention import fit_static, record
from xattn.attention.mechanisms.controls import Map
from xattn.attention.statistics import indicators
from xattn.backbone import Backbone, converted
from xattn.correlation import spearman
from xattn.eval.evaluation.split import Split
from xattn.eval.sanity import qk_randomized_backbone
from xattn.eval.studies.control_report import DIGITS, FREE, RECALL, Free, report
from xattn.eval.studies.control_tasks import digits_right, network, recall_right
from xattn.eval.studies.digits import pixels_right
from xattn.eval.studies.kept import (
    Rows,
    kept_record,
    kept_values,
    measure_rows,
    raw_rows,
    reported,
)
from xattn.eval.studies.options import LabelsAt, Network, OutputAt, PhotosAt, Quick
from xattn.eval.studies.study_photos import Photo, images_of, labelled_photos, photos_record
from xattn.eval.studies.swap.measures import batch_size
from xattn.explainers import create_explainer
from xattn.runtime.files import check_folder


@dataclass(frozen=True)
class ControlStudyConfig:
    """On how many photos controls are measured, whose maps are compared, and how long networks train."""

    photos: int = 500
    """How many photos, drawn by the seed, are classified."""
    fitted: int = 100
    """Of how many of these mean maps are made; the map of one photo is that of the first."""
    compared: int = 40
    """On how many of them maps are compared."""
    explainers: tuple[str, ...] = (
        "rollout",
        "raw_attention",
        "column_mass",
        "generic_relevance",
        "attn_lrp",
        "gradcam",
        "input_x_gradient",
    )
    """Whose maps are compared with those of permuted queries and keys."""
    permutations: int = 3
    """Of the weights of queries and keys."""
    digit_steps: int = 440
    """Of a network trained on digits."""
    digit_rates: tuple[float, ...] = (1e-3,)
    """Learning rates of networks trained on digits, a table each."""
    recall_steps: int = 500
    """Of a network trained on recall."""
    seeds: int = 1
    """Networks of each kind: seeds 0, 1, ..."""
    seed: int = 0
    """Of the photos and of what is permuted."""

    def quick(self) -> ControlStudyConfig:
        """A few photos and steps, to see that all runs: no figure of it means anything."""
        return replace(
            self,
            photos=6,
            fitted=3,
            compared=2,
            permutations=1,
            digit_steps=22,
            digit_rates=self.digit_rates[:1],
            recall_steps=3,
            seeds=1,
        )


AT_ONCE = 50  # photos whose classes a file holds
DESCRIBED = 4  # photos of which a layer's indicators are the mean
DEFAULTS = ControlStudyConfig()
Measured = dict[str, Any]


def study(
    backbone: Network,
    data: PhotosAt,
    labels: LabelsAt = "folders",
    output: OutputAt = "runs/study-controls",
    config: ControlStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Measure what is not finished yet, write report.md, and give its lines.

    Args:
        backbone: a trained ViT; it stays as it is.
        data, labels: as in :func:`~xattn.eval.studies.swapped_attention.study`.
        output: folder of what is finished and of the report.

    Raises:
        ValueError: too few photos with a class of the backbone, a backbone whose attention cannot be
            converted, an unknown explainer, or ``output`` holds results of other settings or photos.
    """
    config = config.quick() if quick else config
    output = Path(output)
    photos = labelled_photos(backbone, data, labels, config.seed)[: config.photos]
    if len(photos) <= config.fitted:
        raise ValueError(
            f"photos: got {len(photos)} with a class, fitted: {config.fitted}; give more photos than these"
        )
    for name in config.explainers:
        create_explainer(name, backbone)
    check_folder(output)
    later = ("explainers", "seeds", "digit_rates")  # more of these may be added
    settings = {k: v for k, v in asdict(config).items() if k not in later}
    kept_record(output / "record.json", photos_record(backbone, photos, settings))
    split = Split("controls")
    static = split.fold()  # the networks whose maps are made from photos
    networks = Networks(backbone, static.fit(photos[: config.fitted]))
    photos, others = split.score(photos), static.score(photos[config.fitted :])
    split.write(output / "split.json")
    free = {
        row.name: _classified(row, networks, others if row.of_photos else photos, output)
        for row in FREE
    }
    few = photos[: config.compared]
    found: Measured = {
        "photos": len(photos),
        "free": free,
        "described": {
            row.name: kept_values(
                output / "indicators" / f"{row.key}.json",
                partial(_described, row, networks, photos[:DESCRIBED]),
            )
            for row in FREE
            if row.blocks == "all"
        },
        "rollout": kept_values(output / "rollout.json", partial(rollout_alike, networks, few)),
        "qk": {
            name: kept_values(
                output / "qk" / f"{name}.json",
                partial(qk_alike, backbone, name, few, config),
            )
            for name in config.explainers
        },
        "compared": len(few),
        "permutations": config.permutations,
        "pixels": kept_values(output / "pixels.json", lambda: {"right": pixels_right()})["right"],
        "digits": {
            rate: _trained(
                "digits",
                output / "digits" / f"{rate:g}",
                {"steps": config.digit_steps, "lr": rate},
                config.seeds,
            )
            for rate in config.digit_rates
        },
        "recall": _trained(
            "recall", output / "recall", {"steps": config.recall_steps}, config.seeds
        ),
    }
    heading = f"{backbone.name}, weights sha256 {backbone.fingerprint[:12]}, {len(photos)} photos"
    tables = _tables(found, photos, config)
    yield from reported(output, [heading, *report(found)], tables)


def _tables(
    found: Measured, photos: Sequence[Photo], config: ControlStudyConfig
) -> dict[str, Rows]:
    """The raw values: of photos, of maps, and of trained networks."""
    trained = {f"digits, {rate:g}": rows for rate, rows in found["digits"].items()}
    trained["recall"] = found["recall"]
    return {
        "photos": _photo_rows(found["free"], photos, config.fitted),
        "maps": _map_rows(found["rollout"]["values"], found["qk"], photos[: config.compared]),
        "trained": [
            {"task": task, **row} for task, rows in trained.items() for row in raw_rows(rows)
        ],
    }


def _photo_rows(free: Mapping[str, Sequence[float]], photos: Sequence[Photo], fitted: int) -> Rows:
    """Whether each row tells a photo right; nothing where static maps are made from the photo."""
    rows: list[Measured] = []
    for i, photo in enumerate(photos):
        right = {
            row.name: free[row.name][i - fitted * row.of_photos]
            for row in FREE
            if i >= fitted * row.of_photos
        }
        rows.append({"photo": photo.name, "label": photo.label, **right})
    return rows


def _map_rows(rollout: Sequence[float], qk: Mapping[str, Any], photos: Sequence[Photo]) -> Rows:
    """Rank correlations, photo by photo."""
    rows = [("rollout", "last four blocks uniform", rollout)]
    for name, values in qk.items():
        n, permuted = len(photos), values["permuted"]
        rows.append((name, "another photo", values["another"]))
        rows += [
            (name, f"permutation {at // n}", permuted[at : at + n])
            for at in range(0, len(permuted), n)
        ]
    return [
        {"explainer": name, "beside": beside, "photo": photo.name, "rho": value}
        for name, beside, values in rows
        for photo, value in zip(photos, values, strict=True)
    ]


# ---------------------------------------------------------------------- a trained network


class Networks:
    """Converted copies of a ViT by row.

    Args:
        photos: of which static maps are made.
    """

    def __init__(self, backbone: Backbone, photos: Sequence[Photo]) -> None:
        self.backbone, self.photos = backbone, photos
        self._maps: dict[str, dict[int, Map]] = {}

    def of(self, row: Free) -> Backbone:
        """The network of a row."""
        if row.mechanism is None:
            return self.backbone
        depth = len(self.backbone.model.blocks)  # type: ignore[arg-type]
        options: dict[str, Any] = {"source": row.source} if row.source == "noise" else {}
        if not row.norm:
            options["norm"] = False
        made = converted(self.backbone, row.mechanism, row.layers(depth), options)
        if row.of_photos:
            maps = self._of_photos(row.source)
            for number in row.layers(depth):
                made.model.blocks[number].attn.mechanism.keep(maps[number])  # type: ignore[index,union-attr]
        return made

    def _of_photos(self, source: str) -> dict[int, Map]:
        """The maps of every block, of one photo or mean over all."""
        if source not in self._maps:
            whole = converted(self.backbone, "static")
            some = self.photos if source == "mean" else self.photos[:1]
            step = batch_size(self.backbone.preprocessing.input_size[0])
            parts = (some[i : i + step] for i in range(0, len(some), step))
            fit_static(whole, (images_of(self.backbone, part) for part in parts))
            found: Any = [block.attn.mechanism for block in whole.model.blocks]  # type: ignore[union-attr]
            self._maps[source] = {i: Map(m.kept, m.grid) for i, m in enumerate(found)}
        return self._maps[source]


def _classified(
    row: Free, networks: Networks, photos: Sequence[Photo], output: Path
) -> list[float]:
    """Whether the row's network tells each photo right, 0 or 1."""
    right: list[float] = []
    made: list[Backbone] = []
    for start in range(0, len(photos), AT_ONCE):
        some = photos[start : start + AT_ONCE]

        def measure(some: Sequence[Photo] = some) -> Measured:
            if not made:
                made.append(networks.of(row))
            return {"classes": classes_of(made[0], some)}

        file = output / "classes" / f"{row.key}-{start // AT_ONCE:02}.json"
        classes = kept_values(file, measure)["classes"]
        right += [float(k == p.label) for k, p in zip(classes, some, strict=True)]
    return right


@torch.no_grad()
def classes_of(network: Backbone, photos: Sequence[Photo]) -> list[int]:
    """The predicted class of each photo."""
    step = batch_size(network.preprocessing.input_size[0])
    parts = (images_of(network, photos[i : i + step]) for i in range(0, len(photos), step))
    return [int(k) for part in parts for k in network.logits(part).argmax(1)]


def _described(row: Free, networks: Networks, photos: Sequence[Photo]) -> Measured:
    return described(networks.of(row), photos)


@torch.no_grad()
def described(network: Backbone, photos: Sequence[Photo]) -> Measured:
    """Eight indicators, mean over layers, heads and photos."""
    with record(network.model) as calls:
        network.logits(images_of(network, photos))
    prefix = network.prefix_tokens
    side = round((calls[0].operator.shape[2] - prefix) ** 0.5)
    layers = [indicators(call.operator, (side, side), prefix) for call in calls]
    whole = {
        name: float(torch.stack([getattr(layer, name) for layer in layers]).mean())
        for name in ("entropy", "concentration", "diversity", "sink")
    }
    focus = torch.stack([layer.focus for layer in layers]).mean((0, 1, 2))
    return whole | {f"focus {n}": float(value) for n, value in enumerate(focus)}


def maps_of(network: Backbone, name: str, images: Tensor, targets: Tensor) -> Tensor:
    """Maps (n, 1, h, w) of an explainer."""
    explainer = create_explainer(name, network)
    step = batch_size(network.preprocessing.input_size[0])
    pairs = zip(images.split(step), targets.split(step), strict=True)
    return torch.cat([explainer.attribute(*pair).detach().float() for pair in pairs])


def _seen(backbone: Backbone, photos: Sequence[Photo]) -> tuple[Tensor, Tensor]:
    """Images, and the class that the network as it was trained predicts."""
    images = images_of(backbone, photos)
    return images, torch.tensor(classes_of(backbone, photos), device=images.device)


def rollout_alike(networks: Networks, photos: Sequence[Photo]) -> Measured:
    """Rank correlation of rollout's maps before and after the last four blocks are uniform."""
    images, targets = _seen(networks.backbone, photos)
    row = next(r for r in FREE if (r.mechanism, r.blocks) == ("uniform", "last four"))
    pair = [
        maps_of(network, "rollout", images, targets)
        for network in (networks.backbone, networks.of(row))
    ]
    return {"row": row.name, "values": spearman(*pair).tolist()}


def qk_alike(
    backbone: Backbone, name: str, photos: Sequence[Photo], config: ControlStudyConfig
) -> Measured:
    """Rank correlation of an explainer's maps with those of permuted queries and keys, permutation by
    permutation, and with its own maps of the photo before."""
    images, targets = _seen(backbone, photos)
    own = maps_of(backbone, name, images, targets)
    found: dict[str, list[float]] = {"permuted": [], "another": _alike(own, own.roll(1, 0))}
    for number in range(config.permutations):
        twin = qk_randomized_backbone(backbone, config.seed + number)
        found["permuted"] += _alike(own, maps_of(twin, name, images, targets))
    return found


def _alike(maps: Tensor, others: Tensor) -> list[float]:
    return spearman(maps, others).nan_to_num(0.0).tolist()


# ---------------------------------------------------------------------- networks trained with a control


def _trained(
    task: str, output: Path, settings: dict[str, Any], seeds: int
) -> dict[str, list[Measured]]:
    """What was measured of a task's networks, by name and seed by seed."""
    rows: Mapping[str, Any] = DIGITS if task == "digits" else RECALL
    trained = digits_right if task == "digits" else recall_right

    def measure(name: str, split: Split, seed: int) -> Measured:
        net = network(task, rows[name].mechanism, rows[name].options)
        return trained(net, split, seed=seed, **settings)

    by_key = {rows[name].key: partial(measure, name) for name in rows}
    found = measure_rows(output, settings, by_key, seeds)
    return {name: found[rows[name].key] for name in rows}
