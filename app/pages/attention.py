"""The attention page: pick a patch of an image and see what it attends to, by layer and head."""

from __future__ import annotations

import base64
import io
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import streamlit as st
import torch
from PIL import Image
from torch import Tensor

from xattn.app import attention_charts as charts
from xattn.app import models, reading, selection, state
from xattn.app.attention_view import (
    MEAN,
    NAMES,
    SCALES,
    View,
    mechanism_of,
    name_of,
    place_of,
    slug,
    token_of,
    usual,
    view_of,
)
from xattn.app.components import grid
from xattn.app.components.patches import patches, picked_patch
from xattn.app.pack import PackError
from xattn.app.reading import SIZES, TRAINED, Reading
from xattn.app.state import Context, plain
from xattn.app.theme import facts_html
from xattn.attention.statistics import bits, breadth, kept_keys, row_distance, row_entropy
from xattn.contact_sheet import legends_html
from xattn.explainers.attention import NoAttention
from xattn.visualize import SEQUENTIAL, Legend, Scale, colorize

if TYPE_CHECKING:
    from xattn.app.library import Pack

KEY = "attention."  # before the names of this page's widgets
SCALE_NAMES = {
    "root": "Shared, square root",
    "linear": "Shared, linear",
    "own": "Each its own",
}
SIDE = 160  # pixels of a small picture, at least
SMALL = 112  # pixels of its place on the page, at least


def page(context: Context) -> None:
    """Show the attention of one image of the open pack."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    image_id = _image(pack, context.params.get("image"))
    _heading(pack, image_id)
    with st.spinner("Loading the model that made this pack …"):
        backbone = models.backbone_of(pack)
    url = {name: st.query_params[name] for name in NAMES if name in st.query_params}
    arrived = st.session_state.get(f"{KEY}url") != (pack.id, image_id, url)
    size_grid = reading.grid_of(backbone)
    mechanism, size, messages = mechanism_of(url if arrived else _widgets(), size_grid)
    kept = st.session_state.setdefault(f"{KEY}kept", OrderedDict())
    try:
        with st.spinner("Reading the attention of this photo …"):
            seen = reading.read(pack, image_id, backbone, mechanism, size, kept)
    except NoAttention as error:
        _nothing(backbone.name, error, image_id)
        return
    start = usual(seen, mechanism, size)
    view, wrong = view_of(url if arrived else _widgets(), start, seen)
    for message in [*messages, *wrong] if arrived else []:
        st.warning(plain(message))
    view = _picker(seen, _settled(view), size_grid)
    _notes(pack, image_id, backbone, seen, view, kept)
    rows = seen.rows(_token(view, seen))
    _heads(seen, view, rows)
    _layers(seen, view, rows)
    _own_maps(seen, view)
    _rollout(seen, view)
    _charts(seen, view)
    _remember(pack, image_id, view, start)


# ---------------------------------------------------------------------- the URL and the widgets


def _image(pack: Pack, wanted: str | None) -> str:
    if wanted is None:
        return str(pack.images.index[0])
    if wanted not in pack.images.index:
        raise PackError("This pack has no such image; choose one in the gallery.")
    return wanted


def _widgets() -> dict[str, str]:
    """What the widgets say, as a URL would."""
    found = {name: st.session_state.get(KEY + name) for name in NAMES}
    return {name: str(value) for name, value in found.items() if value is not None}


def _settled(view: View) -> View:
    """The view, after the widgets that are about to be drawn were given its values."""
    for name in NAMES:
        st.session_state[KEY + name] = getattr(view, name)
    return view


def _remember(pack: Pack, image_id: str, view: View, start: View) -> None:
    """Write the view into the URL, unless it is there."""
    wanted = view.params(start)
    st.session_state[f"{KEY}url"] = (pack.id, image_id, wanted)
    others = {n: st.query_params.get_all(n) for n in st.query_params if n not in NAMES}
    others["image"] = [image_id]
    whole = {**others, **{name: [value] for name, value in wanted.items()}}
    if whole != {n: st.query_params.get_all(n) for n in st.query_params}:
        st.query_params.from_dict(whole)


def _set(**values: Any) -> None:
    """Change what is shown; the next run reads it."""
    for name, value in values.items():
        st.session_state[KEY + name] = value


def _token(view: View, seen: Reading) -> int:
    token = token_of(view.patch, seen)
    assert token is not None, "view_of has checked it"
    return token


# ---------------------------------------------------------------------- the top of the page


def _heading(pack: Pack, image_id: str) -> None:
    choices = selection.table(pack).choices
    view = selection.from_text(st.query_params.get("view", ""), choices)
    before, after, number, count = selection.neighbours(pack, view, image_id)
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    for label, other, keys in (("Previous", before, "Shift+Left"), ("Next", after, "Shift+Right")):
        if bar.button(label, key=f"{KEY}{label}", disabled=other is None, shortcut=keys):
            state.go("attention", image=other, **_carried())
    place = f"{number:,} of {count:,}" if number else "not in the gallery's selection"
    bar.caption(place, width="content")
    bar.space("stretch")
    if bar.button("Maps", key=f"{KEY}maps", help="The maps of this photo"):
        _leave(image_id)
    st.subheader(plain(pack.images.at[image_id, "file_name"] or image_id), anchor=False)


def _leave(image_id: str) -> NoReturn:
    state.go("image", image=image_id, view=st.query_params.get("view"))


def _carried() -> dict[str, str]:
    """The view and the gallery's selection as the URL has them, for another photo."""
    names = (*NAMES, "view")
    return {name: st.query_params[name] for name in names if name in st.query_params}


def _nothing(name: str, error: NoAttention, image_id: str) -> None:
    with st.container(border=True):
        if error.calls == 0:
            st.markdown(f"**{plain(name)} has no attention.**")
            st.caption(
                "It makes no self-attention that could be read: a convolutional network has none. "
                "This page is for vision transformers; the maps of this photo are on its own page."
            )
        else:
            st.markdown(f"**The attention of {plain(name)} cannot be shown here.**")
            st.caption(
                plain(f"It {error.found}; this page shows attention from all tokens to all tokens.")
            )
        if st.button("Open the maps of this photo", key=f"{KEY}back", type="primary"):
            _leave(image_id)


def _picker(seen: Reading, view: View, size_grid: tuple[int, int] | None) -> View:
    """The large picture and the controls; returns the view that they say."""
    picture, controls = st.columns([5, 6], gap="large")
    with controls:
        view = _controls(seen, view, size_grid)
    token = _token(view, seen)
    row = _row(seen.rows(token)[view.layer], view.head)
    prefix = len(seen.prefix)
    map_ = row[prefix:].unflatten(0, seen.grid)
    kept = kept_keys(map_) if view.mechanism != TRAINED else None
    scale = _scale([float(map_.max())], view.scale)
    with picture:
        patches(
            _photo(seen),
            seen.grid,
            f"{KEY}picker",
            map=_png(map_, scale, kept),
            picked=place_of(token, seen),
            label=f"Photo in {seen.grid[0]} x {seen.grid[1]} patches: pick the patch that looks",
            alt=_alt(f"Attention from {name_of(token, seen)}", map_, seen),
            on_pick=_picked,
        )
        st.session_state[f"{KEY}grid"] = seen.grid
        _legend(scale, "share of the attention that a patch gets")
    with controls:
        st.html(facts_html(_facts(seen, view, token, row, kept)))
    return view


def _picked() -> None:
    place = picked_patch(f"{KEY}picker", st.session_state[f"{KEY}grid"])
    if place is not None:
        _set(patch=f"{place[0] + 1},{place[1] + 1}")


def _controls(seen: Reading, view: View, size_grid: tuple[int, int] | None) -> View:
    if seen.prefix:
        options = ["patch", *map(slug, seen.prefix)]
        names = dict(zip(options, ["A patch", *map(str.capitalize, seen.prefix)], strict=True))
        st.session_state[f"{KEY}from"] = view.patch if view.patch in options else "patch"
        st.segmented_control(
            "From",
            options,
            key=f"{KEY}from",
            format_func=lambda o: names[o],
            required=True,
            on_change=_from,
            args=(seen.grid,),
            help="Whose attention is shown. Click a patch in the photo, or move with the arrow keys.",
        )
    else:
        st.caption("Click a patch in the photo, or move with the arrow keys.")
    layer, head = st.columns(2)
    if seen.layers > 1:
        layer.slider("Layer", 0, seen.layers - 1, key=f"{KEY}layer")
    heads = [MEAN, *map(str, range(seen.heads(st.session_state[f"{KEY}layer"])))]
    if st.session_state[f"{KEY}head"] not in heads:
        st.session_state[f"{KEY}head"] = MEAN
    head.selectbox(
        "Head",
        heads,
        key=f"{KEY}head",
        format_func=lambda h: "Mean of all heads" if h == MEAN else f"Head {h}",
    )
    first, second = st.columns(2)
    first.selectbox(
        "Colours",
        SCALES,
        key=f"{KEY}scale",
        format_func=lambda s: SCALE_NAMES[s],
        help="Shared: the pictures of a row have one scale. The square root shows small shares.",
    )
    fitting = [m for m in SIZES if size_grid is not None and reading.sizes(m, size_grid)]
    if fitting:
        titles = {TRAINED: "As trained", "gna": "Neighbourhoods (gna)", "agent": "Agents (agent)"}
        second.selectbox(
            "Mechanism",
            [TRAINED, *fitting],
            key=f"{KEY}mechanism",
            format_func=lambda m: titles[m],
            on_change=_mechanism,
            args=(size_grid,),
            help="Another mechanism in place of the trained one, in all layers and without training.",
        )
    if view.mechanism != TRAINED and size_grid is not None:
        label = {"gna": "Window, patches a side", "agent": "Agents"}[view.mechanism]
        second.selectbox(label, reading.sizes(view.mechanism, size_grid), key=f"{KEY}size")
    return replace(
        view,
        layer=st.session_state[f"{KEY}layer"],
        head=st.session_state[f"{KEY}head"],
        scale=st.session_state[f"{KEY}scale"],
    )


def _from(size_grid: tuple[int, int]) -> None:
    chosen = st.session_state[f"{KEY}from"]
    middle = f"{(size_grid[0] + 1) // 2},{(size_grid[1] + 1) // 2}"
    _set(patch=middle if chosen == "patch" else chosen)


def _mechanism(size_grid: tuple[int, int]) -> None:
    chosen = st.session_state[f"{KEY}mechanism"]
    _set(size=None if chosen == TRAINED else reading.usual_size(chosen, size_grid))


def _facts(
    seen: Reading, view: View, token: int, row: Tensor, kept: Tensor | None
) -> dict[str, str]:
    """The row in words."""
    prefix, n = len(seen.prefix), len(row)
    head = "mean of all heads" if view.head == MEAN else f"head {view.head}"
    facts = {"Shown": f"layer {view.layer}, {head}, from {name_of(token, seen)}"}
    for i, name in enumerate(seen.prefix):
        facts[f"To the {name}"] = f"{float(row[i]):.1%}"
    best = int(row[prefix:].argmax()) + prefix
    facts["Strongest patch"] = f"{name_of(best, seen)}: {float(row[best]):.1%}"
    nats = float(row_entropy(row.double()))
    facts["Entropy"] = (
        f"{nats:.2f} nats ({bits(nats):.2f} bits), as wide as {breadth(nats):.0f} of {n} tokens"
    )
    if place_of(token, seen) is not None:
        away = float(row_distance(row[None].double(), torch.tensor([token]), seen.grid, prefix)[0])
        if not math.isnan(away):
            facts["Mean distance"] = f"{away:.1f} patches"
    if kept is not None and not kept.all():
        facts["Reads"] = f"{int(kept.sum())} of {kept.numel()} patches; the others have no colour"
    return facts


def _notes(pack: Pack, image_id: str, backbone: Any, seen: Reading, view: View, kept: Any) -> None:
    note = (
        "Read from the photo that is stored in the pack (at most 512 pixels a side), cut as the model "
        "sees it; a larger original may differ slightly. Layers and heads count from 0, as in the "
        "code, rows and columns of patches from 1."
    )
    if view.mechanism != TRAINED:
        trained = reading.read(pack, image_id, backbone, TRAINED, None, kept)
        alike = float(torch.cosine_similarity(trained.logits, seen.logits, dim=0))
        st.info(
            "This is the model after a conversion without training: what you see is not what it "
            f"learned. Its outputs have a cosine similarity of {alike:.3f} to the trained model's."
        )
    st.caption(note)


# ---------------------------------------------------------------------- rows of small pictures


def _heads(seen: Reading, view: View, rows: Sequence[Tensor]) -> None:
    st.subheader(f"Heads of layer {view.layer}", anchor=False)
    prefix, token = len(seen.prefix), _token(view, seen)
    own = rows[view.layer]
    maps = [row[prefix:].unflatten(0, seen.grid) for row in own]
    scale = _scale([float(m.max()) for m in maps], view.scale)
    cells = [
        {
            "id": str(head),
            "src": _png(m, scale, kept_keys(m) if view.mechanism != TRAINED else None, SIDE),
            "alt": _alt(f"Head {head}, from {name_of(token, seen)}", m, seen),
            "title": f"Head {head}",
            "lines": _lines(row, seen),
            "selected": view.head == str(head),
        }
        for head, (row, m) in enumerate(zip(own, maps, strict=True))
    ]
    label = f"Heads of layer {view.layer}"
    _grid(cells, "heads", label, seen, _head_opened)
    _legend(scale, "share of a head's attention that a patch gets")


def _layers(seen: Reading, view: View, rows: Sequence[Tensor]) -> None:
    what = "Mean of all heads" if view.head == MEAN else f"Head {view.head}"
    st.subheader(f"{what}, layer by layer", anchor=False)
    prefix, token = len(seen.prefix), _token(view, seen)
    there = [i for i in range(seen.layers) if view.head == MEAN or int(view.head) < seen.heads(i)]
    fused = {i: _row(rows[i], view.head) for i in there}
    maps = {i: row[prefix:].unflatten(0, seen.grid) for i, row in fused.items()}
    scale = _scale([float(m.max()) for m in maps.values()], view.scale)
    cells = [
        {
            "id": str(i),
            "src": _png(m, scale, kept_keys(m) if view.mechanism != TRAINED else None, SIDE),
            "alt": _alt(f"Layer {i}, from {name_of(token, seen)}", m, seen),
            "title": f"Layer {i}",
            "lines": _lines(fused[i], seen),
            "selected": view.layer == i,
        }
        for i, m in maps.items()
    ]
    label = f"{what} in each layer"
    _grid(cells, "strip", label, seen, _layer_opened)
    _legend(scale, "share of the attention that a patch gets")


def _grid(
    cells: list[dict[str, Any]], key: str, label: str, seen: Reading, on_open: Any = None
) -> None:
    aspect = seen.grid[1] / seen.grid[0]
    grid(cells, KEY + key, label=label, width=SMALL, aspect=aspect, on_open=on_open)


def _head_opened() -> None:
    _set(head=st.session_state[f"{KEY}heads"].open)


def _layer_opened() -> None:
    _set(layer=int(st.session_state[f"{KEY}strip"].open))


def _lines(row: Tensor, seen: Reading) -> list[str]:
    nats = float(row_entropy(row.double()))
    lines = [f"{nats:.2f} nats"]
    if seen.prefix:
        lines.append(f"{float(row[: len(seen.prefix)].sum()):.0%} to prefix")
    return lines


def _own_maps(seen: Reading, view: View) -> None:
    """What a mechanism has beside rows of attention."""
    if not any(seen.maps):
        return
    st.subheader("The mechanism's own maps", anchor=False)
    token = _token(view, seen)
    found = seen.maps[view.layer]
    if "received" in found:
        maps = {i: m["received"][0] for i, m in enumerate(seen.maps) if "received" in m}
        titles = {i: (f"Layer {i}", []) for i in maps}
        _strip(
            "received",
            maps,
            titles,
            seen,
            view,
            "What each patch receives from all queries, mean over heads, by layer.",
            "sum over queries of what a patch gets",
        )
    if "agents" in found:
        maps = dict(enumerate(found["agents"]))
        shares = seen.agent_shares(view.layer, token)
        part = None if shares is None else _row(shares, view.head)
        titles = {
            i: (f"Agent {i}", [] if part is None else [f"read {float(part[i]):.1%}"]) for i in maps
        }
        _strip(
            "agents",
            maps,
            titles,
            seen,
            view,
            f"What each agent of layer {view.layer} reads, mean over heads, and how much "
            f"{name_of(token, seen)} reads of it.",
            "share of an agent's attention that a patch gets",
        )
    for name, text in (
        ("importance", "What each head adds to the scores of a key, for all queries"),
        ("kept", "The keys that each head keeps (light), for all queries"),
    ):
        if name in found:
            maps = dict(enumerate(found[name]))
            titles = {
                i: (f"Head {i}", [f"keeps {int(m.sum())}"] if name == "kept" else [])
                for i, m in maps.items()
            }
            text = f"{text}, layer {view.layer}."
            unit = "1 = kept" if name == "kept" else "added to a score"
            _strip(name, maps, titles, seen, view, text, unit)


def _strip(
    key: str,
    maps: dict[int, Tensor],
    titles: dict[int, tuple[str, list[str]]],
    seen: Reading,
    view: View,
    text: str,
    unit: str,
) -> None:
    st.caption(plain(text))
    scale = _scale([float(m.max()) for m in maps.values()], view.scale)
    cells = [
        {
            "id": str(i),
            "src": _png(m, scale, None, SIDE),
            "alt": _alt(titles[i][0], m, seen),
            "title": titles[i][0],
            "lines": titles[i][1],
        }
        for i, m in maps.items()
    ]
    _grid(cells, f"own.{key}", text, seen)
    _legend(scale, unit)


# ---------------------------------------------------------------------- rollout


def _rollout(seen: Reading, view: View) -> None:
    st.subheader("Rollout", anchor=False)
    picture, words = st.columns([5, 6], gap="large")
    token, prefix = _token(view, seen), len(seen.prefix)
    with words:
        if seen.layers > 1:
            st.slider(
                "Up to layer",
                0,
                seen.layers - 1,
                key=f"{KEY}depth",
                help="Layers 0 to this one are multiplied, heads averaged, half of each the skip path.",
            )
    depth = st.session_state[f"{KEY}depth"]
    row = seen.rollout(token, depth)
    map_ = row[prefix:].unflatten(0, seen.grid)
    scale = _scale([float(map_.max())], view.scale)
    with picture:
        patches(
            _photo(seen),
            seen.grid,
            f"{KEY}rollout",
            map=_png(map_, scale, None),
            picked=place_of(token, seen),
            label="Rollout over the photo: pick the patch that looks",
            alt=_alt(f"Rollout from {name_of(token, seen)} up to layer {depth}", map_, seen),
            on_pick=_rollout_picked,
        )
        _legend(scale, "share of the token that comes from a patch")
    nats = float(row_entropy(row.double()))
    facts = {
        "Shown": f"what {name_of(token, seen)} is made of after layer {depth}",
        "From itself": f"{float(row[token]):.1%}",
    }
    for i, name in enumerate(seen.prefix):
        if i != token:
            facts[f"From the {name}"] = f"{float(row[i]):.1%}"
    facts["Entropy"] = f"{nats:.2f} nats, as wide as {breadth(nats):.0f} tokens"
    words.html(facts_html(facts))
    words.caption(
        "Attention rollout of Abnar and Zuidema 2020: the row of the product of (I + A) / 2 over the "
        "layers, A the mean over heads. It follows tokens only; what the values and the MLPs do is "
        "not in it."
    )


def _rollout_picked() -> None:
    place = picked_patch(f"{KEY}rollout", st.session_state[f"{KEY}grid"])
    if place is not None:
        _set(patch=f"{place[0] + 1},{place[1] + 1}")


# ---------------------------------------------------------------------- charts


def _charts(seen: Reading, view: View) -> None:
    st.subheader("All layers and heads on this photo", anchor=False)
    found = seen.statistics[0]
    count = seen.grid[0] * seen.grid[1]
    rows = (
        f"all {count} patches as queries"
        if found.queries == count
        else f"a random sample of {found.queries} of the {count} patches as queries"
    )
    st.caption(f"Means over {rows}; they do not depend on the picked patch.")
    heads, sinks = charts.heads_table(seen), charts.sinks_table(seen)
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("**Sinks: where attention goes**")
        st.altair_chart(charts.sinks_chart(sinks, view.layer))
        st.caption(plain(_sinks_text(seen, view)))
    with right:
        st.markdown("**Locality: how far heads look**")
        st.altair_chart(
            charts.distance_chart(heads, seen.grid, view.layer, view.head),
            key=f"{KEY}distance",
            on_select=_distance_picked,
            selection_mode=charts.PICKED,
        )
        st.caption(
            "Distance between patch centres, weighted by attention, prefix tokens left out. A point "
            "is a head, the line the mean of a layer; click a point to show its head."
        )
    st.markdown("**Heads by entropy**, the narrowest first")
    which = st.segmented_control(
        "Heads of",
        ["layer", "all"],
        key=f"{KEY}ranked",
        default="layer",
        required=True,
        format_func=lambda w: f"Layer {view.layer}" if w == "layer" else "All layers",
        label_visibility="collapsed",
    )
    most = math.log(seen.operators[0].shape[3])
    chosen = heads if which == "all" else heads[heads["layer"] == view.layer]
    with st.container(height=420 if len(chosen) > 18 else "content", border=False):
        st.altair_chart(
            charts.entropy_chart(chosen, most, view.layer, view.head),
            key=f"{KEY}entropy",
            on_select=_entropy_picked,
            selection_mode=charts.PICKED,
        )
    st.caption(
        f"Entropy of a row over all tokens, prefix tokens included, mean over queries; uniform "
        f"attention has {most:.2f} nats. Click a bar to show its head."
    )
    with st.expander("The figures as a table"):
        st.dataframe(
            heads.drop(columns="name").sort_values("entropy"),
            hide_index=True,
            column_config={
                "layer": "Layer",
                "head": "Head",
                "entropy": st.column_config.NumberColumn("Entropy, nats", format="%.3f"),
                "bits": st.column_config.NumberColumn("Entropy, bits", format="%.3f"),
                "tokens": st.column_config.NumberColumn("As wide as tokens", format="%.1f"),
                "distance": st.column_config.NumberColumn("Distance, patches", format="%.2f"),
                "prefix": st.column_config.NumberColumn("To prefix tokens", format="percent"),
            },
        )


def _sinks_text(seen: Reading, view: View) -> str:
    tokens, shares = seen.statistics[view.layer].sinks(charts.SINKS)
    listed = "; ".join(
        f"{name_of(int(t), seen)} ({float(s):.1%})"
        for t, s in zip(tokens[0], shares[0], strict=True)
    )
    even = 1 / seen.operators[0].shape[3]
    return (
        f"Mean over heads and queries. Most attended patches of layer {view.layer}: {listed}. "
        f"An even share is {even:.2%}."
    )


def _distance_picked() -> None:
    _point_picked("distance")


def _entropy_picked() -> None:
    _point_picked("entropy")


def _point_picked(chart: str) -> None:
    points = st.session_state[f"{KEY}{chart}"].selection.get(charts.PICKED) or []
    if points:
        _set(layer=int(points[0]["layer"]), head=str(int(points[0]["head"])))


# ---------------------------------------------------------------------- pictures


def _row(per_head: Tensor, head: str) -> Tensor:
    """(H, N) -> (N,): one head, or their mean."""
    return per_head.mean(0) if head == MEAN else per_head[int(head)]


def _scale(highest: Sequence[float], kind: str) -> _Colours:
    return _Colours(None if kind == "own" else max(highest), root=kind == "root")


class _Colours:
    """Colours of shares from 0 to ``high`` (each picture's own greatest value if None)."""

    def __init__(self, high: float | None, root: bool) -> None:
        self.high, self.root = high, root

    def __call__(self, values: np.ndarray) -> np.ndarray:
        high = float(values.max()) if self.high is None else self.high
        at = Scale(0.0, high)(values)
        return np.sqrt(at) if self.root else at


def _png(values: Tensor, scale: _Colours, kept: Tensor | None, side: int = 0) -> str:
    """A map (h, w) as a picture of one pixel a patch, or of whole pixels a patch up to ``side``.

    Patches that are not ``kept`` are transparent.
    """
    colours = colorize(scale(values.numpy()), SEQUENTIAL)
    alpha = np.full(values.shape, 255, np.uint8)
    if kept is not None:
        alpha[~kept.numpy()] = 0
    image = Image.fromarray(np.dstack([colours, alpha]))
    times = max(1, -(-side // max(image.size)))
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return _uri(image, "PNG")


def _photo(seen: Reading) -> str:
    """The pixels that the model saw."""
    return _uri(seen.pixels, "JPEG", quality=92, subsampling=0)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{data}"


def _alt(what: str, map_: Tensor, seen: Reading) -> str:
    best = int(map_.argmax())
    row, column = divmod(best, seen.grid[1])
    return f"{what}: strongest at row {row + 1}, column {column + 1} ({float(map_.max()):.1%})"


def _legend(scale: _Colours, unit: str) -> None:
    if scale.high is None:
        legend = Legend("0", "own greatest", unit)
    else:
        middle = f"; the middle colour is {_share(scale.high / 4)}" if scale.root else ""
        legend = Legend("0", _share(scale.high), f"{unit}{middle}")
    st.html(legends_html([legend]))


def _share(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"
