"""Attention to compare mechanisms with: random blocks, the exact best keys, and all keys alike.

Each converts a network as a mechanism does. The first two are not in the registry, since nobody should use
them; they read 48 patches at most for each query, like most mechanisms at their defaults; prefix tokens
are read by all and see all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xattn.attention.base import Entry, Mechanism, with_entry
from xattn.attention.inputs import Inputs
from xattn.attention.mechanisms.controls import Uniform
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.patterns import pattern_operator
from xattn.attention.operators.pooled_blocks import pooled_blocks
from xattn.attention.selection import Blocks


class RandomBlocks(Mechanism):
    """The own tile of 4 x 4 patches and others drawn at random, for each head: what choosing is worth.

    Args:
        block: side of a tile; ``selected``: tiles that a query's tile reads, its own among them.
    """

    def __init__(
        self, dim: int, num_heads: int, block: int = 4, selected: int = 3, *, backend: str = "auto"
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.block, self.selected = block, selected
        self.seed = int(torch.randint(2**31, (), device="cpu"))  # differs from layer to layer

    def operator(self, inputs: Inputs) -> Operator:
        assert inputs.grid is not None
        blocks = pooled_blocks(
            inputs.grid, self.block, self.block, self.block, inputs.prefix, False, inputs.q.device
        )
        count = blocks.count
        generator = torch.Generator().manual_seed(self.seed)
        score = torch.rand(1, self.num_heads, count, count, generator=generator, device="cpu")
        score.diagonal(dim1=2, dim2=3).fill_(2.0)
        index = score.topk(min(self.selected, count), -1).indices.int().to(inputs.q.device)
        pattern = blocks.pattern(Blocks(index, blocks.q_block, blocks.k_block))
        return pattern_operator(inputs, pattern, backend=self.backend)


class ExactTopK(Mechanism):
    """The ``keys`` patches with the highest scores, found by computing all: what any choice can reach."""

    def __init__(self, dim: int, num_heads: int, keys: int = 48, *, backend: str = "auto") -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.keys = keys

    def operator(self, inputs: Inputs) -> Operator:
        q, k, prefix = inputs.q, inputs.k, inputs.prefix
        with torch.no_grad():
            scores = q[:, :, prefix:] @ k[:, :, prefix:].transpose(-2, -1)
            least = scores.topk(min(self.keys, scores.shape[-1]), -1).values[..., -1:]
            mask = torch.zeros_like(scores).masked_fill_(scores < least, -torch.inf)
            mask = F.pad(mask, (prefix, 0, prefix, 0))
        return SoftmaxOperator(q, k, inputs.scale, mask, backend=self.backend, every_row=True)


with_entry(RandomBlocks, Entry("random blocks", "a control", "N s B D", grid=(2,)))
with_entry(ExactTopK, Entry("exact top-k", "a control", "N^2 D"))
CONTROLS = (RandomBlocks, ExactTopK, Uniform)
