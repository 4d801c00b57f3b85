"""The part of a photo's data that the image page shows, with the choices and pictures that its sections
share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from xattn.app.pictures import rendering
from xattn.app.pictures.rendering import Look
from xattn.app.triage import selection
from xattn.packs.format import THUMBNAIL_SIDE
from xattn.pictures.contact_sheet import legends_html

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

SIDE = THUMBNAIL_SIDE  # pixels of a map's longer side, which is that of the stored photo
WIDTH = 150  # smallest width of a map on the page, in pixels


@dataclass(frozen=True)
class PhotoView:
    """The entries of a photo that the page shows, in order; one of them is in focus."""

    image_id: str
    entries: pd.DataFrame  # all of the photo
    target: int
    ids: list[str]
    focus: str
    methods: list[str]  # those that were chosen
    look: Look

    @property
    def name(self) -> str:
        """The name of the class that is shown."""
        return str(self.entries.loc[self.focus, "target_name"])


def legend(pack: Pack, entry_ids: Sequence[str], look: Look) -> None:
    """Show the meaning of these maps' colours."""
    st.html(legends_html(rendering.legends(pack, entry_ids, look)))


def photo_of(pack: Pack, shown: PhotoView, side: int = SIDE) -> str:
    """The URL of the photo, or of the part of it that the look shows."""
    crop = shown.focus if shown.look.crop else None
    return rendering.photo_url(pack, shown.image_id, side, crop)


def file_name(pack: Pack, shown: PhotoView) -> str:
    """The photo's name."""
    return selection.table(pack).title(shown.image_id)


def aspect(pack: Pack, shown: PhotoView) -> float:
    """Width over height of the area for the photo; limited for very wide or very tall photos."""
    return min(max(aspect_of(pack, shown), 0.6), 2.0)


def aspect_of(pack: Pack, shown: PhotoView) -> float:
    """Width over height of the part of the photo that is shown."""
    view = pack.view(shown.focus)
    if shown.look.crop:
        top, left, bottom, right = view.photo_box
        return (right - left) / max(bottom - top, 1e-6)
    return aspect_of_photo(pack, shown.image_id)


def aspect_of_photo(pack: Pack, image_id: str) -> float:
    """Width over height of the whole photo."""
    entry_id = selection.table(pack).entries_of(image_id).index[0]
    height, width = pack.view(entry_id).photo_size
    return width / height


def select(
    bar: Any,
    label: str,
    names: Mapping[Any, str],
    chosen: Any,
    parameter: str,
    subject: str,
    forget: str | None = None,
) -> None:
    """A select box whose value is kept in the URL; Streamlit cannot bind it, because it depends on the
    photo."""
    key = f"{parameter} of {subject}"
    st.session_state[key] = chosen
    bar.selectbox(
        label,
        list(names),
        format_func=lambda value: names[value],
        key=key,
        on_change=_selected,
        args=(parameter, key, forget),
        width=236,
    )


def show_class(target: object) -> None:
    """Show the maps of a class."""
    st.query_params["class"] = str(target)
    st.query_params.pop("entry", None)


def _selected(parameter: str, key: str, forget: str | None) -> None:
    st.query_params[parameter] = str(st.session_state[key])
    if forget is not None:
        st.query_params.pop(forget, None)
