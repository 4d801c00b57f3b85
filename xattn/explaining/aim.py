"""What an explanation is of: a class, one class a photo, or any number of the network's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.backbone.pooled_features import answered
from xattn.backbone.scored import class_of, is_score, scored
from xattn.explainers import Explainer, as_explainer
from xattn.explainers.base import check_target

Classes = int | str | Sequence[int | str] | None


def aimed(
    backbone: Backbone, explainers: Sequence[Any], classes: Classes, target: Any
) -> tuple[Backbone, Sequence[Any], Any]:
    """Backbone, explainers and classes for ``target``: a class, by number or name, or a number of the
    network's answer, for which the explainers are made again.

    Raises:
        ValueError: ``classes`` and ``target`` together, or a target that does not fit.
    """
    if target is None:
        return backbone, explainers, classes
    if classes is not None:
        raise ValueError("target: got one, and classes as well; give one of them")
    if is_score(backbone, target):
        view = scored(backbone, target)
        made = [
            e if e is None or isinstance(e, str) else as_explainer(e, backbone).with_target(view)
            for e in explainers
        ]
        return view, made, [0] if view.num_classes == 1 else None
    return backbone, explainers, class_of(backbone, target)


class OneEach:
    """One class a photo, LongTensor (N,) for N photos, which are known by their names.

    Raises:
        ValueError: another number of classes than photos, or one out of range.
    """

    def __init__(self, backbone: Backbone, classes: Tensor, names: Sequence[str]) -> None:
        whole = check_target(classes, len(names), backbone.num_classes)
        self.by_name = dict(zip(names, whole.tolist(), strict=True))

    def maps(
        self, explainer: Explainer, pixels: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), classes (B, 1) and maps (B, 1, h, w) of the photos of a batch."""
        classes = torch.tensor([self.by_name[name] for name in names], device=pixels.device)
        with torch.no_grad():
            logits = explainer.backbone.logits(pixels)
        answered(logits)
        return logits, classes[:, None], explainer.attribute(pixels, classes)


class PredictedAndTrue:
    """The predicted class of each photo, and where it is another one the true class.

    Args:
        truth: the true class of each photo by its name, None where it is not known.
    """

    def __init__(self, truth: Mapping[str, int | None]) -> None:
        self.truth = truth

    @staticmethod
    def asked(classes: object) -> bool:
        """Whether these ``classes`` ask for it: ("predicted", "label"), or "predicted,label"."""
        words = classes if isinstance(classes, list | tuple) else [classes]
        parts = [part.strip() for word in words for part in str(word).split(",")]
        return parts == ["predicted", "label"]

    def maps(
        self, explainer: Explainer, pixels: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), classes (B, 2) and maps (B, 2, h, w) of the photos of a batch; where there is
        one class alone, it stands twice."""
        logits, classes, maps = explainer.attribute_classes(
            pixels, lambda z: z.argmax(1, keepdim=True)
        )
        known = [self.truth.get(name) for name in names]
        predicted = classes[:, 0].tolist()
        true = torch.tensor(
            [p if k is None else k for p, k in zip(predicted, known, strict=True)],
            device=pixels.device,
        )
        both, wrong = maps.repeat(1, 2, 1, 1), (true != classes[:, 0]).nonzero()[:, 0]
        if len(wrong):
            both[wrong, 1] = explainer.attribute(pixels[wrong], true[wrong])[:, 0]
        return logits, torch.stack([classes[:, 0], true], 1), both
