"""Tiny random networks of clips (B, 3, T, H, W) with five classes, one of each family."""

import warnings

import torch
from torch import nn

from xattn import load_backbone

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "num_labels": 5,
}  # fmt: skip
TRANSFORMERS = {
    "VideoMAE": {"image_size": 32, "patch_size": 8, "num_frames": 4},
    "Timesformer": {"image_size": 32, "patch_size": 8, "num_frames": 4},
    "Vivit": {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]},
    "VJEPA2": {
        "crop_size": 32, "patch_size": 8, "frames_per_clip": 4, "pred_hidden_size": 16,
        "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "num_pooler_layers": 1,
        "hidden_size": 24,
    },
}  # fmt: skip
TORCHVISION = ("r3d", "s3d", "mvit", "swin3d")


class Tiny(nn.Module):
    """Two 3-D convolutions, pooled and classified; a network of one's own."""

    def __init__(self, channels=3):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(channels, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(8, 12, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        return self.fc(self.net(x).mean((2, 3, 4)))


def network(family):
    """The network, and the (T, H, W) that it reads."""
    torch.manual_seed(0)
    if family == "own":
        return Tiny(), (6, 28, 20)
    if family in TRANSFORMERS:
        import transformers

        config = getattr(transformers, f"{family}Config")(**{**SIZES, **TRANSFORMERS[family]})
        made = getattr(transformers, f"{family}ForVideoClassification")(config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return made, (4, 32, 32)
    import torchvision.models.video as zoo
    from torchvision.models.video.mvit import MSBlockConfig

    if family == "r3d":
        return zoo.r3d_18(num_classes=5), (4, 32, 32)
    if family == "s3d":
        made = zoo.S3D(num_classes=5)
        made.avgpool = nn.AdaptiveAvgPool3d(1)  # its own wants 224 pixels
        return made, (14, 32, 32)
    if family == "swin3d":
        sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_classes": 5}
        return zoo.SwinTransformer3d([2, 4, 4], window_size=[2, 4, 4], **sizes), (4, 32, 32)
    blocks = [
        MSBlockConfig(1, 8, 8, q, [3, 3, 3], stride, [1, 2, 2])
        for q, stride in (([], []), ([3, 3, 3], [1, 2, 2]), ([], []))
    ]
    made = zoo.MViT((32, 32), 4, blocks, False, False, False, False, num_classes=5)
    return made, (4, 32, 32)


def backbone(family):
    """It, for clips of its own size."""
    net, (frames, *sides) = network(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"input_size": tuple(sides), "frames": frames, "mean": 0.4, "std": 0.3}
        return load_backbone(net, **options)


def flat(channels=(3, 6, 8)):
    """The same network of photos and of clips whose convolutions are one frame deep."""
    torch.manual_seed(0)
    two = nn.Sequential(
        nn.Conv2d(channels[0], channels[1], 3, padding=1), nn.BatchNorm2d(channels[1]), nn.ReLU(),
        nn.Conv2d(channels[1], channels[2], 3, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(channels[2], 4),
    )  # fmt: skip
    three = nn.Sequential(
        nn.Conv3d(channels[0], channels[1], (1, 3, 3), padding=(0, 1, 1)),
        nn.BatchNorm3d(channels[1]), nn.ReLU(),
        nn.Conv3d(channels[1], channels[2], (1, 3, 3), (1, 2, 2), padding=(0, 1, 1)), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels[2], 4),
    )  # fmt: skip
    weights = two.state_dict()
    three.load_state_dict({k: weights[k].view(v.shape) for k, v in three.state_dict().items()})
    return two, three


def clips(of, count=2, seed=0):
    """Random clips for the backbone ``of``."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, of.mean.shape[1], *of.preprocessing.places, generator=draw)
