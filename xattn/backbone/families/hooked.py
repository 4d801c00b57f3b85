"""Backbones for modules that ``torch.fx`` cannot trace: they run unchanged, with hooks on some submodules.

    backbone = load_backbone(net)                     # whose forward depends on values
    backbone = load_backbone(net, taps=["stage4"])

A tap is the output of a submodule's last call in the pass. The hooks are set on the frozen copy that
``load_backbone`` makes, never on the caller's module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from xattn.backbone.families.traced import (
    AdaptedClassifier,
    as_map,
    coarsest,
    grid_of,
    module_class_names,
    module_preprocessing,
    steps_of,
)
from xattn.photos.classes import Task
from xattn.photos.preprocessing import channels_of, first_convolution
from xattn.runtime.names import did_you_mean

_FOUND: ContextVar[dict[_Keep, Tensor | None] | None] = ContextVar("found", default=None)


class _Keep:
    """A forward hook that keeps a module's output, or the first tensor of a tuple.

    It acts only in passes of its own classifier, because other classifiers may share the network."""

    def __init__(self) -> None:
        self.point = nn.Identity()  # the tensor of a tuple passes through it, for CAMs

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        tensor = _tensor_of(output)
        if tensor is not None and type(output) is tuple:
            led = self.point(tensor)
            output = tuple(led if one is tensor else one for one in output)
            tensor = led
        found = _FOUND.get()
        if found is not None and self in found:
            # A copy, because later layers may work in place.
            found[self] = None if tensor is None else tensor.clone()
        return output


def _tensor_of(output: Any) -> Tensor | None:
    """Return a module's output, or the first tensor of a tuple, as blocks of `transformers` return it."""
    if type(output) is tuple:
        return next((one for one in output if isinstance(one, Tensor)), None)
    return output if isinstance(output, Tensor) else None


def _logits_of(answer: Any) -> Any:
    """Return the only (B, K) tensor in a network's outputs: MONAI's ViT also returns its blocks' outputs.

    If there is no such tensor, or if there are several, the outputs are returned as they are.
    """
    if not isinstance(answer, tuple | list):
        return answer
    found = [one for one in answer if isinstance(one, Tensor) and one.ndim == 2]
    return found[0] if len(found) == 1 else answer


class HookedClassifier(AdaptedClassifier):
    """A :class:`~xattn.backbone.TapModule`; created by :func:`from_hooks`.

    Attributes:
        task: the task if it is known, or None.
        called: the modules that a pass calls and that return tensors.
    """

    task: Task | None = None
    called: frozenset[nn.Module] = frozenset()

    def __init__(
        self, net: nn.Module, taps: Sequence[str], in_tuple: bool = False, **facts: Any
    ) -> None:
        super().__init__(taps, **facts)
        self.net, self.in_tuple = net, in_tuple
        self.keepers = [_Keep() for _ in self.tap_names]
        for path, keeper in zip(self.tap_names, self.keepers, strict=True):
            net.get_submodule(path).register_forward_hook(keeper)
        self.point = self.keepers[-1].point

    @property
    def gradcam_layer(self) -> nn.Module:
        """The module of the last tap or, if that module returns a tuple, an identity after it."""
        return self.point if self.in_tuple else self.net.get_submodule(self.tap_names[-1])

    def forward(self, x: Tensor) -> Tensor:
        return _logits_of(self.net(x))  # type: ignore[no-any-return]

    def forward_taps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        found: dict[_Keep, Tensor | None] = dict.fromkeys(self.keepers)
        token = _FOUND.set(found)
        try:
            logits = _logits_of(self.net(x))
        finally:
            _FOUND.reset(token)
        kept = [value for value in found.values() if value is not None]
        if len(kept) < len(found):
            named = zip(self.tap_names, found.values(), strict=True)
            missing = next(name for name, value in named if value is None)
            raise ValueError(
                f"taps: {missing!r} is not called in this pass of {type(self.net).__name__}; give a "
                f"module that every pass calls"
            )
        return logits, self.as_maps(kept)


def from_hooks(
    model: nn.Module,
    taps: Sequence[str] | None = None,
    *,
    input_size: tuple[int, int] | None = None,
    frames: int | None = None,
    kind: str = "",
    time_last: bool = False,
) -> HookedClassifier:
    """Prepare ``model`` for ``load_backbone``; hooks are added permanently, so pass a copy.

    Args:
        model: in eval mode; maps normalised images (B, 3, H, W) or clips (B, 3, T, H, W) to logits (B, K).
        taps: paths of modules that return maps (B, C, h, w) or tokens (B, N, C). The defaults are found
            in one pass on random images: of the maps on which the logits depend, the last one on each of
            the three coarsest grids. In a network of tokens, the defaults are the last outputs in which
            every patch still affects the logits; in a ViT, these are the outputs of the norm before
            attention in the last three blocks.
        input_size: (H, W) in pixels; by default from ``model.preprocessing``.
        frames: T of a clip; by default from ``model.preprocessing``, or 16 for a network of 3-D
            convolutions.
        kind: the name of the module in error messages; by default the name of its class.
        time_last: whether time is the fastest-varying index in the token order of a clip.

    Raises:
        ValueError: if the module does not take images or return logits, or a tap is unknown or not a map.
    """
    preprocessing, assumed = module_preprocessing(model, None, input_size, frames)
    size, kind = preprocessing.places, kind or type(model).__name__
    logits, outputs, tuples = _run(model, size, channels_of(model, preprocessing), kind)
    shapes = {path: tuple(output.shape) for path, output in outputs.items()}
    steps = steps_of(shapes.values(), size)
    if taps is None:
        leading = {
            path: gradient
            for path, gradient in _leading(logits, outputs).items()
            if getattr(model.get_submodule(path), "is_layer", True)  # False for some ONNX operators
        }
        taps = coarsest({path: shape for path, shape in shapes.items() if path in leading}, size)
        layers = dict(model.named_modules())
        norms = {p: g for p, g in leading.items() if not isinstance(layers[p], nn.Linear)}
        taps = taps or _token_taps(norms, size, steps)
        if not taps:
            raise ValueError(
                f"taps: no module of {kind} gives a map (B, C, h, w), or tokens (B, N, C) on a grid, on "
                f"which its logits depend; give taps, or give it a method forward_taps(x) -> (logits, maps)"
            )
    for tap in taps:
        if tap not in shapes:
            others = f"the last ones are {', '.join(list(shapes)[-5:])}"
            raise ValueError(
                f"taps: {kind} calls no module {tap!r} that returns a tensor; "
                f"{did_you_mean(tap, shapes, others)}"
            )
    grids = [grid_of(tap, shapes[tap], size, steps) for tap in taps]
    last = grids[-1]
    heads = [m for p, m in model.named_modules() if p in outputs and outputs[p] is logits]
    made = HookedClassifier(
        model,
        taps,
        taps[-1] in tuples,
        classifier=heads[-1] if heads else None,
        preprocessing=preprocessing,
        grids=grids,
        prefix=0 if last is None else shapes[taps[-1]][1] - math.prod(last),
        steps=steps,
        time_last=time_last,
    )
    made.assumes_preprocessing = assumed
    made.called = frozenset(model.get_submodule(path) for path in outputs)
    made.class_names = module_class_names(model)
    return made


@torch.inference_mode(False)
@torch.enable_grad()
def _run(
    model: nn.Module, size: tuple[int, ...], channels: int, kind: str
) -> tuple[Tensor, dict[str, Tensor], set[str]]:
    """Run one pass on random images.

    Return the logits (2, K); the last tensor that each module returned, by path, in the order in which the
    modules returned; and the paths of modules that return tuples."""
    outputs: dict[str, Tensor] = {}
    tuples: set[str] = set()

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.pop(path, None)
            if (tensor := _tensor_of(output)) is not None:
                outputs[path] = tensor
            if type(output) is tuple:
                tuples.add(path)

        return hook

    weight = next(model.parameters(), torch.zeros((), device="cpu"))
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, channels, *size, generator=draw, device="cpu").to(weight)
    handles = [m.register_forward_hook(keep(path)) for path, m in model.named_modules() if path]
    try:
        logits = _logits_of(model(images.requires_grad_()))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        first = first_convolution(model)
        if first is not None and first.in_channels not in (channels, 3) and "channels" in reason:
            raise ValueError(
                f"mean: {kind} reads images of {first.in_channels} channels; give mean= and std= with "
                f"{first.in_channels} numbers"
            ) from error
        options = "" if len(size) == 2 else " and frames="
        raise ValueError(
            f"model: {kind} fails on images {tuple(images.shape)} "
            f"({type(error).__name__}: {reason}); give input_size={options}, or give it a method "
            f"forward_taps(x) -> (logits, maps)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim not in (1, 2) or len(logits) != 2:
        raise ValueError(f"model: {kind} does not end in logits (B, K)")
    return logits, outputs, tuples


def _leading(logits: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the gradients of the logits with respect to the outputs, by path; if there is no gradient,
    return the outputs themselves."""
    followed = {path: output for path, output in outputs.items() if output.requires_grad}
    with suppress(RuntimeError):
        ones, tensors = torch.ones_like(logits), list(followed.values())
        found = torch.autograd.grad(logits, tensors, ones, allow_unused=True)
        return {path: grad for path, grad in zip(followed, found, strict=True) if grad is not None}
    return outputs


def _token_taps(gradients: Mapping[str, Tensor], size: tuple[int, ...], steps: int) -> list[str]:
    """Return the paths of the tokens to tap.

    Of the tokens that the logits need, these are the last on each of the three coarsest grids or, if there
    is only one grid, the last three with the same name. After the last attention, the logits may need only
    a class token.

    Args:
        gradients: gradients of tokens (2, N, C) by path, in the order of the pass.
        size, steps: as in :func:`~xattn.backbone.families.traced.grid_of`.
    """
    grids: dict[str, tuple[int, ...]] = {}
    for path, gradient in gradients.items():
        with suppress(ValueError):
            grid = grid_of(path, tuple(gradient.shape), size, steps)
            if grid and min(grid[-2:]) > 1 and as_map(gradient, grid).count_nonzero((0, 1)).all():
                grids[path] = grid
    last = {grid: path for path, grid in grids.items()}
    if len(last) == 1:
        named = [re.sub(r"\d+", "#", path) for path in grids]
        return [path for path, name in zip(grids, named, strict=True) if name == named[-1]][-3:]
    return [last[grid] for grid in sorted(last, key=math.prod)[:3]][::-1]
