"""The files of a leaderboard: Markdown, CSV, JSON and the HTML page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xattn.eval.report.html_page import html_page
from xattn.eval.report.results_files import image_lines, to_dict
from xattn.eval.report.standings import Standing, standings
from xattn.eval.report.text_tables import format_table
from xattn.eval.results import MIN_IMAGES, TOO_FEW, Results, is_baseline
from xattn.runtime.files import atomic_file


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
