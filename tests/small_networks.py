"""Small networks, and options that make every explainer of the registry cheap on them."""

import timm
import torch

from xattn import load_backbone

OPTIONS = {
    "rise": {"masks": 6},
    "occlusion": {"size": 16, "stride": 16},
    "lime": {"samples": 6},
    "kernel_shap": {"samples": 6},
    "integrated_gradients": {"steps": 3},
    "gradient_shap": {"samples": 3},
    "smoothgrad": {"samples": 3},
}
CNN_ONLY = ("cam", "guided_backprop", "lrp")
VIT_ONLY = ("rollout", "raw_attention", "column_mass", "generic_relevance", "attn_lrp")


def made(kind):
    """A backbone of seven classes for images of 32 x 32; ``kind`` is "cnn" or "vit"."""
    torch.manual_seed(0)
    if kind == "cnn":
        model = timm.create_model("test_resnet", num_classes=7)
    else:
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2,
            num_classes=7,
        )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return load_backbone(model, input_size=32)
