"""The report page: whole HTML, names as text, nothing fetched, equal bytes, and true numbers."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import eval_fakes as fakes
import numpy as np
import pytest
from eval_fakes import FakeBackbone
from PIL import Image

from xattn.backbone import Preprocessing
from xattn.eval import Column, Protocol, evaluate
from xattn.eval.evaluation.results import ImageRecord, MethodResult, Results
from xattn.eval.evaluation.store import ImageRow, ResultRow, Store
from xattn.eval.evaluation.stream import Skipped
from xattn.eval.metrics import create_metric
from xattn.eval.report.html_page import html_page
from xattn.eval.report.results_files import from_dict, to_dict
from xattn.eval.report.standings import standings
from xattn.photos.images import load_image
from xattn.photos.view import prepare

BOTH = (Column("deletion"), Column("insertion"))
VOID = {"meta", "link", "input", "img", "wbr"}
EVIL = """</script><img src=x onerror="alert('&amp;')">{{data}}"""


class Page(HTMLParser):
    """What a browser makes of a page: elements with attributes, text, and the embedded data."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.words, self.scripts = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == [], "every element is closed"
        (source,) = [text for kind, text in self.scripts if kind == "application/json"]
        self.data = json.loads(source, parse_constant=pytest.fail)
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = kind, text + data
        elif "style" not in self.open:
            self.words.append(data)


def page(results, state=None, photos=None, preprocessing=None):
    table = standings(results)
    return html_page(results, table, state=state, photos=photos or {}, preprocessing=preprocessing)


def made_up(n=6, columns=BOTH, seed=0, **methods):
    """Results of random values; a method's array is added to all its columns."""
    rng = np.random.default_rng(seed)
    records = {}
    for name, shift in methods.items():
        values = {c: rng.uniform(0.2, 0.3, n) + shift for c in columns}
        valid = np.isfinite(values[columns[0]])
        records[name] = MethodResult(2, False, valid, {}, values)
    images = [ImageRecord(f"{i}.jpg", i % 3, f"class {i % 3}", 0.5) for i in range(n)]
    return Results(Protocol(n=n, n_invalid=0), images, records, n_resamples=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real evaluation of seven images with its state."""
    rows = fakes.rows()
    rows["flat"] = fakes.Flat(FakeBackbone())
    state = tmp_path_factory.mktemp("run") / "state.sqlite"
    protocol = Protocol(view="tensor")
    probes = [create_metric("masking", protocol), create_metric("insertion-deletion", steps=6)]
    results = evaluate(
        FakeBackbone(),
        rows,
        fakes.images(7),
        metrics=probes,
        protocol=protocol,
        max_forward_batch=8,
        progress=False,
        state=state,
    )
    return replace(results, n_resamples=200), state


def test_the_page_is_whole_html_with_one_row_a_method(run):
    results, state = run
    parsed = Page(page(results, state))
    heads = [a for tag, a in parsed.elements if tag == "th" and "aria-sort" in a]
    assert len(heads) == 1 + len(results.columns) + 2
    assert [m["name"] for m in parsed.data["methods"]] == list(results.methods)
    for words in (results.protocol.id, "fake", "sanity row", "mask", "7 invalid", "level with"):
        assert words in parsed.text
    assert "flat: 7 invalid maps" in parsed.text, "warnings are in the page"
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    script = (resources.files("xattn.eval.report") / "page" / "report.js").read_text()
    assert set(re.findall(r'byId\("([\w-]+)"\)', script)) <= set(ids)


def test_cells_show_the_tables_numbers(run):
    results, _ = run
    source = page(results)
    for s in standings(results):
        if s.n:
            assert f"data-v={s.mean!r} " in source
        assert s.n or s.method in ("flat", "ones"), "all-ones ranks no pixels"


def test_two_calls_and_a_round_trip_through_json_give_equal_bytes(run):
    results, state = run
    first = page(results, state)
    assert page(results, state) == first
    for method in results.methods.values():
        method.seconds += 1.5
    assert page(from_dict(json.loads(json.dumps(to_dict(results)))), state) == first


def test_nothing_is_fetched_but_the_seconds_beside_the_page(run):
    results, state = run
    source = page(results, state)
    found = [a[k] for _, a in Page(source).elements for k in ("src", "href") if k in a]
    assert {x for x in found if not x.startswith(("data:", "#"))} == {"seconds.js"}
    rest = source.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    for word in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert word not in rest


def test_names_are_text_everywhere(tmp_path):
    results = made_up(**{EVIL: 0.0, "centre": 0.0, "dead": np.nan})
    results.images[0] = ImageRecord(EVIL, 0, EVIL, 0.5)
    results.methods["dead"].reasons[0] = results.methods["centre"].failed[0] = EVIL
    results.skipped.append(Skipped(EVIL, EVIL))
    results.backbone["name"] = EVIL
    results.notes[EVIL] = EVIL
    source = page(results)
    parsed = Page(source)
    plain = Page(page(made_up(mine=0.0, centre=0.0, dead=np.nan)))
    tags = [
        sum(tag == t for tag, _ in p.elements) for p in (parsed, plain) for t in ("img", "script")
    ]
    assert tags[:2] == tags[2:] == [0, 3]
    assert parsed.data["methods"][0]["name"] == EVIL
    assert parsed.data["images"]["0"] == {"id": EVIL, "class": EVIL, "p": 0.5}
    assert parsed.text.count(EVIL) >= 9


def test_a_file_name_that_is_no_utf8_can_be_written():
    results = made_up(mine=np.nan, centre=0.0)
    results.images[0] = ImageRecord(b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), 0, "x", 0.5)
    assert "caf\\udce9.jpg" in page(results).encode("utf-8").decode()


def test_without_state_and_photos_there_are_no_pictures(run):
    data = Page(page(run[0])).data
    assert data["maps"] == data["photos"] == {}
    assert data["cases"] and data["curves"]


# ---------------------------------------------------------------- marks


def test_best_is_bold_and_level_methods_and_better_sanity_rows_are_marked():
    columns = (Column("deletion"),)
    results = made_up(n=12, columns=columns, mine=0.2, twin=0.2, poor=0.6, centre=-0.15)
    mine, twin = (results.methods[n].values[Column("deletion")] for n in ("mine", "twin"))
    twin[:] = mine + np.array(6 * [1, -1.05]) * 1e-3
    source = page(results)
    rows = dict(
        re.findall(r"<tr[^>]*><th scope=row class=name>(\w+).*?</th>(<td .*?)</tr>", source)
    )
    assert "<b>" in rows["twin"] and "★" in rows["twin"]
    assert "<b>" not in rows["mine"] and "≈" in rows["mine"]
    assert not re.search("[★≈!]", rows["poor"])
    assert "!" in rows["centre"] and "better than the best method" in rows["centre"]


def test_a_row_with_fewer_images_says_so():
    results = made_up(mine=0.1, centre=0.2)
    results.methods["mine"].values[Column("insertion")][2:] = np.nan
    assert page(results).count("<small>n = 2</small>") == 1


def test_small_values_are_not_shown_as_zero():
    results = made_up(columns=(Column("infidelity"),), mine=0.0, centre=0.0)
    for method in results.methods.values():
        method.values[Column("infidelity")] *= 1e-5
    assert re.search(r">[2]\.\d\de-06<", page(results))
    assert "0.0000" not in page(results)


def test_what_a_head_was_trained_on_is_marked_and_said():
    columns = (Column("AD", 0.5), Column("insertion"))
    results = made_up(n=12, columns=columns, **{EVIL: -0.2}, rival=0.0, randomized_head=0.5)
    results.methods[EVIL].values[columns[1]] -= 0.1
    for name in (EVIL, "randomized_head"):
        results.methods[name].objective = "mask"
    source = page(results)
    parsed = Page(source)
    assert f"{EVIL}: best only close to its training: AD@50" in parsed.text
    assert "rival: best in insertion" in parsed.text
    assert parsed.text.count("† close to this head's training") == 3, "legend and two cells"
    assert "If it is best here, its training worked" in parsed.text
    assert [m["trained"] for m in parsed.data["methods"]] == [[0], [], [0]]
    cells = re.findall(r"<td data-kind=0.*?</td>", source)
    assert [("†" in cell, "<i class=dagger></i>" in cell) for cell in cells] == [
        (True, False), (False, False), (False, True), (False, False), (True, False), (False, False),
    ]  # fmt: skip
    assert "<td>✓ †</td>" in source, "beating the sanity rows there is no surprise, either"


def test_without_trained_heads_there_is_no_dagger(run):
    results, state = run
    assert "†" not in Page(page(results, state)).text
    assert [m["trained"] for m in Page(page(results, state)).data["methods"]] == [[]] * 5


# ---------------------------------------------------------------- sanity rows


def test_the_verdicts_are_those_of_the_warnings():
    results = made_up(n=12, mine=0.0, poor=0.2, centre=0.2, dead=np.nan)
    source = page(results)
    table = source[source.index('<table class="sanity">') :]
    rows = dict(re.findall(r"<tr><th scope=row class=name>(\w+)</th>(.*?)</tr>", table))
    lines = results.warnings()
    for name in ("mine", "poor"):
        for cell, metric in zip(rows[name].split("</td>"), ("deletion", "insertion"), strict=False):
            told = any(x.startswith(f"{name} does not beat") and metric in x for x in lines)
            assert ("✗ centre" in cell) == told and ("✓" in cell) != told
    assert rows["dead"] == "<td>-</td><td>-</td>"
    assert "does not beat the centre prior</b> in some: <span class=name>mine" in source
    assert (
        "does not beat the centre prior</b> in any judged column: <span class=name>poor" in source
    )


def test_a_verdict_names_the_levels_at_which_a_sanity_row_is_not_beaten():
    columns = (Column("AD", 0.5), Column("AD", 0.15))
    results = made_up(n=12, columns=columns, mine=0.0, centre=0.0)
    results.methods["centre"].values[columns[0]] += 9
    assert "<ul><li>✗ centre @15</li></ul>" in page(results)


def test_a_method_that_survives_randomisation_is_named_above_the_table():
    column = Column("randomization-Spearman")
    results = made_up(n=8, columns=(column,), edges=0.6, mine=-0.2, centre=0.0)
    source = page(results)
    assert "survives weight randomisation</b>: <span class=name>edges</span></li>" in source


# ---------------------------------------------------------------- curves, points, cases


def test_the_area_under_a_drawn_curve_is_the_tables_mean(run):
    results, _ = run
    charts = {c["key"]: c for c in Page(page(results)).data["curves"]}
    assert set(charts) == {"deletion", "insertion"}
    for key, chart in charts.items():
        assert chart["x"][0] == 0 and chart["x"][-1] == 1
        for m, (mean, lo, hi, n) in chart["lines"].items():
            name = list(results.methods)[int(m)]
            assert n == 7 and all(a <= b <= c for a, b, c in zip(lo, mean, hi, strict=True))
            area = (
                np.trapezoid(mean, chart["x"])
                if hasattr(np, "trapezoid")
                else np.trapz(mean, chart["x"])
            )
            assert area == pytest.approx(results.mean(name, key), abs=1e-4)
    flat, bright = (str(list(results.methods).index(n)) for n in ("flat", "bright"))
    assert flat not in charts["deletion"]["lines"] and bright in charts["deletion"]["lines"]


def test_road_curves_stand_at_their_levels_and_nowhere_without_them():
    results = made_up(mine=0.0)
    results.methods["mine"].scores["morf"] = np.full((6, 3), 0.5)
    assert Page(page(results)).data["curves"] == []
    results.options["ROAD-MoRF"] = {"levels": [0.1, 0.5, 0.9]}
    (chart,) = Page(page(results)).data["curves"]
    assert chart["x"] == [0.1, 0.5, 0.9] and chart["lines"]["0"][0] == [0.5] * 3


def test_cases_are_a_methods_own_extremes(run):
    results, state = run
    data = Page(page(results, state)).data
    keys = [data["columns"][case["column"]]["key"] for case in data["cases"]]
    assert keys == ["AD@50", "deletion", "insertion"]
    for case in data["cases"]:
        column = results.columns[case["column"]]
        ((m, best, worst),) = case["methods"]
        assert data["methods"][m]["name"] == "bright", (
            "neither sanity rows nor a row without values"
        )
        values = results.methods["bright"].values[column]
        order = np.argsort(values if column.metric != "insertion" else -values, kind="stable")
        assert [i for i, _ in best] == order[:2].tolist()
        assert [i for i, _ in worst] == order[::-1][:2].tolist()
        assert {f"{m}:{i}" for i, _ in best + worst} <= set(data["maps"])


def test_few_images_are_not_best_and_worst_at_once():
    case = Page(page(made_up(n=3, mine=0.0))).data["cases"][0]
    ((_, best, worst),) = case["methods"]
    assert len(best) == 2 and len(worst) == 1
    assert not {i for i, _ in best} & {i for i, _ in worst}


def test_many_images_and_methods_do_not_swell_the_page(monkeypatch):
    monkeypatch.setattr("xattn.eval.report.html_data.MAX_VALUES", 400)
    results = made_up(n=1000, **{f"method {i}": 0.1 * i for i in range(10)})
    data = Page(page(results)).data
    assert len(data["points"]) == 20 and data["points"][-1] == 999 and data["n"] == 1000
    assert [len(row) for method in data["values"] for row in method] == [20] * 20
    assert [len(case["methods"]) for case in data["cases"]] == [8, 8]
    first = data["methods"][data["ranked"][0]]["name"]
    assert first in ("method 0", "method 9"), "deletion ranks one way, insertion the other"


# ---------------------------------------------------------------- pictures


def decoded(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_maps_are_coloured_by_inferno_and_found_by_position(tmp_path):
    """A photo that is listed twice, and one that was skipped in between."""
    from matplotlib import colormaps

    results = made_up(n=3, columns=(Column("deletion"),), mine=0.0)
    results.images[2] = results.images[0]
    store = Store(tmp_path / "state #1?.sqlite", {})
    positions = (0, 2, 3)
    store.add_images(
        [ImageRow(p, i.id, 0, "x", 0.5) for p, i in zip(positions, results.images, strict=True)]
    )
    store.add_images([ImageRow(1, results.images[0].id, None, None, None, "truncated")])
    for position in positions:
        store.add(ResultRow(position, "mine", None, 0, 1, 0.1, {}, {}, png(50 * position)))
    store.close()
    maps = Page(page(results, tmp_path / "state #1?.sqlite")).data["maps"]
    assert set(maps) == {"0:0", "0:1", "0:2"}
    for i, position in enumerate(positions):
        colour = decoded(maps[f"0:{i}"]).convert("RGB").getpixel((1, 1))
        assert colour == tuple(colormaps["inferno"](50 * position, bytes=True)[:3])


def test_photos_are_what_the_model_saw_and_missing_ones_are_left_out(tmp_path):
    results = made_up(n=3, columns=(Column("deletion"),), mine=0.0)
    pixels = np.zeros((300, 500, 3), np.uint8)
    pixels[:, 150:350] = (200, 40, 90)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    photos = {f"{i}.jpg": tmp_path / f"{i}.png" for i in range(3)}
    preprocessing = Preprocessing(input_size=(150, 300), crop_pct=1.0)
    found = Page(page(results, photos=photos, preprocessing=preprocessing)).data["photos"]
    assert set(found) == {"0"}
    thumbnail = decoded(found["0"])
    assert thumbnail.format == "JPEG" and thumbnail.size == (128, 64)
    seen = prepare(load_image(photos["0.jpg"]), preprocessing)[0]
    want = Image.fromarray((seen * 255).byte().permute(1, 2, 0).numpy()).resize((128, 64))
    assert np.abs(np.asarray(thumbnail, float) - np.asarray(want, float)).mean() < 4
    assert Page(page(results, photos=photos)).data["photos"] == {}, "not without preprocessing"
