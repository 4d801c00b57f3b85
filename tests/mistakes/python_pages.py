"""Mistakes with what the guides show: attention as a layer, tables, packs."""

import timm
import torch

import xattn
from mistakes.table import Bench, Mistake
from xattn.attention import convert, create_attention, record
from xattn.eval import evaluate, format_table


def vit() -> torch.nn.Module:
    return timm.create_model("test_vit", num_classes=5)


def last_operator():
    layer = create_attention("softmax", dim=8, num_heads=2)
    with record() as calls:
        layer(torch.rand(1, 5, 8))
    return calls[-1].operator


def results(bench: Bench):
    rows = {"gradcam": "gradcam", "random": "random"}
    return evaluate(bench.cnn, rows, bench.images, metrics=["complexity"], progress=False)


MISTAKES = [
    Mistake(
        "a mechanism that is not there",
        lambda b: convert(vit(), "neighborhood"),
        ("name: ", "'neighborhood'", "choose one of act, agent"),
    ),
    Mistake(
        "a CNN converted",
        lambda b: convert(b.cnn.model, "gna"),
        ("mechanism: ", "no list of blocks with attention", "a timm ViT"),
    ),
    Mistake(
        "a layer too many",
        lambda b: convert(vit(), "gna", layers="40"),
        ("layers: ", "got 40", "0 to 5"),
    ),
    Mistake(
        "NATTEN's name of an option",
        lambda b: create_attention("gna", dim=64, num_heads=2, kernel_size=7),
        ("options: ", "kernel_size", "did you mean kernel?"),
    ),
    Mistake(
        "heads that do not divide",
        lambda b: create_attention("gna", dim=30, num_heads=4),
        ("dim, num_heads: ", "got 30, 4", "divide"),
    ),
    Mistake(
        "a grid forgotten",
        lambda b: create_attention("gna", dim=64, num_heads=2)(torch.rand(1, 65, 64)),
        ("grid: ", "for example"),
    ),
    Mistake(
        "a vector of the wrong length",
        lambda b: last_operator().vecmat(torch.ones(1, 1, 4)),
        ("r: ", "got shape (1, 1, 4)", "(1, R, 5)"),
    ),
    Mistake(
        "the largest head",
        lambda b: last_operator().vecmat(torch.ones(1, 1, 5), "max"),
        ("heads: ", "got 'max'", "'mean'"),
    ),
    Mistake(
        "shares in percent",
        lambda b: evaluate(b.cnn, {"gradcam": "gradcam"}, b.images, levels=[50]),
        ("levels: ", "got [50]", "(0, 1]"),
    ),
    Mistake(
        "LaTeX as a style",
        lambda b: format_table(results(b), style="latex"),
        ("style: ", "'markdown'"),
    ),
    Mistake(
        "a method that was not measured",
        lambda b: results(b).compare("gradcam", "layercam"),
        ("method: ", "got 'layercam'", "this run has gradcam, random"),
    ),
    Mistake(
        "a metric that was not measured",
        lambda b: results(b).mean("gradcam", "AD"),
        ("metric, level: ", "got AD", "this run has Gini"),
    ),
    Mistake(
        "a colour map that is not there",
        lambda b: xattn.explain(b.photo, b.cnn, explainer="centre")[0].overlay(cmap="rainbowish"),
        ("cmap: ", "did you mean rainbow"),
    ),
]
