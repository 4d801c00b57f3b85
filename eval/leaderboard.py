"""Compares heads and explainers in one leaderboard: metrics, sanity rows, intervals and a report.

    xattn compare PHOTOS --heads ... --explainers ... --metrics ...

The output folder contains ``leaderboard.md``, ``.csv`` and ``.json``, ``images.csv``, ``report.html``, and
``pack/`` with the maps for ``xattn app``. For a ViT, ``sanity.csv`` lists how similar the maps are to maps
for which the attention was changed so that it does not depend on the content. A report card, if there is
one, is written to ``report-card.csv``. A run that was killed can be resumed from ``state.sqlite`` (and
``card.sqlite`` for the report card). ``seconds.js`` holds the run's duration, which the page shows. All
files except the states and the duration depend only on the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.backbone.scored import BackboneView, scored
from xattn.eval.annotations.objects import load_annotations
from xattn.eval.evaluation.engine import create_metrics, evaluate, explainers_for
from xattn.eval.evaluation.map_maker import Randomized
from xattn.eval.evaluation.plan import plan
from xattn.eval.evaluation.results import Results
from xattn.eval.evaluation.stream import ImageStream
from xattn.eval.interfaces import Explainer
from xattn.eval.metrics.base import PerturbationMetric
from xattn.eval.metrics.registry import (
    BOARD,
    create_metric,
    direct_groups,
    groups_with_annotations,
    groups_without_annotations,
)
from xattn.eval.protocol import Protocol, score_of
from xattn.eval.report.comparison_pack import can_pack, write_pack
from xattn.eval.report.leaderboard_files import write_report
from xattn.eval.report.report_card import ReportCard, report_card
from xattn.eval.sanity import Cascade, first_photos, likeness, sanity_rows, without_content
from xattn.eval.sanity.ladders import ANCHORS, DONORS, Anchor, CardRows, card_rows
from xattn.explainers import create_explainer, list_explainers
from xattn.explainers.adapters import as_explainers
from xattn.explainers.base import options_by_name
from xattn.explaining.naming import named_photos
from xattn.explaining.passes import true_classes_of
from xattn.heads import Head
from xattn.packs.format import is_pack
from xattn.photos.images import MAX_PIXELS
from xattn.photos.sources import Files, is_listed, limit_photos
from xattn.runtime.distributed import processes
from xattn.runtime.files import check_output, write_text

MOST_OF_ALL = {
    False: 1000,
    True: 4000,
}  # "all" leaves out methods that need more passes than this; the key is whether the method perturbs images


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare and how; see ``xattn compare --help``.

    ``heads`` maps row names to trained heads. ``explainers`` is a list of names, or maps row names to
    names, explainers, trained heads or your own methods (:mod:`xattn.explainers.adapters`). Your own
    methods are not run on randomised networks unless they are registered. ``metrics`` lists metrics or
    names of metric groups. Each of the ``options`` is a string ``explainer.name=value``; for heads, it is
    ``head.name=value`` or ``row.name=value``. The maps of the first ``maps`` images are written to the
    pack, together with the true classes from ``labels`` (as in :func:`xattn.explaining.photos.explain`).
    ``card_photos`` is the number of photos for the report card (:mod:`xattn.eval.report.report_card`). If
    it is None, the card uses 60 photos when the metrics include ``"board"``, and otherwise there is no
    card. ``target`` is a number computed from the network's output that is explained instead of the
    predicted class, see :mod:`xattn.backbone.targets`.

    Example:
        >>> import xattn
        >>> from xattn.eval import Comparison
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> Comparison(backbone=net, explainers=["gradcam", "random"]).explainers
        ['gradcam', 'random']
    """

    backbone: Backbone
    heads: Mapping[str, Head] = field(default_factory=dict)
    explainers: Sequence[str] | Mapping[str, Any] = ("gradcam",)
    options: Sequence[str] = ()
    metrics: Sequence[str | PerturbationMetric] = ("direct",)
    annotations: Path | None = None
    again_limit: int | None = 2
    view: str = "crop"
    precision: str = "float32"
    max_forward_batch: int = 32
    max_pixels: int | None = MAX_PIXELS
    seed: int = 0
    maps: int = 1000
    labels: str | Path | None = None
    target: Any = None
    card_photos: int | None = None

    def __post_init__(self) -> None:
        for name in ("annotations", "labels", "card_photos") if self.clips else ():
            if getattr(self, name):
                raise ValueError(
                    f"{name}: this option is only for networks that read photos, but "
                    f"{self.backbone.name} reads clips; leave it out"
                )
        if self.target is not None:
            object.__setattr__(self, "backbone", scored(self.backbone, self.target))

    @property
    def clips(self) -> bool:
        """Whether the network reads clips, whose maps are not written as a pack."""
        return getattr(self.backbone, "reads_clips", False)


def compare(
    job: Comparison,
    images: Any,
    output: Path,
    *,
    limit: int | None = None,
    progress: bool = True,
    say: Callable[[str], Any] = lambda line: None,
) -> tuple[Results, list[Path]]:
    """Run a comparison and write its report to ``output``; a killed run resumes from ``state.sqlite``.

    Args:
        images, limit: as in :func:`xattn.eval.evaluate`.
        say: called with each line of progress, such as the estimated cost or an explainer that is left out.

    Raises:
        ValueError: a name or option is unknown, there is no image, or the state belongs to another run.
        OSError: a file cannot be read or written.

    Example:
        >>> import tempfile, torch, xattn
        >>> from xattn.eval import Comparison, compare
        >>> from pathlib import Path
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> job = Comparison(backbone=net, explainers=["gradcam"], metrics=["masking"])
        >>> run = Path(tempfile.mkdtemp()) / "run"
        >>> _ = compare(job, torch.rand(3, 3, 64, 64), run, progress=False)
    """
    output.mkdir(parents=True, exist_ok=True)
    images, limit = limit_photos(images, limit, job.seed, job.clips)
    packed = job.maps > 0 and can_pack(images) and not job.clips
    if packed:
        check_output(output / "pack", is_ours=is_pack)
    truth = None
    if job.labels is not None:  # fail now rather than after the work
        truth = true_classes_of(named_photos(images), job.labels, job.backbone)
    protocol = Protocol(
        score_of(job.backbone), precision=job.precision, seed=job.seed, view=job.view
    )
    metrics = create_metrics(
        _defined(job, protocol, say), protocol, job.backbone.preprocessing.mean
    )
    noted = job.annotations
    annotations = None if noted is None else load_annotations(noted, job.backbone)
    photos = first_photos(images, job.backbone, job.view)
    methods, recipes, refused = methods_of(job, photos)
    for name, reason in refused.items():
        say(f"left out {name}: {reason}")
    ranks, rank = processes(job.backbone.device)
    first = next(iter(recipes), None)
    if first is not None and recipes[first].head is not None:
        say(f"randomized_head: the head of the row {first}, on a network with random weights")
    print_plan(job, methods, metrics, images, limit, ranks, say)
    results = evaluate(
        job.backbone,
        methods,
        images,
        metrics=metrics,
        protocol=protocol,
        max_forward_batch=job.max_forward_batch,
        max_pixels=job.max_pixels,
        limit=limit,
        progress=progress,
        annotations=annotations,
        randomized=randomized_of(job, recipes, metrics),
        again_limit=job.again_limit,
        state=output / "state.sqlite",
        kept_maps=job.maps if packed else 0,
    )
    card = _report_card(job, metrics, images, output, results, progress, say)
    if rank > 0:
        return results, []
    paths = {} if job.clips else _paths_of(images)
    files = write_report(results, output, paths, job.backbone.preprocessing, card)
    files += _write_likeness(job, methods, recipes, photos, output / "sanity.csv", say)
    if packed:
        write_pack(
            output / "pack",
            results,
            output / "state.sqlite",
            images,
            job.backbone,
            methods,
            limit=job.maps,
            truth=truth,
            say=say,
        )
        say(f"pack: {output / 'pack'}")
    return results, files


def _paths_of(images: Any) -> dict[str, Any]:
    return dict(zip(images.ids, images.paths, strict=True)) if isinstance(images, Files) else {}


def _write_likeness(
    job: Comparison,
    methods: Mapping[str, Explainer],
    recipes: Mapping[str, Recipe],
    photos: Tensor | None,
    path: Path,
    say: Callable[[str], Any],
) -> list[Path]:
    """Write a CSV file that tells how similar the first method's maps are to its maps when attention does
    not depend on the content.

    Nothing is written if there are no such maps, or fewer than two photos.
    """
    rows, first = without_content(methods), next(iter(recipes), "")
    if not rows or photos is None or len(photos) < 2:
        return []
    lines = ["row,method,correlation,chance,photos"]
    for found in likeness(job.backbone, methods[first], rows, photos):
        say(str(found))
        numbers = f"{found.correlation:.4f},{found.chance:.4f},{found.photos}"
        lines.append(f"{found.row},{first},{numbers}")
    write_text(path, "\n".join(lines) + "\n")
    return [path]


CARD_PHOTOS = 60


def _report_card(
    job: Comparison,
    metrics: Sequence[PerturbationMetric],
    images: Any,
    output: Path,
    results: Results,
    progress: bool,
    say: Callable[[str], Any],
) -> ReportCard | None:
    """Compute the report card on some of the photos, if one was requested.

    Finished work is stored in ``output/card.sqlite``.
    """
    wanted = job.card_photos
    if wanted is None:
        wanted = CARD_PHOTOS if "board" in job.metrics else 0
    if wanted == 0:
        return None
    if not is_listed(images):
        raise ValueError(
            "card_photos: a report card needs photos that are files; give files, or card_photos=0"
        )
    photos, _ = limit_photos(images, min(wanted, len(images)), job.seed)
    protocol = replace(results.protocol, n=None, n_invalid=None)
    rows, anchors = ladder_rows(job.backbone, photos, job.view, job.seed, job.max_forward_batch)
    named = [m for m in metrics if not m.needs_annotation]
    say(f"report card: {len(rows.methods)} degraded or unchanged methods on {len(photos)} photos")
    print_plan(job, rows.methods, named, photos, None, 1, say)
    found = evaluate(
        job.backbone,
        rows.methods,
        photos,
        metrics=named,
        protocol=protocol,
        max_forward_batch=job.max_forward_batch,
        max_pixels=job.max_pixels,
        progress=progress,
        randomized=rows.randomized,
        again_limit=None,
        state=output / "card.sqlite",
    )
    card = report_card(found, anchors, results)
    results.admitted = card.admitted
    return card


def ladder_rows(
    backbone: Backbone, photos: Any, view: str, seed: int, max_forward_batch: int
) -> tuple[CardRows, list[str]]:
    """Make the rows of a report card, and list the names of the methods whose maps it degrades.

    These are the methods in :data:`xattn.eval.sanity.ladders.ANCHORS` that the network supports.
    """
    stream = ImageStream(photos, backbone.preprocessing, view, limit=DONORS)
    block = next(block for block in stream.blocks(DONORS) if block)
    donors = torch.stack([item.image for item in block]).to(backbone.device)
    with torch.no_grad():
        classes = backbone.logits(donors).argmax(1).tolist()
    shared: dict[str, Any] = {"seed": seed, "max_forward_batch": max_forward_batch}
    cascade, anchors = Cascade(backbone, **shared), []
    for name in ANCHORS:
        with suppress(ValueError):
            method = create_explainer(name, backbone, **shared)
            anchors.append(Anchor(name, method, donors, classes, cascade.method(name)))
    if not anchors:
        raise ValueError(
            f"card_photos: {backbone.name} supports none of {', '.join(ANCHORS)}; give 0"
        )
    rows = card_rows(anchors, backbone, create_explainer("random", backbone, seed=seed))
    return rows, [anchor.name for anchor in anchors]


def print_plan(
    job: Comparison,
    methods: Mapping[str, Any],
    metrics: Sequence[PerturbationMetric],
    images: Any,
    limit: int | None,
    ranks: int,
    say: Callable[[str], Any],
    tabled: bool = False,
) -> None:
    """Pass the estimated cost of the comparison to ``say``, if the number of images is known.

    The images of a generator are not counted, since counting would consume them.
    """
    stream = ImageStream(images, job.backbone.preprocessing, job.view, job.max_pixels, limit)
    if stream.length is None:
        return
    first = next((block for block in stream.blocks(1) if block), None)
    if first:
        expected = plan(
            job.backbone,
            methods,
            metrics,
            first[0].image,
            stream.length,
            max_forward_batch=job.max_forward_batch,
            again_limit=job.again_limit,
            processes=ranks,
            tabled=tabled,
        )
        say(str(expected))


def groups_of(job: Comparison) -> list[str | PerturbationMetric]:
    """The metrics and the names of metric groups to measure.

    If there are annotations, the groups that need annotations are added.
    """
    names: list[str | PerturbationMetric] = []
    for name in job.metrics:
        if name == "direct":
            names += direct_groups()
        elif name == "all":
            names += groups_without_annotations()
        elif name == "board":
            names += BOARD
        else:
            names.append(name)
    if job.annotations is not None:
        names += groups_with_annotations()
    return [name for i, name in enumerate(names) if name not in names[:i]]


def _defined(
    job: Comparison, protocol: Protocol, say: Callable[[str], Any]
) -> list[str | PerturbationMetric]:
    """The metrics to measure; groups that come from "direct", "all" or "board" are left out where they are
    undefined for this score or this network."""
    names: list[str | PerturbationMetric] = []
    for name in groups_of(job):
        problem = None
        if isinstance(name, str) and name not in job.metrics:
            metric = create_metric(name, protocol, tuple(job.backbone.preprocessing.mean))
            problem = metric.score_problem(protocol.score)
            if job.clips and not metric.clips:
                problem = f"{job.backbone.name} reads clips"
        if problem is None:
            names.append(name)
        else:
            say(f"left out {name}: {problem}")
    return names


class Recipe(NamedTuple):
    """How to make an explainer: its name, its trained head if it needs one, and its options."""

    name: str
    head: Head | None = None
    options: Mapping[str, Any] = {}


class Methods(NamedTuple):
    """The explainers of a comparison.

    Attributes:
        explainers: the explainers by row name, including the sanity rows.
        recipes: how the compared methods are made, by row name.
        refused: the methods that "all" left out, each with the reason.
    """

    explainers: dict[str, Explainer]
    recipes: dict[str, Recipe]
    refused: dict[str, str]


class _Given(NamedTuple):
    """The methods of a comparison by row name: trained ``heads``, ``names`` of explainers, and ``others``,
    which are explainers and methods given as objects."""

    heads: dict[str, Head]
    names: dict[str, str]
    others: dict[str, Any]

    @classmethod
    def of(cls, job: Comparison) -> _Given:
        """Sort the methods of a job by kind.

        Raises:
            ValueError: a method given as an object has no row name.
        """
        rows = job.explainers
        if not isinstance(rows, Mapping):
            unnamed = [row for row in rows if not isinstance(row, str)]
            if unnamed:
                raise ValueError(
                    f"explainers: got {unnamed[0]!r:.80} in a list; give {{row: method}}, such as "
                    f"{{'mine': method}}"
                )
            rows = {name: name for name in rows}
        heads = {row: m for row, m in rows.items() if isinstance(m, Head)}
        names = {row: m for row, m in rows.items() if isinstance(m, str)}
        others = {row: m for row, m in rows.items() if row not in {*heads, *names}}
        return cls({**job.heads, **heads}, names, others)


def methods_of(job: Comparison, photos: Tensor | None) -> Methods:
    """Make all explainers of a comparison, including the sanity rows.

    ``photos`` are used by the sanity rows that need the network's mean attention.
    """
    given = _Given.of(job)
    names, heads, every = given.names, given.heads, "all" in given.names
    if every:
        baselines = ("random", "centre", "ones", "head")
        names = {name: name for name in list_explainers() if name not in baselines}
    rows = [*heads, *(["head"] if heads else []), *names]
    options = options_by_name(job.options, rows)
    shared: dict[str, Any] = {"seed": job.seed, "max_forward_batch": job.max_forward_batch}
    recipes = {
        label: Recipe("head", head, options.get("head", {}) | options.get(label, {}))
        for label, head in heads.items()
    }
    recipes |= {row: Recipe(name, None, options.get(row, {})) for row, name in names.items()}
    explainers: dict[str, Explainer] = {}
    refused = {}
    for label, (name, head, chosen) in recipes.items():
        try:
            made = create_explainer(name, job.backbone, head, **shared, **chosen)
        except ValueError as error:
            if not every or label in heads:
                raise
            refused[label] = str(error)
            continue
        dear = (made.forwards or 0) > MOST_OF_ALL[made.perturbs]
        if every and dear and name not in given.names:
            kind = "passes" if made.perturbs else "passes with gradients"
            refused[label] = f"it needs {made.forwards:,} {kind}; give its name to include it"
        else:
            explainers[label] = made
    recipes = {label: recipes[label] for label in explainers}
    explainers |= _others(job, given.others)
    if not explainers:
        raise ValueError("explainers: got none; give names printed by xattn list, or heads")
    row, head, chosen = next(iter(recipes.values()), (None, None, {}))
    head = head or next(iter(heads.values()), None)
    sanity = sanity_rows(job.backbone, row, head=head, photos=photos, **shared, **chosen)
    taken = sorted({*heads, *given.others} & {*sanity, *names})
    if taken:
        argument = "heads" if {*taken} & {*heads} else "explainers"
        raise ValueError(f"{argument}: {', '.join(taken)} is the name of another row; give another")
    for label, explainer in sanity.items():
        explainers.setdefault(label, explainer)
    return Methods(explainers, recipes, refused)


def _others(job: Comparison, methods: Mapping[str, Any]) -> dict[str, Explainer]:
    """Make explainers from methods given as objects; if the job has a target, they explain this target."""
    view = job.backbone
    if job.target is None or not isinstance(view, BackboneView):
        return as_explainers(methods, view, job.max_forward_batch)
    return explainers_for(view, as_explainers(methods, view.base, job.max_forward_batch))


def randomized_of(
    job: Comparison, recipes: Mapping[str, Recipe], metrics: Sequence[PerturbationMetric]
) -> Randomized:
    """Functions that run each method on networks whose weights are randomised layer by layer, starting at
    the classifier; empty if no metric needs them."""
    if not any(metric.explains_randomized for metric in metrics):
        return {}
    cascade = Cascade(job.backbone, seed=job.seed, max_forward_batch=job.max_forward_batch)
    rows = {**recipes, "random": Recipe("random"), "centre": Recipe("centre")}
    return {label: cascade.method(name, head, **own) for label, (name, head, own) in rows.items()}
