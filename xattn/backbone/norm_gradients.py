"""Compute correct input gradients of BatchNorm and InstanceNorm, including on a CPU.

On a CPU, PyTorch 2.13 silently returns a wrong gradient for a batch of one image if the incoming gradient
is channels-last, as it is after ``flatten(2).transpose(1, 2)``. This affects XCiT, LeViT and others. If a
gradient is needed, the same values are therefore computed in another way:

    BatchNorm in eval mode    y = x s + t,    s = weight / sqrt(var + eps),    t = bias - mean s
    InstanceNorm              GroupNorm with one channel per group
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_HERE = threading.local()  # like the stack of function modes


@contextmanager
def correct_norm_gradients(wanted: bool = True) -> Iterator[None]:
    """Make the gradients of both norms correct in this thread inside the context, if ``wanted``.

    A function mode that is entered inside this context sees the call of a norm before it is rewritten.
    """
    if not wanted or getattr(_HERE, "inside", False):
        yield
        return
    _HERE.inside = True
    try:
        with _Norms():
            yield
    finally:
        _HERE.inside = False


class _Norms(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function in _OTHERWISE and torch.is_grad_enabled():
            tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            if any(x.requires_grad for x in tensors):
                return _OTHERWISE[function](*args, **kwargs)
        return function(*args, **kwargs)


def batch_norm_scale_and_shift(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Compute s and t of the module, (C,) each."""
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    return scale, shift if bias is None else shift + bias


def affine_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y = x s + t, with s and t (C,), in float32 at least, like the fused function."""
    made = batch_norm_scale_and_shift(running_mean, running_var, weight, bias, eps)
    wide = torch.promote_types(input.dtype, torch.float32)
    scale, shift = (x.to(wide).view(-1, *[1] * (input.ndim - 2)) for x in made)
    return torch.addcmul(shift, input.to(wide), scale).to(input.dtype), *made


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return affine_batch_norm(input, running_mean, running_var, weight, bias, eps)[0]


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is not None:  # the call updates it
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return F.group_norm(input, input.shape[1], weight, bias, eps)


_OTHERWISE = {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}
