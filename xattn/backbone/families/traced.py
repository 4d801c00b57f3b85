"""Backbones of modules that are not timm's: torchvision's classifiers through their traced graph.

    backbone = load_backbone(torchvision.models.resnet18(weights="DEFAULT"))

The graph that ``torch.fx`` records gets further outputs, so that one pass yields logits and inner
maps; nothing is hooked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from xattn.backbone.weights import package_file
from xattn.photos.preprocessing import Preprocessing, channels_of
from xattn.runtime.copies import frozen_copy
from xattn.runtime.names import did_you_mean

HEAD_POINT = "head_point"
Key = TypeVar("Key")


class AdaptedClassifier(nn.Module):
    """Base of the modules that stand for a classifier that is not timm's.

    Args:
        tap_names: of the taps.
        classifier: the module that gives the logits, of which a linear layer is read.
        grids: None of a tap that is a map (B, C, h, w), the (h, w) of one of tokens (B, N, C).
        prefix: how many tokens of the last tap are none of its grid.

    Attributes:
        num_prefix_tokens, token_taps: of a ViT, whose taps are tokens (B, N, C).
        assumes_preprocessing: whether ``preprocessing`` was not given, but assumed.
        class_names: what is known of its classes, or None.
    """

    assumes_preprocessing = False
    class_names: list[str] | None = None

    def __init__(
        self,
        tap_names: Sequence[str],
        *,
        classifier: nn.Module | None,
        preprocessing: Preprocessing,
        grids: Sequence[tuple[int, int] | None],
        prefix: int,
    ) -> None:
        super().__init__()
        self.tap_names = list(tap_names)
        self.preprocessing = preprocessing
        self.grids = list(grids)
        self.num_prefix_tokens = prefix
        self.token_taps = self.grids[-1] is not None
        # In a list, so that it is not registered a second time.
        self._classifier = [classifier] if isinstance(classifier, nn.Linear) else []

    @property
    def classifier_weight(self) -> Tensor | None:
        """(K, C), or None."""
        return self._classifier[0].weight if self._classifier else None

    @property
    def classifier_bias(self) -> Tensor | None:
        """(K,), or None."""
        return self._classifier[0].bias if self._classifier else None


class TracedClassifier(AdaptedClassifier):
    """A :class:`~xattn.backbone.TapModule`; made by :func:`from_torchvision`.

    Its taps are module paths or graph nodes, and ``gradcam_layer`` is an identity after the last.
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
        self._points = list(points)  # a path, the module there, and the identity of its output
        self.gradcam_layer = getattr(graph, HEAD_POINT)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)[0]

    def forward_taps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, *values = self.graph(x)
        return logits, [as_map(v, grid) for v, grid in zip(values, self.grids, strict=True)]

    def point_of(self, layer: str | nn.Module) -> nn.Module | None:
        """The identity through which the output of ``layer`` goes, a module of the network that was
        traced or its path; None for modules without parts, which the graph calls themselves."""
        for path, module, point in self._points:
            if layer == path if isinstance(layer, str) else layer is module:
                return point
        return None


class UntraceableError(ValueError):
    """A module that ``torch.fx`` cannot trace, or that does not run on images."""


def from_torchvision(
    model: nn.Module,
    taps: Sequence[str] | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    input_size: tuple[int, int] | None = None,
) -> TracedClassifier:
    """A torchvision classifier (or any module that ``torch.fx`` can trace) for ``load_backbone``.

    ``load_backbone`` calls it for a module that has no ``forward_taps``. ``model`` stays as it is: what is
    made holds a frozen copy over the same weights.

    Args:
        model: maps normalised images (B, 3, H, W) to logits (B, K).
        taps: module paths or graph nodes, such as ``["layer2", "layer3", "layer4"]`` or, of a ViT,
            ``["encoder.layers.encoder_layer_11.ln_1"]``, without its class token. By default the
            last map on each of the three coarsest grids of a CNN, and ``ln_1`` of the last three blocks
            of torchvision's ViT; other ViTs have no default.
        preprocessing: by default the module's own attribute of that name, or 224 pixels and ImageNet's
            mean and std.
        input_size: (H, W) in pixels; by default that of ``preprocessing``, of a ViT its own.

    Raises:
        ValueError: the module cannot be traced, or a tap is unknown or not a map.
    """
    return traced_classifier(frozen_copy(model), taps, preprocessing, input_size)


def traced_classifier(
    model: nn.Module,
    taps: Sequence[str] | None,
    preprocessing: Preprocessing | None,
    input_size: tuple[int, int] | None,
) -> TracedClassifier:
    """:func:`from_torchvision` of a module in eval mode, without another copy."""
    preprocessing, assumed = prepared_by(model, preprocessing, input_size)
    size = preprocessing.input_size
    traced, shapes, names = _trace(model, size, channels_of(model, preprocessing))
    taps = taps or _vit_taps(model)
    nodes = [_find(tap, names) for tap in taps] if taps is not None else coarsest(shapes, size)
    if not nodes:
        raise ValueError(
            f"taps: {type(model).__name__} does not end in (B, C, h, w) maps; name its token nodes, "
            f"such as the norm of its last block"
        )
    grids = [grid_of(names[node], shapes[node], size) for node in nodes]
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
    prefix = 0 if last is None else shapes[nodes[-1]][1] - last[0] * last[1]
    call = logits.op == "call_module"
    made = TracedClassifier(
        traced,
        [names[node] for node in nodes],
        points,
        classifier=traced.get_submodule(str(logits.target)) if call else None,
        preprocessing=preprocessing,
        grids=grids,
        prefix=prefix,
    )
    made.assumes_preprocessing = assumed
    made.class_names = imagenet_names(model)
    return made


def imagenet_names(model: nn.Module) -> list[str] | None:
    """ImageNet's names, as torchvision's weights have them, of a module of torchvision whose last layer has
    1,000 outputs; None of any other."""
    import torchvision.models as zoo

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not type(model).__module__.startswith("torchvision.models.") or not layers:
        return None
    names = list(zoo.ResNet18_Weights.DEFAULT.meta["categories"])
    return names if len(layers[-1].weight) == len(names) else None


def prepared_by(
    model: nn.Module, preprocessing: Preprocessing | None, input_size: tuple[int, int] | None
) -> tuple[Preprocessing, bool]:
    """How photos are prepared for ``model``, and whether that had to be assumed."""
    preprocessing = preprocessing or getattr(model, "preprocessing", None)
    assumed = not isinstance(preprocessing, Preprocessing)
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = Preprocessing(interpolation="bilinear")
        side = getattr(model, "image_size", None)  # of torchvision's ViT
        input_size = (side, side) if input_size is None and isinstance(side, int) else input_size
    if input_size is not None:
        preprocessing = replace(preprocessing, input_size=input_size)
    return preprocessing, assumed


def load_torchvision(
    name: str,
    weights: str | Path | None,
    taps: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> TracedClassifier:
    """torchvision's classifier ``name`` with its own weights (``"timm"``, the default source of
    ``load_backbone``, stands for them), those of a file or of a package, or random ones (None).

    Raises:
        ValueError: unknown name or unusable weights.
        OSError: weights that cannot be read or downloaded.
    """
    import torchvision.models as zoo

    if name not in zoo.list_models(zoo):
        hint = did_you_mean(name, zoo.list_models(zoo), "see torchvision.models.list_models()")
        raise ValueError(f"backbone: torchvision has no classifier {name!r}; {hint}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None and name.startswith("vit_"):
        if size[0] != size[1]:
            raise ValueError(
                f"input_size: got {size}; torchvision's {name} takes one side, a square"
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
                f"weights: those of torchvision's {name} could not be downloaded ({error}); give a "
                f"local file"
            ) from error
    else:
        assert weights is not None
        model = _with_file(name, weights, options)
    return from_torchvision(model, taps, preprocessing=preprocessing)


def _evaluation_preprocessing(name: str, size: tuple[int, int] | None) -> Preprocessing:
    """How torchvision prepares photos for its default weights; at ``size`` if given."""
    import torchvision.models as zoo

    transforms = zoo.get_model_weights(name).DEFAULT.transforms()
    side = transforms.crop_size[0]
    return Preprocessing(
        input_size=size or (side, side),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        crop_pct=side / transforms.resize_size[0],
    )


def _with_file(name: str, weights: str | Path, options: dict[str, Any]) -> nn.Module:
    """torchvision's ``name`` with the weights of a file, and its number of classes by default."""
    import torchvision.models as zoo

    from xattn.backbone.weights import class_count, load_into, load_weight_file, part_of

    whole = load_weight_file(weights)
    if "num_classes" not in options:  # the last linear or 1x1 layer is the classifier
        layers = dict(zoo.get_model(name, weights=None).named_modules())
        last = [n for n, m in layers.items() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        count = class_count(whole, last)
        options = options if count is None else {**options, "num_classes": count}
    model = zoo.get_model(name, weights=None, **options)
    refusal = (
        f"weights: {weights} does not fit torchvision's {name} ({{reason}}); give the file of this "
        f"architecture, of a ViT with its own input_size"
    )
    load_into(model, part_of(whole, model.state_dict().keys(), weights), refusal)
    return model


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


Shapes = dict[fx.Node, tuple[int, ...]]


@torch.no_grad()
def _trace(
    model: nn.Module, size: tuple[int, int], channels: int
) -> tuple[fx.GraphModule, Shapes, dict[fx.Node, str]]:
    """The traced module, the shape of every tensor in it, and its nodes' paths."""
    from torchvision.models.feature_extraction import NodePathTracer

    kind = type(model).__name__
    if "forward" in vars(model):  # which tracing would pass over
        raise UntraceableError(f"model: the forward of {kind} is not that of its class")
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
    """``ln_1`` of the last three blocks of torchvision's ViT, what their attention reads."""
    from torchvision.models import VisionTransformer

    if not isinstance(model, VisionTransformer):
        return None
    return [f"encoder.layers.{name}.ln_1" for name, _ in model.encoder.layers.named_children()][-3:]


def _find(tap: str, names: dict[fx.Node, str]) -> fx.Node:
    """The node with the path ``tap``, or the last node of the module with that path."""
    found = [n for n, path in names.items() if path == tap or path.startswith(f"{tap}.")]
    if not found:
        last = f"its last are {', '.join(list(names.values())[-5:])}"
        hint = did_you_mean(tap, list(names.values()), last)
        raise ValueError(f"taps: {tap!r} is not in the graph; {hint}")
    return found[-1]


def coarsest(shapes: Mapping[Key, tuple[int, ...]], size: tuple[int, int]) -> list[Key]:
    """The last map on each of the three coarsest grids of more than one cell, fine to coarse.

    Args:
        shapes: of tensors in their order; the batch is 2. size: (H, W) of the images.

    Grids have the aspect ratio of the input, which tells maps from (B, h, w, C) and position tables.
    Empty if tokens (B, N, C) follow the maps: these are just a ViT's patches then.
    """
    last: dict[tuple[int, ...], Key] = {}
    tokens = False
    for node, shape in shapes.items():
        is_map = len(shape) == 4 and shape[0] == 2 and min(shape[2:]) > 1
        if is_map and abs(shape[2] / size[0] * size[1] - shape[3]) < 1:
            last[shape[2:]] = node
        tokens = not is_map and (tokens or (len(shape) == 3 and shape[0] == 2))
    if tokens:
        return []
    return [last[grid] for grid in sorted(last, key=lambda g: g[0] * g[1])[:3]][::-1]


def _kept(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """``node``, or its copy where a later in-place operation would change it."""

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
    """Give the output of every module with parts, which the graph itself does not call, an identity.

    ``points`` are identities that nodes already have.
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


def grid_of(name: str, shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int] | None:
    """None for a map (B, C, h, w); the (h, w) of tokens (B, N, C), without a class token."""
    if len(shape) == 4 and shape[0] == 2:
        return None
    if len(shape) == 3:
        for count in (shape[1] - 1, shape[1]):
            rows = round((count * size[0] / size[1]) ** 0.5)
            if rows and count % rows == 0 and rows * size[1] == (count // rows) * size[0]:
                return rows, count // rows
    raise ValueError(
        f"taps: {name!r} has shape {shape}; choose a node that is (B, C, h, w), or (B, N, C) tokens"
    )


def as_map(value: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """A tap as (B, C, h, w); of tokens (B, N, C) those of the ``grid`` (h, w), the last ones."""
    if grid is None:
        return value
    tokens = value[:, value.shape[1] - grid[0] * grid[1] :]
    return tokens.transpose(1, 2).unflatten(2, grid)
