"""T-TAME: attention branches on several taps, fused to one map per class (arXiv 2403.04523, 2301.07407).

    u_i = ReLU( BN_i(W_i * f_i + b_i) + f_i )        1x1 convolutions W_i, taps f_i (B, C_i, h_i, w_i)
    c_k = sum_i up( row_i(k) . u_i ) + bias(k)       (B, K, r, r),  r = min(side of the first tap, 56)

and the mask of class k is sigmoid(c_k). L-CAM (arXiv 2209.11189) is the case of one tap and no
branch. Two things differ from the paper, and both are options: a branch on a tap wider than 512 channels is
low-rank (``branch_rank``), and rows may come from the classifier (``fusion="classifier"``, see
:mod:`xattn.heads.fusion`).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.base import Head, MaskPolicy, register_head
from xattn.heads.fusion import ClassifierFusion, create_fusion
from xattn.heads.mixer import Depth
from xattn.runtime.option_checks import Count

FULL_RANK_CHANNELS = 512
MAX_SIZE = 56


class Branch(nn.Module):
    """``ReLU(BN(W f + b) + f)`` on one tap, (B, C, h, w) -> (B, C, h, w).

    ``rank=None`` is the published C x C convolution; otherwise W = A B with inner width ``rank``.
    """

    def __init__(
        self,
        channels: int,
        rank: int | None,
        skip: bool,
        norm: bool,
        activation: str,
        identity: bool,
    ) -> None:
        super().__init__()
        if rank is None:
            self.conv: nn.Module = nn.Conv2d(channels, channels, 1)
        else:
            self.conv = nn.Sequential(
                nn.Conv2d(channels, rank, 1, bias=False), nn.Conv2d(rank, channels, 1)
            )
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.skip = skip
        self.activation = nn.Sigmoid() if activation == "sigmoid" else nn.ReLU()
        if identity and norm and skip:  # start as u = ReLU(f): the branch learns a correction
            nn.init.zeros_(self.norm.weight)  # type: ignore[arg-type]

    def forward(self, f: Tensor) -> Tensor:
        u = self.norm(self.conv(f))
        return self.activation(u + f if self.skip else u)


def _shown(explain_with: str | None, fusion: str) -> str:
    """Scores for the published head; with classifier fusion, the mask that is trained."""
    return explain_with or ("scores" if fusion == "per_class" else "mask")


@register_head("ttame")
class TTame(Head):
    """The T-TAME head on the taps of ``backbone``.

    Args:
        fusion: ``"classifier"`` (ours) or ``"per_class"`` (the paper's K-row convolution).
        num_taps: read the last ``num_taps`` taps of the backbone (default all).
        branch_rank: ``"auto"`` (64 on taps wider than 512 channels), None (always the exact C x C
            form) or a rank for all branches.
        skip, norm, activation: the paper's ablations of the branch.
        mask_policy: how training applies the mask to the image, see :mod:`xattn.training.objectives.mask`.
        fusion_rank: inner width of the classifier fusion's projections.
        explain_with: show raw ``"scores"`` or the trained ``"mask"``, sigmoid(scores); both rank pixels
            in the same order. With ``fusion="per_class"``, the default is the scores, as published;
            otherwise, it is the mask.
        mixer, mixer_depth, mixer_options: attention layers that mix the tokens of the last tap before
            the head reads it, see :mod:`xattn.heads.mixer`; by default none.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = xattn.create_head("ttame", net)
        >>> scores = head(net(torch.rand(2, 3, 64, 64)))  # all classes in one pass
        >>> scores.shape, head.mask(scores).shape
        (torch.Size([2, 1000, 8, 8]), torch.Size([2, 1000, 8, 8]))
    """

    def __init__(
        self,
        backbone: Backbone,
        fusion: Literal["classifier", "per_class"] = "classifier",
        num_taps: Count | None = None,
        branch_rank: Count | Literal["auto"] | None = "auto",
        skip: bool = True,
        norm: bool = True,
        activation: Literal["relu", "sigmoid"] = "relu",
        mask_policy: MaskPolicy = "raw_normalize",
        fusion_rank: Count | None = 64,
        explain_with: Literal["scores", "mask"] | None = None,
        mixer: str | None = None,
        mixer_depth: Depth = 1,
        mixer_options: dict[str, Any] | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "fusion": fusion,
            "num_taps": num_taps,
            "branch_rank": branch_rank,
            "skip": skip,
            "norm": norm,
            "activation": activation,
            "mask_policy": mask_policy,
            "fusion_rank": fusion_rank,
            "explain_with": _shown(explain_with, fusion),
        }
        super().__init__(backbone, options)
        self.add_mixer(backbone, mixer, mixer_depth, mixer_options)
        count = len(backbone.taps) if num_taps is None else num_taps
        if not 1 <= count <= len(backbone.taps):
            raise ValueError(
                f"num_taps: got {num_taps}; the backbone has {len(backbone.taps)} taps"
            )
        self.num_taps = count
        channels = list(backbone.channels[-count:])
        self.branches = nn.ModuleList()
        for c in channels:
            rank = branch_rank
            if branch_rank == "auto":
                rank = 64 if c > FULL_RANK_CHANNELS else None
            self.branches.append(
                Branch(c, rank, skip, norm, activation, identity=fusion == "classifier")  # type: ignore[arg-type]
            )
        self.fusion = create_fusion(fusion, backbone, channels, fusion_rank)
        self.raw_last = isinstance(self.fusion, ClassifierFusion)

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        maps = self.mixed(taps).maps[-self.num_taps :]
        size = tuple(min(side, MAX_SIZE) for side in maps[0].shape[2:])
        used = [branch(f) for branch, f in zip(self.branches, maps, strict=True)]
        if self.raw_last:
            used.append(maps[-1])
        return self.fusion(used, class_index, size)


@register_head("lcam", cases=({"fusion": "classifier"},))
class LCam(Head):
    """L-CAM: one 1x1 convolution on the last tap, no branch.

    Args:
        mask_policy: ``"raw_normalize"`` masks the image (L-CAM-Img), ``"feature"`` multiplies the
            pooled feature map and continues with the classifier (L-CAM-Fm).
        fusion, fusion_rank, explain_with, mixer, mixer_depth, mixer_options: as in :class:`TTame`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = xattn.create_head("lcam", net)
        >>> head(net(torch.rand(2, 3, 64, 64)), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 2, 2])
    """

    def __init__(
        self,
        backbone: Backbone,
        fusion: Literal["classifier", "per_class"] = "per_class",
        mask_policy: MaskPolicy = "raw_normalize",
        fusion_rank: Count | None = 64,
        explain_with: Literal["scores", "mask"] | None = None,
        mixer: str | None = None,
        mixer_depth: Depth = 1,
        mixer_options: dict[str, Any] | None = None,
    ) -> None:
        options = {
            "fusion": fusion,
            "mask_policy": mask_policy,
            "fusion_rank": fusion_rank,
            "explain_with": _shown(explain_with, fusion),
        }
        super().__init__(backbone, options)
        self.add_mixer(backbone, mixer, mixer_depth, mixer_options)
        channels = [] if fusion == "classifier" else [backbone.channels[-1]]
        self.fusion = create_fusion(fusion, backbone, channels, fusion_rank)

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        last = self.mixed(taps).maps[-1]
        return self.fusion([last], class_index, tuple(last.shape[2:]))
