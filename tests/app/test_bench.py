"""``xattn bench app --maps``: one command makes, opens, sorts, searches and browses a pack."""

from contextlib import nullcontext

import pytest

pytest.importorskip("streamlit")

from xattn.app import bench
from xattn.cli import main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--maps", "1000"], "maps: for job app alone, got train; leave out --maps"),
        (["app", "--maps", "399"], "maps: got 399; give 400 or more"),
    ],
)
def test_a_number_of_maps_that_cannot_be_browsed_is_one_line(arguments, says, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


@pytest.mark.slow
def test_a_pack_is_made_sorted_searched_and_browsed(browser, monkeypatch):
    monkeypatch.setattr(bench, "browser", lambda: nullcontext(browser))  # a process can have one
    lines = list(bench.scale(2, 4000))
    measured = [line.split("|")[1].strip() for line in lines[2:]]
    assert measured == [
        "a pack of 4,000 maps is written",
        "gallery, first visit of the server",
        "gallery, first paint",
        "gallery, next page",
        "gallery in another order",
        "gallery, a photo is searched",
        "gallery, filtered",
        "image page from the gallery",
        "image page, next image",
        "server's memory",
    ]
