"""What a person waits for in the viewer, measured in Chromium: ``python tests/viewer_speed.py``.

A server of its own shows packs of made-up photos. "Pixels" are there when every picture in sight is
decoded; the browser's own clock runs from the click to the first frame in which they are. Memory is the
resident set of the server's process. ``--maps 1000000`` measures one pack with so many maps instead, and
``--photos 10000`` the page Map. There points and groups are computed once for a pack, here in this process;
the import of UMAP counts. A lasso is timed from the release of the button to the points drawn anew.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from served_viewer import READY, browser, pointed_at, served, until_pixels
from synthetic_packs import CLASSES, big_pack, million_pack, picture

from xattn.runtime.measuring import keep_rounds, record_rounds
from xattn.runtime.process import keep_memory, sleep_while_waiting

SIZE = {"width": 1280, "height": 900}
MANY, WARM = 10_000, 1_000  # images of the two packs
PAINT, TURN, CLICK, LIVE, STROKE = 2.0, 0.5, 0.3, 0.15, 0.3  # seconds that are allowed
SCALE_PAINT, SORTED, PHOTO = 3.0, 1.5, 0.4  # seconds, in a pack of a million maps
SCALE_MEMORY = 1000  # MB that the server may have then
GROWTH = 50  # MB that the server may grow by over the views after the first tenth
VIEWS = 500
FEATURES = 1280
PROJECTION, LASSO = 60.0, 0.3  # seconds, on the page Map
LIVE_BACKBONE, LIVE_HEAD = "tf_efficientnet_lite0", "ttame-efficientnet-lite0"
_WATCH = """([kind, key]) => {
  const ready = READY;
  window.xattnTook = new Promise((resolve, reject) => addEventListener(kind, event => {
    const look = () => {
      const took = performance.now() - event.timeStamp;
      if (ready(key)) resolve(took / 1000);
      else if (took > 30000) reject(new Error("no pictures after 30 s"));
      else requestAnimationFrame(look);
    };
    look();
  }, { capture: true, once: true }));
}""".replace("READY", READY)

# From the end of a stroke to the first frame in which the network's answer is another one.
_WATCH_STROKE = """() => {
  const said = () => document.querySelector(".answers")?.textContent;
  const before = said();
  window.xattnTook = new Promise((resolve, reject) => addEventListener("pointerup", event => {
    const look = () => {
      const took = performance.now() - event.timeStamp;
      if (said() !== before) resolve(took / 1000);
      else if (took > 30000) reject(new Error("no other answer after 30 s"));
      else requestAnimationFrame(look);
    };
    look();
  }, { capture: true, once: true }));
}"""


# ---------------------------------------------------------------------- one measure each


def _first_cell(page: Any) -> str:
    first = page.locator(".cell").first
    return str(first.get_attribute("data-id")) if first.count() else ""


def _clicked(page: Any, target: Any) -> float:
    """Seconds from a click on ``target`` to pixels, by the browser's own clock."""
    return _timed(page, "click", target.click)


def _timed(page: Any, kind: str, act: Callable[[], None]) -> float:
    """Seconds from the event of this kind that ``act`` makes to pixels, by the browser's own clock."""
    page.evaluate(_WATCH, [kind, _first_cell(page)])
    act()
    return float(page.evaluate("() => window.xattnTook"))


def first_paint(running: Any, address: str, rounds: int, longest: float = 30) -> list[float]:
    """Seconds from the address to the gallery's pictures, each with a browser that knows nothing; an error
    after ``longest``."""
    took = []
    for _ in range(rounds):
        context = running.new_context(viewport=SIZE)
        page = context.new_page()
        start = time.perf_counter()
        page.goto(address)
        until_pixels(page, seconds=longest)
        took.append(time.perf_counter() - start)
        context.close()
    return took


def next_pages(page: Any, rounds: int) -> list[float]:
    """Seconds from a click on the gallery's "Next" to the pictures of the next page."""
    button = page.get_by_role("button", name="Next")
    return [_clicked(page, button) for _ in range(rounds)]


def open_images(page: Any, address: str, rounds: int) -> list[float]:
    """Seconds from a click on a picture of the gallery to the pictures of its own page."""
    took = []
    for turn in range(rounds):
        page.goto(address)
        until_pixels(page)
        page.wait_for_timeout(300)  # the gallery's own run has ended
        took.append(_clicked(page, page.locator(".cell").nth(turn % 12)))
    return took


def next_images(page: Any, rounds: int) -> list[float]:
    """Seconds from a click on the image page's "Next" to the pictures of the next photo."""
    button, took = page.get_by_role("button", name="Next"), []
    for _ in range(rounds):
        took.append(_clicked(page, button))
        page.wait_for_timeout(100)
    return took


def orders(page: Any, names: Sequence[str]) -> list[float]:
    """Seconds from the choice of an order of the gallery to its pictures."""
    took = []
    for name in names:
        page.wait_for_timeout(500)  # the run before has ended, which would close the list
        box = page.get_by_role("combobox", name="Sort by")
        box.click()
        box.fill(name)  # a long list is not all there
        option = pointed_at(page, re.compile(f"^{re.escape(name)}"))
        took.append(_clicked(page, option))
    return took


def searches(page: Any, words: Sequence[str]) -> list[float]:
    """Seconds from Enter in the gallery's search to the pictures that are found."""
    box, took = page.get_by_role("textbox", name="Search"), []
    for word in words:
        box.fill(word)
        took.append(_timed(page, "keydown", lambda: box.press("Enter")))
        page.wait_for_timeout(300)
    return took


def filters(page: Any, rounds: int) -> list[float]:
    """Seconds from a click in the gallery's filters, on right, wrong or a true class, to the pictures that
    are left."""
    page.get_by_role("button", name="Filters").click()
    took = []
    for turn in range(rounds - 1):
        name = ("Wrong", "Right")[turn % 2]
        choice = page.get_by_test_id("stPopoverBody").get_by_text(name, exact=True)
        took.append(_clicked(page, choice))
        page.wait_for_timeout(500)  # the run has ended
    page.get_by_role("combobox", name="True class").click()
    took.append(_clicked(page, pointed_at(page, re.compile("^trilobite"))))
    return took


def resident(process: int) -> float:
    """MB of physical memory that a process has; Linux."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def live(page: Any, address: str, photo: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of an explanation on the live page, from click to pixels, and by the library alone.

    Both in every round, in turn; the model is loaded on both sides, the first round is left out.
    """
    from xattn.backbone import load_backbone
    from xattn.explaining.photos import explain
    from xattn.heads import load_head

    backbone = load_backbone(LIVE_BACKBONE, weights="package")
    head = load_head(LIVE_HEAD, backbone)  # what the page chooses by itself
    in_page, alone = [], []
    page.goto(f"{address}/live")
    page.locator("input[type=file]").first.set_input_files(str(photo))
    button = page.get_by_role("button", name="Explain", exact=True)
    for turn in range(rounds + 1):
        page.wait_for_timeout(700)
        in_page.append(_clicked(page, button))
        start = time.perf_counter()
        explain(photo, backbone, head)
        alone.append(time.perf_counter() - start)
        if turn == 0:
            in_page.clear()
            alone.clear()
    return in_page, alone


def strokes(page: Any, address: str, root: Path, photo: Path, rounds: int) -> list[float]:
    """Seconds from the end of a stroke on the page What if to the network's new answer."""
    from xattn.backbone import load_backbone
    from xattn.explaining.photos import explain

    backbone = load_backbone(LIVE_BACKBONE, weights="package")
    explain(photo, backbone, explainer="gradcam", output=root / "painted", overlays=False)
    page.goto(f"{address}/whatif?pack={_packs(root)['painted']}")
    canvas = page.locator(".brush .canvas")
    canvas.wait_for()
    page.locator(".answers").wait_for()
    took = []
    for turn in range(rounds + 1):
        page.wait_for_timeout(700)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x = box["x"] + box["width"] * (turn + 1) / (rounds + 2)
        page.mouse.move(x, box["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(x, box["y"] + 0.8 * box["height"], steps=5)
        page.evaluate(_WATCH_STROKE)
        page.mouse.up()
        took.append(float(page.evaluate("() => window.xattnTook")))
    return took[1:]  # the first pass of a network takes longer


# ---------------------------------------------------------------------- all of them


HEADER = ("| what | median | slowest | wanted |", "| :-- | --: | --: | --: |")


def pages(rounds: int) -> Iterator[str]:
    """Lines of a Markdown table."""
    with tempfile.TemporaryDirectory(prefix="xattn-bench-") as name, browser() as running:
        folder = Path(name)
        big_pack(folder / "root" / "many", MANY)
        big_pack(folder / "root" / "warm", WARM, methods=3)
        photo = folder / "photo.jpg"
        picture(1, (500, 375)).save(photo)
        with served(folder / "root", folder / "log") as (address, process):
            ids = _packs(folder / "root")
            many, warm = (f"{address}/?pack={ids[n]}" for n in ("many", "warm"))
            yield from HEADER
            took = first_paint(running, many, min(rounds, 9) + 1)
            yield _line(f"gallery of {MANY:,} entries, first visit of the server", took[:1], PAINT)
            yield _line(f"gallery of {MANY:,} entries, first paint", took[1:], PAINT)
            context = running.new_context(viewport=SIZE)
            page = context.new_page()
            page.goto(many)
            until_pixels(page)
            next_pages(page, 2)
            yield _line("gallery, next page", next_pages(page, rounds), TURN)
            open_images(page, warm, 2)
            yield _line("image page from the gallery", open_images(page, warm, rounds), CLICK)
            next_images(page, 2)
            yield _line("image page, next image", next_images(page, 2 * rounds), CLICK)
            yield from _memory(page, process, VIEWS)
            took, alone = live(page, address, photo, rounds)
            more = [a - b for a, b in zip(took, alone, strict=True)]
            label = f"live explanation with {LIVE_BACKBONE}, above the library call"
            yield _line(label, more, LIVE)
            took = strokes(page, address, folder / "root", photo, rounds)
            yield _line(f"stroke on the page What if, {LIVE_BACKBONE}", took, STROKE)
            context.close()


def scale(rounds: int, maps: int) -> Iterator[str]:
    """Lines of a Markdown table about one pack with so many maps; ``rounds`` at most 6."""
    with tempfile.TemporaryDirectory(prefix="xattn-bench-") as name, browser() as running:
        folder = Path(name)
        start = time.perf_counter()
        million_pack(folder / "root" / "pack", maps)
        made = time.perf_counter() - start
        with served(folder / "root", folder / "log") as (address, process):
            yield from HEADER
            keep_rounds(f"a pack of {maps:,} maps is written", "", [made])
            yield f"| a pack of {maps:,} maps is written | {made:.0f} s | | |"
            took = first_paint(running, address, rounds + 1, 120)
            yield _line("gallery, first visit of the server", took[:1], SCALE_PAINT)
            yield _line("gallery, first paint", took[1:], SCALE_PAINT)
            page = running.new_context(viewport=SIZE).new_page()
            page.goto(address)
            until_pixels(page)
            next_pages(page, 2)
            yield _line("gallery, next page", next_pages(page, rounds), TURN)
            names = ("ROAD", "AD@50", "insertion", "Confidence", "File name", "Predicted class")
            yield _line("gallery in another order", orders(page, names[:rounds]), SORTED)
            words = [f"photo-{(turn + 1) * (maps // 40):07}" for turn in range(rounds)]
            yield _line("gallery, a photo is searched", searches(page, words), SORTED)
            page.goto(address)
            until_pixels(page)
            yield _line("gallery, filtered", filters(page, rounds), SORTED)
            open_images(page, address, 2)
            yield _line("image page from the gallery", open_images(page, address, rounds), PHOTO)
            next_images(page, 2)
            yield _line("image page, next image", next_images(page, rounds), PHOTO)
            memory = resident(process)
            keep_rounds("server's memory", "", [memory], "MB")
            yield f"| server's memory | {memory:.0f} MB | | {SCALE_MEMORY} MB |"


def _packs(root: Path) -> dict[str, str]:
    from xattn.app.library import Library

    return {info.name: info.id for info in Library(root).packs()}


def _line(label: str, seconds: list[float], allowed: float) -> str:
    keep_rounds(label, "", seconds)
    median, most = statistics.median(seconds), max(seconds)
    return f"| {label} | {1000 * median:.0f} ms | {1000 * most:.0f} ms | {1000 * allowed:.0f} ms |"


def _memory(page: Any, process: int, views: int) -> Iterator[str]:
    """The server's memory over ``views`` image pages, beginning after the first tenth."""
    next_images(page, views // 10)
    before = resident(process)
    next_images(page, views - views // 10)
    after = resident(process)
    keep_rounds(f"server's memory over {views} image pages", "", [before, after], "MB")
    yield (
        f"| server's memory over {views} image pages | {before:.0f} MB, then {after - before:+.0f} MB "
        f"| | flat: at most +{GROWTH} MB |"
    )


# ---------------------------------------------------------------------- the page Map


def photo_map(rounds: int, photos: int) -> Iterator[str]:
    """Lines of a Markdown table about the page Map of a pack with so many photos."""
    from xattn.eval.report.photo_map.clusters import clusters
    from xattn.eval.report.photo_map.pooled_maps import normalise_rows, read
    from xattn.eval.report.photo_map.projection import METHODS, available_methods, project
    from xattn.packs.reader import Pack

    with tempfile.TemporaryDirectory(prefix="xattn-bench-") as name:
        folder = Path(name)
        pack = Pack(big_pack(folder / "root" / "map", photos, features=FEATURES))
        yield f"| {photos:,} photos, {FEATURES:,} features | took | wanted |"
        yield "| :-- | --: | --: |"
        begun = time.perf_counter()
        maps = read(pack, list(pack.entry_ids))
        yield _once("maps read and pooled, once", time.perf_counter() - begun)
        values = normalise_rows(pack.features())  # type: ignore[arg-type]
        for method in available_methods(photos):
            begun = time.perf_counter()
            project(values, method)
            yield _once(f"{METHODS[method]}, once", time.perf_counter() - begun)
        begun = time.perf_counter()
        classes = [CLASSES[i % len(CLASSES)] for i in range(photos)]
        clusters(maps, classes, [None] * photos)
        yield _once("groups, once", time.perf_counter() - begun)
        took = lassos(folder, rounds)
        keep_rounds("lasso", "", took)
        for which, seconds in (("median", statistics.median(took)), ("slowest", max(took))):
            yield f"| lasso, {which} | {1000 * seconds:.0f} ms | {1000 * LASSO:.0f} ms |"


def lassos(folder: Path, rounds: int) -> list[float]:
    """Seconds that the map of the pack in ``folder/root`` takes to answer a lasso around half of it."""
    (pack_id,) = _packs(folder / "root").values()
    with (
        browser() as running,
        served(folder / "root", folder / "log") as (at, _),
    ):
        page = running.new_context(viewport=SIZE).new_page()
        page.goto(f"{at}/photomap?pack={pack_id}&projection=pca")
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


def _once(label: str, seconds: float) -> str:
    keep_rounds(label, "", [seconds])
    return f"| {label} | {seconds:.1f} s | {PROJECTION:.0f} s |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What a person waits for in the viewer.")
    parser.add_argument("--rounds", type=int, help="by default 15, of --maps 6")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--maps", type=int, help="browse one pack of so many maps, 400 or more")
    which.add_argument("--photos", type=int, help="the page Map of so many photos")
    parser.add_argument("--raw", type=Path, help="a .csv for what every round measured")
    asked = parser.parse_args(arguments)
    if asked.maps is not None and asked.maps < 400:
        parser.error("--maps: give 400 or more")
    sleep_while_waiting()
    keep_memory()
    with record_rounds(asked.raw):
        if asked.maps is not None:
            lines = scale(asked.rounds or 6, asked.maps)
        elif asked.photos is not None:
            lines = photo_map(asked.rounds or 15, asked.photos)
        else:
            lines = pages(asked.rounds or 15)
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
