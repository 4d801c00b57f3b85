"""Tiny classifiers of transformers with random weights, their image processors, and a timm ViT with the
weights of one of them."""

from functools import partial

import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIDE, CLASSES = 64, 5
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": SIDE, "patch_size": 16,
}  # fmt: skip
WINDOWS = {
    "image_size": SIDE, "patch_size": 4, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [2, 2, 2],
    "window_size": 4,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
# Class name without ForImageClassification..., its sizes, and its processor.
KINDS = {
    "vit": ("ViT", SIZES, "ViTImageProcessor"),
    "vit_msn": ("ViTMSN", SIZES, "ViTImageProcessor"),
    "deit": ("DeiT", SIZES, "DeiTImageProcessor"),
    "beit": ("Beit", {**SIZES, "use_relative_position_bias": True}, "BeitImageProcessor"),
    "dinov2": ("Dinov2", SIZES, "BitImageProcessor"),
    "dinov2_with_registers": ("Dinov2WithRegisters", SIZES, "BitImageProcessor"),
    "siglip": ("Siglip", {"vision_config": SIZES}, "SiglipImageProcessor"),
    "swin": ("Swin", WINDOWS, "ViTImageProcessor"),
    "swinv2": ("Swinv2", WINDOWS, "ViTImageProcessor"),
    "convnext": ("ConvNext", STAGES, "ConvNextImageProcessor"),
    "convnextv2": ("ConvNextV2", STAGES, "ConvNextImageProcessor"),
    "resnet": ("ResNet", {**STAGES, "embedding_size": 8}, "ConvNextImageProcessor"),
}
TOKENS = [kind for kind, (_, sizes, _) in KINDS.items() if sizes not in (WINDOWS, STAGES)][:7]


def network(kind, purpose="ForImageClassification", seed=0, **options):
    """A classifier of five classes for 64 x 64 pixels, its weights far from uniform attention."""
    name, sizes, _ = KINDS[kind]
    options = {"num_labels": CLASSES, **sizes, **options}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**options)
    made = getattr(transformers, f"{name}{purpose}")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def processor(kind, side=SIDE, backend=""):
    """The family's own, for ``side`` x ``side`` pixels; ``backend`` "Pil" is the one that resizes with
    Pillow."""
    name = KINDS[kind][2]
    sizes = {"size": {"height": side, "width": side}}
    if name == "ConvNextImageProcessor":
        sizes = {"size": {"shortest_edge": side}}
    if name == "BitImageProcessor":
        sizes = {"size": {"shortest_edge": side * 8 // 7}, "crop_size": side}
    if name == "DeiTImageProcessor":
        sizes = {"size": side * 8 // 7, "crop_size": side}
    return getattr(transformers, name + backend)(**sizes)


def timm_twin(vit):
    """timm's ViT with the weights of a ``ViTForImageClassification``, and mean and std 0.5."""
    config, own = vit.config, vit.state_dict()
    twin = VisionTransformer(
        config.image_size, config.patch_size, num_classes=config.num_labels,
        embed_dim=config.hidden_size, depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads, mlp_ratio=config.intermediate_size / config.hidden_size,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
    )  # fmt: skip
    embeddings, state = "vit.embeddings", {}
    state["cls_token"] = own[f"{embeddings}.cls_token"]
    state["pos_embed"] = own[f"{embeddings}.position_embeddings"]
    paths = {
        "patch_embed.proj": f"{embeddings}.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    for i in range(config.num_hidden_layers):
        names = {
            "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
            "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        }  # fmt: skip
        layer = f"vit.layers.{i}"
        paths |= {f"blocks.{i}.{name}": f"{layer}.{theirs}" for name, theirs in names.items()}
        for part in ("weight", "bias"):
            made = [own[f"{layer}.attention.{name}_proj.{part}"] for name in "qkv"]
            state[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(made)
    for name, theirs in paths.items():
        state |= {f"{name}.{part}": own[f"{theirs}.{part}"] for part in ("weight", "bias")}
    twin.load_state_dict(state)
    twin.pretrained_cfg = {
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    return twin
