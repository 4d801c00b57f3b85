"""One leaderboard of heads and explainers: every metric, sanity rows, intervals, and a report.

    xattn compare PHOTOS --heads ... --explainers ... --metrics ...

The folder holds ``leaderboard.md``, ``.csv`` and ``.json``, ``images.csv``, ``report.html``,
``pack/`` with the maps for ``xattn app``, the state that a killed run goes on from (``state.sqlite``)
and the time it took (``seconds.js``, which the page shows). All but the last two are a pure function
of the arguments.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from xattn.eval.annotations import load_annotations
from xattn.eval.engine import create_probes, evaluate
from xattn.eval.metrics.base import Column
from xattn.eval.metrics.registry import DIRECT
from xattn.eval.packing import can_pack, write_pack
from xattn.eval.plan import plan
from xattn.eval.protocol import METRICS, Protocol
from xattn.eval.report import format_table, to_dict
from xattn.eval.results import MIN_IMAGES, TOO_FEW, Results, Row, is_baseline
from xattn.eval.sanity import Cascade, sanity_rows
from xattn.eval.stream import ImageStream
from xattn.explainers import create_explainer, list_explainers
from xattn.explaining.naming import named_photos
from xattn.explaining.photos import true_classes_of
from xattn.heads import parse_options
from xattn.packs.format import check_output
from xattn.photos.images import MAX_PIXELS, list_images
from xattn.photos.sources import is_stored
from xattn.runtime.distributed import processes
from xattn.runtime.files import atomic_file, printable


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare, and by what; see ``xattn compare --help``.

    ``heads`` are trained heads by row name; ``options`` are ``explainer.name=value``. The maps of the
    first ``maps`` images go into the pack, with ``labels`` as in :func:`xattn.explaining.photos.explain`.
    """

    backbone: Any
    heads: Mapping[str, Any] = field(default_factory=dict)
    explainers: Sequence[str] = ("gradcam",)
    options: Sequence[str] = ()
    metrics: Sequence[str] = ("direct",)
    annotations: Path | None = None
    again_limit: int | None = 2
    view: str = "crop"
    precision: str = "float32"
    max_forward_batch: int = 32
    max_pixels: int | None = MAX_PIXELS
    seed: int = 0
    maps: int = 1000
    labels: str | Path | None = None


def compare(
    job: Comparison,
    images: Any,
    output: Path,
    *,
    limit: int | None = None,
    progress: bool = True,
    say: Callable[[str], Any] = lambda line: None,
) -> tuple[Results, list[Path]]:
    """Run a comparison and write its report to ``output``; goes on from ``output/state.sqlite``.

    Args:
        images: as in :func:`xattn.eval.evaluate`; ``limit`` takes the first of a folder or list.
        say: gets the plan, and which explainers this backbone does not allow, before the start.

    Raises:
        ValueError: an unknown name or option, no image, or a state of another run.
        OSError: files that cannot be read or written.
    """
    output.mkdir(parents=True, exist_ok=True)
    packed = job.maps > 0 and can_pack(images)
    if packed:
        check_output(output / "pack")
    truth = None
    if job.labels is not None:  # refused now rather than after the work
        truth = true_classes_of(named_photos(images), job.labels, job.backbone)
    methods, made, refused = _methods(job)
    for name, reason in refused.items():
        say(f"left out {name}: {reason}")
    protocol = Protocol(precision=job.precision, seed=job.seed, view=job.view)
    mean = job.backbone.preprocessing.mean
    probes = create_probes(_groups(job), protocol, mean)
    annotations = None
    if job.annotations is not None:
        annotations = load_annotations(job.annotations, job.backbone)
    randomized = _randomized(job, made) if "randomization" in _groups(job) else {}
    ranks, rank = processes(job.backbone.device)
    stream = ImageStream(images, job.backbone.preprocessing, job.view, job.max_pixels, limit)
    known = stream.length is not None  # reading ahead would take images from a generator
    first = next((block for block in stream.blocks(1) if block), None) if known else None
    if first and stream.length is not None:
        expected = plan(
            job.backbone,
            methods,
            probes,
            first[0].image,
            stream.length,
            max_forward_batch=job.max_forward_batch,
            again_limit=job.again_limit,
            processes=ranks,
        )
        say(str(expected))
    results = evaluate(
        job.backbone,
        methods,
        images,
        metrics=probes,
        protocol=protocol,
        max_forward_batch=job.max_forward_batch,
        max_pixels=job.max_pixels,
        limit=limit,
        progress=progress,
        annotations=annotations,
        randomized=randomized,
        again_limit=job.again_limit,
        state=output / "state.sqlite",
        kept_maps=job.maps if packed else 0,
    )
    if rank > 0:
        return results, []
    files = write_report(results, output, _paths(images), job.backbone.preprocessing)
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


def _paths(images: Any) -> dict[str, Path]:
    """The photos of a file, folder or list by the id that results have for them."""
    if not isinstance(images, str | Path) or is_stored(images):
        return {}
    root = Path(images)
    paths = list_images(images)
    names = [str(p.relative_to(root) if root.is_dir() else p) for p in paths]
    return {printable(name): path for name, path in zip(names, paths, strict=True)}


def _groups(job: Comparison) -> list[str]:
    """The names of the groups of metrics; localization comes with annotations."""
    names: list[str] = []
    for name in job.metrics:
        again = ("adcc", "sensitivity", "randomization")
        names += DIRECT if name == "direct" else (*DIRECT, *again) if name == "all" else (name,)
    if job.annotations is not None:
        names.append("localization")
    return list(dict.fromkeys(names))


def _methods(
    job: Comparison,
) -> tuple[dict[str, Any], dict[str, tuple[str, Any, dict[str, Any]]], dict[str, str]]:
    """Explainers by row; how each was made (name, head, options); those "all" had to leave out."""
    names = list(dict.fromkeys(job.explainers))
    every = "all" in names
    if every:
        baselines = ("random", "centre", "ones", "head")
        names = [name for name in list_explainers() if name not in baselines]
    options = _options(job.options, names)
    shared: dict[str, Any] = {"seed": job.seed, "max_forward_batch": job.max_forward_batch}
    first = next(iter(job.heads.values()), None)
    made: dict[str, tuple[str, Any, dict[str, Any]]] = {
        label: ("head", head, {}) for label, head in job.heads.items()
    }
    made.update({name: (name, None, options.get(name, {})) for name in names})
    methods, refused = {}, {}
    for label, (name, head, chosen) in made.items():
        try:
            methods[label] = create_explainer(name, job.backbone, head, **shared, **chosen)
        except ValueError as error:
            if not every or label in job.heads:
                raise
            refused[label] = str(error)
    if not methods:
        raise ValueError("explainers: got none; give names of xattn list, or heads")
    made = {label: made[label] for label in methods}
    row, head, chosen = next(iter(made.values()))
    sanity = sanity_rows(job.backbone, row, head=head or first, **shared, **chosen)
    taken = sorted(set(job.heads) & {*sanity, *names})
    if taken:
        raise ValueError(f"heads: {', '.join(taken)} is the name of another row; give another")
    return {**methods, **{k: v for k, v in sanity.items() if k not in methods}}, made, refused


def _randomized(
    job: Comparison, made: Mapping[str, tuple[str, Any, dict[str, Any]]]
) -> dict[str, Callable[[int, Any, Any], Any]]:
    """Each method on networks whose weights are randomised from the classifier down."""
    cascade = Cascade(job.backbone, seed=job.seed, max_forward_batch=job.max_forward_batch)
    rows = {**made, "random": ("random", None, {}), "centre": ("centre", None, {})}
    return {label: cascade.method(name, head, **own) for label, (name, head, own) in rows.items()}


def _options(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["rise.masks=1000"]`` -> ``{"rise": {"masks": 1000}}``."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, dot, option = text.partition(".")
        if not dot or name not in names:
            raise ValueError(
                f"options: got {text!r}; give explainer.name=value of an explainer that is compared"
            )
        found.setdefault(name, {}).update(parse_options([option]))
    return found


class Standing(NamedTuple):
    """One cell of the leaderboard beside the best method of its column.

    ``diff`` = mean(method - best) over images valid in both, with its paired 95 % interval, NaN for
    the best itself. ``level_with_best``: the interval holds zero.
    """

    method: str
    column: Column
    mean: float
    lo: float
    hi: float
    n: int
    n_invalid: int
    best: bool
    diff: float
    diff_lo: float
    diff_hi: float
    level_with_best: bool


def standings(results: Results) -> list[Standing]:
    """Every method against the best of its column.

    Sanity rows and masks cannot be best, nor can a method that was measured on less than half of
    the images that another was measured on.
    """
    rows = {(r.method, Column(r.metric, r.level)): r for r in results.rows()}
    best = {column: _best(results, rows, column) for column in results.columns}
    differences: dict[tuple[str, Column], Any] = {}
    for name in results.methods:
        for rival in dict.fromkeys(best.values()):
            columns = [c for c in results.columns if best[c] == rival]
            if rival is not None and rival != name:
                found = results.compare(name, rival, columns)
                differences.update({(name, Column(d.metric, d.level)): d for d in found})
    table = []
    for column in results.columns:
        for name in results.methods:
            row, d = rows[name, column], differences.get((name, column))
            diff = (math.nan,) * 3 if d is None else (d.diff, d.lo, d.hi)
            level = name == best[column] or (
                d is not None and d.n > 0 and not d.better and not d.worse
            )
            table.append(
                Standing(
                    method=name,
                    column=column,
                    mean=row.mean,
                    lo=row.lo,
                    hi=row.hi,
                    n=row.n,
                    n_invalid=row.n_invalid,
                    best=name == best[column],
                    diff=diff[0],
                    diff_lo=diff[1],
                    diff_hi=diff[2],
                    level_with_best=level,
                )
            )
    return table


def _best(results: Results, rows: Mapping[tuple[str, Column], Row], column: Column) -> str | None:
    sign = 1 if METRICS[column.metric].higher_is_better else -1
    rivals = [
        name
        for name, method in results.methods.items()
        if not is_baseline(name) and not method.is_mask and rows[name, column].n
    ]
    most = max((rows[name, column].n for name in rivals), default=0)
    rivals = [name for name in rivals if 2 * rows[name, column].n >= most]
    return max(rivals, key=lambda name: sign * rows[name, column].mean, default=None)


def write_report(
    results: Results,
    folder: Path,
    photos: Mapping[str, Path] | None = None,
    preprocessing: Any = None,
) -> list[Path]:
    """Write the leaderboard as Markdown, CSV, JSON and HTML; returns the files.

    Args:
        photos: by image id, for the page's pictures of best and worst cases; their maps come from
            ``state.sqlite`` in ``folder``.
        preprocessing: the backbone's, to show the photos as it sees them.

    Raises:
        OSError: a file cannot be written; earlier files are intact.
    """
    from xattn.eval.html import html_page
    from xattn.eval.report import image_lines

    table = standings(results)
    state = folder / "state.sqlite"
    texts = {
        "leaderboard.md": markdown(results, table),
        "leaderboard.csv": _csv(_standing_lines(results, table)),
        "leaderboard.json": _json({**to_dict(results), "cost": {}, "standings": _plain(table)}),
        "images.csv": _csv(image_lines(results)),
        "report.html": html_page(
            results,
            table,
            state=state if state.exists() else None,
            photos=photos or {},
            preprocessing=preprocessing,
        ),
        "seconds.js": seconds_script(results),
    }
    paths = []
    for name, text in texts.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        paths.append(folder / name)
    return paths


def markdown(results: Results, table: Sequence[Standing]) -> str:
    """The tables, who is best and who is level with the best, then protocol and warnings."""
    best: dict[str, list[str]] = {}
    for column in results.columns:
        cells = [s for s in table if s.column == column and s.n]
        winner = next((s.method for s in cells if s.best), None)
        if winner is None:
            continue
        rivals = [s for s in cells if not s.best and not is_baseline(s.method)]
        few = [s for s in rivals if results.images_of_both(s.method, winner, column) < MIN_IMAGES]
        level = [s.method for s in rivals if s.level_with_best and s not in few]
        said = [", ".join(level)] if level else []
        if few:
            said.append(f"{TOO_FEW}: {', '.join(s.method for s in few)}")
        best[column.key] = [winner, "; ".join(said) or "none"]
    lines = ["| metric | best | not told apart from the best (paired 95 % interval holds 0) |"]
    lines += ["| :-- | :-- | :-- |"]
    lines += [f"| {key} | {winner} | {level} |" for key, (winner, level) in best.items()]
    return "# Leaderboard\n\n" + format_table(results, "markdown") + "\n" + "\n".join(lines) + "\n"


def seconds_script(results: Results) -> str:
    """What varies from run to run, as a script that the page loads if it is there."""
    seconds = {
        name: method.seconds / max(1, len(results.images))
        for name, method in results.methods.items()
    }
    return f"window.XATTN_SECONDS = {json.dumps(seconds)};\n"


def _standing_lines(results: Results, table: Sequence[Standing]) -> list[list[Any]]:
    lines: list[list[Any]] = [
        ["method", "metric", "level", *Standing._fields[2:], "forwards", "protocol_id"]
    ]
    for s in table:
        numbers = ["" if v != v else v for v in s[2:]]
        cost = results.methods[s.method].forwards
        level = "" if s.column.level is None else s.column.level
        lines.append(
            [s.method, s.column.metric, level, *numbers, cost, results.metric_id(s.column)]
        )
    return lines


def _plain(table: Sequence[Standing]) -> list[dict[str, Any]]:
    rows = []
    for s in table:
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in s._asdict().items()
        }
        rows.append({**row, "column": s.column.key})
    return rows


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1) + "\n"
