"""Rows of one table, each trained and scored alone on photos of classes that its head never saw.

    python -m xattn.eval.studies fold-rows PHOTOS --rows gradcam ttame:recipe=small

A row is an explainer or a head by name, with options. For a head, options of
:class:`~xattn.config.TrainConfig` set its training, ``photos`` limits the number of training photos,
``passes`` and ``maps`` set how it is shown, and all other options are the head's own. There are
controls: ``network=random`` uses a network with random weights; for a head, ``trained=false`` leaves
it untrained, and ``labels=outcomes`` or ``labels=classes`` trains it on those of another photo
(:mod:`~xattn.eval.studies.random_labels`).
``LABEL=NAME:option=value`` gives a row a label. ``PHOTOS`` has one folder per class. A head trained
on the other classes scores each fold's photos; with ``--held-out``, a head trained on all photos
scores those given. Finished rows are read from files, a killed row resumes, and a new row does not
repeat the others. The tables have all finished rows in ``--output``, each on the photos that it was
scored on.

The cost of training is counted in passes of the network: a pass with gradients counts as 3, one with
n of N patches as (1 + n) / (1 + N). The cost of a table of outcomes comes before that of the steps.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro

from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.eval import bootstrap
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.evaluation.results import Difference, MethodResult, Results
from xattn.eval.evaluation.split import Split
from xattn.eval.metrics.base import Column, PerturbationMetric
from xattn.eval.metrics.objectives import LEGEND, MARK
from xattn.eval.protocol import Protocol
from xattn.eval.report.results_files import read_json, write_json
from xattn.eval.report.text_tables import protocol_notes
from xattn.eval.sanity import randomized_explainer
from xattn.eval.studies.class_folds import class_folds, merge
from xattn.eval.studies.random_labels import Labels, RandomOutcomes
from xattn.eval.studies.run_files import AGAIN, kept_record
from xattn.eval.studies.study_backbone import study_backbone
from xattn.explainers import Explainer, create_explainer
from xattn.heads import Head, list_heads
from xattn.heads.base import seeded_head
from xattn.photos.images import list_images
from xattn.runtime import strict_json
from xattn.runtime.files import write_json as write_record
from xattn.runtime.files import write_text
from xattn.runtime.tables import markdown
from xattn.training import fit
from xattn.training.fitting import CALIBRATED
from xattn.training.objectives.base import objective_for, table_settings
from xattn.training.outcome_rows import DROP, MaskSettings, RowMaker
from xattn.training.outcomes import Outcomes, cache_outcomes
from xattn.training.run_folder import RUN_FILE

METRICS = ("masking", "insertion-deletion", "road", "irof", "pixel-flipping")
SHOWN_COLUMNS = (
    ("deletion", "insertion", "ROAD", "IROF", "AOPC"),
    ("AD@50", "IC@50", "ADD@50"),
)
"""Columns of the tables; the p values of the first table's differences are corrected together."""
TRAINING = {setting.name for setting in fields(TrainConfig)}
SHOWN = ("passes", "maps")  # options of the head as an explainer
CONTROLS: Any = {"network": ["random"], "trained": [False], "labels": get_args(Labels)}
WITH_GRADIENTS = 3  # passes that a pass with gradients counts as
STEP_PASSES: Mapping[str, Callable[[Any], int]] = {
    "mask": lambda objective: 1 + WITH_GRADIENTS,
    "select": lambda objective: 1 + objective.draws,
    "rank": lambda objective: 1 + 2 * objective.steps * WITH_GRADIENTS,
}
"""Passes per photo in a training step, for the objectives that read photos."""
COST, DONE, SECONDS, HELD_OUT = "cost.json", "results.json", "seconds.json", "held-out"
PASSES = "logits_normalized"  # the backbone's method that can be compiled
Costs = Mapping[str, Sequence[Mapping[str, Any]]]  # of the training of rows by label, in each fold


@dataclass(frozen=True)
class Row:
    """One row: a head or an explainer, its options, and the controls. For a head, also the settings of its
    training, how many photos it is trained on, and how it is shown."""

    label: str
    name: str
    options: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)
    photos: int | None = None
    shown: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Row:
        """The row of ``LABEL=NAME:option=value,...``; without a label, the text is the label."""
        label, rest = labelled(text)
        name, options = parse_mechanism(rest)
        controls = pop_options(options, CONTROLS if name in list_heads() else ("network",))
        for control, value in controls.items():
            if value not in CONTROLS[control]:
                known = " or ".join(str(v).lower() for v in CONTROLS[control])
                raise ValueError(f"{control}: got {value!r}; give {known}, or leave it out")
        if name not in list_heads():
            return cls(label, name, options, controls=controls)
        photos = options.pop("photos", None)
        train, shown = pop_options(options, TRAINING), pop_options(options, SHOWN)
        return cls(label, name, options, train, photos, shown, controls)

    @property
    def is_head(self) -> bool:
        """Whether it has a head."""
        return self.name in list_heads()

    @property
    def is_trained(self) -> bool:
        """Whether its head is trained."""
        return self.is_head and self.controls.get("trained", True)

    def config(self, seed: int) -> TrainConfig:
        """The settings of training."""
        return TrainConfig(**{"seed": seed, **self.train})

    def untrained(self, backbone: Backbone, seed: int) -> Head:
        """The head as it is before training."""
        return seeded_head(self.name, backbone, self.config(seed).seed, **self.options)

    def record(self, backbone: Backbone, seed: int) -> dict[str, Any]:
        """The settings that the row's numbers depend on, apart from the photos and the metrics."""
        found = {"name": self.name, "options": dict(self.options), "seed": seed}
        if self.is_head:
            config = asdict(self.config(seed))
            del config["workers"], config["checkpoint_every"]
            options = self.untrained(backbone, seed).options
            found |= {"config": config, "head": options, "photos": self.photos, **self.shown}
        return found | ({"controls": dict(self.controls)} if self.controls else {})


def labelled(text: str) -> tuple[str, str]:
    """Split ``LABEL=REST``; a text without a label is returned twice."""
    label, equals, rest = text.partition("=")
    return (text, text) if not equals or ":" in label else (label, rest)


def pop_options(options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Remove from ``options`` those that ``names`` has, and return them."""
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

    ``table`` has the outcomes of all photos, for heads that are trained on outcomes.

    Raises:
        LeakError: a photo to score, or another photo of its class, is among the training photos.
    """
    record = {**row.record(backbone, seed), "train": names(train)}
    shared: dict[str, Any] = {"seed": seed, "max_forward_batch": max_forward_batch}
    split = Split(row.label)

    def make() -> Explainer:
        name, options, head = row.name, row.options, None
        if row.is_head:
            name, options, head = "head", row.shown, row.untrained(backbone, seed)
            if row.is_trained:
                photos = random.Random(seed).sample(list(train), row.photos or len(train))
                apart_by_class(split, photos, held_out)
                given = table
                if "labels" in row.controls:
                    if table is None:
                        raise ValueError(f"labels: {row.label} is trained on no table of outcomes")
                    given = RandomOutcomes.of(table.subset(photos), row.controls["labels"], seed)
                config = row.config(seed)
                train_head(head, backbone, config, photos, split, folder, given, progress)
            head.eval()
        if "network" in row.controls:
            plain = copy.copy(backbone)  # compiled passes belong to the unchanged network
            vars(plain).pop(PASSES, None)
            return randomized_explainer(name, plain, head=head, **shared, **options)  # type: ignore[no-any-return]
        return create_explainer(name, backbone, head, **shared, **options)

    return score_explainer(
        backbone, row.label, make, record, held_out, folder, split,
        metrics=metrics, precision=precision, max_forward_batch=max_forward_batch, progress=progress,
    )  # fmt: skip


def apart_by_class(split: Split, fitted: Sequence[Path], scored: Sequence[Path]) -> None:
    """Raise a ``LeakError`` if the photos share a class folder; a single folder is no class."""
    classes = {path.parent.name for path in fitted}
    if len(classes) > 1:
        by_class = split.fold()
        by_class.study = f"{split.study}, by class,"
        by_class.fit(sorted(classes))
        by_class.score(sorted({path.parent.name for path in scored}))


def train_head(
    head: Head, backbone: Backbone, config: TrainConfig, photos: Sequence[Path], split: Split,
    folder: Path, table: Outcomes | None, progress: bool,
) -> None:  # fmt: skip
    """Train ``head`` in ``folder``, or finish its training, and store there what that cost."""
    run, kept, start = folder / "run", folder / COST, cpu_seconds()
    resume = (run / RUN_FILE).is_file()
    known = kept.is_file() and resume  # a run without the file began before costs were kept
    cost = strict_json.read(kept, "output", AGAIN) if known else {} if resume else {"seconds": 0.0}

    def keep(step: int, head: Head, **about: Any) -> None:
        if cost:
            write_record(kept, {"seconds": cost["seconds"] + cpu_seconds() - start, **about})

    fit(
        head, backbone, split.fit(photos), config, table=table, output=run, resume=resume,
        progress=progress, on_checkpoint=keep,
    )  # fmt: skip
    if "passes" not in cost:  # otherwise a finished run was read
        in_table = 0.0 if table is None else table_seconds(table, len(photos))
        passes = passes_to_train(head, backbone, config, len(photos))
        keep(0, head, **{"table seconds": in_table, **passes})


# ---------------------------------------------------------------------- the price of training


def cpu_seconds() -> float:
    """CPU seconds of this process and of the child processes that it has waited for."""
    return sum(os.times()[:4])


def passes_to_train(
    head: Head, backbone: Backbone, config: TrainConfig, photos: int
) -> dict[str, float | None]:
    """``table passes``, and the ``passes`` of the steps; None if those of an objective are unknown."""
    objective, read = objective_for(config), photos * config.crops * config.epochs
    own = read * WITH_GRADIENTS * head.own_passes
    if objective.reads == "photos":
        of_step = STEP_PASSES.get(objective.name)
        statistics = min(CALIBRATED, photos) if head.reads_statistics else 0
        passes = of_step and read * of_step(objective) + statistics + own
        return {"table passes": 0.0, "passes": passes}
    asked = MaskSettings(**table_settings(objective, config, backbone))
    maker, crops = RowMaker(backbone, asked), photos * config.crops
    of_row: float = maker.passes
    if DROP in asked.fills:
        patches, masked = maker.grid[0] * maker.grid[1], asked.masks + asked.empty
        # Together, a mask and its complement keep all patches; the empty photo keeps none.
        of_row += (masked + asked.masks * patches / 2) / (1 + patches) - masked
    return {"table passes": crops * of_row, "passes": crops + own}  # one pass for the head's input


def table_seconds(table: Outcomes, photos: int) -> float | None:
    """CPU seconds for ``photos`` photos of a table; None if they were not measured."""
    file = table.folder / SECONDS
    if not file.is_file():
        return None
    of_file = strict_json.read(file, "tables", AGAIN)["of a file"]
    return float(of_file * files_of(table.folder) * photos / len(table))


def files_of(table: Path) -> int:
    """The number of files with rows in a table's folder."""
    return sum(1 for _ in table.glob("rows-*"))


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
    logits: bool = False,
) -> Results:
    """Score the explainer that ``make`` returns on ``held_out``.

    ``make`` is not called if ``folder`` has the results. ``record`` has what the explainer depends on,
    ``split`` the photos that ``make`` fits it on.
    """
    protocol = Protocol(precision=precision, **({"score": "logit"} if logits else {}))
    record = {
        **record, "backbone": backbone.fingerprint,
        "metrics": [m if isinstance(m, str) else repr(m) for m in metrics],
        "held_out": names(held_out),
        **({} if precision == "float32" else {"precision": precision}),
    }  # fmt: skip
    done, kept = folder / DONE, folder / "record.json"
    folder.mkdir(parents=True, exist_ok=True)
    kept_record(kept, record)
    if done.is_file():
        return read_json(done)
    held_out = split.score(held_out)
    results = evaluate(
        backbone, {label: make()}, held_out,
        metrics=metrics, protocol=protocol,
        max_forward_batch=max_forward_batch, progress=progress, state=folder / "state.sqlite",
    )  # fmt: skip
    write_json(results, done)
    split.write(folder / "split.json")
    return results


def table_of(row: Row, backbone: Backbone, paths: Sequence[Path], folder: Path) -> Outcomes | None:
    """The table of outcomes of ``paths`` with the settings of ``row``; None if the row needs no table, or
    one of its own, such as a table of several crops."""
    if not row.is_trained:
        return None
    config = row.config(0)
    objective = objective_for(config)
    if objective.reads != "table" or config.crops > 1:
        return None
    settings = table_settings(objective, config, backbone)
    place = table_folder(folder, backbone, config, settings)
    before, start = files_of(place), cpu_seconds()
    table = cache_outcomes(backbone, paths, place, **settings)
    if new := files_of(place) - before:
        write_record(place / SECONDS, {"of a file": (cpu_seconds() - start) / new})
    return table


def table_folder(
    folder: Path, backbone: Backbone, config: TrainConfig, settings: Mapping[str, Any]
) -> Path:
    """The folder of a table; its name gives the settings of masks that differ from the defaults."""
    usual = {"seed": 0, "sizes": "even"}
    parts = [backbone.name, f"{config.crops}x{settings.get('masks', config.masks)}"]
    for name, value in settings.items():
        if name not in ("crops", "masks", "precision") and usual.get(name) != value:
            parts += [name, "+".join(value) if isinstance(value, tuple | list) else str(value)]
    return folder / "-".join(parts)


def names(paths: Sequence[Path]) -> list[str]:
    """The photos by their folder's name and their own, wherever the folders are."""
    return [f"{path.parent.name}/{path.name}" for path in paths]


def side_by_side(rows: Sequence[Results]) -> Results:
    """Join rows that were scored alone, on the same photos with the same metrics, into one table."""
    first = rows[0]
    alike = [(r.protocol.id, r.images, r.columns) for r in rows]
    if any(other != alike[0] for other in alike):
        raise ValueError(
            "rows: photos or protocols differ; score all rows on the same photos, by the same metrics"
        )
    methods = {label: method for r in rows for label, method in r.methods.items()}
    invalid = sum(r.protocol.n_invalid or 0 for r in rows)
    return replace(first, methods=methods, protocol=replace(first.protocol, n_invalid=invalid))


def finished(
    output: Path, parts: Sequence[str], first: Sequence[str] = ()
) -> tuple[Results | None, Costs]:
    """The table of all rows with results in ``output``, on as many of the ``parts`` as there are, and what
    their training cost in each part. Rows called ``first`` come before the others."""
    costs: dict[str, list[dict[str, Any]]] = {}
    scored = []
    for part in parts:
        paths = sorted((output / part).glob(f"*/{DONE}"))
        if paths:
            scored.append(side_by_side([read_json(path) for path in paths]))
        for file in (path.with_name(COST) for path in paths):
            if file.is_file():
                cost = strict_json.read(file, "output", AGAIN)
                costs.setdefault(file.parent.name, []).append(cost)
    known = {label: method for results in scored for label, method in results.methods.items()}
    labels = [label for label in first if label in known]
    labels += sorted(known.keys() - set(labels))
    tables = []
    for results in scored:
        count, own = len(results.images), results.methods
        methods = {label: own.get(label) or unscored(known[label], count) for label in labels}
        methods = {label: replace(method, scores={}) for label, method in methods.items()}
        tables.append(replace(results, methods=methods))
    return (merge(tables) if tables else None), costs


def unscored(method: MethodResult, count: int) -> MethodResult:
    """``method`` with no value for any of ``count`` photos."""
    return replace(
        method, tied=0, reasons={}, failed={}, valid=np.ones(count, bool),
        values={column: np.full(count, np.nan) for column in method.values},
        measured={column: np.zeros(count, bool) for column in method.measured},
    )  # fmt: skip


def means_table(table: Results, columns: Sequence[Column], costs: Costs) -> str:
    """A Markdown table of means with intervals, passes per explanation, and the cost of training."""
    arrows = {True: "↑", False: "↓"}
    titles = [f"{c.key} {arrows[table.info(c.metric).higher_is_better]}" for c in columns]
    cells = {(row.method, Column(row.metric, row.level)): row for row in table.rows()}

    def line(label: str) -> Iterator[str]:
        yield label
        for column in columns:
            row, digits = cells[label, column], table.info(column.metric).digits
            interval = bootstrap.Interval(row.mean, row.lo, row.hi, row.n).text(digits)
            yield f"{interval}{f' {MARK}' * row.trained_on}" if row.n else "-"
        yield str(max(cells[label, column].n for column in columns))
        forwards = table.methods[label].forwards
        yield "-" if forwards is None else f"{forwards:,}"
        yield from (price(costs.get(label, ()), key) for key in ("seconds", "passes"))

    heads = [*titles, "photos", "passes to explain", "CPU s to train", "passes to train"]
    return "\n".join(markdown(["method", *heads], map(list, map(line, table.methods))))


def price(costs: Sequence[Mapping[str, Any]], key: str) -> str:
    """The mean of ``key`` over the folds, the table's before the steps'; "?" if unknown."""
    if not costs:
        return "-"
    found: list[Any] = [[cost.get(name) for cost in costs] for name in (f"table {key}", key)]
    means = ["?" if None in values else f"{np.mean(values):,.0f}" for values in found]
    return " + ".join(means if any(found[0]) or None in found[0] else means[1:])


def differences_table(
    table: Results,
    reference: str,
    columns: Sequence[Column] | None = None,
    about: Mapping[str, str] | None = None,
) -> str:
    """A Markdown table of all other methods minus ``reference``, by metric, with paired intervals.

    If ``columns`` are those of the first table, the verdicts are followed by Holm's p values. ``about``
    describes methods by label.
    """
    shown, lines = table.columns if columns is None else columns, []
    corrected = [column.key for column in shown] == list(SHOWN_COLUMNS[0])
    for label in (label for label in table.methods if label != reference):
        found = table.compare(label, reference, shown)
        p = [""] * len(found)
        if corrected and all(d.judged for d in found):
            adjusted = holm(p_values(table, label, reference, shown))
            p = [f" (Holm {value:.2g})" for value in adjusted]
        cells = [with_interval(d) + text for d, text in zip(found, p, strict=True)]
        lines.append([label, *([] if about is None else [about.get(label, "")]), *cells])
    titles = [f"minus {reference}", *[""] * (about is not None), *(c.key for c in shown)]
    return "\n".join(markdown(titles, lines, len(titles)))


def with_interval(found: Difference) -> str:
    """A difference with its interval and verdict."""
    mark = "better" if found.better else "worse" if found.worse else "="
    return f"{found.diff:+.4f} [{found.lo:+.4f}, {found.hi:+.4f}] {mark}"


def p_values(table: Results, method: str, reference: str, columns: Sequence[Column]) -> list[float]:
    """Twice the share of the intervals' resamples on the rarer side of zero, counting the sample as one."""
    a, b = table.methods[method].values, table.methods[reference].values
    matrix = np.stack([a[column] - b[column] for column in columns], axis=1)
    drawn = bootstrap.resampled_means(matrix, table.n_resamples, table.protocol.seed)
    rarer = np.minimum((drawn <= 0).sum(0), (drawn >= 0).sum(0))
    return np.minimum(2 * (rarer + 1) / (len(drawn) + 1), 1).tolist()  # type: ignore[no-any-return]


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of m tests (Holm 1979): for the i-th smallest, max (m - j + 1) p_j over j <= i.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    raised = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1)
    return raised[np.argsort(np.argsort(p))].tolist()  # type: ignore[no-any-return]


def report(table: Results, costs: Costs, against: str | None = None) -> str:
    """A report in Markdown: means, and all rows minus the row ``against``, by default the first."""
    keys = {column.key: column for column in table.columns}
    groups = [[keys[key] for key in group if key in keys] for group in SHOWN_COLUMNS]
    groups = [group for group in groups if group] or [table.columns]
    reference = against or next(iter(table.methods))
    parts = []
    for group in groups:
        parts.append(means_table(table, group, costs))
        if reference in table.methods and len(table.methods) > 1:
            parts.append(differences_table(table, reference, group))
    if reference not in table.methods:
        parts.append(f"No row {reference} is finished, so none is compared with it.")
    protocol, photos, _ = protocol_notes(table)
    notes = [f"{MARK} {LEGEND}", protocol, photos.partition("; forwards")[0], *table.warnings()]
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def with_compiled_passes(backbone: Backbone, precision: str) -> None:
    """Compile the passes that need no gradient, with the weights frozen.

    Convolutional networks get faster on a CPU, and logits are rounded differently. With bfloat16, the
    precision also holds for a method's own masked photos and for tables of outcomes. Taps and gradients
    are computed as before."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    plain = getattr(backbone, PASSES)

    @partial(torch.compile, dynamic=False)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return plain(x)

    def logits_normalized(x: torch.Tensor) -> torch.Tensor:
        return plain(x) if torch.is_grad_enabled() else compiled(x).float()

    vars(backbone)[PASSES] = logits_normalized


@dataclass(frozen=True, kw_only=True)
class FoldRows:
    """Score heads and explainers on photos of classes that no head saw, row by row."""

    data: tyro.conf.Positional[str]  # A folder with one folder of images per class.
    rows: tuple[str, ...] = ()
    """LABEL=NAME:option=value,... of a head or an explainer; without any, finished rows are shown."""
    against: str | None = None  # The row to compare all others with; by default the first.
    output: Path = Path("runs/rows")  # Folder for the results of folds and rows, and their table.
    backbone: str = "tf_efficientnet_lite0"  # A timm model name.
    weights: str = "package"  # See xattn train --help.
    taps: tuple[str, ...] = ()  # See xattn train --help.
    folds: int = 5  # Number of parts.
    only: tuple[int, ...] = ()  # Only these folds, to share the work among processes.
    per_fold: int | None = None
    """Score only this many photos of each fold, drawn by the fold's number, to save time."""
    held_out: str | None = None
    """Score these photos, with heads trained on all of the data, instead of folds."""
    metrics: tuple[str, ...] = METRICS  # Groups of metrics, see xattn list.
    tables: Path = Path("runs/tables")
    """Folder for the tables of outcomes of all the data, which rows and folds share."""
    precision: Literal["float32", "bfloat16"] = "float32"  # Precision of the scoring passes.
    compiled: bool = False  # Compile the scoring passes.
    channels_last: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Memory format of the backbone; faster on CPUs for convolutional networks."""

    def load(self) -> Backbone:
        """The backbone, ready to score."""
        backbone = study_backbone(self.backbone, self.weights, self.taps, self.channels_last)
        if self.compiled:
            with_compiled_passes(backbone, self.precision)
        return backbone

    def parts(self, paths: Sequence[Path]) -> dict[str, tuple[int, list[Path]]]:
        """The number of each fold and the photos to score, by the name of its results folder."""
        if self.held_out is not None:
            return {HELD_OUT: (0, list_images(self.held_out))}
        parts = class_folds(paths, self.folds)
        if self.per_fold is not None:
            parts = [sorted(random.Random(k).sample(p, self.per_fold)) for k, p in enumerate(parts)]
        return {f"fold-{k}": (k, parts[k]) for k in self.only or range(self.folds)}

    def training_photos(
        self, paths: Sequence[Path], fold: int, held_out: Sequence[Path]
    ) -> list[Path]:
        """The ``paths`` to train heads on, without any photo of the fold's classes."""
        if self.held_out is None:
            held_out = class_folds(paths, self.folds)[fold]
        return sorted(set(paths) - set(held_out))


def study(args: FoldRows) -> Iterator[str]:
    """Run the rows that are not finished yet, and yield the lines of the report."""
    rows = [Row.parse(text) for text in args.rows]
    if rows:
        backbone, paths = args.load(), list_images(args.data)
        parts = args.parts(paths)
        outcomes = {
            row.label: table_of(row, backbone, paths, args.tables)
            for row in rows
            if not all((args.output / part / row.label / DONE).is_file() for part in parts)
        }
        for part, (seed, held_out) in parts.items():
            train = args.training_photos(paths, seed, held_out)
            for row in rows:
                score_row(
                    backbone, row, train, held_out, args.output / part / row.label, seed=seed,
                    metrics=args.metrics, table=outcomes.get(row.label), precision=args.precision,
                )  # fmt: skip
    shown = [HELD_OUT] if args.held_out else [f"fold-{k}" for k in range(args.folds)]
    table, costs = finished(args.output, shown, [row.label for row in rows])
    if table is None:
        raise ValueError(f"rows: {args.output} has none that is finished; give some")
    text = report(table, costs, args.against)
    write_text(args.output / "rows.md", text + "\n")
    yield text
    table.to_csv(args.output / "values.csv", per_image=True)
