"""Rows of small pictures on one scale: the heads of a layer, the layers, a mechanism's own maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import streamlit as st
from torch import Tensor

from xattn.app.attention.pictures import NUMBER, SHARE, Colours, alt_text, legend, png, shares
from xattn.app.attention.view import KEY, MEAN, View, change, fused, name_of, token_of
from xattn.app.components import grid, sent
from xattn.app.state import plain
from xattn.attention.statistics import kept_keys, row_entropy
from xattn.pictures.scales import make_scale

if TYPE_CHECKING:
    from xattn.app.attention.attention_pass import Reading

SIDE = 160  # pixels of a small picture, at least
SMALL = 96  # pixels of its place on the page, at least


def heads(seen: Reading, view: View, rows: Sequence[Tensor]) -> None:
    """The heads of the view's layer; ``rows`` are the query's, (H, N) a layer."""
    st.header(f"Heads of layer {view.layer}", anchor=False)
    prefix, token = len(seen.prefix), token_of(view.patch, seen)
    own = rows[view.layer]
    maps = [row[prefix:].unflatten(0, seen.grid) for row in own]
    scale = shares(maps, view.scale)
    cells = [
        {
            "id": str(head),
            "src": png(m, scale, kept_keys(m) if seen.hides else None, SIDE),
            "alt": alt_text(f"Head {head}, from {name_of(token, seen)}", m, seen),
            "title": f"Head {head}",
            "lines": _lines(row, seen),
            "selected": view.head == str(head),
        }
        for head, (row, m) in enumerate(zip(own, maps, strict=True))
    ]
    label = f"Heads of layer {view.layer}"
    _grid(cells, "heads", label, seen, _head_opened)
    legend(scale, "share of a head's attention that a patch gets")


def layers(seen: Reading, view: View, rows: Sequence[Tensor]) -> None:
    """The view's head, or the mean of all, in each layer."""
    what = "Mean of all heads" if view.head == MEAN else f"Head {view.head}"
    st.header(f"{what}, layer by layer", anchor=False)
    prefix, token = len(seen.prefix), token_of(view.patch, seen)
    there = [i for i in range(seen.layers) if view.head == MEAN or int(view.head) < seen.heads(i)]
    shown = {i: fused(rows[i], view.head) for i in there}
    maps = {i: row[prefix:].unflatten(0, seen.grid) for i, row in shown.items()}
    scale = shares(list(maps.values()), view.scale)
    cells = [
        {
            "id": str(i),
            "src": png(m, scale, kept_keys(m) if seen.hides else None, SIDE),
            "alt": alt_text(f"Layer {i}, from {name_of(token, seen)}", m, seen),
            "title": f"Layer {i}",
            "lines": _lines(shown[i], seen),
            "selected": view.layer == i,
        }
        for i, m in maps.items()
    ]
    label = f"{what} in each layer"
    _grid(cells, "strip", label, seen, _layer_opened)
    legend(scale, "share of the attention that a patch gets")


def _grid(
    cells: list[dict[str, Any]], key: str, label: str, seen: Reading, on_open: Any = None
) -> None:
    # Rows without a rest where that can be.
    columns = next((n for n in (6, 8, 7) if len(cells) % n == 0), 6)
    aspect = seen.grid[1] / seen.grid[0]
    grid(
        cells,
        KEY + key,
        label=label,
        columns=columns,
        width=SMALL,
        aspect=aspect,
        on_open=on_open,
    )


def _head_opened() -> None:
    opened = sent(f"{KEY}heads", "open")
    if opened is not None:
        change(head=opened)


def _layer_opened() -> None:
    opened = sent(f"{KEY}strip", "open")
    if opened is not None:
        change(layer=int(opened))


def _lines(row: Tensor, seen: Reading) -> list[str]:
    nats = float(row_entropy(row.double()))
    lines = [f"{nats:.2f} nats"]
    if seen.prefix:
        lines.append(f"{float(row[: len(seen.prefix)].sum()):.0%} to prefix")
    return lines


def own_maps(seen: Reading, view: View) -> None:
    """What a mechanism has beside rows of attention."""
    if not any(seen.maps):
        return
    st.header("The mechanism's own maps", anchor=False)
    token, found = token_of(view.patch, seen), seen.maps[view.layer]
    lines: dict[int, list[str]]
    if not found:
        st.caption(f"Layer {view.layer} has none; it is as trained.")
    if "received" in found:
        maps = {i: m["received"][0] for i, m in enumerate(seen.maps) if "received" in m}
        text = "What each patch receives from all queries together, mean over heads."
        _strip("Layer", maps, {}, seen, view, text, "received; 1 is an even share")
    if "agents" in found:
        read = seen.agent_shares(view.layer, token)
        part = [] if read is None else fused(read, view.head).tolist()
        lines = {i: [f"read {share:.1%}"] for i, share in enumerate(part)}
        text = (
            f"What each agent of layer {view.layer} reads, mean over heads, and how much "
            f"{name_of(token, seen)} reads of it."
        )
        maps = dict(enumerate(found["agents"]))
        _strip("Agent", maps, lines, seen, view, text, "share of an agent's attention", SHARE)
    if "importance" in found:
        text = f"What each head of layer {view.layer} adds to the scores of a key, for all queries."
        maps = dict(enumerate(found["importance"]))
        _strip("Head", maps, {}, seen, view, text, "added to a score; 0 also for keys left out")
    if "region" in found:
        text = f"What each region gets from all queries of layer {view.layer}, head by head."
        maps = dict(enumerate(found["mass"]))
        _strip("Head", maps, {}, seen, view, text, "mass of a region", SHARE)
        text = "How much of each patch's own attention its leading region gets, head by head."
        maps = dict(enumerate(found["leading"]))
        _strip("Rows of head", maps, {}, seen, view, text, "mass of its leading region", SHARE)
    if "prior" in found:
        text = (
            f"What the patch in the middle would attend to by positions alone in layer {view.layer}: all "
            f"patches have the mean query and key, rotated to their places."
        )
        maps = dict(enumerate(found["prior"]))
        _strip("Prior of head", maps, {}, seen, view, text, "share of the attention", SHARE)
    if "kept" in found:
        maps = dict(enumerate(found["kept"]))
        lines = {i: [f"keeps {int(m.sum())}"] for i, m in maps.items()}
        text = f"The keys that each head of layer {view.layer} keeps, for all queries."
        _strip("Kept by head", maps, lines, seen, view, text, "1 is kept")


def _strip(
    title: str,
    maps: dict[int, Tensor],
    lines: dict[int, list[str]],
    seen: Reading,
    view: View,
    text: str,
    unit: str,
    number: str = NUMBER,
) -> None:
    """Maps of one kind, numbered, on one scale."""
    st.caption(plain(text))
    ends = [(min(0.0, float(m.min())), float(m.max())) for m in maps.values()]
    scale = Colours(make_scale(ends), view.scale)
    cells = [
        {
            "id": str(i),
            "src": png(m, scale, None, SIDE),
            "alt": alt_text(f"{title} {i}", m, seen, number),
            "title": f"{title} {i}",
            "lines": lines.get(i, []),
        }
        for i, m in maps.items()
    ]
    _grid(cells, f"own {title}", text, seen)
    legend(scale, unit, number)
