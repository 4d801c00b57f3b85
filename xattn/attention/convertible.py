"""Which attention layers of a model another mechanism can stand in for, and why not the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xattn.attention.conversion import LAYERS_FORM, parse_layers
from xattn.attention.record import Call, record_layers

Layers = dict[str, nn.Module]
NEEDED = "a mechanism needs a timm ViT, such as -b vit_tiny_patch16_224"


def chosen_layers(
    model: nn.Module, numbers: Iterable[int] | str | None, last: float = 1.0
) -> Layers:
    """The attention layers of the blocks ``numbers`` (the share ``last`` of them by default), by path.

    Raises:
        ValueError: no blocks, a number that is not there, or a block without attention.
    """
    blocks = getattr(model, "blocks", None)
    kind = type(model).__name__
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise ValueError(f"mechanism: {kind} has no list of blocks with attention; {NEEDED}")
    if numbers is None:
        numbers = range(len(blocks))[-max(1, round(last * len(blocks))) :]
    found = {}
    for i in _numbers(numbers, len(blocks), kind):
        layer = getattr(blocks[i], "attn", None)
        if not isinstance(layer, nn.Module):
            raise ValueError(
                f"mechanism: block {i} ({type(blocks[i]).__name__}) has no attention 'attn'; {NEEDED}"
            )
        found[f"blocks.{i}.attn"] = layer
    return found


def _numbers(given: Iterable[int] | str, count: int, kind: str) -> list[int]:
    """Rising numbers of blocks, none negative."""
    numbers = parse_layers(given) if isinstance(given, str) else given
    if not isinstance(numbers, Iterable):
        raise ValueError(f"layers: got {numbers!r}; give a list of them or {LAYERS_FORM}")
    numbers = list(numbers)
    wrong = [i for i in numbers if not isinstance(i, int) or not -count <= i < count]
    if wrong or not numbers:
        what = repr(wrong[0]) if wrong else "none"
        raise ValueError(
            f"layers: got {what}; {kind} has 0 to {count - 1}, give a list of them or {LAYERS_FORM}"
        )
    return sorted({i % count for i in numbers})


class _Attended(NamedTuple):
    """One call of fused attention: A is (B, H, N, S), values are ``width`` wide in each head."""

    shape: tuple[int, int, int, int]
    width: int
    masked: bool
    causal: bool

    @classmethod
    def of(cls, call: Call) -> _Attended:
        operator = call.operator
        masked = getattr(operator, "bias", None) is not None
        return cls(operator.shape, call.value.shape[-1], masked, operator.causal)


def check(
    model: nn.Module, layers: Layers, name: str, causal: bool, known: Collection[str]
) -> None:
    """Raise unless each of ``layers`` calls fused attention once, over all tokens and without a mask.

    Args:
        causal: whether the mechanism ``name`` has a causal form.
        known: paths of layers that were converted before, and so have passed.
    """
    for path, layer in layers.items():
        if not hasattr(layer, "fused_attn"):
            raise ValueError(
                f"model: {path} ({type(layer).__name__}) does not use fused attention; untouched"
            )
    seen = _attended(model, layers)
    tokens = max((call.shape[2] for calls in seen.values() for call in calls), default=0)
    for path, layer in layers.items():
        calls = seen[path]
        if path in known:
            continue
        if len(calls) != 1:
            why = f"calls fused attention {len(calls)} times"
        else:
            why = _obstacle(calls[0], tokens, width_of(path, layer), causal)
        if why:
            raise ValueError(
                f"model: {path} ({type(layer).__name__}) {why}; {name} cannot stand in for it; untouched"
            )


def _obstacle(call: _Attended, tokens: int, width: int, causal: bool) -> str:
    """Why no mechanism can answer ``call``; empty if one can."""
    batch, heads, queries, keys = call.shape
    if queries != keys or queries != tokens or batch != 1:
        return f"attends {queries} to {keys} tokens ({batch} windows), not all to all"
    if call.masked:
        return "adds a bias or mask to its scores"
    if heads * call.width != width:
        return f"does not attend by heads of its {width} channels"
    return "attends causally" if call.causal and not causal else ""


def _attended(model: nn.Module, layers: Layers) -> dict[str, list[_Attended]]:
    """The calls of fused attention that each layer makes in a pass of one image."""
    seen: dict[str, list[_Attended]] = {path: [] for path in layers}

    def after(path: str, args: Any, kwargs: Any, calls: list[Call], result: Any) -> None:
        seen[path] += map(_Attended.of, calls)

    with record_layers(model, layers, after):
        run_one_image(model)
    return seen


def run_one_image(model: nn.Module) -> None:
    """One grey image through the model, in evaluation mode and without gradients."""
    with evaluating(model):
        model(_example(model))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and has no gradients."""
    training = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for m, mode in training.items():
            m.training = mode


def _example(model: nn.Module) -> Tensor:
    weight = next(model.parameters())
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    height, width = size or config.get("input_size", (3, 224, 224))[-2:]
    channels = getattr(model, "in_chans", 3) or 3
    return torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype)


def heads_of(path: str, layer: nn.Module) -> int:
    """The number of heads of the attention layer at ``path``."""
    heads = getattr(layer, "num_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"model: {path} ({type(layer).__name__}) has no num_heads; untouched")
    return heads


def width_of(path: str, layer: nn.Module) -> int:
    """C of queries, over all heads."""
    attn_dim = getattr(layer, "attn_dim", None)
    if isinstance(attn_dim, int):
        return attn_dim
    head_dim = getattr(layer, "head_dim", None)
    if isinstance(head_dim, int):
        return head_dim * heads_of(path, layer)
    projection = getattr(layer, "proj", None)
    if isinstance(projection, nn.Linear):
        return projection.in_features
    raise ValueError(f"model: {path} ({type(layer).__name__}) does not tell its width; untouched")
