"""A Chromium that fails on any error it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

_shown: list[Any] = []  # the pages of the test that runs
SIZES = {"wide": (1280, 900), "narrow": (390, 844), "desk": (1440, 900)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Say what every open page shows when a test of the browser fails."""
    report = yield
    if report.when == "call" and report.failed:
        for page in [page for page in _shown if not page.is_closed()]:
            text = " | ".join(page.inner_text("body").split("\n\n"))
            report.sections.append(("Page", f"{page.url}\n{text[:2000]}"))
    return report


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """``open_page(address, size="wide", scheme="light")`` -> a page of its own.

    After the test every page is checked: no console error, no exception box, no failed request, unless
    pictures may be gone because their pack is ``replaced`` meanwhile.
    """
    opened: list[tuple[Any, Any, list[str]]] = []

    def open_page(
        address: str, size: str = "wide", scheme: str = "light", replaced: bool = False
    ) -> Any:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        page = context.new_page()
        page.set_default_timeout(300_000)
        wrong: list[str] = []

        def note(message: Any) -> None:
            gone = replaced and "404" in message.text
            if message.type == "error" and not gone:
                wrong.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        opened.append((context, page, wrong))
        _shown.append(page)
        page.goto(address)
        return page

    yield open_page
    _shown.clear()
    for context, page, wrong in opened:
        boxes = (
            [] if page.is_closed() else page.locator("[data-testid=stException]").all_inner_texts()
        )
        context.close()
        assert not wrong, f"the browser's console says: {wrong}"
        assert not boxes, f"the page shows an exception: {boxes}"
