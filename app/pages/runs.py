"""Two runs: the changes between two packs of the same photos, or between two methods of one pack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.components import download, explain_command, grid, sent_value, verdict
from xattn.app.components.theme import name_html
from xattn.app.navigation import address, chosen, last_view
from xattn.app.pictures.rendering import (
    Look,
    data_uri,
    jpeg,
    legends,
    map_cells,
    map_url,
    overlay_url,
    photo_url,
)
from xattn.app.state import Context, cache_by_version, plain, short
from xattn.app.triage import selection
from xattn.correlation import disagreement
from xattn.eval.evaluation.results import MIN_IMAGES
from xattn.eval.report.pack_differences import (
    Change,
    PackDifference,
    Photo,
    compare_packs,
    difference_lines,
    renamed_note,
)
from xattn.packs.contained_files import PackError
from xattn.packs.explanation import Explanation
from xattn.pictures.contact_sheet import legends_html
from xattn.pictures.overlay import DIVERGING, overlay
from xattn.pictures.scales import Legend, make_scale
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.packs.reader import Pack


PAIR_SIDE = 480  # pixels of a picture's longer side


def pair_of_maps(
    before: Pack, after: Pack, methods: tuple[str, str], photo: Photo, listed: Sequence[str]
) -> None:
    """Show the photo's maps side by side; ``listed`` are the photos that Previous and Next step through."""
    _bar(photo.image_id, listed)
    st.html(name_html(photo.title))
    st.markdown(_pair_verdict(photo))
    packs = list(zip((before, after), methods, (photo.image_id, photo.other_id), strict=True))
    ones, others = (_by_target(*side) for side in packs)
    rows: list[list[str | None]]
    rows = [[ones[target], others[target]] for target in ones if target in others]
    if not rows:
        st.caption(
            "The two runs explain different classes of this photo, so their maps cannot be compared "
            "cell by cell. With --classes predicted,label both runs explain the true class."
        )
    alone = [
        [side[target] for target in side if target not in other]
        for side, other in ((ones, others), (others, ones))
    ]
    rows += map(list, zip_longest(*alone))  # such as the maps of the class that is now predicted
    for number, entry_ids in enumerate(rows):
        _row(packs, photo, entry_ids, number)


def _bar(image_id: str, listed: Sequence[str]) -> None:
    at = listed.index(image_id) if image_id in listed else -1
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    bar.button("All photos", key="runs.all", on_click=_close, help="Back to the lists")
    before = listed[at - 1] if at > 0 else None
    after = listed[at + 1] if 0 <= at < len(listed) - 1 else None
    last_view.steps(bar, "runs.", before, after, _show)
    if at >= 0:
        bar.caption(f"{at + 1:,} of {len(listed):,}", width="content")


def _close() -> None:
    st.query_params.pop("image", None)


def _show(image_id: str) -> None:
    st.query_params["image"] = image_id


def _pair_verdict(photo: Photo) -> str:
    """A line with both predictions."""
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
    """Show the photo, its two maps, and their difference if they are of one class."""
    look = Look(side=PAIR_SIDE)
    before = packs[0][0]
    cells: list[dict[str, Any]] = [
        {
            "id": "photo",
            "src": photo_url(before, photo.image_id, PAIR_SIDE),
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
        explanation, title = pack.explanation(entry_id), pack.title_of(method)
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
    """Open the image page of a map's photo in its pack."""
    opened = sent_value(f"runs.maps.{number}", "open")
    for (pack, _, image_id), entry_id, when in zip(
        packs, entry_ids, ("before", "after"), strict=True
    ):
        if opened == when:
            state.go("image", pack=pack.id, image=image_id, entry=entry_id)


def _difference(pack: Pack, one: Explanation, other: Explanation) -> tuple[str, Legend]:
    """The min-maxed map of ``other`` minus the min-maxed map of ``one``, over the part of the photo
    that both networks see.

    It is drawn on the photo's own pixels, so that the maps may differ in grid and crop.
    """
    photo = pack.photo(one.image_id, PAIR_SIDE)
    ones, others = (
        e.view.to_photo(e.normalized(), (photo.height, photo.width)) for e in (one, other)
    )
    scale = make_scale([(-1.0, 1.0)], DIVERGING)
    drawn = overlay(photo, scale(others - ones), 0.55, scale.cmap)
    text = (
        "difference of the min-maxed maps: orange where the second has more, blue where the first"
    )
    return data_uri(jpeg(drawn)), Legend("−1", "+1", text, scale.cmap)


SIDE = 240  # pixels of a picture's longer side
MOST = 20_000  # most photos compared; of more, an evenly spaced sample
SHOWN = 24  # photos shown of a list
TRIED = 8  # most packs opened to find one with the same photos
PAIRS, DEFAULT = "runs.pairs", "runs.default"
LISTS = {
    "wrong": "Now wrong",
    "right": "Now right",
    "changed": "Prediction changed",
    "moved": "Maps that changed most",
    "chosen": "Chosen photos",
}


class Runs(NamedTuple):
    """The two packs, and for each the method whose maps are compared."""

    before: Pack
    after: Pack
    methods: tuple[str, str]

    @property
    def same_pack(self) -> bool:
        """Whether two methods of one pack are compared."""
        return self.before.id == self.after.id

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two runs: the names of their packs, with the methods if these differ, or two
        methods of one pack."""
        by, by2 = self.before.title_of(self.methods[0]), self.after.title_of(self.methods[1])
        if self.same_pack:
            return by, by2
        one, two = self.before.name, self.after.name
        return (one, two) if by == by2 else (f"{one}, {by}", f"{two}, {by2}")


def page(context: Context) -> None:
    """Compare the open pack with another."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    st.title("Two runs", anchor=False)
    runs = _choose(context.library, pack)
    if runs is None:
        return
    try:
        with st.spinner("Comparing the packs", show_time=True):
            found = _compared(runs.before, runs.after, runs.methods, MOST)
    except ValueError as error:
        st.error(plain(error))
        return
    _headline(runs, found)
    image_id = st.query_params.get("image")
    if image_id is None:
        _figures(runs, found)
        _list(runs, found)
        return
    listed = _photos(runs, found, _list_name(runs, found))
    by_id = {photo.image_id: photo for photo in found.common}
    if image_id not in by_id:
        st.warning("The two packs do not both have this photo; choose one below.")
        st.query_params.pop("image")
        _list(runs, found)
        return
    pair_of_maps(*runs, by_id[image_id], [photo.image_id for photo in listed])


_compared = cache_by_version(8)(compare_packs)


# ---------------------------------------------------------------------- choosing the runs


def _choose(library: Library, pack: Pack) -> Runs | None:
    """The open pack and the one chosen by the person or the address; None if there is no other."""
    names = {info.id: info.name for info in library.packs() if info.problem is None}
    names.setdefault(pack.id, pack.name)
    several = len(_methods(pack)) > 1
    others = [i for i in names if i != pack.id or several]
    if not others:
        _nothing()
        return None
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    wanted = st.query_params.get("other")
    if wanted is not None and wanted not in others:
        st.warning("The second pack of this address no longer exists; another one is shown.")
    if st.session_state.get(DEFAULT, (None, None))[0] != pack.id:
        st.session_state[DEFAULT] = (pack.id, _default(library, pack, others))
    usual = st.session_state[DEFAULT][1]
    with bar:
        other_id = address.selectbox(
            plain(f"{pack.name}, compared with"),
            others,
            "other",
            default=usual if usual in others else None,
            format_func=lambda i: names[i] if i != pack.id else f"{names[i]}, by another method",
            width=360,
        )
    after = pack if other_id == pack.id else library.open(other_id)
    ones, others_by = _methods(pack), _methods(after)
    with bar:
        both = [name for name in ones if name in others_by]
        one = address.method_box(pack, ones, 200, "by", default=(both or ones)[0])
        same = one if one in others_by and after is not pack else others_by[-1]
        two = address.method_box(after, others_by, 200, "by2", "and by", same)
    bar.button("Swap", key="runs.swap", on_click=_swap, args=(pack.id, after.id, one, two))
    return Runs(pack, after, (one, two))


def _methods(pack: Pack) -> list[str]:
    """The pack's methods, controls last."""
    choices = selection.table(pack).choices
    return list(dict.fromkeys([*choices.under_test, *choices.methods]))


def _swap(before: str, after: str, one: str, two: str) -> None:
    for name in ("other", "by", "by2"):
        st.session_state.pop(name, None)
    kept = {name: st.query_params.get(name) for name in ("list", "image")}
    state.go("runs", pack=after, other=before, by=two, by2=one, **kept)


def _default(library: Library, pack: Pack, others: Sequence[str]) -> str:
    """Of a few packs the one that shares most photos' ids with the open one; else the first pack."""
    own = set(pack.image_ids)  # reading the hashes of all pictures would take longer
    best, most = pack.id if pack.id in others else others[0], 0
    for other_id in [i for i in others if i != pack.id][:TRIED]:
        with suppress(PackError):  # deleted or changed since it was listed
            if (shared := len(own.intersection(library.open(other_id).image_ids))) > most:
                best, most = other_id, shared
    return best


def _nothing() -> None:
    with st.container(border=True):
        st.markdown("**There is no second pack yet.**")
        st.markdown("Explain the same photos with another network or head, and this page shows:")
        st.markdown(
            "- which predictions became right or wrong\n- which maps changed most\n"
            "- how accuracy and each metric changed"
        )
        explain_command("second")


# ---------------------------------------------------------------------- figures


def _headline(runs: Runs, found: PackDifference) -> None:
    """Show what changed in a sentence or two."""
    count = len(found.common)
    photos = count_phrase(count, "photo")
    if found.shared > count:
        photos += f" (of {found.shared:,}, evenly spread)"
    if runs.same_pack:
        st.markdown(f"{photos}, explained by two methods.")
    elif found.accuracy is not None:
        mean, lo, hi, _ = found.accuracy.difference
        change = f"{100 * mean:+.1f} points (95 % interval {100 * lo:+.1f} to {100 * hi:+.1f})"
        before, after = found.accuracy.before.mean, found.accuracy.after.mean
        one, two = (plain(p.name) for p in (runs.before, runs.after))
        st.markdown(
            f"From {one} to {two}, accuracy on {photos} changed **from {before:.1%} to {after:.1%}**, "
            f"by {change}. {len(found.now_right):,} became right, {len(found.now_wrong):,} became wrong."
        )
    else:
        st.markdown(f"**{len(found.changed):,} of {photos}** have a different prediction.")
        st.caption("No true classes are known; explain with --labels to compare mistakes as well.")
    if found.renamed:
        st.caption(renamed_note(found.renamed))
    alone = [
        f"{n:,} photos are only in {name}"
        for n, name in zip(found.alone, found.names, strict=True)
        if n
    ]
    if alone:
        st.caption(plain(f"{' and '.join(alone)}; they are left out."))
    if count < MIN_IMAGES:
        st.caption(f"{photos}: too few images for a verdict.")


def _figures(runs: Runs, found: PackDifference) -> None:
    """Show each measure before and after, with the interval of the paired difference."""
    rows: list[tuple[str, Change]] = []
    if found.accuracy is not None and not runs.same_pack:
        rows.append(("accuracy", found.accuracy))
    rows += [(key, change) for (_, key), change in found.metrics.items()]
    if found.left_out:
        st.caption(plain(f"Left out because protocols differ: {', '.join(found.left_out)}."))
    if not rows:
        return
    better = {m.key: m.higher_is_better for m in runs.after.metrics}
    before, after = runs.names
    table = pd.DataFrame(
        {
            "measure": [key for key, _ in rows],
            before: [change.before.mean for _, change in rows],
            after: [change.after.mean for _, change in rows],
            "difference": [change.difference.mean for _, change in rows],
            "95 % interval": [
                f"{change.difference.lo:+.3f} to {change.difference.hi:+.3f}" for _, change in rows
            ],
            "verdict": [_verdict(change, better.get(key, True)) for key, change in rows],
            "photos": [change.difference.n for _, change in rows],
        }
    )
    config: dict[str, Any] = {
        name: st.column_config.NumberColumn(format="%.3f") for name in (before, after, "difference")
    }
    config["measure"] = st.column_config.TextColumn(pinned=True)
    st.dataframe(table, hide_index=True, width="stretch", column_config=config)


def _verdict(change: Change, higher_is_better: bool) -> str:
    """Whether there is a clear change."""
    _, lo, hi, n = change.difference
    if n < MIN_IMAGES:
        return "too few photos"
    if lo <= 0 <= hi:
        return "no clear difference"
    return "better" if (lo > 0) == higher_is_better else "worse"


# ---------------------------------------------------------------------- lists of photos


def _photos(runs: Runs, found: PackDifference, name: str) -> list[Photo]:
    """The photos of a list, in order."""
    if name == "chosen":
        now = set(chosen.chosen_photos(runs.before))
        return [photo for photo in found.common if photo.image_id in now]
    if name == "moved":
        by_id = {photo.image_id: photo for photo in found.common}
        return [by_id[i] for i in dict.fromkeys(m.image_id for m in found.moved)]
    lists = {"wrong": found.now_wrong, "right": found.now_right, "changed": found.changed}
    return lists[name]


def _names(runs: Runs, found: PackDifference) -> list[str]:
    """The lists that are not empty; with two methods of one pack the predictions are the same."""
    names = ["moved", "chosen"] if runs.same_pack else list(LISTS)
    return [name for name in names if _photos(runs, found, name)]


def _list_name(runs: Runs, found: PackDifference) -> str:
    """The list in the address, else the first."""
    names, wanted = _names(runs, found), st.query_params.get("list")
    return wanted if wanted in names else next(iter(names), "moved")


def _list(runs: Runs, found: PackDifference) -> None:
    """Show the photos of one list, each with its map in both packs."""
    name = _list_name(runs, found)
    if len(names := _names(runs, found)) > 1:
        titles = {key: f"{LISTS[key]} ({len(_photos(runs, found, key)):,})" for key in names}
        name = address.segmented("Photos", titles, "list", label_visibility="collapsed")
    photos = _photos(runs, found, name)
    if not photos:
        st.info(
            "All predictions are the same, and no photo has maps of the same class in both packs; explain "
            "the same classes by name."
        )
        return
    chosen.button(runs.before, [photo.image_id for photo in photos], "runs.choose")
    moved = {m.image_id: m.moved for m in reversed(found.moved)}
    maps = [
        selection.table(pack).first_maps(method, [ids[side] for ids in map(_ids, photos[:SHOWN])])
        for side, (pack, method) in enumerate(
            zip((runs.before, runs.after), runs.methods, strict=True)
        )
    ]
    cells = [
        cell
        for photo in photos[:SHOWN]
        for cell in _two_cells(runs, photo, maps, moved.get(photo.image_id), name)
    ]
    grid(
        cells,
        PAIRS,
        label=f"{LISTS[name]}: before and after",
        columns=4,
        width=140,
        on_open=lambda: _opened(name),
    )
    if len(photos) > SHOWN:
        st.caption(f"The first {SHOWN} of {len(photos):,}; the report has all of them.")
    _export(found)


def _ids(photo: Photo) -> tuple[str, str]:
    """The photo's id in either pack."""
    return photo.image_id, photo.other_id


def _two_cells(
    runs: Runs, photo: Photo, maps: list[dict[str, str]], moved: float | None, name: str
) -> list[dict[str, Any]]:
    """The cells of a photo: its map in each of the two runs."""
    href = state.link("runs", **_address(runs), list=name, image=photo.image_id)
    cells = []
    for side, pack in enumerate((runs.before, runs.after)):
        image_id, run = _ids(photo)[side], runs.names[side]
        entry_id = maps[side].get(image_id)
        if side:
            lines = ["" if moved is None else f"map moved by {moved:.2f}"]
        else:
            lines = [f"true: {short(photo.label_name)}" if photo.label_name else "", photo.title]
        cells.append(
            {
                "id": f"{side} {photo.image_id}",
                "src": map_url(pack, image_id, entry_id, Look(side=SIDE)),
                "alt": f"{run}: map on {photo.title}" if entry_id else f"{run}: {photo.title}",
                "title": _predicted(photo, side),
                "lines": [run, *filter(None, lines)],
                "badge": verdict(photo.right[side]),
                "href": href,
            }
        )
    return cells


def _predicted(photo: Photo, side: int) -> str:
    """The prediction of one of the two networks for a photo."""
    predicted, p = photo.predicted[side], photo.confidence[side]
    if predicted is None:
        return photo.title
    return short(predicted) if p != p else f"{short(predicted)}  {p:.1%}"


def _address(runs: Runs) -> dict[str, str]:
    """The two packs and methods as URL parameters."""
    by, by2 = runs.methods
    return {"pack": runs.before.id, "other": runs.after.id, "by": by, "by2": by2}


def _opened(name: str) -> None:
    opened = sent_value(PAIRS, "open")
    if isinstance(opened, str) and " " in opened:
        st.query_params["list"] = name
        st.query_params["image"] = opened.partition(" ")[2]


def _export(found: PackDifference) -> None:
    """Offer the output of ``xattn diff`` as files."""
    bar = st.container(horizontal=True, gap="small")

    def report() -> str:
        return "\n".join([*difference_lines(found), ""])

    def photos() -> str:
        return json.dumps(found.to_json(), ensure_ascii=False, indent=1)

    download(bar, "Report, Markdown", report, "difference.md", "runs.report")
    download(bar, "All photos, JSON", photos, "difference.json", "runs.json")
