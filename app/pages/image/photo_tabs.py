"""The tabs of the image page: classes, slider, fidelity, provenance, export."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.components import download, grid, sent_value, slide
from xattn.app.components.theme import facts_html
from xattn.app.pages.image.display import (
    WIDTH,
    PhotoView,
    aspect,
    file_name,
    legend,
    photo_of,
    select,
    show_class,
)
from xattn.app.pictures import export
from xattn.app.pictures.rendering import overlay_url
from xattn.app.state import plain, short
from xattn.app.triage import selection, selection_files, tag_files
from xattn.app.triage.selection import ALL, Selection, View
from xattn.eval.metric_words import name_and_title, with_direction
from xattn.photos.image_names import file_stem
from xattn.pictures.explained import probability_text

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.packs.manifest import MetricInfo
    from xattn.packs.reader import Pack


CARD = "README.md"
LONGEST = 20_000  # most characters shown


def head_card(library: Library, head: Mapping[str, Any]) -> str | None:
    """The model card of the head recorded in a pack (name, sha256): its folder's README.md, or else its
    training record. None if the head neither ships with xattn nor is in the root."""
    from xattn.runtime.head_files import shipped_heads

    folders = [*shipped_heads().values(), *(info.folder for info in library.heads())]
    for folder in folders:
        try:
            if _matches(folder, head):
                return _card(folder)
        except (ValueError, OSError):
            continue  # another head's files may be damaged
    return None


def _matches(folder: Path, head: Mapping[str, Any]) -> bool:
    from xattn.heads.base import read_config
    from xattn.runtime.head_files import WEIGHTS_FILE

    if read_config(folder)["head"] != head.get("name"):
        return False
    weights = folder / WEIGHTS_FILE
    return _sha256(weights, weights.stat().st_mtime_ns) == head.get("sha256")


@functools.lru_cache(maxsize=64)
def _sha256(weights: Path, changed: int) -> str:
    """The hash of the head as it is loaded, in single precision, whatever precision the file has."""
    from xattn.backbone import state_sha256
    from xattn.backbone.weights import load_weight_file

    state = load_weight_file(weights)
    return state_sha256({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def _card(folder: Path) -> str:
    from xattn.heads.base import read_config

    card = folder / CARD
    if card.is_file() and card.resolve().is_relative_to(folder.resolve()):
        with card.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(LONGEST)
    return json.dumps(read_config(folder).get("training", {}), indent=2)[:LONGEST]


SMALL = 320  # longer side of a class's map, in pixels
TOP = 5  # classes with a picture
LINES = ["#d55e00", "#2a86c8", "#009e73", "#c773a8", "#b58900", "#8a7fd6", "#7f7f7f", "#a0522d"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [3, 5], [12, 3, 3, 3], [1, 3]]
CURVES = {
    "deletion": "Deletion, most relevant pixels first",
    "insertion": "Insertion, most relevant pixels first",
    "morf": "ROAD, most relevant pixels first",
    "lerf": "ROAD, least relevant pixels first",
}
DIFFERENCES = {"Min-maxed maps": "auto", "Raw scores": "shared"}


def classes_tab(pack: Pack, shown: PhotoView) -> None:
    """Show the top classes with their maps by the method in focus, and a contrast of two classes."""
    method = shown.entries.loc[shown.focus, "method"]
    title = pack.title_of(method)
    own = shown.entries[shown.entries["method"] == method]
    by_class = dict(zip(own["target"].astype(int), own.index, strict=True))
    top = pack.top(shown.image_id)[:TOP]
    known = {target for target, _, _ in top}
    ranked = own.sort_values("probability", ascending=False, kind="stable")
    top += [
        (int(r.target), str(r.target_name), float(r.probability))
        for r in ranked.itertuples()
        if int(r.target) not in known
    ]
    look = replace(shown.look, side=SMALL)
    cells = []
    for target, name, probability in top:
        entry_id = by_class.get(target)
        cells.append(
            {
                "id": str(target),
                "src": overlay_url(pack, entry_id, look)
                if entry_id
                else photo_of(pack, shown, SMALL),
                "alt": f"Map by {title} of {short(name)}" if entry_id else "Photo without a map",
                "title": short(name),
                "lines": [
                    probability_text(probability, bool(own["is_value"].any())),
                    title if entry_id else "no map",
                ],
                "selected": target == shown.target,
            }
        )
    st.caption(
        plain(
            f"The classifier's top classes, explained by {title}. Open one to see it by all methods."
        )
    )
    if any(target not in by_class for target, _, _ in top):
        st.caption("`xattn explain --top 5` makes the maps of all of them.")
    grid(
        cells,
        "classes",
        label="Classes",
        columns=5,
        width=WIDTH,
        aspect=aspect(pack, shown),
        on_open=_open_class,
    )
    if len(by_class) > 1:
        _contrast(pack, shown, by_class)


def _open_class() -> None:
    opened = sent_value("classes", "open")
    if opened:
        show_class(opened)


def _contrast(pack: Pack, shown: PhotoView, by_class: dict[int, str]) -> None:
    names = {
        target: short(shown.entries.loc[entry_id, "target_name"])
        for target, entry_id in by_class.items()
    }
    st.header("Contrast of two classes", anchor=False)
    first = shown.target if shown.target in by_class else next(iter(by_class))
    others = [target for target in by_class if target != first]
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    wanted = {str(target): target for target in others}
    second = wanted.get(st.query_params.get("minus", ""), others[0])
    label = plain(f"{names[first]} minus")
    select(bar, label, {t: names[t] for t in others}, second, "minus", shown.image_id)
    kind = bar.segmented_control(
        "Difference of",
        list(DIFFERENCES),
        default="Min-maxed maps",
        required=True,
        key="contrast_of",
        bind="query-params",
    )
    look = replace(
        shown.look, scale=DIFFERENCES[kind], limits=None, cmap="auto", minus=by_class[second]
    )
    title = f"{names[first]} minus {names[second]}"
    cell = {
        "id": "",
        "src": overlay_url(pack, by_class[first], look),
        "alt": f"Difference map: {title}",
        "title": title,
    }
    grid([cell], "contrast", label="Contrast", columns=2, width=300, aspect=aspect(pack, shown))
    legend(pack, [by_class[first]], look)


def slider_tab(pack: Pack, shown: PhotoView) -> None:
    """Show a slider that compares the map in focus with the photo or with another map."""
    own = shown.entries.loc[shown.ids, "method"].map(pack.title_of)
    others = {"": "Photo"} | {i: m for i, m in own.items() if i != shown.focus}
    other = st.query_params.get("against", "")
    other = other if other in others else ""
    if len(others) > 1:
        label = plain(f"Compare {own[shown.focus]} with")
        select(st, label, others, other, "against", shown.focus)
    before = overlay_url(pack, other, shown.look) if other else photo_of(pack, shown)
    slide(
        (before, others[other]),
        (overlay_url(pack, shown.focus, shown.look), own[shown.focus]),
        label=f"How much of the {own[shown.focus]} map is shown",
        alt=f"{file_name(pack, shown)}, with the map by {own[shown.focus]} of {short(shown.name)}",
        key="slide",
    )


def fidelity_tab(pack: Pack, shown: PhotoView) -> None:
    """Show this photo's figures by method, and its curves."""
    rows = shown.entries.loc[shown.ids]
    metrics = [m for m in pack.metrics if rows[m.key].notna().any()]
    curves = {
        pack.title_of(rows.loc[i, "method"]): found for i in shown.ids if (found := pack.curves(i))
    }
    if not metrics and not curves:
        st.info("This pack has no fidelity figures. `xattn compare` writes a pack with them.")
        return
    if metrics:
        table = rows[[m.key for m in metrics]].set_axis(rows["method"].map(pack.title_of), axis=0)
        arrow = {True: "↑", False: "↓"}
        config = {
            m.key: st.column_config.NumberColumn(
                f"{m.key} {arrow[m.higher_is_better]}",
                format="%.4g",
                help=plain(f"{_about(m)} Formula: {m.formula}. Protocol {m.protocol_id}"),
            )
            for m in metrics
        }
        st.dataframe(table, column_config=config, alt="Fidelity figures by method")
        st.caption(
            "↑ higher is better, ↓ lower is better. These figures are for this photo only, which says "
            "little about a method. Each column's help shows its meaning, formula and protocol."
        )
        with st.expander("Formulas and protocols"):
            for m in metrics:
                st.text(
                    f"{name_and_title(m.key, m.title)}. {_about(m)}\n{m.formula}; protocol {m.protocol_id}"
                )
    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    for i, name in enumerate(names):
        if i % 2 == 0:
            columns = st.columns(2)
        own = {method: found[name] for method, found in curves.items() if name in found}
        columns[i % 2].altair_chart(
            _chart(name, own, pack.shares.get(name)), height=360, key=f"curve {name}"
        )


def _about(metric: MetricInfo) -> str:
    return with_direction(metric.about, metric.higher_is_better)


def _chart(name: str, curves: dict[str, list[float]], shares: list[float] | None) -> Any:
    """A chart of one curve for every method: the score of the class over the share of changed pixels."""
    import altair as alt

    points = []
    for method, values in curves.items():
        at = shares if shares and len(shares) == len(values) else np.linspace(0, 1, len(values))
        points += [
            {"method": method, "share": float(share), "score": score}
            for share, score in zip(at, values, strict=True)
        ]
    # Colours and dashes; the colours suit light and dark themes and colour-blind readers.
    colour = alt.Scale(domain=list(curves), range=LINES)
    dashes = alt.Scale(domain=list(curves), range=DASHES)
    words = alt.Legend(
        orient="bottom", columns=2, labelLimit=220, symbolSize=300, symbolStrokeWidth=2
    )
    return (
        alt.Chart(
            pd.DataFrame(points),
            title=CURVES.get(name, name),
            description=f"{CURVES.get(name, name)}: score of the class by {', '.join(curves)}",
        )
        .mark_line()
        .encode(
            x=alt.X("share:Q", title="share of pixels", axis=alt.Axis(format="%")),
            y=alt.Y("score:Q", title="score of the class"),
            color=alt.Color("method:N", title=None, legend=words, scale=colour),
            strokeDash=alt.StrokeDash("method:N", title=None, legend=words, scale=dashes),
            tooltip=[
                "method:N",
                alt.Tooltip("share:Q", format=".0%"),
                alt.Tooltip("score:Q", format=".3f"),
            ],
        )
    )


def provenance_tab(pack: Pack, shown: PhotoView) -> None:
    """Show where the map in focus comes from."""
    found = pack.provenance(shown.focus)
    backbone, head = found["backbone"] or {}, found["head"] or {}
    method, title = found["method"], pack.title_of(found["method"])
    facts = {
        "method": method if title == method else f"{title} ({method})",
        "network": backbone.get("name"),
        "network's weights, sha256": backbone.get("sha256"),
        "head": head.get("name"),
        "head's weights, sha256": head.get("sha256"),
        "class": f"{shown.name} ({shown.target})",
        "map, sha256": found["sha256"]["map"],
        "pack": f"{pack.name}, version {pack.version}",
        "written by": f"xattn {found['xattn']}",
    }
    facts |= {f"protocol of {key}": protocol for key, protocol in found["metrics"].items()}
    st.html(facts_html({name: value for name, value in facts.items() if value}))
    card = head_card(state.library(), head) if head else None
    if card is not None:
        with st.expander("The head's card"):
            st.text(card)
    with st.expander("Everything that was recorded"):
        st.json(found, expanded=2)


def export_tab(pack: Pack, shown: PhotoView) -> None:
    """Offer files of the maps on this page; the gallery offers files of a whole selection."""
    name = file_stem(shown.image_id, set())
    st.caption(
        "The maps above with caption and provenance, as a figure or as a page that works without a server. "
        "To export a whole selection, use the gallery."
    )
    bar = st.container(horizontal=True, gap="small")
    for kind in export.FORMATS:
        make = partial(export.figure, pack, shown.ids, kind, shown.look)
        download(bar, f"Figure, {kind.upper()}", make, f"{name}.{kind}", f"export_{kind}")
    report = partial(export.html, pack, shown.ids, shown.look)
    download(bar, "Report, HTML", report, f"{name}.html", "export_html")
    figures = partial(_csv, pack, shown.image_id)
    download(bar, "Figures of this photo, CSV", figures, f"{name}.csv", "export_csv")


def _csv(pack: Pack, image_id: str) -> str:
    everything = View(method=ALL, maps="every")
    found = Selection(selection.table(pack), everything, [image_id])
    return "".join(selection_files.selection_csv(found, tag_files.usable_store(pack)))
