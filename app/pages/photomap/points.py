"""The tab of the points: coloured, chosen with a lasso, and the chosen photos below."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.components import sent
from xattn.app.components.scatter import scatter
from xattn.app.navigation import url_widgets
from xattn.app.pages.photomap import data
from xattn.app.pages.photomap.photos import class_button, photos_grid, summary
from xattn.app.pictures.rendering import PICTURE
from xattn.app.state import plain, short
from xattn.eval.report.photo_map.projection import METHODS, offered
from xattn.pictures.words import named_metric

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

MAP, CHOSEN, PHOTOS = "photomap.points", "photomap.chosen", "photomap.photos"
START = "photomap.start"  # what was chosen when the map was shown first
CLASSES = 7  # that have a colour of their own
THUMBNAIL = 160  # pixels
WIDTH = 170  # of a widget
GROUPED = {"predicted": "Predicted class", "label": "True class", "right": "Right or wrong"}
MEASURED = {"confidence": "Confidence", "disagreement": "Disagreement of methods"}


def points_tab(pack: Pack, of: str, method: str, bar: Any) -> None:
    """The map of the photos by their features or their maps, and what was chosen on it; its widgets go
    into ``bar``."""
    with bar:
        choices = offered(len(data.rows_of(pack)))
        projection = url_widgets.selectbox(
            "Projection", choices, "projection", format_func=METHODS.__getitem__, width=WIDTH
        )
        colours = _colours(pack, method)
        colour = url_widgets.selectbox(
            "Colour", list(colours), "colour", format_func=colours.__getitem__, width=WIDTH
        )
    rows, points = data.placed(pack, of, method, projection)
    if not len(rows):
        st.info(
            plain(
                f"Every map by {method} has one value everywhere, so the maps do not say where the network "
                f"looks. Choose another method, or features."
            )
        )
        return
    images = data.photos(pack, method).loc[rows]
    names = images["image_id"].tolist()
    chosen = _chosen(pack, of, method, len(rows))
    if MAP not in st.session_state:  # the map is shown anew, and knows nothing of what was chosen
        st.session_state[START] = chosen
    scatter(
        points,
        names,
        MAP,
        label=f"Map of {len(rows):,} photos by {data.OF[of].lower()}",
        words=_words(images),
        picture=_pictures(pack),
        chosen=st.session_state.get(START, []),
        on_choose=lambda: _choose(pack, of, method, len(rows)),
        on_open=lambda: _open(names),
        **_colouring(images, colour, colours[colour]),
    )
    _captions(pack, of, method, len(rows))
    if chosen:
        _photos(pack, [int(rows[i]) for i in chosen], method)


def _captions(pack: Pack, of: str, method: str, shown: int) -> None:
    every, drawn = pack.counts[1], len(data.rows_of(pack))
    notes = ["Draw around some photos to see them below; a press on the legend chooses a colour."]
    if drawn < every:
        notes.append(f"Of {every:,} photos a random sample of {drawn:,} is shown.")
    if shown < drawn:
        what = f"no map by {method}, or one with one value everywhere"
        notes.append(f"{drawn - shown:,} photos with {what} are left out.")
    if len(offered(drawn)) == 1 and drawn >= 16:
        notes.append('For UMAP, run: pip install "xattn[umap]"')
    st.caption(plain(" ".join(notes)))


# ---------------------------------------------------------------------- colours


def _colours(pack: Pack, method: str) -> dict[str, str]:
    """What points can be coloured by: what some photo has."""
    images = data.photos(pack, method)
    found = {
        key: name
        for key, name in GROUPED.items()
        if images[key if key == "right" else f"{key}_name"].notna().any()
    }
    found |= {key: name for key, name in MEASURED.items() if images[key].notna().any()}
    found |= {
        key: named_metric(key.removeprefix("measure:"))
        for key in images
        if key.startswith("measure:") and images[key].notna().any()
    }
    return found or {"one": "One colour"}


def _colouring(images: pd.DataFrame, colour: str, name: str) -> dict[str, Any]:
    """The scatter's arguments for a colour."""
    if colour == "right":
        known = data.verdicts(images["right"])
        legend = [{"name": "right", "kind": "good"}, {"name": "wrong", "kind": "bad"}]
        if None in known:
            legend.append({"name": "true class not known", "kind": "rest"})
        groups = np.array([2 if v is None else 0 if v else 1 for v in known])
        return {"legend": legend, "groups": groups}
    if colour == "one":
        return {
            "legend": [{"name": "photos", "kind": "class"}],
            "groups": np.zeros(len(images), int),
        }
    if colour in GROUPED:
        names = data.texts(images[f"{colour}_name"])
        count = Counter(n for n in names if n)
        most = [n for n, _ in count.most_common(CLASSES + 1)]
        most = most if len(most) <= CLASSES else most[:CLASSES]
        place = {n: i for i, n in enumerate(most)}
        legend = [{"name": short(n), "kind": "class"} for n in most]
        groups = np.array([place.get(n or "", len(most)) for n in names])
        if (groups == len(most)).any():
            others = len(count) - len(most)
            rest = f"{others:,} other classes" if others > 1 else "other classes"
            legend.append({"name": rest if others else "not known", "kind": "rest"})
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
    """What is said of each point: the verdict, the true class, the file."""
    predicted, labels = data.texts(images["predicted_name"]), data.texts(images["label_name"])
    right, sure = data.verdicts(images["right"]), images["confidence"].to_numpy(float)
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
    """The beginning of a picture's address, to which the photo's id is added."""
    query = {"pack": pack.id, "side": THUMBNAIL, "v": pack.version}
    return f"{PICTURE}?{urlencode(query)}&image="


# ---------------------------------------------------------------------- choosing


def _subject(pack: Pack, of: str, method: str, count: int) -> tuple[str, ...]:
    return (data.subject(pack), of, method if of == "maps" else "", str(count))


def _chosen(pack: Pack, of: str, method: str, count: int) -> list[int]:
    """The numbers of the points that were chosen on this map."""
    subject, chosen = st.session_state.get(CHOSEN, (None, []))
    return chosen if subject == _subject(pack, of, method, count) else []


def _choose(pack: Pack, of: str, method: str, count: int) -> None:
    given = sent(MAP, "choose")
    if isinstance(given, list):
        whole = {int(v) for v in given if isinstance(v, int | float) and 0 <= v < count}
        st.session_state[CHOSEN] = (_subject(pack, of, method, count), sorted(whole))
        st.session_state.pop(f"{PHOTOS}.page", None)


def _open(names: list[str]) -> None:
    given = sent(MAP, "open")
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
        st.caption(plain(f"These photos have no map by {method}."))
