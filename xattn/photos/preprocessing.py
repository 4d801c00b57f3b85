"""How a photo becomes the input of a model: as the model defines it, with any changes that the user
requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from numbers import Real
from typing import Any

from torch import nn

from xattn.runtime.names import did_you_mean

LARGEST_SIDE = 8192  # largest side of an input in pixels
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # Pillow's


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes the model's input; sizes are in pixels, mean and std refer to images in [0, 1].

    Example:
        >>> from xattn import Preprocessing
        >>> Preprocessing(input_size=(64, 64), crop_pct=1.0).input_size
        (64, 64)
    """

    input_size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @property
    def places(self) -> tuple[int, ...]:
        """Sides of the model's input: (H, W), or for a clip (T, H, W)."""
        return self.input_size


@dataclass(frozen=True)
class ClipPreprocessing(Preprocessing):
    """How a clip or a volume becomes the input (C, T, H, W): T = ``frames``, each prepared like a photo."""

    frames: int = 16

    @property
    def places(self) -> tuple[int, ...]:
        return (self.frames, *self.input_size)


def preprocessing_of(model: nn.Module, size: tuple[int, int] | None = None) -> Preprocessing:
    """The model's own preprocessing, with ImageNet's values for anything that it does not define, and with
    the input size ``size`` if one is given."""
    own = getattr(model, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own if size is None else replace(own, input_size=size)
    if not _config_of(model):
        return Preprocessing() if size is None else Preprocessing(input_size=size)
    from timm.data import resolve_data_config

    config = resolve_data_config({}, pretrained_cfg=_config_of(model))
    return Preprocessing(
        input_size=size or (config["input_size"][1], config["input_size"][2]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def clip_preprocessing(own: Preprocessing, model: nn.Module, frames: int | None) -> Preprocessing:
    """``own``, extended to clips of ``frames`` frames if ``model`` does not define its preprocessing and
    either ``frames`` is given or the model's first convolution is 3-D."""
    said = isinstance(getattr(model, "preprocessing", None), Preprocessing) or _config_of(model)
    if said or not (frames or isinstance(first_convolution(model), nn.Conv3d)):
        return own
    return ClipPreprocessing(**asdict(own), frames=frames or ClipPreprocessing.frames)


def has_normalization(model: nn.Module) -> bool:
    """Whether the model itself provides the mean and std that it was trained with."""
    if isinstance(getattr(model, "preprocessing", None), Preprocessing):
        return not getattr(model, "assumes_preprocessing", False)
    return bool(_config_of(model).get("mean"))


def preprocessing_with_options(
    own: Preprocessing,
    channels: int,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    crop: float | None,
    interpolation: str | None,
) -> Preprocessing:
    """``own`` for ``channels`` channels, with the changes requested in
    :func:`~xattn.backbone.load_backbone`.

    Raises:
        ValueError: the numbers are for pixels in 0..255, the number of channels is wrong, or a name is
            unknown.
    """
    changes: dict[str, Any] = {}
    if mean is not None:
        changes["mean"] = _per_channel("mean", mean, channels)
    if std is not None:
        changes["std"] = _per_channel("std", std, channels)
    if crop is not None:
        if isinstance(crop, bool) or not isinstance(crop, Real) or not 0.05 <= crop <= 1:
            raise ValueError(
                f"crop: got {crop!r}; give the share of a resized photo's side that the model sees, "
                f"0.05 to 1, such as 0.875 (224 of 256 pixels)"
            )
        changes["crop_pct"] = float(crop)
    if interpolation is not None:
        if interpolation not in INTERPOLATIONS:
            hint = did_you_mean(interpolation, INTERPOLATIONS)
            raise ValueError(f"interpolation: got {interpolation!r}; {hint}")
        changes["interpolation"] = interpolation
    found = replace(own, **changes)
    if len(found.mean) != len(found.std):  # one was given, for another number of channels
        missing = "std" if mean is not None else "mean"
        raise ValueError(f"{missing}: got none for a model of {channels} channels; give both")
    return found


def _per_channel(name: str, given: float | Sequence[float], channels: int) -> tuple[float, ...]:
    """A number for each channel; a single number applies to all."""
    values = list(given) if hasattr(given, "__iter__") else [given]  # type: ignore[arg-type]
    example = "(0.485, 0.456, 0.406)" if name == "mean" else "(0.229, 0.224, 0.225)"
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {given!r}; give one number per channel: {example}") from None
    if len(numbers) not in (1, channels):
        raise ValueError(
            f"{name}: got {len(numbers)} numbers for {channels} channels; give {channels}, or one for all"
        )
    if not all(isfinite(n) for n in numbers) or (name == "std" and min(numbers) <= 0):
        raise ValueError(f"{name}: got {given!r}; give finite numbers{' over 0' * (name == 'std')}")
    if max(map(abs, numbers)) > 1:
        scaled = ", ".join(f"{n / 255:.3g}" for n in numbers)
        raise ValueError(
            f"{name}: got {given!r}; pixels are in [0, 1] here, so divide numbers for 0..255 by 255: "
            f"({scaled})"
        )
    return numbers * channels if len(numbers) == 1 else numbers


def channels_of(model: nn.Module, own: Preprocessing) -> int:
    """The number of image channels that the model takes: its ``input_channels``, the number that its first
    convolution reads or, if that does not read an image, the number that ``own`` normalises."""
    if isinstance(said := getattr(model, "input_channels", None), int):
        return said
    first = first_convolution(model)
    return len(own.mean) if first is None or first.in_channels > 4 else first.in_channels


def first_convolution(model: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """The first convolution over two or three axes among the modules of ``model``."""
    return next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)


def preprocessing_record(model: nn.Module, used: Preprocessing) -> dict[str, Any]:
    """``{"preprocessing": {...}}`` with the changes of ``used`` to the model's own preprocessing, except
    the size; empty if there are none."""
    own = asdict(preprocessing_of(model))
    changed = {key: value for key, value in asdict(used).items() if value != own.get(key, value)}
    changed.pop("input_size", None)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
    return {"preprocessing": values} if values else {}


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    embed = getattr(model, "patch_embed", None)
    img_size = getattr(embed, "img_size", None)
    if img_size is not None and not isinstance(img_size, int):
        config["input_size"] = (3, *img_size)
    return config
