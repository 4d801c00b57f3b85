"""``tests/viewer_speed.py --maps``: one command makes, opens, sorts, searches and browses a pack."""

from contextlib import nullcontext

import pytest

pytest.importorskip("streamlit")

import viewer_speed


@pytest.mark.slow
def test_a_pack_is_made_sorted_searched_and_browsed(browser, monkeypatch):
    monkeypatch.setattr(
        viewer_speed, "browser", lambda: nullcontext(browser)
    )  # a process can have one
    lines = list(viewer_speed.scale(2, 4000))
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
