"""The linear classifier at the end of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear_classifier(model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight (K, C) and bias (K,) of the layer that gives the logits; None if there is no single one.

    A module that is not timm's provides them itself, see :class:`~xattn.backbone.taps.TapModule`.
    """
    if not hasattr(model, "forward_intermediates"):
        weight = getattr(model, "classifier_weight", None)
        return weight, None if weight is None else getattr(model, "classifier_bias", None)
    layers = model.get_classifier()  # type: ignore[operator]
    layers = layers if isinstance(layers, tuple | list) else (layers,)
    if not all(isinstance(m, nn.Linear | nn.Conv2d) for m in layers):
        return None, None
    weights = [m.weight.flatten(1) for m in layers]
    if any(w.shape != weights[0].shape for w in weights):
        return None, None
    bias = [m.bias for m in layers if m.bias is not None]
    # Distilled models average their two classifiers.
    return torch.stack(weights).mean(0), torch.stack(bias).mean(0) if bias else None
