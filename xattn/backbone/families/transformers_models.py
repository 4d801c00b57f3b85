"""Load image classifiers of Hugging Face ``transformers``, from a module with its processor or from a name.

    model = AutoModelForImageClassification.from_pretrained(NAME)
    backbone = load_backbone(model, processor=AutoImageProcessor.from_pretrained(NAME))
    backbone = load_backbone(f"transformers:{NAME}")  # the same

Normalisation, crop and interpolation come from the processor, labels and task from the model's config.
The package itself is imported only to load a model by name.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from xattn.attention.model.convert import evaluation_mode
from xattn.backbone.families.hooked import HookedClassifier, from_hooks
from xattn.backbone.families.transformers_clips import KIND, clip_classifier
from xattn.backbone.families.transformers_networks import (
    TransformersLogits,
    TransformersMaps,
    TransformersNetwork,
    TransformersViT,
    accepts_argument,
    pair_of,
)
from xattn.backbone.segmentation import Segmenter
from xattn.photos.classes import Task
from xattn.photos.preprocessing import Preprocessing, has_normalization
from xattn.runtime.locking import alone

PREFIX = "transformers:"
FAMILIES: dict[str, type[TransformersNetwork]] = {
    **dict.fromkeys(
        ("vit", "vit_msn", "deit", "beit", "dinov2", "dinov2_with_registers", "siglip"),
        TransformersViT,
    ),
    **dict.fromkeys(("swin", "swinv2", "convnext", "convnextv2", "resnet"), TransformersMaps),
}
GIVE = (
    "give a ...ForImageClassification, as AutoModelForImageClassification.from_pretrained loads it"
)


def is_transformers(module: nn.Module) -> bool:
    """Return whether ``module`` is a transformers model; this does not import the package."""
    found = sys.modules.get("transformers.modeling_utils")
    return found is not None and isinstance(module, found.PreTrainedModel)


def name_of(network: Any) -> str:
    """Return the name that loads the model again if it was loaded by name; otherwise its class's name."""
    path = str(network.config._name_or_path or "")
    return f"{PREFIX}{path}" if path else type(network).__name__


def from_transformers(
    network: Any,
    processor: Any = None,
    task: Task | None = None,
    taps: Sequence[str] | None = None,
    input_size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> TransformersNetwork | HookedClassifier:
    """Prepare a transformers classifier for ``load_backbone``, as its image processor and config define.

    The families in ``FAMILIES`` have the same parts as timm's networks. Other models run unchanged, with
    hooks.

    Args:
        task: replaces the task in the config.
        taps, input_size, frames: for models run with hooks, as in
            :func:`~xattn.backbone.families.hooked.from_hooks`.

    Raises:
        ValueError: if the model is not an image classifier or has inputs besides pixels, or the processor
            prepares photos in a way that :class:`Preprocessing` cannot express.
    """
    kind = type(network).__name__
    if kind == "TimmWrapperForImageClassification":
        raise ValueError(
            f"name_or_module: a {kind} holds a timm model; call load_backbone(model.timm_model)"
        )
    if KIND not in kind and "ForImageClassification" not in kind:
        raise ValueError(f"name_or_module: a {kind} is {_what(kind, network)}; {GIVE}")
    if KIND not in kind and not accepts_argument(network, "pixel_values"):
        raise ValueError(
            f"name_or_module: a {kind} reads {network.main_input_name}, not pixels; give it a method "
            f"forward_taps(x) -> (logits, maps)"
        )
    preprocessing = None if processor is None else preprocessing_of_processor(processor)
    task = task or _task(network.config)
    labels = labels_of(network.config, task)
    family = FAMILIES.get(network.config.model_type)
    with alone(network), evaluation_mode(network):
        if KIND in kind:
            hooked = clip_classifier(network, preprocessing, taps, input_size, frames)
            hooked.task, hooked.class_names = task, labels
            return hooked
        if family is None:
            size = input_size or (None if preprocessing else own_size(network.config))
            whole = TransformersLogits(network, preprocessing)
            hooked = from_hooks(whole, taps, input_size=size, kind=kind)
            hooked.task, hooked.class_names = task, labels
            return hooked
        model = _checked(family, network, preprocessing.input_size if preprocessing else (224, 224))
    model.preprocessing, model.task, model.class_names = preprocessing, task, labels
    return model


def own_size(config: Any) -> tuple[int, int] | None:
    """Return the (H, W) of the images for which a network was made, from its config; None if the config
    does not contain it."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    return None if size is None else pair_of(size)


def network_of(model: nn.Module) -> Any:
    """Return the transformers network inside ``model``, or None."""
    if isinstance(model, HookedClassifier) and isinstance(model.net, TransformersLogits):
        return model.net.network
    if isinstance(model, Segmenter):
        net = getattr(model.net, "prompted", model.net)
        return net if is_transformers(net) else None
    return model.network if isinstance(model, TransformersNetwork) else None


def check_processor(model: nn.Module, processor: Any, normalised: bool) -> None:
    """Raise a ``ValueError`` unless the preprocessing for ``model`` is given, and by a suitable source.

    Args:
        normalised: whether mean and std are given.
    """
    network = network_of(model)
    if network is None:
        if processor is not None:
            raise ValueError(
                f"processor: got a {type(processor).__name__} for a {type(model).__name__}, which is not "
                f"a transformers model; give mean= and std= instead"
            )
    elif not normalised and not has_normalization(model):
        raise ValueError(
            f"processor: a {type(network).__name__} does not define how photos are prepared for it; "
            f"give processor=AutoImageProcessor.from_pretrained(...), or mean= and std="
        )


def load_transformers(
    name: str,
    weights: str | Path | None = "timm",
    processor: Any = None,
    num_classes: int | None = None,
    task: Task | None = None,
    taps: Sequence[str] | None = None,
    input_size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> TransformersNetwork | HookedClassifier:
    """Load ``transformers:FOLDER``, or ``transformers:NAME`` from the hub, for ``load_backbone``.

    Args:
        weights: None for random weights; otherwise the weights saved with the model are used.
        processor: used instead of the one saved with the model.
        num_classes: not allowed, because the classifier fixes it.
        task: replaces the task in the config.
        taps, input_size, frames: as in :func:`from_transformers`.

    Raises:
        ValueError: as in :func:`from_transformers`, or if transformers is not installed, or if the
            classifier has no weights.
        OSError: if a folder or a name cannot be read.
    """
    name = name.removeprefix(PREFIX)
    if weights not in ("timm", None):
        raise ValueError(
            f"weights: got {str(weights)!r}, but {PREFIX}{name} has its own; leave it out"
        )
    if num_classes is not None:
        raise ValueError(
            f"num_classes: got {num_classes}, but {PREFIX}{name} has its own classifier; leave it out"
        )
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"backbone: {PREFIX}{name} needs transformers, which is not installed; run: pip install "
            f'"xattn[transformers]"'
        ) from None
    source = resolve_source(name)
    with quiet(transformers):
        config = read_saved(name, "config.json", transformers.AutoConfig.from_pretrained, source)
        _check_config(config, name, transformers)
        if processor is None:
            load = transformers.AutoImageProcessor.from_pretrained
            processor = read_saved(name, "image processor", load, source)
        clips = config.model_type in _known(transformers, clips=True)
        auto: Any = transformers.AutoModelForImageClassification
        auto = transformers.AutoModelForVideoClassification if clips else auto
        network = auto.from_config(config) if weights is None else with_weights(auto, source, name)
    return from_transformers(network, processor, task, taps, input_size, frames)


def resolve_source(name: str, argument: str = "backbone") -> str:
    """Return a folder that exists, or a name on the hub, OWNER/NAME; errors begin with ``argument``."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{argument}: {PREFIX}{name} holds no config.json; give a folder that save_pretrained wrote"
            )
        return str(folder)
    owner, _, rest = name.partition("/")
    if not owner or owner[0] in ".~" or not rest or "/" in rest or Path(owner).is_dir():
        raise FileNotFoundError(
            f"{argument}: no folder {name!r}; give a folder, or OWNER/NAME on the hub, after {PREFIX}"
        )
    return name


def with_weights(auto: Any, source: str, name: str) -> Any:
    load = partial(auto.from_pretrained, output_loading_info=True)
    network, loading = read_saved(name, "weights", load, source)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"backbone: {PREFIX}{name} has no weights for {', '.join(missing[:2])} of a "
            f"{type(network).__name__}; fine-tune it as a classifier first, or give a classifier"
        )
    return network.float()


def _check_config(config: Any, name: str, transformers: Any) -> None:
    kinds = list(config.architectures or ())
    for clips, ending in ((False, "ForImageClassification"), (True, KIND)):
        if config.model_type in _known(transformers, clips) and (not kinds or ending in kinds[0]):
            return
    kind = kinds[0] if kinds else config.model_type
    raise ValueError(f"backbone: {PREFIX}{name} holds a {kind}, which is {_what(kind)}; {GIVE}")


def _known(transformers: Any, clips: bool = False) -> Any:
    """Return the types of config that have a classifier for photos, or for clips."""
    names = transformers.models.auto.modeling_auto
    kind = "VIDEO" if clips else "IMAGE"
    return getattr(names, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING_NAMES")


def _what(kind: str, network: Any = None) -> str:
    """Describe a transformers class that is not an image classifier, from its name and input."""
    if getattr(network, "main_input_name", "pixel_values") != "pixel_values":
        return "a model of text or sound, not an image classifier"
    if kind.endswith("Model"):
        return "a network without a classifier"
    purpose = re.search("For([A-Z].*)", kind)
    words = re.sub("([A-Z])", r" \1", purpose[1]).lower() if purpose else ""
    return f"made for{words}, not an image classifier" if words else "not an image classifier"


def _checked(family: Any, network: Any, size: tuple[int, int]) -> Any:
    """Return the parts of the network, once they reproduce its own logits for a random image."""
    kind = type(network).__name__
    weight = next(network.parameters())
    try:
        model = family(network)
        size = model.patch_embed.img_size if hasattr(model, "patch_embed") else size
        draw = torch.Generator().manual_seed(0)
        config = getattr(network.config, "vision_config", network.config)
        image = (
            torch.rand(1, config.num_channels, *size, generator=draw, device="cpu").to(weight) - 0.5
        )
        own, read = network(image).logits, model(image)
        if not torch.allclose(own, read, rtol=1e-3, atol=1e-4 + 1e-3 * float(own.abs().max())):
            raise ValueError("its own logits differ")
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"name_or_module: {kind} of this version of transformers is not built as expected ({reason}); "
            f"give it a method forward_taps(x) -> (logits, maps)"
        ) from error
    return model


# ---------------------------------------------------------------------- labels and task


def _task(config: Any) -> Task | None:
    """Return the task in ``config.problem_type``; if None, the number of outputs determines the task."""
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return "multilabel"
    if problem == "regression" and config.num_labels > 1:
        raise ValueError(
            f"task: config.problem_type is 'regression' with {config.num_labels} outputs; give task= if "
            f"they are logits of classes"
        )
    return None


def labels_of(config: Any, task: Task | None) -> list[str] | None:
    """Return the class names in ``config.id2label``; None if the config has only numbers.

    If there is a single output, two names are returned, one for each of its two classes."""
    labels = {int(i): str(label) for i, label in (config.id2label or {}).items()}
    names = [labels.get(i, f"LABEL_{i}") for i in range(config.num_labels)]
    if len(names) != 1 or task == "multilabel":
        return names or None
    return None if names == ["LABEL_0"] else [f"not {names[0]}", names[0]]


# ---------------------------------------------------------------------- the image processor


def preprocessing_of_processor(processor: Any) -> Preprocessing:
    """Return how a transformers image processor prepares a photo.

    Raises:
        ValueError: if it is not an image processor, or if its result has no fixed size.
    """
    processor = getattr(processor, "image_processor", processor)
    if not hasattr(processor, "image_mean") or not hasattr(processor, "size"):
        raise ValueError(
            f"processor: got {type(processor).__name__}; give the model's image processor, as "
            f"AutoImageProcessor.from_pretrained loads it"
        )
    resized, crop, squash = _geometry(processor)
    mean, std = normalisation_of(processor)
    pct = crop[0] / resized[0]
    if math.floor(crop[0] / pct) != resized[0]:  # rounded down
        pct = crop[0] / (resized[0] + 0.5)
    return Preprocessing(
        input_size=crop,
        mean=mean,
        std=std,
        interpolation=interpolation_of(processor),
        crop_pct=pct,
        crop_mode="squash" if squash else "center_floor",
    )


def _geometry(processor: Any) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Return the size to which a photo is resized (or its short side, given twice), the crop of the resized
    photo, and whether the aspect ratio is lost."""
    size = sides_of(processor.size)
    short, both = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    crop = sides_of(processor.crop_size) if getattr(processor, "do_center_crop", False) else {}
    cropped = (crop.get("height"), crop.get("width"))
    if not getattr(processor, "do_resize", True) or "longest_edge" in size:
        short, both = None, (None, None)
    if short and getattr(processor, "crop_pct", None):  # ConvNeXt and ResNet
        if short >= 384:
            return (short, short), (short, short), True
        return (int(short / processor.crop_pct),) * 2, (short, short), False
    if short and None not in cropped and cropped[0] == cropped[1]:
        return (short, short), cropped, False  # type: ignore[return-value]
    if None not in both:
        crops = both if None in cropped else cropped
        if both[0] * crops[1] == both[1] * crops[0]:  # type: ignore[operator]
            return both, crops, True  # type: ignore[return-value]
    raise ValueError(
        f"processor: {type(processor).__name__} with size {size} and crop {crop or None} returns photos "
        f"of no fixed size; give one with height and width, or with shortest_edge and a crop"
    )


def sides_of(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    items = size.items() if isinstance(size, Mapping) else vars(size).items()
    return {key: int(value) for key, value in items if value is not None}


def normalisation_of(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation for pixels in [0, 1], from a transformers image processor."""
    mean, std = processor.image_mean, processor.image_std
    if not getattr(processor, "do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if getattr(processor, "rescale_offset", False):
        raise ValueError(
            f"processor: {type(processor).__name__} shifts pixels (rescale_offset); give mean= and std= of "
            f"pixels in [0, 1] instead"
        )
    means, stds = (
        [float(v)] * 3 if isinstance(v, int | float) else [float(x) for x in v] for v in (mean, std)
    )
    rescales = getattr(processor, "do_rescale", True)
    factor = getattr(processor, "rescale_factor", 1 / 255) if rescales else 1.0
    unit = 1.0 if math.isclose(255 * factor, 1, rel_tol=1e-4) else 255 * factor
    return tuple(v / unit for v in means), tuple(v / unit for v in stds)


def interpolation_of(processor: Any) -> str:
    resample = getattr(processor, "resample", None)
    value = getattr(resample, "value", resample)
    if isinstance(value, str):  # torchvision's InterpolationMode
        return value
    return Image.Resampling(2 if value is None else int(value)).name.lower()


# ---------------------------------------------------------------------- reading saved models


def read_saved(name: str, what: str, load: Any, source: str, argument: str = "backbone") -> Any:
    """Return the result of ``load(source)``; an error message of several lines is joined into one."""
    try:
        return load(source)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"{argument}: {PREFIX}{name}: its {what} could not be read ({type(error).__name__}: {reason}); "
            f"give a folder to which save_pretrained wrote the model and the image processor"
        ) from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' messages about loading inside the context; problems that matter are raised as
    errors."""
    logs = transformers.utils.logging, importlib.import_module("huggingface_hub.utils.logging")
    levels, bar = [log.get_verbosity() for log in logs], logs[0].is_progress_bar_enabled()
    for log in logs:
        log.set_verbosity_error()
    logs[0].disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        if bar:
            logs[0].enable_progress_bar()
