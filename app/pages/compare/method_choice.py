"""Boxes to choose a metric, and the methods of a chart."""

from __future__ import annotations

from xattn.app.navigation import address
from xattn.app.pages.compare.leaderboard_file import Board, arrow
from xattn.eval.report.html_data import case_columns
from xattn.pictures.words import named_metric

LINES = 4  # methods in a chart before anybody chooses


def metric_box(board: Board, key: str, label: str = "Metric", first: str | None = None) -> str:
    """A select box of the columns, with their direction and what they mean."""
    keys = list(board.columns)
    first = first or case_columns(board.results)[0].key
    return address.selectbox(
        label, keys, key, default=first, format_func=lambda k: _titled(k, board), width=380
    )


def _titled(key: str, board: Board) -> str:
    """A column's key with its direction and its title."""
    return arrow(key, board) + named_metric(key).removeprefix(key)


def methods_box(board: Board, key: str, names: list[str], count: int = LINES) -> list[str]:
    """Which methods a chart shows; the best ones and a sanity row by default."""
    tested = [name for name in names if board.kind(name) == "method"]
    sane = [name for name in names if name == "random"][:1]
    first = [*tested[: count - len(sane)], *sane]
    return address.multiselect("Methods", names, key, default=first or names[:count])
