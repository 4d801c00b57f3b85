"""Attention as a linear operator on values, Y = A V: products and rows of A without ever storing it.

A is (B, H, N, S) for N queries and S keys; A_ij = exp(scale q_i . k_j + b_ij - lse_i) in softmax
attention. One row costs O(S d), a product with a vector O(N S d) time and O(N + S) memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax import softmax_attention
from xattn.kernels.softmax.reference import widen
from xattn.kernels.vecmat import ROWS
from xattn.kernels.vecmat import gradient_vecmat as softmax_gradient_vecmat
from xattn.kernels.vecmat import vecmat as softmax_vecmat

TILE = 2**20  # entries of a chunk of rows, over batch and heads: 4 MB in float32


class Operator(ABC):
    """A of Y = A V, for every image and head.

    Attributes: ``shape``, (B, H, N, S). A subclass has to define :meth:`matvec`, linear and
    differentiable in its argument, and :meth:`rows`; the rest follows from these.
    """

    shape: tuple[int, int, int, int]

    @property
    def device(self) -> torch.device:
        return self._anchor().device

    @abstractmethod
    def matvec(self, x: Tensor) -> Tensor:
        """A X: (B, H, S, m) -> (B, H, N, m)."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Rows of A for a LongTensor (R,) of queries: (B, H, R, S)."""

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The part ``A[:, :, rows, columns]``."""
        return self.rows(torch.arange(self.shape[2], device=self.device)[rows])[..., columns]

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        """r A for one or more row vectors.

        Args:
            r: (B, R, N), the same for all heads, or (B, H, R, N).
            heads: "each" gives (B, H, R, S), "mean" their mean over heads, (B, R, S).

        The result is at least float32. Whether it has gradients depends on the kind of operator.
        """
        product = self._transposed_matvec(self._spread(r).transpose(-2, -1)).transpose(-2, -1)
        return product.mean(1) if check_heads(heads) else product

    def gradient_vecmat(self, v: Tensor, grad: Tensor, r: Tensor) -> Tensor:
        """r E, E_ij = mean_h max(A_ij dA_ij, 0) with dA = grad v^T, the gradient that reaches A.

        Args:
            v: the values, (B, H, S, Dv).
            grad: of a score with respect to A V, (B, H, N, Dv).
            r: (B, R, N). Returns (B, R, S).
        """
        out = r.new_zeros(*r.shape[:2], self.shape[3])
        for i in self.row_chunks():
            a = self.tile(i, slice(None))
            e = (a * (grad[:, :, i] @ v.transpose(-2, -1)).to(a.dtype)).clamp_min(0).mean(1)
            out += r[:, :, i] @ e.to(r.dtype)
        return out

    def row_chunks(self) -> list[slice]:
        """Slices of the rows, of at most ``TILE`` entries of A each (one row at least)."""
        batch, heads, queries, keys = self.shape
        size = max(1, TILE // (batch * heads * keys))
        return [slice(start, start + size) for start in range(0, queries, size)]

    def row_sums(self) -> Tensor:
        """A 1: (B, H, N); ones in softmax attention."""
        batch, heads, _, keys = self.shape
        return self.matvec(self._anchor().new_ones(batch, heads, keys, 1))[..., 0]

    def _transposed_matvec(self, y: Tensor) -> Tensor:
        """A^T Y, (B, H, N, m) -> (B, H, S, m): the derivative of the linear map X -> A X."""
        batch, heads, _, keys = self.shape
        with torch.inference_mode(False), torch.enable_grad():
            x = y.new_zeros(batch, heads, keys, y.shape[-1], requires_grad=True)
            product = self._wide().matvec(x)
            (out,) = torch.autograd.grad(product, x, y.clone() if y.is_inference() else y)
        return out

    def _wide(self) -> Operator:
        """The same operator in float32 at least, of tensors that autograd may save."""
        return self

    def _spread(self, r: Tensor) -> Tensor:
        """(B, R, N) or (B, H, R, N) as the latter, in the operator's dtype."""
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
        """Any tensor of the operator's dtype and device."""


def check_heads(heads: str) -> bool:
    """Whether ``heads`` is "mean"; a ``ValueError`` unless it is that or "each"."""
    if heads not in ("each", "mean"):
        raise ValueError(f"heads: got {heads!r}; give 'each' or 'mean'")
    return heads == "mean"


class SoftmaxOperator(Operator):
    """Dense softmax attention, A = exp(scale q k^T + bias - lse), recomputed on demand.

    Args:
        q: (B, H, N, D); ``k``: (B, H, S, D).
        scale: 1 / sqrt(D) by default.
        bias: (B or 1, H or 1, N or 1, S), added to the scores; -inf hides a key.
        lse: (B, H, N), the log-sum-exp of the scores, if it is already known.
        backend: see :func:`xattn.kernels.backend.choose`.
        every_row: whether every row is known to see a key, so that under "auto" PyTorch's own
            attention may compute A X; without a bias that is always so.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | None = None,
        bias: Tensor | None = None,
        lse: Tensor | None = None,
        backend: str = "auto",
        every_row: bool = False,
    ) -> None:
        self.q, self.k, self.bias = q, k, bias
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.backend = backend
        fixed = bias is None or (every_row and not bias.requires_grad)
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
        if torch.is_grad_enabled() or not live:  # else a later call may want its graph
            self._lse = lse
        return lse

    def attend(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(A V, lse)."""
        return softmax_attention(
            self.q, self.k, v, self.bias, scale=self.scale, backend=self.backend
        )

    def matvec(self, x: Tensor) -> Tensor:
        if not self._fused:
            return self.attend(x)[0]
        q, k, bias = self.q, self.k, self.bias
        return F.scaled_dot_product_attention(q, k, x, attn_mask=bias, scale=self.scale)

    def rows(self, index: Tensor) -> Tensor:
        return self.tile(index, slice(None))

    def tile(self, rows: slice | Tensor, columns: slice) -> Tensor:
        bias = self.bias
        if bias is not None:
            bias = bias[:, :, rows if bias.shape[2] > 1 else slice(None), columns]
        s = products(self.q[:, :, rows], self.k[:, :, columns], self.scale)
        s = s if bias is None else s + bias
        lse = self.lse[:, :, rows, None]
        return torch.where(lse.isneginf(), 0.0, (s - lse).exp())

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        self._spread(r)  # checks
        parts = [
            softmax_vecmat(
                self.q,
                self.k,
                self.lse,
                some.to(self.lse.dtype),
                bias=self.bias,
                scale=self.scale,
                reduce="mean" if check_heads(heads) else "none",
                backend=self.backend,
            )
            for some in r.split(ROWS, -2)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def gradient_vecmat(self, v: Tensor, grad: Tensor, r: Tensor) -> Tensor:
        parts = [
            softmax_gradient_vecmat(
                self.q,
                self.k,
                v,
                self.lse,
                grad,
                some.to(self.lse.dtype),
                bias=self.bias,
                scale=self.scale,
                backend=self.backend,
            )
            for some in r.split(ROWS, -2)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def row_sums(self) -> Tensor:
        return (~self.lse.isneginf()).to(self.lse.dtype)  # 0 where a row sees no key

    def _anchor(self) -> Tensor:
        return self.q


def products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T, in float32 at least, also under autocast."""
    with torch.autocast(q.device.type, enabled=False):
        return scale * (widen(q) @ widen(k).transpose(-2, -1))


class LowRankOperator(Operator):
    """A = L R with L (B, H, N, f) and R (B, H, f, S), f much smaller than N and S."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.shape = (left.shape[0], left.shape[1], left.shape[2], right.shape[3])

    def matvec(self, x: Tensor) -> Tensor:
        return self.left @ (self.right @ x)

    def rows(self, index: Tensor) -> Tensor:
        return self.left[:, :, index] @ self.right

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        product = (self._spread(r) @ widen(self.left)) @ widen(self.right)
        return product.mean(1) if check_heads(heads) else product

    def _anchor(self) -> Tensor:
        return self.left


class ProductOperator(Operator):
    """A = A_1 A_2 ...: attention in stages, as with agents, landmarks or inducing points."""

    def __init__(self, factors: Sequence[Operator]) -> None:
        self.factors = list(factors)
        first, last = self.factors[0], self.factors[-1]
        self.shape = (*first.shape[:3], last.shape[3])

    def matvec(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor.matvec(x)
        return x

    def rows(self, index: Tensor) -> Tensor:
        r = self.factors[0].rows(index)
        for factor in self.factors[1:]:
            r = factor.vecmat(r)
        return r

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        r = self._spread(r)
        for factor in self.factors:
            r = factor.vecmat(r)
        return r.mean(1) if check_heads(heads) else r

    def _anchor(self) -> Tensor:
        return self.factors[0]._anchor()
