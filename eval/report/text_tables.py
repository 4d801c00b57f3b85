"""Formats results as text or Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from xattn.eval.evaluation.results import Results, Row
from xattn.eval.metrics.base import Column
from xattn.eval.metrics.objectives import LEGEND, MARK
from xattn.eval.report.aggregate_ranks import Ranking, aggregate_ranks
from xattn.eval.report.rank_sets import MIN_RANKED
from xattn.eval.report.report_card import ReportCard
from xattn.runtime.tables import markdown

RankTable = Mapping[Column, Mapping[str, tuple[int, int]]]


class Section(NamedTuple):
    """A table with notes; the first of its ``lines`` contains the column titles."""

    title: str
    lines: list[list[str]]
    notes: list[str]


def sections(results: Results, ranks: RankTable, card: ReportCard | None) -> list[Section]:
    """The report's sections about rank sets and about the report card; each is left out if there is nothing
    to show."""
    found = []
    if ranks:
        methods = list(dict.fromkeys(name for of in ranks.values() for name in of))
        rows = [[name, *(_places(ranks[column].get(name)) for column in ranks)] for name in methods]
        notes = [
            "rank sets: the best and the worst place that a method may have, at 95 % for all methods and "
            "these columns together; photos are resampled"
        ]
        if card is not None:
            notes.append("columns that fail the report card have no ranks")
        found.append(Section("rank sets", [["method", *(c.key for c in ranks)], *rows], notes))
    elif len(results.judged_methods) > 1:
        few = f"rank sets: {len(results.images)} photos; at least {MIN_RANKED} are needed"
        found.append(Section("rank sets", [], [few] * (len(results.images) < MIN_RANKED)))
    if card is not None:
        found.append(Section("report card", card.lines(), card.notes))
    return [section for section in found if section.lines or section.notes]


def _places(ends: tuple[int, int] | None) -> str:
    return "-" if ends is None else str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


def format_section(section: Section, style: str = "text") -> str:
    """A section as text or Markdown."""
    bullet = "- " if style == "markdown" else ""
    table = [_table(section.title, section.lines, style)] if section.lines else []
    return "\n\n".join([*table, "\n".join(bullet + note for note in section.notes)])


def format_table(results: Results, style: str = "text") -> str:
    """The results as tables with 95 % intervals, aggregate ranks, the protocol and warnings.

    There is one table for each level of the masking metrics and for each kind of the other metrics. A
    dagger marks a value if the metric is close to the training objective of the row's head.

    Args:
        style: ``"text"`` (aligned columns) or ``"markdown"``.

    Example:
        >>> import torch, xattn
        >>> from xattn.eval import format_table
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, {"gradcam": "gradcam"}, images, progress=False)
        >>> "Grad-CAM" in format_table(results) or "gradcam" in format_table(results)
        True
    """
    if style not in ("text", "markdown"):
        raise ValueError(f"style: got {style!r}; choose 'text' or 'markdown'")
    by_cell = {(r.method, r.metric, r.level): r for r in results.rows()}
    levels = list(dict.fromkeys(c.level for c in results.columns if c.level is not None))
    groups: list[tuple[str, list[Column]]] = [
        (f"retained {100 * level:g} %", [c for c in results.columns if c.level == level])
        for level in levels
    ]
    for kind in dict.fromkeys(
        results.info(c.metric).kind for c in results.columns if c.level is None
    ):
        columns = [
            c for c in results.columns if c.level is None and results.info(c.metric).kind == kind
        ]
        groups += [(kind, columns[i : i + 5]) for i in range(0, len(columns), 5)]
    parts = []
    for title, columns in groups:
        heads = [
            f"{c.metric} {'↑' if results.info(c.metric).higher_is_better else '↓'}" for c in columns
        ]
        lines = [["method", *heads, "n", "invalid", "forwards"]]
        marked = [any(by_cell[(m, *c)].trained_on for m in results.methods) for c in columns]
        for name in results.methods:
            rows = [by_cell[(name, *c)] for c in columns]
            cost = rows[0].forwards
            counts = [_span(r.n for r in rows), _span(r.n_invalid for r in rows)]
            digits = [results.info(c.metric).digits for c in columns]
            cells = map(_cell, rows, digits, marked)
            lines.append([name, *cells, *counts, "-" if cost is None else str(cost)])
        parts.append(_table(title, lines, style))
    ranking = aggregate_ranks(results)
    if ranking is not None and ranking.ranks:
        parts.append(_table("aggregate rank", _rank_lines(ranking), style))
    ranked = [] if ranking is None else ranking.notes
    notes = [
        *ranked,
        *protocol_notes(results),
        *(f"warning: {line}" for line in results.warnings()),
    ]
    if any(row.trained_on and row.n for row in by_cell.values()):
        notes.insert(0, f"{MARK} {LEGEND}")
    bullet = "- " if style == "markdown" else ""
    parts.append("\n".join(bullet + note for note in notes))
    return "\n\n".join(parts) + "\n"


def _rank_lines(ranking: Ranking) -> list[list[str]]:
    lines = [["method", "rank", "rank set", "first in", "z ↑"]]
    for r in ranking.ranks:
        share = f"{100 * r.first:.0f} %"
        lines.append([r.method, str(r.rank), f"[{r.lo}, {r.hi}]", share, f"{r.score:+.2f}"])
    return lines


def _cell(row: Row, digits: int, marked: bool) -> str:
    """A mean with its interval and, if needed, a dagger.

    If ``marked``, some cell of the column has a dagger, so cells without one end with two spaces.
    """
    dagger = f" {MARK}" if row.trained_on and row.n else "  " * marked
    shown = f"{row.mean:.{digits}f} [{row.lo:.{digits}f}, {row.hi:.{digits}f}]" if row.n else "-"
    return shown + dagger


def _span(counts: Iterable[int]) -> str:
    """Counts as text: a single number if all are equal, otherwise the smallest and the largest."""
    numbers = sorted(set(counts))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _table(title: str, lines: list[list[str]], style: str) -> str:
    if style == "markdown":
        return "\n".join([f"**{title}**", "", *markdown(lines[0], lines[1:])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def padded(line: list[str]) -> list[str]:
        rest = zip(line[1:], widths[1:], strict=True)
        return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in rest)]

    text = ["  ".join(padded(line)) for line in lines]
    return "\n".join([title, text[0], "-" * len(text[0]), *text[1:]])


def protocol_notes(results: Results) -> list[str]:
    """Three lines about what was measured, how it was measured and how to read AD."""
    p = results.protocol
    name = results.backbone.get("name", "?")
    return [
        f"protocol {p.id}: {p.score} of {p.explained}, {p.normalization} maps, "
        f"{p.resize} resize, {p.threshold} threshold, {p.masked_value} behind the mask, "
        f"view {p.view}, IC margin {p.ic_margin:g}",
        f"{p.n} images on {name}; mean with 95 % bootstrap interval "
        f"({results.n_resamples} resamples, seed {p.seed}); forwards: passes per explanation",
        "a map of ones has AD 0 by definition, so read AD together with IC and ADD",
    ]
