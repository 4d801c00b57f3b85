"""A viewer in a process of its own, Chromium, and what to wait for in it."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
# Pictures of all grids, which live in shadow roots; true when those in sight are decoded and the first
# cell is not `key`, the one before the click.
READY = """key => {
  const roots = root => [root, ...[...root.querySelectorAll("*")].filter(e => e.shadowRoot)
    .flatMap(e => roots(e.shadowRoot))];
  const cells = roots(document).flatMap(root => [...root.querySelectorAll(".cell")]);
  const images = cells.flatMap(cell => [...cell.querySelectorAll("img")]);
  return images.length > 0 && cells[0].dataset.id !== key && images.every(i => {
    const box = i.getBoundingClientRect();
    return box.bottom < 0 || box.top > innerHeight || (i.complete && i.naturalWidth > 0);
  });
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
    root: Path, log: Path, *arguments: str, run: Sequence[str] = ("-m", "xattn")
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
        raise ValueError("no Chromium; install Debian's chromium, or Chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ValueError("the playwright package is missing; run: pip install playwright") from None
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


def until_pixels(page: Any, key: str = "", seconds: float = 30) -> None:
    """Wait until all pictures in sight are decoded, in grids whose first cell is not ``key``."""
    end = time.monotonic() + seconds
    while not page.evaluate(READY, key):
        if time.monotonic() > end:
            raise RuntimeError(f"no pictures after {seconds:g} s at {page.url}")
        page.wait_for_timeout(5)


def pointed_at(page: Any, name: str | re.Pattern[str]) -> Any:
    """The option of an open list, with the pointer on it. Hovering redraws the list, and a click
    during that is lost."""
    option = page.get_by_role("option", name=name).first
    option.hover()
    option = option.and_(page.locator("[data-focused=true]"))
    option.wait_for()
    return option


def boxes(*locators: Any, seconds: float = 30) -> list[dict[str, float]]:
    """Where elements of a page are, read together once nothing moves any more.

    A run of the viewer's script or an animation may still be moving them when they appear.
    """
    page = locators[0].page
    page.locator("[data-test-script-state=notRunning]").wait_for()
    end = time.monotonic() + seconds
    before = None
    while before != (now := [one.bounding_box() for one in locators]) or None in now:
        if time.monotonic() > end:
            raise RuntimeError(f"elements still move or are hidden after {seconds:g} s: {now}")
        before = now
        page.evaluate("() => new Promise(done => setTimeout(done, 50))")
    return now


def box(locator: Any) -> dict[str, float]:
    """Where one element is; see :func:`boxes`."""
    return boxes(locator)[0]
