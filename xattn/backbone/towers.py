"""Image towers of ``transformers``' CLIP and SigLIP as timm's ViT: the same weights under timm's names.

CLIP     class token, a norm before the blocks, post_layernorm, visual_projection -> head
SigLIP   no class token, post_layernorm, attention pooling by one query of its own -> attn_pool
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYERS = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def image_tower(vision: nn.Module, projection: nn.Linear | None) -> Any:
    """timm's VisionTransformer that computes what ``vision`` does, and then ``projection``.

    Args:
        vision: a ``CLIPVisionModel`` or ``SiglipVisionModel``.
        projection: a linear layer of its pooled output; None if the embedding is that output.

    Raises:
        ValueError: an activation that timm does not have, or weights that do not fit.
    """
    from timm.layers import get_act_layer
    from timm.models.vision_transformer import VisionTransformer

    config: Any = vision.config
    vision = getattr(vision, "vision_model", vision)  # of transformers 4
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"model: its activation {config.hidden_act!r} is not one of {', '.join(_ACTIVATIONS)}; put the "
            f"towers together with xattn.backbone.clip.Clip(image_backbone, encode_text)"
        )
    state = vision.state_dict()
    pooled = hasattr(vision, "head")
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and then replaced
        tower = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0 if projection is None else projection.weight.shape[0],
            global_pool="map" if pooled else "token",
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            class_token=not pooled,
            pre_norm=not pooled,
            norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
            act_layer=get_act_layer(_ACTIVATIONS[config.hidden_act]),
        )
    weights = _stem(state) | _blocks(state, config.num_hidden_layers)
    weights |= _renamed(state, "post_layernorm", "norm")
    if pooled:
        weights |= _pool(state)
    if projection is not None:
        weight = projection.weight
        weights |= {"head.weight": weight, "head.bias": weight.new_zeros(weight.shape[0])}
    try:
        tower.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: the weights of its image tower do not fit ({reason}); put the towers together with "
            f"xattn.backbone.clip.Clip(image_backbone, encode_text)"
        ) from None
    return tower.to(weights["norm.weight"])


def _renamed(state: dict[str, Tensor], theirs: str, own: str) -> dict[str, Tensor]:
    return {
        f"{own}.{part}": state[f"{theirs}.{part}"]
        for part in ("weight", "bias")
        if f"{theirs}.{part}" in state
    }


def _stem(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = _renamed(state, "embeddings.patch_embedding", "patch_embed.proj")
    found["pos_embed"] = state["embeddings.position_embedding.weight"][None]
    if "embeddings.class_embedding" in state:
        found["cls_token"] = state["embeddings.class_embedding"].view(1, 1, -1)
        found |= _renamed(state, "pre_layrnorm", "norm_pre")
    return found


def _blocks(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i in range(depth):
        layer, block = f"encoder.layers.{i}", f"blocks.{i}"
        for theirs, own in _LAYERS.items():
            found |= _renamed(state, f"{layer}.{theirs}", f"{block}.{own}")
        for part in ("weight", "bias"):
            three = [state[f"{layer}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            found[f"{block}.attn.qkv.{part}"] = torch.cat(three)
    return found


def _pool(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's head; its one matrix for queries, keys and values is two in timm."""
    found = {"attn_pool.latent": state["head.probe"]}
    names = (("attention.out_proj", "proj"), ("layernorm", "norm"), ("mlp.fc1", "mlp.fc1"))
    for theirs, own in (*names, ("mlp.fc2", "mlp.fc2")):
        found |= _renamed(state, f"head.{theirs}", f"attn_pool.{own}")
    for part in ("weight", "bias"):
        query, *others = state[f"head.attention.in_proj_{part}"].chunk(3)
        found |= {f"attn_pool.q.{part}": query, f"attn_pool.kv.{part}": torch.cat(others)}
    return found
