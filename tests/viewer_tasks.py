"""Four tasks walked in Chromium as a person would, in clicks and seconds: ``python tests/viewer_tasks.py``.

A server of its own shows two packs of the same photos: maps by Grad-CAM of a small network that was trained
for a few steps, and of the same network after more steps. A click is a press of a mouse button, so a lasso
is one; each task begins with the gallery of the first pack. Seconds run to the answer on the screen, and
have no pause for reading in them.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import served_viewer
from PIL import Image
from planted_shortcut import NAMES, shapes, trained
from served_viewer import browser, served, until_pixels

from xattn.explaining.photos import explain
from xattn.runtime.measuring import keep_rounds, record_rounds

SIZE = {"width": 1440, "height": 900}
PHOTOS, STEPS = 240, (40, 150)  # training steps of the two networks
SURE = 10  # errors to export
LONGEST = 180_000  # ms that an answer may take; UMAP places the photos once


class Person:
    """A browser's page, and how often a person clicked in it."""

    def __init__(self, page: Any) -> None:
        self.page, self.clicks = page, 0

    def click(self, target: Any, **options: Any) -> None:
        """Click on an element, once it is there and still."""
        served_viewer.box(target)
        target.click(**options)
        self.clicks += 1

    def button(self, name: str) -> None:
        """Click on a button."""
        self.click(self.page.get_by_role("button", name=name, exact=True).filter(visible=True).last)

    def to(self, name: str) -> None:
        """Go to another page by the menu."""
        self.click(self.page.get_by_role("link", name=name, exact=True).filter(visible=True).last)

    def lasso(self) -> None:
        """Draw around the left half of the map of photos."""
        plane = self.page.locator(".drawing")
        plane.scroll_into_view_if_needed()
        box = served_viewer.box(plane)
        corners = ((0.02, 0.02), (0.5, 0.02), (0.5, 0.98), (0.02, 0.98))
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=5)
        self.page.mouse.up()
        self.clicks += 1


# ---------------------------------------------------------------------- the tasks


def export_errors(person: Person) -> None:
    """Choose the ten errors of which the network is most certain, and save the list of their files."""
    page = person.page
    person.to("Mistakes")
    person.button("Most confident errors")
    until_pixels(page)
    boxes = page.locator(".cell")
    boxes.nth(SURE - 1).wait_for()
    person.click(boxes.first, modifiers=["Control"])
    person.click(boxes.nth(SURE - 1), modifiers=["Shift"])
    bar = page.locator(".st-key-chosen-bar")
    bar.get_by_text(f"{SURE} chosen", exact=True).wait_for()
    person.click(bar.get_by_role("button", name="Export"))
    with page.expect_download() as saved:
        person.button("List of photos")
    names = Path(saved.value.path()).read_text(encoding="utf-8").splitlines()[1:]
    if len(names) != SURE:
        raise RuntimeError(f"the list has {len(names)} photos instead of {SURE}")


def find_class(person: Person) -> None:
    """Open the most common mistake of a class: the class that is predicted, and the mean map."""
    person.to("Mistakes")
    row = person.page.locator(".matrix").get_by_role(
        "link", name=re.compile(f"of {NAMES[0]} predicted as (?!{NAMES[0]})")
    )
    person.click(row.first)
    person.page.get_by_role("heading", name=re.compile(f"^{NAMES[0]} predicted as ")).wait_for()
    until_pixels(person.page)


def lasso_errors(person: Person) -> None:
    """Draw a lasso on the map of photos and look at its errors."""
    person.to("Map")
    person.lasso()
    bar = person.page.locator(".st-key-chosen-bar")
    person.click(bar.get_by_role("button", name="Gallery"))
    person.page.get_by_text(re.compile("filtered from")).wait_for()
    person.button("Filters")
    person.click(person.page.get_by_test_id("stPopoverBody").get_by_text("Wrong", exact=True))
    person.page.wait_for_url(re.compile("right=wrong"))
    until_pixels(person.page)


def see_mended(person: Person) -> None:
    """Choose all errors, and see which of them the second network predicts correctly."""
    page = person.page
    person.to("Mistakes")
    person.button("Most confident errors")
    until_pixels(page)
    person.button("Choose")
    person.click(page.get_by_role("button", name=re.compile("that pass the filters$")))
    page.locator(".st-key-chosen-bar").wait_for()
    person.to("Two runs")
    page.get_by_text(re.compile("became right")).wait_for()
    person.click(page.get_by_text(re.compile("^Chosen photos")).filter(visible=True).first)
    page.wait_for_url(re.compile("list=chosen"))
    until_pixels(page)


class Task(NamedTuple):
    """A task, how a person does it, and in how many clicks it has to be possible."""

    title: str
    walk: Callable[[Person], None]
    wanted: int


TASKS = (
    Task("find the ten most confident errors and export their files", export_errors, 6),
    Task("which class does the model take for X, and where does it look", find_class, 4),
    Task("are the errors of a lasso about one background", lasso_errors, 8),
    Task("did run 2 mend them", see_mended, 6),
)


# ---------------------------------------------------------------------- all of them


def make_packs(folder: Path) -> None:
    """Two packs of the same photos in ``folder/root``."""
    photos, labels = shapes(PHOTOS, True, seed=1)
    for i, (photo, label) in enumerate(zip(photos, labels, strict=True)):
        file = folder / "photos" / NAMES[label] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(file)
    # The viewer opens the newest pack first, which is run-1.
    for name, steps in zip(("run-2", "run-1"), reversed(STEPS), strict=True):
        explain(
            folder / "photos",
            trained(*shapes(2 * PHOTOS, True), steps),
            explainer="gradcam",
            output=folder / "root" / name,
            overlays=False,
            labels="folders",
            classes="predicted,label",
            features=True,
        )


def tasks(rounds: int, shots: Path | None = None) -> Iterator[str]:
    """Lines of a Markdown table; ``shots``: a folder for a picture of the end of each task."""
    yield "| task | clicks | wanted | seconds, median | slowest |"
    yield "| :-- | --: | --: | --: | --: |"
    with tempfile.TemporaryDirectory(prefix="xattn-tasks-") as name, browser() as running:
        folder = Path(name)
        make_packs(folder)
        with served(folder / "root", folder / "log") as (address, _):
            for task in TASKS:
                took = []
                for turn in range(rounds):
                    context = running.new_context(viewport=SIZE, accept_downloads=True)
                    page = context.new_page()
                    page.set_default_timeout(LONGEST)
                    page.goto(address)
                    until_pixels(page)
                    person, start = Person(page), time.perf_counter()
                    task.walk(person)
                    took.append(time.perf_counter() - start)
                    if shots is not None and not turn:
                        page.screenshot(path=shots / f"{task.walk.__name__}.png")
                    context.close()
                keep_rounds(task.title, "", took)
                keep_rounds(task.title, "", [person.clicks], "clicks")
                took.sort()
                middle, most = took[len(took) // 2], took[-1]
                yield f"| {task.title} | {person.clicks} | {task.wanted} | {middle:.1f} | {most:.1f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Tasks in the viewer, in clicks and seconds.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--raw", type=Path, help="a .csv for what every round measured")
    parser.add_argument("--shots", type=Path, help="a folder for pictures of the ends")
    asked = parser.parse_args(arguments)
    with record_rounds(asked.raw):
        for line in tasks(asked.rounds, asked.shots):
            print(line, flush=True)


if __name__ == "__main__":
    main()
