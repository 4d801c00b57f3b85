"""Base class and registry of blocks, which can mix tokens in ways that are not of the form A(q, k, v).

    block = create_block("attention", 384, mechanism="gna", num_heads=6)
    y = block(x, grid=(14, 14), prefix=1)

A mechanism of :mod:`xattn.attention` receives queries, keys and values from its layer. A block receives
only the tokens and may do anything with them: gates, token MLPs, kernels of coordinates, routed heads. Its
operator, if it has one, and its own maps show how it mixed the tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from xattn.attention.base import check_whole, merge_heads, split_heads
from xattn.attention.operators.base import Operator
from xattn.attention.positions import check_grid
from xattn.attention.record import Call, mix, record, record_call, recording
from xattn.registry import Registry, with_entry


@dataclass(frozen=True)
class BlockEntry:
    """The registry's entry for a block.

    Example:
        >>> from xattn.blocks import create_block, list_blocks
        >>> create_block("ninformer", 32, grid=(3, 3)).entry.name
        'ninformer'
    """

    name: str
    paper: str
    complexity: str
    """Time complexity for N tokens of width C."""
    grid: tuple[int, ...] = (0,)
    """Numbers of grid dimensions that it supports; 0 means any tokens, without a grid."""
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Options used in tests, on a grid of 5 x 6 tokens of width 32."""


class Block(nn.Module, ABC):
    """A module that maps tokens (B, N, C) to tokens (B, N, C): ``block(x, grid, prefix)``.

    A subclass defines :meth:`run` and, if it has an operator or maps, :meth:`operator` and :meth:`maps`.
    The tokens are ``prefix`` class or register tokens, followed by the grid in raster order.

    Under :func:`xattn.attention.record`, a block is recorded like an attention layer. All calls that
    attention layers or :meth:`mix` record while the block runs belong to the block. If there are no such
    calls and the block has an operator A, one call is recorded for the whole block. Its value is x and its
    output is y, split into as many heads as A has; A V equals this output only to the extent that A
    describes how y depends on x.

    Args:
        dim: C, width of the tokens.

    Example:
        >>> import torch
        >>> from xattn.blocks import create_block
        >>> block = create_block("attention", 32, mechanism="softmax", num_heads=4)
        >>> block(torch.rand(2, 9, 32), grid=(3, 3)).shape
        torch.Size([2, 9, 32])
    """

    entry: ClassVar[BlockEntry]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = check_whole("dim", dim)

    @abstractmethod
    def run(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Tensor:
        """The block's output (B, N, C), with its residuals."""

    def operator(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Operator | None:
        """The operator (B, H, N, N) that mixes the tokens x, without the residual: the matrix that
        multiplies them, or the Jacobian over tokens; None if there is no such matrix. H divides C. Losses
        for training go into its ``aux``."""
        return None

    def maps(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> dict[str, Tensor]:
        """The block's own maps of tokens x: a dict from names to (B, K, h, w)."""
        return {}

    def forward(self, x: Tensor, grid: Sequence[int] | None = None, prefix: int = 0) -> Tensor:
        """(B, N, C) -> (B, N, C).

        Raises:
            ValueError: the tokens have the wrong width, or the grid or prefix does not fit them.
        """
        sides = None if grid is None else tuple(grid)
        self.check(x, sides, prefix)
        if not recording():
            return self.run(x, sides, prefix)
        with record() as inside:
            y = self.run(x, sides, prefix)
        return y if inside else self._keep(x, y, sides, prefix)

    def mix(
        self,
        operator: Operator,
        value: Tensor,
        maps: Callable[[], dict[str, Tensor]] = dict,
    ) -> Tensor:
        """The product ``A V`` (B, H, N, Dv) for ``value`` (B, H, N, Dv). A block that mixes tokens with an
        operator calls this method in :meth:`run`. If attention is recorded, the product is stored as a
        call, with the result of ``maps()``, which runs on first access."""
        return mix(self.entry.name, operator, value, maps)

    def _keep(self, x: Tensor, y: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Tensor:
        """``y``, passed through the output of the recorded call, so that gradients reach it."""
        with record(alone=True):  # what it runs is not part of the model
            operator = self.operator(x, grid, prefix)
        if operator is None:
            return y
        heads, seen = operator.shape[1], x.detach()
        output = split_heads(y, heads)

        @torch.no_grad()
        def maps() -> dict[str, Tensor]:
            with record(alone=True):
                return self.maps(seen, grid, prefix)

        value = split_heads(seen, heads)
        record_call(Call(operator.detach(), value, output, dict(operator.aux), maps))
        return merge_heads(output)

    def check(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> None:
        """Raise a ``ValueError`` that names what does not fit."""
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x: got {tuple(x.shape)}; {self.entry.name} needs (B, N, {self.dim})")
        check_grid(self.entry.name, self.entry.grid, grid, prefix, x.shape[1])


def received_attention(operator: Operator) -> Tensor:
    """The attention that every token receives: the mean of A over its rows, (B, H, S)."""
    batch, _, n, _ = operator.shape
    return operator.vecmat(torch.full((batch, 1, n), 1 / n, device=operator.device))[:, :, 0]


BLOCKS: Registry[Block, BlockEntry] = Registry(
    "xattn.blocks",
    base=Block,
    homes=("xattn.blocks",),
    argument="name",
    noun="block",
    options_argument="options",
    given=("dim",),
    mark=with_entry,
)
Made = TypeVar("Made", bound=Block)


def register_block(
    name: str, *, paper: str = "none", complexity: str = "not stated", **properties: Any
) -> Callable[[type[Made]], type[Made]]:
    """Class decorator: register a block under ``name``; ``properties`` are fields of :class:`BlockEntry`.

    Raises:
        ValueError: another block has this name.

    Example:
        >>> import torch
        >>> from xattn.blocks import Block, create_block
        >>> from xattn import register_block
        >>> @register_block("identity_again", complexity="N C")
        ... class Identity(Block):
        ...     def run(self, x, grid, prefix):
        ...         return x
        >>> create_block("identity_again", 32)(torch.ones(1, 9, 32), (3, 3)).shape
        torch.Size([1, 9, 32])
    """
    return BLOCKS.register(BlockEntry(name, paper, complexity, **properties))


list_blocks = BLOCKS.names
block_class = BLOCKS.get


def create_block(name: str, dim: int, **options: Any) -> Block:
    """Create a block for tokens of width ``dim``, with its own ``options``.

    Raises:
        ValueError: the name is unknown (the message lists near matches), an option is unknown, or values do
            not fit.

    Example:
        >>> import torch
        >>> from xattn.blocks import create_block
        >>> block = create_block("attention", 32, mechanism="agent", num_heads=4)
        >>> block(torch.rand(1, 9, 32), (3, 3)).shape
        torch.Size([1, 9, 32])
    """
    return BLOCKS.create(name, dim, **options)
