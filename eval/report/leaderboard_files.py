"""Writes a leaderboard as Markdown, CSV, JSON and an HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xattn.eval.evaluation.results import TOO_FEW, Results, csv_text, is_baseline
from xattn.eval.metrics.objectives import MARK
from xattn.eval.report.aggregate_ranks import aggregate_ranks
from xattn.eval.report.html_page import html_page
from xattn.eval.report.rank_sets import ranked_columns
from xattn.eval.report.report_card import ReportCard
from xattn.eval.report.results_files import image_lines, to_dict
from xattn.eval.report.standings import Standing, standings, too_few, wins
from xattn.eval.report.text_tables import (
    RankTable,
    Section,
    format_section,
    format_table,
    sections,
)
from xattn.runtime.files import atomic_file
from xattn.runtime.stores import StorePath
from xattn.runtime.tables import markdown as markdown_table


def write_report(
    results: Results,
    folder: Path,
    photos: Mapping[str, Path | StorePath] | None = None,
    preprocessing: Any = None,
    card: ReportCard | None = None,
) -> list[Path]:
    """Write the leaderboard as Markdown, CSV, JSON and HTML; return the paths of the files.

    Args:
        photos: photos by image id, for the best and worst cases on the page. Their maps are read from
            ``state.sqlite`` in ``folder``, if it exists.
        preprocessing: the backbone's preprocessing; with it, photos are shown as the backbone sees them.
        card: the report card of the run.

    Raises:
        OSError: a file cannot be written; existing files are left intact.
    """
    table = standings(results)
    ranks = ranked_columns(results, results.ranked, results.judged_methods)
    more = sections(results, ranks, card)
    state = folder / "state.sqlite"
    texts = {
        "leaderboard.md": markdown(results, table, more),
        "leaderboard.csv": csv_text(_standing_lines(results, table, ranks)),
        "leaderboard.json": _json(
            {
                **to_dict(results),
                "cost": {},
                "standings": _plain(results, table),
                "aggregate_ranks": _ranking(results),
                "rank_sets": {column.key: dict(found) for column, found in ranks.items()},
            }
        ),
        "images.csv": csv_text(image_lines(results)),
        "report.html": html_page(
            results,
            table,
            state=state if state.exists() else None,
            photos=photos or {},
            preprocessing=preprocessing,
            more=more,
        ),
        "seconds.js": seconds_script(results),
    }
    if card is not None:
        texts["report-card.csv"] = csv_text(card.csv_lines())
    paths = []
    for name, text in texts.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        paths.append(folder / name)
    return paths


def markdown(results: Results, table: Sequence[Standing], more: Sequence[Section] = ()) -> str:
    """The leaderboard in Markdown: tables, protocol, warnings, verdicts in words, and the sections in
    ``more``."""
    verdicts = [f"- {found.method}: {found.verdict}" for found in wins(results, table)]
    verdicts += [f"- {few}"] if (few := too_few(table)) else []
    rows = []
    for column in results.columns:
        cells = [s for s in table if s.column == column and s.n]
        winner = next((s for s in cells if s.best), None)
        if winner is not None:
            rows.append((column.key, _marked(winner), _level_with(cells)))
        elif any(not s.judged for s in cells):
            rows.append((column.key, TOO_FEW, TOO_FEW))
    titles = "metric", "best", "no clear difference from the best (paired 95 % interval contains 0)"
    lines = [*verdicts, *([""] if verdicts else []), *markdown_table(titles, rows, 3)]
    parts = ["# Leaderboard", format_table(results, "markdown").rstrip("\n"), "\n".join(lines)]
    parts += [format_section(section, "markdown") for section in more]
    return "\n\n".join(parts) + "\n"


def _level_with(cells: Sequence[Standing]) -> str:
    """A phrase that lists the methods of a column that are level with the best, and the methods with too
    few images for a verdict."""
    few, level = [], []
    for s in cells:
        if s.best or is_baseline(s.method):
            continue
        if not s.judged:
            few.append(_marked(s))
        elif s.level_with_best:
            level.append(_marked(s))
    said = [", ".join(level)] if level else []
    if few:
        said.append(f"{TOO_FEW}: {', '.join(few)}")
    return "; ".join(said) or "none"


def _marked(s: Standing) -> str:
    """A method's name, with a dagger if the metric is close to the method's training objective."""
    return f"{s.method} {MARK}" if s.trained_on else s.method


def seconds_script(results: Results) -> str:
    """A script with the seconds per image of each method, which the page loads if it exists.

    The times differ from run to run, so they are not part of the other files.
    """
    seconds = {
        name: method.seconds / max(1, len(results.images))
        for name, method in results.methods.items()
    }
    return f"window.XATTN_SECONDS = {json.dumps(seconds)};\n"


def _standing_lines(
    results: Results, table: Sequence[Standing], sets: RankTable
) -> list[list[Any]]:
    last = ("forwards", "protocol_id", "trained_on")
    ranks = ("aggregate_rank", "aggregate_lo", "aggregate_hi", "aggregate_first")
    titles = ["method", "metric", "level", *Standing._fields[2:-1], *last, *ranks]
    lines: list[list[Any]] = [[*titles, "rank_lo", "rank_hi"]]
    ranking = aggregate_ranks(results)
    places = {r.method: r[1:5] for r in (ranking.ranks if ranking else ())}
    for s in table:
        facts = (results.methods[s.method].forwards, results.metric_id(s.column), s.trained_on)
        place = places.get(s.method, (None,) * len(ranks))
        ends = sets.get(s.column, {}).get(s.method, (None, None))
        lines.append([s.method, *s.column, *s[2:-1], *facts, *place, *ends])
    return lines


def _plain(results: Results, table: Sequence[Standing]) -> list[dict[str, Any]]:
    rows = []
    for s in table:
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in s._asdict().items()
        }
        rows.append({**row, "column": s.column.key, "verdict": s.verdict(results)})
    return rows


def _ranking(results: Results) -> dict[str, Any] | None:
    ranking = aggregate_ranks(results)
    if ranking is None:
        return None
    return {**ranking._asdict(), "ranks": [r._asdict() for r in ranking.ranks]}


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1) + "\n"
