"""Tiny detectors with random weights, and functions that detect."""

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

SIDE, CLASSES = 64, 4


class TwoLevels(nn.Module):
    """Maps of 32 channels at strides 8 and 16."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1))
        self.second = nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, x):
        one = self.first(x).relu()
        return {"0": one, "1": self.second(one).relu()}


def torchvision_detector(kind, classes=CLASSES):
    """ "fasterrcnn", "maskrcnn", "retinanet", "fcos" or "ssd", with weights that give detections."""
    torch.manual_seed(3)
    sized = {"min_size": SIDE, "max_size": SIDE}
    anchors = AnchorGenerator(((16,), (32,)), ((1.0,), (1.0,)))
    body = TwoLevels()
    if kind in ("fasterrcnn", "maskrcnn"):
        pool = MultiScaleRoIAlign(["0", "1"], 3, 2)
        own = {"mask_roi_pool": MultiScaleRoIAlign(["0", "1"], 4, 2)} if kind == "maskrcnn" else {}
        make = MaskRCNN if kind == "maskrcnn" else FasterRCNN
        net = make(
            body, classes, rpn_anchor_generator=anchors, box_roi_pool=pool, rpn_post_nms_top_n_test=40,
            **sized, **own,
        )  # fmt: skip
        head = net.roi_heads.box_predictor.cls_score
    elif kind == "ssd":
        boxes = DefaultBoxGenerator([[2], [2]], min_ratio=20, max_ratio=60)
        body.out_channels = [32, 32]
        net = SSD(body, boxes, (SIDE, SIDE), classes)
        head = net.head.classification_head.module_list[0]
    elif kind == "retinanet":
        net = RetinaNet(body, classes, anchor_generator=anchors, **sized)
        head = net.head.classification_head.cls_logits
    else:
        net = FCOS(body, classes, anchor_generator=anchors, **sized)
        head = net.head.classification_head.cls_logits
    with torch.no_grad():
        head.weight.copy_(torch.randn_like(head.weight) * (0.6 if "rcnn" in kind else 0.1))
        head.bias.copy_(torch.randn_like(head.bias) - int(kind in ("retinanet", "fcos")))
        for name, weights in net.named_parameters():
            if weights.ndim == 4 and "classification_head.conv" in name:
                weights.mul_(8)  # of the reference, so small that all places answer alike
            if weights.ndim == 4 and name.startswith("backbone"):
                weights.mul_(2)
        if kind == "fcos":
            net.head.regression_head.bbox_reg.bias.add_(1.0)  # boxes of more than a cell
    return net.eval()


def resnet(transformers, levels=("stage4",)):
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=list(levels),
    )  # fmt: skip


def transformers_detector(kind, labels=3):
    """A random detector of transformers, by the type of its config."""
    import transformers

    torch.manual_seed(5)
    small = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 9,
        "num_labels": labels, "use_timm_backbone": False, "use_pretrained_backbone": False,
    }  # fmt: skip
    three = ("stage2", "stage3", "stage4")
    one_map = {
        "detr": "Detr",
        "table-transformer": "TableTransformer",
        "conditional_detr": "ConditionalDetr",
    }
    real_time = {"rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "d_fine": "DFine"}
    if kind in one_map:
        make = getattr(transformers, f"{one_map[kind]}Config")
        config = make(backbone_config=resnet(transformers), **small)
        net = getattr(transformers, f"{one_map[kind]}ForObjectDetection")(config)
    elif kind == "deformable_detr":
        config = transformers.DeformableDetrConfig(
            backbone_config=resnet(transformers, three), num_feature_levels=3, **small
        )
        net = transformers.DeformableDetrForObjectDetection(config)
    elif kind in real_time:
        body = transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=list(three),
        )  # fmt: skip
        config = getattr(transformers, f"{real_time[kind]}Config")(
            backbone_config=body, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16],
            encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16, num_queries=9, decoder_layers=2,
            decoder_in_channels=[16, 16, 16], decoder_attention_heads=2, decoder_ffn_dim=32,
            num_labels=labels, num_denoising=0, use_pretrained_backbone=False,
        )  # fmt: skip
        net = getattr(transformers, f"{real_time[kind]}ForObjectDetection")(config)
    elif kind == "yolos":
        config = transformers.YolosConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=[SIDE, SIDE], patch_size=16, num_detection_tokens=7, num_labels=labels,
        )  # fmt: skip
        net = transformers.YolosForObjectDetection(config)
    else:
        body = transformers.SwinConfig(
            image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_features=list(three),
        )  # fmt: skip
        text = transformers.BertConfig(
            vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
        config = transformers.GroundingDinoConfig(
            backbone_config=body, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            num_queries=9, num_feature_levels=3, max_text_len=16, use_pretrained_backbone=False,
        )  # fmt: skip
        net = transformers.GroundingDinoForObjectDetection(config)
    for weights in net.parameters():
        weights.data.add_(torch.randn_like(weights) * 0.05)
    return net.eval()


class Words:
    """A tokenizer with BERT's numbers for its special tokens."""

    cls_token_id, sep_token_id = 101, 102

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [200 + len(word) for word in text.split()]}

    def convert_tokens_to_ids(self, token):
        assert token == "."
        return 1012


class YoloHead(nn.Module):
    """As ultralytics': of a list of maps centres, sizes and sigmoids (B, 4 + nc, N), or the best 9 as corners,
    score and class (B, 9, 6)."""

    def __init__(self, ends):
        super().__init__()
        self.nc, self.nl, self.end2end = CLASSES, 2, ends
        self.convs = nn.ModuleList(nn.Conv2d(32, 4 + CLASSES, 1) for _ in range(2))

    def forward(self, maps):
        flat = []
        for conv, one in zip(self.convs, maps, strict=True):
            out, step = conv(one), SIDE / one.shape[2]
            y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in one.shape[2:]), indexing="ij")
            centre = (torch.stack([x, y]) + 0.3 * out[:, :2]) * step
            flat.append(
                torch.cat(
                    [centre, 2 * step * out[:, 2:4].exp(), (3 * out[:, 4:]).sigmoid()], 1
                ).flatten(2)
            )
        answer = torch.cat(flat, 2)
        if not self.end2end:
            return answer, {}
        centre, half, scores = answer[:, :2], answer[:, 2:4] / 2, answer[:, 4:]
        best, label = scores.max(1)
        every = torch.cat([centre - half, centre + half, best[:, None], label[:, None]], 1)
        order = best.topk(9).indices[:, None].expand(-1, 6, -1)
        return every.gather(2, order).transpose(1, 2), {}


class YoloNetwork(nn.Module):
    def __init__(self, ends):
        super().__init__()
        torch.manual_seed(4)
        self.model = nn.Sequential(TwoLevels(), YoloHead(ends))
        self.stride = torch.tensor([8.0, 16.0])
        for weights in self.parameters():
            weights.data.mul_(2)

    def forward(self, x):
        return self.model[1](list(self.model[0](x).values()))


class Yolo(nn.Module):
    """What a YOLO of ultralytics looks like; ``train`` would begin a training."""

    def __init__(self, ends=False):
        super().__init__()
        self.names = dict(enumerate(["cat", "dog", "cow", "hen"]))
        self.model = YoloNetwork(ends)

    def train(self, mode=True):
        raise AssertionError("a training begins")

    def predict(self, images):
        raise AssertionError
