"""The results of an evaluation: per-image values, means with intervals, comparisons and warnings.

:class:`Results` can be exported to pandas, CSV, LaTeX and HTML. In LaTeX and HTML, the best method of each
column is bold if there are enough images for a verdict.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.eval import bootstrap
from xattn.eval.evaluation.facts import Evaluation
from xattn.eval.evaluation.store import ImageRow, Store
from xattn.eval.evaluation.stream import Skipped
from xattn.eval.interfaces import Explainer, ExplainerFacts
from xattn.eval.metrics.base import Column, MetricInfo
from xattn.eval.metrics.objectives import LEGEND, OBJECTIVES, find_shared, objective_of
from xattn.eval.metrics.registry import METRICS, own_infos
from xattn.eval.protocol import Protocol
from xattn.explainers.adapters import unwrap
from xattn.runtime.files import write_text

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip
_SHOWN = 5  # number of warnings shown in a notebook
_CELL = "padding:2px 10px;text-align:right;white-space:nowrap"


# Rows that a method has to beat. "randomized" is a prefix, as in "randomized_gradcam".
BASELINES = ("random", "centre", "ones", "randomized")
# Prefixes of rows for networks whose attention does not depend on the image content.
WITHOUT_CONTENT = ("qk_randomized_", "static_")
# Kinds of metrics in which a method has to beat every sanity row; otherwise there is a warning.
JUDGED = ("faithfulness", "localisation")
# With fewer images there is no verdict. With 2 images, for example, half of the nominal 95 % intervals for
# two equal methods exclude zero.
MIN_IMAGES = 8
TOO_FEW = "too few images for a verdict"
# If the mean rank correlation of a method's maps with its maps of a randomised network is higher than this,
# the method is said to ignore the weights.
SURVIVES = 0.5
RANDOMIZED = Column("randomization-Spearman")


class ImageRecord(NamedTuple):
    """One scored image, with the explained class and its probability p on the image without a mask.

    Example:
        >>> from xattn.eval import ImageRecord
        >>> ImageRecord("a.jpg", target=3, target_name="cat", p=0.9).target_name
        'cat'
    """

    id: str
    target: int
    target_name: str
    p: float


class Row(NamedTuple):
    """One cell of the table: the mean over ``n`` images with its 95 % bootstrap interval.

    ``trained_on`` is True if the metric is close to the training objective of the method's head.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, {"gradcam": "gradcam"}, images, progress=False)
        >>> row = results.rows()[0]
        >>> row.method, row.n, row.lo <= row.mean <= row.hi
        ('gradcam', 3, True)
    """

    method: str
    metric: str
    level: float | None
    mean: float
    lo: float
    hi: float
    n: int
    n_invalid: int
    forwards: int | None
    protocol_id: str
    trained_on: bool = False


class Difference(NamedTuple):
    """``diff`` = mean(method - reference) over the images valid for both, with its paired interval.

    ``better`` (or ``worse``) is True if the entire interval is on the better (or worse) side of zero and
    there are at least ``MIN_IMAGES`` images.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> methods = {"gradcam": "gradcam", "random": "random"}
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, methods, images, progress=False)
        >>> one = results.compare("gradcam", "random")[0]
        >>> one.metric, one.n, one.lo <= one.diff <= one.hi
        ('AD', 3, True)
    """

    metric: str
    level: float | None
    diff: float
    lo: float
    hi: float
    n: int
    better: bool
    worse: bool

    @property
    def judged(self) -> bool:
        """Whether there are enough images for a verdict."""
        return self.n >= MIN_IMAGES

    @property
    def verdict(self) -> str:
        """The verdict in words: whether the method is better, or why there is no verdict."""
        if not self.judged:
            return TOO_FEW
        return "better" if self.better else "worse" if self.worse else "no difference shown"


@dataclass(eq=False)
class MethodResult:
    """The results of one method on n images.

    Attributes:
        forwards: forward passes per explanation.
        is_mask: whether the maps are masks that are used without min-max scaling.
        valid: (n,), whether each image has a map that is finite and not constant.
        scores: maps each key to the scores (n,) or curves (n, T) of perturbed images; NaN where
            invalid.
        values: maps each column to its values (n,); NaN where undefined or not measured.
        measured: maps each column to (n,), which is True for the images on which the column should be
            measured. A column that is missing here should be measured on all images.
        reasons: maps the index of an image to the reason why its map is invalid.
        failed: maps the index of an image to the metrics that failed on it, and why.
        tied: number of maps in which many values are equal, as in saturated maps, so that a threshold keeps
            a larger fraction of the pixels than its level.
        requests: number of perturbed images that the metrics requested.
        seconds: time spent explaining all images, in the run that measured them.
        objective: the training objective of the method's head, see :mod:`xattn.eval.metrics.objectives`;
            None for methods without a trained head.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, {"gradcam": "gradcam"}, images, progress=False)
        >>> one = results.methods["gradcam"]
        >>> one.valid.shape, one.values[("AD", 0.5)].shape
        ((3,), (3,))
    """

    forwards: int | None
    is_mask: bool
    valid: NDArray[np.bool_]
    scores: dict[str, NDArray[np.float64]]
    values: dict[Column, NDArray[np.float64]]
    measured: dict[Column, NDArray[np.bool_]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    tied: int = 0
    requests: int = 0
    seconds: float = 0.0
    objective: str | None = None

    def attempts(self, column: Column) -> int:
        """The number of images on which a column should have been measured."""
        measured = self.measured.get(column)
        return len(self.valid) if measured is None else int(measured.sum())


@dataclass(eq=False)
class Results:
    """The result of :func:`xattn.eval.evaluate`. All methods share the images, their order and the
    protocol.

    ``protocol.n`` is the number of images, and ``protocol.n_invalid`` the number of invalid maps of all
    methods together. ``skipped`` lists unreadable images. ``cost`` counts the forward passes of the run.
    ``options`` maps each column key to the options of its metric. ``infos`` describes the metrics from
    outside the package, by name. ``notes`` maps an image's id to the reason why its annotation cannot be
    used. ``admitted`` lists the keys of the columns that may be used for ranks according to the run's
    report card; it is None if there is no card.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, {"gradcam": "gradcam"}, images, progress=False)
        >>> len(results.images), [row.metric for row in results.rows()[:2]]
        (3, ['AD', 'IC'])
    """

    protocol: Protocol
    images: list[ImageRecord]
    methods: dict[str, MethodResult]
    skipped: list[Skipped] = field(default_factory=list)
    backbone: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    n_resamples: int = bootstrap.N_RESAMPLES
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    infos: dict[str, MetricInfo] = field(default_factory=dict)
    admitted: tuple[str, ...] | None = None

    @property
    def columns(self) -> list[Column]:
        return list(next(iter(self.methods.values())).values)

    @property
    def judged(self) -> list[Column]:
        """The columns in which a method has to beat the sanity rows."""
        return [c for c in self.columns if self.info(c.metric).kind in JUDGED]

    @property
    def ranked(self) -> list[Column]:
        """The columns among :attr:`judged` that may be used for ranks."""
        return [c for c in self.judged if self.admitted is None or c.key in self.admitted]

    def info(self, metric: str) -> MetricInfo:
        """The formula, direction and range of a metric.

        Raises:
            KeyError: the metric is unknown.
        """
        return self.infos[metric] if metric in self.infos else METRICS[metric]

    def rows(self) -> list[Row]:
        """All means with their intervals, method by method."""
        rows = []
        for name, method in self.methods.items():
            columns = list(method.values)
            matrix = np.stack([method.values[c] for c in columns], axis=1)
            intervals = bootstrap.mean_intervals(
                matrix, n_resamples=self.n_resamples, seed=self.protocol.seed
            )
            for (metric, level), interval in zip(columns, intervals, strict=True):
                rows.append(
                    Row(
                        name,
                        metric,
                        level,
                        interval.mean,
                        interval.lo,
                        interval.hi,
                        interval.n,
                        method.attempts(Column(metric, level)) - interval.n,
                        method.forwards,
                        self.metric_id(Column(metric, level)),
                        self.trained_on(name, Column(metric, level)),
                    )
                )
        return rows

    def trained_on(self, method: str, column: Column) -> bool:
        """Whether a column is close to the training objective of the method's head.

        See :mod:`xattn.eval.metrics.objectives`.
        """
        objective, reads = self._method(method).objective, self.info(column.metric).reads
        return find_shared(objective, reads, self.options.get(column.key)).close

    def first(self, column: Column) -> str | None:
        """The method with the best mean in a column; None if no method has a value.

        Sanity rows and masks are not considered. Neither is a method that has values on fewer than half as
        many images as another method.
        """
        sign = 1 if self.info(column.metric).higher_is_better else -1
        values = {
            name: method.values[column][~np.isnan(method.values[column])]
            for name, method in self.methods.items()
            if not is_baseline(name) and not method.is_mask
        }
        most = max((len(v) for v in values.values()), default=0)
        rivals = [name for name, v in values.items() if len(v) and 2 * len(v) >= most]
        return max(rivals, key=lambda n: sign * bootstrap.mean(values[n]), default=None)

    def best(self, column: Column) -> str | None:
        """Like :meth:`first`, but None if that method was measured on too few images for a verdict."""
        name = self.first(column)
        return name if name and self.images_of_both(name, name, column) >= MIN_IMAGES else None

    def to_pandas(self, per_image: bool = False) -> Any:
        """A ``DataFrame`` with one row per method, which contains its name, its number of forward passes,
        and the mean, interval and number of images of each column.

        With ``per_image``, there is one row per image, method and metric.

        Raises:
            ValueError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ValueError(
                'to_pandas: pandas is not installed; run: pip install "xattn[tables]"'
            ) from None
        if not per_image:
            return pd.DataFrame(self._table())
        rows = [
            (image.id, name, image.target, image.target_name, column.key, float(values[i]))
            for name, method in self.methods.items()
            for column, values in method.values.items()
            for i, image in enumerate(self.images)
        ]
        names = ["image", "method", "target", "target_name", "metric", "value"]
        return pd.DataFrame(rows, columns=names)

    def to_csv(self, path: str | Path | None = None, per_image: bool = False) -> str | None:
        """Write the table to ``path`` as CSV, or return the text if ``path`` is None.

        NaN becomes an empty cell. With ``per_image``, there is one row per image and method, with the value
        of each column rounded to six significant digits.

        Raises:
            OSError: the file cannot be written; an existing file is left intact.
        """
        rows = self._table()
        if per_image:
            rows = [
                {"image": image.id, "target": image.target, "method": name}
                | {c.key: float(f"{values[i]:.6g}") for c, values in method.values.items()}
                for name, method in self.methods.items()
                for i, image in enumerate(self.images)
            ]
        text = csv_text([[*rows[0]], *(row.values() for row in rows)])
        if path is None:
            return text
        write_text(path, text)
        return None

    def _table(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {name: {"method": name} for name in self.methods}
        for row in self.rows():
            key = Column(row.metric, row.level).key
            numbers = {key: row.mean, f"{key} lo": row.lo, f"{key} hi": row.hi, f"{key} n": row.n}
            found[row.method].update(numbers)
        for name, method in self.methods.items():
            found[name]["forwards"] = method.forwards
        return list(found.values())

    def to_latex(
        self,
        columns: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        intervals: bool = True,
        caption: str | None = None,
        label: str | None = None,
    ) -> str:
        """A LaTeX ``tabular`` for booktabs, inside a ``table`` if ``caption`` or ``label`` is given.

        Arrows show whether higher or lower is better. A dagger marks the values of metrics that are close
        to the training objective of a method's head. The best method of each column is bold, unless there
        are fewer than eight images; a comment then gives the reason.

        Args:
            columns: keys such as ``"AD@50"``; all columns by default.
            methods: the methods to show, in this order; all by default. The choice does not change which
                method is bold.
            intervals: whether to add the 95 % bootstrap interval of each mean.

        Raises:
            ValueError: the results do not have such a column or method.
        """
        keys = {column.key: column for column in self.columns}
        chosen = [keys[key] for key in _known("columns", columns, keys)]
        names = _known("methods", methods, self.methods)
        cells = {(r.method, Column(r.metric, r.level)): r for r in self.rows()}
        arrow = {True: r"$\uparrow$", False: r"$\downarrow$"}
        heads = [f"{_latex(c.key)} {arrow[self.info(c.metric).higher_is_better]}" for c in chosen]
        lines = [rf"\begin{{tabular}}{{l{'r' * len(chosen)}}}", r"\toprule"]
        lines += [" & ".join(["Method", *heads]) + r" \\", r"\midrule"]
        for name in names:
            row = [_latex_cell(self, cells[name, c], intervals) for c in chosen]
            lines.append(" & ".join([_latex(name), *row]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        notes = [f"{len(self.images)} images"]
        if intervals:
            notes.append("brackets: 95 % bootstrap interval")
        if any(cells[name, c].trained_on for name in names for c in chosen):
            notes.append(f"dagger: {LEGEND}")
        notes += [line for line in self.warnings() if "too few images" in line]
        text = "".join(f"% {' '.join(note.split())}\n" for note in notes) + "\n".join(lines) + "\n"
        if caption is None and label is None:
            return text
        about = [rf"\caption{{{_latex(caption)}}}"] if caption is not None else []
        about += [rf"\label{{{label}}}"] if label is not None else []
        return "\n".join([r"\begin{table}", r"\centering", *about, text + r"\end{table}"]) + "\n"

    def _repr_html_(self) -> str:
        """HTML for a notebook: a table of means with intervals (best in bold), and the first warnings."""
        cells = {(r.method, Column(r.metric, r.level)): r for r in self.rows()}
        heads = "".join(
            f'<th style="{_CELL}">{html.escape(c.key)} '
            f"{'↑' if self.info(c.metric).higher_is_better else '↓'}</th>"
            for c in self.columns
        )
        body = ""
        for name in self.methods:
            body += f'<tr><th style="{_CELL};text-align:left">{html.escape(name)}</th>'
            for c in self.columns:
                row, digits = cells[name, c], self.info(c.metric).digits
                shown = f"{row.mean:.{digits}f}" if row.n else "-"
                interval = f"[{row.lo:.{digits}f}, {row.hi:.{digits}f}]" if row.n else ""
                if self.best(c) == name:
                    shown = f"<b>{shown}</b>"
                body += f'<td style="{_CELL}">{shown} <small>{interval}</small></td>'
            body += "</tr>"
        lines = self.warnings()
        told = [html.escape(line) for line in lines[:_SHOWN]]
        if len(lines) > _SHOWN:
            told.append(f"and {len(lines) - _SHOWN} more: results.warnings()")
        warned = f"<ul>{''.join(f'<li>{line}</li>' for line in told)}</ul>" if lines else ""
        return (
            f'<div class="xattn-results" style="overflow-x:auto"><table><thead><tr><th></th>{heads}</tr>'
            f"</thead><tbody>{body}</tbody></table><div>{len(self.images)} images; means with 95 % "
            f"bootstrap intervals; bold: the best</div>{warned}</div>"
        )

    def metric_id(self, column: Column) -> str:
        """The id of a column under this run's protocol, see :meth:`xattn.eval.Protocol.metric_id`."""
        formula = self.info(column.metric).formula
        return self.protocol.metric_id(*column, self.options.get(column.key), formula)

    def mean(self, method: str, metric: str, level: float | None = None) -> float:
        """The mean of one column for one method, in the metric's unit."""
        values = self._method(method).values
        if Column(metric, level) not in values:
            known = ", ".join(c.key for c in values)
            raise ValueError(f"metric, level: got {metric} at {level}; this run has {known}")
        return bootstrap.mean(values[Column(metric, level)])

    def compare(
        self, method: str, reference: str, columns: Sequence[Column] | None = None
    ) -> list[Difference]:
        """The paired difference ``method - reference`` of each column, with its 95 % interval."""
        a, b = self._method(method).values, self._method(reference).values
        columns = list(a) if columns is None else columns
        if not columns:
            return []
        matrix = np.stack([a[c] - b[c] for c in columns], axis=1)
        intervals = bootstrap.mean_intervals(
            matrix, n_resamples=self.n_resamples, seed=self.protocol.seed
        )
        differences = []
        for (metric, level), (diff, lo, hi, n) in zip(columns, intervals, strict=True):
            above, below = lo > 0, hi < 0
            better, worse = (above, below) if self.info(metric).higher_is_better else (below, above)
            found = Difference(metric, level, diff, lo, hi, n, better, worse)
            differences.append(found if found.judged else found._replace(better=False, worse=False))
        return differences

    def warnings(self) -> list[str]:
        """Warnings, one per line: sanity rows that a method does not beat, too few images, and failures."""
        lines = self._too_few()
        for name, failures in self.sanity_failures().items():
            lost: dict[str, list[str]] = {}
            for column, rivals in failures.items():
                for rival in rivals or ():
                    lost.setdefault(rival, []).append(column.key)
            lines += [f"{name} does not beat {r} in {', '.join(keys)}" for r, keys in lost.items()]
        for name in self.judged_methods:
            lines += self._survives(name)
        for name, method in self.methods.items():
            invalid = int((~method.valid).sum())
            if invalid:
                why = "; ".join(dict.fromkeys(method.reasons.values())) or "constant or non-finite"
                lines.append(f"{name}: {invalid} invalid maps, left out of its means ({why})")
            if method.failed:
                why = "; ".join(list(dict.fromkeys(method.failed.values()))[:3])
                lines.append(f"{name}: metrics failed on {len(method.failed)} images ({why})")
            if method.tied and not method.is_mask and not is_baseline(name):
                lines.append(
                    f"{name}: on {method.tied} images, a threshold keeps too many pixels because of ties"
                )
            if method.objective is not None and method.objective not in OBJECTIVES:
                lines.append(
                    f"{name}: trained on {method.objective!r}, which is unknown to this version, so "
                    f"no metric is marked as close to it"
                )
        if self.notes:
            shown = "; ".join(list(dict.fromkeys(self.notes.values()))[:3])
            lines.append(f"{len(self.notes)} images without usable annotation: {shown}")
        if self.skipped:
            shown = ", ".join(s.id for s in self.skipped[:5])
            more = ", ..." if len(self.skipped) > 5 else ""
            lines.append(f"{len(self.skipped)} unreadable images skipped: {shown}{more}")
        return lines

    @property
    def judged_methods(self) -> list[str]:
        """The methods under test, without sanity rows and masks."""
        return [n for n, m in self.methods.items() if not is_baseline(n) and not m.is_mask]

    def sanity_failures(self) -> dict[str, dict[Column, list[str] | None]]:
        """For each method and each column in :attr:`judged`, the sanity rows that the method does not beat.

        None instead of a list means that there is no verdict, because too few images have values for both
        the method and a sanity row.
        """
        columns, rivals = self.judged, self._sanity_rows
        found: dict[str, dict[Column, list[str] | None]] = {}
        for name in self.judged_methods if rivals else ():
            compared = {rival: self.compare(name, rival, columns) for rival in rivals}
            found[name] = {
                column: [r for r, ds in compared.items() if ds[c].judged and not ds[c].better]
                if any(ds[c].judged for ds in compared.values())
                else None
                for c, column in enumerate(columns)
            }
        return found

    @property
    def _sanity_rows(self) -> list[str]:
        return [n for n, m in self.methods.items() if is_baseline(n) and not m.is_mask]

    def images_of_both(self, method: str, reference: str, column: Column) -> int:
        """The number of images on which both rows have a value."""
        a, b = self._method(method).values[column], self._method(reference).values[column]
        return int((~np.isnan(a - b)).sum())

    def _too_few(self) -> list[str]:
        """Warnings that name the methods and columns with too few images for a verdict."""
        lacking: dict[tuple[str, ...], list[str]] = {}
        for name in self.judged_methods:
            keys = []
            for column in self.judged:
                counts = [self.images_of_both(name, r, column) for r in self._sanity_rows]
                if any(0 < n < MIN_IMAGES for n in counts):
                    keys.append(column.key)
            if (
                RANDOMIZED in self.columns
                and 0 < self.images_of_both(name, name, RANDOMIZED) < MIN_IMAGES
            ):
                keys.append(RANDOMIZED.key)
            if keys:
                lacking.setdefault(tuple(keys), []).append(name)
        return [
            f"{', '.join(names)}: {TOO_FEW} in {', '.join(keys)}; at least {MIN_IMAGES} are needed"
            for keys, names in lacking.items()
        ]

    def survives(self, name: str) -> bool | None:
        """Whether a method's maps stay similar when the network's weights are randomised.

        None means that the method was measured on too few images for a verdict.
        """
        values = self._method(name).values.get(RANDOMIZED)
        if values is None or int((~np.isnan(values)).sum()) < MIN_IMAGES:
            return None
        return bootstrap.mean(values) > SURVIVES

    def _survives(self, name: str) -> list[str]:
        """A list with one warning if the method :meth:`survives`, or an empty list."""
        if not self.survives(name):
            return []
        mean = bootstrap.mean(self.methods[name].values[RANDOMIZED])
        return [
            f"{name} survives weight randomisation: the rank correlation of its maps before and after is "
            f"{mean:.2f} (above {SURVIVES:g})"
        ]

    def _method(self, name: str) -> MethodResult:
        if name not in self.methods:
            raise ValueError(f"method: got {name!r}; this run has {', '.join(self.methods)}")
        return self.methods[name]


def is_baseline(name: str) -> bool:
    """Whether a row is a sanity row rather than a method under test.

    Example:
        >>> from xattn.eval import is_baseline
        >>> is_baseline("random"), is_baseline("gradcam")
        (True, False)
    """
    return name in BASELINES or name.startswith(("randomized", *WITHOUT_CONTENT))


def collect(
    store: Store, evaluation: Evaluation, cost: dict[str, int], count: int | None = None
) -> Results:
    """The results of a finished evaluation on its first ``count`` images, ordered by position.

    Raises:
        ValueError: none of the images could be read.
    """
    backbone, metrics = evaluation.backbone, evaluation.metrics
    rows = [row for row in store.images() if count is None or row.position < count]
    skipped = [Skipped(row.id, row.skipped) for row in rows if row.skipped is not None]
    scored = [row for row in rows if row.skipped is None]
    if not scored:
        raise ValueError(
            f"images: none of {len(skipped)} could be read; the first error: {skipped[0].reason}"
        )
    index = {row.position: i for i, row in enumerate(scored)}
    columns = [column for metric in metrics for column in metric.columns]
    methods = {
        name: _method(store, name, explainer, columns, index)
        for name, explainer in evaluation.explainers.items()
    }
    invalid = sum(int((~method.valid).sum()) for method in methods.values())
    return Results(
        protocol=replace(evaluation.protocol, n=len(scored), n_invalid=invalid),
        images=[_record(row) for row in scored],
        methods=methods,
        skipped=skipped,
        backbone={"name": backbone.name, "sha256": backbone.fingerprint},
        cost=cost,
        options={c.key: metric.column_options(c) for metric in metrics for c in metric.columns},
        notes={row.id: row.note for row in scored if row.note is not None},
        infos={m: info for metric in metrics for m, info in own_infos(metric).items()},
    )


def _method(
    store: Store, name: str, explainer: Explainer, columns: Iterable[Column], index: dict[int, int]
) -> MethodResult:
    n = len(index)
    facts = ExplainerFacts.of(explainer)
    method = MethodResult(
        forwards=facts.forwards,
        is_mask=facts.is_mask,
        objective=objective_of(unwrap(explainer)),
        valid=np.zeros(n, bool),
        scores={},
        values={column: np.full(n, np.nan) for column in columns},
        measured={column: np.zeros(n, bool) for column in columns},
    )
    by_key = {column.key: column for column in columns}
    for row in store.results(name):
        if row.position not in index:
            continue
        i = index[row.position]
        method.valid[i] = row.reason is None
        if row.reason is not None:
            method.reasons[i] = row.reason
        if row.failed is not None:
            method.failed[i] = row.failed
        method.tied += row.tied
        method.requests += row.requests
        method.seconds += row.seconds
        for key, value in row.measured.items():
            method.values[by_key[key]][i] = value
            method.measured[by_key[key]][i] = True
        for key, scores in row.scores.items():
            if key not in method.scores:
                shape = (n,) if len(scores) == 1 else (n, len(scores))
                method.scores[key] = np.full(shape, np.nan)
            if method.scores[key].shape[1:] != (() if len(scores) == 1 else (len(scores),)):
                continue  # a curve over superpixels, whose number differs between images
            method.scores[key][i] = scores[0] if len(scores) == 1 else scores
    return method


def _record(row: ImageRow) -> ImageRecord:
    assert row.target is not None and row.target_name is not None and row.score is not None
    return ImageRecord(row.id, row.target, row.target_name, row.score)


# ---------------------------------------------------------------- cells


def csv_text(lines: Iterable[Iterable[Any]]) -> str:
    """Rows of cells as CSV text; None and NaN become empty cells."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(
        ["" if cell is None or cell != cell else cell for cell in line] for line in lines
    )
    return stream.getvalue()


def _known(argument: str, wanted: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    if wanted is None:
        return list(known)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"{argument}: got {', '.join(map(str, unknown)) or 'none'}; give some of {', '.join(known)}"
        )
    return names


def _latex_cell(results: Results, row: Row, interval: bool) -> str:
    if not row.n:
        return "--"
    column, digits = Column(row.metric, row.level), results.info(row.metric).digits
    shown = f"{row.mean:.{digits}f}"
    shown = rf"\textbf{{{shown}}}" if results.best(column) == row.method else shown
    shown += r"$^\dagger$" if row.trained_on else ""
    return shown + (
        rf" {{\scriptsize [{row.lo:.{digits}f}, {row.hi:.{digits}f}]}}" if interval else ""
    )


def _latex(text: str) -> str:
    """Text for LaTeX, with special characters escaped."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
