"""What remains of a network, and of its explanations, when attention carries no content.

    python -m xattn.eval.studies controls photos/ --labels classes.json -b vit_tiny_patch16_224 \\
        --weights FILE

Controls (:mod:`xattn.attention.mechanisms.controls`) replace the attention in blocks of a trained
ViT, and its accuracy is measured. Maps of the network are compared with those of a copy in which
permuted weights make the queries and keys, and with the network's own maps of another photo. Small
networks are trained with a control from the start, on digits and on recall of a value by its key.

Finished results stay in the output folder, from which the same command resumes.

The digits are scikit-learn's, in patches of 2 x 2. Sequences for recall are drawn anew for each
step: a query token with a key, then 8 tokens with a key and a value each; the class is the value
beside the query's key. Keys are distinct and in random order, and values repeat, so that a network
without content can only count the values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from xattn.attention import convert, fit_static, record
from xattn.attention.mechanisms.controls import Map
from xattn.attention.statistics import indicators
from xattn.backbone import Backbone, converted
from xattn.correlation import spearman
from xattn.eval.bootstrap import mean_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.sanity import qk_randomized_backbone
from xattn.eval.studies.digits import Training, pixels_right, right, train
from xattn.eval.studies.options import LabelsAt, Network, OutputAt, PhotosAt, Quick
from xattn.eval.studies.run_files import (
    Rows,
    kept_record,
    kept_values,
    measure_rows,
    raw_rows,
    reported,
    spread,
)
from xattn.eval.studies.small_training import minimize
from xattn.eval.studies.study_photos import Photo, images_of, labelled_photos, photos_record
from xattn.eval.studies.swap.measuring import batch_size
from xattn.explainers import create_explainer
from xattn.runtime.files import check_folder

ROUNDING = 1e-9
Blocks = Literal["all", "last four", "every second"]


@dataclass(frozen=True)
class Bound:
    """The range from ``least`` to ``most``."""

    least: float = -np.inf
    most: float = np.inf

    def __str__(self) -> str:
        if self.least == -np.inf:
            return "" if self.most == np.inf else f"at most {self.most:g}"
        return (
            f"at least {self.least:g}"
            if self.most == np.inf
            else f"{self.least:g} to {self.most:g}"
        )

    def verdict(self, value: float) -> str:
        """A text such as "at most 0.02: kept"; empty without a bound."""
        if not str(self):
            return ""
        kept = self.least - ROUNDING <= value <= self.most + ROUNDING
        return f"{self}: {'kept' if kept else 'missed'}"


NO_BOUND = Bound()


@dataclass(frozen=True)
class Free:
    """A control in blocks of a trained network; without a mechanism, the network as trained."""

    mechanism: str | None
    blocks: Blocks = "all"
    source: str = ""
    bound: Bound = NO_BOUND
    norm: bool = True

    @property
    def name(self) -> str:
        if self.mechanism is None:
            return "as trained"
        where = {"all": "", "last four": ", last four blocks"}.get(
            self.blocks, ", every second block"
        )
        source = f", {self.source}" if self.source else ""
        return self.mechanism + source + ("" if self.norm else ", no norm") + where

    @property
    def key(self) -> str:
        return key_of(self.name)

    @property
    def of_photos(self) -> bool:
        """Whether its maps are made from photos, so that it has to be measured on others."""
        return self.source in ("mean", "photo")

    def layers(self, depth: int) -> Sequence[int]:
        """The numbers of the blocks, out of ``depth``, that get the control; of each pair, the second."""
        if self.blocks == "last four":
            return range(max(0, depth - 4), depth)
        return range(depth) if self.blocks == "all" else range(1, depth, 2)


@dataclass(frozen=True)
class Trained:
    """A control in all blocks of a network, which is trained with it."""

    mechanism: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bound: Bound = NO_BOUND

    @property
    def key(self) -> str:
        return key_of(" ".join([self.mechanism, *map(str, self.options.values())]))


def key_of(name: str) -> str:
    """``name`` as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


FEW, NEARLY = Bound(most=0.02), Bound(least=0.99)
FREE = (
    Free(None),
    Free("uniform", bound=FEW),
    Free("static", source="noise", bound=FEW),
    Free("non_approximate", bound=FEW),
    Free("taylor", bound=FEW),
    Free("static_embedding", bound=FEW),
    Free("static_embedding", bound=FEW, norm=False),
    Free("none"),
    Free("static", source="photo", bound=Bound(most=0.08)),
    Free("static", source="mean", bound=Bound(most=0.12)),
    Free("uniform", "last four", bound=Bound(0.20, 0.38)),
    Free("static", "last four", "mean", Bound(0.42, 0.60)),
    Free("static", "every second", "mean", Bound(0.40, 0.60)),
)
DRAWN, LEARNED = {"source": "drawn"}, {"source": "learned"}
DIGITS = {
    "standard": Trained("softmax", bound=Bound(least=0.93)),
    "static, drawn": Trained("static", DRAWN),
    "static, learned": Trained("static", LEARNED),
    "static_embedding": Trained("static_embedding"),
    "non_approximate": Trained("non_approximate"),
    "taylor": Trained("taylor"),
    "none": Trained("none", bound=Bound(0.90, 0.95)),
    "uniform": Trained("uniform", bound=Bound(most=0.90)),
}
COUNTED = Bound(most=0.42)
RECALL = {
    "standard": Trained("softmax", bound=NEARLY),
    "taylor": Trained("taylor", bound=NEARLY),
    "static_embedding": Trained("static_embedding", bound=NEARLY),
    "non_approximate": Trained("non_approximate", bound=NEARLY),
    "static, drawn": Trained("static", DRAWN, COUNTED),
    "static, learned": Trained("static", LEARNED, COUNTED),
    "uniform": Trained("uniform", bound=COUNTED),
    "none": Trained("none", bound=Bound(most=0.16)),
}


def report(found: Mapping[str, Any]) -> Iterator[str]:
    """Tables of the measurements; see :func:`xattn.eval.studies.content_controls.study`."""
    yield from _free(found)
    yield from _indicators(found["described"])
    yield from _rollout(found)
    yield from _queries_and_keys(found)
    yield from _digits(found)
    yield from _recall(found["recall"])


def _table(*titles: str) -> Iterator[str]:
    yield f"\n| {' | '.join(titles)} |"
    yield f"| :-- |{' --: |' * (len(titles) - 2)} :-- |"


def _free(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n## A trained network, {found['photos']} photos, without training"
    yield from _table("attention", "photos", "right, share", "95 % interval", "expected")
    for row in FREE:
        at = mean_interval(np.array(found["free"][row.name]))
        cells = [f"{at.n}", f"{at.mean:.3f}", f"{at.lo:.3f} to {at.hi:.3f}"]
        cells.append(row.bound.verdict(at.mean))
        yield f"| {row.name} | {' | '.join(cells)} |"


def _indicators(described: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    titles = list(next(iter(described.values())))
    yield "\n## How the layers attend: mean over layers, heads and photos\n"
    yield f"| attention | {' | '.join(titles)} |"
    yield f"| :-- |{' --: |' * len(titles)}"
    for name, values in described.items():
        yield f"| {name} | {' | '.join(f'{values[title]:.3g}' for title in titles)} |"


def _rollout(found: Mapping[str, Any]) -> Iterator[str]:
    one = found["rollout"]
    alike, right = float(np.mean(one["values"])), float(np.mean(found["free"][one["row"]]))
    yield "\n## Rollout with the last four blocks uniform"
    yield from _table("what", "value", "expected")
    yield (
        f"| rank correlation with the map as trained, {found['compared']} photos | {alike:.3f} | "
        f"{Bound(least=0.95).verdict(alike)} |"
    )
    yield f"| right, share | {right:.3f} | {Bound(most=0.40).verdict(right)} |"


def _queries_and_keys(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"\n## Weights of queries and keys permuted, {found['compared']} photos, {found['permutations']} "
        f"permutations: rank correlations"
    )
    titles = ("mean abs(rho)", "another photo", "abs(mean rho)", "another photo")
    yield from _table("explainer", *titles, "expected of mean abs(rho)")
    for name, values in found["qk"].items():
        both = [np.array(values[key]) for key in ("permuted", "another")]
        sizes = [float(np.abs(x).mean()) for x in both]
        cells = [f"{x:.3f}" for x in [*sizes, *(abs(x.mean()) for x in both)]]
        yield f"| `{name}` | {' | '.join(cells)} | {Bound(most=0.15).verdict(sizes[0])} |"


def _digits(found: Mapping[str, Any]) -> Iterator[str]:
    for rate, rows in found["digits"].items():
        yield f"\n## Trained with a control: digits, 2 blocks of width 64, learning rate {rate:g}"
        yield from _table("attention", "right, share", "CPU s", "expected")
        yield f"| logistic regression on pixels | {found['pixels']:.3f} | | |"
        for name, seeds in rows.items():
            bound = DIGITS[name].bound
            if name == "static, drawn":
                bound = Bound(least=round(_mean(rows["standard"]) - 0.01, 3))
            yield _trained_row(name, seeds, bound)


def _recall(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    yield "\n## Trained with a control: recall of 8 values by 8 keys, chance 0.125"
    yield from _table("attention", "right, share", "CPU s", "expected")
    for name, seeds in rows.items():
        yield _trained_row(name, seeds, RECALL[name].bound)


def _trained_row(name: str, seeds: Sequence[Mapping[str, float]], bound: Bound) -> str:
    right = spread([one["right"] for one in seeds])
    seconds = spread([one["seconds"] for one in seeds], 1)
    return f"| {name} | {right} | {seconds} | {bound.verdict(_mean(seeds))} |"


def _mean(seeds: Sequence[Mapping[str, float]]) -> float:
    return float(np.mean([one["right"] for one in seeds]))


PAIRS = VALUES = 8
TOKENS = {"digits": 16, "recall": 1 + PAIRS}
BATCH, TESTED = 128, 2000  # sequences of recall


def network(task: str, mechanism: str, options: Mapping[str, Any], depth: int = 2) -> nn.Module:
    """A ViT of width 64 with 4 heads and the mechanism in its blocks; it has no class token.

    Its layers are initialised as in PyTorch, with larger weights than in timm.
    """
    shared: dict[str, Any] = {
        "patch_size": 1, "embed_dim": 64, "depth": depth, "num_heads": 4, "class_token": False,
        "weight_init": "skip",
    }  # fmt: skip
    if task == "digits":
        shared |= {"patch_size": 2, "img_size": 8, "in_chans": 1, "num_classes": 10}
        net = VisionTransformer(**shared, global_pool="avg")
        assert net.pos_embed is not None
        nn.init.trunc_normal_(net.pos_embed, std=0.02)
    else:
        shared |= {"img_size": (1, 1 + PAIRS), "in_chans": PAIRS + VALUES, "num_classes": VALUES}
        net = VisionTransformer(**shared, global_pool="", pos_embed="none")
    if mechanism != "softmax":
        own = {"tokens": TOKENS[task]} if options.get("source") == "learned" else {}
        convert(net, mechanism, options={**options, **own})
    return net


def digits_right(
    net: nn.Module, split: Split, steps: int, seed: int, lr: float
) -> dict[str, float]:
    """Train on 1,437 digits; return the share of 360 others that is right, and the CPU seconds."""
    seconds = train(net, Training(epochs=max(1, steps // 22), lr=lr, seed=seed), split)
    return {"right": right(net, split), "seconds": seconds}


def recall_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences as images (count, 16, 1, 9), with the query first, and the right values (count,)."""
    keys = torch.rand(count, PAIRS, generator=generator, device="cpu").argsort(1)
    values = torch.randint(VALUES, (count, PAIRS), generator=generator, device="cpu")
    asked = torch.randint(PAIRS, (count, 1), generator=generator, device="cpu")
    query = F.pad(F.one_hot(keys.gather(1, asked), PAIRS), (0, VALUES))
    pairs = torch.cat([F.one_hot(keys, PAIRS), F.one_hot(values, VALUES)], 2)
    tokens = torch.cat([query, pairs], 1).float()
    return tokens.transpose(1, 2)[:, :, None], values.gather(1, asked)[:, 0]


def recall_right(
    net: nn.Module, split: Split, steps: int, seed: int, lr: float = 3e-3
) -> dict[str, float]:
    """Train on fresh sequences, reading the query's token; return the share of 2,000 others that is
    right, and the CPU seconds."""
    generator = torch.Generator().manual_seed(*split.fit([seed]))

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            images, labels = recall_batch(BATCH, generator)
            yield F.cross_entropy(net(images)[:, 0], labels)

    seconds = minimize(net, losses(), steps, lr, weight_decay=0.0)
    tests = torch.Generator().manual_seed(*split.score([seed + 1000]))
    images, labels = recall_batch(TESTED, tests)
    with torch.no_grad():
        share = (net(images)[:, 0].argmax(1) == labels).double().mean()
    return {"right": float(share), "seconds": seconds}


@dataclass(frozen=True)
class ControlStudyConfig:
    """How many photos controls are measured on, whose maps are compared, how long networks train."""

    photos: int = 500  # How many photos, drawn by the seed, are classified.
    fitted: int = 100
    """How many of these photos the mean maps are made from; the map of one photo is the first's."""
    compared: int = 40  # How many of them maps are compared on.
    explainers: tuple[str, ...] = (
        "rollout",
        "raw_attention",
        "column_mass",
        "generic_relevance",
        "attn_lrp",
        "gradcam",
        "input_x_gradient",
    )
    """Explainers whose maps are compared with those for permuted queries and keys."""
    permutations: int = 3  # Permutations of the weights of queries and keys.
    digit_steps: int = 440  # Training steps on digits.
    digit_rates: tuple[float, ...] = (1e-3,)
    """Learning rates of the networks trained on digits; each has its own table."""
    recall_steps: int = 500  # Training steps on recall.
    seeds: int = 1  # Networks of each kind: seeds 0, 1, ...
    seed: int = 0  # Seed of the photos and the permutations.

    def quick(self) -> ControlStudyConfig:
        """A few photos and steps, to see that everything runs; its figures mean nothing."""
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


AT_ONCE = 50  # photos per file of classes
DESCRIBED = 4  # photos per mean of a layer's indicators
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
    """Measure what is not finished yet, write report.md, and yield its lines.

    Args:
        backbone: a trained ViT, which is not changed.
        data, labels: as in :func:`~xattn.eval.studies.swapped_attention.study`.
        output: folder for finished results and the report.
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
                output / "qk" / f"{name}.json", partial(qk_alike, backbone, name, few, config)
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
    """The raw values of photos, of maps, and of trained networks."""
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
    """Whether each row classifies a photo correctly; empty if static maps are made from the photo."""
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
    """The rank correlations, photo by photo."""
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
        photos: those from which static maps are made.
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
        """The maps of every block, of one photo or averaged over all."""
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
    """Whether the row's network classifies each photo correctly, 0 or 1."""
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
    """Eight indicators of attention, averaged over layers, heads and photos."""
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
    """The images, and the classes that the network as trained predicts."""
    images = images_of(backbone, photos)
    return images, torch.tensor(classes_of(backbone, photos), device=images.device)


def rollout_alike(networks: Networks, photos: Sequence[Photo]) -> Measured:
    """Rank correlation of rollout's maps before and after the last four blocks are made uniform."""
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
    """Rank correlation of an explainer's maps with those for permuted queries and keys, permutation by
    permutation, and with its own maps of the previous photo."""
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
    """The measurements of a task's networks, by name and seed by seed."""
    rows: Mapping[str, Any] = DIGITS if task == "digits" else RECALL
    trained = digits_right if task == "digits" else recall_right

    def measure(name: str, split: Split, seed: int) -> Measured:
        net = network(task, rows[name].mechanism, rows[name].options)
        return trained(net, split, seed=seed, **settings)

    by_key = {rows[name].key: partial(measure, name) for name in rows}
    found = measure_rows(output, settings, by_key, seeds)
    return {name: found[rows[name].key] for name in rows}
