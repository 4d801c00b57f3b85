"""Explains missed objects: the person draws a box and chooses a class, and the best candidate there is
explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st
from PIL import ImageDraw

from xattn.app import models, state
from xattn.app.components import sent_value
from xattn.app.navigation import address
from xattn.app.pages.image.boxes import PhotoBox, photo_boxes
from xattn.app.state import plain
from xattn.app.triage import selection
from xattn.pictures.overlay import data_url

if TYPE_CHECKING:
    from PIL import Image

    from xattn.packs.explanation import Explanation
    from xattn.packs.reader import Pack

KEY = "whatif.missed"
MASKS = 200  # masks for d_rise while somebody waits
SLOW = 500  # most passes of a method while somebody waits


def page(pack: Pack, image_id: str, found: list[PhotoBox]) -> None:
    """Show the photo to draw on, and after a click the map of the candidate that fits the box best."""
    if state.settings().detector is None:
        st.info(
            "To ask for an object that the detector misses, start the viewer with it: "
            "`xattn app ROOT --detector NAME`"
        )
        return
    with st.spinner("Loading the detector …"):
        detector = models.detector()
    models.check_model_made_pack(pack, detector)
    _asked(pack, image_id, found, detector)


@st.fragment
def _asked(pack: Pack, image_id: str, found: list[PhotoBox], detector: Any) -> None:
    photo = pack.photo(image_id)
    size, key = (photo.width, photo.height), f"{KEY} box of {pack.id} {image_id}"

    def take(box: Any) -> None:
        if isinstance(box, list | tuple) and len(box) == 4:
            sides = [round(share * size[i % 2]) for i, share in enumerate(box)]
            st.session_state[key] = ", ".join(map(str, sides))

    def opened(target: int) -> None:
        take(next(box.at for box in found if box.target == target))

    def drew() -> None:
        take(sent_value(KEY, "draw"))

    box = _numbers(st.session_state.get(key, ""))
    left, right = st.columns([5, 6], gap="large")
    with left:
        drawn = None if box is None else [v / size[i % 2] for i, v in enumerate(box)]
        photo_boxes(pack, image_id, found, KEY, None, opened, draws=True, drawn=drawn, on_draw=drew)
    with right:
        st.caption(
            "Draw a box where an object is missed, or click an existing box, and choose the class."
        )
        names = list(detector.class_names)
        label = address.selectbox("Class", names, "label")
        methods = list(dict.fromkeys(selection.table(pack).entries_of(image_id)["method"]))
        method = address.selectbox("Map", methods, "method", format_func=pack.title_of)
        st.text_input(f"Box: left, top, right, bottom in pixels of {size[0]} x {size[1]}", key=key)
        if st.button("Explain", key=f"{KEY} explain", type="primary", disabled=box is None):
            try:
                with st.spinner("Explaining …"):
                    made = explain_missed(detector, photo, label, box, method)
            except ValueError as error:
                st.error(plain(error))
            else:
                _show(made)


def _numbers(text: str) -> list[float] | None:
    """The box that was drawn or typed; None if it is not a box."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None


def explain_missed(
    detector: Any, photo: Image.Image, label: str, box: Any, method: str
) -> Explanation:
    """The map of the best candidate for ``label`` at ``box``, in pixels of ``photo``.

    Raises:
        ValueError: there is no candidate, or the method takes too many passes.
    """
    from xattn.explainers import create_explainer
    from xattn.explaining.detections import explain_detections

    options: dict[str, dict[str, Any]] = {"d_rise": {"masks": MASKS}} if method == "d_rise" else {}
    with models.exclusive_pass(f"to explain by {method}"):
        missed = detector.missed(photo, label, box)
        own = create_explainer(method, detector.of([missed]), **options.get(method, {}))
        if (own.total_forwards or 1) > SLOW:
            raise ValueError(
                f"{method} takes {own.total_forwards:,} passes of the detector; choose a method that "
                f"takes at most {SLOW}."
            )
        [made] = explain_detections(photo, detector, method, detections=[missed], options=options)
        return made


def _show(made: Explanation) -> None:
    record = made.protocol["detection"]
    place = ", ".join(f"{v:.0f}" for v in record["box"])
    st.markdown(f"**{plain(made.target_name)}**, the best candidate in the box, at {place}")
    drawn = made.overlay()
    ImageDraw.Draw(drawn).rectangle(record["box"], outline="white", width=3)
    st.image(data_url(drawn), width=360)
    st.caption(
        f"For the photo as it is stored in the pack (at most 512 pixels per side)"
        f"{f'; {MASKS} masks' if made.method == 'd_rise' else ''}."
    )
