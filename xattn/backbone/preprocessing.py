"""How a photo becomes the input of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

LARGEST_SIDE = 8192  # pixels of an input


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes the model's input; sizes in pixels, mean and std for [0, 1] images."""

    input_size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"


def preprocessing_of(
    model: nn.Module, overrides: dict[str, Any], size: tuple[int, int] | None
) -> Preprocessing:
    own = getattr(model, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own if size is None else replace(own, input_size=size)
    if not {**_config_of(model), **overrides}:
        return Preprocessing() if size is None else Preprocessing(input_size=size)
    from timm.data import resolve_data_config

    config = resolve_data_config({}, pretrained_cfg={**_config_of(model), **overrides})
    return Preprocessing(
        input_size=size or (config["input_size"][1], config["input_size"][2]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    embed = getattr(model, "patch_embed", None)
    img_size = getattr(embed, "img_size", None)
    if img_size is not None and not isinstance(img_size, int):
        config["input_size"] = (3, *img_size)
    return config
