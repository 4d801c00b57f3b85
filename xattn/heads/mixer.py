"""Attention layers between a tap and a head: x <- x + Attention(LN(x)), trained with the head.

Any mechanism of :func:`~xattn.attention.create_attention` will do. There is no MLP: the layers only mix
tokens, so that a head which reads each token by itself may read their surroundings. The last projection
starts at zero, and the untrained layers are the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor, nn

from xattn.attention import Call, create_attention, record
from xattn.backbone import Backbone
from xattn.heads.cross_attention import head_count
from xattn.heads.options import Where

Depth: TypeAlias = Annotated[int, Where(lambda n: 1 <= n <= 64, "an int from 1 to 64")]
SHARES = (
    "shares of mixed tokens: each place holds what its token, after the layers of mixer={name!r}, "
    "contributes; what these layers brought there from other tokens is not traced back"
)


class Mixer(nn.Module):
    """``depth`` pre-norm residual attention layers on the tokens of a tap.

    Args:
        name: of a mechanism, see :func:`~xattn.attention.list_attention`.
        width: C of the tokens.
        options: of :func:`~xattn.attention.create_attention`, for example ``{"kernel": 7}``;
            ``num_heads`` by default as :func:`~xattn.heads.cross_attention.head_count` says.

    Raises:
        ValueError: as :func:`~xattn.attention.create_attention`.
    """

    def __init__(self, name: str, width: int, depth: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.name = name
        own = {"num_heads": head_count(width, None), **options}
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(depth))
        layers = [create_attention(name, width, **own) for _ in range(depth)]
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            nn.init.zeros_(layer.proj.weight)
            if layer.proj.bias is not None:
                nn.init.zeros_(layer.proj.bias)
        self._losses: list[Tensor] = []

    def forward(self, x: Tensor, grid: Sequence[int], prefix: int = 0) -> Tensor:
        """(B, prefix + h w, C) -> the same; ``grid`` is (h, w)."""
        watching = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        recording: AbstractContextManager[list[Call]] = (
            record(alone=True) if watching else nullcontext([])
        )
        with recording as calls:
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = x + layer(norm(x), tuple(grid), prefix)
        self._losses = [loss for call in calls for loss in call.aux.values()]
        return x

    def take_losses(self) -> Tensor | float:
        """The sum of what the mechanisms asked training to add in the last call, once; 0 without any."""
        found, self._losses = self._losses, []
        return torch.stack(found).sum() if found else 0.0


def create_mixer(
    name: str, depth: int, options: Mapping[str, Any] | None, backbone: Backbone, prefix: int
) -> Mixer:
    """A mixer for the last tap of ``backbone``, tried on its grid.

    Args:
        prefix: how many prefix tokens stand before the patches.

    Raises:
        ValueError: the mechanism is unknown, refuses its options, or does not fit the tap.
    """
    if options and "dim" in options:
        raise ValueError("mixer_options: got 'dim'; the width is the tap's, leave it out")
    (height, width), channels = backbone.tap_sizes[-1], backbone.channels[-1]
    try:
        mixer = Mixer(name, channels, depth, options or {})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"mixer: {name!r} with mixer_options={dict(options or {})} is refused ({_line(error)}); "
            f"see xattn.create_attention"
        ) from None
    if next(mixer.parameters()).is_meta:
        return mixer
    try:
        with torch.no_grad(), record(alone=True):
            mixer.eval()(torch.zeros(1, prefix + height * width, channels), (height, width), prefix)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"mixer: {name!r} does not fit the tap {backbone.taps[-1]!r}, whose grid is {height} x "
            f"{width} with {prefix} prefix tokens ({_line(error)}); change mixer_options, or choose "
            f"another mixer"
        ) from None
    return mixer.train()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
