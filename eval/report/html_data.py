"""The numbers and pictures behind the report page, as plain values for JSON; NaN becomes None.

Everything follows the order of methods, columns and images in the results, so that equal results
give an equal page. Sizes are bounded: few methods have pictures, and of many images only some are
in the scatter plot.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.backbone import Preprocessing
from xattn.eval import bootstrap
from xattn.eval.evaluation.database import damaged
from xattn.eval.evaluation.kept_maps import grey_maps
from xattn.eval.metrics.base import Column
from xattn.eval.results import MIN_IMAGES, TOO_FEW, Results, is_baseline
from xattn.photos.images import MAX_PIXELS, decode_image, load_image
from xattn.photos.view import prepare
from xattn.pictures.overlay import data_url
from xattn.runtime.stores import StoreError, StorePath

CASE_METRICS = ("AD", "deletion", "insertion", "ROAD")
CASE_METHODS = 8
CASES = 2  # images at each end
THUMBNAIL = 128  # pixels a side
MAX_VALUES = 200_000  # of the scatter plot, all methods and columns together
CURVES = {
    "deletion": ("Deletion", "share of pixels removed, most relevant first"),
    "insertion": ("Insertion", "share of pixels inserted, most relevant first"),
    "morf": ("ROAD-MoRF", "share of pixels imputed, most relevant first"),
    "lerf": ("ROAD-LeRF", "share of pixels imputed, least relevant first"),
}


def page_data(
    results: Results,
    state: Path | None,
    photos: Mapping[str, Path | StorePath],
    preprocessing: Preprocessing | None,
) -> dict[str, Any]:
    """What the page's script draws from; arguments as in :func:`xattn.eval.report.html_page.html_page`.

    Methods, columns and images go by their index in the results. Pictures are ``data:`` addresses:
    ``photos`` by image, ``maps`` by "method:image".
    """
    names, columns = list(results.methods), results.columns
    ranked = ranking(results)
    cases = _cases(results, ranked[:CASE_METHODS])
    shown = {(m, i) for case in cases for m, *ends in case["methods"] for e in ends for i, _ in e}
    points = spread(len(results.images), len(names) * len(columns))
    listed = sorted({*points, *(i for _, i in shown)})
    return {
        "methods": [
            {
                "name": name,
                "sanity": is_baseline(name),
                "trained": [
                    c for c, column in enumerate(columns) if results.trained_on(name, column)
                ],
            }
            for name, method in results.methods.items()
        ],
        "ranked": [names.index(name) for name in ranked],
        "columns": [{"key": c.key, "up": results.info(c.metric).higher_is_better} for c in columns],
        "images": {
            str(i): {"id": image.id, "class": image.target_name, "p": _number(image.p)}
            for i, image in ((i, results.images[i]) for i in listed)
        },
        "n": len(results.images),
        "least": MIN_IMAGES,
        "too_few": TOO_FEW,
        "score": results.protocol.score,
        "points": points,
        "values": [
            [[_number(method.values[c][i]) for i in points] for c in columns]
            for method in results.methods.values()
        ],
        "curves": curves(results),
        "cases": cases,
        "maps": map_images(results, state, sorted(shown)),
        "photos": _photos(results, photos, preprocessing, sorted({i for _, i in shown})),
    }


def _number(value: float) -> float | None:
    """Five significant digits, as a page needs no more."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def spread(n: int, values_an_image: int) -> list[int]:
    """Evenly spaced images, as many as the page has room for."""
    count = min(n, max(1, MAX_VALUES // max(1, values_an_image)))
    return sorted({round(i) for i in np.linspace(0, n - 1, count).tolist()})


def case_columns(results: Results) -> list[Column]:
    """The columns that cases are chosen by: AD at the level nearest 50 %, deletion, ...; or any."""
    found = []
    for metric in CASE_METRICS:
        columns = [c for c in results.columns if c.metric == metric]
        found += sorted(columns, key=lambda c: abs((c.level or 0.5) - 0.5))[:1]
    return found or results.columns[:1]


def ranking(results: Results) -> list[str]:
    """Methods under test by their mean rank over :func:`case_columns`, best first."""
    names = [n for n, m in results.methods.items() if not is_baseline(n) and not m.is_mask]
    places = dict.fromkeys(names, 0)
    for column in case_columns(results):
        worse = {n: -s if (s := _goodness(results, n, column)) == s else math.inf for n in names}
        for place, name in enumerate(sorted(names, key=worse.__getitem__)):
            places[name] += place
    return sorted(names, key=places.__getitem__)


def _goodness(results: Results, name: str, column: Column) -> float:
    sign = 1 if results.info(column.metric).higher_is_better else -1
    return sign * bootstrap.mean(results.methods[name].values[column])


# ---------------------------------------------------------------- curves


def curves(results: Results) -> list[dict[str, Any]]:
    """A chart for each kind of curve, a line for each method: mean, lo, hi at each x, number of images."""
    positions = {name: str(m) for m, name in enumerate(results.methods)}
    charts = []
    for key, (title, axis) in CURVES.items():
        chart: dict[str, Any] = {"key": key, "title": title, "axis": axis, "x": [], "lines": {}}
        for name, curve, x in each_curve(results, key):
            chart["x"] = x  # that of all methods
            intervals = bootstrap.mean_intervals(
                curve, n_resamples=results.n_resamples, seed=results.protocol.seed
            )
            *band, counts = zip(*intervals, strict=True)
            line = [*([_number(v) for v in part] for part in band), max(counts)]
            chart["lines"][positions[name]] = line
        if chart["lines"]:
            charts.append(chart)
    return charts


def each_curve(
    results: Results, key: str
) -> Iterator[tuple[str, NDArray[np.float64], list[float]]]:
    """Yield, for each method with such a curve, its name, scores (n, T) with the clean ones, and x."""
    clean = np.array([image.p for image in results.images], dtype=np.float64)
    for name, method in results.methods.items():
        scores = method.scores.get(key)
        if scores is None or scores.ndim != 2 or not np.isfinite(scores).any():
            continue
        curve = _with_clean(key, scores, clean)
        x = _shares(results, key, curve.shape[1])
        if x:
            yield name, curve, x


def _with_clean(
    key: str, scores: NDArray[np.float64], clean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n, T) -> (n, T + 1): deletion starts with the clean score, insertion ends with it."""
    end = np.where(np.isnan(scores[:, :1]), np.nan, clean[:, None])
    ends = {"deletion": [end, scores], "insertion": [scores, end]}
    return np.concatenate(ends.get(key, [scores]), axis=1)


def _shares(results: Results, key: str, count: int) -> list[float]:
    """The x of a curve's values; for ROAD its levels, without which there is no chart."""
    if key in ("deletion", "insertion"):
        return [float(f"{t / (count - 1):.5g}") for t in range(count)]
    column = "ROAD-MoRF" if key == "morf" else "ROAD-LeRF"
    levels = [float(level) for level in results.options.get(column, {}).get("levels", ())]
    return levels if len(levels) == count else []


# ---------------------------------------------------------------- best and worst cases


def _cases(results: Results, names: Iterable[str]) -> list[dict[str, Any]]:
    """By column: each method's best images and its worst, worst first, as (image, value)."""
    positions = {name: m for m, name in enumerate(results.methods)}
    names = list(names)
    cases = []
    for column in case_columns(results):
        sign = -1 if results.info(column.metric).higher_is_better else 1
        rows = []
        for name in names:
            values = results.methods[name].values[column]
            good = [i for i in range(len(values)) if math.isfinite(values[i])]
            order = sorted(good, key=lambda i: sign * values[i])  # stable: ties by image
            ends = order[:CASES], order[CASES:][-CASES:][::-1]
            if order:
                rows.append(
                    [positions[name], *([[i, _number(values[i])] for i in end] for end in ends)]
                )
        cases.append({"column": results.columns.index(column), "methods": rows})
    return cases


def map_images(
    results: Results, state: Path | None, wanted: Iterable[tuple[int, int]]
) -> dict[str, str]:
    """Coloured maps by "method:image", of those (method, image) that the state has."""
    if state is None:
        return {}
    number = {name: m for m, name in enumerate(results.methods)}
    names = list(number)
    identities = [image.id for image in results.images]
    found = {}
    for name, i, png in grey_maps(state, identities, ((names[m], i) for m, i in wanted)):
        try:
            image = decode_image(io.BytesIO(png), "a map", MAX_PIXELS).convert("L")
        except ValueError as error:
            raise damaged(state, str(error)) from None
        image.putpalette(_palette())
        found[f"{number[name]}:{i}"] = data_url(image, "PNG", optimize=True)
    return found


@cache
def _palette() -> bytes:
    """Matplotlib's inferno, which is perceptually uniform: 256 colours of three bytes."""
    from matplotlib import colormaps

    return bytes((colormaps["inferno"](np.arange(256), bytes=True)[:, :3]).tobytes())


def _photos(
    results: Results,
    photos: Mapping[str, Path | StorePath],
    preprocessing: Preprocessing | None,
    wanted: Iterable[int],
) -> dict[str, str]:
    """Thumbnails by image of what the model saw; none for tensors, or a photo that is gone."""
    found: dict[str, str] = {}
    if preprocessing is None or results.protocol.view == "tensor":
        return found
    for i in wanted:
        path = photos.get(results.images[i].id)
        if path is None:
            continue
        try:
            photo = load_image(path, max_pixels=None)
        except StoreError:
            raise
        except (OSError, ValueError):
            continue
        pixels = prepare(photo, preprocessing, results.protocol.view)[0]
        seen = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(np.ascontiguousarray(seen))
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        found[str(i)] = data_url(image, quality=80)
    return found
