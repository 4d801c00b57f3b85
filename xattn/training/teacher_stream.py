"""What the attention layers of a network compute in a pass: their inputs, rows and outputs.

A layer that is distilled gets what the trained network itself gives it, so all layers learn side by side,
in one pass and without the errors of those before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.attention import Call, Inputs, Mechanism, Operator, SoftmaxOperator
from xattn.attention.record import own_layer, record_layers
from xattn.backbone import Backbone


class LayerPass(NamedTuple):
    """One attention layer in one pass."""

    args: tuple[Any, ...]
    """What the layer was called with: its tokens (B, N, C), and whatever else the model gives it."""
    kwargs: dict[str, Any]
    call: Call
    result: Tensor
    """What the layer returned, (B, N, C)."""

    def inputs(self, grid: tuple[int, ...] | None, prefix: int) -> Inputs:
        """What a mechanism gets in this layer, for queries, keys and values of a softmax layer."""
        operator = self.call.operator
        assert isinstance(operator, SoftmaxOperator)
        tokens = operator.shape[2]
        if operator.causal:
            grid, prefix = (tokens,), 0
        elif grid is not None and math.prod(grid) != tokens - prefix:
            grid = None
        x = self.args[0] if self.args and isinstance(self.args[0], Tensor) else None
        q, k, v = operator.q, operator.k, self.call.value
        return Inputs(q, k, v, x, grid, prefix, operator.scale, operator.causal)


class Attended(NamedTuple):
    """A mechanism on one layer's inputs, inside the graph of its parameters."""

    operator: Operator
    output: Tensor
    """A V and what the mechanism adds to it, (B, H, N, Dv)."""


def attended(mechanism: Mechanism, inputs: Inputs) -> Attended:
    """Run ``mechanism``, and keep its operator inside the graph."""
    inputs = mechanism.accepted(inputs)
    with own_layer():
        operator = mechanism.operator(inputs)
        output, local = operator.matvec(inputs.v), mechanism.local(inputs)
    return Attended(operator, output if local is None else output + local)


def grid_of(backbone: Backbone, images: Tensor) -> tuple[int, ...] | None:
    """The patches' grid of ``images`` (B, 3, H, W), where the model tells it."""
    if not backbone.knows_grid:
        return None
    height, width = images.shape[-2:]
    rows, columns = backbone.grid(height, width)
    return int(rows), int(columns)


@contextmanager
def layer_passes(backbone: Backbone, layers: Iterable[int]) -> Iterator[dict[int, LayerPass]]:
    """Inside, a pass of ``backbone`` fills the yielded dict, by number of the layer.

    The thread has the network to itself in the block. Each layer must attend once a pass.
    """
    found: dict[int, LayerPass] = {}
    blocks: Any = backbone.model.blocks

    def after(i: int, args: Any, kwargs: Any, calls: list[Call], result: Tensor) -> None:
        found[i] = LayerPass(args, kwargs, calls[0], result)

    attention = {i: blocks[i].attn for i in layers}
    with backbone.alone(), record_layers(backbone.model, attention, after):
        yield found


def sampled_rows(tokens: int, most: int, seed: int, step: int) -> Tensor:
    """At most ``most`` of the tokens 0..tokens - 1 in rising order, a pure function of (seed, step)."""
    if tokens <= most:
        return torch.arange(tokens, device="cpu")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return torch.randperm(tokens, generator=generator, device="cpu")[:most].sort().values
