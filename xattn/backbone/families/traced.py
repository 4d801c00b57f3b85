"""Backbones for modules that are not from timm, such as torchvision's classifiers: their graph is traced.

    backbone = load_backbone(torchvision.models.resnet18(weights="DEFAULT"))

The graph recorded by ``torch.fx`` gets additional outputs, so that one pass returns logits and inner
maps; nothing is hooked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from xattn.backbone.weights import package_file
from xattn.photos.preprocessing import (
    ClipPreprocessing,
    Preprocessing,
    channels_of,
    first_convolution,
)
from xattn.runtime.copies import frozen_copy
from xattn.runtime.names import did_you_mean

HEAD_POINT = "head_point"
CLIP_SIDE = 112  # side of the frames in pixels if a network does not report it
Key = TypeVar("Key")


class AdaptedClassifier(nn.Module):
    """Base class of the modules that wrap a classifier from outside timm.

    Args:
        tap_names: names of the taps.
        classifier: the module that returns the logits; if it is linear, its weights are read.
        grids: for each tap, None if it is a map (B, C, h, w), or the (h, w) of its tokens (B, N, C). For
            clips, a map is (B, C, t, h, w) and a grid is (t, h, w).
        prefix: the number of tokens in the last tap that have no place on its grid, such as a class token.
        steps: t, the number of time steps of a clip's tokens.
        time_last: whether time is the fastest-varying index in the token order of a clip.

    Attributes:
        num_prefix_tokens, token_taps: for a ViT, whose taps are tokens (B, N, C).
        assumes_preprocessing: whether ``preprocessing`` was assumed rather than given.
        class_names: the class names if they are known, or None.
    """

    assumes_preprocessing = False
    class_names: list[str] | None = None

    def __init__(
        self,
        tap_names: Sequence[str],
        *,
        classifier: nn.Module | None,
        preprocessing: Preprocessing,
        grids: Sequence[tuple[int, ...] | None],
        prefix: int,
        steps: int = 1,
        time_last: bool = False,
    ) -> None:
        super().__init__()
        self.steps, self.time_last = steps, time_last
        self.tap_names = list(tap_names)
        self.preprocessing = preprocessing
        self.grids = list(grids)
        self.num_prefix_tokens = prefix
        self.token_taps = self.grids[-1] is not None
        # In a list, so that it is not registered a second time.
        self._classifier = [classifier] if isinstance(classifier, nn.Linear) else []

    def as_maps(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Convert the taps to maps."""
        pairs = zip(values, self.grids, strict=True)
        return [as_map(value, grid, self.time_last) for value, grid in pairs]

    @property
    def classifier_weight(self) -> Tensor | None:
        """The classifier's weight (K, C), or None."""
        return self._classifier[0].weight if self._classifier else None

    @property
    def classifier_bias(self) -> Tensor | None:
        """The classifier's bias (K,), or None."""
        return self._classifier[0].bias if self._classifier else None


class TracedClassifier(AdaptedClassifier):
    """A :class:`~xattn.backbone.TapModule`; created by :func:`from_torchvision`.

    Its taps are module paths or graph nodes. ``gradcam_layer`` is an identity after the last tap.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        tap_names: Sequence[str],
        points: Sequence[tuple[str, nn.Module, nn.Module]] = (),
        **facts: Any,
    ) -> None:
        super().__init__(tap_names, **facts)
        self.graph = graph
        self._points = list(points)  # path, module there, and the identity after its output
        self.gradcam_layer = getattr(graph, HEAD_POINT)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)[0]

    def forward_taps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, *values = self.graph(x)
        return logits, self.as_maps(values)

    def point_of(self, layer: str | nn.Module) -> nn.Module | None:
        """Return the identity through which the output of ``layer`` passes.

        ``layer`` is a module of the traced network or its path. The result is None for
        a module without submodules, because the graph calls it directly."""
        for path, module, point in self._points:
            if layer == path if isinstance(layer, str) else layer is module:
                return point
        return None


class UntraceableError(ValueError):
    """Raised if a module cannot be traced by ``torch.fx``, or does not run on images."""


def from_torchvision(
    model: nn.Module,
    taps: Sequence[str] | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    input_size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> TracedClassifier:
    """Prepare a torchvision classifier, or any module that ``torch.fx`` can trace, for ``load_backbone``.

    ``load_backbone`` calls this for a module that has no ``forward_taps``. ``model`` is not changed: the
    result holds a frozen copy over the same weights.

    Args:
        model: maps normalised images (B, 3, H, W) or clips (B, 3, T, H, W) to logits (B, K).
        taps: module paths or graph nodes, such as ``["layer2", "layer3", "layer4"]`` or, for a ViT,
            ``["encoder.layers.encoder_layer_11.ln_1"]``; its class token is left out. The default for a CNN
            is the last map on each of the three coarsest grids, and for torchvision's ViT ``ln_1`` of the
            last three blocks; other ViTs have no default.
        preprocessing: by default the module's attribute ``preprocessing`` or, if it has none, 224 pixels
            and ImageNet's mean and std.
        input_size: (H, W) in pixels; by default from ``preprocessing``, or the size a ViT was built for.
        frames: T of a clip; by default from ``preprocessing``, or 16.

    Raises:
        ValueError: if the module cannot be traced, or a tap is unknown or not a map.
    """
    return traced_classifier(frozen_copy(model), taps, preprocessing, input_size, frames)


def traced_classifier(
    model: nn.Module,
    taps: Sequence[str] | None,
    preprocessing: Preprocessing | None,
    input_size: tuple[int, int] | None,
    frames: int | None = None,
) -> TracedClassifier:
    """Do the same as :func:`from_torchvision` for a module in eval mode, without another copy."""
    preprocessing, assumed = module_preprocessing(model, preprocessing, input_size, frames)
    size = preprocessing.places
    traced, shapes, names = _trace(model, size, channels_of(model, preprocessing))
    taps = taps or _vit_taps(model)
    nodes = [_find(tap, names) for tap in taps] if taps is not None else coarsest(shapes, size)
    if not nodes:
        raise ValueError(
            f"taps: {type(model).__name__} does not end in (B, C, h, w) maps; give its token nodes, "
            f"such as the norm of its last block"
        )
    steps = steps_of(shapes.values(), size)
    grids = [grid_of(names[node], shapes[node], size, steps) for node in nodes]
    graph = traced.graph
    output = next(n for n in graph.nodes if n.op == "output")
    logits = output.args[0]
    traced.add_submodule(HEAD_POINT, nn.Identity())
    with graph.inserting_after(nodes[-1]):
        point = graph.call_module(HEAD_POINT, ())
    nodes[-1].replace_all_uses_with(point)
    point.args = (nodes[-1],)
    output.args = ((logits, *(_kept(traced, node) for node in (*nodes[:-1], point))),)
    points = _add_points(model, traced, names, {nodes[-1]: traced.get_submodule(HEAD_POINT)})
    traced.recompile()
    last = grids[-1]
    prefix = 0 if last is None else shapes[nodes[-1]][1] - math.prod(last)
    call = logits.op == "call_module"
    made = TracedClassifier(
        traced,
        [names[node] for node in nodes],
        points,
        classifier=traced.get_submodule(str(logits.target)) if call else None,
        preprocessing=preprocessing,
        grids=grids,
        prefix=prefix,
        steps=steps,
    )
    made.assumes_preprocessing = assumed
    made.class_names = module_class_names(model)
    return made


def module_class_names(model: nn.Module) -> list[str] | None:
    """Return the class names of a torchvision module, or None if its number of outputs does not match.

    The names are those of ImageNet or, for networks that read clips, those of Kinetics-400, the data sets
    of torchvision's weights."""
    import torchvision.models as zoo

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    place = type(model).__module__
    if not place.startswith("torchvision.models.") or not layers:
        return None
    clips = place.startswith("torchvision.models.video.")
    weights = zoo.video.R3D_18_Weights if clips else zoo.ResNet18_Weights
    names = list(weights.DEFAULT.meta["categories"])
    return names if len(layers[-1].weight) == len(names) else None


def module_preprocessing(
    model: nn.Module,
    preprocessing: Preprocessing | None,
    input_size: tuple[int, int] | None,
    frames: int | None = None,
) -> tuple[Preprocessing, bool]:
    """Return the preprocessing for ``model``, and whether it had to be assumed.

    It prepares photos, or clips if the network has 3-D convolutions."""
    preprocessing = preprocessing or getattr(model, "preprocessing", None)
    assumed = not isinstance(preprocessing, Preprocessing)
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = Preprocessing(interpolation="bilinear")
        side = getattr(model, "image_size", None)  # torchvision's ViT has this
        input_size = (side, side) if input_size is None and isinstance(side, int) else input_size
        if frames or isinstance(first_convolution(model), nn.Conv3d):
            side = (CLIP_SIDE, CLIP_SIDE)
            preprocessing = ClipPreprocessing(side, interpolation="bilinear")
    if input_size is not None:
        preprocessing = replace(preprocessing, input_size=input_size)
    if frames is not None:
        check_reads_clips(preprocessing, type(model).__name__)
        preprocessing = replace(preprocessing, frames=frames)  # type: ignore[call-arg]
    return preprocessing, assumed


def check_reads_clips(preprocessing: Preprocessing, name: str) -> None:
    """Raise a ``ValueError`` about ``frames`` unless the network reads clips."""
    if not isinstance(preprocessing, ClipPreprocessing):
        raise ValueError(f"frames: {name} reads single photos; leave it out")


def load_torchvision(
    name: str,
    weights: str | Path | None,
    taps: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    frames: int | None = None,
) -> TracedClassifier:
    """Load torchvision's classifier ``name``.

    ``"timm"``, the default of ``load_backbone``, loads torchvision's own weights. Weights can also come
    from a file or a package, and None means random weights.

    Raises:
        ValueError: if the name is unknown, or the weights cannot be used.
        OSError: if the weights cannot be read or downloaded.
    """
    import torchvision.models as zoo

    names = [*zoo.list_models(zoo), *zoo.list_models(zoo.video)]
    if name not in names:
        hint = did_you_mean(name, names, "see torchvision.models.list_models()")
        if name in zoo.list_models(zoo.segmentation):
            hint = "for a segmentation network, call xattn.load_segmenter (--segmenter)"
        raise ValueError(f"backbone: torchvision has no classifier {name!r}; {hint}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None and name.startswith("vit_"):
        if size[0] != size[1]:
            raise ValueError(
                f"input_size: got {size}; torchvision's {name} takes a square, given by one number"
            )
        options["image_size"] = size[0]
    preprocessing = _evaluation_preprocessing(name, size)
    if weights == "package":
        record, weights = package_file(f"torchvision/{name}")
        told = dict(record.preprocessing)
        told["input_size"] = preprocessing.input_size
        preprocessing = replace(preprocessing, **told)
    if weights in (None, "timm"):
        source = None if weights is None else "DEFAULT"
        try:
            model = zoo.get_model(name, weights=source, **options)
        except OSError as error:
            raise OSError(
                f"weights: the weights of torchvision's {name} could not be downloaded ({error}); give a "
                f"local file"
            ) from error
    else:
        assert weights is not None
        model = network_with_file(name, weights, options)
    return from_torchvision(model, taps, preprocessing=preprocessing, frames=frames)


def _evaluation_preprocessing(name: str, size: tuple[int, int] | None) -> Preprocessing:
    """Return torchvision's preprocessing for its default weights, at ``size`` if that is given."""
    import torchvision.models as zoo

    transforms = zoo.get_model_weights(name).DEFAULT.transforms()
    side = transforms.crop_size[0]
    clips = name in zoo.list_models(zoo.video)
    return (ClipPreprocessing if clips else Preprocessing)(
        input_size=size or (side, side),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        crop_pct=side / transforms.resize_size[0],
    )


def network_with_file(name: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    """Load torchvision's ``name`` with weights from a file, by default with its number of classes."""
    import torchvision.models as zoo

    from xattn.backbone.weights import class_count, load_into, load_weight_file, part_of

    whole = load_weight_file(weights)
    if any("aux_classifier." in key for key in whole):  # a segmentation network's training head
        options = {**options, "aux_loss": True}
    if "num_classes" not in options:  # the last linear or 1x1 layer is the classifier
        layers = dict(zoo.get_model(name, weights=None, **options).named_modules())
        last = [n for n, m in layers.items() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        count = class_count(whole, last)
        options = options if count is None else {**options, "num_classes": count}
    model = zoo.get_model(name, weights=None, **options)
    refusal = (
        f"weights: {weights} does not fit torchvision's {name} ({{reason}}); give a file for this "
        f"architecture, and for a ViT its own input_size"
    )
    load_into(model, part_of(whole, model.state_dict().keys(), weights), refusal)
    return model


class _Shapes(fx.Interpreter):
    """An interpreter that runs a graph and keeps the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        args, kwargs = super().fetch_args_kwargs_from_env(n)  # these lists cannot be changed
        return tuple(list(a) if isinstance(a, list) else a for a in args), kwargs

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


Shapes = dict[fx.Node, tuple[int, ...]]


@torch.no_grad()
def _trace(
    model: nn.Module, size: tuple[int, ...], channels: int
) -> tuple[fx.GraphModule, Shapes, dict[fx.Node, str]]:
    """Return the traced module, the shape of every tensor in it, and its nodes' paths."""
    from torchvision.models.feature_extraction import NodePathTracer

    kind = type(model).__name__
    if "forward" in vars(model):  # tracing would ignore it
        raise UntraceableError(f"model: the forward of this {kind} is not the forward of its class")
    try:
        tracer = NodePathTracer()
        graph = tracer.trace(model)
        traced = fx.GraphModule(model, graph, kind)
        run = _Shapes(traced)
        parameter = next(model.parameters(), torch.zeros((), device="cpu"))
        run.run(torch.zeros(2, channels, *size, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UntraceableError(
            f"model: torch.fx cannot trace {kind} ({type(error).__name__}: {reason}); give it a "
            f"method forward_taps(x) -> (logits, maps) instead"
        ) from error
    last = next(n for n in graph.nodes if n.op == "output").args[0]
    if not isinstance(last, fx.Node) or len(run.shapes.get(last, ())) not in (1, 2):
        raise ValueError(f"model: {kind} does not end in logits (B, K)")
    # A module's own path: torchvision calls a ViT's ln_1 "ln" and its ln_2 "ln_1".
    names = {
        n: str(n.target) if n.op == "call_module" else path
        for n, path in tracer.node_to_qualname.items()
        if n in run.shapes
    }
    return traced, {n: run.shapes[n] for n in names if n.op != "placeholder"}, names


def _vit_taps(model: nn.Module) -> list[str] | None:
    """Return the taps at the input of attention in the last three blocks.

    They are ``ln_1`` for torchvision's ViT, and ``norm1`` for MViT."""
    from torchvision.models import VisionTransformer
    from torchvision.models.video.mvit import MViT

    if isinstance(model, MViT):
        return [f"blocks.{i}.norm1" for i in range(len(model.blocks))][-3:]
    if not isinstance(model, VisionTransformer):
        return None
    return [f"encoder.layers.{name}.ln_1" for name, _ in model.encoder.layers.named_children()][-3:]


def _find(tap: str, names: dict[fx.Node, str]) -> fx.Node:
    """Return the node with the path ``tap``, or the last node of the module with that path."""
    found = [n for n, path in names.items() if path == tap or path.startswith(f"{tap}.")]
    if not found:
        last = f"the last ones are {', '.join(list(names.values())[-5:])}"
        hint = did_you_mean(tap, list(names.values()), last)
        raise ValueError(f"taps: {tap!r} is not in the graph; {hint}")
    return found[-1]


def coarsest(shapes: Mapping[Key, tuple[int, ...]], size: tuple[int, ...]) -> list[Key]:
    """Return the last map on each of the three coarsest grids of more than one cell, from fine to coarse.

    Args:
        shapes: tensor shapes in order, for a batch of 2.
        size: (H, W) of the images, or (T, H, W) of the clips.

    A grid must have the aspect ratio of the input, which rules out tensors (B, h, w, C) and position
    tables. If tokens (B, N, C) come after the last map, the result is empty, because the maps are then only
    the patches of a ViT.
    """
    last: dict[tuple[int, ...], Key] = {}
    tokens = False
    for node, shape in shapes.items():
        is_map = len(shape) == 2 + len(size) and shape[0] == 2 and min(shape[-2:]) > 1
        if is_map and grid_fits(shape[2:], size):
            last[shape[2:]] = node
        tokens = not is_map and (tokens or (len(shape) == 3 and shape[0] == 2))
    if tokens:
        return []
    return [last[grid] for grid in sorted(last, key=math.prod)[:3]][::-1]


def grid_fits(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Return whether a grid has the aspect ratio of an input of ``size``, to within one cell, and no more
    steps than the input has frames."""
    return grid[0] <= size[0] and abs(grid[-2] / size[-2] * size[-1] - grid[-1]) < 1


def steps_of(shapes: Iterable[tuple[int, ...]], size: Sequence[int]) -> int:
    """Return t, the number of time steps of a network's first map (2, C, t, h, w) that is coarser than the
    clips of ``size`` (T, H, W).

    The result is T if there is no such map, and 1 for photos."""
    if len(size) == 2:
        return 1
    maps = (s[2:] for s in shapes if len(s) == 5 and s[0] == 2)
    own = (s[0] for s in maps if grid_fits(s, size) and s[-1] < size[-1])
    return next(own, size[0])


def _kept(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return ``node``, or a copy of it if a later in-place operation would change it."""

    def in_place(user: fx.Node) -> bool:
        layer = traced.get_submodule(str(user.target)) if user.op == "call_module" else None
        return bool(getattr(layer, "inplace", False) or user.kwargs.get("inplace"))

    if not any(in_place(user) for user in node.users):
        return node
    with traced.graph.inserting_after(node):
        return traced.graph.call_method("clone", (node,))


def _add_points(
    model: nn.Module,
    traced: fx.GraphModule,
    names: dict[fx.Node, str],
    points: dict[fx.Node, nn.Module],
) -> list[tuple[str, nn.Module, nn.Module]]:
    """Add an identity after the output of every module that has submodules, except those that the graph
    itself calls.

    ``points`` are the identities that nodes already have.
    """
    last: dict[str, fx.Node] = {}
    for node, path in names.items():
        inside = path.split(".") if node.users else []
        last |= {".".join(inside[: i + 1]): node for i in range(len(inside))}
    found = []
    for path, module in model.named_modules():
        end = last.get(path)
        if end is None or end.op == "placeholder" or not any(module.children()):
            continue
        if end not in points:
            name = f"point_{len(points)}"
            traced.add_submodule(name, nn.Identity())
            with traced.graph.inserting_after(end):
                call = traced.graph.call_module(name)
            end.replace_all_uses_with(call)
            call.args = (end,)
            points[end] = traced.get_submodule(name)
        found.append((path, module, points[end]))
    return found


def grid_of(
    name: str, shape: tuple[int, ...], size: tuple[int, ...], steps: int = 1
) -> tuple[int, ...] | None:
    """Return the grid of a tap, or None for a map (B, C, h, w). For tokens (B, N, C), it is the grid (h, w)
    of all tokens except a class token; for the tokens of clips, it is (t, h, w), with t = ``steps``."""
    if len(shape) == 2 + len(size) and shape[0] == 2:
        return None
    if len(shape) == 3 and shape[0] == 2:
        for count in (shape[1] - 1, shape[1]):
            grid = token_grid(count, size, steps)
            if grid is not None:
                return grid
    form = "(B, C, h, w)" if len(size) == 2 else "(B, C, t, h, w)"
    raise ValueError(
        f"taps: {name!r} has shape {shape}; choose a node that is {form}, or (B, N, C) tokens"
    )


def token_grid(count: int, size: Sequence[int], steps: int = 1) -> tuple[int, ...] | None:
    """Return the grid of ``count`` tokens: (h, w) with the aspect ratio of images of ``size`` (H, W), or
    (t, h, w) for clips of ``size`` (T, H, W). It is None if there is no such grid."""
    area, left = divmod(count, steps)
    rows = round((area * size[-2] / size[-1]) ** 0.5)
    if left or not rows or area % rows or rows * size[-1] != (area // rows) * size[-2]:
        return None
    return (*(steps,) * (len(size) - 2), rows, area // rows)


def as_map(value: Tensor, grid: tuple[int, ...] | None, time_last: bool = False) -> Tensor:
    """Return a tap as (B, C, h, w) or (B, C, t, h, w). If the tap consists of tokens (B, N, C),
    the last of them are arranged on ``grid``.

    ``time_last``: whether time is the fastest-varying index in the token order of a clip.
    """
    if grid is None:
        return value
    tokens = value[:, value.shape[1] - math.prod(grid) :].transpose(1, 2)
    if time_last:
        return tokens.unflatten(2, (*grid[1:], grid[0])).movedim(-1, 2)
    return tokens.unflatten(2, grid)
