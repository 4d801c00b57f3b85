"""What the network says of a photo and of its changed copy, in numbers, words and bars."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xattn.app import models
from xattn.app.navigation import selection
from xattn.app.pages.whatif.masks import Mask, on_input
from xattn.app.state import short
from xattn.eval.fills import fill
from xattn.photos.view import prepare
from xattn.pictures.explained import probability_text
from xattn.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.packs.reader import Pack

TOP = 5  # classes with most before, and as many with most after
FILLS = {"mean": "Mean colour", "blur": "Blur", "black": "Black"}


@dataclass(frozen=True, eq=False)
class Seen:
    """A photo as the network sees it: ``pixels`` (3, H, W) in [0, 1], and its answer (K,), float64."""

    pixels: Tensor
    answer: Tensor


def seen(pack: Pack, image_id: str, backbone: Backbone) -> Seen:
    """A photo of the pack as its network sees it.

    Raises:
        PackError: the picture is gone or damaged. ValueError: there is not enough memory.
    """
    first = selection.table(pack).entries_of(image_id).index[0]
    mode = pack.view(first).mode
    pixels, _ = prepare(pack.photo(image_id), backbone.preprocessing, mode)
    return Seen(pixels, predict(backbone, pixels))


def predict(backbone: Backbone, pixels: Tensor) -> Tensor:
    """The network's answer to (3, H, W) in [0, 1]: a probability a class, (K,) float64."""
    try:
        with models.turn(), torch.no_grad():
            images = pixels[None].to(backbone.device, backbone.mean.dtype)
            return backbone.probabilities(backbone.logits(images))[0].cpu()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"There is not enough memory for a pass of {backbone.name}; close other models, or start "
            f"the viewer with a smaller --input-size."
        ) from error


def changed(pixels: Tensor, hidden: Mask, kind: str, backbone: Backbone) -> Tensor:
    """The input (3, H, W) with the cells of ``hidden`` filled; ``kind`` is one of ``FILLS``."""
    removed = on_input(hidden, (pixels.shape[1], pixels.shape[2]))
    return torch.where(
        removed, fill(pixels, removed, kind, mean=backbone.preprocessing.mean), pixels
    )


# ---------------------------------------------------------------------- words


def verdict(before: Tensor, after: Tensor | None, backbone: Backbone) -> str:
    """The first class before and what became of it, in a sentence.

    >>> from types import SimpleNamespace
    >>> names = SimpleNamespace(class_names=["tench, Tinca tinca", "hand"], task="multiclass")
    >>> verdict(torch.tensor([0.82, 0.1]), torch.tensor([0.31, 0.4]), names)
    'tench 82.0% → 31.0%; now first: hand 40.0%'
    """
    first = int(before.argmax())
    text = f"{short(backbone.class_names[first])} {_amount(before[first], backbone)}"
    if after is None:
        return text
    text += f" → {_amount(after[first], backbone)}"
    now = int(after.argmax())
    if now == first:
        return f"{text}; still first" if len(after) > 1 else text
    return f"{text}; now first: {short(backbone.class_names[now])} {_amount(after[now], backbone)}"


def ranked(before: Tensor, after: Tensor | None) -> list[int]:
    """The classes to show: those with most before, then those with most after."""
    count = min(TOP, len(before))
    answers = [before] if after is None else [before, after]
    return list(dict.fromkeys(k for p in answers for k in p.topk(count).indices.tolist()))


def bars(before: Tensor, after: Tensor | None, backbone: Backbone) -> str:
    """The classes of :func:`ranked` as a table in HTML, with bars: before, after, and the change."""
    answers = {"before": before} if after is None else {"before": before, "after": after}
    most = 1.0
    if backbone.task == "regression":
        most = max(max(float(p.abs().max()) for p in answers.values()), 1e-12)
    rows = []
    for k in ranked(before, after):
        values = {name: float(p[k]) for name, p in answers.items()}
        lines = "".join(
            f'<i class="{name}"><b style="width:{min(max(v / most, 0.0), 1.0):.2%}"></b></i>'
            for name, v in values.items()
        )
        numbers = [_amount(v, backbone) for v in values.values()]
        if after is not None:
            numbers.append(_difference(float(before[k]), float(after[k]), backbone))
        rows.append(
            f'<tr><th scope="row">{html.escape(short(backbone.class_names[k]))}</th>'
            f'<td aria-hidden="true">{lines}</td>{"".join(f"<td>{n}</td>" for n in numbers)}</tr>'
        )
    titles = [*answers, "change"] if after is not None else list(answers)
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        f'{_STYLE}<table class="answers"><thead><tr><th scope="col">class</th><td></td>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _amount(value: Tensor | float, backbone: Backbone) -> str:
    return probability_text(float(value), backbone.task == "regression")


def _difference(before: float, after: float, backbone: Backbone) -> str:
    """A change in percentage points, or of a number of any size by itself."""
    if backbone.task == "regression":
        return f"{after - before:+.3g}".replace("-", "−")
    points = 100 * (after - before)
    return "0.0" if abs(points) < 0.05 else f"{points:+.1f}".replace("-", "−")


_STYLE = """<style>
.answers{width:100%;border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
.answers tbody tr{border-top:1px solid light-dark(#e7e3dc,#2f2c28)}
.answers :is(th,td){padding:.4rem .75rem .4rem 0;text-align:right;font-weight:400;vertical-align:middle}
.answers :is(th,td):last-child{padding-right:0}
.answers thead th{color:var(--quiet);font-size:.8125rem;padding-block:.1rem}
.answers th:first-child{text-align:left;overflow-wrap:anywhere}
.answers td:nth-child(2){width:42%}
.answers td:nth-child(n+3){width:1%;white-space:nowrap}
.answers i{display:block;height:7px;border-radius:4px;overflow:hidden;
background:light-dark(#e7e3dc,#2f2c28)}
.answers i+i{margin-top:3px}
.answers b{display:block;height:100%;border-radius:4px}
.answers .before b{background:light-dark(#8c867d,#8f897f)}.answers .after b{background:var(--accent)}
@media(max-width:480px){.answers td:nth-child(2){width:30%}}
</style>"""
