"""Reads the view of the attention page from a URL, and writes it to the URL.

Layers and heads are counted from 0, as in the code of models, and rows and columns of patches from 1.
Invalid parameters are replaced by defaults, and a message is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st
from PIL import Image
from torch import Tensor

from xattn.app import state
from xattn.app.attention.attention_pass import (
    AS_TRAINED,
    TRAINED,
    Choice,
    default_size,
    sizes,
    trial_mechanisms,
)
from xattn.app.navigation import address
from xattn.pictures.contact_sheet import legends_html
from xattn.pictures.overlay import colorize, data_url
from xattn.pictures.scales import Legend, Scale, make_scale

if TYPE_CHECKING:
    from xattn.app.attention.attention_pass import ImageAttention


SHARE, NUMBER = "{:.1%}", "{:.3g}"
SCALES = {"root": "Shared, square root", "linear": "Shared, linear", "own": "Each its own"}


def shares(maps: Sequence[Tensor], kind: str) -> Colours:
    """The colour scale for shares of attention, from 0 to the largest share; ``kind`` is in ``SCALES``."""
    return Colours(Scale(0.0, max(float(m.max()) for m in maps)), kind)


class Colours:
    """A colour scale for several pictures.

    If ``kind`` is "own", each picture has its own scale from 0 to its largest value; otherwise, all
    pictures share ``scale``. If it is "root" and there are no negative values, the square roots of the
    values are shown.
    """

    def __init__(self, scale: Scale, kind: str) -> None:
        signed = scale.low < 0
        self.scale, self.own, self.root = scale, kind == "own", kind == "root" and not signed
        self.cmap = scale.cmap

    def __call__(self, values: np.ndarray) -> np.ndarray:
        scale = self.scale
        if self.own:
            scale = make_scale([(min(0.0, float(values.min())), float(values.max()))], self.cmap)
        return np.sqrt(scale(values)) if self.root else scale(values)


def png(values: Tensor, scale: Colours, kept: Tensor | None, side: int = 0) -> str:
    """A map (h, w) as a PNG ``data:`` URL.

    It has one pixel per patch, or is enlarged by an integer factor so that its longer side is at least
    ``side``. Patches that are not ``kept`` are transparent.
    """
    colours = colorize(scale(values.numpy()), scale.cmap)
    alpha = np.full(values.shape, 255, np.uint8)
    if kept is not None:
        alpha[~kept.numpy()] = 0
    image = Image.fromarray(np.dstack([colours, alpha]))
    times = max(1, -(-side // max(image.size)))
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return data_url(image, "PNG")


def photo(seen: ImageAttention) -> str:
    """The image that the model saw, as a ``data:`` URL."""
    return data_url(seen.pixels, quality=92, subsampling=0)


def alt_text(what: str, map_: Tensor, seen: ImageAttention, number: str = SHARE) -> str:
    """An alternative text for a map, which gives the place and the value of its maximum."""
    row, column = divmod(int(map_.argmax()), seen.grid[1])
    most = number.format(float(map_.max()))
    return f"{what}: strongest at row {row + 1}, column {column + 1} ({most})"


def legend(scale: Colours, unit: str, number: str = SHARE) -> None:
    """Show a legend that explains the colours."""
    low, high = scale.scale.low, scale.scale.high
    if scale.own:
        words = Legend("0", "own greatest", unit, scale.cmap)
    else:
        middle = f"; the middle colour is {number.format(high / 4)}" if scale.root else ""
        ends = ("0" if low == 0 else number.format(low)), number.format(high)
        words = Legend(*ends, f"{unit}{middle}", scale.cmap)
    st.html(legends_html([words]))


MEAN = "mean"
KEY = "attention."  # prefix of the page's widget names
NAMES = ("mechanism", "size", "target", "layer", "head", "patch", "depth", "scale")


@dataclass(frozen=True)
class View:
    """The settings of the attention page.

    ``size`` and ``target`` are options of a converted mechanism. ``head`` is a number or "mean". ``patch``
    is "row,column" or the slug of a prefix token. ``depth`` is the last layer of the rollout.
    """

    mechanism: str = TRAINED
    size: int | None = None
    target: int | None = None
    layer: int = 0
    head: str = MEAN
    patch: str = "1,1"
    depth: int = 0
    scale: str = "root"

    def params(self, usual: View) -> dict[str, str]:
        """The URL parameters that differ from the default view."""
        pairs = ((name, getattr(self, name), getattr(usual, name)) for name in NAMES)
        return {name: str(value) for name, value, own in pairs if value != own}


def choice_of(params: Mapping[str, str], grid: tuple[int, int] | None) -> tuple[Choice, list[str]]:
    """The mechanism that the URL parameters select, and messages about invalid parameters."""
    wanted = params.get("mechanism", TRAINED)
    if wanted == TRAINED:
        return AS_TRAINED, []
    fitting = [] if grid is None else sizes(wanted, grid)
    if grid is None or not fitting:
        return AS_TRAINED, [f"{_short(wanted)} cannot be shown here; this is trained attention."]
    own, size, messages = trial_mechanisms()[wanted], default_size(wanted, grid), []
    wish = params.get("size", str(size))
    if wish in map(str, fitting):
        size = int(wish)
    else:
        messages.append(f"{own.option} cannot be {_short(wish)} here; {size} is shown.")
    target = _whole(params.get("target", ""), len(own.regions))
    if "target" in params and target is None:
        messages.append(f"There is no region {_short(params['target'])} to look at here.")
    return Choice(wanted, size, target), messages


def default_view(reading: ImageAttention, choice: Choice) -> View:
    """The default view, which shows the last layer for the patch in the middle."""
    last = reading.layers - 1
    middle = f"{(reading.grid[0] + 1) // 2},{(reading.grid[1] + 1) // 2}"
    return View(**asdict(choice), layer=last, patch=middle, depth=last)


def view_of(
    params: Mapping[str, str], start: View, reading: ImageAttention
) -> tuple[View, list[str]]:
    """The view for URL parameters, and messages about invalid ones; ``start`` provides missing values."""
    view, messages = start, []
    for name in ("layer", "depth"):
        number = _whole(params.get(name, ""), reading.layers)
        if number is not None:
            view = replace(view, layer=number) if name == "layer" else replace(view, depth=number)
        elif name in params:
            messages.append(
                f"There is no {name} {_short(params[name])}; this network has layers 0 to "
                f"{reading.layers - 1}."
            )
    if "head" in params:
        heads = reading.heads(view.layer)
        if params["head"] == MEAN or _whole(params["head"], heads) is not None:
            view = replace(view, head=params["head"])
        else:
            messages.append(
                f"There is no head {_short(params['head'])}; this layer has heads 0 to {heads - 1}."
            )
    if "patch" in params:
        if _token(params["patch"], reading) is not None:
            view = replace(view, patch=params["patch"])
        else:
            rows, columns = reading.grid
            messages.append(
                f"There is no patch {_short(params['patch'])}; the grid has {rows} rows and "
                f"{columns} columns, counted from 1."
            )
    if params.get("scale") in SCALES:
        view = replace(view, scale=params["scale"])
    return view, messages


def token_of(patch: str, reading: ImageAttention) -> int:
    """The index of the token to which the field ``patch`` of a view refers."""
    token = _token(patch, reading)
    assert token is not None, "view_of has checked it"
    return token


def _token(patch: str, reading: ImageAttention) -> int | None:
    slugs = [slug(name) for name in reading.prefix]
    if patch in slugs:
        return slugs.index(patch)
    match = re.fullmatch(r"(\d{1,4}),(\d{1,4})", patch, re.ASCII)
    if match is None:
        return None
    row, column = int(match[1]), int(match[2])
    if not (1 <= row <= reading.grid[0] and 1 <= column <= reading.grid[1]):
        return None
    return len(reading.prefix) + (row - 1) * reading.grid[1] + column - 1


def select_head(per_head: Tensor, head: str) -> Tensor:
    """(H, N) -> (N,), the values of one head, or the mean over heads."""
    return per_head.mean(0) if head == MEAN else per_head[int(head)]


def place_of(token: int, reading: ImageAttention) -> tuple[int, int] | None:
    """The (row, column) of a patch's token, counted from 0; None for a prefix token."""
    at = token - len(reading.prefix)
    return None if at < 0 else divmod(at, reading.grid[1])


def name_of(token: int, reading: ImageAttention) -> str:
    """The name of a token, such as "row 3, column 5" or "the class token"."""
    place = place_of(token, reading)
    if place is None:
        return f"the {reading.prefix[token]}"
    return f"row {place[0] + 1}, column {place[1] + 1}"


def slug(name: str) -> str:
    """The name of a prefix token in the form used in a URL."""
    return name.replace(" ", "-")


def _whole(text: str, count: int) -> int | None:
    """The number in a text, if it is in 0..count - 1; otherwise None."""
    good = text.isascii() and text.isdigit() and len(text) <= 4 and int(text) < count
    return int(text) if good else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:29] + "…")


# ---------------------------------------------------------------------- the session


def current() -> dict[str, str]:
    """The URL parameters of the view that is shown or has just been selected."""
    return {name: str(value) for name, value in _values().items() if value is not None}


def _values() -> dict[str, Any]:
    return st.session_state.setdefault(f"{KEY}view", {})  # type: ignore[no-any-return]


def record_view(pack_id: str, image_id: str, view: View, url: Mapping[str, str] | None) -> None:
    """Record the view that is currently shown.

    ``url`` contains the URL parameters from which the view was read, or is None if widgets have set the
    view.
    """
    st.session_state[f"{KEY}of"] = (pack_id, image_id)
    _values().update({name: getattr(view, name) for name in NAMES})
    if url is not None:
        address.record_address("attention", dict(url))


def set_view(**values: Any) -> None:
    """Change fields of the view; the next run shows the new view."""
    _values().update(values)


def bound_key(name: str, value: Any) -> str:
    """Set the value of the widget ``name``, and return the key of this widget."""
    key = state.widget_key(KEY + name, value)
    st.session_state[key] = value
    return key


def handle_change(
    name: str, key: str, changes: Callable[[Any], dict[str, Any]] | None = None
) -> None:
    """Handle a change of the widget ``name``, whose value becomes the field ``name`` of the view.

    If ``changes`` is given, it returns the fields to change for a value. A change of a widget that the last
    run has replaced is ignored, since the browser may send its outdated value.
    """
    value = st.session_state[key]
    if key == state.current_key(KEY + name):
        set_view(**({name: value} if changes is None else changes(value)))


def is_from_url(pack_id: str, image_id: str, url: Mapping[str, str]) -> bool:
    """Whether to read the view from the URL (after a link, a reload or Back) and not from the widgets."""
    known = st.session_state.get(f"{KEY}of") == (pack_id, image_id)
    return address.is_new("attention", dict(url), known)


def remember(image_id: str, view: View, start: View) -> None:
    """Write the view to the URL, unless the URL already contains it."""
    wanted = view.params(start)
    address.record_address("attention", wanted)
    whole = {n: st.query_params.get_all(n) for n in st.query_params if n not in NAMES}
    whole |= {"image": [image_id], **{name: [value] for name, value in wanted.items()}}
    if whole != {n: st.query_params.get_all(n) for n in st.query_params}:
        st.query_params.from_dict(whole)
