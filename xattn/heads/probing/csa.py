"""Class-semantics-based attention (CSA, arXiv 2109.02613): weight features by the evidence for classes.

    s_c = sigmoid(W_2 relu(W_1 vec(pool(R))))      a weight for every channel, from R in a few bins
    s_t = sigmoid(conv(relu(conv(R))))             a weight for every position
    out = F o s_c + F o s_t                        channel, position or both

R (B, C_r, ...) is class evidence and F (B, C_f, ...) are features, over time or over patches. The weights
depend only on R, never on F. The paper has no public code, so the internal layers and sizes are ours. With
R = F, one bin and only the channel branch, this is squeeze-and-excitation (arXiv 1709.01507).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.class_reading import before_norms
from xattn.heads.pullback import Step
from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import Count, checked

Branches = Literal["both", "channel", "place"]


class ClassSemanticAttention(nn.Module):
    """CSA as a module: ``attention(evidence, features)`` maps (B, C_r, T) and (B, C_f, T) to (B, C_f, T).

    With ``axes=2`` the inputs are (B, C_r, h, w) and (B, C_f, h, w).

    Args:
        evidence, features: C_r and C_f.
        hidden: width of the layer inside each branch.
        bins: the number of bins of the channel branch along each axis.
        kernel: the odd size of the convolutions.
        axes: 1 for time, 2 for patches.
        branches: "both", "channel" or "place".
        padding: the padding of the convolutions; "circular" makes the position branch equivariant to
            circular shifts.

    Raises:
        ValueError: if an option does not fit.
    """

    @checked
    def __init__(
        self,
        evidence: Count,
        features: Count,
        hidden: Count,
        bins: Count = 8,
        kernel: Count = 3,
        axes: Literal[1, 2] = 1,
        branches: Branches = "both",
        padding: Literal["zeros", "replicate", "circular"] = "zeros",
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel: got {kernel}; give an odd size")
        self.evidence, self.features, self.axes = evidence, features, axes
        self.channels: nn.Sequential | None = None
        self.places: nn.Sequential | None = None
        conv: Any = (nn.Conv1d, nn.Conv2d)[axes - 1]
        if branches != "place":
            self.channels = nn.Sequential(
                (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[axes - 1](bins),
                nn.Flatten(),
                nn.Linear(evidence * bins**axes, hidden),
                nn.ReLU(),
                nn.Linear(hidden, features),
            )
        if branches != "channel":
            same = {"padding": kernel // 2, "padding_mode": padding}
            self.places = nn.Sequential(
                conv(evidence, hidden, kernel, **same), nn.ReLU(), conv(hidden, 1, kernel, **same)
            )

    def scores(self, evidence: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compute the inputs of the sigmoids: (B, C_f) for channels and (B, 1, ...) for positions.

        The result is None for a branch that is left out."""
        return (
            None if self.channels is None else self.channels(evidence),
            None if self.places is None else self.places(evidence),
        )

    def forward(self, evidence: Tensor, features: Tensor) -> Tensor:
        """Compute F o s_c + F o s_t."""
        channels, places = self.scores(evidence)
        gates = [] if channels is None else [channels[(..., *[None] * self.axes)].sigmoid()]
        gates += [] if places is None else [places.sigmoid()]
        return features * sum(gates)


@register_head("csa", cases=({"hidden": 4}, {"hidden": 4, "bins": 1, "kernel": 1}))
class Csa(AttentiveHead):
    """CSA over patches: R results from applying the backbone's classifier rows to each patch.

    z = 1/N sum_n (s_c + s_n) o x_n. The attention map is s_n. Class maps are CAM over the weighted
    features, which is exact if both weights are held constant. If the last layers are zero, the head equals
    ``gap``. The convolutions read neighbours, so the order of the patches matters.

    Args:
        hidden: the width inside each branch.
        bins: the number of bins per side over which patches are averaged for the channel branch.
        kernel: the odd side length of the convolutions.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Raises:
        ValueError: if the backbone does not end in one linear classifier of the last tap's channels.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("csa", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    permutes = False
    rows: Tensor  # (K, C), taken from the backbone and never saved with the head

    def __init__(
        self,
        backbone: Backbone,
        hidden: Count = 32,
        bins: Count = 2,
        kernel: Count = 3,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        options = {"hidden": hidden, "bins": bins, "kernel": kernel}
        super().__init__(backbone, options, width, **shared)
        rows = evidence_rows(backbone)
        self.register_buffer("rows", rows, persistent=False)
        self.attention = ClassSemanticAttention(len(rows), width, hidden, bins, kernel, axes=2)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        evidence = x @ self.rows.to(x.dtype).t()
        channels, places = self.attention.scores(evidence.transpose(1, 2).unflatten(2, tokens.grid))
        assert channels is not None and places is not None
        return AttentionTerms(
            places.flatten(2), torch.stack([x, channels.sigmoid()[:, None] * x], 1)
        )

    def weights(self, scores: Tensor) -> Tensor:
        """Compute s_n / N from the scores (B, 1, N), and 1 / N for the channel branch.

        Patches whose score is -inf are left out of both."""
        even = torch.ones_like(scores).masked_fill(scores == -torch.inf, 0.0)
        return torch.cat([scores.sigmoid(), even], 1) / scores.shape[-1]

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        count = pooled.shape[1]
        return pooled.sum(1), lambda rows: rows[:, :, None].expand(-1, -1, count, -1)


def evidence_rows(backbone: Backbone) -> Tensor:
    """Return the classifier's rows (K, C) over the last tap's channels, scaled to unit root mean square.

    The scaling gives evidence and features a similar scale. The gain of a norm before the classifier is
    included.

    Raises:
        ValueError: if there is no single linear classifier, or it reads other channels.
    """
    weight = backbone.classifier_weight
    width = backbone.channels[-1]
    if weight is None or weight.shape[1] != width:
        reads = "has no single linear classifier"
        if weight is not None:
            reads = (
                f"classifies {weight.shape[1]} channels, its tap {backbone.taps[-1]} has {width}"
            )
        raise ValueError(
            f"head: csa needs class evidence, the rows of a linear classifier, but {backbone.name} "
            f"{reads}; choose a head without it, such as 'gap', or load a classifier"
        )
    model: Any = backbone.model
    norms = (getattr(model, "fc_norm", None), getattr(getattr(model, "head", None), "norm", None))
    rows = before_norms(widen(weight.detach()), *norms)
    size = rows.square().mean().sqrt().clamp_min(1e-30) * math.sqrt(width)
    return (rows / size).clone()
