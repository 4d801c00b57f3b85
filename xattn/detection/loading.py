"""Load a detector: by name from torchvision or transformers, or from a module or a function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xattn.backbone.families.transformers_models import (
    PREFIX,
    is_transformers,
    read_saved,
    resolve_source,
)
from xattn.backbone.loading import parse_input_size
from xattn.backbone.weights import load_weight_file, part_of
from xattn.detection.detector import Detector
from xattn.detection.networks import CallableDetector, DetectionNetwork
from xattn.photos.classes import read_classes
from xattn.photos.preprocessing import Preprocessing
from xattn.runtime.copies import frozen_copy, without_wrappers
from xattn.runtime.names import did_you_mean


def load_detector(
    model: str | nn.Module | Callable[..., Any],
    weights: str | Path | None = "DEFAULT",
    device: str | torch.device | None = None,
    *,
    input_size: int | tuple[int, int] | None = None,
    class_names: str | Path | Sequence[str] | None = None,
    processor: Any = None,
) -> Detector:
    """Load a frozen detector.

    Args:
        model: ``"torchvision/NAME"`` or ``"transformers:NAME"`` (from the hub or a folder); a detector of
            torchvision or transformers as a module, or a ``YOLO`` of ultralytics; or any function that
            returns boxes, labels and scores, see
            :class:`~xattn.detection.networks.CallableDetector`, for methods that need no gradients.
        weights: if ``model`` is a name, ``"DEFAULT"``, or None for random weights. torchvision's models
            also accept the name of other weights in torchvision, or a local file.
        input_size: (H, W) in pixels, or one side; by default a square with the detector's shorter side.
            The whole photo is fitted in.
        class_names: names of all classes in the detector's order, or the path of a text file with one per
            line. They are required if ``model`` is a function; for Grounding DINO they are the texts that
            it looks for.
        processor: the image processor of a transformers detector or, for Grounding DINO, its processor or
            tokenizer; for a name it is loaded along with the model.

    Raises:
        ValueError: the name is unknown, the module is not a detector, or the number of class names is
            wrong.
        OSError: the folder or the name cannot be read.

    Example:
        >>> detector = load_detector("torchvision/ssdlite320_mobilenet_v3_large", None)
        >>> detector.num_classes, detector.preprocessing.input_size
        (91, (320, 320))
    """
    size = parse_input_size(input_size, least=32)
    names = read_classes(class_names)
    if isinstance(model, str):
        title = model
        made, own, processor = _by_name(model, weights, processor)
        names = names or own
    else:
        made, title = model, getattr(model, "__name__", type(model).__name__)
    network = _network(made, size, names, processor)
    count = network.num_classes
    if names is not None and len(names) != count:
        raise ValueError(
            f"class_names: got {len(names)} for the {count} classes of {title}; give one a class"
        )
    names = names or getattr(network, "class_names", [f"class {i}" for i in range(count)])
    detector = Detector(network, title, network.preprocessing, names)
    return detector.to(device) if device is not None else detector


def _network(
    model: Any, size: tuple[int, int] | None, names: list[str] | None, processor: Any
) -> DetectionNetwork:
    # Imported late: torchvision's detectors take a second to load.
    from xattn.detection.torchvision_networks import FAMILIES, TorchvisionDetector
    from xattn.detection.transformers_networks import TransformersDetector
    from xattn.detection.ultralytics_networks import UltralyticsDetector, is_ultralytics

    if isinstance(model, DetectionNetwork):
        if size is not None:
            raise ValueError(
                f"input_size: a {type(model).__name__} has its own; give it in its preprocessing"
            )
        return model
    if is_ultralytics(model):
        return UltralyticsDetector(model, size)
    if isinstance(model, nn.Module):
        model = frozen_copy(without_wrappers(model))
        if isinstance(model, FAMILIES):
            return TorchvisionDetector(model, size)
        if is_transformers(model):
            return TransformersDetector(model, size, processor, names)
    if not callable(model):
        raise ValueError(
            f"model: got {model!r:.60}; give torchvision/NAME, a detector, or a function that returns "
            f"boxes, labels and scores"
        )
    if names is None:
        raise ValueError(
            f"class_names: a {type(model).__name__} does not say its classes; give their names, one a class"
        )
    photos = Preprocessing(size or (640, 640), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "border")
    return CallableDetector(model, len(names), photos)


def _by_name(
    name: str, weights: str | Path | None, processor: Any
) -> tuple[Any, list[str] | None, Any]:
    """The detector of that name, its class names if the weights provide them, and its processor."""
    if name.startswith(PREFIX):
        return _of_transformers(name.removeprefix(PREFIX), weights, processor)
    home, _, kind = name.partition("/")
    if home != "torchvision":
        raise ValueError(
            f"model: got {name!r}; give torchvision/NAME, such as "
            f"torchvision/fasterrcnn_resnet50_fpn_v2, {PREFIX}NAME, or a module"
        )
    return *_of_torchvision(kind, weights), None


def _of_transformers(
    name: str, weights: str | Path | None, processor: Any
) -> tuple[Any, None, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f'model: {PREFIX}{name} needs transformers; run: pip install "xattn[transformers]"'
        ) from error
    if weights not in ("DEFAULT", None):
        raise ValueError(
            f"weights: got {str(weights)!r} for {PREFIX}{name}; give 'DEFAULT', or None for random ones"
        )

    from xattn.detection.transformers_networks import TEXT

    source = resolve_source(name, "model")
    read = partial(read_saved, name, source=source, argument="model")
    config = read("config.json", transformers.AutoConfig.from_pretrained)
    text = config.model_type in TEXT
    auto = getattr(transformers, f"AutoModelFor{'ZeroShot' * text}ObjectDetection")
    if weights is None:
        if hasattr(config, "use_pretrained_backbone"):
            config.use_pretrained_backbone = False
        made = auto.from_config(config)
    else:
        made = read("model", auto.from_pretrained)
    beside = transformers.AutoProcessor if text else transformers.AutoImageProcessor
    processor = read("processor", beside.from_pretrained) if processor is None else processor
    return made, None, processor


def _of_torchvision(kind: str, weights: str | Path | None) -> tuple[Any, list[str]]:
    from torchvision.models import detection, get_model_weights, list_models

    known = list_models(module=detection)
    if kind not in known:
        raise ValueError(f"model: got 'torchvision/{kind}'; {did_you_mean(kind, known)}")
    every: Any = get_model_weights(kind)
    coco = [str(n) for n in every.DEFAULT.meta["categories"]]
    build = getattr(detection, kind)
    if weights is None or Path(str(weights)).is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = build(weights=None, weights_backbone=None)
        if weights is not None:
            try:
                state = load_weight_file(weights)
                made.load_state_dict(part_of(state, made.state_dict().keys(), weights))
            except (RuntimeError, ValueError) as error:
                reason = " ".join(str(error).removeprefix("weights: ").split())[:200]
                raise ValueError(
                    f"weights: {weights} does not fit torchvision/{kind} ({reason}); of other classes, "
                    f"load it into a module and give that"
                ) from error
        return made, coco
    if str(weights) not in every.__members__:
        raise ValueError(
            f"weights: no file and no weights {str(weights)!r} of {kind}; give "
            f"{', '.join(every.__members__)}, a file, or None"
        )
    return build(weights=str(weights)), coco
