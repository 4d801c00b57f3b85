"""Tiny segmentation networks with random weights."""

import torch
from torch import nn

SIDE, CLASSES = 64, 5


class Levels(nn.Module):
    """Maps of 8 and 16 channels at strides 4 and 8, as a dict with ``low``, ``high`` and ``out``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU())
        self.second = nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, x):
        low = self.first(x)
        high = self.second(low).relu()
        return {"low": low, "out": high, "high": high * 1}


class UNet(nn.Module):
    """Nothing in it is called encoder; the bottleneck is ``middle``."""

    def __init__(self, classes=3):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.last = nn.ConvTranspose2d(16, classes, 2, 2)

    def forward(self, x):
        down = self.down(x)
        up = self.up(self.middle(down)).relu()
        return self.last(torch.cat([down, up], 1))


def torchvision_segmenter(kind):
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
    from torchvision.models.segmentation.fcn import FCN, FCNHead
    from torchvision.models.segmentation.lraspp import LRASPP

    torch.manual_seed(0)
    if kind == "fcn":
        net = FCN(Levels(), FCNHead(16, CLASSES))
    elif kind == "deeplabv3":
        net = DeepLabV3(Levels(), DeepLabHead(16, CLASSES, (2, 4)))
    else:
        net = LRASPP(Levels(), 8, 16, CLASSES, 8)
    return net.eval()


def transformers_segmenter(kind):
    import transformers as t

    torch.manual_seed(0)
    labels = {"num_labels": CLASSES, "id2label": {i: f"thing {i}" for i in range(CLASSES)}}
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "depths": [1] * 4}
    queries = {"num_queries": 6, "mask_feature_size": 32}
    if kind == "segformer":
        config = t.SegformerConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16, **labels,
        )  # fmt: skip
        return t.SegformerForSemanticSegmentation(config).eval()
    if kind == "upernet":
        convnext = t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], **stages)
        config = t.UperNetConfig(
            backbone_config=convnext, hidden_size=16, pool_scales=[1, 2], auxiliary_in_channels=16,
            auxiliary_channels=8, **labels,
        )  # fmt: skip
        return t.UperNetForSemanticSegmentation(config).eval()
    swin = t.SwinConfig(
        image_size=SIDE, patch_size=4, embed_dim=8, num_heads=[1, 1, 2, 2], window_size=2, **stages
    )
    if kind == "maskformer":
        detr = t.DetrConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=6,
        )  # fmt: skip
        config = t.MaskFormerConfig(
            backbone_config=swin, decoder_config=detr, fpn_feature_size=32, **queries, **labels
        )
        return t.MaskFormerForInstanceSegmentation(config).eval()
    config = t.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, **queries, **labels,
    )  # fmt: skip
    return t.Mask2FormerForUniversalSegmentation(config).eval()


def sam():
    import transformers as t

    torch.manual_seed(0)
    shared = {"hidden_size": 16, "image_size": SIDE, "patch_size": 16}
    config = t.SamConfig(
        vision_config={
            **shared, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 16, "mlp_dim": 16,
            "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 8,
        },
        prompt_encoder_config={**shared, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    return t.SamModel(config).eval()


def smp_segmenter(kind):
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    return getattr(smp, kind)("mobilenet_v2", encoder_weights=None, classes=3).eval()
