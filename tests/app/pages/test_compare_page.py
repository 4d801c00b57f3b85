"""The compare page: leaderboard, curves, dots and maps; and a file that may be damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest
from synthetic_packs import small_pack
from viewer_pages import opened

from xattn.app import state
from xattn.app.library import LEADERBOARD, Library
from xattn.app.pages.compare import leaderboard_file
from xattn.app.pages.compare.leaderboard_file import parse, read
from xattn.backbone import load_backbone
from xattn.eval.board.make import make_board
from xattn.eval.evaluation.results import ImageRecord, MethodResult, Results
from xattn.eval.leaderboard import Comparison
from xattn.eval.metrics.base import Column
from xattn.eval.protocol import Protocol
from xattn.eval.report.leaderboard_files import write_report
from xattn.packs.contained_files import PackError
from xattn.packs.format import MAPS

IMAGES = 12
COLUMNS = (Column("AD", 0.5), Column("insertion"), Column("ROAD"))
METHODS = ("gradcam", "saliency", "random", "ones")


def results(images: int = IMAGES, steps: int = 5) -> Results:
    """gradcam is best in everything, saliency close behind; ones is a mask."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, (images, len(COLUMNS)))
    methods = {}
    for rank, name in enumerate(METHODS):
        worse = 0.3 * max(rank - 1, 0)
        ad = 20 + 100 * worse + rng.normal(0, 5, images)
        good = 0.8 - worse + noise[:, 1] + rng.normal(0, 0.01, images)
        methods[name] = MethodResult(
            forwards=1,
            is_mask=name == "ones",
            valid=np.ones(images, bool),
            scores={
                "deletion": np.linspace(0.8, 0.1 + worse / 2, steps) + noise[:, :1],
                "insertion": np.linspace(0.1, 0.8 - worse / 2, steps) + noise[:, :1],
            },
            values={COLUMNS[0]: ad, COLUMNS[1]: good, COLUMNS[2]: good / 2},
        )
    methods["saliency"].values[COLUMNS[2]][3] = np.nan
    return Results(
        protocol=Protocol(n=images),
        images=[
            ImageRecord(f"photos/photo {i}.jpg", i, f"class {i}, more", 0.9) for i in range(images)
        ],
        methods=methods,
        backbone={"name": "made up", "sha256": "0" * 64},
        n_resamples=200,
        options={c.key: {} for c in COLUMNS},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_report(results(), root / "first")
    small_pack(root / "first" / "pack", IMAGES, ("gradcam", "saliency", "random"))
    write_report(results(), root / "without pictures")
    return root


@pytest.fixture
def data(made: Path) -> bytes:
    return (made / "first" / LEADERBOARD).read_bytes()


@pytest.fixture
def library(made: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library(made)
    monkeypatch.setattr(state, "_settings", state.Settings(root=made))
    monkeypatch.setattr(state, "library", lambda: found)
    monkeypatch.setattr(
        leaderboard_file, "_BOARDS", leaderboard_file.LRUCache(leaderboard_file.KEPT)
    )
    return found


def ids(library: Library) -> dict[str, str]:
    return {info.name: info.id for info in library.comparisons()}


# ---------------------------------------------------------------------- reading


def test_a_board_is_what_was_written(data):
    board, expected = parse(data), results()
    assert list(board.columns) == [c.key for c in COLUMNS]
    for name in METHODS:
        for column in COLUMNS:
            np.testing.assert_array_equal(
                board.results.methods[name].values[column], expected.methods[name].values[column]
            )
            mean = expected.mean(name, *column)
            assert board.standings[name, column.key].mean == pytest.approx(mean, nan_ok=True)


def test_standings_in_words(data):
    board = parse(data)
    assert board.verdict("gradcam", "insertion") in ("best", "no clear difference from the best")
    assert board.verdict("random", "insertion") == "worse than the best"
    assert board.verdict("ones", "AD@50") == "a mask, not ranked"
    assert [board.kind(n) for n in METHODS] == ["method", "method", "sanity row", "sanity row"]
    assert board.title_with_arrow("AD@50") == "AD@50 ↓"
    assert board.title_with_arrow("ROAD") == "ROAD ↑"
    assert set(board.ranked[:2]) == {"gradcam", "saliency"}


def test_a_sanity_row_that_beats_the_best_is_said(data):
    record = json.loads(data)
    for s in record["standings"]:
        if s["method"] == "random" and s["column"] == "insertion":
            s |= {"diff": 0.2, "diff_lo": 0.1, "diff_hi": 0.3, "level_with_best": False}
    board = parse(json.dumps(record).encode())
    assert board.verdict("random", "insertion") == "better than the best method"


def test_a_board_is_read_again_when_its_file_changes(made, library, tmp_path):
    root = tmp_path / "root"
    write_report(results(), root / "one")
    library = Library(root)
    (board_id,) = ids(library).values()
    first = read(library, board_id)
    assert read(library, board_id) is first
    write_report(results(IMAGES - 2), root / "one")
    assert len(read(library, board_id).results.images) == IMAGES - 2


def test_an_unknown_comparison_is_an_error_for_a_person(library):
    with pytest.raises(PackError, match="no such comparison"):
        read(library, "../first")


def test_a_file_over_the_limit_is_not_read(library, monkeypatch):
    monkeypatch.setattr(leaderboard_file, "MAX_BYTES", 100)
    with pytest.raises(PackError, match="limit"):
        read(library, ids(library)["first"])


def trained() -> Results:
    """gradcam as a head that was trained on masked images."""
    found = results()
    found.methods["gradcam"].objective = "mask"
    return found


def test_a_board_says_what_a_head_was_trained_on(tmp_path):
    write_report(trained(), tmp_path)
    board = parse((tmp_path / LEADERBOARD).read_bytes())
    assert (
        board.marked_name("gradcam", "AD@50") == "Grad-CAM †"
        and board.marked_name("random", "AD@50") == "Random"
    )
    assert board.marked_name("gradcam", "ROAD") == "Grad-CAM"
    assert board.verdict("gradcam", "AD@50").endswith(", close to its training")
    assert "training" not in board.verdict("gradcam", "ROAD")
    said = board.training(["gradcam", "random"], ["AD@50", "ROAD"])
    assert said == "The training of Grad-CAM is close to AD@50."
    assert board.training(["random"], ["AD@50"]) == board.training(["gradcam"], ["ROAD"]) == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["methods"]["gradcam"].update(objective=["mask"]),
        lambda r: r.pop("standings"),
        lambda r: r.update(standings=[]),
        lambda r: r.update(version=99),
        lambda r: r.update(n_resamples=10**9),
        lambda r: r.update(n_resamples=-1),
        lambda r: r.update(images=[]),
        lambda r: r.update(methods={}),
        lambda r: r["images"].pop(),
        lambda r: r["images"][0].update(id=7),
        lambda r: r["methods"]["gradcam"]["values"].pop(),
        lambda r: r["methods"]["gradcam"]["values"][0].update(metric="no such"),
        lambda r: r["methods"]["gradcam"]["values"][0].update(values="words"),
        lambda r: r["methods"]["gradcam"]["values"][0]["values"].append(1.0),
        lambda r: r["methods"]["gradcam"]["scores"].update(deletion=[[1.0]]),
        lambda r: r["standings"][0].update(mean="much"),
        lambda r: r["standings"][0].update(column="no such"),
        lambda r: r["protocol"].update(seed="0"),
        lambda r: r.update(n_resamples=200.5),
    ],
)
def test_what_does_not_fit_together_is_an_error_for_a_person(data, change):
    record = json.loads(data)
    change(record)
    with pytest.raises(PackError, match="run xattn compare again"):
        parse(json.dumps(record).encode())


# ---------------------------------------------------------------------- the page


def script() -> None:
    import streamlit as st

    from xattn.app import state
    from xattn.app.pages.compare import page as compare

    compare.page(state.Context(state.library(), None, st.query_params.to_dict()))


def shown(**params: str) -> AppTest:
    return opened(script, **params)


def texts(page: AppTest) -> str:
    kinds = (page.subheader, page.markdown, page.caption, page.info, page.warning, page.error)
    return "\n".join(element.value for kind in kinds for element in kind)


def test_without_a_comparison_the_page_says_how_to_make_one(tmp_path, monkeypatch):
    found = Library(tmp_path)
    monkeypatch.setattr(state, "library", lambda: found)
    page = shown()
    assert "no comparison yet" in texts(page) and "xattn compare" in page.code[0].value


def test_the_leaderboard_has_intervals_directions_and_words(library):
    page = shown(board=ids(library)["first"], metric="insertion")
    table = page.dataframe[0].value
    assert list(table["mean"]) == sorted(table["mean"], reverse=True)
    standing = dict(zip(table["method"], table["standing"], strict=True))
    assert "best" in standing.values() and standing["All ones"] == "a mask, not ranked"
    assert dict(zip(table["method"], table["row"], strict=True))["Random"] == "sanity row"
    assert all(" to " in interval for interval in table["95 % interval"])
    assert "while pixels come back" in texts(page) and "Higher is better" in texts(page)
    ranks = page.dataframe[1].value.set_index("method")
    assert set(ranks.index) == {"Grad-CAM", "Saliency"} and list(ranks["rank"]) == [1, 2]
    assert set(ranks["rank set, 95 %"]) == {"1 to 2"} and ranks["first in"].sum() == pytest.approx(
        100
    )
    assert "of how many interquartile ranges" in texts(page)
    everything = page.dataframe[2].value
    assert {"AD@50 ↓", "insertion ↑", "ROAD ↑"} <= set(everything.columns)
    assert everything["insertion ↑"].str.contains("no clear difference|best").any()


def test_metrics_that_a_head_was_trained_on_are_marked(tmp_path, monkeypatch):
    write_report(trained(), tmp_path / "first")
    found = Library(tmp_path)
    monkeypatch.setattr(state, "library", lambda: found)
    page = shown(metric="AD@50")
    table = page.dataframe[0].value
    assert list(table.loc[table["†"] == "†", "method"]) == ["Grad-CAM"]
    assert texts(page).count("† close to this head's training") == 2, "of both tables"
    assert "its training" in "\n".join(m.value for m in page.markdown), "who is best, in words"
    everything = page.dataframe[1].value.set_index("method")
    assert "†" in everything.loc["Grad-CAM", "AD@50 ↓"]
    assert "†" not in everything.loc["Grad-CAM", "ROAD ↑"] + everything.loc["Saliency", "AD@50 ↓"]
    other = shown(metric="ROAD")
    assert "†" not in other.dataframe[0].value
    said = r"The training of Grad\-CAM is close to AD\@50\."
    assert said in texts(shown(part="Photos", sx="AD@50", sy="ROAD"))
    pairs = {"part": "Maps", "shown": ["saliency", "gradcam"]}
    assert said in texts(shown(**pairs, by="AD@50"))
    assert "The training" not in texts(shown(**pairs, by="ROAD"))


def test_lower_is_better_turns_the_order(library):
    table = shown(board=ids(library)["first"], metric="AD@50").dataframe[0].value
    assert list(table["mean"]) == sorted(table["mean"])


def test_warnings_are_shown_as_text(library, made, tmp_path, monkeypatch):
    record = json.loads((made / "first" / LEADERBOARD).read_bytes())
    record["warnings"] = ["<img src=x onerror=alert(1)> [link](http://a)"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / LEADERBOARD).write_text(json.dumps(record))
    found = Library(tmp_path)
    monkeypatch.setattr(state, "library", lambda: found)
    assert r"\<img src\=x onerror\=alert\(1\)\> \[link\]" in texts(shown())


def test_two_warnings_stand_above_the_chart_and_the_others_below(
    library, made, tmp_path, monkeypatch
):
    record = json.loads((made / "first" / LEADERBOARD).read_bytes())
    record["warnings"] = ["one", "two", "three", "four"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / LEADERBOARD).write_text(json.dumps(record))
    found = Library(tmp_path)
    monkeypatch.setattr(state, "library", lambda: found)
    page = shown()
    assert [w.value for w in page.warning] == ["one", "two"]
    notes = page.expander[-1]
    assert notes.label == "2 more notes about these results"
    assert notes.markdown[0].value == "- three\n- four"
    kinds = [child.type for child in page.main.children.values()]
    assert kinds.index("warning") < kinds.index("tab_container") < len(kinds) - 1


def test_curves_of_the_chosen_methods(library):
    page = shown(board=ids(library)["first"], part="Curves")
    assert "Deletion" in texts(page) and "Lower is better" in texts(page)
    assert len(page.get("vega_lite_chart")) == 2
    few = shown(board=ids(library)["first"], part="Curves", lines="gradcam")
    assert few.multiselect(key="lines").value == ["gradcam"]


def test_photos_as_dots(library):
    page = shown(board=ids(library)["first"], part="Photos", sx="AD@50", sy="ROAD")
    assert (page.selectbox(key="sx").value, page.selectbox(key="sy").value) == ("AD@50", "ROAD")
    assert "click one to open it" in texts(page)
    plain = shown(board=ids(library)["without pictures"], part="Photos", sy="ROAD")
    assert "Each dot is a photo." in texts(plain) and "1 have no value" in texts(plain)


def matrix(page):
    """The cells of the photos on which methods differ most, by their kind."""
    cells = [e for e in page.get("bidi_component") if "cells" in e.proto.json]
    shown = json.loads(cells[0].proto.json)
    photos = [c for c in shown["cells"] if "span" in c]
    headings = [c["title"] for c in shown["cells"] if c.get("wide")]
    maps = [c for c in shown["cells"] if "src" in c and "span" not in c]
    assert shown["columns"] == 1 + len(maps) / len(photos) and len(headings) == len(photos)
    return photos, headings, maps


def test_photos_on_which_methods_differ_most_come_first(library):
    page = shown(board=ids(library)["first"], part="Maps", shown=["gradcam", "random"], by="ROAD")
    _, headings, maps = matrix(page)
    apart = [float(heading.rsplit(" ", 1)[1]) for heading in headings]
    assert len(apart) == IMAGES and apart == sorted(apart, reverse=True)
    assert [c["title"] for c in maps[:2]] == ["Grad-CAM", "Random"]
    assert maps[0]["lines"][0].startswith("ROAD: ")
    pack = library.open(library.comparisons()[0].pack_id)
    sides = [
        pack.entries[pack.entries["method"] == m].set_index("image_id")
        for m in ("gradcam", "random")
    ]
    assert apart[0] == pytest.approx((sides[0]["ROAD"] - sides[1]["ROAD"]).abs().max(), abs=1e-2)


def test_photos_by_the_order_of_the_maps_of_three_methods(library):
    names = ["gradcam", "saliency", "random"]
    page = shown(board=ids(library)["first"], part="Maps", shown=names, by="maps")
    photos, headings, maps = matrix(page)
    found = [float(heading.rpartition("rank correlation ")[2]) for heading in headings]
    assert len(found) == IMAGES and found == sorted(found)
    assert [c["title"] for c in maps[:3]] == ["Grad-CAM", "Saliency", "Random"]
    for i, photo in enumerate(photos):  # each row has one photo
        assert {c["id"].partition("@")[0] for c in maps[3 * i : 3 * i + 3]} == {
            photo["id"].removeprefix("photo ").partition("@")[0]
        }


def test_a_damaged_map_leaves_the_other_photos(tmp_path, monkeypatch):
    write_report(results(), tmp_path / "first")
    methods = ("gradcam", "saliency")
    folder = small_pack(tmp_path / "first" / "pack", IMAGES, methods)
    data = bytearray((folder / MAPS).read_bytes())
    data[len(data) // 2] ^= 64
    (folder / MAPS).write_bytes(data)
    found = Library(tmp_path)
    pack = found.open(found.comparisons()[0].pack_id)
    bad = [entry_id for entry_id in pack.entries.index if not readable(pack, entry_id)]
    monkeypatch.setattr(state, "library", lambda: found)
    page = shown(board=ids(found)["first"], part="Maps", shown=methods, by="maps")
    assert "One photo has a map that cannot be read" in texts(page)
    photos = {cell["title"] for cell in matrix(page)[0]}
    (damaged,) = pack.images["title"].loc[pack.entries.loc[bad, "image_id"]]
    assert photos == set(pack.images["title"]) - {damaged}


def readable(pack, entry_id):
    try:
        return pack.explanation(entry_id) is not None
    except PackError:
        return False


def test_without_pictures_photos_are_named(library):
    pair = ["gradcam", "random"]
    page = shown(board=ids(library)["without pictures"], part="Maps", shown=pair)
    table = page.dataframe[0].value
    assert "no pictures" in texts(page) and not page.get("bidi_component")
    assert set(table["photo"]) == {f"photo {i}.jpg" for i in range(12)}
    apart = (table["Grad-CAM"].astype(float) - table["Random"].astype(float)).abs()
    shown_apart = list(table["difference"].astype(float))
    assert shown_apart == pytest.approx(list(apart), abs=0.02)
    assert shown_apart == sorted(shown_apart, reverse=True)


def test_one_method_alone_is_not_compared(library):
    page = shown(board=ids(library)["first"], part="Maps", shown="gradcam")
    assert "two or more methods" in texts(page)


def test_the_first_metric_is_one_that_no_mask_wins(tmp_path, monkeypatch):
    found = results()
    found.methods["ones"].values[COLUMNS[0]][:] = 0.0  # average drop, of which lower is better
    write_report(found, tmp_path / "first")
    library = Library(tmp_path)
    monkeypatch.setattr(state, "library", lambda: library)
    page = shown()
    assert page.selectbox(key="metric").value == "insertion"
    assert "Grad-CAM" in set(page.dataframe[0].value["method"])


def test_the_header_names_the_pack_of_the_comparison(library, made):
    small_pack(made / "other", 2, ("gradcam",))

    def script():
        import streamlit as st

        from xattn.app import state
        from xattn.app.pages.compare import page as compare

        library = state.library()
        pack = library.open(st.query_params["pack"])
        compare.page(state.Context(library, pack, st.query_params.to_dict()))

    other = next(info.id for info in library.packs() if info.name == "other")
    page = opened(script, pack=other)
    own = library.comparisons()[0].pack_id
    assert page.query_params["pack"] in (own, [own])


def test_an_address_restores_the_view_and_nonsense_is_passed_over(library):
    page = shown(board=ids(library)["without pictures"], metric="ROAD")
    assert page.selectbox(key="metric").value == "ROAD"
    other = shown(board="gone", metric="no such", part="no such", a="<b>", by="x")
    assert "no longer exists" in texts(other) and other.selectbox(key="metric").value == "AD@50"


def test_a_damaged_comparison_is_a_message_and_others_still_open(tmp_path, monkeypatch):
    write_report(results(), tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / LEADERBOARD).write_text("{}")
    found = Library(tmp_path)
    monkeypatch.setattr(state, "library", lambda: found)
    page = shown(board=ids(found)["bad"])
    assert any("cannot be shown" in e.value for e in page.error)
    page.selectbox(key="board").set_value(ids(found)["good"]).run()
    assert not page.exception and page.dataframe


@pytest.fixture(scope="module")
def boards(tmp_path_factory) -> Path:
    """A folder with a board of two photos, whose HTML file was replaced."""
    root = tmp_path_factory.mktemp("boards")
    (root / "photos").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{i}.png")
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 8, 8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    )  # fmt: skip
    job = Comparison(backbone=load_backbone(network.eval(), input_size=32), explainers=("gradcam",))
    make_board(
        root / "ours", job, str(root / "photos"), card_photos=0, groups=("squares",), progress=False
    )
    (root / "ours" / "index.html").write_text("a page from elsewhere")
    return root


def test_a_board_is_shown_from_its_values(boards, monkeypatch):
    monkeypatch.setattr(state, "library", lambda: Library(boards))
    page = shown()
    assert page.selectbox(key="board").options == ["ours (board)"]
    (shown_board,) = (element.proto.body for element in page.get("html"))
    assert "<h1>ours</h1>" in shown_board and "gradcam" in shown_board
    assert "elsewhere" not in shown_board


def test_a_damaged_board_is_a_message(boards, tmp_path, monkeypatch):
    shutil.copytree(boards / "ours", tmp_path / "ours")
    (tmp_path / "ours" / "rows" / "gradcam" / "values.csv").write_text("nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "board.json").write_text("{}")
    library = Library(tmp_path)
    monkeypatch.setattr(state, "library", lambda: library)
    for key in library.boards():
        page = shown(board=key)
        assert "The board cannot be shown" in page.error[0].value
        assert not page.get("html")
