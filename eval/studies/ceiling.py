"""How far methods are from the best pixel order that a search finds, in insertion and deletion.

    python -m xattn.eval.studies ceiling PHOTOS --rows cam gradcam lime --output runs/ceiling

Both are measured with black as the fill, at ``--steps`` steps. The rows are listed with these ceilings:

    best, its own    the best of the rows for each photo, chosen separately for insertion and deletion
    best, one        the row with the largest insertion - deletion for each photo
    search           an order that a search finds, starting from that row's order

The search swaps a random share of the pixels between neighbouring steps of the order, and keeps swaps
that improve insertion - deletion. A swap between steps t and t + 1 changes only the photo after t
steps, so one try makes swaps at every second t, and keeps or rejects each of them. Let m be a row's
mean, c that of the ``--reference``, and s that of the search, whose single order serves both metrics.
Then (m - c) / (s - c) is the share of the way that the row has come. Its interval resamples photos,
the same ones for all three means.

A row is an explainer with its options, or a head that :mod:`~xattn.eval.studies.fold_rows` has trained
into the folder ``--trained``: each photo is explained by the head of its fold. Finished results for a
row, a photo and a search are read from a file the next time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from xattn.backbone import Backbone
from xattn.eval.bootstrap import N_RESAMPLES, mean_interval, paired_difference, resampled_means
from xattn.eval.evaluation.facts import describe
from xattn.eval.evaluation.split import Split
from xattn.eval.functional import saliency
from xattn.eval.metrics.base import Column, Sample
from xattn.eval.metrics.curves import InsertionDeletionMetric, curves
from xattn.eval.metrics.measure import measure, scores_of, submit_all
from xattn.eval.metrics.scorer import MaskedScorer, PendingScore
from xattn.eval.studies.fold_rows import FoldRows, Row, names
from xattn.eval.studies.order_teacher import image_of
from xattn.eval.studies.run_files import finished_values, reported
from xattn.eval.studies.study_backbone import study_backbone
from xattn.explainers import Explainer, create_explainer
from xattn.heads import load_head
from xattn.photos.images import list_images
from xattn.runtime.files import atomic_file, file_sha256, write_json
from xattn.runtime.tables import markdown

METRICS = ("insertion", "deletion")
BEST_EACH, BEST, SEARCH = "best, its own", "best, one", "search"
ROWS = ("cam", "gradcam", "lime", "rise", "extremal_perturbation:fill=black", "igos_pp:fill=black")
Values = dict[str, float | None]  # by metric; None for a constant map
Gains = Callable[[Tensor], Tensor]
"""An order of pixels (H W,) -> insertion minus deletion after 0, ..., T steps, (T + 1,)."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Measure rows, the best row for each photo, and the order that a search finds."""

    data: tyro.conf.Positional[str]  # A folder with one folder of images per class.
    rows: tuple[str, ...] = ROWS
    """LABEL=NAME:option=value,... of an explainer or a head; some need thousands of passes per photo."""
    reference: str = "cam"  # The label of the row that counts as 0 on the way to the search.
    trained: Path = Path("runs/rows")  # The output folder of fold-rows, with the heads.
    output: Path = Path("runs/ceiling")  # Folder for finished results and the report.
    backbone: str = "tf_efficientnet_lite0"  # A timm model name.
    weights: str = "package"  # See xattn train --help.
    taps: tuple[str, ...] = ()  # See xattn train --help.
    folds: int = 5  # As for fold-rows.
    only: tuple[int, ...] = ()  # Only these folds.
    per_fold: int = 4  # Photos of each fold, drawn by the fold's number.
    steps: int = 14  # Steps of insertion and deletion.
    tries: int = 300  # Tries of the search.
    share: float = 0.1  # Share of a step's pixels that a swap exchanges.
    seed: int = 0  # Seed of the swaps and the explainers.
    max_forward_batch: int = 16  # Images per forward pass.
    channels_last: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Memory format of the backbone; faster on CPUs for convolutional networks."""

    @property
    def metric(self) -> InsertionDeletionMetric:
        """Insertion and deletion with black as the fill."""
        return InsertionDeletionMetric(
            steps=self.steps, deletion_fill="black", insertion_fill="black"
        )


@dataclass(frozen=True)
class Photo:
    """An image (3, H, W), the class that is explained, and the scorer for orders of its pixels."""

    image: Tensor
    target: int
    backbone: Backbone
    metric: InsertionDeletionMetric
    max_forward_batch: int = 16

    def values(self, found: Tensor) -> Values:
        """The insertion and deletion of a map (1, 1, h, w)."""
        areas = measure(
            self.metric, self.backbone, self.image[None], found, self.target,
            max_forward_batch=self.max_forward_batch,
        )  # fmt: skip
        plain = {metric: areas[Column(metric)].item() for metric in METRICS}
        return {metric: None if math.isnan(value) else value for metric, value in plain.items()}

    def gains(self) -> Gains:
        """A function that gives the gains of this photo's orders."""
        scorer = Remembering(self.backbone, self.max_forward_batch)
        target = torch.tensor([self.target], device="cpu")
        clean = float(scorer.clean(self.image[None], target)[0])

        def gains(order: Tensor) -> Tensor:
            grey = map_of(order, self.image.shape[1:])[0].to(self.image.device)
            sample = Sample(self.image.float(), grey, grey, self.target, clean)
            tickets: dict[str, list[PendingScore]] = {}
            submit_all(self.metric.measure(sample), scorer, self.target, tickets)
            scorer.flush()
            both = curves(scores_of(tickets), clean)
            return both["insertion"] - both["deletion"]

        return gains


class Remembering(MaskedScorer):
    """A scorer that passes no image twice, not even images that a metric does not share."""

    def submit(
        self, perturbed: Tensor, target: int, shared: bool = True, hit: bool = False
    ) -> PendingScore:
        return super().submit(perturbed, target, hit=hit)


def map_of(order: Tensor, size: Sequence[int]) -> Tensor:
    """The map (1, 1, H, W) in [0, 1] whose pixels fall in ``order`` (H W,)."""
    grey = torch.empty(len(order), device="cpu")
    grey[order] = torch.linspace(1, 0, len(order), device="cpu")
    return grey.view(1, 1, *size)


def search_order(
    order: Tensor, gains: Gains, steps: int, tries: int, share: float = 0.1, seed: int = 0
) -> Tensor:
    """Search from ``order`` as the module describes: an order (n,) that is no worse at any step."""
    generator = torch.Generator().manual_seed(seed)
    parts = list(order.clone().split(-(-len(order) // steps)))
    best = gains(order)
    for number in range(tries):
        places = range(1 + number % 2, len(parts), 2)
        tried = [part.clone() for part in parts]
        for t in places:
            before, after = tried[t - 1], tried[t]
            count = max(1, round(share * min(len(before), len(after))))
            here, there = (
                torch.randperm(len(part), generator=generator, device="cpu")[:count]
                for part in (before, after)
            )
            before[here], after[there] = after[there], before[here]
        found = gains(torch.cat(tried))
        for t in places:
            if found[t] > best[t]:
                best[t] = found[t]
                parts[t - 1], parts[t] = tried[t - 1], tried[t]
    return torch.cat(parts)


# ---------------------------------------------------------------- rows, photo by photo


def study(args: Ceiling) -> Iterator[str]:
    """Do what is not finished yet, and give the report."""
    rows = {row.label: row for row in map(Row.parse, args.rows)}
    if args.reference not in rows or len(rows) < len(args.rows):
        raise ValueError(
            f"rows: got {list(args.rows)}; give {args.reference} and others, each once"
        )
    backbone = study_backbone(args.backbone, args.weights, args.taps, args.channels_last)
    few: dict[str, Any] = {"folds": args.folds, "only": args.only, "per_fold": args.per_fold}
    folds = FoldRows(data=args.data, rows=(), **few).parts(list_images(args.data))
    split = Split("ceiling")
    found: list[dict[str, Values]] = []
    for part, (_, photos) in folds.items():
        methods = {label: explainer_of(row, backbone, part, args) for label, row in rows.items()}
        for path, name in zip(split.score(photos), names(photos), strict=True):
            image = image_of(path, backbone)
            with torch.no_grad():
                target = int(backbone.logits(image[None]).argmax())
            photo = Photo(image, target, backbone, args.metric, args.max_forward_batch)
            folder = args.output / part / name.replace("/", "-")
            found.append(photo_values(photo, methods, file_sha256(path), folder, args))
    split.write(args.output / "split.json")
    table = {label: {m: column(found, label, m) for m in METRICS} for label in found[0]}
    about = f"{len(found)} photos, {backbone.name}, {args.steps} steps in black, {args.tries} tries"
    lines = [f"{about}\n", *report(table, args.reference)]
    raw = [{"row": row, "photo": i} | one[row] for row in table for i, one in enumerate(found)]
    yield from reported(args.output, lines, {"values": raw})


def explainer_of(row: Row, backbone: Backbone, part: str, args: Ceiling) -> Explainer:
    """The explainer of a row for the photos of a fold, whose folders have the name ``part``."""
    shared: dict[str, Any] = {"seed": args.seed, "max_forward_batch": args.max_forward_batch}
    if row.controls:
        raise ValueError(f"rows: {row.label} is a control of fold-rows; give explainers and heads")
    if not row.is_head:
        return create_explainer(row.name, backbone, **shared, **row.options)
    head = load_head(args.trained / part / row.label / "run" / "head", backbone)
    return create_explainer("head", backbone, head, **shared, **row.shown)


def photo_values(
    photo: Photo, methods: Mapping[str, Explainer], sha256: str, folder: Path, args: Ceiling
) -> dict[str, Values]:
    """The values of one photo by row, the ceilings last; ``folder`` keeps finished results."""
    record: dict[str, Any] = {"photo": sha256, "metric": repr(photo.metric)}
    found: dict[str, Values] = {}
    for label, method in methods.items():

        def explained(label: str = label, method: Explainer = method) -> Values:
            one = method.attribute(photo.image[None], photo.target).float().cpu()
            with atomic_file(folder / f"{label}.npy") as temporary:
                np.save(temporary, one.numpy())
            return photo.values(one)

        found[label] = kept(folder / f"{label}.json", record | describe(method), explained)
    valid: dict[str, Any] = {k: one for k, one in found.items() if None not in one.values()}
    best = max(valid, key=lambda label: valid[label]["insertion"] - valid[label]["deletion"])
    most = max(one["insertion"] for one in valid.values())
    each: Values = {"insertion": most, "deletion": min(one["deletion"] for one in valid.values())}
    settings: dict[str, Any] = {
        name: getattr(args, name) for name in ("steps", "tries", "share", "seed")
    }

    def search() -> Values:
        size = photo.image.shape[1:]
        grey, _ = saliency(torch.from_numpy(np.load(folder / f"{best}.npy")), size)
        start = grey.flatten().argsort(descending=True, stable=True)  # as the metric orders pixels
        return photo.values(map_of(search_order(start, photo.gains(), **settings), size))

    record = {**record, **settings, "start": found[best]}
    file = folder / f"{SEARCH} from {best}, {args.tries} tries.json"
    return {**found, BEST_EACH: each, BEST: found[best], SEARCH: kept(file, record, search)}


def kept(file: Path, record: Mapping[str, Any], make: Callable[[], Values]) -> Values:
    """The values that ``file`` holds for ``record``; if there is no such file, make and write them."""
    record = json.loads(json.dumps(record))
    values = finished_values(file, record)
    if values is None:
        values = make()
        write_json(file, {"record": record, "values": values})
    return values  # type: ignore[no-any-return]


# ---------------------------------------------------------------- the report

Numbers = NDArray[np.float64]  # (n,), of the photos


def report(table: Mapping[str, Mapping[str, Numbers]], reference: str) -> Iterator[str]:
    """A Markdown table: means, differences from the reference, and shares of the way to the search."""
    titles = [f"{m}{what}" for m in METRICS for what in ("", f" - {reference}", ", of the way")]
    rows = []
    for label, of in table.items():
        cells = [label]
        for metric in METRICS:
            ours, base, ceiling = of[metric], table[reference][metric], table[SEARCH][metric]
            less = paired_difference(ours, base)
            cells.append(mean_interval(ours).text(3))
            cells.append(f"{less.mean:+.3f} [{less.lo:+.3f}, {less.hi:+.3f}]")
            cells.append("-" if label == reference else way(ours, base, ceiling))
        rows.append(cells)
    return markdown(["row", *titles], rows)


def column(photos: Sequence[Mapping[str, Values]], label: str, metric: str) -> Numbers:
    """The values (n,) of a row; NaN where its map is constant."""
    return np.array([photo[label][metric] for photo in photos], dtype=np.float64)


def way(ours: Numbers, reference: Numbers, ceiling: Numbers) -> str:
    """mean(ours - reference) / mean(ceiling - reference) over valid photos, with a 95 % interval."""
    pairs = np.stack([ours - reference, ceiling - reference], 1)
    pairs = pairs[~np.isnan(pairs).any(1)]
    if not pairs[:, 1].any():
        return "-"
    drawn = resampled_means(pairs, N_RESAMPLES, 0)
    lo, hi = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    share = pairs[:, 0].mean() / pairs[:, 1].mean()
    return f"{share:.2f} [{lo:.2f}, {hi:.2f}]"
