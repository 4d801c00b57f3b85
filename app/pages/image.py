"""One photo: its maps side by side, its classes, how faithful the maps are, where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import streamlit as st

from xattn.app import export, pictures, selection, state
from xattn.app.components import grid
from xattn.app.components.slide import slide
from xattn.app.head_card import head_card
from xattn.app.pictures import Look, overlay_url, photo_url
from xattn.app.state import Context, plain
from xattn.app.theme import facts_html
from xattn.contact_sheet import legends_html
from xattn.explanation import THUMBNAIL_SIDE

if TYPE_CHECKING:
    from xattn.app.library import Pack

SIDE = THUMBNAIL_SIDE  # pixels of a map's longer side: a photo is shown as it is stored
SMALL = 320  # of a class's map
WIDTH = 150  # of a map on the page, at least
FIRST_METHODS = 6  # that are shown before anybody chooses
TOP = 5  # classes with a picture each
TABS = ("Classes", "Before and after", "Fidelity", "Provenance", "Export")
# Streamlit writes what a choice is called into the URL, so these names are part of links.
SCALE_NAMES = {"Each map": "map", "Shared": "shared"}
COLOUR_NAMES = {
    "Automatic": "auto",
    "Inferno": "inferno",
    "Diverging": "diverging",
    "Viridis": "viridis",
    "Cividis": "cividis",
    "Grey": "gray",
}
LINES = ["#d55e00", "#2a86c8", "#009e73", "#c773a8", "#b58900", "#8a7fd6", "#7f7f7f", "#a0522d"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [3, 5], [12, 3, 3, 3], [1, 3]]
DIFFERENCES = {"Min-maxed maps": "map", "Raw scores": "shared"}


@dataclass(frozen=True)
class Shown:
    """What the page shows of a photo: the entries in their order, one of them in focus."""

    image_id: str
    entries: pd.DataFrame  # all of the photo
    target: int
    ids: list[str]
    focus: str
    missing: list[str]  # methods that did not explain this class
    look: Look

    @property
    def name(self) -> str:
        """The class that is shown."""
        return str(self.entries.loc[self.focus, "target_name"])


def page(context: Context) -> None:
    """Show the photo that the URL names, or the first of the pack."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    image_id = st.query_params.get("image") or pack.images.index[0]
    if image_id not in pack.images.index:
        st.warning("This pack has no such image. Choose one in the gallery.")
        st.link_button("Gallery", state.link("gallery", pack=pack.id))
        return
    _heading(pack, image_id)
    shown = _choose(pack, image_id)
    if shown is None:
        return
    _maps(pack, shown)
    tabs = st.tabs(list(TABS), key="tab", bind="query-params")
    for tab, part in zip(tabs, (_classes, _slider, _fidelity, _provenance, _export), strict=True):
        if tab.open:
            with tab:
                part(pack, shown)


# ---------------------------------------------------------------------- where we are


def _heading(pack: Pack, image_id: str) -> None:
    choices = selection.table(pack).choices
    view = selection.from_text(st.query_params.get("view", ""), choices)
    before, after, number, count = selection.neighbours(pack, view, image_id)
    row = pack.images.loc[image_id]
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    bar.button(
        "Gallery",
        key="go_gallery",
        on_click=lambda: state.go("gallery", **view.params(choices)),
        help="Back to the gallery, where you left it",
    )
    for text, other, keys in (("Previous", before, "Shift+Left"), ("Next", after, "Shift+Right")):
        bar.button(
            text,
            key=f"go_{text}",
            on_click=_show,
            args=(other,),
            disabled=other is None,
            shortcut=keys,
        )
    place = f"{number:,} of {count:,}" if number else "not in the gallery's selection"
    bar.caption(place, width="content")
    bar.space("stretch")
    with bar.popover("Share"):
        st.caption("This address shows the same view to whoever can open this viewer.")
        st.code(_address(), language=None, wrap_lines=True)
    if _has_attention(pack, image_id):
        bar.button(
            "Attention",
            key="go_attention",
            on_click=lambda: state.go("attention", image=image_id),
            help="What each patch attends to",
        )
    st.subheader(plain(row["file_name"] or image_id), anchor=False)
    _caption(row)


def _caption(row: pd.Series) -> None:
    parts = []
    if isinstance(row["predicted_name"], str):
        sure = "" if row["confidence"] != row["confidence"] else f" {row['confidence']:.1%}"
        parts.append(f"predicted: {row['predicted_name']}{sure}")
    if isinstance(row["label_name"], str):
        parts.append(f"true: {row['label_name']}")
    if row["right"] is True or row["right"] is False:
        parts.append("the prediction is right" if row["right"] else "the prediction is wrong")
    if row["disagreement"] == row["disagreement"]:
        parts.append(f"disagreement of methods {row['disagreement']:.2f}")
    if parts:
        st.caption(plain(" · ".join(parts)))


def _show(image_id: str) -> None:
    """Another photo; what was chosen of this one is forgotten."""
    for name in ("entry", "class", "minus", "against"):
        if name in st.query_params:
            del st.query_params[name]
    st.query_params["image"] = image_id


def _address() -> str:
    base = str(st.context.url or "").split("?")[0]
    query = {name: st.query_params.get_all(name) for name in st.query_params}
    return base + "?" + state.link("image", **query).partition("?")[2]


def _has_attention(pack: Pack, image_id: str) -> bool:
    """Whether the network has attention: taps before a block's attention are named norm1.N."""
    entry_id = pack.entries.index[pack.entries["image_id"] == image_id][0]
    backbone = pack.provenance(entry_id)["backbone"]
    taps = backbone.get("taps") if isinstance(backbone, dict) else None
    return isinstance(taps, list) and any(str(tap).startswith("norm1.") for tap in taps)


# ---------------------------------------------------------------------- what to show


def _choose(pack: Pack, image_id: str) -> Shown | None:
    entries = pack.entries[pack.entries["image_id"] == image_id]
    classes = _explained(entries)
    target = _target(entries, classes)
    everything = list(selection.table(pack).choices.methods)
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    if len(classes) > 1:
        _select(bar, "Class", classes, target, "class", image_id, forget="entry")
    scale, colours = _colours(bar)
    methods = everything
    if len(everything) > 1:
        sane = pack.entries["method"][~pack.entries["sanity"].astype(bool)]
        first = list(dict.fromkeys(sane if len(sane) else everything))[:FIRST_METHODS]
        methods = bar.multiselect(
            "Methods", everything, default=first, key="methods", bind="query-params", width=420
        )
    look = Look(*_sliders(bar), scale, colours, SIDE)
    if not methods:
        st.info("No method is chosen. Choose one or more above to see their maps.")
        return None
    found = entries[entries["target"] == target]
    by_method = dict(zip(found["method"], found.index, strict=True))
    ids = [by_method[m] for m in methods if m in by_method]
    missing = [m for m in methods if m not in by_method]
    if not ids:
        names = plain(", ".join(methods))
        st.info(f"No map of this class by {names}. Choose another class or method above.")
        return None
    focus = st.query_params.get("entry", "")
    if look.scale == "shared":
        own = entries.loc[ids]
        look = replace(look, limits=(float(own["min"].min()), float(own["max"].max())))
    return Shown(image_id, entries, target, ids, focus if focus in ids else ids[0], missing, look)


def _explained(entries: pd.DataFrame) -> dict[int, str]:
    """Names of the classes that have a map, the most probable first."""
    ranked = entries.sort_values("probability", ascending=False, kind="stable")
    return {
        int(row.target): f"{_short(row.target_name)}  {row.probability:.1%}"
        for row in ranked.drop_duplicates("target").itertuples()
    }


def _target(entries: pd.DataFrame, classes: dict[int, str]) -> int:
    """The class of the URL, else that of the map it names, else the most probable one."""
    wanted, entry_id = st.query_params.get("class", ""), st.query_params.get("entry", "")
    known = {str(target): target for target in classes}
    if wanted not in known and entry_id in entries.index:
        return int(entries.loc[entry_id, "target"])
    return known.get(wanted, next(iter(classes)))


def _select(
    bar: Any,
    label: str,
    names: Mapping[Any, str],
    chosen: Any,
    parameter: str,
    subject: str,
    forget: str | None = None,
) -> None:
    """A choice that depends on the photo, so that Streamlit cannot bind it: the URL has its value."""
    key = f"{parameter} of {subject}"
    st.session_state[key] = chosen
    bar.selectbox(
        label,
        list(names),
        format_func=lambda value: names[value],
        key=key,
        on_change=_selected,
        args=(parameter, key, forget),
        width=236,
    )


def _selected(parameter: str, key: str, forget: str | None) -> None:
    st.query_params[parameter] = str(st.session_state[key])
    if forget is not None and forget in st.query_params:
        del st.query_params[forget]


def _colours(bar: Any) -> tuple[str, str]:
    """The scale and the colours of a :class:`Look`."""
    with bar.popover("Colours"):
        scale = st.segmented_control(
            "Colour scale",
            list(SCALE_NAMES),
            default="Each map",
            required=True,
            key="scale",
            bind="query-params",
            help="Each map: from its least to its greatest value. Shared: raw scores on one scale "
            "for all maps, which compares methods only where their scores have one unit.",
        )
        colours = st.selectbox(
            "Colours",
            list(COLOUR_NAMES),
            key="colours",
            bind="query-params",
            help="Automatic is Inferno, and blue to orange for maps with negative values.",
        )
    return SCALE_NAMES[scale], COLOUR_NAMES[colours]


def _sliders(bar: Any) -> tuple[float, float]:
    """Opacity and threshold."""
    opacity = bar.slider(
        "Opacity", 0.0, 1.0, 0.55, 0.05, key="opacity", bind="query-params", width=140
    )
    threshold = bar.slider(
        "Threshold",
        0.0,
        1.0,
        0.0,
        0.05,
        key="threshold",
        bind="query-params",
        width=140,
        help="Where the map is below this share of the scale, the photo stays as it is.",
    )
    return opacity, threshold


# ---------------------------------------------------------------------- maps


def _maps(pack: Pack, shown: Shown) -> None:
    photo = {
        "id": f"photo {shown.image_id}",
        "src": photo_url(pack, shown.image_id, SIDE),
        "alt": f"Photo {_file(pack, shown)}",
        "title": "Photo",
        "lines": [_file(pack, shown)],
    }
    cells = [photo, *(_cell(pack, shown, entry_id) for entry_id in shown.ids)]
    columns = 3 if len(cells) <= 6 else 4
    aspect = _aspect(pack, shown)
    grid(
        cells,
        "maps",
        label="Photo and maps",
        columns=columns,
        width=WIDTH,
        aspect=aspect,
        on_open=lambda: _focus(shown.ids),
    )
    _legend(pack, shown.ids, shown.look)
    if shown.missing:
        st.caption(plain(f"No map of this class by {', '.join(shown.missing)}."))


def _aspect(pack: Pack, shown: Shown) -> float:
    """Width over height of the photo's place; of a strip or a tower only what the page can show."""
    height, width = pack.explanation(shown.focus).view.photo_size
    return min(max(width / height, 0.6), 2.0)


def _cell(pack: Pack, shown: Shown, entry_id: str) -> dict[str, Any]:
    row = shown.entries.loc[entry_id]
    low, high = f"{row['min']:.3g}", f"{row['max']:.3g}"
    return {
        "id": entry_id,
        "src": _url(pack, entry_id, shown.look),
        "alt": f"Map by {row['method']} of {_short(row['target_name'])} on {_file(pack, shown)}",
        "title": row["method"],
        "lines": [f"{_short(row['target_name'])}  {row['probability']:.1%}", f"{low} to {high}"],
        "selected": entry_id == shown.focus,
    }


def _focus(ids: Sequence[str]) -> None:
    opened = st.session_state["maps"].open
    if opened in ids:
        st.query_params["entry"] = opened


def _url(pack: Pack, entry_id: str, look: Look) -> str:
    return overlay_url(pack, entry_id, **vars(look))


def _legend(pack: Pack, entry_ids: Sequence[str], look: Look) -> None:
    st.html(legends_html(pictures.legends(pack, entry_ids, look)))


def _file(pack: Pack, shown: Shown) -> str:
    return str(pack.images.loc[shown.image_id, "file_name"] or shown.image_id)


def _short(name: str) -> str:
    """The first of a class's names."""
    return name.split(",")[0].strip() or name


# ---------------------------------------------------------------------- tabs


def _classes(pack: Pack, shown: Shown) -> None:
    """The classifier's first classes with their maps by the method in focus, and a contrast."""
    method = shown.entries.loc[shown.focus, "method"]
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
                "src": _url(pack, entry_id, look)
                if entry_id
                else photo_url(pack, shown.image_id, SMALL),
                "alt": f"Map by {method} of {_short(name)}" if entry_id else "Photo without a map",
                "title": _short(name),
                "lines": [f"{probability:.1%}", method if entry_id else f"no map by {method}"],
                "selected": target == shown.target,
            }
        )
    st.caption(
        plain(
            f"The classifier's first classes, explained by {method}. Open one to see it by all methods."
        )
    )
    grid(
        cells,
        "classes",
        label="Classes",
        columns=5,
        width=WIDTH,
        aspect=_aspect(pack, shown),
        on_open=_open_class,
    )
    if len(by_class) > 1:
        _contrast(pack, shown, by_class)


def _open_class() -> None:
    opened = st.session_state["classes"].open
    if opened:
        st.query_params["class"] = opened
        if "entry" in st.query_params:
            del st.query_params["entry"]


def _contrast(pack: Pack, shown: Shown, by_class: dict[int, str]) -> None:
    names = {
        target: _short(shown.entries.loc[entry_id, "target_name"])
        for target, entry_id in by_class.items()
    }
    st.markdown("**Contrast of two classes**")
    first = shown.target if shown.target in by_class else next(iter(by_class))
    others = [target for target in by_class if target != first]
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    wanted = {str(target): target for target in others}
    second = wanted.get(st.query_params.get("minus", ""), others[0])
    label = plain(f"{names[first]} minus")
    _select(bar, label, {t: names[t] for t in others}, second, "minus", shown.image_id)
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
        "src": _url(pack, by_class[first], look),
        "alt": f"Difference map: {title}",
        "title": title,
    }
    grid([cell], "contrast", label="Contrast", columns=2, width=300, aspect=_aspect(pack, shown))
    _legend(pack, [by_class[first]], look)


def _slider(pack: Pack, shown: Shown) -> None:
    """The map in focus against the photo or another map."""
    own = shown.entries.loc[shown.ids, "method"]
    others = {"": "Photo"} | {i: m for i, m in own.items() if i != shown.focus}
    other = st.query_params.get("against", "")
    other = other if other in others else ""
    if len(others) > 1:
        label = plain(f"Compare {own[shown.focus]} with")
        _select(st, label, others, other, "against", shown.focus)
    before = _url(pack, other, shown.look) if other else photo_url(pack, shown.image_id, SIDE)
    slide(
        (before, others[other]),
        (_url(pack, shown.focus, shown.look), own[shown.focus]),
        label=f"How much of the {own[shown.focus]} map is shown",
        alt=f"{_file(pack, shown)}, with the map by {own[shown.focus]} of {_short(shown.name)}",
        key="slide",
    )


def _fidelity(pack: Pack, shown: Shown) -> None:
    """This photo's figures by method, and its curves."""
    rows = shown.entries.loc[shown.ids]
    metrics = [m for m in pack.metrics if rows[m.key].notna().any()]
    curves = {rows.loc[i, "method"]: found for i in shown.ids if (found := pack.curves(i))}
    if not metrics and not curves:
        st.info("This pack has no fidelity figures. `xattn compare` writes a pack with them.")
        return
    if metrics:
        table = rows[[m.key for m in metrics]].set_axis(rows["method"], axis=0)
        arrow = {True: "↑", False: "↓"}
        config = {
            m.key: st.column_config.NumberColumn(
                f"{m.key} {arrow[m.higher_is_better]}",
                format="%.4g",
                help=plain(f"{m.formula}. Protocol {m.protocol_id}"),
            )
            for m in metrics
        }
        st.dataframe(table, column_config=config, alt="Fidelity figures by method")
        st.caption(
            "↑ higher is better, ↓ lower is better. Of this photo alone: one photo says little about "
            "a method. Formula and protocol stand in each column's help."
        )
        with st.expander("Formulas and protocols"):
            for m in metrics:
                better = "higher" if m.higher_is_better else "lower"
                st.text(f"{m.key} ({better} is better): {m.formula}\nprotocol {m.protocol_id}")
    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    for i, name in enumerate(names):
        if i % 2 == 0:
            columns = st.columns(2)
        own = {method: found[name] for method, found in curves.items() if name in found}
        columns[i % 2].altair_chart(
            _chart(name, own, pack.shares.get(name)), height=360, key=f"curve {name}"
        )


def _chart(name: str, curves: dict[str, list[float]], shares: list[float] | None) -> Any:
    """One curve of every method: the score of the class against the share of changed pixels."""
    import altair as alt

    points = []
    for method, values in curves.items():
        at = shares if shares and len(shares) == len(values) else np.linspace(0, 1, len(values))
        points += [
            {"method": method, "share": float(share), "score": score}
            for share, score in zip(at, values, strict=True)
        ]
    # By colour and by dashes; colours of one lightness for both grounds, apart for colour-blind eyes.
    scale = {"domain": list(curves)}
    colour = alt.Scale(range=LINES, **scale)
    dashes = alt.Scale(range=DASHES, **scale)
    legend = alt.Legend(orient="bottom", columns=2, symbolSize=300, symbolStrokeWidth=2)
    return (
        alt.Chart(pd.DataFrame(points), title=name)
        .mark_line()
        .encode(
            x=alt.X("share:Q", title="share of pixels", axis=alt.Axis(format="%")),
            y=alt.Y("score:Q", title="score of the class"),
            color=alt.Color("method:N", title=None, legend=legend, scale=colour),
            strokeDash=alt.StrokeDash("method:N", title=None, legend=legend, scale=dashes),
            tooltip=[
                "method:N",
                alt.Tooltip("share:Q", format=".0%"),
                alt.Tooltip("score:Q", format=".3f"),
            ],
        )
    )


def _provenance(pack: Pack, shown: Shown) -> None:
    """Where the map in focus comes from."""
    found = pack.provenance(shown.focus)
    backbone, head = (
        found[name] if isinstance(found[name], dict) else {} for name in ("backbone", "head")
    )
    facts = {
        "method": found["method"],
        "network": backbone.get("name"),
        "its weights, sha256": backbone.get("sha256"),
        "head": head.get("name"),
        "its weights, sha256 ": head.get("sha256"),
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


def _export(pack: Pack, shown: Shown) -> None:
    """Files of what is shown; those of a whole selection are the gallery's."""
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in shown.image_id)[:80]
    st.caption(
        "The maps above with caption and provenance, as a figure or as a page that needs no server. "
        "The gallery exports its whole selection."
    )
    bar = st.container(horizontal=True, gap="small")
    for kind, mime in (("png", "image/png"), ("svg", "image/svg+xml")):
        bar.download_button(
            f"Figure, {kind.upper()}",
            data=lambda kind=kind: export.figure(pack, shown.ids, kind, shown.look),
            file_name=f"{name}.{kind}",
            mime=mime,
            on_click="ignore",
            key=f"export_{kind}",
        )
    bar.download_button(
        "Report, HTML",
        data=lambda: export.html(pack, shown.ids, shown.look),
        file_name=f"{name}.html",
        mime="text/html",
        on_click="ignore",
        key="export_html",
    )
    bar.download_button(
        "Figures of this photo, CSV",
        data=lambda: export.csv(pack, [shown.image_id]),
        file_name=f"{name}.csv",
        mime="text/csv",
        on_click="ignore",
        key="export_csv",
    )
