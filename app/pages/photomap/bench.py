"""What the page Map takes for a pack of made-up photos: ``xattn bench photomap``.

Points and groups are computed once for a pack, here in this process; the import of UMAP counts. A lasso is
timed in Chromium, by its own clock, from the release of the button to the points drawn anew.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xattn.app import bench as app_bench
from xattn.app.library import Library
from xattn.app.synthetic_packs import CLASSES, big_pack
from xattn.eval.report.photo_map.clusters import clusters
from xattn.eval.report.photo_map.pooled_maps import read, unit
from xattn.eval.report.photo_map.projection import METHODS, offered, project
from xattn.packs.reader import Pack
from xattn.runtime.measuring import keep_rounds

PHOTOS, FEATURES = 10_000, 1280
PROJECTION, LASSO = 60.0, 0.3  # seconds that are allowed


def bench(rounds: int = 15, photos: int = PHOTOS, features: int = FEATURES) -> Iterator[str]:
    """Lines of a Markdown table."""
    with tempfile.TemporaryDirectory(prefix="xattn-bench-") as name:
        folder = Path(name)
        pack = Pack(big_pack(folder / "root" / "map", photos, features=features))
        yield f"| {photos:,} photos, {features:,} features | took | wanted |"
        yield "| :-- | --: | --: |"
        begun = time.perf_counter()
        maps = read(pack, list(pack.entry_ids))
        yield _line("maps read and pooled, once", time.perf_counter() - begun, PROJECTION)
        values = unit(pack.features())  # type: ignore[arg-type]
        for method in offered(photos):
            begun = time.perf_counter()
            project(values, method)
            yield _line(f"{METHODS[method]}, once", time.perf_counter() - begun, PROJECTION)
        begun = time.perf_counter()
        classes = [CLASSES[i % len(CLASSES)] for i in range(photos)]
        clusters(maps, classes, [None] * photos)
        yield _line("groups, once", time.perf_counter() - begun, PROJECTION)
        took = lassos(folder, rounds)
        keep_rounds("lasso", "", took)
        yield _line("lasso, median", statistics.median(took), LASSO)
        yield _line("lasso, slowest", max(took), LASSO)


def lassos(folder: Path, rounds: int) -> list[float]:
    """Seconds that the map of the pack in ``folder/root`` takes to answer a lasso around half of it."""
    (info,) = Library(folder / "root").packs()
    with (
        app_bench.browser() as running,
        app_bench.served(folder / "root", folder / "log") as (at, _),
    ):
        page = running.new_context(viewport=app_bench.SIZE).new_page()
        page.goto(f"{at}/photomap?pack={info.id}&projection=pca")
        plane = page.locator(".drawing")
        plane.wait_for(timeout=120_000)
        return [_lasso(page, plane, turn) for turn in range(rounds)]


def _lasso(page: Any, plane: Any, turn: int) -> float:
    """Draw a ring of sixty corners, another one each time."""
    box = plane.bounding_box()
    angles = np.linspace(0, 2 * np.pi, 60)
    radius = 0.3 + 0.1 * (turn % 2)
    corners = zip(0.5 + radius * np.cos(angles), 0.5 + radius * np.sin(angles), strict=True)
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()
    took = float(page.locator(".scatter").get_attribute("data-answered"))
    page.locator(".st-key-photomap-photos .frame.there").first.wait_for()
    return took / 1000


def _line(label: str, seconds: float, allowed: float) -> str:
    if not label.startswith("lasso"):
        keep_rounds(label, "", [seconds])
    if allowed < 1:
        return f"| {label} | {1000 * seconds:.0f} ms | {1000 * allowed:.0f} ms |"
    return f"| {label} | {seconds:.1f} s | {allowed:.0f} s |"
