"""Mistakes in what images are given as, and in what is asked of results."""

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import xattn
from mistakes.table import Bench, Mistake
from xattn.eval.evaluation.results import Results
from xattn.eval.metrics import AverageDrop, MaxSensitivity


def explained(change):
    """A call of ``explain`` with two images (2, 3, 64, 64) in [0, 1] changed by a function."""
    return lambda b: xattn.explain(change(b.images), b.cnn, explainer="gradcam")


def attributed(change):
    return lambda b: xattn.create_explainer("gradcam", b.cnn).attribute(change(b.images), 0)


def array(b: torch.Tensor) -> np.ndarray:
    return b.permute(0, 2, 3, 1).numpy()


def with_nan(x):
    x = x.clone()
    x[1, 0, 3, 4] = float("nan")
    return x


def normalised(b: Bench) -> torch.Tensor:
    return b.cnn.normalize(b.images)


def measured(b: Bench) -> Results:
    methods = {"ones": xattn.create_explainer("ones", b.cnn)}
    return xattn.evaluate(b.cnn, methods, b.images, progress=False, levels=(1.0,))


def maps(b: Bench) -> torch.Tensor:
    return torch.rand(len(b.images), 1, 8, 8)


MISTAKES = [
    Mistake(
        "a batch with channels last",
        explained(lambda x: x.permute(0, 2, 3, 1)),
        ("images: ", "a tensor (2, 64, 64, 3)", "images.permute(0, 3, 1, 2)"),
    ),
    Mistake(
        "an array with channels first",
        explained(lambda x: x[0].numpy()),
        (
            "images: ",
            "an array (3, 64, 64)",
            "images.transpose(1, 2, 0)",
            "torch.from_numpy(images)",
        ),
    ),
    Mistake("floats in 0..255", explained(lambda x: x * 255), ("images: ", "[0, 1]: images / 255")),
    Mistake(
        "long integers from 0 to 255",
        explained(lambda x: (x * 255).long()),
        ("images: ", "torch.int64", "images.to(torch.uint8)"),
    ),
    Mistake(
        "16-bit pixels",
        explained(lambda x: (array(x) * 65535).astype(np.uint16)),
        ("images: ", "images.astype(np.float32) / 65535"),
    ),
    Mistake(
        "a mask for an image",
        explained(lambda x: x > 0.5),
        ("images: ", "torch.bool", "images.float()"),
    ),
    Mistake(
        "an image normalised by the caller",
        lambda b: xattn.explain(normalised(b), b.cnn, explainer="gradcam"),
        ("images: ", "the backbone normalises them itself", "backbone.denormalize(images)"),
    ),
    Mistake(
        "grey batches",
        explained(lambda x: x[:, :1]),
        ("images: ", "images.expand(-1, 3, -1, -1)"),
    ),
    Mistake(
        "grey images without a channel",
        explained(lambda x: x[:, 0]),
        ("images: ", "images[:, None].expand(-1, 3, -1, -1)"),
    ),
    Mistake(
        "a tensor with transparency",
        explained(lambda x: torch.cat([x, x[:, :1]], 1)),
        ("images: ", "images[..., :3, :, :]"),
    ),
    Mistake(
        "no image", explained(lambda x: x[:0]), ("images: ", "empty batch", "one image or more")
    ),
    Mistake(
        "an empty loader",
        explained(lambda x: DataLoader(TensorDataset(x[:0]))),
        ("images: ", "the loader is empty"),
    ),
    Mistake("NaN", explained(with_nan), ("images: image 1 holds NaN", "torch.nan_to_num(images)")),
    Mistake(
        "batches of clips",
        explained(lambda x: x[:, None]),
        ("images: ", "(B, 3, H, W)", "images.flatten(0, 1)"),
    ),
    Mistake(
        "a loader of dictionaries",
        explained(lambda x: DataLoader([{"pixel_values": image, "label": 1} for image in x])),
        ("images: ", "pixel_values, label", "(batch['pixel_values'] for batch in images)"),
    ),
    Mistake(
        "None, as cv2.imread gives for a missing file",
        explained(lambda x: None),
        ("images: got a NoneType", "paths"),
    ),
    Mistake(
        "attribute: a path",
        attributed(lambda x: "photo.png"),
        ("inputs: got a str", "xattn.explain("),
    ),
    Mistake(
        "attribute: a loader",
        attributed(DataLoader),
        ("inputs: got a DataLoader", "xattn.explain("),
    ),
    Mistake(
        "a column that was not measured",
        lambda b: measured(b).to_latex(["AD@50"]),
        ("columns: got AD@50", "AD@100"),
    ),
    Mistake(
        "scores for a metric with a backbone",
        lambda b: AverageDrop(b.cnn).update(torch.rand(2), torch.rand(2)),
        ("images, maps, target: got 2", "update(images, maps, target)"),
    ),
    Mistake(
        "a metric that explains again without an explainer",
        lambda b: MaxSensitivity(b.cnn),
        ("explainer: ", "MaxSensitivity(backbone, explainer=explainer)"),
    ),
]
