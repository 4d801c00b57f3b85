"""Record the attention of a running model, one operator per attention call, while fused kernels stay on.

    with record(model) as calls:
        logits = model(x)
    calls[-1].operator.rows(torch.tensor([0]))      # the class token's row, O(N d)

Layers of :mod:`xattn.attention` record their operators themselves. All other layers are intercepted when
they call ``F.scaled_dot_product_attention``. What comes before this call (rotary embeddings, normalised
queries, gates) does not matter, so models from timm or torchvision, and your own, need no wrapper and no
change.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.kernels.softmax import softmax_attention


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call: ``output = operator.matvec(value)``.

    Example:
        >>> import torch
        >>> from xattn.attention import create_attention, record
        >>> layer = create_attention("softmax", 32, 4)
        >>> with record(layer) as calls:
        ...     _ = layer(torch.rand(1, 9, 32))
        >>> calls[0].operator.shape, calls[0].value.shape
        ((1, 4, 9, 9), torch.Size([1, 4, 9, 8]))
    """

    operator: Operator
    """A, detached from the model's graph."""
    value: Tensor
    """V, (B, H or Hk, S, Dv)."""
    output: Tensor
    """A V, (B, H, N, Dv), part of the model's graph: gradients with respect to it can be computed."""
    aux: dict[str, Tensor] = field(default_factory=dict)
    """Scalar losses, keyed by name, that the mechanism wants added to the training loss. They are part of
    the model's graph."""
    make_maps: Callable[[], dict[str, Tensor]] = dict

    @cached_property
    def maps(self) -> dict[str, Tensor]:
        """The mechanism's own maps, keyed by name, (B, K, h, w) each; they are computed on first access."""
        return self.make_maps()


class ProductReplacement(Protocol):
    """An object that computes the products A V of layers and blocks in :func:`replace_products`."""

    def attend(self, mechanism: Any, inputs: Any) -> Tensor:
        """Return the output of ``mechanism`` for its :class:`~xattn.attention.inputs.Inputs`."""

    def mix(self, name: str, operator: Operator, value: Tensor) -> Tensor:
        """Return A V for the block ``name``."""


class _State(threading.local):
    """The state of one thread: the open lists of calls, how many nested xattn layers are running, what
    replaces their outputs and PyTorch's attention function, and the score terms of boolean masks."""

    def __init__(self) -> None:
        self.open: list[list[Call]] = []
        self.inside = 0
        self.answer: ProductReplacement | None = None
        self.attend: Callable[..., Tensor] | None = None
        self.added = WeakIdKeyDictionary()  # mask -> its version and the term added to the scores


_STATE = _State()


def recording() -> bool:
    """Return whether a :func:`record` context is open in this thread."""
    return bool(_STATE.open)


def record_call(call: Call) -> None:
    """Add ``call`` to the list of every open :func:`record`. Layers call this function if :func:`recording`
    returns True."""
    for calls in _STATE.open:
        calls.append(call)


@contextmanager
def record(model: nn.Module | None = None, alone: bool = False) -> Iterator[list[Call]]:
    """Context manager that yields a list and adds the attention calls of this thread to it, in order.

    Args:
        model: while the context is active, its timm layers use fused attention without gradient
            checkpointing, and its transformers layers use ``attn_implementation="sdpa"``, because layers
            that compute their softmax explicitly cannot be recorded.
        alone: whether to hide these calls from an enclosing :func:`record`.

    Example:
        >>> import torch
        >>> from xattn.attention import create_attention, record
        >>> layer = create_attention("softmax", 32, 4)
        >>> with record(layer) as calls:
        ...     _ = layer(torch.rand(1, 9, 32))
        >>> calls[0].operator.rows(torch.tensor([0])).sum().round()  # 1 per head
        tensor(4.)
    """
    calls: list[Call] = []
    before = _STATE.open
    _STATE.open = [calls] if alone else [*before, calls]
    try:
        with fused_layers(model), _Interceptor():
            yield calls
    finally:
        _STATE.open = before
        _STATE.added.clear()


Key = TypeVar("Key")


@contextmanager
def record_layers(
    model: nn.Module, layers: Mapping[Key, nn.Module], after: Callable[..., object]
) -> Iterator[None]:
    """Context manager that calls ``after(key, args, kwargs, calls, result)`` each time one of ``layers``
    has run. ``calls`` are the attention calls that the layer made."""
    handles = []
    with record(model, alone=True) as calls:
        for key, layer in layers.items():
            start: list[int] = []

            def enter(m: Any, args: Any, kwargs: Any, start: list[int] = start) -> None:
                start.append(len(calls))

            def leave(
                m: Any,
                args: Any,
                kwargs: Any,
                result: Any,
                key: Key = key,
                start: list[int] = start,
            ) -> None:
                after(key, args, kwargs, calls[start.pop() :], result)

            handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# Attributes of timm's layers, and of the configs that transformers layers read at each call.
_SETTINGS = {"fused_attn": True, "grad_checkpointing": False, "_attn_implementation": "sdpa"}
_USERS = WeakIdKeyDictionary()  # layer or config -> number of open contexts, its original settings
_COUNTING = threading.RLock()


def fused_layers(model: nn.Module | None) -> AbstractContextManager[None]:
    """Context manager in which every timm or transformers layer of ``model`` calls
    ``F.scaled_dot_product_attention`` exactly once."""
    modules = [] if model is None else list(model.modules())
    configs = {
        id(c): c for m in modules if getattr(m, "_supports_sdpa", False) for c in _configs(m)
    }
    layers = (m for m in modules if any(hasattr(m, name) for name in _SETTINGS))
    return fused(*layers, *configs.values())


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield the configs in which the layers of a transformers model look up how to compute attention."""
    for layer in model.modules():
        config = getattr(layer, "config", None)
        if hasattr(config, "_attn_implementation"):
            yield config


@contextmanager
def fused(*layers: Any) -> Iterator[None]:
    """Like :func:`fused_layers`, for individual layers or configs.

    If several threads use it at the same time, the first to enter sets the flags and the last to leave
    restores them.
    """
    with _COUNTING:
        found = []
        for m in layers:
            users, before = _USERS.get(m, (0, {}))
            if not users:
                before = {name: getattr(m, name) for name in _SETTINGS if hasattr(m, name)}
            found.append((m, users + 1, before))
        for (
            m,
            users,
            before,
        ) in found:  # setting a config sets its sub-configs, so all are read first
            if users == 1:
                for name in before:
                    setattr(m, name, _SETTINGS[name])
            _USERS[m] = users, before
    try:
        yield
    finally:
        with _COUNTING:
            for m in layers:
                users, before = _USERS.pop(m)
                if users > 1:
                    _USERS[m] = users - 1, before
                    continue
                for name, value in before.items():
                    setattr(m, name, value)


@contextmanager
def inside_layer() -> Iterator[None]:
    """Context manager for a layer that records its operator itself; attention inside is not intercepted."""
    _STATE.inside += 1
    try:
        yield
    finally:
        _STATE.inside -= 1


@contextmanager
def replace_products(answer: ProductReplacement) -> Iterator[None]:
    """Context manager in which ``answer`` computes the outputs of all mechanisms and the products of all
    blocks (:func:`mix`) in this thread. They are not recorded."""
    before = _STATE.answer
    _STATE.answer = answer
    try:
        yield
    finally:
        _STATE.answer = before


def product_replacement() -> ProductReplacement | None:
    """Return the object given to :func:`replace_products`, or None outside of it."""
    return _STATE.answer


def mix(
    name: str,
    operator: Operator,
    value: Tensor,
    maps: Callable[[], dict[str, Tensor]] = dict,
) -> Tensor:
    """Compute A V (B, H, N, Dv) for value (B, H, S, Dv) in a layer or block ``name`` that builds its
    operator itself. If attention is being recorded, the product is stored as a call; ``maps()``, which
    computes the maps of the call, runs when they are first accessed."""
    answer = product_replacement()
    with inside_layer():
        if answer is not None:
            return answer.mix(name, operator, value)
        if not recording():
            return operator.matvec(value)
        output = operator.matvec_and_keep(value)
    record_call(Call(operator.detach(), value.detach(), output, dict(operator.aux), maps))
    return output


FUSED = F.scaled_dot_product_attention
_PATCHED: list[
    Callable[..., Tensor]
] = []  # the original function, once per open `replace_attention`


@contextmanager
def replace_attention(attend: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    """Context manager in which calls by the name ``F.scaled_dot_product_attention`` run ``attend`` instead,
    in this thread. This includes calls inside PyTorch's own Python functions, which do not reach a
    ``TorchFunctionMode``. It yields the function that was replaced."""
    with _COUNTING:
        _PATCHED.append(_PATCHED[0] if _PATCHED else F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = _attend
    before, _STATE.attend = _STATE.attend, attend
    try:
        yield before or _PATCHED[0]
    finally:
        _STATE.attend = before
        with _COUNTING:
            original = _PATCHED.pop()
            if not _PATCHED:
                F.scaled_dot_product_attention = original


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    return (_STATE.attend or _PATCHED[0])(*args, **kwargs)


class _Interceptor(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward and not _STATE.inside:
            return _module_attended(function, args, kwargs)
        if function is not FUSED or _STATE.inside:
            return function(*args, **kwargs)
        return attend_and_keep(*args, **kwargs)


def _module_attended(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return the result of ``F.multi_head_attention_forward`` and record its attention.

    When the attention weights are requested, as they are by default, that function computes the softmax
    explicitly. The weights are then taken from a separate call, so that the output can come from a call
    that can be recorded.
    """
    given = inspect.signature(function).bind(*args, **kwargs)
    weights = None
    if given.arguments.get("need_weights", True):
        weights = function(*args, **kwargs)[1]
    given.arguments["need_weights"] = False
    with replace_attention(attend_and_keep):
        return function(*given.args, **given.kwargs)[0], weights


def attend_and_keep(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **other: Any,
) -> Tensor:
    """Compute the same as ``F.scaled_dot_product_attention``, and record the operator."""
    refuse_dropout(dropout_p)
    q, k, v = (_four(x) for x in (query, key, value))
    bias, causal = attn_mask, is_causal and q.shape[2] == k.shape[2]
    if is_causal and not causal:
        shape = q.shape[2], k.shape[2]
        bias = torch.ones(shape, dtype=torch.bool, device=q.device).tril()
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = _added(bias, q.dtype)
        bias = _four(bias.expand(*query.shape[:-3], *bias.shape[-3:]) if query.ndim > 4 else bias)
    o, lse = softmax_attention(q, k, v, bias, scale=scale, causal=causal)
    operator = SoftmaxOperator(
        q.detach(), k.detach(), scale, _detach(bias), lse.detach(), causal=causal
    )
    record_call(Call(operator, v.detach(), o))
    return o.reshape(*query.shape[:-1], value.shape[-1])


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where ``mask`` is True and -inf elsewhere. All layers that use the mask share the result."""
    version = None if mask.is_inference() else (mask._version, dtype)
    known = _STATE.added.get(mask, (None, mask))
    if version is None or known[0] != version:
        known = version, torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
        _STATE.added[mask] = known
    return known[1]


def refuse_dropout(share: float) -> None:
    """Raise a ``ValueError`` if a model drops a share of its attention weights at random."""
    if share > 0:
        raise ValueError(
            "model: it drops some attention weights at random; call model.eval() first"
        )


def _four(x: Tensor) -> Tensor:
    """Reshape (..., H, N, D) to (B, H, N, D)."""
    return x.reshape(-1, *x.shape[-3:]) if x.ndim > 2 else x[None, None]


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
