"""Agent attention: a few pooled queries, the agents, read all keys, and then all queries read the agents.

    A = softmax(q a^T / sqrt(D) + B2) softmax(a k^T / sqrt(D) + B1),   a = pooled grid of queries

With n agents, A has a rank of at most n, and the layer takes 4 N n D operations. A depthwise 3x3
convolution of the values is added to A V to restore local detail. Prefix tokens act as queries and keys,
but they are not pooled into agents. The method is from Han et al., arXiv 2312.08874.

``training_free`` selects the form that the authors insert into trained diffusion models. It has neither
biases nor a convolution; instead, the softmax over the agents is sharper, and a share of the values is
added to the output. With this form, a trained classifier loses most of its accuracy
(``python -m xattn.eval.studies swap``), so agent attention in a classifier has to be trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import (
    Mechanism,
    Size,
    check_whole,
    merge_heads,
    register_attention,
    split_heads,
)
from xattn.attention.inputs import Inputs
from xattn.attention.operators.algebra import ProductOperator
from xattn.attention.operators.base import Operator, SoftmaxOperator

SIDE = 7  # side of the coarse biases, which are interpolated to the grid


@register_attention(
    "agent",
    paper="arXiv 2312.08874",
    complexity="N n D",
    grid=(2,),
    cases=({"agents": 4, "window": (3, 3)}, {"agents": 9, "training_free": True}),
    bench=({"agents": 49, "training_free": True},),
    size=Size(
        "agents", "Agents", "Agents", (4, 9, 16, 25, 49, 100), 16, options={"training_free": True}
    ),
    studies={
        "swap": (
            {"options": {"agents": 49}},
            {"options": {"agents": 49, "training_free": True}},
            {"options": {"agents": 49, "training_free": True}, "share": 1 / 4},
            {"options": {"agents": 196, "training_free": True}},
            {"options": {"agents": 196, "training_free": True}, "share": 1 / 4},
        ),
        "attention-maps": {"channels": {"agents": ("no.", (9, 24, 39))}},
    },
)
class Agent(Mechanism):
    """Agent attention on a 2-D grid.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        agents: n, the number of agents; it must be a square number.
        window: (height, width) of the grid for which the biases of rows and columns are learned. On grids
            of another size, they are interpolated.
        training_free: whether to use the training-free form that the module docstring describes.

    Raises:
        ValueError: if ``agents`` is not a square number, or ``window`` is not a pair.
    """

    reads = ("values",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agents: int = 49,
        window: tuple[int, int] = (14, 14),
        training_free: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.side = math.isqrt(check_whole("agents", agents))
        if self.side**2 != agents:
            raise ValueError(f"agents: got {agents}; give a square number, for example 49")
        self.agents, self.training_free = agents, training_free
        if training_free:
            return
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise ValueError(f"window: got {window!r}; give (height, width) of the grid")
        h, w = (check_whole("window", side) for side in window)
        shapes = {
            "an": (agents, SIDE, SIDE), "ah": (agents, h), "aw": (agents, w), "ac": (agents,),
            "na": (agents, SIDE, SIDE), "ha": (agents, h), "wa": (agents, w), "ca": (agents,),
        }  # fmt: skip
        self.bias = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(num_heads, *shape)) for name, shape in shapes.items()}
        )
        for parameter in self.bias.values():
            nn.init.trunc_normal_(parameter, std=0.02)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def operator(self, inputs: Inputs) -> Operator:
        q, k, grid, prefix = inputs.q, inputs.k, inputs.grid, inputs.prefix
        assert grid is not None and inputs.scale is not None
        patches = q[:, :, prefix:].transpose(2, 3).unflatten(3, grid).flatten(0, 1)
        if torch.compiler.is_compiling():  # compiled code assumes the strides of a contiguous map
            patches = patches.contiguous()
        pooled = F.adaptive_avg_pool2d(patches, self.side).flatten(2).transpose(1, 2)
        agents = pooled.unflatten(0, q.shape[:2])
        scale = inputs.scale
        if self.training_free:
            first, second, last = None, None, scale**0.3
        else:
            first = self._bias("a", grid, prefix).to(q.dtype)[None]
            second = self._bias("", grid, prefix).to(q.dtype)[None].transpose(2, 3)
            last = scale
        return ProductOperator(
            [
                SoftmaxOperator(q, agents, last, second, None, self.backend, every_row=True),
                SoftmaxOperator(agents, k, scale, first, None, self.backend, every_row=True),
            ]
        )

    def _bias(self, side: str, grid: tuple[int, ...], prefix: int) -> Tensor:
        """Return a bias as (H, n, N): B1, with which agents read keys, if ``side`` is "a"; otherwise B2
        transposed."""
        names = ("an", "ah", "aw", "ac") if side else ("na", "ha", "wa", "ca")
        coarse, rows, columns, class_token = (self.bias[name] for name in names)
        size = (grid[0], grid[1])
        full = F.interpolate(coarse, size, mode="bilinear")
        full = full + _resize(rows, size[0])[..., None] + _resize(columns, size[1])[..., None, :]
        return torch.cat([class_token[..., None].expand(-1, -1, prefix), full.flatten(2)], 2)

    def local(self, inputs: Inputs) -> Tensor:
        v, grid, prefix = inputs.v, inputs.grid, inputs.prefix
        if self.training_free:
            return 0.075 * v
        assert grid is not None
        patches = merge_heads(v[:, :, prefix:]).transpose(1, 2).unflatten(2, grid)
        out = split_heads(self.depthwise(patches).flatten(2).transpose(1, 2), self.num_heads)
        return F.pad(out, (0, 0, prefix, 0))

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``agents``, the attention of each agent to the patches, averaged over heads:
        (B, n, h, w)."""
        assert isinstance(operator, ProductOperator) and inputs.grid is not None
        reads = operator.factors[1].tile(slice(None), slice(inputs.prefix, None)).mean(1)
        return {"agents": reads.unflatten(-1, inputs.grid)}


def _resize(table: Tensor, length: int) -> Tensor:
    """Resize a table (H, n, L) to (H, n, length) by linear interpolation."""
    if table.shape[-1] == length:
        return table
    return F.interpolate(table, length, mode="linear")
