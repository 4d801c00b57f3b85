"""The report of the swap study: a table, all figures as CSV, two plots, accuracies as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xattn.eval.bootstrap import Interval, mean, mean_interval, paired_difference
from xattn.eval.studies.run_files import write_report
from xattn.eval.studies.swap.measuring import FIDELITY, Found, Table, ratio
from xattn.eval.studies.swap.rows import AS_TRAINED, Kind, Swap
from xattn.runtime.files import atomic_file, write_json

Tables = Mapping[int, Table]
"""The tables by size."""
QUALITY = ("right", "same", "patch cosine", "class cosine", "map agreement")
PERCENT = ("right", "same")  # shares; AD, IC and ADD are in percent already
FAITHFUL = (
    "ROAD"  # of the second plot: it compares two removals, so a network that sees nothing has 0
)
TICKS = (0.1, 0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
TITLES = (
    "correct, %",
    "minus as trained",
    "same class, %",
    "patch cosine",
    "class cosine",
    "map agreement",
)
STYLES: dict[Kind, tuple[str, str]] = {  # marker and colour
    "dense": ("*", "black"),
    "training-free": ("o", "C0"),
    "trained": ("^", "C2"),
    "untrained": ("v", "C3"),
    "control": ("s", "C7"),
}


def interval(found: Found, name: str) -> Interval:
    """Mean and 95 % interval of a measure; shares are in percent."""
    return mean_interval(found[name] * (100 if name in PERCENT else 1))


def difference(found: Found, dense: Found | None, name: str) -> Interval | None:
    """The paired difference from the network as it was trained, on the same photos."""
    if dense is None or name not in dense or len(dense[name]) != len(found[name]):
        return None
    scale = 100 if name in PERCENT else 1
    return paired_difference(scale * found[name], scale * dense[name])


def table_lines(tables: Tables, rows: Mapping[str, Swap], depth: int) -> Iterator[str]:
    """The Markdown table: finished results of each row and size, then why rows are missing."""
    fidelity = [column.key for column in FIDELITY.values()]
    titles = [
        "pixels", "attention", "blocks", *TITLES, *fidelity, f"{FAITHFUL} minus as trained", "time", "MB",
    ]  # fmt: skip
    yield f"| {' | '.join(titles)} |"
    yield f"| --: | :-- | :-- |{' --: |' * (len(titles) - 3)}"
    for size, table in tables.items():
        dense = table.values.get(AS_TRAINED.key(depth))
        for key, swap in rows.items():
            found, cost = table.values.get(key, {}), table.costs.get(key)
            if found or cost:
                label = f"{swap.label} (control)" if swap.kind == "control" else swap.label
                cells = [str(size), label, swap.blocks_text(depth)]
                cells += _cells(found, None if swap == AS_TRAINED else dense, cost)
                yield f"| {' | '.join(cells)} |"
    for size, table in tables.items():
        for key, reason in table.notes.items():
            yield f"\n{size} px, {rows[key].label}: not measured ({reason})"


def _cells(found: Found, dense: Found | None, cost: Mapping[str, Any] | None) -> list[str]:
    cells = [_number(found, "right", 1, True), _paired(found, dense, "right", 1)]
    cells += [_number(found, "same", 1), *(_number(found, name, 3) for name in QUALITY[2:])]
    cells += [_number(found, name, 1 if name in ("AD", "IC", "ADD") else 3) for name in FIDELITY]
    cells.append(_paired(found, dense, FAITHFUL, 3))
    if cost is None:
        return [*cells, "", ""]
    return [*cells, f"{ratio(cost):.2f}x", f"{cost['peak bytes'] / 1e6:.0f}"]


def _number(found: Found, name: str, digits: int, bounds: bool = False) -> str:
    if name not in found:
        return ""
    value = interval(found, name)
    if not value.n:
        return "-"  # no photo with a map that varies
    return value.text(digits) if bounds else f"{value.mean:.{digits}f}"


def _paired(found: Found, dense: Found | None, name: str, digits: int) -> str:
    value = difference(found, dense, name) if name in found else None
    if value is None or not value.n:
        return ""
    lo, hi = (f"{bound:+.{digits}f}" for bound in (value.lo, value.hi))
    return f"{value.mean:+.{digits}f} [{lo}, {hi}]"


def figures(tables: Tables, rows: Mapping[str, Swap], depth: int) -> list[dict[str, Any]]:
    """All means, with their intervals and paired differences."""
    keys = ("measure", "mean", "lo", "hi", "n", "difference", "difference lo", "difference hi")
    lines = []
    for size, table in tables.items():
        dense = table.values.get(AS_TRAINED.key(depth))
        for key, swap in rows.items():
            start = {"pixels": size, "attention": swap.label, "blocks": swap.blocks_text(depth)}
            start["kind"] = swap.kind
            found = table.values.get(key, {})
            for name in found:
                other = None if swap == AS_TRAINED else difference(found, dense, name)
                values = (name, *interval(found, name), *(other[:3] if other else ()))
                lines.append(start | dict(zip(keys, values, strict=False)))
            if cost := table.costs.get(key):
                seconds = float(np.median(cost["seconds"]))
                costs = {"time ratio": ratio(cost), "seconds a pass": seconds}
                costs["peak bytes"] = cost["peak bytes"]
                lines += [start | {"measure": name, "mean": x} for name, x in costs.items()]
    return lines


def photo_values(
    table: Table, rows: Mapping[str, Swap], photos: Sequence[str], depth: int
) -> list[dict[str, Any]]:
    """A CSV row for each measure and photo, with a column for each row of the table; four digits."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for key, found in table.values.items():
        column = f"{rows[key].label}, blocks {rows[key].blocks_text(depth)}"
        for name, values in found.items():
            for i, value in enumerate(values):
                line = lines.setdefault((name, i), {"measure": name, "photo": photos[i]})
                line[column] = round(float(value), 4)
    return list(lines.values())


def accuracies(
    tables: Tables, rows: Mapping[str, Swap], depth: int, backbone: str
) -> dict[str, Any]:
    """The accuracies of registered mechanisms that ``xattn list attention`` shows."""
    sizes = []
    for size, table in tables.items():
        dense = table.values.get(AS_TRAINED.key(depth), {}).get("right")
        if dense is None:
            continue
        kept = []
        for key, swap in rows.items():
            found = table.values.get(key, {})
            if swap.kind not in ("dense", "control") and "right" in found:
                value = interval(found, "right")
                row = {
                    "mechanism": swap.mechanism,
                    "options": dict(swap.options),
                    "blocks": swap.blocks_text(depth),
                    "positions": swap.positions,
                    "trained": bool(swap.trained),
                    "dense": all(
                        np.allclose(found[n], 1, atol=1e-5) for n in ("same", "patch cosine")
                    ),
                }
                kept.append(row | {k: round(getattr(value, n), 1) for k, n in _KEPT.items()})
        about = {"size": size, "photos": len(dense), "dense": round(100 * mean(dense), 1)}
        sizes.append({**about, "rows": kept})
    return {"backbone": backbone, "sizes": sizes}


_KEPT = {"right": "mean", "lo": "lo", "hi": "hi"}


def plot(tables: Tables, rows: Mapping[str, Swap], name: str, title: str, path: Path) -> bool:
    """Plot a measure's mean against the time of a pass relative to the trained network, a panel per
    size.

    If no row has both, it writes no file and returns False.
    """
    points = {size: list(_points(table, rows, name)) for size, table in tables.items()}
    points = {size: some for size, some in points.items() if some}
    if not points:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(points) + 1, squeeze=False, layout="constrained",
        figsize=(5.2 * len(points) + 3, 6.4), width_ratios=[1.0] * len(points) + [0.6],
    )  # fmt: skip
    shown: dict[str, Any] = {}
    numbers = {key: number for number, key in enumerate(rows)}
    for axis, (size, some) in zip(axes[0], points.items(), strict=False):
        for key, x, value in some:
            kind = rows[key].kind
            marker, colour = STYLES[kind]
            bars = [[value.mean - value.lo], [value.hi - value.mean]]
            axis.errorbar(x, value.mean, bars, color=colour, linewidth=0.6, alpha=0.4)
            shown[kind] = axis.scatter(
                x,
                value.mean,
                s=90 if kind == "dense" else 32,
                marker=marker,
                color=colour,
                zorder=3,
            )
            axis.annotate(
                str(numbers[key]), (x, value.mean), (4, 2), textcoords="offset points", fontsize=7
            )
        axis.set(xscale="log", title=f"{size} px", xlabel="time of a pass, as trained = 1")
        ticks = [t for t in TICKS if _within(t, axis.get_xlim())]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(title)
    listed = axes[0, -1]
    listed.axis("off")
    seen = {key for some in points.values() for key, _, _ in some}
    lines = [f"{numbers[key]}  {_short(rows[key])}" for key in rows if key in seen]
    listed.text(0, 0.86, "\n".join(lines), fontsize=7, va="top", transform=listed.transAxes)
    listed.legend(shown.values(), shown.keys(), fontsize=7, loc="upper left", ncols=2)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)
    return True


def _short(swap: Swap) -> str:
    """The label, followed by the share of swapped blocks unless all are swapped."""
    text = swap.label.replace("training_free=True", "training-free")
    which = "first" if swap.share > 0 else "last"
    return text if swap.share == 1 else f"{text}, {which} {abs(swap.share):.0%} of blocks"


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _points(
    table: Table, rows: Mapping[str, Swap], name: str
) -> Iterator[tuple[str, float, Interval]]:
    """The key of each row, with its time and value."""
    for key in rows:
        found = table.values.get(key, {})
        value = interval(found, name) if name in found else None
        if key in table.costs and value is not None and value.n:
            yield key, ratio(table.costs[key]), value


def write(
    tables: Tables, rows: Mapping[str, Swap], depth: int, heading: str, backbone: str, folder: Path
) -> list[Path]:
    """Write ``report.md``, ``figures.csv``, ``accuracy.png``, ``faithfulness.png`` and
    ``accuracy.json`` in ``folder``, without those for which there are no results."""
    text = [heading, "", *table_lines(tables, rows, depth)]
    made = write_report(folder, text, {"figures": figures(tables, rows, depth)})
    plots = {
        "accuracy.png": ("right", "correct, %"),
        "faithfulness.png": (FAITHFUL, f"{FAITHFUL} of the network's own map"),
    }
    for file, (name, title) in plots.items():
        if plot(tables, rows, name, title, folder / file):
            made.append(folder / file)
    kept = accuracies(tables, rows, depth, backbone)
    if kept["sizes"]:
        write_json(folder / "accuracy.json", kept)
        made.append(folder / "accuracy.json")
    return made
