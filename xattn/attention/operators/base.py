"""Attention as a linear operator on values, Y = A V: products with A and rows of A, without storing A.

A is (B, H, N, S) for N queries and S keys. In softmax attention, A_ij = exp(scale q_i . k_j + b_ij -
lse_i). One row takes O(S d) time; a product with a vector takes O(N S d) time and O(N + S) memory.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from xattn.attention.inputs import may_read_values, on_cpu, spread_heads
from xattn.kernels.backend import choose, tile_entries, width_limit, without_autocast
from xattn.kernels.ragged_queries import ragged_attention
from xattn.kernels.softmax import softmax_attention
from xattn.kernels.softmax.reference import widen
from xattn.kernels.vecmat import ROWS
from xattn.kernels.vecmat import gradient_vecmat as softmax_gradient_vecmat
from xattn.kernels.vecmat import vecmat as softmax_vecmat

TILE = 2**20  # entries in a chunk of rows, over batch and heads: 4 MB in float32
FEW = 256  # with fewer keys, leaving rows out saves no time
LEAST = 16  # smallest number of rows for which another thread is worth using


class Operator(ABC):
    """The operator A in Y = A V, for every image and head.

    A subclass must define :meth:`rows` and :meth:`matvec`; the latter must be linear and differentiable in
    its argument. All other methods are derived from these two.

    Example:
        >>> import torch
        >>> from xattn.attention import SoftmaxOperator
        >>> A = SoftmaxOperator(torch.rand(1, 2, 5, 8), torch.rand(1, 2, 7, 8))
        >>> A.shape, A.matvec(torch.rand(1, 2, 7, 8)).shape, A.rows(torch.tensor([0, 3])).shape
        ((1, 2, 5, 7), torch.Size([1, 2, 5, 8]), torch.Size([1, 2, 2, 7]))
    """

    shape: tuple[int, int, int, int]
    """(B, H, N, S)"""
    stochastic: bool = False
    """Whether every row that sees a key is known to sum to 1."""
    signed: bool = False
    """Whether entries may be negative."""
    causal: bool = False
    """Whether entries above the diagonal are known to be 0."""
    hides: bool = False
    """Whether some keys may be hidden from a query for a reason other than causality. Their entries are
    then exactly 0."""
    factors: tuple[Operator, ...] = ()
    """The factors A_1, A_2, ... in A = A_1 A_2 ..., if attention has several stages."""
    aux: Mapping[str, Tensor] = MappingProxyType({})
    """Scalar losses, keyed by name, that the mechanism wants added to the training loss. They are part of
    the graph."""
    logged: Mapping[str, Tensor] = MappingProxyType({})
    """Scalars, keyed by name, that the mechanism wants logged in training. They are not losses."""
    selection: float = 0.0
    """The cost of choosing what is read, or of learned features, per image and head. Its unit is that of
    :attr:`pairs`; a product of a query and a key, without a value, counts as half a pair."""
    context: Any = None
    """Anything else that the mechanism needs to compute its maps."""

    @property
    def pairs(self) -> float:
        """The cost of one product A X per image and head, in units of one query-key pair in dense
        attention."""
        return float(self.shape[2] * self.shape[3])

    @property
    def device(self) -> torch.device:
        return self._anchor().device

    @abstractmethod
    def matvec(self, x: Tensor) -> Tensor:
        """Compute A X, (B, H, S, m) -> (B, H, N, m). Operators with grouped keys also accept (B, Hk, S,
        m)."""

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        """Compute A X, and keep what later calls can reuse, such as the log-sum-exp."""
        return self.matvec(x)

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Compute the rows of A, (B, H, R, S), for the query numbers in a LongTensor (R,)."""

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Compute the part ``A[:, :, rows, columns]``."""
        return self.rows(torch.arange(self.shape[2], device=self.device)[rows])[..., columns]

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        """Compute r A for one or more row vectors.

        Args:
            r: (B, R, N), the same for all heads, or (B, H, R, N).
            heads: "each" returns (B, H, R, S); "mean" returns the mean over heads, (B, R, S).

        The result is at least float32. Whether it has gradients depends on the type of operator.
        """
        product = self._transposed_matvec(self._spread(r).transpose(-2, -1)).transpose(-2, -1)
        return product.mean(1) if check_heads(heads) else product

    def gradient_vecmat(self, v: Tensor, grad: Tensor, r: Tensor) -> Tensor:
        """Compute r E, E_ij = mean_h max(A_ij dA_ij, 0), where dA = grad v^T is the gradient with respect
        to A.

        Args:
            v: the values, (B, H or Hk, S, Dv).
            grad: the gradient of a score with respect to A V, (B, H, N, Dv).
            r: row vectors, (B, R, N).

        Returns:
            (B, R, S).
        """
        out = r.new_zeros(*r.shape[:2], self.shape[3])
        v = spread_heads(v, self.shape[1])
        for i in self.row_chunks():
            a = self.tile(i, slice(None))
            e = (a * (grad[:, :, i] @ v.transpose(-2, -1)).to(a.dtype)).clamp_min(0).mean(1)
            out += r[:, :, i] @ e.to(r.dtype)
        return out

    def row_chunks(self) -> list[slice]:
        """Divide the rows into slices with at most ``TILE`` entries of A, or more on GPUs, but at least one
        row each."""
        batch, heads, queries, keys = self.shape
        size = max(1, tile_entries(self.device, TILE) // max(1, batch * heads * keys))
        return [slice(start, start + size) for start in range(0, queries, size)]

    def row_sums(self) -> Tensor:
        """Compute the sum of each row, (B, H, N)."""
        batch, heads, _, keys = self.shape
        return self.matvec(self._anchor().new_ones(batch, heads, keys, 1))[..., 0]

    def matvec_where(self, x: Tensor, keep: Tensor) -> Tensor:
        """Compute A X in the rows where ``keep`` (B, H, N) is true, and return 0 in all other rows."""
        return self.matvec(x).masked_fill(~keep[..., None], 0.0)

    def detach(self) -> Self:
        """Return the same operator, detached from the graph."""
        return self.apply(Tensor.detach)

    def apply(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same operator with every tensor x replaced by ``change(x)``."""
        made = copy.copy(self)
        made.__dict__.update({key: map_tensors(value, change) for key, value in vars(self).items()})
        return made

    def _transposed_matvec(self, y: Tensor) -> Tensor:
        """Compute A^T Y, (B, H, N, m) -> (B, H, S, m), from the derivative of the linear map X -> A X."""
        batch, heads, _, keys = self.shape
        with torch.inference_mode(False), torch.enable_grad():
            x = y.new_zeros(batch, heads, keys, y.shape[-1], requires_grad=True)
            product = self._wide().matvec(x)
            (out,) = torch.autograd.grad(product, x, y.clone() if y.is_inference() else y)
        return out

    def _wide(self) -> Self:
        """Return the same operator in float32 at least, with tensors that autograd can save."""

        def wide(x: Tensor) -> Tensor:
            x = widen(x) if x.is_floating_point() else x
            return x.clone() if x.is_inference() else x

        return self.apply(wide)

    def _spread(self, r: Tensor) -> Tensor:
        """Expand r, (B, R, N) or (B, H, R, N), to (B, H, R, N) in the operator's dtype, at least
        float32."""
        batch, heads, queries, _ = self.shape
        wrong = r.ndim not in (3, 4) or r.shape[0] != batch or r.shape[-1] != queries
        if wrong or (r.ndim == 4 and r.shape[1] != heads):
            raise ValueError(
                f"r: got shape {tuple(r.shape)}; give ({batch}, R, {queries}) or "
                f"({batch}, {heads}, R, {queries})"
            )
        r = r if r.ndim == 4 else r[:, None].expand(-1, heads, -1, -1)
        return r.to(widen(self._anchor().new_empty(0)).dtype)

    @abstractmethod
    def _anchor(self) -> Tensor:
        """Return a tensor with the operator's dtype and device."""


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``change`` applied to every tensor in it. ``value`` may consist of operators,
    records, tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Operator):
        return value.apply(change)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(item, change) for item in value]
        named = hasattr(value, "_fields")
        return type(value)(*items) if named else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for f in fields(value):
            object.__setattr__(made, f.name, map_tensors(getattr(value, f.name), change))
        return made
    return value


def check_heads(heads: str) -> bool:
    """Return whether ``heads`` is "mean". Raise a ``ValueError`` if it is neither "mean" nor "each"."""
    if heads not in ("each", "mean"):
        raise ValueError(f"heads: got {heads!r}; give 'each' or 'mean'")
    return heads == "mean"


class CachedProductOperator(Operator):
    """An operator that can store its product with one particular tensor, for mechanisms that need A V
    before A is final. Copies of the operator do not contain the stored product."""

    _answer: tuple[Tensor, Tensor] | None = None

    def hold(self, x: Tensor, y: Tensor) -> None:
        """Store ``y`` as the product with ``x``, so that later products with ``x`` return it."""
        self._answer = x, y

    def held(self, x: Tensor) -> Tensor | None:
        """Return the stored product if it is the product with ``x``, else None."""
        return self._answer[1] if self._answer is not None and self._answer[0] is x else None

    def apply(self, change: Callable[[Tensor], Tensor]) -> Self:
        made = copy.copy(self)
        made._answer = None
        return Operator.apply(made, change)


class SoftmaxOperator(CachedProductOperator):
    """Dense softmax attention, A = exp(scale q k^T + bias - lse), recomputed on demand.

    Args:
        q: (B, H, N, D); ``k``: (B, H or Hk, S, D).
        scale: 1 / sqrt(D) by default.
        bias: (B or 1, H or 1, N or 1, S), added to the scores; -inf hides a key.
        lse: (B, H, N), the log-sum-exp of the scores, if it is already known.
        backend: see :func:`xattn.kernels.backend.choose`.
        every_row: whether every row is known to see a key. The backend "auto" may then compute A X with
            PyTorch's own attention. Without a bias, this is always the case.
        causal: whether query i sees only keys 0 to i; this requires N = S.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from xattn.attention import SoftmaxOperator
        >>> q, k, v = torch.rand(3, 1, 2, 5, 8)
        >>> A = SoftmaxOperator(q, k)
        >>> expected = F.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(A.matvec(v), expected, atol=1e-6)
        True
    """

    stochastic = True

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | None = None,
        bias: Tensor | None = None,
        lse: Tensor | None = None,
        backend: str = "auto",
        every_row: bool = False,
        causal: bool = False,
    ) -> None:
        self.q, self.k, self.bias = q, k, bias
        self.causal = self._by_place = (
            causal  # `causal` may be set later if a bias hides later keys
        )
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.backend = backend
        fixed = bias is None or (every_row and not causal and not bias.requires_grad)
        self._fused = backend == "auto" and fixed
        self.shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        self._lse = lse

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of every row's scores, (B, H, N)."""
        if self._lse is not None:
            return self._lse
        lse = self.attend(self.k.new_zeros(*self.k.shape[:3], self.q.shape[-1]))[1]
        live = any(x is not None and x.requires_grad for x in (self.q, self.k, self.bias))
        if torch.is_grad_enabled() or not live:  # otherwise a later call may need its graph
            self._lse = lse
        return lse

    def attend(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (A V, lse)."""
        k = spread_heads(self.k, v.shape[1]) if v.shape[1] > self.k.shape[1] else self.k
        v = spread_heads(v, k.shape[1])
        return softmax_attention(
            self.q, k, v, self.bias, scale=self.scale, causal=self._by_place, backend=self.backend
        )

    def answer(self, v: Tensor) -> Tensor:
        """Compute A V, and store it and the log-sum-exp, both with their graph, for later calls."""
        y, self._lse = self.attend(v)
        self.hold(v, y)
        return y

    def matvec(self, x: Tensor) -> Tensor:
        if (known := self.held(x)) is not None:
            return known
        uneven = x.shape[-1] != self.q.shape[-1] and on_cpu(x)
        if not self._fused or uneven:  # with uneven widths, PyTorch's own would store N x S numbers
            return self.attend(x)[0]
        return fused_attention(
            self.q, self.k, x, self.bias, causal=self._by_place, scale=self.scale
        )

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        if (known := self.held(x)) is not None:
            return known
        y, self._lse = self.attend(x)
        return y

    def matvec_where(self, x: Tensor, keep: Tensor) -> Tensor:
        """Compute A X in the rows to keep, in the fastest way.

        With fewer than ``FEW`` keys, all rows are computed. Otherwise a GPU uses lists of queries, unless
        there is a bias, and a CPU computes the rows head by head, unless attention is causal. If every head
        keeps either all of its rows or none, a CPU skips the heads that keep none.
        """
        enough, n = self.shape[3] >= FEW, self.shape[2]
        if enough and self._takes_lists(x):
            options: dict[str, Any] = {"causal": self._by_place, "backend": self.backend}
            return ragged_attention(self.q, self.k, x, keep, scale=self.scale, **options)[0]
        # On devices other than a CPU, counting the kept rows would mean waiting for them.
        if not may_read_values(keep) or not self._fused:
            return super().matvec_where(x, keep)
        at = keep.flatten().nonzero()[:, 0]  # row numbers, counted over all heads
        ends = torch.arange(n, keep.numel() + 1, n, device=at.device)
        counts = torch.searchsorted(at, ends).diff(prepend=at.new_zeros(1)).tolist()
        if 0 in counts and {*counts} <= {0, n}:
            return self._some_heads(x, keep[..., 0])
        if enough and not self._by_place:
            return self._by_heads(x, at, counts)
        return super().matvec_where(x, keep)

    def _takes_lists(self, x: Tensor) -> bool:
        """Return whether the op for lists of queries is used instead of PyTorch's own attention."""
        if self.bias is not None or not self.q.dtype == self.k.dtype == x.dtype:
            return False
        if self.backend != "auto":
            return True
        path = choose("auto", self.q.device, x.dtype, width_limit(self.q, x))
        return path == "triton"

    def _by_heads(self, x: Tensor, at: Tensor, counts: Sequence[int]) -> Tensor:
        """Compute A X with PyTorch's own attention in the rows ``at``.

        The row numbers ``at`` are counted over all heads, and ``counts`` has the number of rows in each
        head. The rows of a head are divided equally among all threads: they become a batch whose items read
        the same keys. PyTorch itself would give each thread whole runs of 64 rows, so that one of two
        threads would compute 320 of 520 rows. In the backward pass, it would give each thread whole heads.
        """
        batch, heads, n, _ = self.shape
        shares = [max(1, min(torch.get_num_threads(), count // LEAST)) for count in counts]
        rests = [-count % share for count, share in zip(counts, shares, strict=True)]
        lengths = [count + rest for count, rest in zip(counts, rests, strict=True)]
        padded = at
        if any(rests):  # padded with the last row of the head
            lists = zip(at.split(counts), rests, strict=True)
            padded = torch.cat([i for rows, rest in lists for i in (rows, rows[-1:].expand(rest))])
        parts = self.q.flatten(0, 2).index_select(0, padded).split(lengths)
        masks: Sequence[Tensor | None] = [None] * len(parts)
        if self.bias is not None:
            bias = self.bias.expand(self.shape).flatten(0, 2)
            masks = bias.index_select(0, padded).split(lengths)
        keys, values = (spread_heads(t, heads).flatten(0, 1) for t in (self.k, x))
        some = [
            F.scaled_dot_product_attention(
                _shared(q, share),
                k.expand(share, 1, -1, -1),
                v.expand(share, 1, -1, -1),
                None if mask is None else _shared(mask, share),
                scale=self.scale,
            ).flatten(0, 2)[:count]
            for q, k, v, mask, share, count in zip(
                parts, keys, values, masks, shares, counts, strict=True
            )
            if count
        ]
        joined = torch.cat(some or [values[0, :0]])
        # In memory, the heads of a token are adjacent, as they are in the output of PyTorch's attention.
        places = torch.arange(batch * n * heads).unflatten(0, (batch, n, heads)).transpose(1, 2)
        y = joined.new_zeros(batch * n * heads, values.shape[-1])
        y.index_copy_(0, places.flatten()[at], joined)
        return y.unflatten(0, (batch, n, heads)).transpose(1, 2)

    def _some_heads(self, x: Tensor, live: Tensor) -> Tensor:
        """Compute A X for the heads where ``live`` (B, H) is true, and return 0 for the others."""
        heads, bias = self.shape[1], self.bias
        q, k, v = (
            t[live][:, None] for t in (self.q, spread_heads(self.k, heads), spread_heads(x, heads))
        )
        if bias is not None:
            bias = bias.expand(*self.shape[:2], *bias.shape[2:])[live][:, None]
        y = F.scaled_dot_product_attention(
            q, k, v, bias, is_causal=self._by_place, scale=self.scale
        )[:, 0]
        out = y.new_zeros(*self.shape[:3], y.shape[-1]).flatten(0, 1)
        return out.index_copy(0, live.flatten().nonzero()[:, 0], y).unflatten(0, self.shape[:2])

    def rows(self, index: Tensor) -> Tensor:
        return self.tile(index, slice(None))

    def tile(self, rows: slice | Tensor, columns: slice) -> Tensor:
        bias = self.bias
        if bias is not None:
            bias = bias[:, :, rows if bias.shape[2] > 1 else slice(None), columns]
        k = spread_heads(self.k, self.shape[1])
        s = products(self.q[:, :, rows], k[:, :, columns], self.scale)
        s = s if bias is None else s + bias
        if self._by_place:
            every = torch.arange(self.shape[3], device=s.device)
            s = s.masked_fill(every[columns] > every[rows][:, None], -torch.inf)
        lse = self.lse[:, :, rows, None]
        return torch.where(lse.isneginf(), 0.0, (s - lse).exp())

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        every = self._spread(r)
        reduce: Literal["mean", "none"] = "mean" if check_heads(heads) else "none"
        k, lse = self.k, self.lse
        if r.shape[-2] > ROWS and not on_cpu(r):  # more than one call of the kernel accepts
            with without_autocast(self.q):
                parts = [every[..., i] @ self.tile(i, slice(None)) for i in self.row_chunks()]
            product = functools.reduce(torch.add, parts)
            return product.mean(1) if reduce == "mean" else product
        options: dict[str, Any] = {"bias": self.bias, "scale": self.scale, "causal": self._by_place}
        return _in_parts(
            lambda some: softmax_vecmat(
                self.q, k, lse, some, reduce=reduce, backend=self.backend, **options
            ),
            r.to(lse.dtype),
        )

    def gradient_vecmat(self, v: Tensor, grad: Tensor, r: Tensor) -> Tensor:
        heads, lse = max(self.k.shape[1], v.shape[1]), self.lse
        k, v = spread_heads(self.k, heads), spread_heads(v, heads)
        options: dict[str, Any] = {"bias": self.bias, "scale": self.scale, "causal": self._by_place}
        return _in_parts(
            lambda some: softmax_gradient_vecmat(
                self.q, k, v, lse, grad, some, backend=self.backend, **options
            ),
            r.to(lse.dtype),
        )

    def row_sums(self) -> Tensor:
        return (~self.lse.isneginf()).to(self.lse.dtype)  # 0 where a row sees no key

    def _anchor(self) -> Tensor:
        return self.q


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute attention with PyTorch's own function, for keys and values of H or Hk heads.

    If there are fewer key heads than query heads, they are repeated on a CPU, in dtypes other than float16
    and bfloat16, and with a bias. In these cases, PyTorch would repeat them itself or store N x S numbers.
    """
    heads, half = q.shape[1], q.dtype in (torch.float16, torch.bfloat16)
    grouped = not on_cpu(q) and half and bias is None and k.shape[1] == v.shape[1] < heads
    if not grouped:
        k, v = spread_heads(k, heads), spread_heads(v, heads)
    options = {"enable_gqa": True} if grouped else {}
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale, **options)


def _shared(rows: Tensor, shares: int) -> Tensor:
    """Reshape rows (R, m) to a batch (shares, 1, R / shares, m)."""
    return rows.unflatten(0, (shares, -1))[:, None]


def _in_parts(times: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """Apply ``times`` to any number of row vectors, in chunks of the size that a kernel accepts."""
    parts = [times(some) for some in r.split(ROWS, -2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Compute scale q k^T in float32 at least, also under autocast."""
    with torch.autocast(q.device.type, enabled=False):
        return scale * (widen(q) @ widen(k).transpose(-2, -1))
