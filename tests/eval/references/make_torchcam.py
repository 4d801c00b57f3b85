"""AD and IC by torch-cam's ClassificationMetric, with its own Grad-CAM -> torchcam.json."""

from functools import partial
from typing import Any

import cases
import torch
from torchcam.methods import GradCAM
from torchcam.metrics import ClassificationMetric

result: dict[str, Any] = {}
for name, build in cases.CASES.items():
    case = build()
    rows: dict[str, Any] = {}
    # As its README has it (softmax), and with the default (logits).
    for setting, logits_fn in (("softmax", partial(torch.softmax, dim=-1)), ("logits", None)):
        extractor = GradCAM(case.net, case.layer)
        whole = ClassificationMetric(extractor, logits_fn)
        row: dict[str, Any] = {"maps": [], "avg_drop": [], "conf_increase": []}
        for i, image in enumerate(case.normalized):
            x = image[None].clone().requires_grad_()
            metric = ClassificationMetric(extractor, logits_fn)
            metric.update(x, int(case.targets[i]))
            for key, value in metric.summary().items():
                row[key].append(value)
            scores = case.net(x)
            scores = scores if logits_fn is None else logits_fn(scores)
            row["maps"].append(extractor.fuse_cams(extractor(int(case.targets[i]), scores)))
        row["maps"] = torch.stack(row["maps"]).float()
        whole.update(case.normalized.clone().requires_grad_(), case.targets.tolist())
        row["summary"] = whole.summary()
        rows[setting] = row
        extractor.remove_hooks()
    result[name] = rows
cases.save("torchcam", ["torchcam"], result)
