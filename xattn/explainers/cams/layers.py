"""The layers that CAM methods read: their activations and gradients as maps (B, C, h, w).

The default is the map that a CNN pools; in a ViT it is the tokens after ``norm1`` of the last block,
without prefix tokens, arranged as a map. Maps of clips are (B, C, t, h, w). Maps of several layers are
combined as in pytorch-grad-cam: each is scaled to [0, 1] by its minimum and maximum and up-sampled to the
image, then they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xattn.backbone import Backbone
from xattn.backbone.families.traced import as_map, grid_fits, token_grid
from xattn.backbone.taps import resized
from xattn.explainers.base import Explainer
from xattn.runtime.copies import copies_of
from xattn.runtime.names import near_names


def axes_of(maps: Tensor) -> tuple[int, ...]:
    """The spatial axes of (B, C, h, w), or the spatial and temporal axes of (B, C, t, h, w)."""
    return tuple(range(2, maps.ndim))


def default_layer(backbone: Backbone, method: str) -> nn.Module:
    """The last map before the classifier; in a network that classifies a token, the input of the last
    attention to that token.

    Raises:
        ValueError: the adapter of the network does not define such a layer.
    """
    layer = backbone.cam_layer
    if layer is None and backbone.adapter:
        layer = getattr(backbone.model, "gradcam_layer", None)
    if layer is None and hasattr(backbone.model, "gradcam_layers"):
        raise ValueError(
            f"explainer: {method!r} reads feature maps, but {backbone.name} provides none; use 'occlusion' "
            f"or another explainer that hides pixels, or 'd_rise' for detections"
        )
    if layer is None and backbone.adapter:
        raise ValueError(
            f"layer: {backbone.name} is not a timm model, so {method} cannot find its last map; "
            f"give layer=<the module whose output is (B, C, h, w), or its dotted name>"
        )
    if layer is not None:
        return layer
    if backbone.is_vit:
        return backbone.model.blocks[-1].norm1  # type: ignore[index,union-attr,return-value]
    model = backbone.model
    if getattr(model, "global_pool", None) == "token" and not hasattr(model, "post_network"):
        # MViT, TNT, CoaT, PiT: there is no path from their final patches to the logits.
        norms = [m for n, m in model.named_modules() if n.endswith((".norm1", ".norm_out"))]
        return norms[-1] if norms else backbone.head_point
    return backbone.head_point


def find_layer(backbone: Backbone, layer: nn.Module | str) -> nn.Module:
    """The module of ``backbone`` that ``layer``, a module or its name, refers to.

    Raises:
        ValueError: there is no such module; the message lists near matches.
    """
    point_of = getattr(backbone.model, "point_of", lambda layer: None)  # of a traced module
    if isinstance(layer, nn.Module):
        inside = set(backbone.modules())
        for one in (layer, *copies_of(layer)):
            point = point_of(one)
            if point is not None or one in inside:
                return point or one
        raise ValueError(
            f"layer: {type(layer).__name__} is not a module of {backbone.name}; give a module of the "
            f"network that it was loaded from, or its dotted name"
        )
    if not isinstance(layer, str):
        raise ValueError(
            f"layer: got a {type(layer).__name__}; give a module or its dotted name, or "
            f"layers=(...) for several"
        )
    point = point_of(layer)
    if point is not None:
        return point
    modules = {name: module for name, module in backbone.named_modules() if name}
    for prefix in ("model.", "", "model.graph.", "model.net."):
        if prefix + layer in modules:
            return modules[prefix + layer]
    names = {
        name.removeprefix("model.").removeprefix("graph."): module
        for name, module in modules.items()
    }
    inner = [name for name in names if name.endswith(f".{layer}")]  # inside an adapter
    if len(inner) == 1:
        return names[inner[0]]
    near = inner or near_names(layer, names, 4)
    near = near or [name for name, _ in backbone.model.named_children()]
    raise ValueError(
        f"layer: {backbone.name} has no module {layer!r}; near matches: {', '.join(near[:4])}"
    )


MOST_PREFIX_TOKENS = 8  # assumed limit for models that do not report their prefix tokens


class LayerReader:
    """Reads a module's output: (B, C, h, w), (B, h, w, C), or tokens (B, N, C).

    Args:
        layer: a module, its dotted name, or None for the default of ``backbone``.
        reshape: a function that turns an output of another shape into (B, C, h, w).

    Raises:
        ValueError: ``layer`` is not a module of the backbone, or it is None and the backbone has no
            default.
    """

    def __init__(
        self,
        backbone: Backbone,
        layer: nn.Module | str | None,
        method: str,
        reshape: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.backbone, self.reshape = backbone, reshape
        module: Any
        if layer is None:
            module = default_layer(backbone, method)
        elif hasattr(layer, "register_forward_hook") and not isinstance(layer, nn.Module):
            module = layer  # the traced counterpart of an adapter's module
        else:
            module = find_layer(backbone, layer)
        self.layer = module
        names = (name for name, m in backbone.named_modules() if m is module)
        self.name = next(names, type(module).__name__)
        self.tokens = backbone.is_vit or bool(getattr(backbone.model, "token_taps", False))

    def activations(self, images: Tensor) -> Tensor:
        """Activations (B, C, h, w) of images (B, 3, H, W)."""
        return self.read(images)[0]

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (B, C, h, w) and logits (B, K) of one pass."""
        outputs: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.append(self.one_tensor(output).clone())  # later layers may work in place

        handle = self.layer.register_forward_hook(keep)
        try:
            with torch.no_grad():
                logits = self.backbone.logits(images)
        finally:
            handle.remove()
        if not outputs:
            raise ValueError(
                f"layer: {self.name} is not called in a pass of {self.backbone.name}; give a layer "
                f"inside it"
            )
        return self.as_map(outputs[-1], images), logits

    def gradients(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and the gradients of the class's logit, both (B, C, h, w)."""
        # Imported late: captum takes longer to load than the maps take to compute.
        from captum._utils.gradient import compute_layer_gradients_and_eval

        try:
            gradients, values = compute_layer_gradients_and_eval(
                self.backbone.logits, self.layer, (images,), target
            )
        except AssertionError as error:
            raise ValueError(
                f"layer: {self.name} has no output to read in a pass of {self.backbone.name} "
                f"({error}); give a layer inside it"
            ) from None
        except RuntimeError as error:
            if "not have been used" not in str(error):
                raise
            raise ValueError(
                f"layer: the last output of {self.name} does not lead to the logits of "
                f"{self.backbone.name}; give another layer"
            ) from None
        return self.as_map(values[0], images), self.as_map(gradients[0], images)

    def one_tensor(self, output: Any) -> Tensor:
        """The layer's output, which must be a tensor."""
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer: {self.name} of {self.backbone.name} returns a {type(output).__name__}, not a "
                f"single tensor; give a layer inside it"
            )
        return output

    def as_map(self, output: Tensor, images: Tensor) -> Tensor:
        """The layer's output as (B, C, h, w)."""
        if self.reshape is not None:
            return self._reshaped(output, images)
        if output.shape[:1] == images.shape[:1]:
            unrolled = self._of_clip(output, images) if images.ndim == 5 else self._unrolled(output)
            if unrolled is not None:
                return unrolled
            if output.ndim == 4 and self._looks_like_map(output, images):
                return output.movedim(self.channel_axis(output, images), 1)
            if output.ndim == 3 and images.ndim == 4:
                grid = self._grid(output.shape[1], images.shape[-2:])
                if grid is not None:
                    return self.backbone.tokens_to_map(output, grid)
        raise self._no_map(output, images)

    def _no_map(self, output: Tensor, images: Tensor) -> ValueError:
        form = "(B, C, h, w)" if images.ndim == 4 else "(B, C, t, h, w)"
        return ValueError(
            f"layer: {self.name} of {self.backbone.name} returns {tuple(output.shape)} for "
            f"{len(images)} images of {' x '.join(map(str, images.shape[2:]))}, which is not a map; give "
            f"layer=<a module whose output is {form}>, or reshape=<a function that returns that shape>"
        )

    def _reshaped(self, output: Tensor, images: Tensor) -> Tensor:
        assert self.reshape is not None
        maps = self.reshape(output)
        if not isinstance(maps, Tensor) or maps.ndim != images.ndim or len(maps) != len(images):
            got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(
                f"reshape: got {got} for {self.name}, whose output is {tuple(output.shape)}; return "
                f"{'(B, C, h, w)' if images.ndim == 4 else '(B, C, t, h, w)'}"
            )
        return maps

    def _of_clip(self, output: Tensor, images: Tensor) -> Tensor | None:
        """(B, C, t, h, w) from maps with channels first or last, or from tokens without their prefix."""
        size, model = images.shape[2:], self.backbone.model
        if output.ndim == 5:
            axis = self.channel_axis(output, images)
            moved = output.movedim(axis, 1)
            return moved if grid_fits(moved.shape[2:], size) else None
        if output.ndim == 3:
            for prefix in (self.backbone.prefix_tokens, *range(MOST_PREFIX_TOKENS + 1)):
                grid = token_grid(output.shape[1] - prefix, size, getattr(model, "steps", 1))
                if grid is not None:
                    return as_map(output, grid, getattr(model, "time_last", False))
        return None

    def _unrolled(self, output: Tensor) -> Tensor | None:
        """Tokens of a Hiera block in spatial order; Hiera groups them by mask unit."""
        model, number = self.backbone.model, self.name.removeprefix("model.blocks.")
        if output.ndim != 3 or not number.isdecimal() or not hasattr(model, "reroll"):
            return None
        return model.reroll(output, int(number)).permute(0, 3, 1, 2)  # type: ignore[operator]

    def _grid(self, count: int, size: Sequence[int]) -> tuple[int, int] | None:
        """The (h, w) of ``count`` tokens of an image of ``size`` (H, W), after removing prefix tokens."""
        height, width = size
        if self.tokens and self.backbone.has_grid:
            rows, columns = self.backbone.grid(height, width)
            return (rows, columns) if rows * columns <= count else None
        # Others do not report their grid: assume the image's aspect ratio. The model's prefix tokens, if
        # any, may be added only after its blocks.
        for prefix in (self.backbone.prefix_tokens, *range(MOST_PREFIX_TOKENS + 1)):
            rows = max(1, round((max(count - prefix, 0) * height / width) ** 0.5))
            columns = (count - prefix) // rows
            if columns > 0 and rows * columns == count - prefix and _fits(rows, columns, size):
                return rows, columns
        return None

    def channel_axis(self, output: Tensor, images: Tensor) -> int:
        """The channel axis of (B, h, w, C) or (B, C, h, w), with t before h for clips; it is found
        from the aspect ratio of h and w, which matches the image's."""
        if self.reshape is not None:
            channels = self._reshaped(output, images).shape[1]
            return max(i for i in range(1, output.ndim) if output.shape[i] == channels)
        if output.ndim == 3:
            return 2
        if output.ndim == 5:
            return 1 if grid_fits(output.shape[2:], images.shape[2:]) else 4
        size = images.shape[-2:]
        _, one, two, three = output.shape
        first, last = _fits(one, two, size), _fits(two, three, size)
        if first and last:  # as many channels as positions along a side
            layout = isinstance(self.layer, nn.Conv2d | nn.BatchNorm2d | nn.Identity)
            first = not layout and (self.tokens or self.backbone.channels_last)
        return 3 if first else 1

    def _looks_like_map(self, output: Tensor, images: Tensor) -> bool:
        """Whether two sides of (B, ., ., .) match the image's, up to a factor of 2 in their ratio."""
        axis = self.channel_axis(output, images)
        h, w = output.movedim(axis, 1).shape[2:]
        height, width = images.shape[-2:]
        return 0.5 <= (h * width) / (w * height) <= 2


def _fits(h: int, w: int, size: Sequence[int]) -> bool:
    """Whether a grid h x w has the aspect ratio of an image of ``size`` (H, W), to within one cell."""
    height, width = size
    return abs(h * width - w * height) < max(height, width)


@dataclass(kw_only=True, eq=False, repr=False)
class LayerExplainer(Explainer):
    """Base class of explainers that read the activations of one or several layers, for images and clips.

    Args:
        layer: the module whose output is read, or its dotted name, such as ``"layer3.1"``; the output
            is (B, C, h, w), (B, h, w, C) or tokens (B, N, C). By default, the pooled map of a CNN,
            ``blocks[-1].norm1`` of a ViT, or all scales of a detector (as in ``layers``).
        layers: several layers, in place of ``layer``: a sequence or a comma-separated text; their
            maps are each scaled to [0, 1], up-sampled to the image and averaged.
        reshape: a function that turns an output of another shape into (B, C, h, w).
    """

    clips = True

    layer: nn.Module | str | None = None
    layers: Any = ()
    reshape: Callable[[Tensor], Tensor] | None = None
    layer_name: str = field(init=False, default="")
    reader: LayerReader = field(init=False)
    _parts: list[Any] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = _several(self.layers)
        if self.layers and self.layer is not None:
            raise ValueError("layers: got layer= as well; give only one of them")
        if self.layer is None and not self.layers:
            own = getattr(self.backbone.model, "gradcam_layers", ())  # of a detector, its scales
            self.layers = own if len(own) > 1 else ()
        if self.layers:
            self._parts = [
                replace(self, layer=one, layers=(), aug_smooth=False) for one in self.layers
            ]
            self.reader = self._parts[0].reader
            self.layer_name = ", ".join(part.layer_name for part in self._parts)
            self.forwards = sum(part.forwards for part in self._parts)
            return
        self.reader = LayerReader(self.backbone, self.layer, self.name, self.reshape)
        self.layer, self.layer_name = self.reader.layer, self.reader.name

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._class_maps(images, target[:, None])

    def _class_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        if not self._parts:
            return self._layer_maps(images, classes)
        return fuse_maps([p._class_maps(images, classes) for p in self._parts], images.shape[2:])

    def _layer_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        """Maps (b, M, h, w) of the classes (b, M) from one layer."""
        return super()._class_maps(images, classes)


def _several(layers: object) -> tuple[nn.Module | str, ...]:
    """``layers`` as a tuple; a str may name several, separated by commas."""
    if isinstance(layers, str):
        return tuple(name.strip() for name in layers.split(",") if name.strip())
    if isinstance(layers, nn.Module) or not isinstance(layers, Sequence):
        raise ValueError(
            f"layers: got a {type(layers).__name__}; give a sequence of modules or dotted names, or "
            f"layer= for a single one"
        )
    return tuple(layers)


def fuse_maps(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """The mean of maps (b, M, h_i, w_i), each scaled to [0, 1] and up-sampled to ``size``; a constant map
    counts as 0."""
    scaled = []
    for one in maps:
        low, high = (of(one, axes_of(one), keepdim=True) for of in (torch.amin, torch.amax))
        unit = torch.where(high > low, (one - low) / (high - low), 0.0)
        scaled.append(resized(unit, size))
    return torch.stack(scaled).mean(0)
