"""The Map page: a pack's photos as points, and groups on which the network looks at the same place."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import streamlit as st
from PIL import Image

from xattn.app import state
from xattn.app.components import explain_command, grid, scatter, sent_value
from xattn.app.navigation import address, chosen
from xattn.app.pages.photomap import data
from xattn.app.pages.photomap.data import class_button, photos_grid, summary
from xattn.app.pictures.rendering import PICTURE, data_uri, jpeg
from xattn.app.state import Context, plain, short
from xattn.app.triage import selection
from xattn.app.triage.tag_files import Person
from xattn.eval.metric_words import name_and_title
from xattn.eval.report.photo_map.clusters import Cluster
from xattn.eval.report.photo_map.pooled_maps import SIDE as CELLS_A_SIDE
from xattn.eval.report.photo_map.projection import METHODS, available_methods
from xattn.pictures.overlay import overlay

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


GROUP = "group"  # parameter of the URL: the number of a card, from 1
CARDS, GROUP_PHOTOS = "photomap.groups", "photomap.group"
SHOWN = 12  # most cards
SIDE = 240  # pixels of a card's picture
APART = 0.5  # a group above this is marked, since the rest of its class looks elsewhere


def groups_tab(pack: Pack, method: str) -> None:
    """Show cards of the groups, and the photos of one group."""
    found = data.groups(pack, method)[:SHOWN]
    if not found:
        st.info(
            plain(
                f"There are no groups: at least three photos need maps by {pack.title_of(method)} that are "
                f"not constant."
            )
        )
        return
    st.caption(
        "Photos on which the network looks at the same place. Groups of one class come first if the "
        "network looks elsewhere on other photos of that class, since that may be a shortcut, such as a "
        "watermark."
    )
    number = chosen_group(len(found))
    links = {"pack": pack.id, "method": method, "part": "Groups"}
    cells = [
        card(one, i, i == number, state.link("photomap", group=i + 1, **links))
        for i, one in enumerate(found)
    ]
    grid(cells, CARDS, label="Groups of photos", width=150, aspect=1, on_open=_opened)
    one = found[number]
    where = one.place[0].upper() + one.place[1:]
    st.subheader(plain(f"Group {number + 1}: {where}"), anchor=False)
    rows = [int(row) for row in data.pooled_maps(pack, method)[0][one.rows]]
    st.markdown(summary(pack, rows, method))
    st.caption(
        plain(
            f"Similarity of the group's maps: {one.tightness:.2f} (1 means that all are the same). At "
            f"their most unusual place, they differ from other maps of the class by {one.apart:.0%} of the "
            f"scale."
        )
    )
    bar = st.container(horizontal=True, gap="small")
    own = data.photos(pack, method).loc[rows, "image_id"].tolist()
    chosen.button(pack, own, "photomap.group.choose", bar)
    with bar:
        class_button(pack, rows, method, "photomap.group.class")
    photos_grid(pack, rows, method, GROUP_PHOTOS, "Photos of the group, the most typical first")


def chosen_group(count: int) -> int:
    """The number of the card in the URL, by default the first."""
    wanted = st.query_params.get(GROUP, "1")
    known = [str(number + 1) for number in range(count)]
    if wanted not in known:
        st.warning("There is no such group; the first is shown.")
        return 0
    return known.index(wanted)


def _opened() -> None:
    opened = sent_value(CARDS, "open")
    if isinstance(opened, str):
        st.query_params[GROUP] = opened
        st.session_state.pop(f"{GROUP_PHOTOS}.page", None)


def card(one: Cluster, number: int, selected: bool, href: str) -> dict[str, Any]:
    """The grid's cell for a group."""
    share = f"{one.share:.0%} {short(one.class_name)}" if one.class_name else "class unknown"
    lines = [share, f"{len(one.rows):,} photos"]
    if one.accuracy.n:
        lines.append(f"{one.accuracy.mean:.0%} classified correctly")
    return {
        "id": str(number + 1),
        "src": picture(one.mean),
        "alt": f"Mean map of {len(one.rows):,} photos: {one.place}",
        "title": one.place[0].upper() + one.place[1:],
        "lines": lines,
        "badge": {"text": "Unusual place", "kind": "plain"} if one.apart > APART else None,
        "selected": selected,
        "href": href,
    }


def picture(mean: np.ndarray) -> str:
    """The URL of a picture that shows the mean (64,) of pooled maps on grey."""
    low, high = float(mean.min()), float(mean.max())
    cells = ((mean - low) / (high - low) if high > low else mean * 0).astype(np.float32)
    grown = Image.fromarray(cells.reshape(CELLS_A_SIDE, CELLS_A_SIDE)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    return data_uri(jpeg(overlay(grey, np.clip(np.asarray(grown), 0, 1), 0.8)))


MAP, PHOTOS = "photomap.points", "photomap.photos"
# What the map was told is chosen: (how often it was told, what it was told, what it has chosen since).
START = "photomap.start"
CLASSES = 7  # most classes with their own colour
THUMBNAIL = 160  # pixels
WIDTH = 170  # of a widget
GROUPED = {"predicted": "Predicted class", "label": "True class", "right": "Right or wrong"}
MEASURED = {"confidence": "Confidence", "disagreement": "Disagreement of methods"}


def points_tab(pack: Pack, of: str, method: str, bar: Any) -> None:
    """Show the photos as points, placed by their features or their maps, and the photos chosen among them;
    the widgets go into ``bar``."""
    with bar:
        choices = available_methods(len(data.rows_of(pack)))
        projection = address.selectbox(
            "Projection", choices, "projection", format_func=METHODS.__getitem__, width=WIDTH
        )
        colours = _colours(pack, method)
        colour = address.selectbox("Colour", colours, "colour", width=WIDTH)
    rows, points = data.project_photos(pack, of, method, projection)
    if not len(rows):
        st.info(
            plain(
                f"All maps by {pack.title_of(method)} are constant, so they do not show where the "
                f"network looks. Choose another method, or features."
            )
        )
        return
    images = data.photos(pack, method).loc[rows]
    names = images["image_id"].tolist()
    now = set(chosen.chosen_photos(pack))
    points_chosen = [i for i, name in enumerate(names) if name in now]
    turn, start = _start(points_chosen)
    scatter(
        points,
        names,
        MAP,
        label=f"Map of {len(rows):,} photos by {data.OF[of].lower()}",
        words=_words(images),
        picture=_pictures(pack),
        chosen=start,
        turn=turn,
        on_choose=lambda: _choose(pack, names, turn, start),
        on_open=lambda: _open(names),
        **_colouring(images, colour, colours[colour]),
    )
    _captions(pack, method, len(rows))
    if points_chosen:
        _photos(pack, [int(rows[i]) for i in points_chosen], method)


def _captions(pack: Pack, method: str, shown: int) -> None:
    every, drawn = pack.counts[1], len(data.rows_of(pack))
    notes = [
        "Draw around some photos to see them below, or click a colour in the legend to choose it."
    ]
    if drawn < every:
        notes.append(f"The map shows a random sample of {drawn:,} of {every:,} photos.")
    if shown < drawn:
        what = f"no map by {pack.title_of(method)}, or a constant one,"
        notes.append(f"{drawn - shown:,} photos with {what} are left out.")
    if len(available_methods(drawn)) == 1 and drawn >= 16:
        notes.append('For UMAP, run: pip install "xattn[umap]"')
    st.caption(plain(" ".join(notes)))


# ---------------------------------------------------------------------- colours


def _colours(pack: Pack, method: str) -> dict[str, str]:
    """What points can be coloured by: properties that at least one photo has."""
    images = data.photos(pack, method)
    found = {
        key: name
        for key, name in GROUPED.items()
        if images[key if key == "right" else f"{key}_name"].notna().any()
    }
    found |= {key: name for key, name in MEASURED.items() if images[key].notna().any()}
    found |= {
        key: name_and_title(m.key, m.title)
        for m in pack.metrics
        if (key := f"measure:{m.key}") in images and images[key].notna().any()
    }
    return found or {"one": "One colour"}


def _colouring(images: pd.DataFrame, colour: str, name: str) -> dict[str, Any]:
    """The arguments of the scatter plot for a colour."""
    if colour == "right":
        known = data.correctness(images["right"])
        legend = [{"name": "right", "kind": "good"}, {"name": "wrong", "kind": "bad"}]
        if None in known:
            legend.append({"name": "true class unknown", "kind": "rest"})
        groups = np.array([2 if v is None else 0 if v else 1 for v in known])
        return {"legend": legend, "groups": groups}
    if colour == "one":
        return {
            "legend": [{"name": "photos", "kind": "class"}],
            "groups": np.zeros(len(images), int),
        }
    if colour in GROUPED:
        names = data.name_list(images[f"{colour}_name"])
        count = Counter(n for n in names if n)
        most = [n for n, _ in count.most_common(CLASSES + 1)]
        most = most if len(most) <= CLASSES else most[:CLASSES]
        place = {n: i for i, n in enumerate(most)}
        legend = [{"name": short(n), "kind": "class"} for n in most]
        groups = np.array([place.get(n or "", len(most)) for n in names])
        if (groups == len(most)).any():
            others = len(count) - len(most)
            rest = f"{others:,} other classes" if others > 1 else "other classes"
            legend.append({"name": rest if others else "unknown", "kind": "rest"})
        return {"legend": legend, "groups": groups}
    values = images[colour].to_numpy(float)
    values = np.where(np.isfinite(values), values, np.nan)
    low, high = np.nanmin(values), np.nanmax(values)
    scaled = (
        (values - low) / (high - low) if high > low else np.where(np.isnan(values), values, 0.5)
    )
    form = "{:.0%}" if colour == "confidence" else "{:.3g}"
    return {
        "scale": {"name": name, "low": form.format(low), "high": form.format(high)},
        "values": scaled,
    }


def _words(images: pd.DataFrame) -> list[list[str]]:
    """The texts of each point: the prediction, the true class and the file."""
    predicted, labels = (
        data.name_list(images["predicted_name"]),
        data.name_list(images["label_name"]),
    )
    right, sure = data.correctness(images["right"]), images["confidence"].to_numpy(float)
    first = [
        "" if name is None else short(name) + ("" if p != p else f" {p:.0%}")
        for name, p in zip(predicted, sure, strict=True)
    ]
    second = [
        ""
        if name is None
        else "right"
        if v
        else ("wrong, " * (v is False)) + f"true: {short(name)}"
        for name, v in zip(labels, right, strict=True)
    ]
    return [first, second, [str(title) for title in images["title"]]]


def _pictures(pack: Pack) -> str:
    """The URL of a picture without the photo's id, which is appended."""
    query = {"pack": pack.id, "side": THUMBNAIL, "v": pack.version}
    return f"{PICTURE}?{urlencode(query)}&image="


# ---------------------------------------------------------------------- choosing


def _start(now: list[int]) -> tuple[int, list[int]]:
    """What the map is told is chosen; told again if it was chosen elsewhere, and by a new map."""
    turn, told, own = st.session_state.get(START, (0, [], None))
    if now != own or MAP not in st.session_state:
        turn, told = turn + 1, now
        st.session_state[START] = (turn, told, now)
    return turn, told


def _choose(pack: Pack, names: list[str], turn: int, told: list[int]) -> None:
    given = sent_value(MAP, "choose")
    given = given if isinstance(given, dict) else {}
    if isinstance(listed := given.get("points"), list):
        count, now, on_map = len(names), chosen.chosen_photos(pack), set(names)
        points = sorted({int(v) for v in listed if isinstance(v, int | float) and 0 <= v < count})
        st.session_state[START] = (turn, told, points)
        st.session_state.pop(f"{PHOTOS}.page", None)
        elsewhere = [i for i in now if i not in on_map] if given.get("more") is True else []
        chosen.choose(Person.of(pack), now, [*elsewhere, *(names[i] for i in points)])


def _open(names: list[str]) -> None:
    given = sent_value(MAP, "open")
    if isinstance(given, int | float) and 0 <= given < len(names):
        state.go("image", image=names[int(given)])


def _photos(pack: Pack, rows: list[int], method: str) -> None:
    st.subheader("Chosen photos", anchor=False)
    st.markdown(summary(pack, rows, method))
    bar = st.container(horizontal=True, gap="small")
    with bar:
        if len(rows) == 1:
            image_id = data.photos(pack, method).loc[rows[0], "image_id"]
            st.button(
                "More like this",
                key="photomap.similar",
                on_click=lambda: state.go("image", image=image_id, tab="Similar"),
            )
        class_button(pack, rows, method, "photomap.class")
    photos_grid(pack, rows, method, PHOTOS, "The chosen photos")
    if data.photos(pack, method).loc[rows, "entry_id"].isna().all():
        st.caption(plain(f"These photos have no map by {pack.title_of(method)}."))


FEWEST = 3  # fewest photos for a map


def page(context: Context) -> None:
    """Show the open pack's map."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    st.title("Map", anchor=False)
    photos = pack.counts[1]
    if photos < FEWEST:
        count = "one photo" if photos == 1 else f"{photos} photos"
        st.info(
            f"This pack has {count}; a map needs at least {FEWEST}. Explain a folder of photos."
        )
        return
    points, groups = st.tabs(["Photos", "Groups"], key="part", bind="query-params")
    if points.open:
        with points:
            _points(pack)
    if groups.open:
        with groups:
            groups_tab(
                pack, address.method_box(pack, selection.table(pack).choices.under_test, WIDTH)
            )


def _points(pack: Pack) -> None:
    if not pack.has_features:
        _without_features()
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    offered = list(data.OF) if pack.has_features else ["maps"]
    with bar:
        of = address.selectbox(
            "Similar by", offered, "near", format_func=data.OF.__getitem__, width=WIDTH
        )
        method = address.method_box(pack, selection.table(pack).choices.under_test, WIDTH)
    points_tab(pack, of, method, bar)


def _without_features() -> None:
    with st.expander("This pack has no features, so photos can only be compared by their maps."):
        st.markdown("Explain the photos again and store the network's features:")
        explain_command("with-features")
