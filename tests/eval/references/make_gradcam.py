"""Confidence change and ROAD by pytorch-grad-cam -> gradcam.json."""

from typing import Any

import cases
import numpy as np
import torch
from pytorch_grad_cam.metrics.cam_mult_image import (
    CamMultImageConfidenceChange,
    DropInConfidence,
    IncreaseInConfidence,
)
from pytorch_grad_cam.metrics.perturbation_confidence import (
    PerturbationConfidenceMetric,
    RemoveLeastRelevantFirst,
    RemoveMostRelevantFirst,
)
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
from pytorch_grad_cam.utils.model_targets import (
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
)

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
TARGETS = {"softmax": ClassifierOutputSoftmaxTarget, "logits": ClassifierOutputTarget}

result: dict[str, Any] = {}
for name, build in cases.CASES.items():
    case = build()
    cams = case.grey[:, 0].numpy()
    rows: dict[str, Any] = {}
    for setting, target in TARGETS.items():
        targets = [target(int(t)) for t in case.targets]
        arguments = (case.normalized, cams, targets, case.net)
        row: dict[str, Any] = {
            "change": CamMultImageConfidenceChange()(*arguments),
            "drop": DropInConfidence()(*arguments),
            "increase": IncreaseInConfidence()(*arguments),
        }
        exact = NoisyLinearImputer(noise=0.0)
        for order, remove in (
            ("MoRF", RemoveMostRelevantFirst),
            ("LeRF", RemoveLeastRelevantFirst),
        ):
            row[order] = {
                p: PerturbationConfidenceMetric(remove(p, exact))(*arguments, return_diff=False)
                for p in PERCENTILES
            }
        lerf, morf = (np.mean(list(row[order].values()), 0) for order in ("LeRF", "MoRF"))
        row["combined, noise 0"] = (lerf - morf) / 2
        # The class has no noise option and draws from torch's global generator.
        draws = []
        for seed in range(3):
            torch.manual_seed(seed)
            draws.append(ROADCombined(list(PERCENTILES))(*arguments))
        row["combined, noise 0.01"] = draws
        rows[setting] = row
    # The filled image itself at 24 places, half of the pixels removed.
    keep = case.grey[0, 0] < np.percentile(cams[0], 50)
    filled = NoisyLinearImputer(noise=0.0)(case.images[0], keep.float())
    rows["filled"] = filled.flatten()[:: filled.numel() // 23][:24]
    result[name] = rows
cases.save("gradcam", ["grad-cam"], result)
