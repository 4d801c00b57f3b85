"""Mistakes with metrics, explainers, heads, mechanisms and blocks of one's own, and with Captum's objects."""

from __future__ import annotations

from typing import ClassVar

import captum.attr as captum
import torch
from own_names import forgetting

import xattn
from mistakes.table import Bench, Mistake
from xattn.eval import Comparison, MetricInfo, PerturbationMetric, compare, evaluate

INFO = MetricInfo("one", True)


class Plain:
    """A class that derives from nothing."""


class Nameless(PerturbationMetric):
    """A probe that does not say what it measures."""

    def measure(self, sample):
        yield from ()
        return lambda scores: {}


class Other(Nameless):
    info: ClassVar = {"AD": INFO}


def evaluated(b: Bench, method, metrics=("complexity",)):
    return evaluate(b.cnn, {"mine": method}, b.images, metrics=metrics, progress=False)


def registered(decorator, thing):
    with forgetting():
        decorator(thing)


def twice(b: Bench):
    with forgetting():
        for _ in range(2):
            xattn.register_explainer("mine")(eval("lambda images, target: images.mean(1)"))
        xattn.register_explainer("mine")(twice)


MISTAKES = [
    Mistake(
        "register_metric without info",
        lambda b: registered(xattn.register_metric("mine"), lambda map: 0.0),
        ("info: ", "MetricInfo(formula, higher_is_better)"),
    ),
    Mistake(
        "a metric that asks for a heatmap",
        lambda b: registered(xattn.register_metric("mine", INFO), lambda heatmap: 0.0),
        ("metric: ", "heatmap", "image, map, raw"),
    ),
    Mistake(
        "a metric by the name of another",
        lambda b: registered(xattn.register_metric("AD", INFO), lambda map: 0.0),
        ("group: AD is taken", "choose another name"),
    ),
    Mistake(
        "a probe's class instead of a probe",
        lambda b: evaluated(b, "gradcam", [Nameless]),
        ("metrics: got <class", "instances of PerturbationMetric"),
    ),
    Mistake(
        "a function as a metric",
        lambda b: evaluated(b, "gradcam", [lambda image, map: 0.0]),
        ("metrics: got <function", "register_metric"),
    ),
    Mistake(
        "a probe without columns",
        lambda b: evaluated(b, "gradcam", [Nameless()]),
        ("metrics: Nameless has no columns", "info"),
    ),
    Mistake(
        "a probe with another metric's name",
        lambda b: evaluated(b, "gradcam", [Other()]),
        ("metrics: AD", "choose a new one"),
    ),
    Mistake(
        "register_explainer on a class that is no explainer",
        lambda b: registered(xattn.register_explainer("mine"), Plain),
        ("explainer: got <class", "subclass of xattn.explainers.Explainer, or a function"),
    ),
    Mistake(
        "register_attention on a module",
        lambda b: registered(xattn.register_attention("mine"), torch.nn.MultiheadAttention),
        ("attention: got <class", "decorate a subclass of xattn.attention.base.Mechanism"),
    ),
    Mistake(
        "register_head without a name",
        lambda b: registered(xattn.register_head(""), type(xattn.create_head("gap", b.vit))),
        ("name: got ''", "such as 'mine'"),
    ),
    Mistake(
        "another explainer under the same name",
        twice,
        ("name: 'mine' is taken", "choose another name"),
    ),
    Mistake(
        "Captum's class instead of an object",
        lambda b: evaluated(b, captum.Saliency),
        ("explainer: got <class", "create an instance of it first"),
    ),
    Mistake(
        "a model as an explainer's name",
        lambda b: evaluated(b, 3),
        ("explainer: got 3", "f(images, target) -> maps"),
    ),
    Mistake(
        "explainers in a list",
        lambda b: evaluate(b.cnn, ["gradcam"], b.images, progress=False),
        ("explainers: got a list", "{name: explainer}"),
    ),
    Mistake(
        "methods without rows in a comparison",
        lambda b: compare(
            Comparison(backbone=b.cnn, explainers=[captum.Saliency(b.cnn.logits)]),
            b.photo,
            b.folder / "out",
        ),
        ("explainers: got ", "give {row: method}"),
    ),
    Mistake(
        "a function of images alone",
        lambda b: evaluated(b, lambda images: images.mean(1)),
        ("explainers: mine cannot work: it raised TypeError",),
    ),
    Mistake(
        "one map for the whole batch",
        lambda b: evaluated(b, lambda images, target: images.mean((0, 1))[None]),
        ("explainer: mine returned (1, 64, 64) for ", "return (B, h, w)"),
    ),
    Mistake(
        "maps of all classes",
        lambda b: evaluated(b, lambda images, target: torch.rand(len(images), 5, 7, 7)),
        ("explainer: mine returned ", "5 maps per image"),
    ),
    Mistake(
        "a map that does not look at the image",
        lambda b: evaluated(b, lambda images, target: torch.ones(len(images), 7, 7)),
        ("explainers: mine cannot work: its maps are constant",),
    ),
    Mistake(
        "a division by zero in a map",
        lambda b: evaluated(b, lambda images, target: images.mean(1) / 0),
        ("explainers: mine cannot work: its maps contain NaN or infinite values",),
    ),
    Mistake(
        "both channels",
        lambda b: xattn.as_explainer(lambda x, t: x, b.cnn, channels="sum"),
        ("channels: got 'sum'", "give 'signed' or 'absolute'"),
    ),
]
