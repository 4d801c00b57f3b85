"""A viewer in a process of its own and a Chromium that fails a test on any error it sees."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


def chromium() -> str | None:
    """Debian's Chromium, or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def served(root: Path, *arguments: str, log: Path) -> Iterator[str]:
    """The address of ``xattn app root``, which runs until the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "xattn.cli", "app", str(root), "--port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"xattn app ended early:\n{log.read_text()}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=1).close()
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"xattn app did not answer:\n{log.read_text()}")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium; install Debian's chromium to run the viewer's browser tests")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """``open_page(address, size="wide", scheme="light")`` -> a page of its own.

    After the test every page is checked: no console error, no exception box, no failed request.
    """
    opened: list[tuple[Any, Any, list[str]]] = []

    def open_page(address: str, size: str = "wide", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        page = context.new_page()
        page.set_default_timeout(30_000)
        wrong: list[str] = []
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        opened.append((context, page, wrong))
        page.goto(address)
        return page

    yield open_page
    for context, page, wrong in opened:
        boxes = (
            [] if page.is_closed() else page.locator("[data-testid=stException]").all_inner_texts()
        )
        context.close()
        assert not wrong, f"the browser's console says: {wrong}"
        assert not boxes, f"the page shows an exception: {boxes}"
