"""Gates psi_l of an attention-gated network that predicts a mask, one psi per level l.

    gradient    sum over levels of up(psi_l dz / dpsi_l), z the score of the class's mask
    plus        up(psi_l)
    minus       up(1 - psi_l)

psi has no fixed sign: where psi is small, the next convolution may add what psi removes. Therefore, the
level and the sign (``plus`` or ``minus``) have to be chosen on other images; the study of lesions
(docs/results/lesions.md) does this and saves the choice with the network. ``gradient`` needs no such
choice, and it is the only form that depends on the class. Gates: Oktay et al., arXiv 1804.03999; Bouget et
al., arXiv 2101.07715.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.explainers.base import Explainer, register_explainer
from xattn.photos.classes import as_classes


@register_explainer(
    "gates", title="Attention gates", networks=("masks",), cases=({}, {"form": "minus", "level": 1})
)
@dataclass(kw_only=True, eq=False, repr=False)
class Gates(Explainer):
    """psi times the gradient of the mask's score, or psi itself; for :mod:`xattn.models.masks`.

    Args:
        form: "gradient", "plus" or "minus", see the module; None uses the form and level saved with
            the network, or "gradient" if there are none.
        level: 0 is the finest; None uses all levels, which "plus" and "minus" average.

    Raises:
        ValueError: a network without gates, or an unknown form or level.

    Example:
        >>> import torch, xattn
        >>> from xattn.models.agunet import AGUNet
        >>> from xattn.models.masks import MaskClassifier
        >>> net = xattn.load_backbone(MaskClassifier(AGUNet(), size=(32, 32)))
        >>> method = xattn.create_explainer("gates", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=0).shape
        torch.Size([1, 1, 32, 32])
    """

    per_class = True

    form: Literal["gradient", "plus", "minus"] | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form is None:
            kept = getattr(self.backbone.model, "gate_choice", None)
            self.form, level = kept or ("gradient", None)
            self.level = level if self.level is None else self.level
        if not hasattr(self.backbone.model, "forward_gates"):
            raise ValueError(
                f"explainer: 'gates' reads the gates of a mask network, but {self.backbone.name} has "
                f"none; give a folder of the study of lesions, or use 'gradcam'"
            )
        size = self.backbone.preprocessing.input_size
        with self._guard(), torch.no_grad():
            levels = len(self._gates(torch.zeros(1, 3, *size, device=self.backbone.device))[1])
        if not levels:
            raise ValueError("explainer: this network has gates=False; train one with gates")
        if self.level is not None and not 0 <= self.level < levels:
            raise ValueError(f"level: got {self.level}; the network has 0..{levels - 1}")

    def _gates(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        dtype = next((p.dtype for p in self.backbone.parameters()), images.dtype)
        scores, gates = self.backbone.model.forward_gates(  # type: ignore[operator]
            self.backbone.normalize(images.to(dtype))
        )
        return as_classes(scores, self.backbone.task), gates

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            logits, gates = self._gates(images.detach().requires_grad_(True))
            chosen = list(gates if self.level is None else gates[self.level : self.level + 1])
            if self.form == "gradient":
                score = logits.gather(1, target[:, None]).sum()
                slopes = torch.autograd.grad(score, chosen)
                maps = [g * slope for g, slope in zip(chosen, slopes, strict=True)]
            else:
                maps = [g if self.form == "plus" else 1 - g for g in chosen]
        size = images.shape[2:]
        up = [F.interpolate(m.detach(), size, mode="bilinear", align_corners=False) for m in maps]
        return torch.stack(up).sum(0) if self.form == "gradient" else torch.stack(up).mean(0)
