"""Results for papers, notebooks and other programs: pandas, CSV, LaTeX and HTML.

Each takes a :class:`~xattn.eval.results.Results`, whose methods ``to_pandas``, ``to_csv`` and ``to_latex``
these are. The best method of a column is bold where there are images enough for a verdict.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.eval.metrics.base import Column
from xattn.eval.metrics.objectives import LEGEND
from xattn.runtime.files import write_text

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip
_SHOWN = 5  # warnings in a notebook
_CELL = "padding:2px 10px;text-align:right;white-space:nowrap"


def table_rows(results: Any) -> list[dict[str, Any]]:
    """One row a method: its name, each column's mean, interval and number of images, and its passes."""
    rows: dict[str, dict[str, Any]] = {name: {"method": name} for name in results.methods}
    for row in results.rows():
        key = Column(row.metric, row.level).key
        found = {key: row.mean, f"{key} lo": row.lo, f"{key} hi": row.hi, f"{key} n": row.n}
        rows[row.method].update(found)
    for name, method in results.methods.items():
        rows[name]["forwards"] = method.forwards
    return list(rows.values())


def image_rows(results: Any) -> list[dict[str, Any]]:
    """One row an image, method and column: image, method, target, target_name, metric and value."""
    return [
        {
            "image": image.id,
            "method": name,
            "target": image.target,
            "target_name": image.target_name,
            "metric": column.key,
            "value": float(values[i]),
        }
        for name, method in results.methods.items()
        for column, values in method.values.items()
        for i, image in enumerate(results.images)
    ]


def to_pandas(results: Any, per_image: bool = False) -> Any:
    """:func:`table_rows` as a ``DataFrame``, or :func:`image_rows` with ``per_image``.

    Raises:
        ValueError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise ValueError(
            'to_pandas: pandas is not installed; run: pip install "xattn[tables]"'
        ) from None
    return pd.DataFrame(image_rows(results) if per_image else table_rows(results))


def value_rows(results: Any) -> list[dict[str, Any]]:
    """One row an image and method: its number of the class, and the value of each column to six digits."""
    return [
        {"image": image.id, "target": image.target, "method": name}
        | {column.key: float(f"{values[i]:.6g}") for column, values in method.values.items()}
        for name, method in results.methods.items()
        for i, image in enumerate(results.images)
    ]


def to_csv(results: Any, path: str | Path | None = None, per_image: bool = False) -> str | None:
    """The same table as CSV, or :func:`value_rows` with ``per_image``, which keeps the raw values small:
    written to ``path``, or returned; NaN is an empty cell.

    Raises:
        OSError: the file cannot be written; an earlier file is intact.
    """
    rows = value_rows(results) if per_image else table_rows(results)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([_blank(value) for value in row.values()] for row in rows)
    if path is None:
        return stream.getvalue()
    write_text(path, stream.getvalue())
    return None


def to_latex(
    results: Any,
    columns: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    intervals: bool = True,
    caption: str | None = None,
    label: str | None = None,
) -> str:
    """A ``tabular`` for the package booktabs; with ``caption`` or ``label`` a ``table`` around it.

    Arrows say whether higher or lower is better, a dagger what is close to a head's training. The best
    method of a column is bold; of fewer than eight images none is, and a comment says why.

    Args:
        columns: keys such as ``"AD@50"``; all by default.
        methods: rows, in this order; all by default. They do not change which one is bold.
        intervals: with the 95 % bootstrap interval of each mean.

    Raises:
        ValueError: a column or method that the results do not have.
    """
    keys = {column.key: column for column in results.columns}
    chosen = [keys[key] for key in _known("columns", columns, keys)]
    names = _known("methods", methods, results.methods)
    cells = {(r.method, Column(r.metric, r.level)): r for r in results.rows()}
    heads = [f"{_latex(c.key)} ${_arrow(results, c, 'uparrow', 'downarrow')}$" for c in chosen]
    lines = [rf"\begin{{tabular}}{{l{'r' * len(chosen)}}}", r"\toprule"]
    lines += [" & ".join(["Method", *heads]) + r" \\", r"\midrule"]
    for name in names:
        row = [
            _latex_cell(
                cells[name, c], results.info(c.metric).digits, _is_best(results, name, c), intervals
            )
            for c in chosen
        ]
        lines.append(" & ".join([_latex(name), *row]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    notes = [f"{len(results.images)} images"]
    if intervals:
        notes.append("brackets: 95 % bootstrap interval")
    if any(cells[name, c].trained_on for name in names for c in chosen):
        notes.append(f"dagger: {LEGEND}")
    notes += [line for line in results.warnings() if "too few images" in line]
    text = "".join(f"% {' '.join(note.split())}\n" for note in notes) + "\n".join(lines) + "\n"
    if caption is None and label is None:
        return text
    about = [rf"\caption{{{_latex(caption)}}}"] if caption is not None else []
    about += [rf"\label{{{label}}}"] if label is not None else []
    return "\n".join([r"\begin{table}", r"\centering", *about, text + r"\end{table}"]) + "\n"


def notebook_html(results: Any) -> str:
    """The table as HTML: means with intervals, the best bold, and the first warnings."""
    cells = {(r.method, Column(r.metric, r.level)): r for r in results.rows()}
    heads = "".join(
        f'<th style="{_CELL}">{html.escape(c.key)} {_arrow(results, c, "↑", "↓")}</th>'
        for c in results.columns
    )
    body = ""
    for name in results.methods:
        body += f'<tr><th style="{_CELL};text-align:left">{html.escape(name)}</th>'
        for c in results.columns:
            row, digits = cells[name, c], results.info(c.metric).digits
            shown = f"{row.mean:.{digits}f}" if row.n else "-"
            if _is_best(results, name, c):
                shown = f"<b>{shown}</b>"
            interval = f"[{row.lo:.{digits}f}, {row.hi:.{digits}f}]" if row.n else ""
            body += f'<td style="{_CELL}">{shown} <small>{interval}</small></td>'
        body += "</tr>"
    lines = results.warnings()
    warned = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:_SHOWN])
    rest = (
        f"<li>and {len(lines) - _SHOWN} more: results.warnings()</li>"
        if len(lines) > _SHOWN
        else ""
    )
    return (
        f'<div class="xattn-results" style="overflow-x:auto"><table><thead><tr><th></th>{heads}</tr>'
        f"</thead><tbody>{body}</tbody></table><div>{len(results.images)} images; means with 95 % "
        f"bootstrap intervals; bold: the best</div>{f'<ul>{warned}{rest}</ul>' if lines else ''}</div>"
    )


# ---------------------------------------------------------------------- cells


def _known(argument: str, wanted: Sequence[str] | None, known: Any) -> list[str]:
    if wanted is None:
        return list(known)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"{argument}: got {', '.join(map(str, unknown)) or 'none'}; give some of {', '.join(known)}"
        )
    return names


def _is_best(results: Any, name: str, column: Column) -> bool:
    return bool(results.best(column) == name)


def _arrow(results: Any, column: Column, up: str, down: str) -> str:
    latex = "\\" if up.isascii() else ""
    return latex + (up if results.info(column.metric).higher_is_better else down)


def _latex_cell(row: Any, digits: int, best: bool, interval: bool) -> str:
    if not row.n:
        return "--"
    shown = f"{row.mean:.{digits}f}"
    shown = rf"\textbf{{{shown}}}" if best else shown
    shown += r"$^\dagger$" if row.trained_on else ""
    return shown + (
        rf" {{\scriptsize [{row.lo:.{digits}f}, {row.hi:.{digits}f}]}}" if interval else ""
    )


def _latex(text: str) -> str:
    """Text for LaTeX; what it takes for commands is escaped."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _blank(value: Any) -> Any:
    return "" if value is None or value != value else value
