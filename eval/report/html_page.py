"""A leaderboard as one HTML page: table, curves, scatter of images, best and worst cases, cost.

The page fetches nothing but ``seconds.js`` beside it, which may be missing. It is a pure function
of its arguments: what differs from run to run (time) stands in that script alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from xattn.backbone import Preprocessing
from xattn.eval.report.html_data import page_data
from xattn.eval.report.html_tables import (
    Failures,
    formulas,
    label,
    leaderboard,
    legend,
    sanity_table,
    similarity,
    text,
    toggles,
    verdicts,
)
from xattn.eval.report.standings import Standing
from xattn.eval.report.text_tables import protocol_notes
from xattn.eval.results import Results, is_baseline
from xattn.pictures.design import FONT, VARIABLES
from xattn.runtime.stores import StorePath

_LISTED = 20  # images of one method, or skipped photos, before "and n more"


def html_page(
    results: Results,
    table: Sequence[Standing],
    *,
    state: Path | None,
    photos: Mapping[str, Path | StorePath],
    preprocessing: Preprocessing | None = None,
) -> str:
    """The page as text; equal arguments give equal bytes.

    Args:
        table: what :func:`xattn.eval.report.standings.standings` makes of ``results``.
        state: the evaluation's SQLite file, whose maps are shown; None: no maps.
        photos: by image id; shown as the model saw them, which needs ``preprocessing``. A photo that
            is missing or cannot be read leaves its map alone.

    Raises:
        ValueError: ``state`` is damaged, or not the file of an evaluation.
    """
    page = resources.files("xattn.eval.report") / "page"
    # ensure_ascii and the escapes below: no name can close the script element.
    data = json.dumps(
        page_data(results, state, photos, preprocessing), allow_nan=False, separators=(",", ":")
    )
    for sign in "<>&":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    failures = results.sanity_failures()
    key, point = legend(table)
    parts = {
        "style": f":root{{{VARIABLES};--font:{FONT}}}\n"
        + (page / "report.css").read_text(encoding="utf-8"),
        "script": (page / "report.js").read_text(encoding="utf-8"),
        "facts": _facts(results),
        "warnings": _warnings(results, failures),
        "sanity": sanity_table(results, failures),
        "toggles": toggles(results),
        "verdicts": verdicts(results, table),
        "legend": key,
        "trained": point,
        "board": leaderboard(results, table),
        "columns": formulas(results),
        "invalid": _invalid(results),
        "data": data,
    }
    template = (page / "report.html").read_text(encoding="utf-8")
    # One pass, so that braces in a name are never taken for a slot.
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
    """What fails, in few words; every warning behind a click."""
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


# ---------------------------------------------------------------- what is missing


def _invalid(results: Results) -> str:
    """Invalid maps and failed metrics by method, skipped photos, annotations; with reasons."""
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
