"""Collects the numbers and pictures of the report page as plain values for JSON; NaN becomes None.

Methods, columns and images have the same order as in the results, so that equal results give identical
pages. To limit the size of the page, only a few methods have pictures, and if there are many images, the
scatter plot shows only some of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.backbone import Preprocessing
from xattn.eval.evaluation.results import MIN_IMAGES, TOO_FEW, Results, is_baseline
from xattn.eval.evaluation.store import grey_maps
from xattn.eval.report.standings import case_columns, curves, number, ranking
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.pictures.overlay import data_url
from xattn.runtime.stores import StoreError, StorePath

CASE_METHODS = 8
CASES = 2  # number of best images and number of worst images for each method
THUMBNAIL = 128  # pixels per side
MAX_VALUES = 200_000  # values in the scatter plot, for all methods and columns together


def page_data(
    results: Results,
    state: Path | None,
    photos: Mapping[str, Path | StorePath],
    preprocessing: Preprocessing | None,
) -> dict[str, Any]:
    """The data that the page's script draws; for the arguments, see
    :func:`xattn.eval.report.html_page.html_page`.

    Methods, columns and images are identified by their index in the results. Pictures are ``data:`` URLs;
    the keys of ``photos`` are images, and the keys of ``maps`` have the form "method:image".
    """
    names, columns = list(results.methods), results.columns
    ranked = ranking(results)
    cases = _cases(results, ranked[:CASE_METHODS])
    shown = {(m, i) for case in cases for m, *ends in case["methods"] for e in ends for i, _ in e}
    points = spaced_images(len(results.images), len(names) * len(columns))
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
            str(i): {"id": image.id, "class": image.target_name, "p": number(image.p)}
            for i, image in ((i, results.images[i]) for i in listed)
        },
        "n": len(results.images),
        "least": MIN_IMAGES,
        "too_few": TOO_FEW,
        "score": results.protocol.score,
        "points": points,
        "values": [
            [[number(method.values[c][i]) for i in points] for c in columns]
            for method in results.methods.values()
        ],
        "curves": curves(results),
        "cases": cases,
        "maps": map_images(results, state, sorted(shown)),
        "photos": _photos(results, photos, preprocessing, sorted({i for _, i in shown})),
    }


def spaced_images(n: int, values_per_image: int) -> list[int]:
    """The indices of evenly spaced images: as many as the page can show with at most ``MAX_VALUES``
    values."""
    count = min(n, max(1, MAX_VALUES // max(1, values_per_image)))
    return sorted({round(i) for i in np.linspace(0, n - 1, count).tolist()})


# ---------------------------------------------------------------- best and worst cases


def _cases(results: Results, names: Iterable[str]) -> list[dict[str, Any]]:
    """For each column and method, its best images (best first) and its worst images (worst first).

    Images are given as pairs [image, value].
    """
    positions = {name: m for m, name in enumerate(results.methods)}
    names = list(names)
    cases = []
    for column in case_columns(results):
        sign = -1 if results.info(column.metric).higher_is_better else 1
        rows = []
        for name in names:
            values = results.methods[name].values[column]
            good = [i for i in range(len(values)) if math.isfinite(values[i])]
            order = sorted(good, key=lambda i: sign * values[i])  # stable, so ties keep their order
            ends = order[:CASES], order[CASES:][-CASES:][::-1]
            if order:
                rows.append(
                    [positions[name], *([[i, number(values[i])] for i in end] for end in ends)]
                )
        cases.append({"column": results.columns.index(column), "methods": rows})
    return cases


def map_images(
    results: Results, state: Path | None, wanted: Iterable[tuple[int, int]]
) -> dict[str, str]:
    """Coloured maps as ``data:`` URLs, by "method:image", for the wanted pairs that the state contains."""
    if state is None:
        return {}
    number = {name: m for m, name in enumerate(results.methods)}
    names = list(number)
    identities = [image.id for image in results.images]
    found = {}
    for name, i, png in grey_maps(state, identities, ((names[m], i) for m, i in wanted)):
        image = Image.open(io.BytesIO(png))
        image.putpalette(_palette())
        found[f"{number[name]}:{i}"] = data_url(image, "PNG", optimize=True)
    return found


@cache
def _palette() -> bytes:
    """Matplotlib's perceptually uniform colour map "inferno" as 256 colours of three bytes."""
    from matplotlib import colormaps

    return bytes((colormaps["inferno"](np.arange(256), bytes=True)[:, :3]).tobytes())


def _photos(
    results: Results,
    photos: Mapping[str, Path | StorePath],
    preprocessing: Preprocessing | None,
    wanted: Iterable[int],
) -> dict[str, str]:
    """Thumbnails of what the model saw, by image; tensors and missing photos have none."""
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
