"""Metrics of Quantus on raw pixels, the model normalising inside -> quantus.json."""

import warnings
from typing import Any

import cases
import numpy as np
import quantus
import torch
from torch import Tensor, nn

warnings.simplefilter("ignore")
PERCENTAGES = [10, 20, 30, 40, 50, 60, 70, 80, 90]


class Raw(nn.Module):
    """Images (B, 1 or 3, H, W) in [0, 1] -> logits."""

    def __init__(self, case: cases.Case) -> None:
        super().__init__()
        self.case = case
        self.net = case.net

    def forward(self, x: Tensor) -> Tensor:
        return self.case.f(x.expand(-1, 3, -1, -1))


def attempt(call: Any) -> str:
    """What Quantus raises."""
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


result: dict[str, Any] = {}
for name, build in cases.CASES.items():
    case = build()
    rows: dict[str, Any] = {}
    y, model = case.targets.numpy(), Raw(case).eval()
    x, grey, ranks = (v.numpy() for v in (case.images, case.grey, case.ranks))
    full = torch.nn.functional.interpolate(case.maps, case.size, mode="bilinear").numpy()

    # Maps alone. Quantus changes some arrays in place: copies.
    for kind, a in (("grey", grey), ("raw", full)):
        rows[f"Sparseness, {kind}"] = quantus.Sparseness()(model, x, y, a.copy())
        rows[f"Complexity, {kind}"] = quantus.Complexity()(model, x, y, a.copy())

    # Maps and boxes.
    boxes = case.boxes.numpy()
    for metric in ("PointingGame", "RelevanceMassAccuracy"):
        rows[metric] = getattr(quantus, metric)()(model, x, y, grey.copy(), s_batch=boxes)
    ranked = quantus.RelevanceRankAccuracy()
    rows["RelevanceRankAccuracy, ranks"] = ranked(model, x, y, ranks.copy(), s_batch=boxes)

    # Pixels removed by rank. 3 per_step features are per_step whole pixels, as ranks have no ties.
    crop = cases.CROPS[name]
    part = case if crop is None else case.cropped(crop)
    options = cases.FLIPPING[name]
    part_model, part_x = Raw(part).eval(), part.images.numpy()
    for baseline in (0.0, "black"):
        flipping = quantus.PixelFlipping(
            features_in_step=3 * options["per_step"],
            perturb_baseline=baseline,
        )
        curve = flipping(part_model, part_x, y, part.ranks.numpy())
        flipping.return_auc_per_sample = True
        area = flipping(part_model, part_x, y, part.ranks.numpy())
        rows[f"PixelFlipping, {baseline}"] = {"curve": curve, "auc": area}
    rows["MonotonicityCorrelation"] = quantus.MonotonicityCorrelation(
        features_in_step=3 * options["side"] ** 2,
        nr_samples=1,
        perturb_baseline=0.0,
    )(part_model, part_x, y, part.squares(options["side"]).numpy())

    # Superpixels. Its own replacement refuses a mask without channels on an RGB image, ours takes it.
    def black(arr: np.ndarray, mask: np.ndarray, **_: Any) -> np.ndarray:
        return np.where(mask, 0.0, arr).astype(arr.dtype)

    rows["IROF, RGB, as it is"] = attempt(
        lambda: quantus.IROF(return_aggregate=False)(model, x, y, ranks.copy())  # noqa: B023
    )
    irof = quantus.IROF(perturb_func=black, return_aggregate=False)
    rows["IROF, RGB, black"] = irof(model, x, y, ranks.copy())
    rows["IROF, RGB, black, batch_size=1"] = irof(model, x, y, ranks.copy(), batch_size=1)
    mono = case.monochrome.numpy()
    with torch.no_grad():
        y_mono = model(case.monochrome).argmax(1).numpy()
    for baseline in (0.0, "mean"):
        irof = quantus.IROF(perturb_baseline=baseline, return_aggregate=False)
        rows[f"IROF, one channel, {baseline}"] = irof(model, mono, y_mono, ranks.copy())
        rows[f"IROF, one channel, {baseline}, batch_size=1"] = irof(
            model, mono, y_mono, ranks.copy(), batch_size=1
        )

    # ROAD: top-1 accuracy of the filled images; one channel, as it fails with three.
    def road(images: np.ndarray, classes: np.ndarray, a: np.ndarray, **options: Any) -> Any:
        metric = quantus.ROAD(percentages=PERCENTAGES, noise=0.0)
        return metric(model, images, classes, a.copy(), **options)  # noqa: B023

    rows["ROAD, RGB"] = attempt(lambda: road(x, y, ranks))  # noqa: B023
    rows["ROAD, one channel"] = road(mono, y_mono, ranks)
    rows["ROAD, one channel, by image"] = [
        list(road(mono[i : i + 1], y_mono[i : i + 1], ranks[i : i + 1]).values())
        for i in range(len(mono))
    ]
    rows["ROAD, one channel, batch_size=1"] = road(mono, y_mono, ranks, batch_size=1)
    with torch.no_grad():
        second = model(case.monochrome).topk(2).indices[:, 1].numpy()
    rows["ROAD, one channel, second class"] = road(mono, second, ranks)
    result[name] = rows
cases.save("quantus", ["quantus", "scikit-image", "scipy"], result)
