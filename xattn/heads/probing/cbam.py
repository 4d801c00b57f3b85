"""Convolutional block attention, CBAM (arXiv 1807.06521): gate channels, then positions, then average.

c = sigmoid(MLP(mean_n x_n) + MLP(max_n x_n)),                      x' = c o x
m = sigmoid(BN(conv_7x7([mean_channel x'; max_channel x']))),       z = 1/N sum_n relu(m_n x'_n + x_n)

One form omits BN, relu and residual. The gates are positive, so relu(m_n x'_n + x_n) = (m_n c + 1) o
relu(x_n).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.pullback import Step
from xattn.runtime.option_checks import Count


@register_head("cbam", cases=({}, {"form": "gates"}))
class Cbam(AttentiveHead):
    """Pooling with gates: the weights are m_n / N without a softmax, so they do not sum to 1.

    When shares are computed, the channel gate is held constant. The 7 x 7 convolution reads neighbours, so
    the order of the patches matters. There are 2 D^2 / reduction + 98 parameters, plus 2 of the norm.

    Args:
        reduction: D divided by the hidden width of the channel gate's MLP; 16 in the paper.
        form: ``"benchmark"`` is the "cbam" of the probing benchmark (arXiv 2506.10178), with BatchNorm
            before the position gate, the residual and relu; ``"gates"`` has only the two gates.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Raises:
        ValueError: if ``reduction`` does not divide the width.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("cbam", net, classes=5, reduction=4)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    permutes = False

    def __init__(
        self,
        backbone: Backbone,
        reduction: Count = 16,
        form: Literal["benchmark", "gates"] = "benchmark",
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        if width % reduction:
            raise ValueError(
                f"reduction: got {reduction}; tokens are {width} wide, so choose a divisor of {width}"
            )
        super().__init__(backbone, {"reduction": reduction, "form": form}, width, **shared)
        self.mlp = nn.Sequential(
            nn.Linear(width, width // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(width // reduction, width, bias=False),
        )
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.gate_norm = nn.BatchNorm2d(1) if form == "benchmark" else None

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        channels = (self.mlp(x.mean(1)) + self.mlp(x.amax(1))).sigmoid()[:, None]
        gated = channels * x
        mean, most = (t.unflatten(-1, tokens.grid) for t in (gated.mean(-1), gated.amax(-1)))
        if self.gate_norm is None:
            return AttentionTerms(
                self.conv(torch.stack([most, mean], 1)).flatten(2), gated[:, None]
            )
        scores = self.gate_norm(self.conv(torch.stack([mean, most], 1))).flatten(2)
        return AttentionTerms(scores, torch.stack([channels * x.relu(), x.relu()], 1))

    def weights(self, scores: Tensor) -> Tensor:
        """Compute gates from the scores (B, 1, N); the benchmark adds a row of 1 / N for its residual."""
        gates = scores.sigmoid() / scores.shape[-1]
        if self.gate_norm is None:
            return gates
        return torch.cat([gates, torch.full_like(gates, 1 / scores.shape[-1])], 1)

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        count = pooled.shape[1]
        return pooled.sum(1), lambda rows: rows[:, :, None].expand(-1, -1, count, -1)
