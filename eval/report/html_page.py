"""Writes a leaderboard as one HTML page, with a table, curves, a scatter plot of images, and example cases.

The tables show the leaderboard, the best methods, the formulas, and the sanity rows that each method does
not beat. The page depends only on the arguments of :func:`html_page`. The only other file that it loads is
``seconds.js`` in the same folder, which contains the run times because they differ from run to run; this
file may be missing. The names of methods come from users, so all names are escaped by :func:`text` or
:func:`label`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from xattn.backbone import Preprocessing
from xattn.eval.evaluation.results import TOO_FEW, Results, is_baseline
from xattn.eval.metric_words import metric_about
from xattn.eval.metrics.base import Column
from xattn.eval.metrics.objectives import LEGEND, MARK
from xattn.eval.report.aggregate_ranks import AggregateRank
from xattn.eval.report.html_data import page_data
from xattn.eval.report.standings import Board, Standing
from xattn.eval.report.text_tables import Section, protocol_notes
from xattn.pictures.design import FONT, VARIABLES
from xattn.runtime.files import printable
from xattn.runtime.stores import StorePath

SIGNS = {"best": "★", "level with best": "≈", "better than the best method": "!"}
Failures = Mapping[str, Mapping[Column, "list[str] | None"]]


def text(value: object) -> str:
    """Any string as HTML text; bytes of a file name that are not UTF-8 are written as ``\\udc80``."""
    return html.escape(printable(str(value)))


def label(name: str) -> str:
    """A method's name as HTML, in which lines may break after an underscore."""
    return text(name).replace("_", "_<wbr>")


# ---------------------------------------------------------------- leaderboard


def _kinds(results: Results) -> dict[str, list[Column]]:
    kinds: dict[str, list[Column]] = {}
    for column in results.columns:
        kinds.setdefault(results.info(column.metric).kind, []).append(column)
    return kinds


def toggles(board: Board) -> str:
    boxes = [
        f"<label><input type=checkbox data-kind={k} checked> {kind}</label>"
        for k, kind in enumerate(
            [*_kinds(board.results), "cost", *(["all metrics"] * _is_ranked(board))]
        )
    ]
    return "".join(boxes)


def _is_ranked(board: Board) -> bool:
    return board.ranks is not None and bool(board.ranks.ranks)


def leaderboard(board: Board) -> str:
    results = board.results
    kinds = _kinds(results)
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
    low += _sortable("forwards", False, cost, "forward passes per explanation")
    low += _sortable(
        "seconds", False, cost, "seconds per image, in the run that measured the method"
    )
    places = {r.method: r for r in board.ranks.ranks} if board.ranks else {}
    if places:
        top += f"<th scope=colgroup data-kind={cost + 1}><span>all metrics</span></th>"
        low += _sortable("rank", False, cost + 1, "aggregate rank, with its rank set at 95 %")
    body = ""
    for name, method in results.methods.items():
        row = "".join(
            _cell(board, name, c.key, k) for k, group in enumerate(kinds.values()) for c in group
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


def _cell(board: Board, name: str, key: str, kind: int) -> str:
    """One mean; if any cell of its column has a dagger, the cell leaves room for one."""
    s, mean, (lo, hi), minus, sign = board.formatted(name, key)
    if not s.n:
        return f"<td data-kind={kind} data-v=->-</td>"
    mark = f"<i class=mark>{SIGNS[sign]}<span class=sr> {sign}</span></i>" if sign else ""
    title = f"{s.n} images" + ("" if s.judged else f": {TOO_FEW}")
    if minus is not None:
        title += "; minus best: {} [{}, {}]".format(*minus)
    if s.trained_on:
        title += f"; {LEGEND}"
        mark += f"<i class=dagger>{MARK}<span class=sr> {LEGEND}</span></i>"
    elif key in board.trained:
        mark += "<i class=dagger></i>"
    tag = "b" if s.best else "span"
    few = f"<small>n = {s.n}</small>" if s.n < len(board.results.images) else ""
    return (
        f'<td data-kind={kind} data-v={float(s.mean)!r} title="{title}"><{tag}>{mean}</{tag}>{mark}'
        f"<small class=ci>[{lo}, {hi}]</small>{few}</td>"
    )


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


def verdicts(board: Board) -> str:
    """The best methods as an HTML list, with notes on the ranks and on columns with too few images."""
    said = "".join(
        f"<li><b class=name>{label(found.method)}</b>: {text(found.verdict)}</li>"
        for found in board.wins
    )
    said += "".join(f"<li>{text(note)}</li>" for note in (board.ranks.notes if board.ranks else ()))
    said += f"<li>{text(board.too_few)}</li>" if board.too_few else ""
    return f"<ul class=verdicts>{said}</ul>" if said else ""


def legend(board: Board) -> tuple[str, str]:
    """The meaning of the dagger as a short text and as a list item; both are "" if there are no daggers."""
    if not board.trained:
        return "", ""
    return f" <span><b>{MARK}</b> {LEGEND}</span>", (
        f"<li><b>{MARK}</b> This head was trained on the same score of photos with the same fill or "
        f"masks. If it is best here, its training worked; judge how faithful its maps are by the other "
        f"metrics.</li>\n"
    )


def formulas(results: Results) -> str:
    """An HTML table that describes each column by its meaning, formula, range, direction and id."""
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
    """The mean rank correlation of each method's maps with its maps of a randomised network, if it was
    measured."""
    column = Column("randomization-Spearman")
    names = results.judged_methods if column in results.columns else []
    return {name: results.mean(name, *column) for name in names}


def sanity_table(results: Results, failures: Failures) -> str:
    """An HTML table of the sanity rows that each method does not beat."""
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
        return "<caption>Not measured: there are no sanity rows, or no judged metrics.</caption>"
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


def section(given: Section) -> str:
    """A section as HTML, with its notes and its table."""
    notes = "".join(f"<p class=note>{text(note)}</p>" for note in given.notes)
    titles, *rows = given.lines or [[]]
    head = "".join(f"<th scope=col>{text(title)}</th>" for title in titles)
    body = ""
    for name, *cells in rows:
        row = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        body += f"<tr><th scope=row class=name>{label(name)}</th>{row}</tr>"
    table = f"<table class=sanity><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    name = given.title.capitalize()
    scroll = f'<div class=scroll tabindex=0 role=region aria-label="{name}">{table}</div>'
    return f"<section><h2>{name}</h2>{notes}{scroll if given.lines else ''}</section>\n"


_LISTED = 20  # number of images that a list names before "and n more"


def html_page(
    results: Results,
    table: Sequence[Standing],
    *,
    state: Path | None,
    photos: Mapping[str, Path | StorePath],
    preprocessing: Preprocessing | None = None,
    more: Sequence[Section] = (),
) -> str:
    """The HTML of the page; equal arguments give identical pages.

    Args:
        table: the result of :func:`xattn.eval.report.standings.standings`.
        state: the evaluation's SQLite file, whose maps are shown; with None, no maps are shown.
        photos: photos by image id. They are shown as the model saw them, so ``preprocessing`` is needed
            too. If a photo is missing or unreadable, only its map is shown.
        more: sections to add below the sanity rows.

    Raises:
        ValueError: ``state`` is damaged, or is not the state of an evaluation.
    """
    page = resources.files("xattn.eval.report") / "page"
    # json.dumps escapes non-ASCII characters. With the escapes below, no name can close the script element.
    data = json.dumps(
        page_data(results, state, photos, preprocessing), allow_nan=False, separators=(",", ":")
    )
    for sign in "<>&":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    failures = results.sanity_failures()
    board = Board.of(results, table)
    key, point = legend(board)
    parts = {
        "style": f":root{{{VARIABLES};--font:{FONT}}}\n"
        + (page / "report.css").read_text(encoding="utf-8"),
        "script": (page / "report.js").read_text(encoding="utf-8"),
        "facts": _facts(results),
        "warnings": _warnings(results, failures),
        "sanity": sanity_table(results, failures),
        "more": "".join(map(section, more)),
        "toggles": toggles(board),
        "verdicts": verdicts(board),
        "legend": key,
        "trained": point,
        "board": leaderboard(board),
        "columns": formulas(results),
        "invalid": _invalid(results),
        "data": data,
    }
    template = (page / "report.html").read_text(encoding="utf-8")
    # All slots are filled in one pass, so that braces in a name are never mistaken for a slot.
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: parts[slot[1]], template)


def _facts(results: Results) -> str:
    protocol, *rest = protocol_notes(results)
    backbone = results.backbone.get("name", "?")
    sane = sum(map(is_baseline, results.methods))
    digest = str(results.backbone.get("sha256", ""))[:12]
    facts = {
        "backbone": f"{text(backbone)} <small>{text(digest)}</small>",
        "images": str(len(results.images))
        + (f", {len(results.skipped)} skipped" if results.skipped else ""),
        "rows": f"{len(results.methods) - sane} methods, {sane} sanity rows",
        "protocol": text(protocol.removeprefix("protocol ")),
        "numbers": text(rest[0]),
    }
    return "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())


# ---------------------------------------------------------------- warnings


def _warnings(results: Results, failures: Failures) -> str:
    """A summary of the most important warnings as HTML, and a block that opens to show all of them."""
    lines = results.warnings()
    if not lines:
        return "<p>No warnings.</p>"
    points = []
    lost = {
        n: [r is not None and "centre" in r for r in row.values()] for n, row in failures.items()
    }
    for words, names in (
        ("in any judged column", [n for n, each in lost.items() if each and all(each)]),
        ("in some", [n for n, each in lost.items() if any(each) and not all(each)]),
    ):
        if names:
            points.append(f"<b>does not beat the centre prior</b> {words}: {_names(names)}")
    kept = [name for name in similarity(results) if results.survives(name)]
    if kept:
        points.append(f"<b>survives weight randomisation</b>: {_names(kept)}")
    none = [name for name, method in results.methods.items() if not method.valid.any()]
    if none:
        points.append(f"<b>no valid map</b>: {_names(none)}")
    found = "".join(f"<li>{point}</li>" for point in points)
    listed = "".join(f"<li>{text(line)}</li>" for line in lines)
    plural = "s" if len(lines) > 1 else ""
    return (
        f"<section class=warn aria-labelledby=warn-h><h2 id=warn-h>⚠ {len(lines)} warning{plural}"
        f"</h2><ul>{found}</ul><details><summary>All, with differences</summary>"
        f"<ul>{listed}</ul></details></section>"
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"<span class=name>{label(name)}</span>" for name in names)


# ---------------------------------------------------------------- missing values


def _invalid(results: Results) -> str:
    """An HTML list of invalid maps, failed metrics, skipped photos and unusable annotations, and why."""
    items = []
    for name, method in results.methods.items():
        bad = [
            f"{image.id}: {method.reasons.get(i, 'constant or non-finite map')}"
            for i, image in enumerate(results.images)
            if not method.valid[i]
        ]
        if bad:
            items.append(f"<b class=name>{label(name)}</b>: no valid map on {_listed(bad)}")
        if method.failed:
            lines = [f"{results.images[i].id}: {why}" for i, why in sorted(method.failed.items())]
            items.append(f"<b class=name>{label(name)}</b>: metrics failed on {_listed(lines)}")
    if results.skipped:
        lines = [f"{photo.id}: {photo.reason}" for photo in results.skipped]
        items.append(f"<b>photos</b>: could not read {_listed(lines)}")
    if results.notes:
        lines = [f"{image}: {note}" for image, note in results.notes.items()]
        items.append(f"<b>annotations</b>: cannot be used on {_listed(lines)}")
    if not items:
        return "<p>Nothing: every map is valid and every photo was read.</p>"
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _listed(lines: Sequence[str]) -> str:
    shown = "".join(f"<li class=name>{text(line)}</li>" for line in lines[:_LISTED])
    if len(lines) > _LISTED:
        shown += f"<li>and {len(lines) - _LISTED} more</li>"
    noun = "image" if len(lines) == 1 else "images"
    return f"<details><summary>{len(lines)} {noun}</summary><ul>{shown}</ul></details>"
