"""One leaderboard of heads and explainers: every metric, sanity rows, intervals, and a report.

    xattn compare PHOTOS --heads ... --explainers ... --metrics ...

The folder holds ``leaderboard.md``, ``.csv`` and ``.json``, ``images.csv``, ``report.html``, the
state that a killed run goes on from (``state.sqlite``) and the time it took (``seconds.js``, which
the page shows). All but the last two are a pure function of the arguments.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xattn.eval import bootstrap
from xattn.eval.metrics.base import Column
from xattn.eval.protocol import METRICS
from xattn.eval.report import format_table, to_dict
from xattn.eval.results import Results, is_baseline
from xattn.files import atomic_file


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
    """Every method against the best of its column; sanity rows and masks cannot be best."""
    rows = {(r.method, Column(r.metric, r.level)): r for r in results.rows()}
    found = []
    for column in results.columns:
        sign = 1 if METRICS[column.metric].higher_is_better else -1
        rivals = [
            name
            for name, method in results.methods.items()
            if not is_baseline(name) and not method.is_mask and rows[name, column].n
        ]
        best = max(rivals, key=lambda name: sign * rows[name, column].mean, default=None)
        for name in results.methods:
            row = rows[name, column]
            diff = bootstrap.Interval(float("nan"), float("nan"), float("nan"), 0)
            if best is not None and name != best:
                (d,) = results.compare(name, best, [column])
                diff = bootstrap.Interval(d.diff, d.lo, d.hi, d.n)
            level = name == best or (diff.n > 0 and diff.lo <= 0 <= diff.hi)
            found.append(
                Standing(
                    name,
                    column,
                    row.mean,
                    row.lo,
                    row.hi,
                    row.n,
                    row.n_invalid,
                    name == best,
                    diff.mean,
                    diff.lo,
                    diff.hi,
                    level,
                )
            )
    return found


def write_report(
    results: Results, folder: Path, photos: Mapping[str, Path] | None = None
) -> list[Path]:
    """Write the leaderboard as Markdown, CSV, JSON and HTML; returns the files.

    Args:
        photos: by image id, for the page's pictures of best and worst cases; their maps come from
            ``state.sqlite`` in ``folder``.

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
        "leaderboard.json": _json({**to_dict(results), "standings": _plain(table)}),
        "images.csv": _csv(image_lines(results)),
        "report.html": html_page(
            results, table, state=state if state.exists() else None, photos=photos or {}
        ),
        "seconds.js": seconds_script(results),
    }
    paths = []
    for name, text in texts.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
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
        level = [s.method for s in cells if s.level_with_best and not s.best]
        level = [name for name in level if not is_baseline(name)]
        best[column.key] = [winner, ", ".join(level) or "none"]
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
        row = {k: None if isinstance(v, float) and v != v else v for k, v in s._asdict().items()}
        rows.append({**row, "column": s.column.key})
    return rows


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1) + "\n"
