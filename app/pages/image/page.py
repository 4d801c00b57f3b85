"""One photo: its maps side by side, its classes, the faithfulness of the maps, and how they were made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import streamlit as st

from xattn.app import components, state
from xattn.app.components import grid, sent_value
from xattn.app.components.look import STYLES, look_control
from xattn.app.components.theme import name_html
from xattn.app.navigation import address, chosen, last_view
from xattn.app.pages.gallery import marking
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
    show_class,
)
from xattn.app.pictures.rendering import blank_maps, is_clipped, map_cells, overlay_url
from xattn.app.state import PAGES, Context, plain, short
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
PLACE = "_place"  # the session's key of the :class:`_Place` that keys have led to


def neighbours(pack: Pack, view: View, image_id: str) -> tuple[str | None, str | None, int, int]:
    """The result of :meth:`Selection.neighbours` or, if the photo has just left the selection because its
    tags changed, the photo's previous neighbours."""
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
    """Forget the photo to which keys have led, because the person has gone on without keys."""
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
    st.caption(plain(" · ".join([*names, "press ? for all keys"])))
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
    # The bar is above the name, but what is chosen in it is needed below.
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small", key="image-bar")
    _steps(bar, pack, image_id)
    shown = _choose(bar, pack, image_id, "Detection" if found else "Class")
    rows = [] if shown is None else _rows(pack, shown, bool(found))
    objects = None if shown is None else _objects(bar, pack, shown, rows)
    _links(bar, pack, image_id)
    _title(pack, image_id, row, len(found))
    tag_files.show_messages()
    if shown is None:
        marks(pack, _view(pack), image_id)
        return
    if found:
        left, right = st.columns([2, 3], gap="medium")
        with left:
            photo_boxes(pack, image_id, found, "boxes", shown.target, show_class)
            st.caption("Click a box, or Tab to it and press Enter, for its maps.")
        with right:
            _maps(pack, shown, rows, objects, found)
    else:
        _maps(pack, shown, rows, objects)
    marks(pack, _view(pack), image_id)
    tabs = st.tabs(list(TABS), key="tab", bind="query-params")
    for tab, part in zip(tabs, TABS.values(), strict=True):
        if tab.open:
            with tab:
                part(pack, shown)


# ---------------------------------------------------------------------- heading


def _steps(bar: Any, pack: Pack, image_id: str) -> None:
    """Show the way back to the gallery, and to the photos before and after this one."""
    view = _view(pack)
    before, after, number, count = neighbours(pack, view, image_id)
    bar.button(
        "Gallery",
        key="go_gallery",
        icon=":material/arrow_back:",
        on_click=lambda: state.go("gallery", **view.params(selection.table(pack).choices)),
        help="Back to the gallery, where you left it",
    )
    last_view.steps(bar, "go_", before, after, _step)
    place = f"{number:,} of {count:,}" if number else "not in the gallery's selection"
    bar.caption(place, width="content")


def _links(bar: Any, pack: Pack, image_id: str) -> None:
    """Show this view's address, and links to other pages of this photo."""
    bar.space("stretch")
    with bar.popover("Share", icon=":material/link:"):
        st.caption("This address shows the same view to everybody who can open this viewer.")
        st.code(_address(), language=None, wrap_lines=True)
    links = {
        "runs": "This photo in another pack, or by another method",
        "whatif": "Hide a part of the photo and see what the network predicts",
    }
    if pack.facts_of(image_id).answer is not None:
        links["answer"] = "The model's answer, with a map of every word"
    if _has_attention(pack, image_id):
        links["attention"] = "What each patch attends to"
    for name, about in links.items():
        bar.button(
            PAGES[name].title,
            key=f"go_{name}",
            icon=f":material/{PAGES[name].icon}:",
            on_click=_go,
            args=(name, pack, image_id),
            help=about,
        )


def _title(pack: Pack, image_id: str, row: Mapping[str, Any], boxes: int) -> None:
    """Show the photo's name, what was predicted and how the photo is marked."""
    line = st.container(
        horizontal=True, vertical_alignment="center", gap="small", key="image-title"
    )
    line.html(name_html(row["title"]), width="content")
    found = [count_phrase(boxes, "detection")] if boxes else _verdict(line, pack, image_id, row)
    found += marking.badges(marking.marks(pack, [image_id]).get(image_id))
    if found:
        line.caption(plain(" · ".join(found)), width="content")


def _view(pack: Pack) -> selection.View:
    """The gallery view that led here."""
    return selection.from_text(last_view.last_text(pack), selection.table(pack).choices)


def _verdict(line: Any, pack: Pack, image_id: str, row: Mapping[str, Any]) -> list[str]:
    """What was predicted and how methods disagree; a mistake is a headline of ``line``."""
    shares = {target: p for target, _, p in pack.top(image_id)}
    predicted, label = row["predicted_name"], row["label_name"]
    found = []
    if row["right"] is False and isinstance(predicted, str) and isinstance(label, str):
        share = f" {shares[row['label']]:.1%}" if row["label"] in shares else ""
        text = f"{short(predicted)} {row['confidence']:.1%}, true: {short(label)}{share}"
        line.subheader(plain(text), anchor=False, width="content")
        found.append("the prediction is wrong")
    else:
        if isinstance(predicted, str):
            sure = "" if row["confidence"] != row["confidence"] else f" {row['confidence']:.1%}"
            found.append(f"predicted: {short(predicted)}{sure}")
        if isinstance(label, str) and row["right"] is not True:
            found.append(f"true: {short(label)}")
        if row["right"] is True:
            found.append("the prediction is right")
    if row["disagreement"] == row["disagreement"]:
        found.append(f"disagreement of methods {row['disagreement']:.2f}")
    return found


def _step(image_id: str) -> None:
    leave()
    _show(image_id)


def _show(image_id: str) -> None:
    """Go to another photo and discard the choices made for this one."""
    for name in ("entry", "class", "minus", "against"):
        st.query_params.pop(name, None)
    st.query_params["image"] = image_id


def _go(page: str, pack: Pack, image_id: str) -> None:
    """Go to another page of this photo; What if shows the map in focus."""
    kept = {"view": st.query_params.get("view")}
    if page == "whatif":
        entries = selection.table(pack).entries_of(image_id)
        entry_id = st.query_params.get("entry")
        kept["class"] = st.query_params.get("class")
        kept["method"] = entries.at[entry_id, "method"] if entry_id in entries.index else None
    state.go(page, image=image_id, **kept)


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


def _choose(bar: Any, pack: Pack, image_id: str, label: str) -> PhotoView | None:
    table = selection.table(pack)
    entries = table.entries_of(image_id)
    classes = _explained(entries)
    target = _target(entries, classes)
    methods = list(table.choices.methods)
    if len(classes) > 1 or len(methods) > 1:
        with bar.popover("Filters", icon=":material/tune:", help="The class and the methods"):
            if len(classes) > 1:
                select(st, label, classes, target, "class", image_id, forget="entry")
            if len(methods) > 1:
                methods = address.multiselect(
                    "Methods",
                    methods,
                    "methods",
                    default=table.choices.under_test[:FIRST_METHODS],
                    format_func=pack.title_of,
                )
    look = replace(look_control(bar, bound=True, first=_first_look(pack)), side=SIDE)
    if not methods:
        st.info("No method is chosen. Choose one or more under Filters to see their maps.")
        return None
    ids = list(_by_method(entries, target, methods).values())
    if not ids:
        names = plain(", ".join(map(pack.title_of, methods)))
        st.info(f"No map of this class by {names}. Choose another class or method under Filters.")
        return None
    own = _by_method(entries, target, [_view(pack).method]).values()
    focus = st.query_params.get("entry") or next(iter(own), ids[0])
    if look.scale == "shared":
        shared = entries.loc[ids]
        look = replace(look, limits=(float(shared["min"].min()), float(shared["max"].max())))
    return PhotoView(
        image_id, entries, target, ids, focus if focus in ids else ids[0], methods, look
    )


def _by_method(entries: pd.DataFrame, target: Any, methods: Sequence[str]) -> dict[str, str]:
    """The maps of a class by these methods, without the methods that did not explain it."""
    own = entries[entries["target"] == target]
    found = dict(zip(own["method"], own.index, strict=True))
    return {method: found[method] for method in methods if method in found}


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


class _MapRow(NamedTuple):
    """The maps of a class: its heading, and the entry of each method that explained it."""

    target: int
    heading: str
    entries: dict[str, str]


def _maps(
    pack: Pack,
    shown: PhotoView,
    rows: Sequence[_MapRow],
    objects: Objects | None,
    boxes: Sequence[PhotoBox] = (),
) -> None:
    """Show the photo and its maps: a row for each class, and a column for each method."""
    cells: list[dict[str, Any]] = []
    if not boxes:  # with boxes, the photo is shown beside the maps
        cells.append(
            {
                "id": f"photo {shown.image_id}",
                "src": photo_of(pack, shown),
                "alt": f"Photo {file_name(pack, shown)}",
                "title": "Photo",
                "span": 2 * len(rows),
            }
        )
    ids = [entry_id for row in rows for entry_id in row.entries.values()]
    for target, heading, found in rows:
        if heading:
            cells.append({"id": f"class {target}", "title": heading, "wide": True})
        for method in shown.methods:
            if method in found:
                cells.append(_cell(pack, shown, found[method], objects, not heading))
            else:
                title = f"{pack.title_of(method)}: no map of this class"
                cells.append({"id": f"none {target} {method}", "title": title})
    drawn = outlines(boxes, shown.target, pack.view(shown.focus), shown.look.crop)
    grid(
        cells,
        "maps",
        label="Photo and maps",
        columns=2 if boxes else 1 + len(shown.methods),
        rows=0 if boxes else len(rows),
        width=WIDTH if boxes else None,
        aspect=aspect(pack, shown),
        linked={
            "aspect": aspect_of(pack, shown),
            "subject": shown.image_id,
            "outlines": [*(objects.outlines if objects else ()), *drawn],
        },
        on_open=lambda: _focus(ids),
    )
    legend(pack, ids, shown.look)
    if objects and objects.outlines:
        own = any(outline["own"] for outline in objects.outlines)
        which = "thick: objects of the explained class" if own else "none of the explained class"
        st.caption(plain(f"annotated: {', '.join(objects.names)}; {which}"))
    if note := blank_maps(pack, ids, selection.table(pack).title):
        st.warning(plain(note))


def _rows(pack: Pack, shown: PhotoView, boxes: bool) -> list[_MapRow]:
    """The rows of maps: the chosen class, and for a mistake the predicted and the true class, if it is one
    of them. With ``boxes``, the chosen class alone, without a heading."""
    own = {shown.target: _by_method(shown.entries, shown.target, shown.methods)}
    if boxes:
        return [_MapRow(shown.target, "", own[shown.target])]
    row = selection.table(pack).image(shown.image_id) or {}
    predicted, label = row.get("predicted"), row.get("label")
    if row.get("right") is False and shown.target in (predicted, label):
        both = int(row["predicted"]), int(row["label"])
        own = {t: _by_method(shown.entries, t, shown.methods) for t in both}
    names = _explained(shown.entries)
    kinds = {label: "True", predicted: "Predicted, true" if predicted == label else "Predicted"}
    rows = (_MapRow(t, f"{kinds.get(t, 'Class')}: {names[t]}", own[t]) for t in own if own[t])
    return list(rows)


def _objects(bar: Any, pack: Pack, shown: PhotoView, rows: Sequence[_MapRow]) -> Objects | None:
    """The annotated objects of this photo, without outlines if the switch is off; None if the viewer has no
    annotations for it. Shows what is wrong with them."""
    if state.settings().annotations is None:
        return None
    from xattn.app.pages.image.objects import objects_of  # also imports torch

    found = objects_of(pack, shown, [i for row in rows for i in row.entries.values()])
    if found is None:
        return None
    if found.problem:
        st.warning(plain(found.problem))
    elif not bar.toggle("Objects", value=True, key="objects", bind="query-params"):
        return replace(found, outlines=())
    return found


def _cell(
    pack: Pack, shown: PhotoView, entry_id: str, found: Objects | None, named: bool
) -> dict[str, Any]:
    """A map for the grid; with ``named`` its class is written below it."""
    row = shown.entries.loc[entry_id]
    low, high = f"{row['min']:.3g}", f"{row['max']:.3g}"
    method = pack.title_of(row["method"])
    numbers = (found.shares if found is not None else None) or {}
    values, clipped = None, False  # of a map that cannot be read; its picture then says so
    with contextlib.suppress(PackError):
        values = map_cells(pack.explanation(entry_id), shown.look.crop)
        clipped = is_clipped(pack, entry_id, shown.look)
    name = f"{short(row['target_name'])}  {probability_text(row['probability'], row['is_value'])}"
    return {
        "id": entry_id,
        "src": overlay_url(pack, entry_id, shown.look),
        "alt": f"Map by {method} of {short(row['target_name'])} on {file_name(pack, shown)}",
        "title": method,
        "lines": [
            *([name] if named else []),
            f"scores {low} to {high}" + (", clipped" if clipped else ""),
            *([numbers[entry_id]] if entry_id in numbers else []),
        ],
        "selected": entry_id == shown.focus,
        "map": values,
    }


def _focus(ids: Sequence[str]) -> None:
    opened = sent_value("maps", "open")
    if opened in ids:
        st.query_params["entry"] = opened
        st.query_params.pop("class", None)  # it is the map's
