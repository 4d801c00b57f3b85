"""Rows of attention of a transformers model, read while its own kernels run unchanged.

    with read_rows(model.get_decoder(), lambda r: print(r.name, r.weights.shape)):
        model.generate(**inputs)                    # the same tokens as without reading

Each call of ``F.scaled_dot_product_attention`` gets its original arguments, so the model computes exactly
the same result. In addition, but only for the requested queries i and without a graph,

    A_i = softmax(scale q_i K^T + b_i)

is passed to a function and then dropped: a row costs one product with the keys, nothing is stored from
one step to the next, and no table of all queries and keys is built. Layers that compute their softmax
explicitly (BLIP, soft caps) return it as their second output, from which the same rows are taken.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xattn.attention.record import FUSED, refuse_dropout, replace_attention

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)  # names of classes
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)  # names of modules


@dataclass(frozen=True, eq=False)
class QueryRows:
    """The attention weights of some queries in one attention call."""

    name: str
    """Name of the attention module inside the model that is read; ``""`` if the call is not inside
    one."""
    layer: int | None
    """The last number in that name, from 0."""
    cross: bool
    """Whether the keys belong to another sequence, such as the encoder's or the image's."""
    queries: tuple[int, ...]
    """Positions of the queries in their sequence, (R,). With a cache, tokens of earlier steps count."""
    weights: Tensor
    """(B, H, R, S) in float32, without a graph. A row sums to 1, or to 0 if the query sees nothing."""
    offset: int
    """Position of the first key: the cache of a layer with a window holds only the last keys."""

    def over(self, length: int) -> Tensor:
        """The weights at each position of the sequence, (B, H, R, length), 0 where there is no key.

        >>> rows = QueryRows("layers.0.self_attn", 0, False, (4,), torch.full((1, 1, 1, 2), 0.5), offset=3)
        >>> rows.over(6)[0, 0, 0].tolist()
        [0.0, 0.0, 0.0, 0.5, 0.5, 0.0]
        """
        if not self.offset and length == self.weights.shape[-1]:
            return self.weights
        kept = self.weights[..., : max(length - self.offset, 0)]
        after = length - self.offset - kept.shape[-1]
        return nn.functional.pad(kept, (self.offset, after))


@contextmanager
def read_rows(
    model: nn.Module, read: Callable[[QueryRows], object], rows: Sequence[int] | None = None
) -> Iterator[None]:
    """Context manager in which ``read`` gets rows of every attention call that ``model`` makes in this
    thread.

    Args:
        model: a transformers model or a part of one, such as ``model.get_decoder()``: calls in other
            parts are not read. The model runs as configured; ``attn_implementation`` may be ``"sdpa"``
            or ``"eager"``.
        read: called with :class:`QueryRows` after each call. To use rows later, copy only what you need;
            this function is meant to avoid storing all of them.
        rows: positions of the queries in their sequence, padding included; a call without any of them is
            not read. The default is the last query of each call, which in generation produces the next
            token.

    Raises:
        ValueError: raised in a pass if the model drops attention at random, or if an attention module
            neither calls ``F.scaled_dot_product_attention`` nor returns its weights.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model, seen = LlamaModel(LlamaConfig(vocab_size=9, **sizes)).eval(), []
    >>> with read_rows(model, seen.append, rows=[1, 3]):
    ...     _ = model(torch.arange(5)[None])
    >>> [(r.name, r.queries, tuple(r.weights.shape)) for r in seen]
    [('layers.0.self_attn', (1, 3), (1, 2, 2, 5)), ('layers.1.self_attn', (1, 3), (1, 2, 2, 5))]
    """
    reader = _Reader(read, rows)
    handles = []
    try:
        for name, module in model.named_modules():
            if module is model or _ATTENTION.search(type(module).__name__):
                handles += reader.watch(name, module)
        with replace_attention(reader.attend) as reader.original:
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Running:
    """An attention module that is running."""

    name: str
    layer: int | None
    cross: bool
    length: int | None  # number of queries that it received
    start: int | None  # position of its next query; None: derived from the keys
    attended: bool = False  # whether it, or a module inside it, has attended


class _Reader:
    """The hooks, and the function that replaces ``F.scaled_dot_product_attention``."""

    original: Callable[..., Tensor] = FUSED

    def __init__(self, read: Callable[[QueryRows], object], rows: Sequence[int] | None) -> None:
        self._read, self._rows = read, None if rows is None else sorted({int(i) for i in rows})
        self._thread = threading.get_ident()
        self._running: list[_Running] = []
        self._start = 0  # of the last self-attention, whose queries cross-attention shares

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Hooks that track which modules are running."""
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        layer = numbers[-1] if numbers else None
        cross = bool(_CROSS.search(f"{name} {type(module).__name__}"))

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() == self._thread:
                start = self._start if cross else _seen((*args, *kwargs.values()), layer)
                hidden = args[0] if args else kwargs.get("hidden_states")
                whole = isinstance(hidden, Tensor) and hidden.ndim == 3
                length = hidden.shape[1] if whole else None
                self._running.append(_Running(name, layer, cross, length, start))

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            if threading.get_ident() == self._thread:
                self._leave(self._running.pop(), type(module).__name__, result)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]

    def _leave(self, running: _Running, kind: str, result: Any) -> None:
        if result is None:  # it raised an error
            return
        weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
        if not running.attended and isinstance(weights, Tensor) and weights.ndim == 4:
            # A copy of the rows: a view would keep the whole table.
            count, keys = weights.shape[2:]
            self._give(running, count, keys, lambda index: weights.detach()[:, :, index].float())
        if not running.attended:
            raise ValueError(
                f"model: {running.name or kind} ({kind}) neither calls scaled_dot_product_attention "
                f"nor returns its weights; load it with attn_implementation='sdpa' or 'eager'"
            )
        if self._running:
            self._running[-1].attended = True

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """The result of the original function; rows are read before it is called."""
        if self._running:
            self._attend(self._running[-1], *args, **kwargs)
        return self.original(*args, **kwargs)

    def _attend(
        self,
        running: _Running,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **other: Any,
    ) -> None:
        refuse_dropout(dropout_p)
        count, keys = query.shape[-2], key.shape[-2]
        # Heads that share a key may be stored on the query axis.
        if running.length == 1 and count > 1:

            def read(index: list[int]) -> Tensor:
                rows = _rows(query, key, list(range(count)), attn_mask, is_causal, scale)
                return rows.reshape(len(rows), -1, 1, keys)

            self._give(running, 1, keys, read)
        else:
            self._give(
                running, count, keys, lambda i: _rows(query, key, i, attn_mask, is_causal, scale)
            )

    def _give(
        self, running: _Running, count: int, keys: int, read: Callable[[list[int]], Tensor]
    ) -> None:
        """Pass the requested rows among the next ``count`` queries of a module to ``read``."""
        start = max(keys - count, 0) if running.start is None else running.start
        running.start, running.attended = start + count, True
        if not running.cross:
            self._start = start
        if self._rows is None:
            index = [count - 1]
        else:
            index = [i - start for i in self._rows if start <= i < start + count]
        if index:
            offset = 0 if running.cross else max(start + count - keys, 0)
            places = tuple(start + i for i in index)
            self._read(
                QueryRows(running.name, running.layer, running.cross, places, read(index), offset)
            )


def _seen(values: Sequence[Any], layer: int | None) -> int | None:
    """The number of tokens that a layer saw in earlier steps, from the cache among its arguments."""
    cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
    if cache is None or layer is None:
        return None
    return int(getattr(cache, "self_attention_cache", cache).get_seq_length(layer))


@torch.no_grad()
def _rows(
    query: Tensor,
    key: Tensor,
    index: list[int],
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Rows ``index`` of softmax(scale q k^T + b), (B, H, R, S); q (B, H, N, D), k (B, H or Hk, S, D)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, groups, (keys, width) = query.shape[1], key.shape[1], key.shape[2:]
    # Slices, and no mask if nothing is hidden: a generation step needs a single query.
    asked = query[:, :, index] if len(index) > 1 else query[:, :, index[0] : index[0] + 1]
    q = asked.to(dtype) * (width**-0.5 if scale is None else scale)
    q = q.reshape(len(q), groups, -1, width)
    scores = (q @ key.to(dtype).mT).reshape(-1, heads, len(index), keys)
    hidden = None
    if causal and min(index) < keys - 1:
        hidden = (
            torch.arange(keys, device=key.device) > torch.tensor(index, device=key.device)[:, None]
        )
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else mask[..., index, :]
        hidden, scores = (~mask, scores) if mask.dtype == torch.bool else (None, scores + mask)
    if hidden is None:
        return scores.softmax(-1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
