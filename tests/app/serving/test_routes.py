"""The picture routes: answers, caching, and that no query gets a traceback or a file outside."""

import csv
import io
from urllib.parse import quote, urlencode

import pytest

pytest.importorskip("streamlit")

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.applications import Starlette
from synthetic_packs import million_pack, small_pack

from xattn.app import state
from xattn.app.library import Library
from xattn.app.pictures import rendering
from xattn.app.serving import routes
from xattn.app.triage import selection, selection_files

TestClient = pytest.importorskip("starlette.testclient").TestClient


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("outer") / "root"
    small_pack(root / "pack", 2)
    (root.parent / "secret.jpg").write_bytes(b"secret")
    return Library(root)


@pytest.fixture(scope="module")
def pack(library):
    return library.open(library.packs()[0].id)


@pytest.fixture(scope="module")
def client(library):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "library", lambda: library)
        with TestClient(Starlette(routes=routes.routes()), raise_server_exceptions=True) as client:
            yield client


def test_a_photo_and_an_overlay_are_served_as_jpeg(client, pack):
    for url in (
        rendering.photo_url(pack, "photo-00000", 64),
        rendering.overlay_url(pack, pack.entries.index[0], rendering.Look(side=64, opacity=0.5)),
    ):
        answer = client.get(url)
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"].startswith("private")
        assert max(Image.open(io.BytesIO(answer.content)).size) == 64


@pytest.mark.parametrize("view", ["", "method=all&sort=ROAD&order=desc", "q=photo-00001"])
def test_a_selection_is_sent_as_the_csv_of_its_maps(client, pack, view):
    answer = client.get(f"{selection_files.CSV}?{urlencode({'pack': pack.id, 'view': view})}")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"] == f'attachment; filename="{pack.id}.csv"'
    found = selection.select(pack, selection.from_text(view, selection.table(pack).choices))
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["entry_id"] for row in rows] == found.ids()
    for row in rows:
        entry, image = pack.entries.loc[row["entry_id"]], pack.images.loc[row["image_id"]]
        assert row["image_id"] == entry["image_id"] and row["method"] == entry["method"]
        assert float(row["ROAD"]) == entry["ROAD"] and float(row["max"]) == entry["max"]
        assert row["right"] == str(image["right"]) and row["label_name"] == image["label_name"]


@pytest.mark.slow
def test_a_selection_of_100_000_maps_leaves_as_lines(tmp_path, monkeypatch):
    million_pack(tmp_path / "root" / "pack", 100_000, methods=1)
    own = Library(tmp_path / "root")
    monkeypatch.setattr(state, "library", lambda: own)
    url = f"{selection_files.CSV}?{urlencode({'pack': own.packs()[0].id, 'view': 'sort=ROAD'})}"
    with (
        TestClient(Starlette(routes=routes.routes())) as client,
        client.stream("GET", url) as answer,
    ):
        assert sum(1 for _ in answer.iter_lines()) == 100_001


@pytest.mark.parametrize(("query", "status"), [("", 400), ("?pack=..%2F..", 404), ("?pack=x", 404)])
def test_a_csv_of_no_pack_is_one_line_of_text(client, query, status):
    answer = client.get(selection_files.CSV + query)
    assert (answer.status_code, answer.text.count("\n")) == (status, 1)


def test_the_browser_keeps_a_picture_and_is_told_when_it_is_the_same(client, pack):
    url = rendering.overlay_url(pack, pack.entries.index[0], rendering.Look())
    first = client.get(url)
    assert "max-age" in first.headers["cache-control"]
    again = client.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert again.headers["etag"] == first.headers["etag"]
    other = client.get(url + "&opacity=0.3", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200 and other.headers["etag"] != first.headers["etag"]


def test_a_url_of_another_version_is_asked_for_each_time(client, pack):
    url = rendering.photo_url(pack, "photo-00000").replace(pack.version, "0" * 12)
    answer = client.get(url)
    assert answer.status_code == 200 and answer.headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize(
    "change, status, says",
    [
        ({"pack": "none"}, 404, "no such pack"),
        ({"pack": "../../secret"}, 404, "no such pack"),
        ({"entry": "../secret.jpg"}, 404, "no such map"),
        ({"entry": ""}, 400, "entry: got ''"),
        ({"entry": "x" * 1001}, 400, "entry: got"),
        ({"side": "0"}, 400, "side: got 0"),
        ({"opacity": "<b>"}, 400, "opacity: got '<b>'"),
        ({"minus": "photo-00001@1.gradcam"}, 400, "not on the grid"),
        ({"minus": ""}, 400, "minus: got ''"),
    ],
)
def test_a_bad_query_gets_one_line_of_text(client, pack, change, status, says):
    query = {"pack": pack.id, "entry": pack.entries.index[0], **change}
    answer = client.get(f"{rendering.OVERLAY}?{urlencode(query)}")
    assert answer.status_code == status and says in answer.text
    assert answer.text.count("\n") == 1 and answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["cache-control"] == "no-store"


def test_other_methods_and_paths_are_not_there(client):
    assert client.post(rendering.PICTURE).status_code == 405
    assert client.get(f"{rendering.PICTURE}/../secret.jpg").status_code == 404


def test_a_bug_is_logged_and_not_shown(client, pack, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("inside")

    monkeypatch.setattr(rendering, "photo_bytes", broken)
    answer = client.get(rendering.photo_url(pack, "photo-00000"))
    assert answer.status_code == 404 and "inside" not in answer.text
    assert "RuntimeError: inside" in caplog.text


# ---------------------------------------------------------------------- any query

text = st.text(max_size=30)
numbers = st.floats().map(repr) | st.integers().map(str)
names = st.sampled_from(
    "pack image entry side opacity threshold scale cmap minus low high v".split()
)
values = (
    text | numbers | st.sampled_from(["map", "shared", "auto", "diverging", "../../secret.jpg"])
)
queries = st.dictionaries(names | text, values, max_size=12)


def accepted(query):
    found = 0
    for parse in (routes.photo_request, routes.overlay_request):
        try:
            _, key, _ = parse(query)
        except ValueError as error:
            assert ": got " in str(error) and "; give " in str(error)
            continue
        found += 1
        look = next((v for v in key if isinstance(v, rendering.Look)), None)
        side = key[1] if look is None else look.side
        assert 16 <= side <= 2048
        if look is not None:
            assert 0 <= look.opacity <= 1 and 0 <= look.threshold <= 1
            assert look.limits is None or abs(look.limits[0]) <= 1e30 >= abs(look.limits[1])
    return found


@settings(max_examples=200)
@given(queries)
def test_any_query_is_a_bounded_request_or_an_error_that_names_it(query):
    accepted({"pack": "p", "image": "i", "entry": "e", **query})
    accepted(query)


@settings(max_examples=60)
@given(queries, st.booleans(), st.sampled_from([rendering.PICTURE, rendering.OVERLAY]))
def test_any_query_gets_a_picture_or_a_line_of_text(client, pack, query, known, path):
    if known:
        ids = {"pack": pack.id, "image": "photo-00000", "entry": pack.entries.index[0]}
        query = {**query, **ids}
    query = {k.encode("utf-8", "replace"): v.encode("utf-8", "replace") for k, v in query.items()}
    answer = client.get(f"{path}?{urlencode(query)}")
    assert answer.status_code in (200, 400, 404)
    assert b"secret" != answer.content and "Traceback" not in answer.text[:200]
    if answer.status_code == 200:
        assert answer.content[:2] == b"\xff\xd8"
    else:
        assert answer.text.count("\n") <= 2 and len(answer.text) < 400


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_query_string_get_an_answer(client, raw):
    assert client.get(f"{rendering.OVERLAY}?{quote(raw, safe='&=%')}").status_code in (400, 404)
