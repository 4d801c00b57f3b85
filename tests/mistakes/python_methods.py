"""Mistakes with explainers of ViTs that read gradients: LibraGrad, LeGrad and Grad-ECLIP."""

from mistakes.table import Mistake
from xattn import create_explainer

MISTAKES = [
    Mistake(
        "libragrad with the name of a method that is no base of it",
        lambda b: create_explainer("libragrad", b.vit, base="gradcam_plus"),
        ("base: ", "give 'fullgrad_plus', 'fullgrad' or 'input_x_gradient'"),
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
        "grad_eclip of a CNN",
        lambda b: create_explainer("grad_eclip", b.cnn),
        ("backbone: test_resnet", "use 'gradcam' or 'occlusion'"),
    ),
    Mistake(
        "grad_eclip from a token that is not there",
        lambda b: create_explainer("grad_eclip", b.vit, start=[999]),
        ("start: got [999]", "give token numbers"),
    ),
]
