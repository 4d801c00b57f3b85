"""Tiny timm ViTs with every kind of prefix token and pooling, and photos for them."""

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from xattn.backbone import load_backbone

TARGET = torch.tensor([3, 6])  # classes of two photos
FUSE = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}
GRID = (3, 5)
VARIANTS = {
    "class": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "none": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "average": (VisionTransformer, {"reg_tokens": 1, "global_pool": "avg"}),
    "pool": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
}
PREFIX = {"class": 1, "distilled": 2, "registers": 5, "none": 0, "average": 2, "pool": 0}


def tiny(variant="class", grid=GRID, depth=3, seed=0, **options):
    """A backbone of width 16 with 2 heads on patches of 4 pixels, weights far from uniform attention."""
    cls, own = VARIANTS[variant]
    sizes = {"img_size": (4 * grid[0], 4 * grid[1]), "patch_size": 4, "embed_dim": 16}
    options = {"depth": depth, "num_heads": 2, "num_classes": 7, "mlp_ratio": 2, **own, **options}
    torch.manual_seed(seed)
    model = cls(**{**sizes, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return load_backbone(model)


def photos(backbone, count=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    size = backbone.preprocessing.input_size
    return torch.rand(count, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def assert_equal(got, expected, tolerance=1e-6):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def share(x, part):
    """``x``, with ``part`` of its gradient."""
    return part * x + (1 - part) * x.detach()
