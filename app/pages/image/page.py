"""One photo: its maps side by side, its classes, the maps' faithfulness, and their origin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from xattn.app import components, state
from xattn.app.components import grid, sent_value
from xattn.app.components.look import STYLES, look_control
from xattn.app.components.theme import name_html
from xattn.app.navigation import address, chosen, frame, last_view
from xattn.app.pages.image import photo_tabs
from xattn.app.pages.image.boxes import PhotoBox, boxes_of, outlines, photo_boxes
from xattn.app.pages.image.display import (
    SIDE,
    WIDTH,
    PhotoView,
    aspect,
    aspect_of,
    file_name,
    legend,
    photo_of,
    select,
)
from xattn.app.pictures.rendering import blank_maps, map_cells, overlay_url
from xattn.app.state import Context, plain, short
from xattn.app.triage import selection, tag_files
from xattn.app.triage.selection import View
from xattn.app.triage.store import KEYS, NOTE_LENGTH, Mark, Store, TagsError
from xattn.app.triage.tag_files import Person
from xattn.packs.contained_files import PackError
from xattn.pictures.explained import probability_text
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.app.pages.image.objects import Objects
    from xattn.packs.reader import Pack


PRESSED = "image.keys"  # the component of the keys
BESIDE = "_beside"  # the session's key of the photos before and after one, by its id
HELD = "_note"  # the session's key of the :class:`_Held` of the page's note
PLACE = (
    "_place"  # the session's key of where keys are: {"at": photo, "keys": whether they led there}
)


def neighbours(pack: Pack, view: View, image_id: str) -> tuple[str | None, str | None, int, int]:
    """:meth:`Selection.neighbours`; if the photo has just left the selection because its tags changed, its
    previous neighbours."""
    before, after, number, count = selection.select(pack, view).neighbours(image_id)
    kept: dict[str, tuple[str | None, str | None]] = st.session_state.setdefault(BESIDE, {})
    if number:
        kept.clear()
        kept[image_id] = before, after
    return *kept.get(image_id, (before, after)), number, count


def image_of_page(pack: Pack, show: Callable[[str], None]) -> str:
    """The photo to show: the photo in the URL, unless key presses have led to another one since. The
    next key may be pressed before the browser knows the URL of the photo that earlier keys led to."""
    place = _place()
    with place.lock:
        if st.query_params.get("image") in place.passed and not address.back():
            show(place.at)
        else:
            place.passed.clear()
        place.at = last_view.image_of_url(pack)
        return place.at


def leave() -> None:
    """Forget where keys have led, because the person moved on without the keys."""
    _place().passed.clear()


@dataclass
class _Place:
    """Where keys have led: the current photo, and the photos passed, whose URLs the browser may still have.
    While a run processes keys, the previous run may still be under way."""

    at: str = ""
    passed: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)  # type: ignore[valid-type]


def _place() -> _Place:
    found: _Place = st.session_state.setdefault(PLACE, _Place())
    return found


@dataclass
class _Held:
    """The value that a photo's widget was given, or that was read from it since."""

    image_id: str
    key: str
    value: Any


def marks(pack: Pack, view: View, image_id: str) -> None:
    """Show this photo's tags, note and rating, and the keys for them."""
    tag_files.show_messages()
    person = Person.of(pack)
    _late_note(person)
    try:
        mark = person.store.marks([image_id]).get(image_id, Mark())
        tags = person.store.keys()
        known = dict.fromkeys((*tags.values(), *person.store.counts(), *mark.tags))
    except TagsError as error:
        st.warning(plain(error))
        return
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    held = _Held(
        image_id, state.widget_key(f"tags of {image_id}", list(mark.tags), _same), list(mark.tags)
    )
    bar.multiselect(
        "Tags",
        list(known),
        default=held.value,
        key=held.key,
        accept_new_options=True,
        placeholder="Choose tags, or type a new one",
        on_change=_tag,
        args=(person, held),
        width=420,
    )
    held = _Held(image_id, state.widget_key(f"note of {image_id}", mark.note, _same), mark.note)
    st.session_state[HELD] = held
    bar.text_area(
        "Note",
        held.value,
        key=held.key,
        height=68,
        max_chars=NOTE_LENGTH,
        on_change=_note,
        args=(person, held),
        width="stretch",
    )
    stars = mark.rating - 1 if mark.rating else None
    held = _Held(image_id, state.widget_key(f"stars of {image_id}", stars), stars)
    bar.feedback("stars", key=held.key, default=stars, on_change=_rate, args=(person, held))
    names = [f"{number} {tag}" for number, tag in tags.items()]
    st.caption(
        plain(" · ".join([*names, "J next", "K previous", "X choose", "Z undo", "Shift+Z redo"]))
    )
    components.keys(
        [*map(str, KEYS), "j", "k", "x", "undo", "redo", "escape"],
        PRESSED,
        on_act=lambda: _pressed(pack, view),
    )


def _same(held: Any, value: Any) -> bool:
    """Whether a widget holds the same value as the tag file, which sorts tags and trims texts."""
    if isinstance(held, list) and isinstance(value, list):
        return {" ".join(tag.split()) for tag in held} == set(value)
    return (held.strip() if isinstance(held, str) else held) == value


def _tag(person: Person, held: _Held) -> None:
    wanted = list(st.session_state[held.key])
    was, held.value = held.value, wanted
    add, drop = [t for t in wanted if t not in was], [t for t in was if t not in wanted]
    if add or drop:
        person.change(lambda store, name: store.change_tags(name, [held.image_id], add, drop))


def _note(person: Person, held: _Held) -> None:
    note = str(st.session_state[held.key] or "").strip()
    was, held.value = held.value, note

    def act(store: Store, name: str) -> str | None:
        alone = store.set_note(name, held.image_id, note, was)
        return None if alone else "Somebody else wrote a note in the meantime; both are kept."

    if note != was:
        person.change(act)


def _late_note(person: Person) -> None:
    """Save a note whose callback was interrupted while it read the session, because a key was
    pressed."""
    held: _Held | None = st.session_state.get(HELD)
    if held is not None and held.key in st.session_state:
        _note(person, held)


def _rate(person: Person, held: _Held) -> None:
    stars = st.session_state[held.key]
    was, held.value = held.value, stars
    rating = 0 if stars is None else int(stars) + 1
    if stars != was:
        person.change(lambda store, name: store.set_rating(name, [held.image_id], rating))


def _pressed(pack: Pack, view: View) -> None:
    """Process keys; each applies to the photo that the keys before it led to."""
    person, place, now = Person.of(pack), _place(), chosen.chosen_photos(pack)
    kept, found = st.session_state.get(BESIDE, {}), selection.select(pack, view)
    with place.lock:
        for act in components.key_actions(PRESSED):
            key = act.get("key")
            if key in ("j", "k"):
                before, after, number, _ = found.neighbours(place.at)
                if not number:
                    before, after = kept.get(place.at, (None, None))
                if to := after if key == "j" else before:
                    place.passed.add(place.at)
                    place.passed.discard(to)
                    place.at = to
                else:
                    person.messages.append(
                        (f"This is the {'last' if key == 'j' else 'first'} photo.", False)
                    )
            elif key == "x":
                (now.remove if place.at in now else now.append)(place.at)
            elif key == "escape":
                now.clear()
            elif key in (*map(str, KEYS), "undo", "redo"):
                person.press(key, [place.at])


FIRST_METHODS = 6  # methods shown by default


def _similar_tab(pack: Pack, shown: PhotoView) -> None:
    from xattn.app.pages.image.similar import similar_tab  # also imports torch, which takes seconds

    similar_tab(pack, shown)


TABS = {
    "Classes": photo_tabs.classes_tab,
    "Before and after": photo_tabs.slider_tab,
    "Fidelity": photo_tabs.fidelity_tab,
    "Similar": _similar_tab,
    "Provenance": photo_tabs.provenance_tab,
    "Export": photo_tabs.export_tab,
}


def page(context: Context) -> None:
    """Show the photo that the URL names, or the first of the pack."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    image_id = image_of_page(pack, _show)
    row = selection.table(pack).image(image_id)
    if row is None:
        st.warning("This pack has no such image. Choose one in the gallery.")
        st.link_button("Gallery", state.link("gallery", pack=pack.id))
        return
    found = boxes_of(pack, image_id)
    _heading(pack, image_id, row, len(found))
    marks(pack, _view(pack), image_id)
    shown = _choose(pack, image_id, "Detection" if found else "Class")
    if shown is None:
        return
    if found:
        left, right = st.columns([2, 3], gap="medium")
        with left:
            photo_boxes(pack, image_id, found, "boxes", shown.target, _open_box)
            st.caption("Click a box, or Tab to it and press Enter, for its maps.")
        with right:
            _maps(pack, shown, found)
    else:
        _maps(pack, shown)
    tabs = st.tabs(list(TABS), key="tab", bind="query-params")
    for tab, part in zip(tabs, TABS.values(), strict=True):
        if tab.open:
            with tab:
                part(pack, shown)


# ---------------------------------------------------------------------- heading


def _heading(pack: Pack, image_id: str, row: Mapping[str, Any], boxes: int) -> None:
    view = _view(pack)
    before, after, number, count = neighbours(pack, view, image_id)
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    bar.button(
        "Gallery",
        key="go_gallery",
        on_click=lambda: state.go("gallery", **view.params(selection.table(pack).choices)),
        help="Back to the gallery, where you left it",
    )
    last_view.steps(bar, "go_", before, after, _step)
    place = f"{number:,} of {count:,}" if number else "not in the gallery's selection"
    bar.caption(place, width="content")
    bar.space("stretch")
    with bar.popover("Share"):
        st.caption("This address shows the same view to everybody who can open this viewer.")
        st.code(_address(), language=None, wrap_lines=True)
    bar.button(
        "Two runs",
        key="go_runs",
        on_click=lambda: state.go("runs", image=image_id),
        help="This photo in another pack, or by another method",
    )
    bar.button(
        "What if",
        key="go_whatif",
        on_click=_go_whatif,
        args=(pack, image_id),
        help="Hide a part of the photo and see what the network predicts",
    )
    if pack.facts_of(image_id).answer is not None:
        bar.button(
            "Answer",
            key="go_answer",
            on_click=lambda: state.go("answer", image=image_id, view=st.query_params.get("view")),
            help="The model's answer, with a map of every word",
        )
    if _has_attention(pack, image_id):
        bar.button(
            "Attention",
            key="go_attention",
            on_click=lambda: state.go(
                "attention", image=image_id, view=st.query_params.get("view")
            ),
            help="What each patch attends to",
        )
    st.html(name_html(row["title"]))
    if boxes:
        st.caption(count_phrase(boxes, "detection"))
    else:
        _verdict(pack, image_id, row)


def _view(pack: Pack) -> selection.View:
    """The gallery view that led here."""
    return selection.from_text(last_view.last_text(pack), selection.table(pack).choices)


def _verdict(pack: Pack, image_id: str, row: Mapping[str, Any]) -> None:
    """Show the prediction and the true class; a mistake is shown as a headline."""
    disagreement = ""
    if row["disagreement"] == row["disagreement"]:
        disagreement = f"disagreement of methods {row['disagreement']:.2f}"
    shares = {target: p for target, _, p in pack.top(image_id)}
    predicted, label = row["predicted_name"], row["label_name"]
    if row["right"] is False and isinstance(predicted, str) and isinstance(label, str):
        share = f" {shares[row['label']]:.1%}" if row["label"] in shares else ""
        text = f"{short(predicted)} {row['confidence']:.1%}, true: {short(label)}{share}"
        st.subheader(plain(text), anchor=False)
        parts = ["the prediction is wrong"]
    else:
        parts = []
        if isinstance(predicted, str):
            sure = "" if row["confidence"] != row["confidence"] else f" {row['confidence']:.1%}"
            parts.append(f"predicted: {predicted}{sure}")
        if isinstance(label, str):
            parts.append(f"true: {label}")
        if row["right"] is True:
            parts.append("the prediction is right")
    if parts or disagreement:
        st.caption(plain(" · ".join(filter(None, [*parts, disagreement]))))


def _step(image_id: str) -> None:
    leave()
    _show(image_id)


def _show(image_id: str) -> None:
    """Go to another photo and discard the choices made for this one."""
    for name in ("entry", "class", "minus", "against"):
        st.query_params.pop(name, None)
    st.query_params["image"] = image_id


def _go_whatif(pack: Pack, image_id: str) -> None:
    """Go to the What if page for this photo and the map in focus."""
    entry_id, target = (st.query_params.get(name) for name in ("entry", "class"))
    entries = selection.table(pack).entries_of(image_id)
    method = entries.at[entry_id, "method"] if entry_id in entries.index else None
    view = st.query_params.get("view")
    state.go("whatif", image=image_id, view=view, method=method, **{"class": target})


def _address() -> str:
    base = str(st.context.url or "").split("?")[0]
    query = {name: st.query_params.get_all(name) for name in st.query_params}
    return base + "?" + state.link("image", **query).partition("?")[2]


def _has_attention(pack: Pack, image_id: str) -> bool:
    """Whether the network has attention: its taps before the attention of a block are then named
    norm1.N."""
    entry_id = selection.table(pack).entries_of(image_id).index[0]
    taps = (pack.provenance(entry_id)["backbone"] or {}).get("taps")
    return isinstance(taps, list) and any(str(tap).startswith("norm1.") for tap in taps)


# ---------------------------------------------------------------------- what to show


def _choose(pack: Pack, image_id: str, label: str) -> PhotoView | None:
    table = selection.table(pack)
    entries = table.entries_of(image_id)
    classes = _explained(entries)
    target = _target(entries, classes)
    choices = table.choices
    everything = list(choices.methods)
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    several = len(classes) > 1 or len(everything) > 1
    filters = frame.toolbar_place(bar, "Filters") if several else bar
    if len(classes) > 1:
        select(filters, label, classes, target, "class", image_id, forget="entry")
    methods = everything
    if len(everything) > 1:
        with filters:
            methods = address.multiselect(
                "Methods",
                everything,
                "methods",
                default=choices.under_test[:FIRST_METHODS],
                format_func=pack.title_of,
                width=420,
            )
    look = replace(look_control(bar, bound=True, first=_first_look(pack)), side=SIDE)
    if not methods:
        st.info("No method is chosen. Choose one or more above to see their maps.")
        return None
    found = entries[entries["target"] == target]
    by_method = dict(zip(found["method"], found.index, strict=True))
    ids = [by_method[m] for m in methods if m in by_method]
    missing = [m for m in methods if m not in by_method]
    if not ids:
        names = plain(", ".join(map(pack.title_of, methods)))
        st.info(f"No map of this class by {names}. Choose another class or method above.")
        return None
    focus = st.query_params.get("entry") or by_method.get(_view(pack).method, ids[0])
    if look.scale == "shared":
        own = entries.loc[ids]
        look = replace(look, limits=(float(own["min"].min()), float(own["max"].max())))
    return PhotoView(
        image_id, entries, target, ids, focus if focus in ids else ids[0], missing, look
    )


def _explained(entries: pd.DataFrame) -> dict[int, str]:
    """The names of classes that have a map, the most probable first."""
    columns = ("target", "target_name", "probability", "is_value")
    rows = zip(*(entries[column] for column in columns), strict=True)
    names: dict[int, str] = {}
    for target, name, probability, is_value in sorted(rows, key=lambda row: -row[2]):
        if int(target) not in names:
            names[int(target)] = f"{short(name)}  {probability_text(probability, is_value)}"
    return names


def _target(entries: pd.DataFrame, classes: dict[int, str]) -> int:
    """The class in the URL, else the class of the map in the URL, else the most probable one."""
    wanted, entry_id = st.query_params.get("class", ""), st.query_params.get("entry", "")
    known = {str(target): target for target in classes}
    if wanted not in known and entry_id in entries.index:
        return int(entries.loc[entry_id, "target"])
    return known.get(wanted, next(iter(classes)))


def _first_look(pack: Pack) -> dict[str, str]:
    """The default look: the whole photo, in the gallery's style."""
    show = _view(pack).show
    return {"part": "whole"} | ({"style": show} if show in STYLES else {})


# ---------------------------------------------------------------------- maps


def _open_box(target: int) -> None:
    st.query_params["class"] = str(target)
    st.query_params.pop("entry", None)


def _maps(pack: Pack, shown: PhotoView, boxes: Sequence[PhotoBox] = ()) -> None:
    photo = {
        "id": f"photo {shown.image_id}",
        "src": photo_of(pack, shown),
        "alt": f"Photo {file_name(pack, shown)}",
        "title": "Photo",
        "lines": [file_name(pack, shown)],
    }
    ids = [*shown.ids, *_of_true_class(pack, shown)]
    found = _objects(pack, shown, ids)
    cells = [_cell(pack, shown, entry_id, found) for entry_id in ids]
    if not boxes:  # with boxes, the photo is shown beside the maps
        cells.insert(0, photo)
    drawn = outlines(boxes, shown.target, pack.view(shown.focus), shown.look.crop)
    grid(
        cells,
        "maps",
        label="Photo and maps",
        columns=2
        if boxes
        else 4
        if len(cells) == 4 or len(cells) > 6
        else 3,  # avoids a single picture in a row
        width=WIDTH,
        aspect=aspect(pack, shown),
        linked={
            "aspect": aspect_of(pack, shown),
            "subject": shown.image_id,
            "outlines": [*_outlined(found), *drawn],
        },
        on_open=lambda: _focus(ids),
    )
    legend(pack, ids, shown.look)
    if note := blank_maps(pack, ids, selection.table(pack).title):
        st.warning(plain(note))
    if shown.missing:
        missing = ", ".join(map(pack.title_of, shown.missing))
        st.caption(plain(f"No map of this class by {missing}."))


def _of_true_class(pack: Pack, shown: PhotoView) -> list[str]:
    """For a mistake, the same methods' maps of the true class, shown beside those of the prediction."""
    row = selection.table(pack).image(shown.image_id)
    if row is None or row["right"] is not False or shown.target != row["predicted"]:
        return []
    methods = list(shown.entries.loc[shown.ids, "method"])
    own = shown.entries[shown.entries["target"] == row["label"]]
    by_method = dict(zip(own["method"], own.index, strict=True))
    return [by_method[method] for method in methods if method in by_method]


def _objects(pack: Pack, shown: PhotoView, ids: list[str]) -> Objects | None:
    """The annotated objects of this photo; None if the viewer has no annotations for it."""
    if state.settings().annotations is None:
        return None
    from xattn.app.pages.image.objects import objects_of  # also imports torch

    return objects_of(pack, shown, ids)


def _outlined(found: Objects | None) -> list[dict[str, Any]]:
    """The outlines to draw if the switch is on; shows what is wrong with the annotations."""
    if found is None:
        return []
    if found.problem:
        st.warning(plain(found.problem))
        return []
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    drawn = bar.toggle("Objects", value=True, key="objects", bind="query-params")
    own = any(outline["own"] for outline in found.outlines)
    which = "thick: objects of the explained class" if own else "none of the explained class"
    bar.caption(plain(f"annotated: {', '.join(found.names)}; {which}"), width="content")
    return list(found.outlines) if drawn else []


def _cell(pack: Pack, shown: PhotoView, entry_id: str, found: Objects | None) -> dict[str, Any]:
    row = shown.entries.loc[entry_id]
    low, high = f"{row['min']:.3g}", f"{row['max']:.3g}"
    method = pack.title_of(row["method"])
    numbers = (found.shares if found is not None else None) or {}
    on_object = [numbers[entry_id]] if entry_id in numbers else []
    return {
        "id": entry_id,
        "src": overlay_url(pack, entry_id, shown.look),
        "alt": f"Map by {method} of {short(row['target_name'])} on {file_name(pack, shown)}",
        "title": method,
        "lines": [
            *([] if int(row["target"]) == shown.target else ["map of the true class"]),
            f"{short(row['target_name'])}  {probability_text(row['probability'], row['is_value'])}",
            f"scores {low} to {high}",
            *on_object,
        ],
        "selected": entry_id == shown.focus,
        "map": _values(pack, entry_id, shown.look.crop),
    }


def _values(pack: Pack, entry_id: str, crop: bool) -> dict[str, Any] | None:
    """The map's values to show at the pointer; None if the map cannot be read (its picture then says
    so)."""
    try:
        return map_cells(pack.explanation(entry_id), crop)
    except PackError:
        return None


def _focus(ids: Sequence[str]) -> None:
    opened = sent_value("maps", "open")
    if opened in ids:
        st.query_params["entry"] = opened
