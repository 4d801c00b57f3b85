"""Makes inputs of any size for every op of ``xattn.kernels``, for checking and timing the ops.

A case consists of the op's input tensors and a function that calls the op with a backend.
``op_cases(normal, sizes)`` returns functions that create the cases, by name. ``normal(*shape)`` must return
random numbers with the desired device and precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xattn.kernels.block_sparse import block_sparse_attention
from xattn.kernels.block_sparse.box import window
from xattn.kernels.block_topk import block_topk
from xattn.kernels.causal_product import causal_product
from xattn.kernels.covariance_solve import covariance_solve
from xattn.kernels.flows import flows
from xattn.kernels.grouped import grouped_attention
from xattn.kernels.local_linear import local_linear
from xattn.kernels.pooling import softmax_pooling
from xattn.kernels.ragged_queries import ragged_attention
from xattn.kernels.softmax import softmax_attention
from xattn.kernels.softplus import softplus_attention
from xattn.kernels.vecmat import gradient_vecmat, vecmat

Case = tuple[dict[str, Tensor], Callable[..., Any]]
WITHOUT_TRITON = {"flows", "flows, causal"}
WIDE = {"lse", "features", "mean", "slope", "right", "ridge"}
"""The names of tensors that remain in float32 if the other tensors are in half precision."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the tensors. There are ``heads`` query heads, or twice as many in ops in which query
    heads share keys."""

    batch: int = 1
    heads: int = 2
    n: int = 21
    """The number of queries, and of keys in ops that need the same number of keys and queries."""
    s: int = 23
    """The number of keys in all other ops."""
    width: int = 16
    values: int = 24
    q_block: int = 8
    k_block: int = 4
    listed: int = 3
    """The number of key blocks in the list of a query block."""
    iterations: int = 4
    """The number of iterations of a solver. In float64, it is ten times as large, since exact derivatives
    need a converged solution."""

    @property
    def blocks(self) -> int:
        return -(-self.n // self.k_block)

    @property
    def pairs(self) -> float:
        """The number of query-key pairs per head in :meth:`lists`, assuming full blocks and an even number
        of lists."""
        return self.n * (self.listed - 0.5) * self.k_block

    def lists(self, device: torch.device) -> dict[str, Any]:
        """Lists of key blocks near each query block; every second list is shorter by one block."""
        rows = -(-self.n // self.q_block)
        at = torch.arange(rows, device=device)[:, None] * self.blocks // rows
        index = (at + torch.arange(min(self.listed, self.blocks), device=device)) % self.blocks
        index[1::2, -1] = -1
        index = index[None, None].int().contiguous()
        return {"index": index, "q_block": self.q_block, "k_block": self.k_block}

    def keep(self, device: torch.device) -> Tensor:
        """A mask (B, H, N) that selects two of every five queries, mostly different ones in each head."""
        at = torch.arange(self.batch * self.heads * self.n, device=device)
        keep = at.reshape(self.batch, self.heads, self.n) % 5 < 2
        return keep & ((torch.arange(self.n, device=device) > 4) | (self.n < 6))


ODD = Sizes()


def op_cases(normal: Callable[..., Tensor], z: Sizes = ODD) -> dict[str, Callable[[], Case]]:
    """Functions that create the cases, by name; the part of a name before a comma is the name of the op."""
    b, h, n, d, device = z.batch, z.heads, z.n, z.width, normal(1).device
    lists, ragged = z.lists(device), partial(ragged_attention, keep=z.keep(device))

    def made(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
        return {name: normal(*shape) for name, shape in shapes.items()}

    def attention(group: int = 1, s: int = n, **more: tuple[int, ...]) -> dict[str, Tensor]:
        return made(q=(b, h * group, n, d), k=(b, h, s, d), v=(b, h, s, z.values), **more)

    def linear(names: str, **more: tuple[int, ...]) -> dict[str, Tensor]:
        """The inputs of the linear ops that are listed in ``names``, such as queries, keys and their
        log-sum-exp."""
        given = attention(features=(b, h, n, d + 1))
        q, k, features = given["q"], given["k"], given["features"][..., :d]
        mean, lse = softmax_attention(q, k, features, causal=True, backend="cpu")
        given |= {"features": features, "mean": mean, "lse": lse}
        return {name: given[name] for name in names.split()} | made(**more)

    def solve(backend: str, **x: Any) -> Any:
        options: dict[str, Any] = {"iterations": z.iterations, "tolerance": 1e-6}
        if x["q"].dtype == torch.float64:
            options = {"iterations": 10 * z.iterations, "tolerance": 1e-14}
        x["ridge"] = x["ridge"].abs() + 0.5
        return covariance_solve(**x, causal=True, backend=backend, **options)

    line, pooled = (b, h, n), {"v": (2 * b, 2, n, z.values), "bias": (2 * b, 6, n)}
    marks, weight = (b, h, z.blocks, d), torch.arange(1.0, z.blocks + 1, device=device)
    product = {"left": (b * h, n, d), "right": (b * h, n, d), "x": (b * h, n, z.values)}
    return {
        "softmax": lambda: (attention(2, z.s, bias=(1, 1, 1, z.s)), softmax_attention),
        "softmax, a bias of scores": lambda: (attention(1, z.s, bias=(b, h, n, z.s)), softmax_attention),
        "softmax, causal": lambda: (attention(2), partial(softmax_attention, causal=True)),
        "block_sparse": lambda: (
            attention(2, bias=line),
            partial(block_sparse_attention, **lists, box=window(n, 9, 9).to(device)),
        ),
        "grouped": lambda: (
            attention(2, bias=line, marks=marks), partial(grouped_attention, **lists, weight=weight),
        ),
        "block_sparse, all of the lists": lambda: (
            attention(2), partial(block_sparse_attention, **lists),
        ),
        "grouped, all alike": lambda: (attention(2, marks=marks), partial(grouped_attention, **lists)),
        "ragged_queries": lambda: (
            made(q=(b, h, n, d), k=(b, 1, n, d), v=(b, 1, n, z.values)), ragged,
        ),
        "vecmat": lambda: (
            linear("q k lse", r=(b, h, 3, n)) | {"bias": 0.1 * normal(b, h, n, n)},
            partial(vecmat, causal=True),
        ),
        "vecmat, by gradients": lambda: (
            linear("q k v lse", grad=(b, h, n, z.values), r=(b, 1, n)),
            partial(gradient_vecmat, causal=True),
        ),
        "covariance_solve": lambda: (
            linear("q k features lse mean", right=(b, h, n, d), ridge=line), solve,
        ),
        "local_linear": lambda: (
            linear("q k v features mean lse", slope=(b, h, n, d)), partial(local_linear, causal=True),
        ),
        "pooling": lambda: (made(q=(1, 6, d), k=(2 * b, n, d), **pooled), softmax_pooling),
        "pooling, of scores": lambda: (made(**pooled), partial(softmax_pooling, None, None)),
        "softplus": lambda: (
            attention(), partial(softplus_attention, scale=0.5, power=3, offset=1.0, causal=True),
        ),
        "causal_product": lambda: (made(**product), causal_product),
        "flows": lambda: (made(q=(b, h, n, d), k=(b, h, z.s, d)), squared_flows),
        "flows, causal": lambda: (
            made(q=(b, h, n, d), k=(b, h, n, d)),
            partial(squared_flows, causal=True),
        ),
        "block_topk": lambda: (
            made(q=(b, 2 * h, n, d), k=(b, h, z.s, d)),
            partial(block_topk, s=min(5, z.s), q_block=z.k_block, softmax=True),
        ),
    }  # fmt: skip


def squared_flows(q: Tensor, k: Tensor, **options: Any) -> Any:
    """The flows of squared queries and keys, since flows need non-negative features."""
    return flows(q.square(), k.square(), **options)


def cast_case(name: str, given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert the tensors of a case to ``dtype``, except that some stay in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    single = {"softplus": {"q", "k"}, "causal_product": set()}.get(name, WIDE)
    return {key: x.to(wide if key in single else dtype) for key, x in given.items()}


def outputs_and_gradients(
    name: str, call: Callable[..., Any], backend: str, given: dict[str, Tensor]
) -> list[Tensor]:
    """The outputs of an op, and the gradients of a fixed weighted sum of its outputs.

    Values of minus infinity, which occur in rows without a key, are replaced by 0.
    """
    leaves = {key: x.detach().requires_grad_() for key, x in given.items()}
    out = call(**leaves, backend=backend)
    out = list(out) if isinstance(out, tuple) else [out]
    if name == "block_topk":
        return [x.detach() for x in out]
    finite = [x.masked_fill(x.isneginf(), 0.0) for x in out]
    total: Any = sum(
        (x * torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)).sum() for x in finite
    )
    return [*(x.detach() for x in finite), *torch.autograd.grad(total, list(leaves.values()))]
