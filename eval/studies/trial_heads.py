"""Evidence heads and explainers that only trials use: averaged, fitted in closed form, with positions.

    q = mean(a) I + mean(b),    a = cov(I, p) / (var(I) + eps),    b = mean(p) - a mean(I)

is the guided filter (He et al. 2013) of a map p by the grey values I of the photo, all over windows: p
keeps its coarse values and takes its edges from the photo.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.explainers.head import HeadExplainer
from xattn.heads import Head
from xattn.heads.evidence import Evidence, standardised
from xattn.heads.fusion import resize
from xattn.training.outcome_fitting import compared
from xattn.training.outcomes import OutcomeBatch
from xattn.training.outcomes_objective import TINY, area_adjusted, mask_effects

LEAST_WEIGHT = 0.1  # of an outcome in the equations: with negative weights they have no solution
GREY = (0.299, 0.587, 0.114)  # weights of red, green, blue


class SigmoidEvidence(Evidence):
    """The evidence head whose mask is the sigmoid of its scores, as T-TAME's objective reads them."""

    def mask(self, scores: Tensor) -> Tensor:
        """sigmoid(scores)."""
        return scores.sigmoid()


class EvidenceWithPositions(Evidence):
    """The evidence head whose network also reads where a cell is."""

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.options = {**self.options, "positions": True}
        first, *rest = self.network
        assert isinstance(first, nn.Conv2d)
        first = nn.Conv2d(first.in_channels + 2, first.out_channels, first.kernel_size)  # type: ignore[arg-type]
        self.network = nn.Sequential(Positions(), first, *rest)


class Positions(nn.Module):
    """Appends two channels, the row and the column of each cell in [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (torch.linspace(-1, 1, int(n), device=x.device) for n in x.shape[2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(x.dtype)
        return torch.cat([x, grid.expand(len(x), -1, -1, -1)], 1)


class MeanOfHeads(Head):
    """The mean of the scores of several heads, each standardised over the photo; it is not trained."""

    name = "mean of heads"

    def __init__(self, backbone: Backbone, heads: Sequence[Evidence]) -> None:
        super().__init__(backbone, {"explain_with": heads[0].explain_with, "heads": len(heads)})
        self.heads = nn.ModuleList(heads)
        self.summary = heads[0].summary

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        return torch.stack([standardised(head(taps, class_index)) for head in self.heads]).mean(0)

    def mask(self, scores: Tensor) -> Tensor:
        """That of the first head."""
        return self.heads[0].mask(scores)  # type: ignore[operator]


# ---------------------------------------------------------------------- closed form


@torch.no_grad()
def fit_in_closed_form(
    head: Evidence, batches: Iterable[tuple[Taps, OutcomeBatch, Tensor]], rounds: int = 5
) -> Tensor:
    """Set a, b and theta of ``head`` by normal equations on outcomes; it returns them, beta (2 + F,).

        (sum_i w_i s_i^2 X_i^T X_i) beta = sum_i s_i X_i^T y_i,    s_i = 1 / |X_i beta_0|

    X_i (N, 2 + F) are the effects of CAM, contrast and features under the masks, y_i (N,) the outcomes of
    one class of one photo, of norm 1, both without mean and area; w_i is the correlation of y_i with the
    map of beta_0, or 0.1 where it is less. Where beta = beta_0 and no w_i was raised, the gradient of the
    mean correlation is 0. The first beta_0 is CAM, each further one the solution before; of all of them the
    one with the highest mean correlation is taken.

    Args:
        batches: taps, outcomes and classes (B, M), the own one first.
        rounds: how often the equations are solved.

    Raises:
        ValueError: no outcome reacts to masks.
    """
    kept = [_regression(head, *batch) for batch in batches]
    x, y = (torch.cat(values) for values in zip(*kept, strict=True))
    if not len(x):
        raise ValueError("table: no outcome reacts to masks, so there is nothing to fit")
    numbers = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[0]
    best, highest = numbers, -torch.inf
    for left in range(rounds, -1, -1):
        effects = torch.einsum("d,idn->in", numbers, x)
        size = effects.norm(dim=1).clamp_min(TINY)
        found = (effects * y).sum(1) / size
        if found.mean() > highest:
            best, highest = numbers, float(found.mean())
        if left:
            weight = found.clamp_min(LEAST_WEIGHT) / size.square()
            gram = torch.einsum("i,idn,ien->de", weight, x, x).cpu()
            right = torch.einsum("i,idn,in->d", 1 / size, x, y).cpu()
            solution = torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution
            numbers = solution[:, 0].to(x.device)
    for parameter, value in (
        (head.cam, best[0]),
        (head.contrast, best[1]),
        (head.features, best[2:]),
    ):
        parameter.copy_(value)
    return best


def _regression(
    head: Evidence, taps: Taps, outcomes: OutcomeBatch, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Effects (n, D, N) of D maps on N masks, and the outcomes (n, N) that react, with norm 1."""
    cam, contrast, extra = head.class_maps(taps, index)
    features = head.plain_features(taps, extra)
    _, masks, answers, counted = compared(cam, outcomes, index)
    masks, answers = masks.double(), answers.double()
    area = masks.mean((2, 3))[:, None]

    def effects(maps: Tensor) -> Tensor:
        maps = resize(maps, tuple(masks.shape[2:])).double()
        return area_adjusted(mask_effects(maps, masks), area)

    of_class = torch.stack([effects(cam), effects(contrast)], 2)
    shared = effects(features)[:, None].expand(-1, of_class.shape[1], -1, -1)
    x = torch.cat([of_class, shared], 2)
    x = torch.cat([x[:, :1], x], 1)[counted > 0]
    y = area_adjusted(answers, area)[counted > 0]
    return x, y / y.norm(dim=-1, keepdim=True).clamp_min(TINY)


# ---------------------------------------------------------------------- edges of the photo


@dataclass(kw_only=True, eq=False, repr=False)
class EdgeAwareHead(HeadExplainer):
    """A head whose scores are up-sampled to the photo's pixels by a guided filter.

    Args:
        radius: half the side of its windows, in pixels.
        eps: variance of grey values in [0, 1] below which a window counts as even.
    """

    radius: int = 8
    eps: float = 1e-3

    def _explanation(self, images: Tensor, taps: Taps, classes: Tensor) -> Tensor:
        assert self.head is not None
        scores = resize(self.head(taps, classes), tuple(images.shape[2:]))
        grey = torch.einsum("c,bchw->bhw", images.new_tensor(GREY), images)[:, None]
        scores = guided_filter(scores, grey, self.radius, self.eps)
        return self.head.mask(scores) if self.head.explain_with == "mask" else scores


def guided_filter(maps: Tensor, guide: Tensor, radius: int, eps: float) -> Tensor:
    """Maps (B, M, H, W) filtered by a guide (B, 1, H, W), in windows of 2 radius + 1 pixels a side, which
    end at the border."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)

    at, of_guide = mean(maps), mean(guide)
    slope = (mean(maps * guide) - at * of_guide) / (mean(guide * guide) - of_guide**2 + eps)
    return mean(slope) * guide + mean(at - slope * of_guide)
