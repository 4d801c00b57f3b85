"""Attention layers between a tap and a head: x <- x + Attention(LN(x)), trained with the head.

It works with any mechanism of :func:`~xattn.attention.create_attention`. There is no MLP: the layers only
mix tokens, so that a head that reads tokens one by one also sees their surroundings. The last projection
starts at zero, so the untrained layers are the identity.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor, nn

from xattn.attention import Call, create_attention, record
from xattn.attention.base import with_layer
from xattn.backbone import Backbone
from xattn.heads.cross_attention import head_count
from xattn.runtime.option_checks import Condition

Depth: TypeAlias = Annotated[int, Condition(lambda n: 1 <= n <= 64, "an int from 1 to 64")]
SHARES = (
    "shares of mixed tokens: each place holds what its token, after the layers of mixer={name!r}, "
    "contributes; what these layers brought there from other tokens is not traced back"
)


UNTAKEN = 64  # largest number of passes whose losses, and graphs, are kept


class Losses(threading.local):
    """Losses added by passes in this thread; they are neither copied nor pickled."""

    def __init__(self) -> None:
        self.passes: list[list[Tensor]] = []

    def __reduce__(self) -> tuple[type[Losses], tuple[()]]:
        return Losses, ()


class Mixer(nn.Module):
    """``depth`` pre-norm residual attention layers on the tokens of a tap.

    Args:
        name: a mechanism, see :func:`~xattn.attention.list_attention`.
        width: C of the tokens.
        options: options of :func:`~xattn.attention.create_attention`, for example ``{"kernel": 7}``;
            the default of ``num_heads`` is that of :func:`~xattn.heads.cross_attention.head_count`.

    Raises:
        ValueError: as in :func:`~xattn.attention.create_attention`.
    """

    def __init__(self, name: str, width: int, depth: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.name = name
        own = {"num_heads": head_count(width, None), **options}
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(depth))
        layers = [create_attention(name, width, **with_layer(name, own, i)) for i in range(depth)]
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            nn.init.zeros_(layer.proj.weight)
            if layer.proj.bias is not None:
                nn.init.zeros_(layer.proj.bias)
        self.asks = False  # whether its mechanisms request additional losses in training
        self._losses = Losses()

    def forward(self, x: Tensor, grid: Sequence[int], prefix: int = 0) -> Tensor:
        """Tokens (B, prefix + h w, C) -> tokens of the same shape; ``grid`` is (h, w).

        Raises:
            ValueError: the mechanism does not fit ``grid``.
        """
        training = self.training and torch.is_grad_enabled()
        compiling = torch.compiler.is_compiling()
        if training and compiling and self.asks:
            _warn_of_compiling()
        recording: AbstractContextManager[list[Call]] = (
            record(alone=True) if training and not compiling else nullcontext([])
        )
        try:
            with recording as calls:
                x = self.mix(x, grid, prefix)
        except ValueError as error:
            raise ValueError(
                f"mixer: {self.name} does not fit tokens {tuple(x.shape)} of a grid {grid[0]} x "
                f"{grid[1]} with {prefix} prefix tokens ({_line(error)}); give images of the size that "
                f"the head was created for, or create it with other mixer_options"
            ) from None
        if training and not compiling:
            self._keep([loss for call in calls for loss in call.aux.values()])
        return x

    def mix(self, x: Tensor, grid: Sequence[int], prefix: int) -> Tensor:
        """Compute :meth:`forward` without losses; errors of the mechanism are raised unchanged."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), tuple(grid), prefix)
        return x

    def _keep(self, losses: list[Tensor]) -> None:
        if losses:
            self._losses.passes.append(losses)
        if len(self._losses.passes) > UNTAKEN:
            self._losses.passes.clear()
            warnings.warn(
                f"mixer: {self.name} asked training to add losses in {UNTAKEN + 1} calls, and nothing "
                f"took them, so they are dropped; add head.auxiliary_loss() to the loss of each step",
                stacklevel=2,
            )

    def take_losses(self) -> Tensor | float:
        """The sum of the losses that the mechanisms have added in this thread since the last call; 0 if
        there are none, and always 0 in compiled code."""
        passes, self._losses.passes = self._losses.passes, []
        found = [loss for losses in passes for loss in losses]
        return torch.stack(found).sum() if found else 0.0


@torch.compiler.assume_constant_result
def _warn_of_compiling() -> None:
    """Warn when the code is compiled, not each time it runs."""
    warnings.warn(
        "mixer: compiled training leaves out the losses that the mixer asks it to add, such as the "
        "balance of a router; train without torch.compile to add them",
        stacklevel=2,
    )


def create_mixer(
    name: str, depth: int, options: Mapping[str, Any] | None, backbone: Backbone, prefix: int
) -> Mixer:
    """Create a mixer for the last tap of ``backbone`` and run it once on that tap's grid.

    Args:
        prefix: number of prefix tokens before the patches.

    Raises:
        ValueError: the mechanism is unknown, rejects its options, or does not fit the tap.
    """
    if options and "dim" in options:
        raise ValueError("mixer_options: got 'dim'; the width is the tap's, leave it out")
    _check_saved(options or {})
    (height, width), channels = backbone.tap_sizes[-1], backbone.channels[-1]
    try:
        mixer = Mixer(name, channels, depth, options or {})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"mixer: {name!r} with mixer_options={dict(options or {})} is rejected ({_line(error)}); "
            f"see xattn.attention.create_attention"
        ) from None
    if next(mixer.parameters()).is_meta:
        return mixer
    try:
        tokens = torch.zeros(1, prefix + height * width, channels)
        with torch.no_grad(), record(alone=True) as calls:
            mixer.eval().mix(tokens, (height, width), prefix)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"mixer: {name!r} does not fit the tap {backbone.taps[-1]!r}, whose grid is {height} x "
            f"{width} with {prefix} prefix tokens ({_line(error)}); change mixer_options, or choose "
            f"another mixer"
        ) from None
    mixer.asks = any(call.aux for call in calls)
    return mixer.train()


def _check_saved(options: Mapping[str, Any]) -> None:
    """Raise unless config.json can store the options."""
    for name, value in options.items():
        if name == "rotate" and not isinstance(value, str | None):
            raise ValueError(
                "mixer_options: got a module as 'rotate'; its layers would share one rotation, and "
                "config.json cannot hold it; give a name, such as 'axial'"
            )
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"mixer_options: got {name}={_line(value)}, which config.json cannot hold; give "
                f"numbers, strings, True, False, None, or lists and dicts of them"
            ) from None


def _line(of: object) -> str:
    return " ".join(str(of).split())[:300]
