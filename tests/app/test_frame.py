"""The frame of all pages: the first run, the chip of the open pack, and the bars."""

import json
import os
import re

import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest
from synthetic_packs import small_pack

from xattn.app import library as library_module
from xattn.app import state
from xattn.app.live import uploads
from xattn.app.navigation import frame
from xattn.app.pages import first_run
from xattn.app.pages.live import photo_files
from xattn.app.state import PAGES
from xattn.packs.format import MANIFEST, MAPS


def use(root, monkeypatch, **settings):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root, **settings))


def run(opened=False, **params):
    app = AppTest.from_file(state.SCRIPT, default_timeout=600)
    app.query_params.update(params)
    app.session_state[frame.OPEN] = opened
    app.run()
    assert not app.exception
    return app


def listed(app):
    """What the list of packs was given."""
    (found,) = [e for e in app.get("bidi_component") if "problems" in e.proto.json]
    return json.loads(found.proto.json)


def packs(root, *names):
    """Packs of one photo, each a day younger than the one before."""
    for age, name in enumerate(reversed(names)):
        small_pack(root / name, 1 + age, ("gradcam", "saliency"))
        os.utime(root / name / MANIFEST, (1e9 - 86400 * age,) * 2)


# ---------------------------------------------------------------------- the first run


def texts(app):
    kinds = ("title", "subheader", "markdown", "caption", "code")
    return [str(element.value) for kind in kinds for element in getattr(app, kind)]


def test_the_first_run_has_one_sentence_an_example_and_three_doors(tmp_path, monkeypatch):
    root = tmp_path / "my runs"
    root.mkdir()
    use(root, monkeypatch)
    app = run()
    assert app.title[0].value == first_run.AIM
    assert [h.value for h in app.subheader] == ["Drop a photo", "Look around", "Your data"]
    pictures = [e.proto.body for e in app.get("html") if "<img" in e.proto.body]
    assert re.search(r'alt="[^"]+" src="data:image/jpeg;base64,', pictures[0])
    line = "xattn explain PHOTOS --labels folders --classes predicted,label --features --output"
    assert any(code.value == f"{line} '{root / 'first'}'" for code in app.code)


def test_where_jobs_are_off_the_demo_is_a_command_line(tmp_path, monkeypatch):
    use(tmp_path, monkeypatch, training=False)
    app = run()
    assert not [b for b in app.button if b.label == "Make the demo pack"]
    assert any(code.value == f"xattn app {tmp_path} --demo" for code in app.code)


def handed_over():
    import streamlit as st

    from xattn.app.pages.live import photo_files

    st.text(", ".join(photo.name for photo in photo_files.photos()))


def test_photos_of_the_first_page_are_those_of_live():
    app = AppTest.from_function(handed_over, default_timeout=600)
    app.session_state[photo_files._HANDED] = [uploads.Upload("*wren*.jpg", b"x")]
    app.run()
    assert app.text[0].value == "*wren*.jpg"
    assert r"\*wren\*\.jpg" in app.caption[0].value


# ---------------------------------------------------------------------- the chip


def test_the_newest_pack_opens_and_is_the_chip(tmp_path, monkeypatch):
    packs(tmp_path, "a", "b")
    use(tmp_path, monkeypatch)
    app = run()
    assert app.title[0].value == "b"
    assert "b" in [e.proto.popover.label for e in chips(app)]


def chips(app):
    return [block for block in app.main.children.values() for block in _below(block)]


def _below(block):
    own = [block] if getattr(block, "proto", None) and _is_popover(block.proto) else []
    for child in getattr(block, "children", {}).values():
        own += _below(child)
    return own


def _is_popover(proto):
    return hasattr(proto, "WhichOneof") and "popover" in [f.name for f, _ in proto.ListFields()]


def test_all_packs_are_listed_the_newest_first_and_broken_ones_last(tmp_path, monkeypatch):
    packs(tmp_path, "old", "<b>new", "newest")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{")
    (tmp_path / "broken" / MAPS).write_bytes(b"x")
    use(tmp_path, monkeypatch)
    found = listed(run(opened=True, pack=state.library().newest()[-1]))
    lines = {line["title"]: line for line in found["packs"]}
    assert list(lines) == ["newest", "<b>new", "old"]
    assert lines["old"]["selected"] and not lines["newest"]["selected"]
    assert lines["old"]["line"].endswith("· 3 photos · 6 maps · Grad-CAM, Saliency")
    assert "Sep 2001" in lines["newest"]["line"] and "1 photo ·" in lines["newest"]["line"]
    assert lines["newest"]["src"].startswith("/xattn/picture?pack=newest-")
    assert [line["title"] for line in found["problems"]] == ["broken"]
    assert found["problems"][0]["line"] and not found["search"]


def test_many_packs_have_a_search_field(tmp_path, monkeypatch):
    packs(tmp_path, *(f"pack-{i}" for i in range(frame.SEARCHED)))
    use(tmp_path, monkeypatch)
    assert listed(run(opened=True))["search"]


def test_a_closed_list_reads_no_pack_but_the_open_one(tmp_path, monkeypatch):
    packs(tmp_path, *(f"pack-{i}" for i in range(5)))
    use(tmp_path, monkeypatch)
    read = []
    pack = library_module.Pack
    monkeypatch.setattr(library_module, "Pack", lambda *a: read.append(a[2]) or pack(*a))
    run()
    assert read == ["pack-4"]


def test_pictures_of_the_list_leave_the_open_packs_open(tmp_path):
    packs(tmp_path, *(f"pack-{i}" for i in range(library_module.OPEN_PACKS + 4)))
    library = library_module.Library(tmp_path)
    first, *others = library.newest()
    kept = library.open(first)
    for pack_id in others:
        library.open(pack_id, passing=True)
    library.packs()
    assert library.open(first) is kept
    assert library.open(others[-1], passing=True) is library.open(others[-1], passing=True)


def test_another_pack_keeps_the_page(tmp_path, monkeypatch):
    packs(tmp_path, "a", "b")
    use(tmp_path, monkeypatch)
    app = run()
    other = state.library().newest()[1]
    app.session_state["_picked"] = other
    app.run()
    assert not app.exception and app.title[0].value == "a"
    assert app.query_params == {"pack": other}


# ---------------------------------------------------------------------- narrow screens


def test_the_bar_has_five_pages_and_the_others_behind_more(tmp_path, monkeypatch):
    packs(tmp_path, "a")
    use(tmp_path, monkeypatch)
    links = [link.proto for link in run().get("page_link")]
    assert [link.label for link in links[:5]] == [PAGES[n].title for n in frame.FIRST]
    assert {link.label for link in links} == {about.title for about in PAGES.values()}
    assert all(link.icon.startswith(":material/") for link in links)
    assert all(link.query_string.startswith("pack=a-") for link in links)
