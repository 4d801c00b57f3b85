"""The attention page: pick a patch of an image and see what it attends to, by layer and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st
import torch
from torch import Tensor

from xattn.app import models, state
from xattn.app.attention import attention_pass, charts
from xattn.app.attention.attention_pass import AS_TRAINED, TRAINED, Choice, ImageAttention
from xattn.app.attention.view import (
    KEY,
    MEAN,
    NAMES,
    SCALES,
    View,
    alt_text,
    bound_key,
    choice_of,
    current,
    default_view,
    handle_change,
    is_from_url,
    legend,
    name_of,
    photo,
    place_of,
    png,
    record_view,
    remember,
    select_head,
    set_view,
    shares,
    slug,
    token_of,
    view_of,
)
from xattn.app.components import patches, picked_patch
from xattn.app.components.theme import facts_html
from xattn.app.navigation.last_view import photo_bar
from xattn.app.state import Context, plain
from xattn.attention.statistics import bits, kept_keys, perplexity, row_distance, row_entropy
from xattn.explainers.relevance.attention import NoAttention, layers_text
from xattn.runtime.lru_cache import LRUCache

if TYPE_CHECKING:
    from xattn.backbone import Backbone

OWN = "Each query's own region"


def page(context: Context) -> None:
    """Show the attention of one image in the open pack."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    image_id = photo_bar(pack, "attention", KEY, _carried)
    with st.spinner("Loading the network that made this pack …"):
        backbone = models.backbone_of(pack)
    url = {name: st.query_params[name] for name in NAMES if name in st.query_params}
    new = is_from_url(pack.id, image_id, url)
    size_grid = attention_pass.grid_of(backbone)
    choice, messages = choice_of(url if new else current(), size_grid)
    kept = st.session_state.setdefault(f"{KEY}kept", LRUCache(attention_pass.KEPT))
    try:
        with st.spinner("Reading the attention of this photo …"):
            read = partial(attention_pass.read, pack, image_id, backbone)
            seen, choice, refused = _fitting(read, choice, kept)
    except NoAttention as error:
        _nothing(backbone.name, error, image_id)
        return
    if refused:
        st.warning(plain(refused))
    start = default_view(seen, choice)
    view, wrong = view_of(url if new else current(), start, seen)
    for message in [*messages, *wrong] if new else []:
        st.warning(plain(message))
    record_view(pack.id, image_id, view, url if new else None)
    trained = None
    if choice != AS_TRAINED:
        trained = attention_pass.read(pack, image_id, backbone, AS_TRAINED, kept)
    _picker(seen, view, size_grid, _outputs(backbone, seen, trained))
    _notes(seen, trained)
    rows = seen.rows(token_of(view.patch, seen))
    charts.heads(seen, view, rows)
    charts.layers(seen, view, rows)
    charts.own_maps(seen, view)
    _rollout(seen, view)
    charts.show(seen, view)
    remember(image_id, view, default_view(seen, AS_TRAINED))


def _fitting(
    read: Callable[..., ImageAttention], choice: Choice, kept: LRUCache
) -> tuple[ImageAttention, Choice, str]:
    """The attention for ``choice``. If its mechanism does not run on this photo, the attention of the
    network as trained, with the reason."""
    try:
        return read(choice, kept), choice, ""
    except NoAttention:
        raise
    except ValueError as error:
        if choice == AS_TRAINED:
            raise
        return read(AS_TRAINED, kept), AS_TRAINED, f"{choice.mechanism} does not run here: {error}"


# ---------------------------------------------------------------------- the top of the page


def _carried() -> dict[str, str | None]:
    """The view and the gallery's selection, which another photo should keep."""
    return {**current(), "view": st.query_params.get("view")}


def _nothing(name: str, error: NoAttention, image_id: str) -> None:
    with st.container(border=True):
        if error.calls == 0:
            st.markdown(f"**{plain(name)} has no attention.**")
            st.caption(
                "It has no self-attention that can be read; convolutional networks have none. This "
                "page is for vision transformers; the maps of this photo are on the photo's page."
            )
        else:
            st.markdown(f"**The attention of {plain(name)} cannot be shown here.**")
            st.caption(
                plain(f"It {error.found}; this page shows attention from all tokens to all tokens.")
            )
        if st.button("Open the maps of this photo", key=f"{KEY}back", type="primary"):
            state.go("image", image=image_id, view=st.query_params.get("view"))


def _outputs(
    backbone: Backbone, seen: ImageAttention, trained: ImageAttention | None
) -> dict[str, str]:
    """The effect of a conversion on the network's outputs, in words."""
    if trained is None:
        return {}
    before, after = (backbone.probabilities(r.logits[None])[0] for r in (trained, seen))
    k, now = int(before.argmax()), int(after.argmax())
    names = backbone.class_names
    said = f"the same class, {names[k]}"
    if now != k:
        said = f"another class, {names[now]}, p {float(after[now]):.3f}"
    return {
        f"p of {names[k]}": f"{float(after[k]):.3f}, as trained {float(before[k]):.3f}",
        "Agreement": said,
    }


def _picker(
    seen: ImageAttention, view: View, size_grid: tuple[int, int] | None, outputs: dict[str, str]
) -> None:
    """Show the large picture and the controls."""
    picture, controls = st.columns([5, 6], gap="large")
    with controls:
        _controls(seen, view, size_grid)
        if outputs:
            st.html(facts_html(outputs))
    token = token_of(view.patch, seen)
    row = select_head(seen.rows(token)[view.layer], view.head)
    prefix = len(seen.prefix)
    map_ = row[prefix:].unflatten(0, seen.grid)
    kept = kept_keys(map_) if seen.hides else None
    scale = shares([map_], view.scale)
    with picture:
        what = f"Attention from {name_of(token, seen)}"
        _picture("picker", seen, token, png(map_, scale, kept), alt_text(what, map_, seen))
        legend(scale, "share of the attention that a patch gets")
    with controls:
        st.html(facts_html(_facts(seen, view, token, row, kept)))


def _picture(name: str, seen: ImageAttention, token: int, map_: str, alt: str) -> None:
    """Show the photo as the model saw it under a map, for picking a patch."""
    st.session_state[f"{KEY}grid"] = seen.grid
    patches(
        photo(seen),
        seen.grid,
        KEY + name,
        aspect=seen.pixels.width / seen.pixels.height,
        map=map_,
        picked=place_of(token, seen),
        label=f"Photo in {seen.grid[0]} x {seen.grid[1]} patches: pick the patch that looks",
        alt=alt,
        on_pick=lambda: _picked(name),
    )


def _picked(name: str) -> None:
    place = picked_patch(KEY + name, st.session_state[f"{KEY}grid"])
    if place is not None:
        set_view(patch=f"{place[0] + 1},{place[1] + 1}")


def _controls(seen: ImageAttention, view: View, size_grid: tuple[int, int] | None) -> None:
    if seen.prefix:
        options = ["patch", *map(slug, seen.prefix)]
        names = dict(zip(options, ["A patch", *map(str.capitalize, seen.prefix)], strict=True))
        looks = view.patch if view.patch in options else "patch"
        st.segmented_control(
            "Attention from",
            options,
            format_func=lambda o: names[o],
            required=True,
            help="The token whose attention is shown. Click a patch, or move with the arrow keys.",
            **_widget("from", looks, partial(_from, seen.grid)),
        )
    else:
        st.caption("Click a patch in the photo, or move with the arrow keys.")
    layer, head = st.columns(2)
    if seen.layers > 1:
        layer.slider("Layer", 0, seen.layers - 1, **_widget("layer", view.layer))
    head.selectbox(
        "Head",
        [MEAN, *map(str, range(seen.heads(view.layer)))],
        format_func=lambda h: "Mean of all heads" if h == MEAN else f"Head {h}",
        **_widget("head", view.head),
    )
    first, second = st.columns(2)
    first.selectbox(
        "Colours",
        list(SCALES),
        format_func=lambda s: SCALES[s],
        help="Shared: the pictures of a row have one scale. The square root makes small shares visible.",
        **_widget("scale", view.scale),
    )
    offered = {} if size_grid is None else attention_pass.trial_mechanisms()
    fitting = [m for m in offered if attention_pass.sizes(m, size_grid)]  # type: ignore[arg-type]
    if fitting and size_grid is not None:
        titles = {m: f"{offered[m].what} ({m})" for m in fitting} | {TRAINED: "As trained"}
        second.selectbox(
            "Mechanism",
            [TRAINED, *fitting],
            format_func=lambda m: titles[m],
            help="Replaces the trained attention by another mechanism, without training, in all layers "
            "or in the layers that it is made for.",
            **_widget("mechanism", view.mechanism, partial(_mechanism, size_grid)),
        )
    if view.mechanism != TRAINED and size_grid is not None:
        size = offered[view.mechanism]
        fitting_sizes = attention_pass.sizes(view.mechanism, size_grid)
        if size.regions:
            second, beside = st.columns(2)
            regions = [OWN, *map(str.capitalize, size.regions)]
            beside.selectbox(
                "Looks at",
                regions,
                help="The region that each query is nearest to, or one region for all queries.",
                **_widget(
                    "target",
                    OWN if view.target is None else regions[1 + view.target],
                    lambda at: {"target": None if at == OWN else regions.index(at) - 1},
                ),
            )
        if size.unit == "steps":
            second.select_slider(size.title, fitting_sizes, **_widget("size", view.size))
        else:
            second.selectbox(size.title, fitting_sizes, **_widget("size", view.size))


def _widget(
    name: str, value: Any, changes: Callable[[Any], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The arguments of a widget that shows and changes one value of the view."""
    key = bound_key(name, value)
    return {"key": key, "on_change": handle_change, "args": (name, key, changes)}


def _from(size_grid: tuple[int, int], looks: str) -> dict[str, Any]:
    middle = f"{(size_grid[0] + 1) // 2},{(size_grid[1] + 1) // 2}"
    return {"patch": middle if looks == "patch" else looks}


def _mechanism(size_grid: tuple[int, int], wanted: str) -> dict[str, Any]:
    size = None if wanted == TRAINED else attention_pass.default_size(wanted, size_grid)
    return {"mechanism": wanted, "size": size, "target": None}


def _facts(
    seen: ImageAttention, view: View, token: int, row: Tensor, kept: Tensor | None
) -> dict[str, str | None]:
    """Show facts about the attention row."""
    prefix, n = len(seen.prefix), len(row)
    head = "mean of all heads" if view.head == MEAN else f"head {view.head}"
    facts: dict[str, str | None] = {
        "Shown": f"layer {view.layer}, {head}, from {name_of(token, seen)}"
    }
    for i, name in enumerate(seen.prefix):
        facts[f"To the {name}"] = f"{float(row[i]):.1%}"
    best = int(row[prefix:].argmax()) + prefix
    facts["Strongest patch"] = f"{name_of(best, seen)}: {float(row[best]):.1%}"
    nats = float(row_entropy(row.double()))
    facts["Entropy"] = (
        f"{nats:.2f} nats ({bits(nats):.2f} bits), as wide as {perplexity(nats):.0f} of {n} tokens"
    )
    if place_of(token, seen) is not None:
        away = float(
            row_distance(
                row[None].double(), torch.tensor([token], device="cpu"), seen.grid, prefix
            )[0]
        )
        if not math.isnan(away):
            facts["Mean distance"] = f"{away:.1f} patches"
    facts["Leading region"] = _leading(seen, view, token)
    if kept is not None and not kept.all():
        facts["Reads"] = f"{int(kept.sum())} of {kept.numel()} patches; the others have no colour"
    return facts


def _leading(seen: ImageAttention, view: View, token: int) -> str | None:
    """For mechanisms with regions, which region gets the largest share of the row."""
    regions = seen.maps[view.layer].get("region")
    if regions is None:
        return None
    rows = seen.rows(token)[view.layer][:, len(seen.prefix) :]
    numbers = regions[0].flatten().long()
    masses = rows.new_zeros(len(rows), int(numbers.max()) + 1).index_add(1, numbers, rows)
    if view.head == MEAN:
        return f"gets {float(masses.amax(1).mean()):.1%}, averaged over heads, each with its own region"
    own = masses[int(view.head)]
    best = int(own.argmax())
    names = (
        attention_pass.trial_mechanisms()[view.mechanism].regions
        if view.mechanism != TRAINED
        else ()
    )
    name = names[best] if len(names) == len(own) else f"{best}, of 0 to {len(own) - 1},"
    return f"{name} gets {float(own[best]):.1%}"


def _notes(seen: ImageAttention, trained: ImageAttention | None) -> None:
    note = (
        "Read from the photo that is stored in the pack (at most 512 pixels per side), cropped as the "
        "network sees it; a larger original may differ slightly. Layers and heads are counted "
        "from 0, as in the code, and rows and columns of patches from 1."
    )
    if seen.scaled:
        note += (
            f" In {layers_text(seen.scaled)} the rows of attention are not shares: entries may be "
            f"negative, or do not sum to 1. Rows of |A|, scaled to sum to 1, are shown."
        )
    if trained is not None:
        alike = float(torch.cosine_similarity(trained.logits, seen.logits, dim=0))
        st.info(
            "This is the network after a conversion without training: you do not see what it "
            f"learned. Its outputs have a cosine similarity of {alike:.3f} to the trained network's."
        )
    st.caption(note)


# ---------------------------------------------------------------------- rollout


def _rollout(seen: ImageAttention, view: View) -> None:
    st.header("Rollout", anchor=False)
    picture, words = st.columns([5, 6], gap="large")
    token, prefix = token_of(view.patch, seen), len(seen.prefix)
    with words:
        if seen.layers > 1:
            st.slider(
                "Up to layer",
                0,
                seen.layers - 1,
                help="Multiplies layers 0 to this one. Heads are averaged, and half of each factor is the "
                "skip path.",
                **_widget("depth", view.depth),
            )
    row = seen.rollout(token, view.depth)
    map_ = row[prefix:].unflatten(0, seen.grid)
    scale = shares([map_], view.scale)
    with picture:
        what = f"Rollout from {name_of(token, seen)} up to layer {view.depth}"
        _picture("rollout", seen, token, png(map_, scale, None), alt_text(what, map_, seen))
        legend(scale, "share of the token that comes from a patch")
    nats = float(row_entropy(row.double()))
    facts = {
        "Shown": f"what {name_of(token, seen)} is made of after layer {view.depth}",
        "From itself": f"{float(row[token]):.1%}",
    }
    for i, name in enumerate(seen.prefix):
        if i != token:
            facts[f"From the {name}"] = f"{float(row[i]):.1%}"
    facts["Entropy"] = f"{nats:.2f} nats, as wide as {perplexity(nats):.0f} tokens"
    words.html(facts_html(facts))
    words.caption(
        "Attention rollout of Abnar and Zuidema 2020: the row of the product of (I + A) / 2 over the "
        "layers, A the mean over heads. It follows tokens only and ignores values and MLPs."
    )
