"""Writes a board as a self-contained HTML page and as ``board.csv``, from the files in its folder."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.eval.board.folder import CRITERIA, Board, check_file_size, csv_of, format_number
from xattn.eval.board.ranks import GATES, RowRank, board_ranks, gates_of
from xattn.eval.evaluation.results import MIN_IMAGES
from xattn.eval.metric_words import metric_about, metric_title
from xattn.eval.metrics.registry import BOARD
from xattn.eval.report.rank_sets import MIN_RANKED
from xattn.pictures.design import FONT, VARIABLES
from xattn.runtime.files import write_text

SHOWN, SIDE = 6, 56  # number of photos whose maps are shown, and the side of these maps in pixels
_PAGE = "main{font:15px/1.5 var(--font);max-width:1200px;margin:2rem auto;padding:0 1rem}"
_STYLE = """
.board table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.board :is(th,td){padding:.25rem .6rem;text-align:right;border-bottom:1px solid #8884;white-space:nowrap}
.board :is(th:first-child,td.l,th.l){text-align:left}.board td.no{font-style:italic}
.board small{opacity:.75;font-weight:400;display:block;font-size:.75rem}.board tr.s td{opacity:.75}
.board :is(tr.c,tr.m) td:first-child{font-weight:600}.board .scroll{overflow-x:auto;margin:1rem 0}
.board td img{width:56px;height:56px;image-rendering:pixelated;display:block;max-width:none}
.board h2{margin-top:2.5rem}.board .note{max-width:60rem}
"""


def write_page(board: Board) -> None:
    """Write ``board.csv`` and ``index.html``."""
    for name, text in render_pages(board).items():
        write_text(board.path(name), text)


def render_pages(board: Board) -> dict[str, str]:
    """The text of ``board.csv`` and ``index.html``."""
    ranks = board_ranks(board)
    return {"board.csv": csv_of(_csv_lines(board, ranks)), "index.html": page(board, ranks)}


def _csv_lines(board: Board, ranks: Mapping[str, RowRank]) -> list[list[object]]:
    ends = [
        f"{key}{end}" for key in board.columns for end in ("", "_lo", "_hi", "_rank_lo", "_rank_hi")
    ]
    titles = [
        "row",
        "kind",
        "class_blind",
        "verified",
        "rank",
        "rank_lo",
        "rank_hi",
        "z",
        "one_family",
    ]
    lines: list[list[object]] = [[*titles, *ends]]
    for row, r in ranks.items():
        cells: list[object] = [row, _kind(board, row), int(r.class_blind), _word(r.verified)]
        cells += ["" if r.rank is None else r.rank, *(r.places or ("", ""))]
        cells += [format_number(r.z), r.one_family]
        for key in board.columns:
            mean = r.means[key]
            cells += [format_number(mean.mean), format_number(mean.lo), format_number(mean.hi)]
            cells += [*r.columns.get(key, ("", ""))]
        lines.append(cells)
    return lines


def _kind(board: Board, row: str) -> str:
    facts = board.row(row)
    return "sanity" if facts["sanity"] else str(facts["kind"])


def _word(verified: bool | None) -> str:
    return "" if verified is None else "yes" if verified else "no"


def _places(rank: RowRank) -> str:
    if rank.lacks:
        return f"not on {rank.lacks}"
    return "-" if rank.places is None else f"{rank.places[0]}-{rank.places[1]}"


def table_lines(board: Board, ranks: Mapping[str, RowRank]) -> list[list[str]]:
    """The board as a table of text: a line of titles, and the rows by rank."""
    keys = _measured(board, ranks)
    lines = [["row", "kind", "verified", "rank", "places", *keys]]
    for row in ranked_rows(ranks):
        r = ranks[row]
        verified = _word(r.verified) or "too few photos"
        line = [row, _kind(board, row), "class-blind" if r.class_blind else verified]
        line += ["-" if r.rank is None else str(r.rank)]
        line += [_places(r)]
        line += [f"{r.means[k].mean:.3f}" if r.means[k].n else "-" for k in keys]
        lines.append(line)
    return lines


def ranked_rows(ranks: Mapping[str, RowRank]) -> list[str]:
    """The row names ordered by rank; rows without a rank are last."""
    places = {row: (r.rank is None, r.rank or 0) for row, r in ranks.items()}
    return sorted(ranks, key=places.__getitem__)


def shown_columns(board: Board) -> list[str]:
    """The column keys; those that may be used for ranks come first."""
    first = [key for keys in CRITERIA.values() for key in keys if key in board.columns]
    return [*first, *(key for key in board.columns if key not in first)]


def _measured(board: Board, ranks: Mapping[str, RowRank]) -> list[str]:
    """The keys of :func:`shown_columns` in which any row has a value."""
    return [k for k in shown_columns(board) if any(r.means[k].n for r in ranks.values())]


def page(board: Board, ranks: Mapping[str, RowRank]) -> str:
    """The HTML of the page; it depends only on the files in the folder."""
    name = html.escape(str(board.facts["name"]))
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        '<meta name=color-scheme content="light dark"><link rel=icon href="data:,">',
        f"<title>{name}</title><style>:root{{{VARIABLES};--font:{FONT}}}{_PAGE}</style></head><body>",
        board_html(board, ranks),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def board_html(board: Board, ranks: Mapping[str, RowRank]) -> str:
    """What the page shows, with its style, as HTML that can be part of another page."""
    parts = [
        f"<style>{_STYLE}</style><main class=board>",
        f"<h1>{html.escape(str(board.facts['name']))}</h1>",
        *_facts(board),
        "<h2 id=rows>Rows</h2>",
        _notes(board),
        _board_table(board, ranks),
        "<h2>Columns and their report card</h2>",
        _card_table(board),
        *_audits(board),
        "<h2>Maps</h2>",
        f"<p class=note>Of the explained class, on the first {SHOWN} photos; bright is high, each map "
        f"by its own least and largest value.</p>",
        _map_table(board, ranked_rows(ranks)),
        "<h2>Check it, add to it</h2>",
        "<p class=note><code>xattn board check DIR</code> refuses a changed map, value or hash. "
        "<code>xattn board join DIR PHOTOS --import mine.py --explainers mine</code> adds a row, "
        "<code>xattn board audit DIR PHOTOS --seed 7</code> scores the maps on other masks.</p></main>",
    ]
    return "\n".join(parts)


def _facts(board: Board) -> list[str]:
    facts = board.facts
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    lines = [
        f"{len(board.photos)} photos, {len(board.row_names)} rows, seed {facts['seed']}; made "
        f"{facts['made']} by {versions}",
        *(
            f"{n['name']}: {n['sha256'][:12]}, {n['size'][0]} x {n['size'][1]} pixels, {n['protocol']}"
            for n in board.networks
        ),
    ]
    return [f"<p class=note>{html.escape(line)}</p>" for line in lines]


def _notes(board: Board) -> str:
    notes = [
        "Means over photos and networks with 95 % bootstrap intervals. A row is verified if the lower ends "
        "of photo-gain, class-contrast and network-contrast are above 0 and that of gridpg above chance, "
        "together at 95 %: its maps read photo, class and network. Verified rows rank by the columns "
        "that passed the report card: the median over criteria of how many interquartile ranges the mean "
        "lies above the middle. Places hold for all rows together with 95 %.",
        "Italics: the column did not pass its report card and does not count for ranks. † the "
        "column is close to the row's training objective and does not count for its rank.",
    ]
    count = len(board.photos)
    gates = gates_of(board)
    if missing := [key for key in GATES if key not in gates]:
        notes.append(
            f"No row has a value of {', '.join(missing)}, which is therefore not needed to verify "
            f"a row (gridpg needs four classes)."
        )
    if left_out := [group for group in BOARD if group not in board.groups]:
        notes.append(f"Not measured: {', '.join(left_out)}.")
    if count < MIN_IMAGES:
        notes.append(f"{count} photos are too few for any verdict; it takes at least {MIN_IMAGES}.")
    elif count < MIN_RANKED:
        notes.append(f"{count} photos are too few for ranks; it takes at least {MIN_RANKED}.")
    return "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)


def _board_table(board: Board, ranks: Mapping[str, RowRank]) -> str:
    keys = _measured(board, ranks)
    arrows = {k: "↑" if board.columns[k]["higher"] else "↓" for k in keys}
    heads = [
        f"<th title='{html.escape(metric_about(k))}'>{html.escape(k)} {arrows[k]}</th>"
        for k in keys
    ]
    body = ""
    for row in ranked_rows(ranks):
        r, facts = ranks[row], board.row(row)
        trained = set(facts["trained_on"])
        cells = ""
        for key in keys:
            mean, places = r.means[key], r.columns.get(key)
            said = "-" if not mean.n else f"{mean.mean:.3f}{' †' if key in trained else ''}"
            small = f"{mean.lo:.3f} to {mean.hi:.3f}" if mean.n else ""
            small += f"; places {places[0]}-{places[1]}" if places else ""
            dull = "" if key in board.admitted else " class=no"
            cells += f"<td{dull}>{said}<small>{small}</small></td>"
        verified = "class-blind" if r.class_blind else _word(r.verified) or "too few photos"
        place = f"<small>{html.escape(_places(r))}</small>" if r.places or r.lacks else ""
        place = f"{'-' if r.rank is None else r.rank}{place}"
        kind = _kind(board, row)
        family = f"<small>one family only: {r.one_family}</small>" if r.one_family else ""
        name = html.escape(str(facts.get("title", row)))
        body += (
            f"<tr class={kind[0]}><td class=l>{html.escape(row)}<small>{name}</small>{family}</td>"
            f"<td class=l>{kind}</td><td class=l>{verified}</td><td>{place}</td>{cells}</tr>"
        )
    head = "<th class=l>row</th><th class=l>kind</th><th class=l>verified</th><th>rank</th>"
    return (
        f"<div class=scroll><table><thead><tr>{head}{''.join(heads)}</tr></thead><tbody>{body}</tbody>"
        f"</table></div>"
    )


def _card_table(board: Board) -> str:
    card: dict[tuple[str, str], list[str]] = {}
    tests = ("ladder cells", "ladder photo")
    for line in board.card():
        test = line["test"]
        said = {"1": "passed", "0": "failed"}.get(line["passed"], "not judged")
        if test in tests or test == "halves":
            card.setdefault((line["metric"], test), []).append(f"{line['network']}: {said}")
        elif test.startswith("null ") and line["passed"] == "0":
            card.setdefault((line["metric"], "nulls"), []).append(test.removeprefix("null "))
    body = ""
    for key in shown_columns(board):
        cells = [metric_title(key), *("; ".join(card.get((key, t), ["-"])) for t in tests)]
        cells += [", ".join(dict.fromkeys(card.get((key, "nulls"), ["none"])))]
        cells += ["yes" if key in board.admitted else "no"]
        row = "".join(f"<td class=l>{html.escape(cell)}</td>" for cell in cells)
        body += f"<tr><td class=l>{html.escape(key)}</td>{row}</tr>"
    heads = (
        "column",
        "is",
        *tests,
        "not distinguishable from the method, or above chance",
        "ranks",
    )
    head = "".join(f"<th class=l>{h}</th>" for h in heads)
    count = min(board.facts["card_photos"], len(board.photos))
    note = (
        f"Made on {count} photos: a column ranks if it orders maps that are degraded on purpose, by cells "
        f"and by another photo's map, on every network."
    )
    if not card:
        return (
            "<p class=note>There is none, so that no column ranks: make one with --card-photos.</p>"
        )
    return f"<p class=note>{note}</p><div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _audits(board: Board) -> list[str]:
    found = []
    for seed in board.facts["audits"]:
        path = board.path(f"audit-{seed}.csv")
        if not path.is_file():
            raise ValueError(f"board: audit-{seed}.csv is missing")
        lines = check_file_size(path).read_text(encoding="utf-8").splitlines()
        rows = "".join(
            "<tr>"
            + "".join(f"<td class=l>{html.escape(c)}</td>" for c in line.split(","))
            + "</tr>"
            for line in lines
        )
        found.append(
            f"<h2>Audit with seed {seed}</h2><div class=scroll><table>{rows}</table></div>"
        )
    return found


def _map_table(board: Board, rows: Sequence[str]) -> str:
    if not board.networks:
        return ""
    network, body = board.networks[0]["name"], ""
    for row in rows:
        if not board.has(row, network):
            continue
        with board.open_maps(row, network) as maps:
            cells = "".join(
                f"<td>{_picture(maps.of(i), f'Map by {row} of photo {i + 1}')}</td>"
                for i in range(min(SHOWN, len(board.photos)))
            )
        body += f"<tr><td class=l>{html.escape(row)}</td>{cells}</tr>"
    return f"<div class=scroll><table>{body}</table></div>"


def _picture(values: Tensor | None, text: str) -> str:
    if values is None or not bool(values.isfinite().all()):
        return "-"
    small = torch.nn.functional.interpolate(
        values[None], (SIDE, SIDE), mode="nearest" if max(values.shape[-2:]) < SIDE else "area"
    )[0, 0]
    low, high = float(small.min()), float(small.max())
    levels = ((small - low) / (high - low if high > low else 1) * 255).round().to(torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.asarray(levels)).save(stream, "PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
