"""Compares softmax pooling with the two matrix products that it cannot avoid, forward and backward.

    s = q k^T,   o = s v      beside      o = softmax(q k^T / sqrt(D)) v

Each image has 32 queries over T tokens of width D, with keys and values in two tensors. "all" computes
gradients of queries, keys and values; "queries" only those of the queries, as on a frozen backbone. Memory
is the peak, including inputs, relative to the products' inputs, outputs and gradients. Times and ratios are
in processor time over all threads; the wall-clock ratio is shown beside them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from xattn.kernels.pooling import softmax_pooling
from xattn.runtime.measuring import Job, median_ratio, peak_memory, processor_clock, times

QUERIES, BATCH = 32, 8
MOST_TIME, MOST_MEMORY, FROM = 1.15, 1.5, 4096  # largest ratios, from FROM tokens on

Pool = Callable[[Tensor, Tensor, Tensor], Tensor]


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2)) @ v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)).softmax(-1) @ v


def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_pooling(q, k, v[:, None])[0]


def rows(tokens: Sequence[int], rounds: int, width: int = 768, batch: int = BATCH) -> Iterator[str]:
    """Yield the lines of the table as they are measured."""
    yield (
        f"\npooling with {QUERIES} queries, D = {width}, batch {batch}, float32; of: two matrix "
        f"products\n"
    )
    yield "| N | gradients | products ms | plain ms | op ms | op / products | wall clock | memory | holds |"
    yield "| --: | :-- | --: | --: | --: | --: | --: | --: | :-- |"
    for count in tokens:
        for wanted in ("all", "queries"):
            yield _row(count, width, batch, wanted, rounds)


def _row(tokens: int, width: int, batch: int, wanted: str, rounds: int) -> str:
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def normal(count: int) -> Tensor:
        return torch.randn(batch, count, width, generator=generator).to(device)

    q, k, v, grad = normal(QUERIES), normal(tokens), normal(tokens), normal(QUERIES)
    leaves = [q, k, v] if wanted == "all" else [q]
    for leaf in leaves:
        leaf.requires_grad_()

    def step(pool: Pool) -> Job:
        return lambda: torch.autograd.grad(pool(q, k, v), leaves, grad)

    jobs = {name: step(pool) for name, pool in (("1", products), ("2", plain), ("3", pooled))}
    of = f"{tokens} tokens, gradients of {wanted}"
    took = times(jobs, rounds, 2, processor_clock(), of=of)
    ratio = median_ratio(took["3"], took["1"])
    wall = times({name: jobs[name] for name in ("1", "3")}, rounds, of=f"{of}, by the wall clock")
    waited = median_ratio(wall["3"], wall["1"])
    inputs = _bytes(q, k, v, grad)
    outputs = _bytes(grad, *leaves) + 4 * batch * QUERIES * tokens
    memory = (inputs + peak_memory(jobs["3"])) / (inputs + outputs)
    cells = [f"{tokens:,}", wanted]
    cells += [f"{1e3 * statistics.median(took[name]):.1f}" for name in jobs]
    cells += [f"{ratio:.2f}x", f"{waited:.2f}x", f"{memory:.2f}x", ""]
    if tokens >= FROM and wanted == "all":
        cells[-1] = "yes" if ratio <= MOST_TIME and memory <= MOST_MEMORY else "no"
    return f"| {' | '.join(cells)} |"


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
