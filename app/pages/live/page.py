"""The live page: photos or a clip of one's own, explained while one waits; and a pack's film."""

from __future__ import annotations

import streamlit as st

from xattn.app.live import queue, uploads
from xattn.app.live.run import LiveRun
from xattn.app.live.uploads import Upload
from xattn.app.navigation import url_widgets
from xattn.app.pages.live.controls import begin, controls
from xattn.app.pages.live.results import film_of_pack, outcome
from xattn.app.pictures import film as films
from xattn.app.state import Context, plain

QUICK = 0.8  # seconds in which a short run may finish before its progress is shown
INPUTS = {"photos": "Photos", "clip": "Video"}
STYLE = """
<style>[class*="st-key-few-"]{max-width:960px}</style>
"""


def page(context: Context) -> None:
    """Controls on the left, what came out of them on the right."""
    st.html(STYLE)
    st.title("Explain your own photos", anchor=False)
    _body(context)


@st.fragment
def _body(context: Context) -> None:
    """All of the page, which runs without the rest of the script when something on it is used."""
    try:
        _both_sides(context)
    except ValueError as error:
        st.error(plain(error))


def _both_sides(context: Context) -> None:
    """The results first, since they are what somebody waits for."""
    left, right = st.columns([1, 2], gap="large")
    with left:
        kind = url_widgets.segmented(
            "Input",
            list(INPUTS),
            "input",
            format_func=lambda k: INPUTS[k],
            label_visibility="collapsed",
        )
    given = st.query_params.get("job")
    begun: LiveRun | None = st.session_state.pop("_begun", None)
    run = begun or queue.live_queue().get(given or st.session_state.get("_job"))
    if begun is not None:
        st.query_params.pop("frame", None)  # of the film that was shown before
        begun.wait(QUICK)
    if run is not None:
        st.session_state["_job"] = run.id
        if given != run.id:
            st.query_params["job"] = run.id
    with right:
        earlier = st.empty()
        if run is not None:
            outcome(context, run)
        elif given is not None:
            st.info(
                "The results of this address are gone: they are kept until the viewer stops, or "
                "until many others came after them. Explain the photos again; to keep results, "
                "save them as a pack."
            )
        else:
            _nothing_yet()
            if kind == "clip" and context.pack is not None and films.frames(context.pack):
                film_of_pack(context.pack)
    with left:
        request = controls(context, kind, run)
    other = None if run is None or kind != "clip" else _other_clip(run)
    if run is not None and other is not None:
        shown = _subject(run)
        which = f"another file named {plain(shown)}" if shown == other else plain(shown)
        chosen = "the chosen one" if shown == other else plain(other)
        earlier.info(f"These are the results of {which}. Press Explain for those of {chosen}.")
    if begun is not None and request is not None and begun.given != request.light():
        queue.live_queue().stop(begun)  # a value was typed in the moment before the click
        begin(context.library, request)
        st.rerun()


def _other_clip(run: LiveRun) -> str | None:
    """The name of the clip that is chosen now, if a run is finished and was about another one."""
    file = st.session_state.get("clip")
    if file is None or not run.finished.is_set():
        return None
    kept = st.session_state.get("_light")
    if kept is None or kept[0] != file.file_id:
        kept = file.file_id, Upload(uploads.clean_name(file.name), file.getvalue()).light()
        st.session_state["_light"] = kept
    return None if kept[1] == run.given.clip else kept[1].name


def _subject(run: LiveRun) -> str:
    """What a run explains."""
    if run.given.clip is not None:
        return run.given.clip.name
    count = len(run.given.photos)
    return run.given.photos[0].name if count == 1 else f"{count} photos"


def _nothing_yet() -> None:
    with st.container(border=True):
        st.markdown("**See where a network looks.**")
        st.markdown(
            "1. Choose photos, or a video.\n"
            "2. Choose a network and one or more ways to explain it.\n"
            "3. Press Explain. The maps appear here, side by side."
        )
        st.caption(
            "Photos stay on the machine that runs this viewer. Their metadata are dropped, and "
            "everything is deleted when the viewer stops, unless you keep it as a pack."
        )
