"""The controls of the live page: photos or a clip, the network, the methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import models
from xattn.app.live import queue, uploads
from xattn.app.live.run import LiveRun, Request
from xattn.app.models import ModelError
from xattn.app.navigation import address
from xattn.app.pages.live.photo_files import left_out, megabytes, photos
from xattn.app.state import Context, plain
from xattn.explainers.base import method_title

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.backbone import Backbone


NO_HEAD = "none"
SANITY = ("random", "centre", "ones")  # explainers that explain nothing, to compare with
FIRST = ("head", "gradcam", "rollout")  # the first of these that is allowed is the default
VIEWS = {"crop": "Centre crop", "whole": "Whole picture"}
_WANTED: set[str] = set()  # networks that somebody has chosen, or has clicked "Load it" for


def controls(context: Context, kind: str, run: LiveRun | None) -> Request | None:
    """Show the widgets and return the request that they describe; None without a network."""
    sent = photos() if kind == "photos" else _clip()
    name, weights = _backbone()
    if not _wanted(name, weights):
        return None
    head_id = _head(name)
    try:
        with st.spinner("Loading the network", show_time=True):
            if not name:
                raise ModelError("Choose a network.")
            loaded, head = models.network(name, weights, head_id or None)
            allowed, refused = models.explainers(loaded, head)
    except ModelError as error:
        st.error(plain(error))
        return None
    chosen = _explainers(allowed, kind == "photos")
    with st.expander("More choices"):
        classes, top = _classes(loaded, kind == "photos")
        more = _view(kind) if kind == "photos" else {**_view(kind), **_frames()}
        if refused:
            with st.popover(f"{len(refused)} methods do not fit", type="tertiary"):
                st.caption("Not possible with this network, or without a head:")
                for method, why in refused.items():
                    st.markdown(f"**{plain(method_title(method))}**: {plain(why)}")
    busy = run is not None and not run.finished.is_set()
    ready = bool(sent) and bool(chosen) and not busy
    request = Request(
        backbone=name,
        weights=weights,
        head=head_id or None,
        explainers=tuple(chosen),
        photos=tuple(sent) if kind == "photos" else (),
        clip=sent[0] if kind == "clip" and sent else None,
        classes=classes,
        top=top,
        **more,
    )
    st.button(
        "Explain",
        key="explain_now",
        type="primary",
        disabled=not ready,
        width="stretch",
        on_click=begin,
        args=(context.library, request),
    )
    hint = _hint(bool(sent), bool(chosen), busy, kind, allowed, chosen)
    if hint:
        st.caption(hint)
    refused = st.session_state.pop("_refused", None)
    if refused is not None:
        st.error(plain(refused))
    return request


def begin(library: Library, request: Request) -> None:
    """Start a run, before the script runs again."""
    try:
        st.session_state["_begun"] = queue.live_queue().start(request, library)
    except ValueError as error:
        st.session_state["_refused"] = str(error)


def _hint(
    sent: bool, chosen: bool, busy: bool, kind: str, allowed: dict[str, int], names: list[str]
) -> str:
    """One line about what is missing, or about what the run costs."""
    if busy:
        return "A run is under way. It continues if you leave or reload this page."
    if not sent:
        return "Choose photos first." if kind == "photos" else "Choose a video first."
    if not chosen:
        return "Choose a method."
    passes = sum(allowed[name] for name in names)
    each = "photo" if kind == "photos" else "frame"
    if passes < 100:
        return ""
    return (
        f"About {passes:,} forward passes per {each}: this takes a while. You can stop at any time."
    )


def _clip() -> list[uploads.Upload]:
    file = st.file_uploader(
        "Video",
        type=uploads.CLIP_TYPES,
        key="clip",
        max_upload_size=megabytes(uploads.MAX_CLIP_BYTES),
    )
    if file is None:
        return []
    try:
        return [uploads.accept_clip(file)]
    except ValueError as error:
        left_out([(uploads.clean_name(file.name), str(error))], "left out")
        return []


def _backbone() -> tuple[str, str]:
    names = models.backbones()
    files = models.weight_files()
    name = address.selectbox(
        "Network",
        names,
        "model",
        accept_new_options=True,
        on_change=_want,
        placeholder="Name of a timm model",
        help="Choose one, or type the name of any timm model, whose weights then come from the hub.",
    )
    weights = "auto"
    if files:
        weights = address.selectbox(
            "Weights",
            {"auto": "Its own"} | {key: _name_of(file) for key, file in files.items()},
            "weights",
        )
    return name or "", weights


def _name_of(weights: Path) -> str:
    """A weight file's name; for a folder, whose name may not be unique, with its parent folder."""
    return f"{weights.parent.name}/{weights.name}" if weights.is_dir() else weights.name


def _want() -> None:
    """Record that a person has chosen the network on this page."""
    _WANTED.add(st.session_state["model"])


def _wanted(name: str, weights: str) -> bool:
    """Whether the network may be loaded, since merely opening an address must not download anything."""
    if not name or weights != "auto" or name in _WANTED or name in models.backbones():
        return True
    st.info(f"This address asks for {plain(name)}, whose weights come from the hub.")
    st.button("Load it", key="load", on_click=_want)
    return False


def _head(name: str) -> str:
    heads = models.heads(name)
    if not heads:
        return ""
    chosen = address.selectbox(
        "Head",
        {NO_HEAD: "None"} | heads,
        "head",
        default=next(iter(heads)),
        help="A trained head explains in one pass. A head from xattn probe also has its own classes.",
    )
    return "" if chosen == NO_HEAD else chosen


def _explainers(allowed: dict[str, int], several: bool) -> list[str]:
    names = [n for n in FIRST if n in allowed]
    names += [n for n in allowed if n not in (*FIRST, *SANITY)]
    names += [n for n in SANITY if n in allowed]

    def title(name: str) -> str:
        shown = method_title(name)
        if name in SANITY:
            return f"{shown} (no explanation, to compare with)"
        return f"{shown} ({allowed[name]:,} passes)" if allowed[name] > 1 else shown

    if several:
        chosen = address.multiselect(
            "Methods",
            names,
            "explain",
            default=names[:1],
            format_func=title,
            placeholder="Choose one or more",
        )
    else:
        chosen = [address.selectbox("Method", names, "explain_clip", format_func=title)]
    return chosen


def _classes(loaded: Backbone, several: bool) -> tuple[tuple[int, ...], int]:
    names = loaded.class_names
    classes = st.multiselect(
        "Classes",
        range(len(names)),
        key=f"classes of {loaded.fingerprint}",  # otherwise browsers keep the old network's
        format_func=lambda c: names[c],
        placeholder="The most probable",
        max_selections=5,
        help="Explain these classes in every picture. By default, the most probable ones are explained.",
    )
    top = 1
    if several and not classes and len(names) > 1:
        top = st.number_input(
            "Number of most probable classes",
            1,
            min(5, len(names)),
            1,
            key="top",
            bind="query-params",
        )
    return tuple(classes), int(top)


def _view(kind: str) -> dict[str, Any]:
    order = list(VIEWS.items()) if kind == "photos" else list(VIEWS.items())[::-1]
    view = address.segmented(
        "What the network sees",
        dict(order),
        f"see_{kind}",
        help="The centre crop is the view that the network was tested on. The "
        "other view squeezes the whole picture into the input.",
    )
    return {"view": view}


def _frames() -> dict[str, Any]:
    every = st.number_input(
        "Explain every n-th frame", 1, 1000, 5, key="every", bind="query-params"
    )
    smoothing = st.slider(
        "Smoothing over frames", 0.0, 0.95, 0.0, 0.05, key="smoothing", bind="query-params"
    )
    return {"every": int(every), "smoothing": smoothing}
