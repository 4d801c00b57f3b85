"""The What if page: hide a part of a photo and let the network that made the pack predict again."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import streamlit as st
import torch
from PIL import Image
from torch import Tensor

from xattn.app import models
from xattn.app.components import brush, sent_value
from xattn.app.models import ModelError
from xattn.app.navigation import address
from xattn.app.navigation.last_view import photo_bar
from xattn.app.pages.image.boxes import boxes_of
from xattn.app.pages.whatif import missed
from xattn.app.pages.whatif.answer import (
    FILLS,
    Mask,
    NetworkAnswer,
    bars,
    decode_mask,
    encode_mask,
    hide_cells,
    predict,
    raster_of,
    read_photo,
    region_runs,
    strongest_cells,
    verdict,
)
from xattn.app.state import Context, plain, short
from xattn.app.triage import selection
from xattn.backbone import sha256
from xattn.explainers import create_explainer
from xattn.packs.contained_files import PackError
from xattn.photos.view import View
from xattn.pictures.overlay import data_url, overlay
from xattn.pictures.scales import own_scale
from xattn.runtime.lru_cache import LRUCache

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.explainers import Explainer
    from xattn.heads import Head
    from xattn.packs.explanation import Explanation
    from xattn.packs.reader import Pack


KEY = "whatif."  # prefix of the page's session keys
KEPT = 32 << 20  # bytes of cached photos per session


@dataclass(eq=False)
class Painting:
    """One photo as the network sees it, with what the person has painted on it, and the results.

    ``stamp`` counts the masks that the page itself has set; ``problem`` says why the last mask from the
    browser was refused; ``drawn`` holds the URL of the pack's map for each entry. ``new_maps`` holds maps
    of the changed photo, and ``answered`` a language model's answers about it; their keys identify what was
    asked.
    """

    seen: NetworkAnswer
    mask: Mask
    regions: list[int]
    stamp: int = 0
    problem: str = ""
    drawn: dict[str, str] = field(default_factory=dict)
    new_maps: dict[tuple[object, ...], Explanation] = field(default_factory=dict)
    answered: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    @property
    def raster(self) -> tuple[int, int]:
        """Rows and columns of the mask."""
        return self.mask.shape[0], self.mask.shape[1]

    def paint(self, mask: Mask) -> None:
        """Replace the painted mask by one that the page makes."""
        self.mask, self.stamp, self.problem = mask, self.stamp + 1, ""


def painting_of(key: tuple[str, ...], see: Callable[[], NetworkAnswer]) -> Painting:
    """The session's painting of the photo with this ``key``; a new painting starts from the result of
    ``see``."""
    kept: LRUCache = st.session_state.setdefault(f"{KEY}kept", LRUCache(KEPT))

    def begin() -> Painting:
        photo = see()
        raster = raster_of((photo.pixels.shape[1], photo.pixels.shape[2]))
        return Painting(photo, np.zeros(raster, bool), region_runs(photo.pixels, raster))

    return kept.kept(key, begin, lambda found: min(2 * found.seen.pixels.nbytes, KEPT))


MOST_PASSES = 200  # most passes of a method while somebody waits


def picture(pixels: Tensor) -> Image.Image:
    """An input (3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((pixels.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())


def photo_url(pixels: Tensor) -> str:
    """An input as a URL for the browser."""
    return data_url(picture(pixels), quality=92, subsampling=0)


def map_url(pixels: Tensor, explanation: Explanation) -> str:
    """A map over the input that it belongs to, as a URL for the browser."""
    photo, scale = picture(pixels), own_scale(explanation)
    size = (photo.height, photo.width)
    values = View("whole", size, size, (0, 0, *size), size).to_photo(scale(explanation.map))
    return data_url(overlay(photo, values, cmap=scale.cmap), quality=88, subsampling=0)


def explain_pixels(pack: Pack, entry_id: str, pixels: Tensor, backbone: Backbone) -> Explanation:
    """A map of changed pixels (3, H, W), for the same class and by the same method as the map of an entry.

    Raises:
        ModelError: the head is missing. ValueError: the method cannot be run again, or is too slow.
    """
    entry = pack.explanation(entry_id)
    with models.exclusive_pass(f"to explain by {entry.method}"):
        method = _method(pack.provenance(entry_id), backbone)
        passes = method.total_forwards or 1
        if passes > MOST_PASSES:
            raise ValueError(
                f"{entry.method} takes {passes:,} passes of the network; choose a method that takes at "
                f"most {MOST_PASSES}."
            )
        images = pixels[None].to(backbone.device, backbone.mean.dtype)
        maps = method.attribute(images, torch.tensor([entry.target], device=backbone.device))
    return replace(entry, map=maps[0, 0].float().cpu().numpy())


def _method(made: dict[str, Any], backbone: Backbone) -> Explainer:
    """The explainer that made a map, according to the map's provenance."""
    name, seed = made["protocol"].get("explainer"), made["protocol"].get("seed")
    head = None
    if made["head"] is not None:
        backbone, head = _head(made["head"], backbone)
    else:
        taps = (made["backbone"] or {}).get("taps")
        if isinstance(taps, list) and tuple(taps) != tuple(backbone.taps):
            backbone = backbone.with_taps(taps)
    return create_explainer(str(name), backbone, head, seed=seed if type(seed) is int else 0)


def _head(record: dict[str, Any], backbone: Backbone) -> tuple[Backbone, Head]:
    """The head of a record, identified by its weights, and the network with the taps that it reads."""
    own = getattr(backbone, "probe", None)
    if own is not None and sha256(own) == record.get("sha256"):
        return backbone, own
    for key in models.heads(backbone.name):
        try:
            network, head = models.with_head(backbone.name, key)
        except ModelError:
            continue  # it has other weights
        if sha256(head) == record.get("sha256") and network.fingerprint == backbone.fingerprint:
            return network, head
    raise ModelError(
        f"The head {record.get('name')} that made this map is not among the available heads; put its "
        "folder below the root."
    )


SHARE = 0.2  # share of the picture that a suggestion hides or keeps
PAINTED = {"hidden": "Hidden", "kept": "Kept, everything else hidden"}


def page(context: Context) -> None:
    """Show a photo of the open pack, on which the person can paint, and the network's prediction."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    image_id = photo_bar(pack, "whatif", KEY, _carried)
    if found := boxes_of(pack, image_id):
        return missed.page(pack, image_id, found)
    with st.spinner("Loading the network that made this pack …"):
        backbone = models.backbone_of(pack)
    backbone.require_classes()
    _tried(pack, image_id, backbone)
    st.caption(
        "The photo is the one stored in the pack (at most 512 pixels per side), cropped as the network "
        "sees it; figures for a larger original may differ slightly. The network also sees the fill "
        "itself: if two fills agree, the change is more likely due to what is hidden."
    )


def _carried() -> dict[str, str | None]:
    """The URL parameters to carry over to another photo."""
    return {name: st.query_params.get(name) for name in ("view", "method", "fill", "paint")}


@st.fragment
def _tried(pack: Pack, image_id: str, backbone: Backbone) -> None:
    """The part of the page that changes with a stroke; the rest does not run again."""
    try:
        _answered(pack, image_id, backbone)
    except ValueError as error:  # main.py catches errors only in the page's first run
        st.error(plain(error))


def _answered(pack: Pack, image_id: str, backbone: Backbone) -> None:
    """Show the picture to paint on, and the network's answer to it."""
    with st.spinner("Reading the photo …", show_time=False):
        key = (pack.id, pack.version, image_id, backbone.fingerprint)
        painting = painting_of(key, lambda: read_photo(pack, image_id, backbone))
    entry_id, kind, keeps = _choices(pack, image_id)
    hidden = ~painting.mask if keeps else painting.mask
    pixels, after = painting.seen.pixels, None
    if painting.mask.any():
        pixels = hide_cells(pixels, hidden, kind, backbone)
        after = predict(backbone, pixels)
    words = verdict(painting.seen.answer, after, backbone)
    left, right = st.columns([5, 6], gap="large")
    with left:
        label = "The photo as the network sees it, to paint on"
        canvas(
            painting, f"{KEY}canvas", f"{pack.id} {pack.version} {image_id}", pixels, label, words
        )
    with right:
        st.subheader(plain(words), anchor=False)
        st.caption(_told(painting.mask, hidden, keeps))
        st.html(bars(painting.seen.answer, after, backbone))
        pressed = _presses(pack, entry_id, painting, after is not None)
        shown = pixels if after is not None else None
        _maps(pack, entry_id, painting, shown, (kind, keeps), pressed, backbone)


# ---------------------------------------------------------------------- choices


def _choices(pack: Pack, image_id: str) -> tuple[str, str, bool]:
    """The entry whose map is shown, the fill, and whether the painted part is kept instead of hidden."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    entries = selection.table(pack).entries_of(image_id)
    with bar:
        kind = address.segmented(
            "Fill",
            FILLS,
            "fill",
            help="What replaces the hidden part of the photo.",
        )
        paint = address.segmented("What is painted", PAINTED, "paint")
        methods = list(dict.fromkeys(entries["method"]))
        method = address.selectbox("Map", methods, "method", format_func=pack.title_of, width=220)
    return _entry(entries[entries["method"] == method]), kind, paint == "kept"


def _entry(entries: pd.DataFrame) -> str:
    """Among a method's maps, that of the class in the URL, else that of the most probable class."""
    wanted = entries[entries["target"].astype(str) == st.query_params.get("class", "")]
    rest = entries if wanted.empty else wanted
    return str(rest.sort_values("probability", ascending=False, kind="stable").index[0])


def canvas(
    painting: Painting, key: str, subject: str, pixels: Tensor, label: str, words: str
) -> None:
    """Show the picture to paint on, ``pixels`` (3, H, W); ``words`` are read out when they change."""
    brush(
        photo_url(pixels),
        painting.raster,
        key,
        subject=subject,
        aspect=pixels.shape[2] / pixels.shape[1],
        mask=encode_mask(painting.mask),
        stamp=painting.stamp,
        regions=painting.regions,
        label=label,
        alt=f"Photo, {painting.mask.mean():.0%} of it painted",
        said=words,
        on_paint=lambda: _painted(painting, key),
    )
    if painting.problem:
        st.warning(plain(painting.problem))


def _painted(painting: Painting, key: str) -> None:
    mask = sent_value(key, "paint")
    if mask is None:
        return
    try:
        painting.mask, painting.problem = decode_mask(mask, painting.raster), ""
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
    """Show buttons that paint the top of the map, and one that explains; returns whether it was pressed."""
    bar = st.container(horizontal=True, gap="small")
    for label, paint in (("Hide the top {}", "hidden"), ("Keep only the top {}", "kept")):
        bar.button(
            label.format(f"{SHARE:.0%}"),
            key=f"{KEY}top {paint}",
            on_click=_suggested,
            args=(pack, entry_id, painting, paint),
            help="Uses the map below: hiding what it marks should change the answer, and hiding the "
            "rest should not.",
        )
    pressed = bar.button("Explain the changed photo", key=f"{KEY}explain", disabled=not is_changed)
    return pressed and is_changed


def _suggested(pack: Pack, entry_id: str, painting: Painting, paint: str) -> None:
    try:
        painting.paint(strongest_cells(pack.explanation(entry_id).map, SHARE, painting.raster))
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
    """Show the pack's map, and after a click also the map of the changed photo."""
    try:
        own = pack.explanation(entry_id)
    except PackError as error:
        st.warning(plain(error))
        return
    title = f"{own.method_title} of {short(own.target_name)}"
    if entry_id not in painting.drawn:
        painting.drawn[entry_id] = map_url(painting.seen.pixels, own)
    pictures = [(painting.drawn[entry_id], title)]
    key = (entry_id, painting.mask.tobytes(), *how)
    if pressed and pixels is not None:
        try:
            with st.spinner(f"Explaining by {plain(own.method_title)} …"):
                painting.new_maps = {key: explain_pixels(pack, entry_id, pixels, backbone)}
        except ValueError as error:
            st.warning(plain(error))
    if pixels is not None and key in painting.new_maps:
        pictures.append((map_url(pixels, painting.new_maps[key]), f"{title}, changed photo"))
    st.html(_figures(pictures))


def _figures(pictures: list[tuple[str, str]]) -> str:
    """Pictures side by side, each with a caption, as HTML."""
    figures = "".join(
        f'<figure style="margin:0;flex:1 1 9rem;max-width:15rem"><img src="{url}" alt="Map by '
        f'{html.escape(title)}" style="width:100%;border-radius:6px;display:block"><figcaption '
        f'style="font-size:.8125rem;color:var(--quiet)">{html.escape(title)}</figcaption></figure>'
        for url, title in pictures
    )
    return f'<div style="display:flex;gap:.75rem;flex-wrap:wrap">{figures}</div>'
