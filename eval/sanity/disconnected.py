"""Makes networks for mosaics whose classifier uses only one cell, so that no other cell can be evidence.

    full    every layer processes each cell separately; the logits are those of the cell alone, f(x_i)
    part    only the pooling is changed; it averages one cell of the last feature map

In both cases, the feature maps keep the layout of the mosaic, so any explainer can be used. In ``part``,
receptive fields cross the borders between cells. Rao, Boehle and Schiele 2022, arXiv 2205.10435.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xattn.backbone import Backbone
from xattn.eval.metrics.board.masks import join_cells, split_cells
from xattn.runtime.copies import shared_copy

KINDS = ("full", "part")
_POOLS = ("global_pool", "avgpool")
_SPATIAL = (
    "SqueezeExcite",
    "SEModule",
    "EffectiveSEModule",
    "GlobalResponseNorm",
    "SqueezeExcitation",
)


def disconnected(backbone: Backbone, kind: str, n: int, cell: int) -> Backbone:
    """A copy of a CNN, with the same weights, that classifies one ``cell`` of a mosaic of n x n cells.

    Args:
        kind: "full" or "part", see the module.
        cell: the number of the cell; cells are counted row by row from 0.

    Raises:
        ValueError: an argument is out of range, or the network does not end with a single pooling of a
            feature map.
    """
    if kind not in KINDS or n < 1 or not 0 <= cell < n * n:
        raise ValueError(
            f"kind, n, cell: got {kind!r}, {n}, {cell}; give full or part, and a cell of n x n"
        )
    twin = shared_copy(backbone)
    pools = [m for name, m in twin.model.named_modules() if name.rsplit(".")[-1] in _POOLS]
    if len(pools) != 1 or backbone.has_grid:
        raise ValueError(
            f"backbone: {backbone.name} has no single pooling of its last feature map; choose a CNN"
        )

    def split(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (split_cells(args[0], n), *args[1:])

    def join(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return join_cells(out, n)

    def only(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        cells = split_cells(args[0], n)
        return (cells[cell :: n * n], *args[1:])

    for module in twin.model.modules() if kind == "full" else ():
        if _is_spatial(module) and module not in pools:
            module.register_forward_pre_hook(split)
            module.register_forward_hook(join, prepend=True)
    pools[0].register_forward_pre_hook(only)
    return twin


def _is_spatial(module: nn.Module) -> bool:
    """Whether an output of a module depends on several places of the input feature map."""
    if type(module).__name__ in _SPATIAL:
        return True
    side: Any = getattr(module, "kernel_size", 1)
    is_leaf = next(module.children(), None) is None
    return is_leaf and max(side if isinstance(side, tuple) else (side,)) > 1
