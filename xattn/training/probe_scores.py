"""What a probed head answers for photos with cached features: accuracy, loss and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.heads import AttentiveHead, Tokens
from xattn.runtime.distributed import gather
from xattn.training.features import Features

BINS = 15


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """A head's answers: ``logits`` (n, K) float32 and the ``labels`` (n,), on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """(n,) bool: whether the most probable class is the label."""
        return self.logits.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """Share of correct answers, in [0, 1]."""
        return float(self.correct.double().mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(F.cross_entropy(self.logits.double(), self.labels))

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: |accuracy - confidence| of the most probable class
        over 15 bins of equal width, weighted by their photos (arXiv 1706.04599)."""
        from torchmetrics.functional.classification import multiclass_calibration_error

        probabilities = self.logits.softmax(1)
        return float(
            multiclass_calibration_error(
                probabilities, self.labels, probabilities.shape[1], n_bins=BINS, norm="l1"
            )
        )


def answers(
    head: AttentiveHead, features: Features, index: Sequence[int], batch_size: int = 256
) -> Tensor:
    """Logits (n, K) of the photos ``index``, float32 on the CPU, in eval mode.

    In a group of processes each computes its share of them, and all get the whole.
    """
    check_features(head, features)
    ranks = len(shares := gather(None))
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    share = -(-len(index) // len(shares))
    mine = list(index)[rank * share : (rank + 1) * share]
    training = head.training
    head.eval()
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(mine), batch_size):
                taps = features.taps(mine[start : start + batch_size])
                tokens = to_head(head, head.tokens(taps))
                parts.append(head.predict(head.attend(tokens)).float().cpu())
    finally:
        head.train(training)
    own = torch.cat(parts) if parts else torch.zeros(0, head.num_classes, device="cpu")
    return torch.cat(gather(own))


def check_features(head: AttentiveHead, features: Features) -> None:
    """Raise a ValueError unless ``features`` come from the backbone and the taps that ``head`` reads."""
    theirs = features.key["backbone"]["sha256"], features.key["taps"]
    own = head.backbone_fingerprint, head.backbone_taps
    if theirs != own:
        raise ValueError(
            f"features: {features.folder} (key {features.digest}) come from weights sha256 "
            f"{theirs[0]} and the taps {theirs[1]}, the head {head.name!r} reads {own[0]} and "
            f"{own[1]}; cache the features of the head's backbone"
        )


def to_head(head: AttentiveHead, tokens: Tokens) -> Tokens:
    """``tokens`` on the device and in the dtype of ``head``."""
    weight = head.classifier.weight
    patches = tuple(p.to(weight.device, weight.dtype) for p in tokens.patches)
    return Tokens(patches, tokens.prefix.to(weight.device, weight.dtype), tokens.grid)
