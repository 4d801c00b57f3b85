"""What a person waits for in the viewer, measured in Chromium: ``xattn bench app``.

A server of its own shows packs of made-up photos. "Pixels" are there when every picture in sight is
decoded; the browser's own clock runs from the click to the first frame in which they are. Memory is the
resident set of the server's process. Needs the ``playwright`` package and an installed Chromium.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xattn.app.synthetic_packs import big_pack, million_pack, picture
from xattn.runtime.measuring import keep_rounds

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SIZE = {"width": 1280, "height": 900}
MANY, WARM = 10_000, 1_000  # images of the two packs
PAINT, TURN, CLICK, LIVE, STROKE = 2.0, 0.5, 0.3, 0.15, 0.3  # seconds that are allowed
SCALE_PAINT, SORTED, PHOTO = 3.0, 1.5, 0.4  # seconds, in a pack of a million maps
SCALE_MEMORY = 1000  # MB that the server may have then
GROWTH = 50  # MB that the server may grow by over the views after the first tenth
VIEWS = 500
LIVE_BACKBONE, LIVE_HEAD = "tf_efficientnet_lite0", "ttame-efficientnet-lite0"
# Pictures of all grids, which live in shadow roots; true when those in sight are decoded and the first
# cell is not `key`, the one before the click.
_READY = """key => {
  const roots = root => [root, ...[...root.querySelectorAll("*")].filter(e => e.shadowRoot)
    .flatMap(e => roots(e.shadowRoot))];
  const cells = roots(document).flatMap(root => [...root.querySelectorAll(".cell")]);
  const images = cells.flatMap(cell => [...cell.querySelectorAll("img")]);
  return images.length > 0 && cells[0].dataset.id !== key && images.every(i => {
    const box = i.getBoundingClientRect();
    return box.bottom < 0 || box.top > innerHeight || (i.complete && i.naturalWidth > 0);
  });
}"""
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
}""".replace("READY", _READY)

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


def chromium() -> str | None:
    """The path of Debian's Chromium or of Chrome; None if neither is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def served(
    root: Path, log: Path, *arguments: str, run: Sequence[str] = ("-m", "xattn.cli")
) -> Iterator[tuple[str, int]]:
    """``xattn app root`` on a free port until the block ends: its address and process number.

    ``run``: the arguments that make Python run xattn.

    Raises:
        RuntimeError: it ended early or did not answer within five minutes; with what it wrote to ``log``.
    """
    port = free_port()
    command = [sys.executable, *run, "app", str(root), "--port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen([*command, *arguments], stdout=stream, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(lambda: process.poll() is not None or _answers(address), log)
        if process.poll() is not None:
            raise RuntimeError(f"xattn app ended early:\n{log.read_text()}")
        yield address, process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(ready: Callable[[], bool], log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"xattn app did not answer:\n{log.read_text()}")
        time.sleep(0.05)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/_stcore/health", timeout=1).close()
    except urllib.error.HTTPError:  # a server with a token
        return True
    except OSError:
        return False
    return True


@contextmanager
def browser() -> Iterator[Any]:
    """A running Chromium.

    Raises:
        ValueError: Chromium or the ``playwright`` package is missing.
    """
    path = chromium()
    if path is None:
        raise ValueError("bench app: no Chromium; install Debian's chromium, or Chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ValueError(
            "bench app: the playwright package is missing; run: pip install playwright"
        ) from None
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


# ---------------------------------------------------------------------- one measure each


def until_pixels(page: Any, key: str = "", seconds: float = 30) -> None:
    """Wait until all pictures in sight are decoded, in grids whose first cell is not ``key``."""
    end = time.monotonic() + seconds
    while not page.evaluate(_READY, key):
        if time.monotonic() > end:
            raise RuntimeError(f"bench app: no pictures after {seconds:g} s at {page.url}")
        page.wait_for_timeout(5)


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


def pointed_at(page: Any, name: str | re.Pattern[str]) -> Any:
    """The option of an open list, with the pointer on it. Hovering redraws the list, and a click
    during that is lost."""
    option = page.get_by_role("option", name=name).first
    option.hover()
    option = option.and_(page.locator("[data-focused=true]"))
    option.wait_for()
    return option


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
    from xattn.runtime.process import keep_memory

    keep_memory()
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


def bench(
    rounds: int = 15,
    views: int = VIEWS,
    images: tuple[int, int] = (MANY, WARM),
    maps: int | None = None,
) -> Iterator[str]:
    """Lines of a Markdown table; ``images`` of the big pack and of the warm one. With ``maps`` the one pack
    that has so many, made, opened, sorted, filtered and browsed."""
    if maps is not None:
        yield from scale(rounds, maps)
        return
    with tempfile.TemporaryDirectory(prefix="xattn-bench-") as name, browser() as running:
        folder = Path(name)
        big_pack(folder / "root" / "many", images[0])
        big_pack(folder / "root" / "warm", images[1], methods=3)
        photo = folder / "photo.jpg"
        picture(1, (500, 375)).save(photo)
        with served(folder / "root", folder / "log") as (address, process):
            ids = _packs(folder / "root")
            many, warm = (f"{address}/?pack={ids[n]}" for n in ("many", "warm"))
            yield from HEADER
            took = first_paint(running, many, min(rounds, 9) + 1)
            yield _line(
                f"gallery of {images[0]:,} entries, first visit of the server", took[:1], PAINT
            )
            yield _line(f"gallery of {images[0]:,} entries, first paint", took[1:], PAINT)
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
            yield from _memory(page, process, views)
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
