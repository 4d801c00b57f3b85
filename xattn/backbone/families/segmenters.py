"""Build segmentation networks from names, modules, functions, and models that need a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xattn.backbone.families.traced import network_with_file
from xattn.backbone.families.transformers_models import (
    PREFIX,
    interpolation_of,
    is_transformers,
    labels_of,
    normalisation_of,
    own_size,
    preprocessing_of_processor,
    quiet,
    read_saved,
    resolve_source,
    sides_of,
    with_weights,
)
from xattn.backbone.families.transformers_networks import accepts_argument
from xattn.backbone.segmentation import Segmenter
from xattn.photos.preprocessing import Preprocessing
from xattn.runtime.names import did_you_mean

BORDER = Preprocessing(interpolation="bilinear", crop_pct=1.0, crop_mode="border")


class FunctionModule(nn.Module):
    """A module that calls a function of images (B, 3, H, W) in [0, 1]."""

    preprocessing = replace(BORDER, mean=(0.0,) * 3, std=(1.0,) * 3)

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.shared = _Shared(function)
        self.kind = f"the function {getattr(function, '__name__', type(function).__name__)}"

    def forward(self, x: Tensor) -> Any:
        try:
            return self.shared.function(x)
        except RuntimeError as error:
            if "requires grad" not in str(error):
                raise
            return self.shared.function(x.detach())  # a NumPy function


class _Shared:
    """A container for what copies of a module share."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self


class PointPrompted(nn.Module):
    """A network, such as SAM, that segments the object at the given points.

    Args:
        net: takes ``pixel_values`` and ``input_points`` (B, 1, P, 2), x and y in pixels of the input.
        points: (row, column) of each point on one object, as fractions of the input.

    Raises:
        ValueError: if there are no points, a point is outside the input, or the network takes no points.
    """

    def __init__(self, net: nn.Module, points: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        kind = type(net).__name__
        if not self.needed(net):
            raise ValueError(f"prompt: a {kind} takes no points; leave it out")
        if not points:
            raise ValueError(
                f"prompt: a {kind} segments the object at given points; give (row, column) as fractions of "
                f"the input, such as prompt=[(0.5, 0.3)]"
            )
        for point in points:
            if len(point) != 2 or not all(0 <= v <= 1 for v in point):
                raise ValueError(
                    f"prompt: got {point!r}; give (row, column) as fractions of the input's height and "
                    f"width, 0..1"
                )
        self.prompted, self.points = net, tuple(points)

    @staticmethod
    def needed(net: nn.Module) -> bool:
        """Return whether a network takes points in addition to images."""
        return is_transformers(net) and accepts_argument(net, "input_points")

    def forward(self, x: Tensor) -> Any:
        height, width = x.shape[-2:]
        points = x.new_tensor([[column * width, row * height] for row, column in self.points])
        labels = torch.ones(len(x), 1, len(points), dtype=torch.long, device=x.device)
        return self.prompted(
            pixel_values=x, input_points=points.expand(len(x), 1, -1, -1), input_labels=labels
        )


def segmenter_of(
    net: nn.Module, task: str | None, size: tuple[int, int] | None, processor: Any
) -> Segmenter:
    """Wrap a network with the requested options; see :func:`~xattn.backbone.loading.load_segmenter`.

    Raises:
        ValueError: if the task is not one for pixels, or as in :class:`Segmenter`.
    """
    if task not in (None, "multiclass", "multilabel"):
        raise ValueError(
            f"task: got {task!r}; the classes of a segmentation network are a softmax at each pixel, "
            f"'multiclass', or one sigmoid each, 'multilabel'"
        )
    inner: Any = getattr(net, "prompted", net)
    sigmoids = None if task is None else task == "multilabel"
    names = None
    if inner is not net:  # masks of one object
        sigmoids = True
    elif is_transformers(inner):
        names = labels_of(inner.config, "multilabel")
    photos = getattr(net, "preprocessing", None) if processor is None else _photos_of(processor)
    if size is None and photos is None and is_transformers(inner):
        size = own_size(inner.config)
    return Segmenter(net, photos, size, sigmoids, names)


def _photos_of(processor: Any) -> Preprocessing:
    """Read an image processor's preprocessing; if it fixes no size, photos are fitted into a square."""
    processor = getattr(processor, "image_processor", processor)
    size = getattr(processor, "size", None)
    sides = {} if size is None else sides_of(size)
    edge = sides.get("shortest_edge") or sides.get("longest_edge")
    if edge is None or getattr(processor, "do_center_crop", False):
        return preprocessing_of_processor(processor)
    mean, std = normalisation_of(processor)
    return Preprocessing((edge, edge), mean, std, interpolation_of(processor), 1.0, "border")


def segmenter_by_name(
    name: str, weights: str | Path | None, processor: Any
) -> tuple[nn.Module, list[str] | None, Any]:
    """Load the network, its class names if the weights provide them, and its image processor.

    Raises:
        ValueError: if the name is unknown, or the weights do not fit.
    """
    if name.startswith(PREFIX):
        return _of_transformers(name, weights, processor)
    home, _, kind = name.partition("/")
    if home != "torchvision":
        raise ValueError(
            f"model: got {name!r}; give torchvision/NAME, such as torchvision/deeplabv3_resnet50, "
            f"{PREFIX}NAME, or a module"
        )
    return *_of_torchvision(kind, weights), processor


def _of_torchvision(kind: str, weights: str | Path | None) -> tuple[nn.Module, list[str] | None]:
    from torchvision.models import get_model, get_model_weights, list_models, segmentation

    known = list_models(module=segmentation)
    if kind not in known:
        raise ValueError(f"model: got 'torchvision/{kind}'; {did_you_mean(kind, known)}")
    every: Any = get_model_weights(kind)
    names = [str(n) for n in every.DEFAULT.meta["categories"]]
    own: dict[str, Any] = {"weights_backbone": None}
    if weights is None:
        net = get_model(kind, weights=None, **own)
    elif str(weights) in every.__members__:
        net = get_model(kind, weights=str(weights))
    else:
        net = network_with_file(kind, weights, own)
    transforms = every.DEFAULT.transforms()
    side = transforms.resize_size[0]
    net.preprocessing = replace(
        BORDER, input_size=(side, side), mean=tuple(transforms.mean), std=tuple(transforms.std)
    )
    classes = next(m for m in reversed([*net.classifier.modules()]) if isinstance(m, nn.Conv2d))
    return net, names if classes.out_channels == len(names) else None


def _of_transformers(
    name: str, weights: str | Path | None, processor: Any
) -> tuple[Any, None, Any]:
    try:
        import transformers
        from transformers.models.auto import modeling_auto as mappings
    except ImportError:
        raise ValueError(
            f'model: {name} needs transformers; run: pip install "xattn[transformers]"'
        ) from None
    if weights not in ("DEFAULT", None):
        raise ValueError(f"weights: got {str(weights)!r} for {name}; give 'DEFAULT' or None")
    name = name.removeprefix(PREFIX)
    source = resolve_source(name, "model")
    with quiet(transformers):
        config = read_saved(
            name, "config.json", transformers.AutoConfig.from_pretrained, source, "model"
        )
        kinds = {
            kind: getattr(mappings, f"MODEL_FOR_{kind.upper()}_MAPPING_NAMES")
            for kind in ("Universal_Segmentation", "Semantic_Segmentation", "Mask_Generation")
        }
        kind = next((k for k, models in kinds.items() if config.model_type in models), None)
        if kind is None:
            raise ValueError(
                f"model: {PREFIX}{name} holds a {config.model_type}, not a segmentation network; give one "
                f"such as SegFormer, UPerNet, Mask2Former, or SAM"
            )
        if processor is None:
            load = transformers.AutoImageProcessor.from_pretrained
            processor = read_saved(name, "image processor", load, source, "model")
        auto: Any = getattr(transformers, f"AutoModelFor{kind.replace('_', '')}")
        net = auto.from_config(config) if weights is None else with_weights(auto, source, name)
    return net, None, processor
