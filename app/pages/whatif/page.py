"""What if: paint away a part of a photo, and the network that made the pack predicts again."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from xattn.app import models
from xattn.app.components.brush import brush, painted
from xattn.app.navigation import selection, url_widgets
from xattn.app.navigation.photo_bar import photo_bar
from xattn.app.pages.whatif import maps
from xattn.app.pages.whatif.answer import FILLS, bars, changed, predict, verdict
from xattn.app.pages.whatif.masks import Mask, decoded, encoded, strongest
from xattn.app.pages.whatif.painting import KEY, Painting, painting_of
from xattn.app.state import Context, plain, short
from xattn.packs.contained_files import PackError
from xattn.pictures.words import method_title

if TYPE_CHECKING:
    from torch import Tensor

    from xattn.backbone import Backbone
    from xattn.packs.reader import Pack

SHARE = 0.2  # of the picture, that a suggestion hides or keeps
PAINTED = {"hidden": "Hidden", "kept": "Only this is kept"}


def page(context: Context) -> None:
    """Show a photo of the open pack to paint on, and what its network says of it."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    image_id = photo_bar(pack, "whatif", KEY, _carried)
    with st.spinner("Loading the network that made this pack …"):
        backbone = models.backbone_of(pack)
    backbone.require_classes()
    _tried(pack, image_id, backbone)
    st.caption(
        "The photo is the one that is stored in the pack (at most 512 pixels a side), cut as the network "
        "sees it; figures of a larger original may differ slightly. A filled part is itself something "
        "that the network sees: where two fills agree, the answer is more likely to be about what is gone."
    )


def _carried() -> dict[str, str | None]:
    """What another photo is shown with."""
    return {name: st.query_params.get(name) for name in ("view", "method", "fill", "paint")}


@st.fragment
def _tried(pack: Pack, image_id: str, backbone: Backbone) -> None:
    """All that changes with a stroke; nothing else of the page runs again."""
    try:
        _answered(pack, image_id, backbone)
    except ValueError as error:  # main.py hears of none after the page's first run
        st.error(plain(error))


def _answered(pack: Pack, image_id: str, backbone: Backbone) -> None:
    """The picture to paint on, and the network's answer to it."""
    with st.spinner("Reading the photo …", show_time=False):
        painting = painting_of(pack, image_id, backbone)
    entry_id, kind, keeps = _choices(pack, image_id)
    hidden = ~painting.mask if keeps else painting.mask
    pixels, after = painting.seen.pixels, None
    if painting.mask.any():
        pixels = changed(pixels, hidden, kind, backbone)
        after = predict(backbone, pixels)
    words = verdict(painting.seen.answer, after, backbone)
    left, right = st.columns([5, 6], gap="large")
    with left:
        _canvas(painting, f"{pack.id} {pack.version} {image_id}", pixels, words)
        if painting.problem:
            st.warning(plain(painting.problem))
    with right:
        st.subheader(plain(words), anchor=False)
        st.caption(_told(painting.mask, hidden, keeps))
        st.html(bars(painting.seen.answer, after, backbone))
        pressed = _presses(pack, entry_id, painting, after is not None)
        shown = pixels if after is not None else None
        _maps(pack, entry_id, painting, shown, (kind, keeps), pressed, backbone)


# ---------------------------------------------------------------------- what is chosen


def _choices(pack: Pack, image_id: str) -> tuple[str, str, bool]:
    """The entry whose map is shown, the fill, and whether what is painted is kept, not hidden."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    entries = selection.table(pack).entries_of(image_id)
    with bar:
        kind = url_widgets.segmented(
            "Fill",
            list(FILLS),
            "fill",
            format_func=lambda k: FILLS[k],
            help="What stands where a part of the photo is hidden.",
        )
        paint = url_widgets.segmented(
            "What is painted", list(PAINTED), "paint", format_func=lambda p: PAINTED[p]
        )
        methods = list(dict.fromkeys(entries["method"]))
        method = url_widgets.selectbox(
            "Map", methods, "method", format_func=method_title, width=220
        )
    return _entry(entries[entries["method"] == method]), kind, paint == "kept"


def _entry(entries: pd.DataFrame) -> str:
    """Of a method's maps that of the URL's class, else that of the most probable class."""
    wanted = entries[entries["target"].astype(str) == st.query_params.get("class", "")]
    rest = entries if wanted.empty else wanted
    return str(rest.sort_values("probability", ascending=False, kind="stable").index[0])


def _canvas(painting: Painting, subject: str, pixels: Tensor, words: str) -> None:
    brush(
        maps.photo_url(pixels),
        painting.raster,
        f"{KEY}canvas",
        subject=subject,
        aspect=pixels.shape[2] / pixels.shape[1],
        mask=encoded(painting.mask),
        stamp=painting.stamp,
        regions=painting.regions,
        label="The photo as the network sees it, to paint on",
        alt=f"Photo, {painting.mask.mean():.0%} of it painted",
        said=words,
        on_paint=lambda: _painted(painting),
    )


def _painted(painting: Painting) -> None:
    sent = painted(f"{KEY}canvas")
    if sent is None:
        return
    try:
        painting.mask, painting.problem = decoded(sent, painting.raster), ""
    except ValueError as error:
        painting.problem = f"{error}. What was painted before still counts."


def _told(mask: Mask, hidden: Mask, keeps: bool) -> str:
    if not mask.any():
        return "Paint over a part of the photo, or press a suggestion below."
    return f"{hidden.mean():.1%} of the picture is hidden" + (
        ", the rest is kept." if keeps else "."
    )


# ---------------------------------------------------------------------- maps


def _presses(pack: Pack, entry_id: str, painting: Painting, is_changed: bool) -> bool:
    """Buttons that paint the top of the map, and one that explains; whether that was pressed."""
    bar = st.container(horizontal=True, gap="small")
    for label, paint in (("Hide the top {}", "hidden"), ("Hide all but it", "kept")):
        bar.button(
            label.format(f"{SHARE:.0%}"),
            key=f"{KEY}top {paint}",
            on_click=_suggested,
            args=(pack, entry_id, painting, paint),
            help="Of the map below: what it marks should change the answer, the rest should not.",
        )
    pressed = bar.button("Explain the changed photo", key=f"{KEY}explain", disabled=not is_changed)
    return pressed and is_changed


def _suggested(pack: Pack, entry_id: str, painting: Painting, paint: str) -> None:
    try:
        painting.paint(strongest(pack.explanation(entry_id).map, SHARE, painting.raster))
    except PackError as error:
        painting.problem = str(error)
        return
    st.session_state["paint"] = paint


def _maps(
    pack: Pack,
    entry_id: str,
    painting: Painting,
    pixels: Tensor | None,
    how: tuple[str, bool],
    pressed: bool,
    backbone: Backbone,
) -> None:
    """The pack's map, and at a press that of the changed photo, if there is one."""
    try:
        own = pack.explanation(entry_id)
    except PackError as error:
        st.warning(plain(error))
        return
    title = f"{method_title(own.method)} of {short(own.target_name)}"
    if entry_id not in painting.drawn:
        painting.drawn[entry_id] = maps.map_url(painting.seen.pixels, own)
    pictures = [(painting.drawn[entry_id], title)]
    key = (entry_id, painting.mask.tobytes(), *how)
    if pressed and pixels is not None:
        try:
            with st.spinner(f"Explaining by {plain(method_title(own.method))} …"):
                painting.fresh = {key: maps.explained(pack, entry_id, pixels, backbone)}
        except ValueError as error:
            st.warning(plain(error))
    if pixels is not None and key in painting.fresh:
        pictures.append((maps.map_url(pixels, painting.fresh[key]), f"{title}, changed photo"))
    st.html(_figures(pictures))


def _figures(pictures: list[tuple[str, str]]) -> str:
    """Pictures side by side, each with what it is below it."""
    figures = "".join(
        f'<figure style="margin:0;flex:1 1 9rem;max-width:15rem"><img src="{url}" alt="Map by '
        f'{html.escape(title)}" style="width:100%;border-radius:6px;display:block"><figcaption '
        f'style="font-size:.8125rem;color:var(--quiet)">{html.escape(title)}</figcaption></figure>'
        for url, title in pictures
    )
    return f'<div style="display:flex;gap:.75rem;flex-wrap:wrap">{figures}</div>'
