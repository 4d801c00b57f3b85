"""Two runs: what changed between two packs of the same photos, or between two methods of one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.components import grid, sent
from xattn.app.navigation import selection, url_widgets
from xattn.app.pages.runs.pair import pair_of_maps
from xattn.app.pictures.rendering import Look, overlay_url, photo_url
from xattn.app.state import Context, plain, short
from xattn.eval.report.pack_differences import (
    Change,
    PackDifference,
    Photo,
    compare_packs,
    difference_lines,
    renamed_note,
)
from xattn.eval.results import MIN_IMAGES
from xattn.packs.contained_files import PackError
from xattn.pictures.words import method_title

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.packs.reader import Pack

SIDE = 240  # pixels of a picture's longer side
MOST = 20_000  # photos that are compared; of more, an even sample
SHOWN = 24  # photos of a list
TRIED = 8  # packs that are opened to find one with the same photos
PAIRS, DEFAULT = "runs.pairs", "runs.default"
LISTS = {
    "wrong": "Now wrong",
    "right": "Now right",
    "changed": "Other prediction",
    "moved": "Maps that moved most",
}


class Runs(NamedTuple):
    """The two packs, and the method of each whose maps are compared."""

    before: Pack
    after: Pack
    methods: tuple[str, str]

    @property
    def same_pack(self) -> bool:
        """Whether two methods of one pack are compared."""
        return self.before.id == self.after.id

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called: by their packs, or by their methods where these differ."""
        by, by2 = map(method_title, self.methods)
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
    key = " ".join(f"{p.id} {p.version}" for p in (runs.before, runs.after))
    try:
        with st.spinner("Comparing the packs", show_time=True):
            found = _compared(runs, key, runs.methods)
    except ValueError as error:
        st.error(plain(error))
        return
    _headline(runs, found)
    image_id = st.query_params.get("image")
    if image_id is None:
        _figures(runs, found)
        _list(runs, found)
        return
    chosen = _photos(found, _list_name(runs, found))
    by_id = {photo.image_id: photo for photo in found.common}
    if image_id not in by_id:
        st.warning("The two packs do not both have this photo; choose one below.")
        st.query_params.pop("image")
        _list(runs, found)
        return
    pair_of_maps(*runs, by_id[image_id], [photo.image_id for photo in chosen])


@st.cache_resource(max_entries=8, show_spinner=False)
def _compared(_runs: Runs, key: str, methods: tuple[str, str]) -> PackDifference:
    return compare_packs(_runs.before, _runs.after, methods, MOST)


# ---------------------------------------------------------------------- which two


def _choose(library: Library, pack: Pack) -> Runs | None:
    """The open pack and the one that the person or the address chose; None where there is no choice."""
    names = {info.id: info.name for info in library.packs() if info.problem is None}
    names.setdefault(pack.id, pack.name)
    several = len(_methods(pack)) > 1
    others = [i for i in names if i != pack.id or several]
    if not others:
        _nothing(pack)
        return None
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    wanted = st.query_params.get("other")
    if wanted is not None and wanted not in others:
        st.warning("The second pack of this address is not here any more; this is another one.")
    if st.session_state.get(DEFAULT, (None, None))[0] != pack.id:
        st.session_state[DEFAULT] = (pack.id, _default(library, pack, others))
    usual = st.session_state[DEFAULT][1]
    with bar:
        other_id = url_widgets.selectbox(
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
        one = _method("Maps by", ones, "by", ones[0])
        same = one if one in others_by and after is not pack else others_by[-1]
        two = _method("and by", others_by, "by2", same)
    bar.button("Swap", key="runs.swap", on_click=_swap, args=(pack.id, after.id, one, two))
    return Runs(pack, after, (one, two))


def _methods(pack: Pack) -> list[str]:
    """The pack's methods, controls last."""
    choices = selection.table(pack).choices
    return list(dict.fromkeys([*choices.under_test, *choices.methods]))


def _method(label: str, methods: list[str], key: str, default: str) -> str:
    if len(methods) == 1:
        return methods[0]
    return url_widgets.selectbox(
        label, methods, key, default=default, format_func=method_title, width=200
    )


def _swap(before: str, after: str, one: str, two: str) -> None:
    for name in ("other", "by", "by2"):
        st.session_state.pop(name, None)
    kept = {name: st.query_params.get(name) for name in ("list", "image")}
    state.go("runs", pack=after, other=before, by=two, by2=one, **kept)


def _default(library: Library, pack: Pack, others: Sequence[str]) -> str:
    """The first of a few packs that shares an id with the open one; else the first."""
    own = set(pack.image_ids)  # reading the hashes of all pictures would take longer
    for other_id in [i for i in others if i != pack.id][:TRIED]:
        try:
            if not own.isdisjoint(library.open(other_id).image_ids):
                return other_id
        except PackError:
            continue  # gone or changed since it was listed
    return pack.id if pack.id in others else others[0]


def _nothing(pack: Pack) -> None:
    with st.container(border=True):
        st.markdown("**There is no second pack yet.**")
        st.markdown("Explain the same photos with another network or head, and this page shows:")
        st.markdown(
            "- which predictions became right or wrong\n- which maps moved most\n"
            "- how accuracy and each metric changed"
        )
        output = shlex.quote(str(state.settings().root / "second"))
        st.code(
            f"xattn explain PHOTOS --labels folders --output {output}",
            language="sh",
            wrap_lines=True,
        )


# ---------------------------------------------------------------------- figures


def _headline(runs: Runs, found: PackDifference) -> None:
    """What changed, in a sentence or two."""
    count = len(found.common)
    photos = "1 photo" if count == 1 else f"{count:,} photos"
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
        st.markdown(f"**{len(found.changed):,} of {photos}** have another prediction.")
        st.caption("No true classes are known; explain with --labels, and mistakes are compared.")
    if found.renamed:
        st.caption(renamed_note(found.renamed))
    alone = [
        f"{n:,} photos are in {name} alone"
        for n, name in zip(found.alone, found.names, strict=True)
        if n
    ]
    if alone:
        st.caption(plain(f"{' and '.join(alone)}; they are left out."))
    if count < MIN_IMAGES:
        st.caption(f"{photos}: too few images for a verdict.")


def _figures(runs: Runs, found: PackDifference) -> None:
    """Each measure before and after, with the interval of the paired difference."""
    rows: list[tuple[str, Change]] = []
    if found.accuracy is not None and not runs.same_pack:
        rows.append(("accuracy", found.accuracy))
    rows += [(key, change) for (_, key), change in found.metrics.items()]
    if found.left_out:
        st.caption(plain(f"Left out, by different protocols: {', '.join(found.left_out)}."))
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
    """Whether the change can be told from none."""
    _, lo, hi, n = change.difference
    if n < MIN_IMAGES:
        return "too few photos"
    if lo <= 0 <= hi:
        return "not told apart"
    return "better" if (lo > 0) == higher_is_better else "worse"


# ---------------------------------------------------------------------- lists of photos


def _photos(found: PackDifference, name: str) -> list[Photo]:
    """The photos of a list, in its order."""
    if name == "moved":
        by_id = {photo.image_id: photo for photo in found.common}
        return [by_id[i] for i in dict.fromkeys(m.image_id for m in found.moved)]
    lists = {"wrong": found.now_wrong, "right": found.now_right, "changed": found.changed}
    return lists[name]


def _names(runs: Runs, found: PackDifference) -> list[str]:
    """The lists that hold a photo; of two methods of one pack the predictions are the same."""
    return ["moved"] if runs.same_pack else [name for name in LISTS if _photos(found, name)]


def _list_name(runs: Runs, found: PackDifference) -> str:
    """The list of the address, else the first."""
    names, wanted = _names(runs, found), st.query_params.get("list")
    return wanted if wanted in names else next(iter(names), "moved")


def _list(runs: Runs, found: PackDifference) -> None:
    """The photos of one list, each with its map in both packs."""
    name = _list_name(runs, found)
    if len(names := _names(runs, found)) > 1:
        name = url_widgets.segmented(
            "Photos",
            names,
            "list",
            format_func=lambda key: f"{LISTS[key]} ({len(_photos(found, key)):,})",
            label_visibility="collapsed",
        )
    photos = _photos(found, name)
    if not photos:
        st.info(
            "All predictions are the same, and no photo has maps of one class in both packs; explain "
            "the same classes by name."
        )
        return
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
    """The cells of a photo: its map in the one run, and in the other."""
    href = state.link("runs", **_address(runs), list=name, image=photo.image_id)
    cells = []
    for side, pack in enumerate((runs.before, runs.after)):
        image_id, run = _ids(photo)[side], runs.names[side]
        entry_id = maps[side].get(image_id)
        if side:
            lines = ["" if moved is None else f"map moved by {moved:.2f}"]
        else:
            lines = [f"true: {short(photo.label_name)}" if photo.label_name else "", photo.title]
        right = photo.right[side]
        badge = {"text": "Right" if right else "Wrong", "kind": "good" if right else "bad"}
        cells.append(
            {
                "id": f"{side} {photo.image_id}",
                "src": overlay_url(pack, entry_id, Look(side=SIDE))
                if entry_id
                else photo_url(pack, image_id, SIDE),
                "alt": f"{run}: map on {photo.title}" if entry_id else f"{run}: {photo.title}",
                "title": _predicted(photo, side),
                "lines": [run, *filter(None, lines)],
                "badge": None if right is None else badge,
                "href": href,
            }
        )
    return cells


def _predicted(photo: Photo, side: int) -> str:
    """What one of the two networks says of a photo."""
    predicted, p = photo.predicted[side], photo.confidence[side]
    if predicted is None:
        return photo.title
    return short(predicted) if p != p else f"{short(predicted)}  {p:.1%}"


def _address(runs: Runs) -> dict[str, str]:
    """The two packs and methods in the URL."""
    by, by2 = runs.methods
    return {"pack": runs.before.id, "other": runs.after.id, "by": by, "by2": by2}


def _opened(name: str) -> None:
    opened = sent(PAIRS, "open")
    if isinstance(opened, str) and " " in opened:
        st.query_params["list"] = name
        st.query_params["image"] = opened.partition(" ")[2]


def _export(found: PackDifference) -> None:
    """What ``xattn diff`` prints and writes, as files."""
    bar = st.container(horizontal=True, gap="small")
    bar.download_button(
        "Report, Markdown",
        data=lambda: "\n".join(difference_lines(found)) + "\n",
        file_name="difference.md",
        mime="text/markdown",
        on_click="ignore",
        key="runs.report",
    )
    bar.download_button(
        "All photos, JSON",
        data=lambda: json.dumps(found.to_json(), ensure_ascii=False, indent=1),
        file_name="difference.json",
        mime="application/json",
        on_click="ignore",
        key="runs.json",
    )
