"""Backbones whose attention is replaced: convert copies, and save and load trained conversions.

    backbone = converted(backbone, "gna", layers="0-7", options={"kernel": 7})
    backbone = load_conversion("runs/distilled/conversion", backbone)

A trained conversion is a folder with two files. ``model.safetensors`` holds the tensors that the mechanism
adds, and any tensors of the network that were trained with it. ``config.json`` describes the conversion.
It also holds one SHA-256 of this description and the tensors, and the name and SHA-256 of the backbone
that the conversion belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xattn.attention.base import Mechanism
from xattn.attention.model.convert import converted_copy
from xattn.attention.model.spec import Conversion
from xattn.backbone.backbone import Backbone
from xattn.backbone.fingerprint import state_sha256
from xattn.runtime import strict_json
from xattn.runtime.files import accepted_by, atomic_folder, dump_json, dump_tensors
from xattn.runtime.version import __version__

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
UPDATES = (".lora_a", ".lora_b")
UPDATE_SCALE = 2.0  # scale of low-rank updates, alpha / r = 16 / 8


def converted(
    backbone: Backbone,
    name: str | type[Mechanism],
    layers: Iterable[int] | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """Create a backbone over a copy of the model, converted as by :func:`~xattn.attention.convert`.

    The copy shares all weights with the original, and the weights that the mechanism adds are the same each
    time. The copy has its own name and fingerprint, and therefore separate caches, heads and runs.

    Raises:
        ValueError: as in ``convert``, or if the backbone's classifier is a head of ``xattn probe``.

    Example:
        >>> import torch, xattn
        >>> from xattn.backbone import converted
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> converted(net, "agent", layers="5").conversion[0].name
        'agent'
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = converted_copy(backbone.model, name, layers, options)
    return backbone.with_converted(model)


def save_conversion(
    folder: str | Path,
    backbone: Backbone,
    conversion: Conversion,
    trained: Mapping[str, Tensor],
    summary: Mapping[str, Any],
) -> Path:
    """Write a trained conversion of ``backbone``; if this fails, no partial folder is left.

    Args:
        trained: tensors by their names in the converted model; a low-rank update of a weight W is given as
            ``NAME.lora_a`` (r, in) and ``NAME.lora_b`` (out, r).
        summary: facts about the training, for the config.

    Raises:
        ValueError: if ``folder`` exists and holds something else.
        OSError: if ``folder`` cannot be written.
    """
    config = {
        "format": 1,
        "xattn": __version__,
        "conversion": conversion.record(),
        "sha256": trained_sha256(conversion, trained),
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint},
        "training": dict(summary),
    }
    with atomic_folder(
        folder, (WEIGHTS_FILE, CONFIG_FILE), accepted_by(read_conversion)
    ) as temporary:
        dump_tensors(temporary / WEIGHTS_FILE, trained)
        dump_json(temporary / CONFIG_FILE, config)
    return Path(folder)


def trained_sha256(made: Conversion, state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 (hex) of a trained conversion: its mechanism, layers, options and tensors."""
    text = json.dumps([state_sha256(state), made.record()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_conversion(folder: str | Path) -> tuple[Conversion, dict[str, Any]]:
    """Read the conversion in ``folder``, and the config that contains it.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if its config is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"mechanism: {folder} holds no {CONFIG_FILE}; give the folder 'conversion' that xattn "
            f"distill wrote, or a name of xattn list"
        )
    try:
        config = strict_json.parse(path.read_bytes(), nan=True)
        made = Conversion.of_record(config["conversion"])
        if not isinstance(config["backbone"]["sha256"], str):
            raise TypeError("the backbone has no sha256")
        if not isinstance(config["sha256"], str):
            raise TypeError("its sha256 is not a str")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"mechanism: {path} is not a trained conversion ({type(error).__name__}: {error}); train it "
            f"again"
        ) from None
    return made, config


def load_conversion(
    folder: str | Path, backbone: Backbone, onto: Backbone | None = None
) -> Backbone:
    """Create a copy of ``backbone`` with the conversion in ``folder``; all untrained weights are shared.

    Args:
        onto: the network to convert, if it is not ``backbone`` but the same network at another size.

    Raises:
        ValueError: if the conversion belongs to another backbone (the message gives both hashes), or if its
            files are damaged or were changed.
        FileNotFoundError: if there is no conversion.

    Example:
        >>> import tempfile
        >>> from xattn import load_conversion
        >>> from PIL import Image
        >>> photos = tempfile.mkdtemp()
        >>> for i in range(4):
        ...     Image.new("RGB", (64, 64), (25 * i, 90, 10)).save(f"{photos}/{i}.png")
        >>> import xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> config = xattn.DistillConfig(epochs=1, batch_size=2)
        >>> run = f"{tempfile.mkdtemp()}/run"
        >>> _ = xattn.distill(net, "hedgehog", "5", data=photos, validation=photos,
        ...     config=config, output=run, progress=False)
        >>> load_conversion(f"{run}/conversion", net).conversion[0].layers
        (5,)
    """
    from xattn.backbone.weights import load_weight_file

    made, config = read_conversion(folder)
    if config["backbone"]["sha256"] != backbone.fingerprint:
        raise ValueError(
            f"mechanism: {folder} was trained on {config['backbone'].get('name')} with weights sha256 "
            f"{config['backbone']['sha256']}, but the backbone {backbone.name} has {backbone.fingerprint}; "
            f"load the backbone it was trained on"
        )
    weights = Path(folder) / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"mechanism: {folder} holds no {WEIGHTS_FILE}; train it again")
    try:
        state = load_weight_file(weights)
    except ValueError as error:
        raise ValueError(str(error).replace("weights", "mechanism", 1)) from None
    wanted, own = config["sha256"], trained_sha256(made, state)
    if wanted != own:
        raise ValueError(
            f"mechanism: {folder} was changed or damaged after it was written (its sha256 is {own}, but "
            f"{CONFIG_FILE} has {wanted}); train it again"
        )
    return with_trained_weights(backbone if onto is None else onto, made, state, str(weights))


@torch.no_grad()
def with_trained_weights(
    backbone: Backbone, made: Conversion, state: Mapping[str, Tensor], source: str = "the state"
) -> Backbone:
    """Convert ``backbone`` according to ``made``, with the tensors of ``state``; see
    :func:`save_conversion`.

    Raises:
        ValueError: if the tensors do not fit the converted model.
    """
    found = converted(backbone, made.name, made.layers, made.options)
    model = found.model
    own = dict(model.state_dict())
    new = {name: value for name, value in state.items() if not name.endswith(UPDATES)}
    mechanism = {name for name in own if ".attn.mechanism." in name}
    try:
        for name in {name.rpartition(".")[0] for name in state if name.endswith(UPDATES)}:
            a, b = (state[name + end].to(own[f"{name}.weight"]) for end in UPDATES)
            new[f"{name}.weight"] = own[f"{name}.weight"] + UPDATE_SCALE * b @ a
        if wrong := (mechanism - set(new)) | (set(new) - set(own)):
            raise KeyError(f"{len(wrong)} names differ, such as {min(wrong)}")
        for name, value in new.items():
            if value.shape != own[name].shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}")
            _put(model, name, value.to(own[name]))
        hashed = trained_sha256(made, state)
        for i in made.layers:
            vars(model.get_submodule(f"blocks.{i}.attn.mechanism"))["trained_sha256"] = hashed
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"mechanism: {source} does not fit {made} ({reason}); train it again"
        ) from None
    return backbone.with_converted(model)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a tensor of ``model``; a tensor shared with another model is not changed."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    value = value.clone()
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    else:
        module._buffers[leaf] = value
