"""Mistakes with a model of one's own: its preprocessing, its file, its classes, its layer."""

import torch
import torchvision
from torch import nn

import xattn
from mistakes.table import Bench, Mistake


def load(**options):
    return xattn.load_backbone("test_resnet", None, input_size=64, num_classes=5, **options)


def file_of(b: Bench, content: object, name: str = "mine.pth") -> str:
    path = b.folder / name
    torch.save(content, path)
    return str(path)


class Encoder(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Recipe:
    """An object that a trainer keeps beside the weights."""


MISTAKES = [
    Mistake(
        "std for pixels in 0..255",
        lambda b: load(std=(58.395, 57.12, 57.375)),
        ("std: ", "(0.229, 0.224, 0.225)"),
    ),
    Mistake(
        "two numbers", lambda b: load(mean=(0.5, 0.5)), ("mean: got 2 numbers for 3", "give 3")
    ),
    Mistake("mean as a name", lambda b: load(mean="imagenet"), ("mean: got 'imagenet'", "(0.485,")),
    Mistake("crop of 0", lambda b: load(crop=0), ("crop: got 0; give the share", "0.875")),
    Mistake(
        "a head moved to a GPU that is not there",
        lambda b: xattn.create_head("gap", b.cnn).to("cuda:99"),
        ("device: 'cuda:99' is not available here", "use cpu, or install a PyTorch"),
    ),
    Mistake(
        "too few class names",
        lambda b: load(class_names=["cat", "dog"]),
        ("class_names: got 2 names, but the model has 5 classes",),
    ),
    Mistake(
        "no file of class names",
        lambda b: load(class_names="nope.txt"),
        ("class_names: no file nope.txt", "one per line"),
    ),
    Mistake("class names by number", lambda b: load(class_names=range(5)), ("class_names: got 0",)),
    Mistake(
        "preprocessing assigned",
        lambda b: refused(lambda: setattr(b.cnn, "preprocessing", None)),
        ("preprocessing: cannot be changed", "mean=, std=, crop=, interpolation="),
    ),
    Mistake(
        "module that takes no images",
        lambda b: xattn.load_backbone(nn.Linear(3, 3)),
        ("model: Linear fails on images (2, 3, 224, 224)", "input_size=", "forward_taps"),
    ),
    Mistake(
        "module without logits",
        lambda b: xattn.load_backbone(Encoder()),
        ("model: Encoder does not end in logits (B, K)",),
    ),
    Mistake(
        "tap misspelt",
        lambda b: xattn.load_backbone(torchvision.models.resnet18(num_classes=2), taps=["layer9"]),
        ("taps: 'layer9' is not in the graph", "did you mean"),
    ),
    Mistake(
        "a photo as weights",
        lambda b: xattn.load_backbone("test_resnet", b.photo),
        ("weights: ", "suffix '.png'", ".safetensors"),
    ),
    Mistake(
        "a model that was pickled whole",
        lambda b: xattn.load_backbone("test_resnet", file_of(b, nn.Linear(2, 2))),
        ("weights: ", "was rejected, nothing in it was run", "save only the tensors"),
    ),
    Mistake(
        "objects in a Lightning file",
        lambda b: xattn.load_backbone(
            "test_resnet", file_of(b, {"state_dict": {}, "hyper_parameters": Recipe()}, "mine.ckpt")
        ),
        ("weights: ", "Recipe", "training code, torch.save(module.state_dict()"),
    ),
    Mistake(
        "weights of another architecture",
        lambda b: xattn.load_backbone("test_resnet", file_of(b, b.vit.model.state_dict())),
        ("weights: ", "does not fit test_resnet", "give a file for this architecture"),
    ),
    Mistake(
        "hub name without owner",
        lambda b: xattn.load_backbone("hf-hub:resnet18"),
        ("backbone: got 'hf-hub:resnet18'; write hf-hub:OWNER/MODEL",),
    ),
    Mistake(
        "target_layers as one list for layer",
        lambda b: xattn.create_explainer("gradcam", b.cnn, layer=[b.cnn.model.layer4]),
        ("layer: got a list", "or layers=(...) for several"),
    ),
    Mistake(
        "layer and layers",
        lambda b: xattn.create_explainer("gradcam", b.cnn, layer="layer4", layers=("layer3",)),
        ("layers: got layer= as well; give only one of them",),
    ),
    Mistake(
        "layer that pools",
        lambda b: xattn.create_explainer("gradcam", b.cnn, layer="fc").attribute(b.images, 1),
        ("layer: model.fc of test_resnet returns (2, 5)", "not a map", "reshape="),
    ),
    Mistake(
        "reshape that returns tokens",
        lambda b: xattn.create_explainer(
            "gradcam", b.cnn, layer="layer4", reshape=lambda o: o.flatten(2)
        ).attribute(b.images, 1),
        ("reshape: got (2, ", "return (B, C, h, w)"),
    ),
]


def refused(call) -> None:
    """An AttributeError as the kind of error that the table takes."""
    try:
        call()
    except AttributeError as error:
        raise ValueError(str(error)) from None
