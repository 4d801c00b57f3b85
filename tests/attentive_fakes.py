"""Small backbones with 0, 1, 2 and 5 prefix tokens, and heads with random weights, so that no mistake is hidden by zeros."""

from __future__ import annotations

import functools

import torch
from timm.models.vision_transformer import VisionTransformer

import xattn
from xattn.heads import AttentiveHead, Tokens, head_class, head_entry, list_heads
from xattn.heads.base import seeded_head

WIDTH, CLASSES, GRID = 32, 5, (3, 5)
HEADS = [name for name in list_heads() if issubclass(head_class(name), AttentiveHead)]
PREFIXES = {  # name -> (class token, registers)
    "0 prefix tokens": (False, 0),
    "1 prefix token": (True, 0),
    "2 prefix tokens": (True, 1),
    "5 prefix tokens": (True, 4),
    "2 registers alone": (False, 2),
}


@functools.cache
def vit(prefix="1 prefix token", taps=("head",)):
    class_token, registers = PREFIXES[prefix]
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=(24, 40),
        patch_size=8,
        embed_dim=WIDTH,
        depth=4,
        num_heads=2,
        num_classes=CLASSES,
        class_token=class_token,
        reg_tokens=registers,
        global_pool="token" if class_token else "avg",
    )
    return xattn.load_backbone(model, taps=list(taps))


@functools.cache
def cnn():
    torch.manual_seed(0)
    return xattn.load_backbone("test_resnet", weights=None, input_size=96, num_classes=CLASSES)


def four_taps(prefix="1 prefix token"):
    from xattn.heads import MemeTector

    return vit(prefix, MemeTector.default_taps(4))


def small(name):
    """The first options of the head's entry."""
    return dict(head_entry(name).cases[0])


def read_by(name, prefix="1 prefix token"):
    """A backbone with the taps that the head reads by default."""
    cls = head_class(name)
    if head_entry(name).taps is not None:
        return vit(prefix)
    return vit(prefix, cls.default_taps(4)) if issubclass(cls, AttentiveHead) else cnn()


def make(name, backbone=None, seed=0, **options):
    """A head in eval mode, random weights and statistics everywhere."""
    backbone = backbone or read_by(name)
    head = seeded_head(name, backbone, seed, **{**small(name), **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim:  # GeM's exponent stays positive
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        for buffer_name, buffer in head.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif buffer_name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return head.eval()


def random_tokens(head, batch=3, grid=GRID, seed=1, dtype=torch.float32, width=WIDTH, prefix=1):
    """Tokens that need no backbone."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]

    def draw(n):
        return torch.randn(batch, n, width, generator=generator, dtype=torch.float64).to(dtype)

    return Tokens(tuple(draw(count) for _ in range(head.num_taps)), draw(prefix), grid)


def pool(weights, values):
    """sum_t A_qt v_qt of (B, Q, T) and (B, G, T, V), each value for Q / G queries in a row."""
    values = values.repeat_interleave(weights.shape[1] // values.shape[1], 1)
    return (weights[:, :, None] @ values)[:, :, 0]


def map_patches(tokens, function):
    return tokens._replace(patches=tuple(function(x) for x in tokens.patches))
