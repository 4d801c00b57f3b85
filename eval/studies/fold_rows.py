"""Rows of one table, each trained and scored alone on photos of classes that its head never saw.

    python -m xattn.eval.studies fold-rows PHOTOS --rows gradcam ttame:recipe=small

A row is an explainer or a head by name, with options. Of a head those of :class:`~xattn.config.TrainConfig`
train it, ``photos`` limits the photos that it is trained on, ``passes`` and ``maps`` say how it is shown,
and all others are its own.
``LABEL=NAME:option=value`` gives it a label. ``PHOTOS`` has one folder a class; each fold's photos are
scored by a head trained on the other classes, or the photos of ``--held-out`` by a head trained on all.
A row that is finished is read, a killed one goes on, and a new row needs none of the others again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.evaluation.results import Difference, Results
from xattn.eval.evaluation.split import Split
from xattn.eval.metrics.base import Column, PerturbationMetric
from xattn.eval.protocol import Protocol
from xattn.eval.report.results_files import read_json, write_json
from xattn.eval.report.text_tables import format_table
from xattn.eval.studies.class_folds import class_folds, merge
from xattn.eval.studies.kept import kept_record
from xattn.eval.studies.study_backbone import study_backbone
from xattn.explainers import Explainer, create_explainer
from xattn.heads import Head, list_heads
from xattn.heads.base import seeded_head
from xattn.photos.images import list_images
from xattn.runtime.files import write_text
from xattn.training import fit
from xattn.training.objectives.base import objective_for, table_settings
from xattn.training.outcomes import Outcomes, cache_outcomes
from xattn.training.run_folder import RUN_FILE

METRICS = ("masking", "insertion-deletion", "road", "irof", "pixel-flipping")
TRAINING = {setting.name for setting in fields(TrainConfig)}
SHOWN = ("passes", "maps")  # options of the head as an explainer


@dataclass(frozen=True)
class Row:
    """One row: a head or an explainer, and its options; of a head also the settings of its training, how
    many photos it is trained on, and how it is shown."""

    label: str
    name: str
    options: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)
    photos: int | None = None
    shown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Row:
        """``LABEL=NAME:option=value,...``; without a label the text is the label."""
        label, rest = labelled(text)
        name, options = parse_mechanism(rest)
        if name not in list_heads():
            return cls(label, name, options)
        photos = options.pop("photos", None)
        return cls(label, name, options, taken(options, TRAINING), photos, taken(options, SHOWN))

    @property
    def is_head(self) -> bool:
        """Whether it is trained."""
        return self.name in list_heads()

    def config(self, seed: int) -> TrainConfig:
        """The settings of training."""
        return TrainConfig(**{"seed": seed, **self.train})

    def untrained(self, backbone: Backbone, seed: int) -> Head:
        """The head as training begins."""
        return seeded_head(self.name, backbone, self.config(seed).seed, **self.options)

    def record(self, backbone: Backbone, seed: int) -> dict[str, Any]:
        """What the row's numbers depend on, beside the photos and the metrics."""
        of_head: dict[str, Any] = {}
        if self.is_head:
            config = asdict(self.config(seed))
            del config["workers"], config["checkpoint_every"]
            options = self.untrained(backbone, seed).options
            of_head = {"config": config, "head": options, "photos": self.photos, **self.shown}
        return {"name": self.name, "options": dict(self.options), "seed": seed, **of_head}


def labelled(text: str) -> tuple[str, str]:
    """``LABEL=REST`` in two; of a text without a label the whole text, twice."""
    label, equals, rest = text.partition("=")
    return (text, text) if not equals or ":" in label else (label, rest)


def taken(options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Those of ``options`` that are in ``names``, which are taken out of it."""
    return {name: options.pop(name) for name in list(options) if name in names}


def score_row(
    backbone: Backbone,
    row: Row,
    train: Sequence[Path],
    held_out: Sequence[Path],
    folder: Path,
    *,
    metrics: Sequence[str | PerturbationMetric] = METRICS,
    table: Outcomes | None = None,
    precision: str = "float32",
    max_forward_batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Results:
    """Train the head of ``row`` on ``train``, if it is one, and score it on ``held_out``.

    ``table`` has the outcomes of all photos, for heads that are trained on them.
    """
    record = {**row.record(backbone, seed), "train": names(train)}
    shared: dict[str, Any] = {"seed": seed, "max_forward_batch": max_forward_batch}
    split = Split(row.label)

    def make() -> Explainer:
        if not row.is_head:
            return create_explainer(row.name, backbone, **shared, **row.options)
        head, run = row.untrained(backbone, seed), folder / "run"
        photos = random.Random(seed).sample(list(train), row.photos or len(train))
        fit(
            head, backbone, split.fit(photos), row.config(seed), table=table,
            output=run, resume=(run / RUN_FILE).is_file(), progress=progress,
        )  # fmt: skip
        return create_explainer("head", backbone, head, **shared, **row.shown)

    return score_explainer(
        backbone, row.label, make, record, held_out, folder, split,
        metrics=metrics, precision=precision, max_forward_batch=max_forward_batch, progress=progress,
    )  # fmt: skip


def score_explainer(
    backbone: Backbone,
    label: str,
    make: Callable[[], Explainer],
    record: Mapping[str, Any],
    held_out: Sequence[Path],
    folder: Path,
    split: Split,
    *,
    metrics: Sequence[str | PerturbationMetric] = METRICS,
    precision: str = "float32",
    max_forward_batch: int = 16,
    progress: bool = True,
) -> Results:
    """Score the explainer that ``make`` gives on ``held_out``; ``make`` is not called where ``folder`` has
    the results. ``record`` is what the explainer depends on, ``split`` has what ``make`` fits it on.
    """
    record = {
        **record, "backbone": backbone.fingerprint,
        "metrics": [m if isinstance(m, str) else repr(m) for m in metrics],
        "held_out": names(held_out),
        **({} if precision == "float32" else {"precision": precision}),
    }  # fmt: skip
    done, kept = folder / "results.json", folder / "record.json"
    folder.mkdir(parents=True, exist_ok=True)
    kept_record(kept, record)
    if done.is_file():
        return read_json(done)
    held_out = split.score(held_out)
    results = evaluate(
        backbone, {label: make()}, held_out,
        metrics=metrics, protocol=Protocol(precision=precision),
        max_forward_batch=max_forward_batch, progress=progress, state=folder / "state.sqlite",
    )  # fmt: skip
    write_json(results, done)
    split.write(folder / "split.json")
    return results


def table_of(row: Row, backbone: Backbone, paths: Sequence[Path], folder: Path) -> Outcomes | None:
    """The table of outcomes of ``paths`` with the settings of ``row``; None where it needs none."""
    if not row.is_head:
        return None
    config = row.config(0)
    objective = objective_for(config)
    if objective.reads != "table":
        return None
    settings = table_settings(objective, config, backbone)
    place = table_folder(folder, backbone, config, settings)
    return cache_outcomes(backbone, paths, place, **settings)


def table_folder(
    folder: Path, backbone: Backbone, config: TrainConfig, settings: Mapping[str, Any]
) -> Path:
    """The folder of a table, named by the masks that are asked for beside the usual ones."""
    usual = {"seed": config.seed, "sizes": "even"}
    parts = [backbone.name, f"{config.crops}x{settings.get('masks', config.masks)}"]
    for name, value in settings.items():
        if name not in ("crops", "masks", "precision") and usual.get(name) != value:
            parts += [name, "+".join(value) if isinstance(value, tuple | list) else str(value)]
    return folder / "-".join(parts)


def names(paths: Sequence[Path]) -> list[str]:
    """The photos by folder and name, wherever the folders lie."""
    return [f"{path.parent.name}/{path.name}" for path in paths]


def side_by_side(rows: Sequence[Results]) -> Results:
    """One table of rows that were scored alone, on the same photos by the same metrics."""
    first = rows[0]
    if any(r.protocol.id != first.protocol.id or r.images != first.images for r in rows):
        raise ValueError("rows: photos or protocols differ; score all rows on the same photos")
    methods = {label: method for r in rows for label, method in r.methods.items()}
    invalid = sum(r.protocol.n_invalid or 0 for r in rows)
    return replace(first, methods=methods, protocol=replace(first.protocol, n_invalid=invalid))


def differences(table: Results, method: str, references: Sequence[str]) -> str:
    """A Markdown table of ``method`` minus each reference, by metric, with paired intervals."""
    lines = [
        f"| metric | {' | '.join(f'- {name}' for name in references)} |",
        f"| :-- |{' :-- |' * len(references)}",
    ]
    compared = [table.compare(method, name) for name in references]
    for cells in zip(*compared, strict=True):
        title = Column(cells[0].metric, cells[0].level).key
        lines.append(f"| {title} | {' | '.join(map(with_interval, cells))} |")
    return "\n".join(lines)


def with_interval(found: Difference) -> str:
    """A difference with its interval, and what it means."""
    mark = "better" if found.better else "worse" if found.worse else "="
    return f"{found.diff:+.4f} [{found.lo:+.4f}, {found.hi:+.4f}] {mark}"


def with_compiled_passes(backbone: Backbone) -> None:
    """Compile the passes that need no gradient, with the weights frozen: convolutional networks are faster
    on a CPU, and logits are rounded in another way. Taps and gradients are computed as before."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    plain = backbone.logits_normalized
    compiled: Callable[..., Any] = torch.compile(plain, dynamic=False)

    def logits_normalized(x: torch.Tensor) -> torch.Tensor:
        return plain(x) if torch.is_grad_enabled() else compiled(x)

    vars(backbone)["logits_normalized"] = logits_normalized


@dataclass(frozen=True, kw_only=True)
class FoldRows:
    """Score heads and explainers on photos of classes that no head saw, row by row."""

    data: tyro.conf.Positional[str]  # A folder with one folder of images a class.
    rows: tuple[str, ...]
    """LABEL=NAME:option=value,... of a head or an explainer; the first is compared with all others."""
    output: Path = Path("runs/rows")  # A folder for each fold and row, and the table of all.
    backbone: str = "tf_efficientnet_lite0"  # A timm model name.
    weights: str = "package"  # See xattn train --help.
    taps: tuple[str, ...] = ()  # See xattn train --help.
    folds: int = 5  # Number of parts.
    only: tuple[int, ...] = ()  # These folds alone, so that several processes share the work.
    per_fold: int | None = None
    """Score so many photos of each fold, drawn by its number, where all would take too long."""
    held_out: str | None = None
    """Score these photos with heads trained on all of the data, instead of folds."""
    metrics: tuple[str, ...] = METRICS  # Groups of metrics, see xattn list.
    tables: Path = Path("runs/tables")
    """Folder of the tables of outcomes of all data, which rows and folds share."""
    precision: Literal["float32", "bfloat16"] = "float32"  # Of the scoring passes.
    compiled: bool = False  # Compile the scoring passes.
    channels_last: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Memory format of the backbone; faster on CPUs for convolutional networks."""

    def load(self) -> Backbone:
        """The backbone, ready to score."""
        backbone = study_backbone(self.backbone, self.weights, self.taps, self.channels_last)
        if self.compiled:
            with_compiled_passes(backbone)
        return backbone

    def parts(self, paths: Sequence[Path]) -> dict[str, tuple[int, list[Path]]]:
        """The number and the photos to score of each fold, by the name of its folder of results."""
        if self.held_out is not None:
            return {"held-out": (0, list_images(self.held_out))}
        parts = class_folds(paths, self.folds)
        if self.per_fold is not None:
            parts = [sorted(random.Random(k).sample(p, self.per_fold)) for k, p in enumerate(parts)]
        return {f"fold-{k}": (k, parts[k]) for k in self.only or range(self.folds)}

    def training_photos(
        self, paths: Sequence[Path], fold: int, held_out: Sequence[Path]
    ) -> list[Path]:
        """Those of ``paths`` that heads are trained on: of no class of the fold, scored or not."""
        if self.held_out is None:
            held_out = class_folds(paths, self.folds)[fold]
        return sorted(set(paths) - set(held_out))


def study(args: FoldRows) -> Iterator[str]:
    """Do what is not finished yet, and give the report."""
    backbone = args.load()
    paths = list_images(args.data)
    rows = [Row.parse(text) for text in args.rows]
    outcomes = {row.label: table_of(row, backbone, paths, args.tables) for row in rows}
    tables = []
    for part, (seed, held_out) in args.parts(paths).items():
        train = args.training_photos(paths, seed, held_out)
        scored = [
            score_row(
                backbone, row, train, held_out, args.output / part / row.label,
                metrics=args.metrics, table=outcomes[row.label], precision=args.precision, seed=seed,
            )
            for row in rows
        ]  # fmt: skip
        tables.append(side_by_side(scored))
    table = merge(tables)
    found = differences(table, rows[0].label, [row.label for row in rows[1:]])
    text = f"{format_table(table, 'markdown')}\n{rows[0].label} minus the others:\n\n{found}"
    write_text(args.output / "rows.md", text + "\n")
    yield text
    table.to_csv(args.output / "values.csv", per_image=True)
