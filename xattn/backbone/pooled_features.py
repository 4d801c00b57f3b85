"""Keep the features that a network classifies, (B, d), from the passes that compute its logits.

    with recording() as record:
        logits, classes, maps = explainer.attribute_classes(images, choose)
    features = record.rows(logits)

This needs no extra pass: the input of the classifier is pooled once more, in the network's own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn


class FeatureRecord:
    """A record of what was classified inside a ``with recording()`` block.

    Attributes:
        note: how the features were computed, if a network does not reveal what it classifies; otherwise "".
    """

    def __init__(self) -> None:
        self.note = ""
        self._last: tuple[nn.Module, Tensor] | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []

    def classified(self, model: nn.Module, final: Tensor) -> None:
        """Store ``final``, what a pass of ``model`` classifies, and forget that of the previous pass."""
        self._last = model, final

    def keep(self, logits: Tensor) -> None:
        """Keep the features of the last pass, which computed ``logits`` (B, K)."""
        if self._last is None:
            return
        (model, final), self._last = self._last, None
        if len(final) == len(logits):
            features, self.note = pool_features(model, final.detach())
            self._parts.append((logits.detach(), features))

    def rows(self, logits: Tensor) -> Tensor | None:
        """Return the features (B, d) for the logits (B, K) of a whole batch, on the CPU, or None.

        If memory ran out and a slice was classified again, it counts once, with its last result.
        """
        found: list[Tensor] = []
        end = len(logits)
        for own, features in reversed(self._parts):
            start = end - len(own)
            if start >= 0 and len(own) and torch.equal(own.to(logits), logits[start:end]):
                found.insert(0, features.float().cpu())
                end = start
        return torch.cat(found) if found and not end else None


_RECORD: ContextVar[FeatureRecord | None] = ContextVar("record", default=None)


@contextmanager
def recording() -> Iterator[FeatureRecord]:
    """Record what this thread classifies inside the block."""
    token = _RECORD.set(FeatureRecord())
    try:
        record = _RECORD.get()
        assert record is not None
        yield record
    finally:
        _RECORD.reset(token)


def record_features(model: nn.Module, final: Tensor) -> None:
    """Record the input of the classifier; called in every pass."""
    if torch.compiler.is_compiling():
        return
    record = _RECORD.get()
    if record is not None:
        record.classified(model, final)


def keep_logits(logits: Tensor) -> None:
    """Keep the ``logits`` (B, K) of photos; called as soon as they are known, before any other pass."""
    record = _RECORD.get()
    if record is not None:
        record.keep(logits)


@torch.no_grad()
def pool_features(model: nn.Module, final: Tensor) -> tuple[Tensor, str]:
    """Compute what ``model`` classifies, (B, d), from its last features (B, C, h, w), (B, h, w, C) or
    (B, N, C).

    Returns:
        The features and a note. The note is "" unless the network does not reveal what it classifies; the
        features are then the spatial mean of its last map.
    """
    head = getattr(model, "forward_head", None)
    if head is not None and "pre_logits" in inspect.signature(head).parameters:
        return head(final, pre_logits=True).flatten(1), ""
    if final.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
        final = final.movedim(3, 1)
    elif final.ndim == 3:
        final = final.movedim(2, 1)
    note = "does not reveal what it classifies; the mean of its last map is used instead"
    return final.flatten(2).mean(2) if final.ndim > 2 else final, note


def linear_classifier(model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return weight (K, C) and bias (K,) of the layer that computes the logits; None without such a layer.

    A module that is not from timm provides them itself, see :class:`~xattn.backbone.taps.TapModule`.
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
