"""Mistakes with explainers of ViTs that read gradients: LibraGrad, LeGrad and Grad-ECLIP."""

import torch

from mistakes.table import Mistake
from xattn import create_explainer

MISTAKES = [
    Mistake(
        "libragrad with the name of a method that is no base of it",
        lambda b: create_explainer("libragrad", b.vit, base="gradcam_plus"),
        ("base: ", "choose one of fullgrad_plus, fullgrad, input_x_gradient"),
    ),
    Mistake(
        "libragrad of pixels with the base that adds up tokens",
        lambda b: create_explainer("libragrad", b.vit, at="pixels"),
        ("at='pixels': ", "give base='input_x_gradient'"),
    ),
    Mistake(
        "libragrad of a CNN's tokens",
        lambda b: create_explainer("libragrad", b.cnn),
        ("backbone: test_resnet", "give base='input_x_gradient' and at='pixels', or use 'gradcam'"),
    ),
    Mistake(
        "libragrad of a CNN's patch embedding",
        lambda b: create_explainer("libragrad", b.cnn, base="input_x_gradient"),
        ("at='tokens': ", "give at='pixels'"),
    ),
    Mistake(
        "libragrad of a single layer",
        lambda b: create_explainer("libragrad", b.vit, layer=3),
        ("explainer: ", "libragrad does not take that option (layer)", "base"),
    ),
    Mistake(
        "contributions without biases",
        lambda b: create_explainer("libragrad", b.vit, base="input_x_gradient").contributions(
            b.images, 0
        ),
        ("base: ", "give base='fullgrad'"),
    ),
    Mistake(
        "contributions of a class that is not there",
        lambda b: create_explainer("libragrad", b.vit).contributions(b.images, 1000),
        ("target: ", "0..4"),
    ),
    Mistake(
        "contributions of images in 0..255",
        lambda b: create_explainer("libragrad", b.vit).contributions(255 * b.images, 0),
        ("inputs: ", "[0, 1]"),
    ),
    Mistake(
        "legrad by the class token",
        lambda b: create_explainer("legrad", b.vit, pool="class"),
        ("pool: got 'class'", "give 'average' or 'model'"),
    ),
    Mistake(
        "legrad of the layer -2, as its authors' program counts",
        lambda b: create_explainer("legrad", b.vit, layers=-2),
        ("layers: got -2", "give 1.."),
    ),
    Mistake(
        "legrad of a CNN",
        lambda b: create_explainer("legrad", b.cnn),
        ("backbone: test_resnet", "use 'gradcam' or a head"),
    ),
    Mistake(
        "grad_eclip of a CNN",
        lambda b: create_explainer("grad_eclip", b.cnn),
        ("backbone: test_resnet", "use 'gradcam' or a head"),
    ),
    Mistake(
        "grad_eclip of more layers than there are",
        lambda b: create_explainer("grad_eclip", b.vit, layers=99),
        ("layers: got 99", "give 1.."),
    ),
    Mistake(
        "grad_eclip from a token that is not there",
        lambda b: create_explainer("grad_eclip", b.vit, start=[999]),
        ("start: got [999]", "give token numbers"),
    ),
    Mistake(
        "grad_eclip with the text itself as images",
        lambda b: create_explainer("grad_eclip", b.vit).attribute(torch.zeros(2, 77).long(), 0),
        ("inputs: got a tensor (2, 77)", "(B, 3, H, W)"),
    ),
]
