"""What the gallery shows: filters, order, pages, and the URL that says so."""

import math
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest

pytest.importorskip("streamlit")

from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_series_equal
from pandas_selection import make_table, select
from synthetic_packs import CLASSES, METRICS, explanation
from viewer_pages import only

from xattn.app.pictures.rendering import COLOURS, SCALES
from xattn.app.triage import maps_table, selection
from xattn.app.triage.maps_table import SORTS, MapsTable
from xattn.app.triage.selection import ALL, NAMES, Selection, View, defaults, parse
from xattn.packs.explanation import ImageFacts
from xattn.packs.reader import Pack
from xattn.packs.writer import pack_writer, save_pack


@pytest.fixture(scope="module")
def table(pack):
    return selection.table(pack)


ODD = {"AD@50": {"higher_is_better": False, "formula": "", "protocol_id": ""}}


def odd_photos():
    """Photos without a label, without a figure, with several classes, with names of every kind."""
    for i, name in enumerate(["<b>x<b>", 'a "quote"', "😀.jpg", "تصویر.jpg", "École.jpg"]):
        facts = ImageFacts(((i, CLASSES[i], 0.5),), None if i == 0 else i, None)
        about = {
            "file_name": name,
            "facts": facts,
            "metrics": {"AD@50": float(i)} if i != 2 else {},
        }
        yield [
            explanation(i, target=i + t, probability=p, **about) for t, p in ((0, 0.5), (1, 0.3))
        ]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    found = [e for group in odd_photos() for e in group]
    save_pack(root / "pack", found, overlays=False, metrics=ODD)
    return only(root)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The same in three shards, below a folder whose name has marks with a meaning."""
    folder = tmp_path_factory.mktemp("sharded") / "key=1" / "a[1]*?"
    folder.parent.mkdir()
    with pack_writer(folder, photos=2) as writer:
        writer.metrics = ODD
        for group in odd_photos():
            writer.add(group)
    return Pack(folder)


def shown(table, **changes):
    return Selection(table, replace(defaults(table.choices), **changes)).rows()


# ---------------------------------------------------------------------- order


def test_without_parameters_the_first_method_is_shown_in_the_packs_order(pack, table):
    view, messages = parse({}, table.choices)
    rows = Selection(table, view).rows()
    assert messages == []
    assert list(rows.index) == list(pack.entries.index[pack.entries["method"] == "gradcam"])


def test_a_control_is_not_what_is_shown_first(tmp_path):
    save_pack(tmp_path / "p", [explanation(0, m) for m in ("random", "gradcam")], overlays=False)
    choices = selection.table(only(tmp_path)).choices
    assert choices.methods == ("random", "gradcam")
    assert choices.controls == {"random"}
    assert defaults(choices).method == "gradcam"


@pytest.mark.parametrize("key", ["confidence", "probability", "AD@50", "ROAD"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_measures_sort_both_ways(pack, table, key, order):
    values = shown(table, sort=key, order=order, maps="every")[f"measure:{key}"].tolist()
    assert len(values) == (pack.entries["method"] == "gradcam").sum()
    assert values == sorted(values, reverse=order == "desc")


@pytest.mark.parametrize("key", ["pack", "name", "disagreement", "AD@50"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_the_maps_of_all_methods_stay_together_by_photo(pack, table, key, order):
    rows = shown(table, method=ALL, sort=key, order=order)
    turns = [photo for photo, _ in groupby(rows["image_id"])]
    assert len(turns) == len(set(turns)) == pack.counts[1] and len(rows) > len(turns)
    if key == "AD@50":
        best = rows.groupby("image_id", sort=False)[f"measure:{key}"]
        values = list(best.min() if order == "asc" else best.max())
        assert values == sorted(values, reverse=order == "desc")


def test_disagreement_is_sorted_from_the_highest_down_unless_the_address_says_otherwise(table):
    choices = table.choices
    first, _ = parse({"sort": ["disagreement"]}, choices)
    turned, _ = parse({"sort": ["disagreement"], "order": ["asc"]}, choices)
    assert (first.order, turned.order) == ("desc", "asc")
    assert "order" not in first.params(choices) and turned.params(choices)["order"] == ["asc"]
    assert parse({"sort": ["confidence"]}, choices)[0].order == "asc"


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_missing_value_comes_last_and_equal_ones_keep_the_packs_order(odd, order):
    table = selection.table(odd)
    rows = shown(table, sort="AD@50", order=order, maps="every")
    values = rows["measure:AD@50"].tolist()
    assert all(math.isnan(v) for v in values[-2:])
    assert not any(math.isnan(v) for v in values[:-2])
    places = [odd.entry_ids.index(i) for i in rows.index]
    assert all(a < b for a, b in zip(places[::2], places[1::2], strict=True))


def test_names_sort_without_case_and_accents_composed(odd):
    names = shown(selection.table(odd), sort="name")["file_name"].tolist()
    assert names == sorted(names, key=maps_table.fold)


def test_the_packs_order_can_be_turned(table):
    assert list(shown(table, order="desc").index) == list(shown(table).index)[::-1]


# ---------------------------------------------------------------------- filters


def test_true_and_predicted_class_filter_together(pack, table):
    rows = shown(table, label=("1",), predicted=("0", "1"))
    wanted = pack.images[(pack.images["label"] == 1) & pack.images["predicted"].isin([0, 1])]
    assert set(rows["image_id"]) == set(wanted.index)
    assert len(rows)


@pytest.mark.parametrize("right", [True, False])
def test_right_and_wrong_are_all_photos_with_a_label(pack, table, right):
    rows = shown(table, right="right" if right else "wrong")
    wanted = [i for i, r in pack.images["right"].items() if r is right]
    assert list(rows["image_id"]) == wanted
    assert wanted


def test_a_photo_without_a_label_is_neither_right_nor_wrong(odd):
    table = selection.table(odd)
    both = [*shown(table, right="right")["image_id"], *shown(table, right="wrong")["image_id"]]
    assert "photo-00000" not in both
    assert len(both) == 4


def test_a_range_keeps_its_ends_and_drops_missing_values(odd):
    table = selection.table(odd)
    rows = shown(table, measure="AD@50", low=1.0, high=3.0)
    assert rows["measure:AD@50"].tolist() == [1.0, 3.0]
    assert len(shown(table, measure="AD@50", low=-5.0)) == 4


def test_only_the_most_probable_class_is_shown_unless_every_class_is_asked_for(odd):
    table = selection.table(odd)
    assert table.choices.several
    assert shown(table)["probability"].tolist() == [0.5] * 5
    assert len(shown(table, maps="every")) == 10


@pytest.mark.parametrize(
    ("search", "names"),
    [
        ("<B>", ["<b>x<b>"]),
        ("😀", ["😀.jpg"]),
        ("تصویر", ["تصویر.jpg"]),
        ("e\u0301cole", ["École.jpg"]),
        ("photo-00001", ['a "quote"']),
        (".*", []),
        ("jpg 00003", ["تصویر.jpg"]),
    ],
)
def test_search_finds_words_of_file_class_and_id_as_text(odd, search, names):
    assert shown(selection.table(odd), q=search)["file_name"].tolist() == names


def test_search_finds_true_and_predicted_class(pack, table):
    rows = shown(table, q="TRILOBITE")
    images = pack.images
    wanted = images[
        (images["label_name"] == "trilobite") | (images["predicted_name"] == "trilobite")
    ]
    assert set(wanted.index) <= set(rows["image_id"])
    assert not len(shown(table, q="trilobite zebra"))


@pytest.mark.parametrize("changes", [{}, {"label": ("1", "2")}, {"low": 0.5, "q": "photo"}])
def test_a_histogram_counts_the_maps_of_a_view_without_its_range(pack, table, changes):
    view = replace(defaults(table.choices), measure="ROAD", **changes)
    found = Selection(table, replace(view, low=None)).rows()["measure:ROAD"]
    measure = table.choices.measures["ROAD"]
    wanted, _ = np.histogram(found, selection.BINS, (measure.low, measure.high))
    assert selection.histogram(pack, view) == wanted.tolist()


def test_missing_values_are_in_no_bar(odd):
    view = replace(defaults(selection.table(odd).choices), measure="AD@50")
    counts = selection.histogram(odd, view)
    assert sum(counts) == 4
    assert (counts[0], counts[-1]) == (1, 1)


@pytest.mark.parametrize("values", [(0.5, 0.5), (-1e30, 1e30)])
def test_equal_values_and_those_too_far_apart_have_no_histogram(tmp_path, values):
    found = [explanation(i, metrics={"AD@50": value}) for i, value in enumerate(values)]
    save_pack(tmp_path / "pack", found, overlays=False, metrics=ODD)
    far = only(tmp_path)
    view = replace(defaults(selection.table(far).choices), measure="AD@50")
    assert selection.histogram(far, view) == []
    assert Selection(selection.table(far), replace(view, sort="AD@50")).count == 2


def test_two_classes_of_one_name_are_told_apart():
    names = maps_table.class_names({"134": "crane", "517": "crane", "1": "hen"})
    assert names == {"134": "crane (134)", "517": "crane (517)", "1": "hen"}


# ---------------------------------------------------------------------- neighbours and pages


def test_neighbours_are_those_of_the_view(table):
    found = Selection(table, replace(defaults(table.choices), sort="ROAD", order="desc"))
    ids = found.rows()["image_id"].tolist()
    assert found.neighbours(ids[0]) == (None, ids[1], 1, 9)
    assert found.neighbours(ids[4]) == (ids[3], ids[5], 5, 9)
    assert found.neighbours(ids[-1]) == (ids[-2], None, 9, 9)
    assert found.neighbours("another") == (None, None, 0, 9)


def test_a_part_of_a_selection_is_that_of_the_whole(table):
    found = Selection(table, replace(defaults(table.choices), method=ALL, sort="AD@50"))
    whole = list(found.rows().index)
    assert found.count == len(whole) == 27
    assert list(found.rows(5, 7).index) == whole[5:12]
    assert list(found.rows(25, 7).index) == whole[25:]
    assert found.rows(27, 7).empty
    assert found.ids(4) == whole[:4]
    assert found.ids() == whole


def test_pages_hold_all_maps():
    assert [selection.pages(n, 24) for n in (0, 1, 24, 25, 48, 10_000)] == [1, 1, 1, 2, 2, 417]


# ---------------------------------------------------------------------- URL


def test_a_bad_parameter_leaves_the_default_and_says_so(table):
    bad = {
        "method": ["nothing"],
        "sort": ["<script>"],
        "order": ["up"],
        "page": ["0"],
        "size": ["1000"],
        "label": ["1", "no class"],
        "right": ["maybe"],
        "measure": ["AD@50"],
        "low": ["nan"],
        "high": ["1e999"],
        "another": ["page's"],
    }
    view, messages = parse(bad, table.choices)
    assert view == replace(defaults(table.choices), label=("1",), measure="AD@50")
    assert [m.partition(":")[0] for m in messages] == [
        "method",
        "sort",
        "order",
        "size",
        "right",
        "label",
        "page",
        "low",
        "high",
    ]


def test_a_range_that_is_upside_down_is_not_used(table):
    view, messages = parse({"measure": ["ROAD"], "low": ["3"], "high": ["2"]}, table.choices)
    assert (view.low, view.high) == (None, None)
    assert len(messages) == 1


def test_a_range_of_an_unknown_measure_is_not_put_on_another(table):
    view, messages = parse({"measure": ["?"], "low": ["3"]}, table.choices)
    assert view.low is None
    assert len(messages) == 1


TEXTS = st.text(max_size=30) | st.sampled_from(
    ["", "0", "-1", "1e400", "nan", "1" * 50, "٣", "all", "../../etc/passwd", "%00", "\x00", "1_0"]
)


LIMITS = st.none() | st.floats(-1e9, 1e9)
VIEWS = st.builds(
    View,
    method=st.sampled_from(["gradcam", "saliency", ALL]),
    maps=st.sampled_from(list(selection.MAPS)),
    sort=st.sampled_from([*SORTS, "confidence", *METRICS]),
    order=st.sampled_from(selection.ORDERS),
    show=st.sampled_from(selection.SHOWS),
    part=st.sampled_from(selection.PARTS),
    scale=st.sampled_from(SCALES),
    colours=st.sampled_from(COLOURS),
    size=st.sampled_from(selection.SIZES),
    page=st.integers(1, 10**6),
    q=(
        st.text(max_size=20) | st.sampled_from(["jpg", "PHOTO-0000", "shark tench", "é", "<B>"])
    ).map(lambda t: " ".join(t.split())),
    label=st.lists(st.sampled_from("1235"), unique=True, max_size=3).map(tuple),
    predicted=st.lists(st.sampled_from("1235"), unique=True, max_size=3).map(tuple),
    right=st.sampled_from(list(selection.RIGHT)),
    measure=st.sampled_from([*METRICS]),
    low=LIMITS,
    high=LIMITS,
    tag=st.lists(st.sampled_from(["odd", "look again"]), unique=True).map(tuple),
    rating=st.sampled_from(list(selection.RATINGS)),
    note=st.sampled_from(list(selection.NOTES)),
).filter(lambda v: v.low is None or v.high is None or v.low <= v.high)


@pytest.fixture(scope="module")
def compared(pack, odd, sharded):
    """Tables of both formats, each with its maps as pandas has them."""
    rows = [make_table(p.images, p.entries, p.metrics) for p in (pack, odd, odd)]
    return list(zip(map(MapsTable, (pack, odd, sharded)), rows, strict=True))


@pytest.mark.slow
@settings(max_examples=500)
@given(view=VIEWS)
def test_every_view_is_what_pandas_selects(compared, view):
    as_pandas_selects(compared, view)


@settings(max_examples=40)
@given(view=VIEWS)
def test_views_are_what_pandas_selects(compared, view):
    as_pandas_selects(compared, view)


def as_pandas_selects(compared, view):
    for table, rows in compared:
        measures = table.choices.measures
        if view.measure in measures and view.sort in {**SORTS, **measures}:
            wanted, found = select(rows, view), Selection(table, view).rows()
            assert list(found.index) == list(wanted.index)
            for name in found:
                assert_series_equal(
                    found[name], wanted[name], check_dtype=False, check_index_type=False
                )


KNOWN = ["gradcam", "saliency", *SORTS, *METRICS, *map(str, range(10)), "desc", "wrong"]
URLS = st.dictionaries(
    st.sampled_from([*NAMES, "pack"]) | st.text(max_size=3),
    st.lists(TEXTS | st.sampled_from(KNOWN), max_size=2),
    max_size=6,
)


@pytest.mark.slow
@settings(max_examples=2000)
@given(url=URLS)
def test_what_every_url_gives_can_be_shown(pack, table, url):
    can_be_shown(pack, table, url)


@settings(max_examples=40)
@given(url=URLS)
def test_what_any_url_gives_can_be_shown(pack, table, url):
    can_be_shown(pack, table, url)


def can_be_shown(pack, table, url):
    view, messages = parse(url, table.choices)
    assert all(len(m) < 200 for m in messages)
    again, messages = parse(view.params(table.choices), table.choices)
    assert messages == []
    found = Selection(table, view)
    assert set(found.ids()) <= set(pack.entry_ids)
    assert Selection(table, again).ids() == found.ids()


@settings(max_examples=200)
@given(view=VIEWS)
def test_a_view_comes_back_from_its_url_and_from_its_text(table, view):
    if view.low is None and view.high is None:  # a measure alone is no filter
        view = replace(view, measure=defaults(table.choices).measure)
    assert parse(view.params(table.choices), table.choices) == (view, [])
    assert selection.from_text(selection.to_text(view, table.choices), table.choices) == view
