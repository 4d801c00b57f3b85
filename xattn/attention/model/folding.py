"""Fold learned rotations into the projections of queries and keys, for inference.

    q_i . R(p_i)^T R(p_j) k_j = (Q^T q_i) . T(p_i)^T T(p_j) (Q^T k_j),    R(p) = Q T(p) Q^T

Q does not depend on positions, so it can be folded into a projection: Q^T W replaces the weight W. What
remains is T, which rotates pairs of channels and costs as much as a rotary embedding. See
:mod:`xattn.attention.comrope`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from xattn.attention.comrope import ComRope, FoldedRotation
from xattn.runtime.copies import shared_copy

Model = TypeVar("Model", bound=nn.Module)


def folded(model: Model) -> Model:
    """Create a copy of ``model`` with ``comrope`` rotations folded into the projections of their layers.

    The copy computes the same outputs up to rounding. It shares all other weights with ``model``, which is
    not changed.

    Args:
        model: a model or :class:`~xattn.Backbone` with layers of :func:`~xattn.attention.create_attention`,
            or converted by :func:`~xattn.attention.convert`. The copy is for inference: its rotations
            cannot be trained, and it cannot be converted or reverted.

    Raises:
        ValueError: if no rotation can be folded, or if a layer changes queries or keys between the
            projection and the rotation, as a norm does (the message names the layer).

    Example:
        >>> import torch
        >>> from xattn.attention import create_attention, folded
        >>> layer = create_attention("softmax", 32, 4, rotate="comrope")
        >>> x = torch.rand(1, 9, 32)
        >>> torch.allclose(folded(layer)(x, grid=(3, 3)), layer(x, grid=(3, 3)), atol=1e-5)
        True
    """
    copied = shared_copy(model)
    found = {path: holder for path, layer in copied.named_modules() if (holder := _holder(layer))}
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no layer with a rotation that can be folded; give one "
            f"with rotate='comrope'"
        )
    for path in found:
        _check(path, copied.get_submodule(path))
    for path, holder in found.items():
        basis, holder.rotate = holder.rotate.folded()
        _fold(copied.get_submodule(path), basis)
    return copied


def is_folded(model: nn.Module) -> bool:
    """Return whether ``model`` was created by :func:`folded`."""
    return any(isinstance(m, FoldedRotation) for m in model.modules())


def _holder(layer: nn.Module) -> Any:
    """Return the mechanism of an attention layer, if it has a rotation that can be folded."""
    mechanism = getattr(layer, "mechanism", None)
    return mechanism if isinstance(getattr(mechanism, "rotate", None), ComRope) else None


def _check(path: str, layer: Any) -> None:
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(layer, name, None), nn.Identity | None):
            raise ValueError(
                f"model: {path}.{name} is between the projection and the rotation, which therefore cannot "
                f"be folded; use the model as it is"
            )
    for name, linear in _projections(layer).items():
        if not isinstance(linear, nn.Linear) or parametrize.is_parametrized(linear):
            raise ValueError(
                f"model: {path}.{name} is a {type(linear).__name__}, but a rotation can be folded only "
                f"into a plain nn.Linear"
            )


def _projections(layer: Any) -> dict[str, Any]:
    """Return the projections of queries and keys, keyed by name: a single one for both, or two."""
    if getattr(layer, "qkv", None) is not None:
        return {"qkv": layer.qkv}
    return {name: getattr(layer, name, None) for name in ("q_proj", "k_proj")}


@torch.no_grad()
def _fold(layer: Any, basis: Tensor) -> None:
    """Apply Q^T to the projections of queries and keys in ``layer``; ``basis`` is Q, (G, D, D)."""
    heads = layer.num_heads
    key_heads = getattr(layer, "kv_heads", None) or getattr(layer, "num_kv_heads", None) or heads
    width = basis.shape[1]
    for name, linear in _projections(layer).items():
        counts = {"qkv": (heads, key_heads), "q_proj": (heads,), "k_proj": (key_heads,)}[name]
        _set(linear, "weight", _turned(linear.weight, counts, basis))
        if linear.bias is not None:
            _set(linear, "bias", _turned(linear.bias, counts, basis))
    for name, count in (("q_bias", heads), ("k_bias", key_heads)):  # biases outside the projection
        bias = getattr(layer, name, None)
        if isinstance(bias, Tensor) and len(bias) == count * width:
            _set(layer, name, _turned(bias, (count,), basis))


def _turned(x: Tensor, counts: tuple[int, ...], basis: Tensor) -> Tensor:
    """Multiply the first rows of ``x`` by Q^T. They belong to several groups of heads, one after the other,
    whose sizes are ``counts``."""
    groups, width, _ = basis.shape
    wide, start = x.detach().to(basis.dtype).clone(), 0
    for count in counts:
        rows = slice(start * width, (start + count) * width)
        q = basis.repeat_interleave(count // groups, 0).to(x.device)
        heads = wide[rows].reshape(count, width, -1)
        wide[rows] = (q.transpose(1, 2) @ heads).reshape(wide[rows].shape)
        start += count
    return wide.to(x.dtype)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a tensor of ``module`` without changing the old one, which another model may share."""
    if name in module._parameters:
        old = module._parameters[name]
        trained = old is not None and old.requires_grad
        setattr(module, name, nn.Parameter(value, requires_grad=trained))
    else:
        module._buffers[name] = value
