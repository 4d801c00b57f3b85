"""A small variant of every timm family, with random weights."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

FAMILIES: dict[str, str | tuple[str, int]] = {
    "beit": "beit_base_patch16_224",
    "byoanet": ("halonet_h1", 256),
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": ("deepseek_vit_412m", 224),
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mnasnet_small",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""For each module of timm, a model's name, and the side of its pictures if that is not 64."""
SAMPLE = (
    "byobnet convit convnext deit dla edgenext efficientvit_mit hgnet levit mambaout mobilevit nfnet "
    "resnet starnet"
).split()
SHORT = {"deepseek_vit_412m": 2, "gemma4_vit_167m": 2, "qwen3_vit_88m": 2}  # depths of the largest


def model_of(family: str) -> tuple[str, int]:
    """The model's name, and the side of its pictures."""
    found = FAMILIES[family]
    return (found, 64) if isinstance(found, str) else found


def network(family: str, classes: int = 7) -> tuple[nn.Module, int]:
    """The network in float64, with biases and statistics far from 0 and 1, and its pictures' side."""
    name, size = model_of(family)
    options: dict[str, Any] = {"num_classes": classes}
    if name in SHORT:
        options["depth"] = SHORT[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, img_size=size, **options)
        except (TypeError, AssertionError, RuntimeError, ValueError):
            model = timm.create_model(name, **options)
        model.eval().double().requires_grad_(False)
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point() and (
                value.ndim <= 1 or "token" in key or not value.any()
            ):
                value.add_(torch.randn_like(value) * 0.1)
            if key.split(".")[0] in ("head", "fc", "classifier") and value.ndim == 2:
                value.normal_(0, 0.5)
    return model, size
