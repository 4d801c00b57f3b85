"""Mistakes with targets that are no class: functions, texts, masks, photos."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch
from torch import nn

import xattn
from mistakes.table import Mistake
from xattn import Target, at_mask, at_point, create_explainer, load_clip, similarity_to
from xattn.backbone.families.clip import Clip
from xattn.backbone.scored import scored


def of(target, explainer="gradcam"):
    """A call of an explainer of a small CNN with 5 classes."""
    return lambda b: create_explainer(explainer, b.cnn).attribute(b.images, target)


def pair():
    from small_clip import pair

    return pair("clip")


@functools.cache
def clip():
    return load_clip(*pair())


@functools.cache
def segmenting():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return xattn.load_backbone(net, input_size=64)


def at(target):
    return lambda b: create_explainer("gradcam", segmenting()).attribute(b.images, target)


def evaluating(**options):
    def call(b):
        gradcam = {"gradcam": create_explainer("gradcam", b.cnn)}
        return xattn.evaluate(b.cnn, gradcam, b.images, progress=False, **options)

    return call


RETURNS = "return one number per image, float (3,)"
MISTAKES = [
    Mistake("function of all logits", of(lambda z: z), ("target: the function returned", RETURNS)),
    Mistake("function that gives the class", of(lambda z: z.argmax(1)), ("target: ", RETURNS)),
    Mistake(
        "function that leaves torch for NumPy",
        of(lambda z: np.log(z.detach().numpy()[:, 1] ** 2)),
        ("target: the function returned ndarray", "torch.Tensor (B,)"),
    ),
    Mistake(
        "function of one image's logits, as pytorch-grad-cam has them",
        of(lambda output: output[281]),
        ("target: the function fails on logits (3, 5)", "such as logits[:, 281]"),
    ),
    Mistake("function without a gradient", of(lambda z: z.detach()[:, 1]), ("target: ", "'rise'")),
    Mistake("function that gives NaN", of(lambda z: (z[:, 1] * 0).log()), ("target: ", "finite")),
    *(
        Mistake(
            f"several {what} as a target",
            lambda b, several=several: xattn.explain(
                b.images, b.cnn, explainer="rise", target=several
            ),
            (f"target: got {several}", f"classes={several}"),
        )
        for what, several in (("classes", [1, 2]), ("names", ["dog", "cat"]))
    ),
    Mistake("number that is no class", of(2.5), ("target: got 2.5", "give one int")),
    Mistake("text for a classifier", of("a photo of a cat"), ("target: ", "xattn.load_clip")),
    Mistake(
        "text for a view of a classifier",
        lambda b: scored(b.cnn, "a photo of a cat"),
        ("target: got the text", "xattn.load_clip"),
    ),
    Mistake(
        "target with a name for p that is none",
        lambda b: Target(lambda z: z[:, 1], p="softmax"),
        ("p: got 'softmax'", "value, probability, sigmoid"),
    ),
    Mistake("target without a function", lambda b: Target(281), ("target: got 281", "a function")),
    Mistake("map per class of a function", of(lambda z: z[:, 1], "cam"), ("target: ", "'gradcam'")),
    Mistake(
        "view of a view",
        lambda b: scored(scored(b.cnn, lambda z: z[:, 1]), lambda z: z[:, 0]),
        ("target: this backbone already shows", "backbone.base"),
    ),
    Mistake(
        "mask of a classifier", of(at_mask(1, torch.ones(64, 64))), ("target: ", "segmentation")
    ),
    Mistake(
        "mask of another size", at(at_mask(1, torch.ones(64, 30))), ("mask: got (64, 30)", "aspect")
    ),
    Mistake(
        "empty mask", lambda b: at_mask(1, torch.zeros(64, 64)), ("mask: is empty", "labels == 12")
    ),
    Mistake(
        "mask a photo", lambda b: at_mask(1, torch.ones(2, 64, 64)), ("mask: got shape", "(H, W)")
    ),
    Mistake("class of no mask", at(at_mask(9, torch.ones(64, 64))), ("target: class 9", "0..3")),
    Mistake("point in pixels", lambda b: at_point(1, 40, 20), ("row, column: got 40, 20", "0..1")),
    Mistake(
        "embedding of another network",
        of(similarity_to(torch.ones(7))),
        ("target: the embedding has 7 numbers", "an embedding of this backbone"),
    ),
    Mistake(
        "embeddings of a batch",
        lambda b: similarity_to(torch.ones(2, 7)),
        ("photo_or_embedding: got shape (2, 7)", "one embedding (C,)"),
    ),
    Mistake(
        "head of a regression model",
        lambda b: xattn.create_head("ttame", regression()),
        ("backbone: ", "needs no head"),
    ),
]
TEXTS = [
    Mistake(
        "image-text model without a text",
        lambda b: xattn.explain(b.photo, clip(), explainer="gradcam"),
        ("backbone: clip has no classes", "target='a photo of a cat'"),
    ),
    Mistake(
        "empty text",
        lambda b: create_explainer("gradcam", clip()).attribute(b.images[..., :32, :32], " "),
        ("target: got an empty text", "a prompt such as"),
    ),
    Mistake(
        "one prompt", lambda b: clip().with_prompts(["cat"]), ("prompts: got one", "two or more")
    ),
    Mistake(
        "no prompt", lambda b: clip().with_prompts([]), ("prompts: got []", "one or more texts")
    ),
    Mistake(
        "prompts that are no texts", lambda b: clip().with_prompts([1, 2]), ("prompts: ", "text")
    ),
    Mistake(
        "text that is too long",
        lambda b: clip().with_prompts(["a photo of a cat on the sky " * 9, "cat"]),
        ("prompts: 'a photo", "the text tower reads 12"),
    ),
    Mistake(
        "load_clip of the image tower alone",
        lambda b: load_clip(b.vit.model, pair()[1]),
        ("model: got VisionTransformer", "CLIPModel or SiglipModel"),
    ),
    Mistake(
        "load_clip without a tokenizer",
        lambda b: load_clip(pair()[0], None),
        ("tokenizer: got None", "AutoTokenizer"),
    ),
    Mistake(
        "towers of two widths",
        lambda b: Clip(b.cnn, lambda texts: torch.rand(len(texts), 512)).with_prompts(["a", "b"]),
        ("encode_text: returned (2, 512)", "return (2, 5)"),
    ),
]
if importlib.util.find_spec("transformers") is not None:
    MISTAKES += TEXTS


@functools.cache
def regression():
    torch.manual_seed(0)
    import timm

    model: nn.Module = timm.create_model("test_resnet", num_classes=1)
    return xattn.load_backbone(model, input_size=64, task="regression")
