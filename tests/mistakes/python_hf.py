"""Mistakes with models of Hugging Face transformers."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import xattn
from mistakes.table import Bench, Mistake
from xattn.attention import convert

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
}


def made(kind: str, **options: Any) -> Any:
    """A tiny model of transformers, such as "ViTModel", with random weights."""
    import transformers

    name = re.sub("(Model|For[A-Z].*)$", "", kind)
    sizes = {**SMALL, "image_size": 32, "patch_size": 16}
    if name in ("Bert", "Swin"):
        sizes = {**SMALL, "vocab_size": 8} if name == "Bert" else {"image_size": 32, "embed_dim": 8}
    if name == "Swin":
        sizes |= {"depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
    if name == "PoolFormer":
        sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    return getattr(transformers, kind)(config)


def processor(kind: str = "ViT", **options: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}ImageProcessor")(**options)


def loaded(kind: str = "ViTForImageClassification", /, *, sized: Any = 32, **options: Any) -> Any:
    prepares = processor(size={"height": sized, "width": sized})
    return xattn.load_backbone(made(kind), processor=prepares, **options)


def saved(b: Bench, kind: str) -> str:
    made(kind).save_pretrained(b.folder / kind)
    processor().save_pretrained(b.folder / kind)
    return f"transformers:{b.folder / kind}"


VIT = "ViTForImageClassification"
GIVE = "AutoModelForImageClassification.from_pretrained"
MISTAKES = [
    Mistake(
        "a classifier without its image processor",
        lambda b: xattn.load_backbone(made(VIT)),
        ("processor: ", "AutoImageProcessor.from_pretrained"),
    ),
    Mistake(
        "an encoder without a classifier",
        lambda b: xattn.load_backbone(made("ViTModel"), processor=processor()),
        ("name_or_module: a ViTModel is a network without a classifier", GIVE),
    ),
    Mistake(
        "a detector",
        lambda b: xattn.load_backbone(made("YolosForObjectDetection", image_size=[32, 32])),
        ("name_or_module: a YolosForObjectDetection is made for object detection", GIVE),
    ),
    Mistake(
        "a model of text",
        lambda b: xattn.load_backbone(made("BertForSequenceClassification")),
        ("name_or_module: a BertForSequenceClassification", "text", GIVE),
    ),
    Mistake(
        "a class in place of a model",
        lambda b: xattn.load_backbone(type(made(VIT)), processor=processor()),
        ("name_or_module: got a type", "give a name or a torch.nn.Module"),
    ),
    Mistake(
        "the processor's name in place of the processor",
        lambda b: xattn.load_backbone(made(VIT), processor="google/vit-base-patch16-224"),
        ("processor: got str", "AutoImageProcessor.from_pretrained"),
    ),
    Mistake(
        "a detector's processor",
        lambda b: xattn.load_backbone(made(VIT), processor=processor("Detr")),
        ("processor: DetrImageProcessor", "no fixed size", "height and width"),
    ),
    Mistake(
        "a processor for a timm model",
        lambda b: xattn.load_backbone(b.vit.model, processor=processor()),
        ("processor: ", "mean= and std="),
    ),
    Mistake(
        "a folder with an encoder",
        lambda b: xattn.load_backbone(saved(b, "ViTModel")),
        ("backbone: transformers:", "ViTModel", "without a classifier", GIVE),
    ),
    Mistake(
        "regression on several outputs",
        lambda b: xattn.load_backbone(made(VIT, problem_type="regression"), processor=processor()),
        ("task: ", "regression", "give task="),
    ),
    Mistake(
        "a tap by transformers' own name",
        lambda b: loaded(taps=["vit.layers.0.layernorm_before"]),
        ("taps: got 'vit.layers.0.layernorm_before'", "norm1"),
    ),
    Mistake(
        "attention of windows",
        lambda b: xattn.create_explainer("rollout", loaded("SwinForImageClassification")),
        ("backbone: SwinForImageClassification attends inside windows", "'gradcam'"),
    ),
    Mistake(
        "another mechanism in its layers",
        lambda b: convert(loaded().model, "gna"),
        ("mechanism: ", "timm ViT"),
    ),
]
if importlib.util.find_spec("transformers") is None:
    MISTAKES = []
