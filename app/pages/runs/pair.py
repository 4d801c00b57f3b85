"""One photo of two runs: what each says of it, its two maps, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.components import grid, sent
from xattn.app.components.theme import name_html
from xattn.app.navigation import selection
from xattn.app.pictures.linked import map_cells
from xattn.app.pictures.rendering import Look, data_uri, jpeg, legends, overlay_url, photo_url
from xattn.app.state import plain, short
from xattn.correlation import disagreement
from xattn.eval.report.pack_differences import Photo
from xattn.packs.explanation import Explanation
from xattn.pictures.contact_sheet import legends_html
from xattn.pictures.overlay import DIVERGING, overlay
from xattn.pictures.scales import Legend, make_scale
from xattn.pictures.words import method_title

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

SIDE = 480  # pixels of a picture's longer side


def pair_of_maps(
    before: Pack, after: Pack, methods: tuple[str, str], photo: Photo, listed: Sequence[str]
) -> None:
    """Show the photo's maps side by side; ``listed``: the photos that Previous and Next lead through."""
    _bar(photo.image_id, listed)
    st.html(name_html(photo.title))
    st.markdown(_verdict(photo))
    packs = list(zip((before, after), methods, (photo.image_id, photo.other_id), strict=True))
    ones, others = (_by_target(*side) for side in packs)
    rows: list[list[str | None]]
    rows = [[ones[target], others[target]] for target in ones if target in others]
    if not rows:
        st.caption(
            "The two runs explain different classes of this photo, so their maps cannot be compared "
            "cell by cell. With --classes predicted,label both have the map of the true class."
        )
        rows = [[next(iter(found.values()), None) for found in (ones, others)]]
    for number, entry_ids in enumerate(rows):
        _row(packs, photo, entry_ids, number)


def _bar(image_id: str, listed: Sequence[str]) -> None:
    at = listed.index(image_id) if image_id in listed else -1
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    bar.button("All photos", key="runs.all", on_click=_close, help="Back to the lists")
    for text, to, keys in (("Previous", at - 1, "Shift+Left"), ("Next", at + 1, "Shift+Right")):
        there = at >= 0 and 0 <= to < len(listed)
        bar.button(
            text,
            key=f"runs.{text.lower()}",
            on_click=_show,
            args=(listed[to] if there else image_id,),
            disabled=not there,
            shortcut=keys,
        )
    if at >= 0:
        bar.caption(f"{at + 1:,} of {len(listed):,}", width="content")


def _close() -> None:
    st.query_params.pop("image", None)


def _show(image_id: str) -> None:
    st.query_params["image"] = image_id


def _verdict(photo: Photo) -> str:
    """Both predictions as a sentence."""
    said = [
        f"{short(name)} {p:.1%}" if p == p else short(name)
        for name, p in zip(photo.predicted, photo.confidence, strict=True)
        if name is not None
    ]
    parts = [plain(" → ".join(said))] if said else []
    if photo.label_name is not None:
        parts.append(plain(f"true: {short(photo.label_name)}"))
    if photo.right == (False, True):
        parts.append("**now right**")
    elif photo.right == (True, False):
        parts.append("**now wrong**")
    return " · ".join(parts)


def _by_target(pack: Pack, method: str, image_id: str) -> dict[int, str]:
    """The method's maps of a photo by class, the most probable first."""
    entries = selection.table(pack).entries_of(image_id)
    own = entries[entries["method"] == method]
    own = own.sort_values("probability", ascending=False, kind="stable")
    return dict(zip(own["target"], own.index, strict=True))


def _row(
    packs: Sequence[tuple[Pack, str, str]],
    photo: Photo,
    entry_ids: Sequence[str | None],
    number: int,
) -> None:
    """The photo, its two maps, and their difference where they are of one class."""
    look = Look(side=SIDE)
    before = packs[0][0]
    cells: list[dict[str, Any]] = [
        {
            "id": "photo",
            "src": photo_url(before, photo.image_id, SIDE),
            "alt": photo.title,
            "title": "Photo",
        }
    ]
    explained: list[Explanation] = []
    keys: list[Legend] = []
    for (pack, method, image_id), entry_id, when in zip(
        packs, entry_ids, ("before", "after"), strict=True
    ):
        if entry_id is None:
            continue
        explanation, title = pack.explanation(entry_id), method_title(method)
        explained.append(explanation)
        keys += legends(pack, [entry_id], look)
        cells.append(
            {
                "id": when,
                "src": overlay_url(pack, entry_id, look),
                "alt": f"{when.capitalize()}: map by {title} of {explanation.target_name}",
                "title": f"{short(explanation.target_name)}  {explanation.probability:.1%}",
                "lines": [pack.name, title],
                "map": map_cells(explanation, crop=False),
                "href": state.link("image", pack=pack.id, image=image_id, entry=entry_id),
            }
        )
    if len(explained) == 2 and explained[0].target == explained[1].target:
        source, key = _difference(before, *explained)
        moved = disagreement([e.map for e in explained])
        line = "" if moved != moved else f"map moved by {moved:.2f}"
        cells.append(
            {
                "id": "difference",
                "src": source,
                "alt": "Where the second map has more than the first, and where it has less",
                "title": "Difference",
                "lines": [line] if line else [],
            }
        )
        keys.append(key)
    height, width = explained[0].view.photo_size if explained else (3, 4)
    shape = width / height
    grid(
        cells,
        f"runs.maps.{number}",
        label="The photo's maps in both runs",
        columns=4,
        width=150,
        aspect=min(max(shape, 0.6), 2.0),
        linked={"aspect": shape, "subject": photo.image_id},
        on_open=lambda: _open(packs, entry_ids, number),
    )
    st.html(legends_html(list(dict.fromkeys(keys))))


def _open(
    packs: Sequence[tuple[Pack, str, str]], entry_ids: Sequence[str | None], number: int
) -> None:
    """A map leads to its photo on the image page of its pack."""
    opened = sent(f"runs.maps.{number}", "open")
    for (pack, _, image_id), entry_id, when in zip(
        packs, entry_ids, ("before", "after"), strict=True
    ):
        if opened == when:
            state.go("image", pack=pack.id, image=image_id, entry=entry_id)


def _difference(pack: Pack, one: Explanation, other: Explanation) -> tuple[str, Legend]:
    """The min-maxed map of ``other`` less that of ``one`` over the photo, where both networks look.

    It is drawn on the photo's own pixels, so that the two may have other grids and crops.
    """
    photo = pack.photo(one.image_id, SIDE)
    ones, others = (
        e.view.to_photo(e.normalized(), (photo.height, photo.width)) for e in (one, other)
    )
    scale = make_scale([(-1.0, 1.0)], DIVERGING)
    drawn = overlay(photo, scale(others - ones), 0.55, scale.cmap)
    text = (
        "difference of the min-maxed maps: orange where the second has more, blue where the first"
    )
    return data_uri(jpeg(drawn)), Legend("−1", "+1", text, scale.cmap)
