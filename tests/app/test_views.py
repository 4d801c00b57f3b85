"""Settings of the process, views as URLs, names inside Markdown."""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("streamlit")

from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from xattn.app import state
from xattn.runtime.names import visible


def views():
    import streamlit as st

    from xattn.app import state

    def gallery():
        st.session_state["_page"] = "gallery"
        st.session_state["_pack"] = "open"
        opacity = st.slider("Opacity", 0, 10, 5, key="opacity", bind="query-params")
        st.text(f"gallery {opacity}")
        if st.button("to an image"):
            state.go("image", image="a b&c", opacity=3, label=[1, 2], none=None)
        if st.button("to another pack"):
            state.go("gallery", pack="other")

    def image():
        st.session_state["_page"] = "image"
        opacity = st.slider("Opacity", 0, 10, 5, key="opacity", bind="query-params")
        st.text(f"image {opacity}")

    pages = [
        st.Page(gallery, url_path="gallery", default=True),
        st.Page(image, url_path="image"),
    ]
    st.navigation(pages).run()


def app():
    return AppTest.from_function(views, default_timeout=600).run()


def button(app, label):
    return next(b for b in app.button if b.label == label)


def test_another_page_gets_the_open_pack_and_its_parameters():
    shown = button(app(), "to an image").click().run()
    assert not shown.exception
    assert shown.text[0].value == "image 3"
    assert shown.query_params == {
        "pack": "open",
        "image": "a b&c",
        "opacity": "3",
        "label": ["1", "2"],
    }


def test_on_the_same_page_a_bound_widget_keeps_its_value():
    shown = app()
    shown.slider(key="opacity").set_value(8).run()
    shown.query_params["opacity"] = "8"  # the browser writes it; AppTest does not
    button(shown, "to another pack").click().run()
    assert not shown.exception
    assert shown.text[0].value == "gallery 8"
    assert shown.query_params == {"pack": "other", "opacity": "8"}


def test_a_link_is_a_path_with_the_parameters_and_no_more():
    assert state.link("gallery") == "/"
    assert state.link("compare", pack=None, methods=[]) == "/compare"
    path = state.link("image", image="a b/é?&#", label=[1, 2], threshold=0.5, raw=True)
    parts = urlsplit(path)
    assert (parts.scheme, parts.netloc, parts.path) == ("", "", "/image")
    assert parse_qs(parts.query) == {
        "image": ["a b/é?&#"],
        "label": ["1", "2"],
        "threshold": ["0.5"],
        "raw": ["true"],
    }


def test_settings_are_those_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(state, "_settings", None)
    assert state.settings().root == Path("runs")
    given = state.Settings(root=tmp_path / "other", training=False)
    state.configure(given)
    assert state.settings() is given


def test_sessions_share_one_library_a_root(monkeypatch, tmp_path):
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    assert state.library() is state.library()
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path / "other"))
    assert state.library().root == (tmp_path / "other").resolve()


@pytest.mark.parametrize(
    "text",
    ["<script>", "**bold**", "[a](http://b)", ":material/home:", ":red[x]", "$x$", "`x`", "# x"],
)
def test_markdown_is_text(text):
    escaped = state.plain(text)
    assert re.sub(r"\\(.)", r"\1", escaped).replace("\u2060", "") == text
    assert not re.search(r"(?<!\\)(\\\\)*[<\[*`$:#]", escaped)


@given(st.text())
def test_plain_text_keeps_every_character_but_white_space(text):
    escaped = state.plain(text)
    shown = re.sub(r"\\(.)", r"\1", escaped).replace("\u2060", "")
    assert shown == visible(" ".join(text.split())).replace("\u2060", "")
    assert not re.search(r"^\d+[.)] |^[-+>=~|]", escaped)


@pytest.mark.parametrize(
    "text", ["http://b.example", "HTTPS://b", "x www.b.example", "a@b.example"]
)
def test_an_address_is_no_link(text):
    """Streamlit looks for them in what is left after the escapes."""
    unescaped = re.sub(r"\\(.)", r"\1", state.plain(text))
    assert unescaped != text and unescaped.replace("\u2060", "") == text
    assert not re.search(r"https?://|www\.|\w@b", unescaped, re.IGNORECASE)
    assert state.plain("AD@0.5") == r"AD\@0\.5"


def test_characters_that_turn_others_around_are_seen():
    assert visible("\u202egpj.exe\x1b\u2066") == "\ufffdgpj.exe\ufffd\ufffd"
    for text in ("שלום עולم.jpg", "😀\u200d🔥", "a\u200fb", "line\nline\t"):
        assert visible(text) == text


def test_the_script_lies_apart_from_a_folder_of_pages():
    """Streamlit runs the files of a folder ``pages`` beside its script by themselves."""
    assert state.SCRIPT.is_file()
    assert not (state.SCRIPT.parent / "pages").exists()
