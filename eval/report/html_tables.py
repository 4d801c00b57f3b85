"""The tables of the report page as HTML: leaderboard, who is best, formulas, who beats which sanity row.

Names of methods come from users: everything passes through :func:`text` or ``name``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from xattn.eval.metrics.base import Column, MetricInfo
from xattn.eval.metrics.objectives import LEGEND, MARK
from xattn.eval.report.aggregate_ranks import AggregateRank, aggregate_ranks
from xattn.eval.report.standings import Standing, too_few, wins
from xattn.eval.results import TOO_FEW, MethodResult, Results, is_baseline
from xattn.pictures.words import metric_about
from xattn.runtime.files import printable

Failures = Mapping[str, Mapping[Column, "list[str] | None"]]


def text(value: object) -> str:
    """Any string as HTML text; bytes of a file name that are not UTF-8 show as ``\\udc80``."""
    return html.escape(printable(str(value)))


def label(name: str) -> str:
    """A method's name, which may break after an underscore."""
    return text(name).replace("_", "_<wbr>")


# ---------------------------------------------------------------- leaderboard


def _kinds(results: Results) -> dict[str, list[Column]]:
    kinds: dict[str, list[Column]] = {}
    for column in results.columns:
        kinds.setdefault(results.info(column.metric).kind, []).append(column)
    return kinds


def _places(results: Results) -> dict[str, AggregateRank]:
    """Aggregate ranks by method; empty where there are none."""
    ranking = aggregate_ranks(results)
    return {r.method: r for r in ranking.ranks} if ranking else {}


def toggles(results: Results) -> str:
    boxes = [
        f"<label><input type=checkbox data-kind={k} checked> {kind}</label>"
        for k, kind in enumerate(
            [*_kinds(results), "cost", *(["all metrics"] * bool(_places(results)))]
        )
    ]
    return "".join(boxes)


def leaderboard(results: Results, table: Sequence[Standing]) -> str:
    kinds = _kinds(results)
    cells = {(s.method, s.column): s for s in table}
    top = (
        "<th scope=col rowspan=2 aria-sort=none class=name><button type=button>method</button></th>"
    )
    low = ""
    for k, (kind, columns) in enumerate(kinds.items()):
        top += f"<th scope=colgroup colspan={len(columns)} data-kind={k}><span>{kind}</span></th>"
        for column in columns:
            info = results.info(column.metric)
            about = metric_about(column.key)
            low += _sortable(
                column.key, info.higher_is_better, k, f"{about} {info.formula}".strip()
            )
    cost = len(kinds)
    top += f"<th scope=colgroup colspan=2 data-kind={cost}><span>cost</span></th>"
    low += _sortable("forwards", False, cost, "forward passes that one explanation takes")
    low += _sortable("seconds", False, cost, "seconds an image, of the run that measured")
    places = _places(results)
    if places:
        top += f"<th scope=colgroup data-kind={cost + 1}><span>all metrics</span></th>"
        low += _sortable(
            "rank", False, cost + 1, "aggregate rank, with its 95 % bootstrap interval"
        )
    forms = {
        c: number_form(results.info(c.metric), [s.mean for s in table if s.column == c])
        for c in results.columns
    }
    marked = {s.column for s in table if s.trained_on and s.n}
    body = ""
    for name, method in results.methods.items():
        ordered = [(k, c) for k, columns in enumerate(kinds.values()) for c in columns]
        row = "".join(
            _cell(cells[name, c], method, forms[c], k, results, c in marked) for k, c in ordered
        )
        forwards = "-" if method.forwards is None else str(method.forwards)
        row += f"<td data-kind={cost} data-v={forwards}>{forwards}</td>"
        row += f"<td data-kind={cost} data-v=- data-seconds>-</td>"
        if places:
            row += _rank_cell(places.get(name), cost + 1)
        tags = ["sanity row"] * is_baseline(name) + ["mask"] * method.is_mask
        tags += [f"{bad} invalid"] if (bad := int((~method.valid).sum())) else []
        tag = "".join(f" <small class=tag>{tag}</small>" for tag in tags)
        kind = " class=base" if is_baseline(name) else ""
        body += f"<tr{kind}><th scope=row class=name>{label(name)}{tag}</th>{row}</tr>"
    return f"<thead><tr>{top}</tr><tr>{low}</tr></thead><tbody>{body}</tbody>"


def _rank_cell(place: AggregateRank | None, kind: int) -> str:
    if place is None:
        return f"<td data-kind={kind} data-v=->-</td>"
    title = f"first in {100 * place.first:.0f} % of resamples; z = {place.score:+.2f}"
    return (
        f'<td data-kind={kind} data-v={place.rank} title="{title}"><span>{place.rank}</span>'
        f"<small class=ci>[{place.lo}, {place.hi}]</small></td>"
    )


def _sortable(key: str, up: bool, kind: int, formula: str) -> str:
    arrow, words = ("↑", "higher is better") if up else ("↓", "lower is better")
    return (
        f"<th scope=col data-kind={kind} data-up={int(up)} aria-sort=none>"
        f'<button type=button title="{text(formula)}">{key} '
        f"<span role=img aria-label='{words}'>{arrow}</span></button></th>"
    )


def number_form(info: MetricInfo, means: Iterable[float]) -> str:
    """A column's number format: the decimals of its metric, unless they would show zeros or a tail."""
    digits = info.digits
    largest = max((abs(mean) for mean in means if math.isfinite(mean)), default=0.0)
    return ".2e" if 0 < largest < 10 ** (1 - digits) or largest >= 1e4 else f".{digits}f"


def format_number(value: float, form: str) -> str:
    shown = f"{value:{form}}"
    return shown.lstrip("-") if float(shown) == 0 else shown  # no "-0.00"


def _cell(
    s: Standing, method: MethodResult, form: str, kind: int, results: Results, marked: bool
) -> str:
    """One mean; ``marked``: the column has a dagger somewhere, so all leave it room."""
    if not s.n:
        return f"<td data-kind={kind} data-v=->-</td>"
    better = s.diff_lo > 0 if results.info(s.column.metric).higher_is_better else s.diff_hi < 0
    mark, title = "", f"{s.n} images"
    if not s.judged:
        title += f": {TOO_FEW}"
    if s.best:
        mark = "<i class=mark>★<span class=sr> best</span></i>"
    elif s.level_with_best:
        mark = "<i class=mark>≈<span class=sr> level with best</span></i>"
    elif s.judged and is_baseline(s.method) and not method.is_mask and better:
        mark = "<i class=mark>!<span class=sr> better than the best method</span></i>"
    if s.diff == s.diff:
        lo, hi = (format_number(v, form) for v in (s.diff_lo, s.diff_hi))
        title += f"; minus best: {format_number(s.diff, form)} [{lo}, {hi}]"
    if s.trained_on:
        title += f"; {LEGEND}"
        mark += f"<i class=dagger>{MARK}<span class=sr> {LEGEND}</span></i>"
    elif marked:
        mark += "<i class=dagger></i>"
    tag = "b" if s.best else "span"
    few = f"<small>n = {s.n}</small>" if s.n < len(results.images) else ""
    return (
        f'<td data-kind={kind} data-v={float(s.mean)!r} title="{title}">'
        f"<{tag}>{format_number(s.mean, form)}</{tag}>{mark}"
        f"<small class=ci>[{format_number(s.lo, form)}, {format_number(s.hi, form)}]</small>{few}</td>"
    )


def verdicts(results: Results, table: Sequence[Standing]) -> str:
    """Who is best where, a line a method, how much of that is close to its training; what ranks mean."""
    said = "".join(
        f"<li><b class=name>{label(found.method)}</b>: {text(found.verdict)}</li>"
        for found in wins(results, table)
    )
    ranking = aggregate_ranks(results)
    said += "".join(f"<li>{text(note)}</li>" for note in (ranking.notes if ranking else ()))
    few = too_few(table)
    said += f"<li>{text(few)}</li>" if few else ""
    return f"<ul class=verdicts>{said}</ul>" if said else ""


def legend(table: Sequence[Standing]) -> tuple[str, str]:
    """What a dagger means, in few words and as a point of how to read the page; empty without daggers."""
    if not any(s.trained_on and s.n for s in table):
        return "", ""
    return f" <span><b>{MARK}</b> {LEGEND}</span>", (
        f"<li><b>{MARK}</b> Training of this head read the same score of photos with the same fill or "
        f"masks: being best there says that training worked. How faithful its maps are is for the other "
        f"metrics to say.</li>\n"
    )


def formulas(results: Results) -> str:
    """What each column is: plain words, formula, range, direction, id."""
    rows = []
    for column in results.columns:
        info = results.info(column.metric)
        span = "".join(f"<td>{b:g}</td>".replace("inf", "∞") for b in (info.low, info.high))
        better = "higher" if info.higher_is_better else "lower"
        rows.append(
            f"<tr><th scope=row>{column.key}</th><td>{text(metric_about(column.key))}</td>"
            f"<td>{text(info.formula)}</td>{span}"
            f"<td>{better}</td><td><code>{text(results.metric_id(column))}</code></td></tr>"
        )
    heads = (
        "column",
        "in words",
        "formula",
        "from",
        "to",
        "better",
        "id (equal ids can be compared)",
    )
    head = "".join(f"<th scope=col>{h}</th>" for h in heads)
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"


# ---------------------------------------------------------------- sanity rows


def similarity(results: Results) -> dict[str, float]:
    """Mean rank correlation with the maps of a randomised network, where it was measured."""
    column = Column("randomization-Spearman")
    names = results.judged_methods if column in results.columns else []
    return {name: results.mean(name, *column) for name in names}


def sanity_table(results: Results, failures: Failures) -> str:
    """The table of who beats which sanity row."""
    columns = results.judged if failures else []
    metrics, means = list(dict.fromkeys(c.metric for c in columns)), similarity(results)
    heads = ["method", *metrics, *(["rank correlation after randomising weights"] if means else [])]
    body = ""
    for name in results.judged_methods:
        close = {c.metric for c in columns if results.trained_on(name, c)}
        cells = "".join(
            f"<td>{_verdict(failures[name], metric, metric in close)}</td>"
            if any(results.images_of_both(name, name, c) for c in columns if c.metric == metric)
            else "<td>-</td>"
            for metric in metrics
        )
        if means:
            mean = means[name]
            sign = {True: "✗", False: "✓", None: TOO_FEW}[results.survives(name)]
            cells += "<td>-</td>" if mean != mean else f"<td>{sign} {mean:.2f}</td>"
        body += f"<tr><th scope=row class=name>{label(name)}</th>{cells}</tr>"
    if len(heads) == 1:
        return "<caption>Not asked: no sanity row, or none of the judged metrics.</caption>"
    head = "".join(f"<th scope=col>{h}</th>" for h in heads)
    return f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"


def _verdict(row: Mapping[Column, list[str] | None], metric: str, trained_on: bool) -> str:
    lost: dict[str, list[str]] = {}
    judged = {c: rivals for c, rivals in row.items() if c.metric == metric and rivals is not None}
    for column, rivals in judged.items():
        for rival in rivals:
            lost.setdefault(rival, []).append(column.key.removeprefix(metric))
    said = "".join(
        f"<li>✗ {' '.join([label(rival), *filter(None, at)])}</li>" for rival, at in lost.items()
    )
    dagger = f" {MARK}" if trained_on else ""
    return f"<ul>{said}</ul>" if said else f"✓{dagger}" if judged else TOO_FEW
