"""What pages keep in the session does not stand where another page's widget has its value."""

import pytest

pytest.importorskip("streamlit")

from synthetic_packs import small_pack
from viewer_pages import opened

from xattn.app import state
from xattn.app.main import PAGES


def script():
    import streamlit as st
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    from xattn.app import main

    main._run(st.query_params["shown"])
    kept = get_script_run_ctx().session_state._state
    widgets = set(kept._key_id_mapper._key_id_mapping)
    names = {*kept._old_state, *kept._new_session_state} - widgets
    st.session_state["_names"] = names, widgets


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """By page: names of plain values that it leaves in the session, and its widgets' keys."""
    root = tmp_path_factory.mktemp("root")
    # One class, one method, no classes and no metrics: as few widgets as there can be.
    small_pack(root / "pack", 2, ("gradcam",))
    own = state.Settings(root=root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_settings", own)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        found = {}
        for name in PAGES:
            names, widgets = opened(script, shown=name).session_state["_names"]
            found[name] = ({n for n in names if not n.startswith("$$")}, widgets)  # Streamlit's own
    return found


@pytest.mark.parametrize("name", PAGES)
def test_plain_values_have_names_that_no_widget_has(session, name):
    plain, _ = session[name]
    assert all(kept.startswith(("_", f"{name}.")) for kept in plain)
    for other, (_, widgets) in session.items():
        assert not any(key.startswith("_") for key in widgets)
        if other != name:
            assert not any(key.startswith(f"{name}.") for key in widgets)


def test_every_page_has_been_looked_at(session):
    assert all(widgets for _, widgets in session.values())
    assert "gallery.maps" in session["gallery"][0]
    assert "maps" in session["image"][1]


def failing():
    import streamlit as st

    from xattn.app import main

    st.session_state["_page"] = "attention"
    st.session_state["attention.head"] = "bad"
    st.session_state["gallery.sort"] = "name"
    main.show_error(ValueError())
    st.session_state["_left"] = (
        "attention.head" in st.session_state,
        "gallery.sort" in st.session_state,
    )


def test_the_page_that_failed_begins_anew():
    page = opened(failing)
    assert page.session_state["_left"] == (False, True)
    assert [link.proto.label for link in page.get("page_link")] == ["Try again", "Open the gallery"]


def clicks():
    """The callbacks of grids and charts, called while none is there."""
    from functools import partial

    from xattn.app import state
    from xattn.app.attention import charts
    from xattn.app.pages.gallery import page as gallery_page
    from xattn.app.pages.image import page as image_page
    from xattn.app.pages.image import photo_tabs
    from xattn.app.triage import selection

    library = state.library()
    pack = library.open(library.packs()[0].id)
    for callback in (
        partial(gallery_page._opened, pack, selection.table(pack).choices),
        gallery_page._turned,
        partial(image_page._focus, ["a"]),
        photo_tabs._open_class,
        *(partial(charts._opened, name) for name in ("head", "layer")),
        *(partial(charts._point_picked, chart) for chart in ("distance", "entropy")),
    ):
        callback()


def test_a_click_whose_grid_is_forgotten_by_now_does_nothing(tmp_path, monkeypatch):
    small_pack(tmp_path / "pack", 2, ("gradcam",))
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    page = opened(clicks)
    assert not page.query_params
