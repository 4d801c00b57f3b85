"""Targets other than classes: one number per image, computed from the network's output.

    Target(lambda logits: logits[:, 281] - logits[:, 282], name="tabby rather than tiger cat")
    at_mask("dog", mask), at_point("dog", 0.5, 0.3)    a class of a segmentation network at some pixels
    at_query(17)                                       one mask of a network that predicts masks

A plain function is a target, too. :func:`xattn.backbone.scored.scored` turns a target into a backbone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from xattn.backbone.backbone import Backbone

P = Literal["value", "probability", "sigmoid"]
Reads = Literal["logits", "features", "pixels", "masks"]
SHAPES = {
    "logits": "logits (B, K)",
    "features": "features (B, C)",
    "pixels": "logits (B, K, h, w)",
    "masks": "masks (B, Q, K + 1 + h w)",
}
_TRIED = 3  # size of the batch on which a function is tried


@dataclass(frozen=True, eq=False)
class Target:
    """A number computed from the network's output.

    Args:
        function: receives the tensor named by ``reads`` for a batch of B images and returns B numbers,
            (B,). Gradients flow through it.
        name: the name in tables, packs and protocols; by default the function's name, or for a lambda a
            name made from a hash of its outputs.
        p: the value that metrics and masking methods use as the probability of a class:
            ``"value"`` is the number itself, of any size; ``"probability"`` is the number itself, which
            must be in [0, 1]; ``"sigmoid"`` is the sigmoid of the number.
        reads: ``"logits"`` (B, K); ``"features"`` (B, C), the classifier's input; ``"pixels"``, the
            logits (B, K, h, w) of a segmentation network; or ``"masks"``, its masks and their class
            logits, (B, Q, K + 1 + h w).

    Raises:
        ValueError: if ``function`` cannot be called, ``name`` is empty, or ``p`` or ``reads`` is unknown.

    Example:
        >>> import torch, xattn
        >>> from xattn import Target
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> margin = Target(lambda logits: logits[:, 3] - logits[:, 7], name="3 rather than 7")
        >>> method = xattn.create_explainer("gradcam", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=margin).shape
        torch.Size([1, 1, 2, 2])
    """

    function: Callable[[Tensor], Tensor]
    name: str | None = None
    p: P = "value"
    reads: Reads = "logits"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(
                f"target: got {self.function!r:.80}; give a function of {SHAPES['logits']} that "
                f"returns (B,)"
            )
        if self.name is not None and not str(self.name).strip():
            raise ValueError("name: got an empty one; give a few words that describe the number")
        for argument, given, choices in (("p", self.p, P), ("reads", self.reads, Reads)):
            if given not in get_args(choices):
                raise ValueError(
                    f"{argument}: got {given!r}; choose one of {', '.join(get_args(choices))}"
                )

    def of(self, backbone: Backbone) -> Target:
        """Return the target for this backbone; if the target is given by a photo, embed the photo."""
        return self

    def about(self) -> dict[str, Any]:
        """Return what packs store about the target besides its name."""
        return {}

    def scores(self, outputs: Tensor) -> Tensor:
        """Compute the numbers (B,) for ``outputs`` of B images.

        Raises:
            ValueError: if the function fails, or does not return B numbers.
        """
        count, shape = len(outputs), tuple(outputs.shape)
        try:
            found = self.function(outputs)
        except (IndexError, RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"target: {self._shown} fails on {self.reads} {shape} ({type(error).__name__}: {reason}); "
                f"it gets the {SHAPES[self.reads]} of a batch and returns (B,), such as logits[:, 281]"
            ) from error
        if not isinstance(found, Tensor):
            raise ValueError(
                f"target: {self._shown} returned {type(found).__name__}; return a torch.Tensor (B,)"
            )
        if found.shape != (count,) or not found.is_floating_point():
            raise ValueError(
                f"target: {self._shown} returned {found.dtype} {tuple(found.shape)} for {count} images; "
                f"return one number per image, float ({count},), such as logits[:, 281]"
            )
        return found

    def digest(self, shape: tuple[int, ...], like: Tensor) -> str:
        """Compute eight hex digits from the target's values for fixed random numbers ``(B, *shape)``."""
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn(_TRIED, *shape, generator=generator, device="cpu").to(like)
        with torch.no_grad():
            found = self.scores(outputs)
        text = " ".join(f"{v:.3e}" for v in found.double().tolist())
        return hashlib.sha256(f"{self.reads} {text}".encode()).hexdigest()[:8]

    @property
    def own_name(self) -> str | None:
        """``name``, or the name of the function; None for a lambda."""
        if self.name is not None:
            return str(self.name).strip()
        name = getattr(self.function, "__name__", None)
        return None if name in (None, "<lambda>") else str(name)

    @property
    def _shown(self) -> str:
        return self.own_name or "the function"


def as_target(target: Any) -> Target:
    """Convert a function to a target, or return a target unchanged."""
    return target if isinstance(target, Target) else Target(target)


# ---------------------------------------------------------------------- segmentation


@dataclass(frozen=True, eq=False)
class SegmentationTarget(Target):
    """A class of a segmentation network at some pixels, or one of its masks.

    It is created by :func:`at_mask`, :func:`at_point` and :func:`at_query`, and bound to a network by
    :meth:`of`.

    Attributes:
        label: the class, by number or name; for a mask, None means the mask's most probable class.
        where: used in the name; ``{}`` is replaced by the class.
    """

    label: int | str | None = None
    where: str = "{}"
    record: Mapping[str, Any] = field(default_factory=dict)

    def of(self, backbone: Backbone) -> Target:
        """Return the same target with its class given by number.

        Raises:
            ValueError: if the class is unknown.
        """
        index, title = None, "the likeliest class"
        if self.label is not None:
            try:
                index = backbone.class_index(self.label)
            except ValueError as error:
                raise ValueError(f"target: {error}") from None
            title = backbone.class_names[index]
        # For a softmax, p is not the sigmoid of a logit but of the log-odds.
        odds = getattr(backbone.model, "odds", None) if self.p == "sigmoid" else None
        function = replace(self.function, index=index, classes=backbone.num_classes, odds=odds)  # type: ignore[type-var]
        return replace(self, function=function, name=self.name or self.where.format(title))

    def about(self) -> dict[str, Any]:
        return {"segment": {"class": self.label, **self.record}}


def at_mask(
    class_index: int | str, mask: Any, name: str | None = None, p: P = "value"
) -> SegmentationTarget:
    """Create a target: the mean logit of a class over a mask, for a segmentation network.

    Its Grad-CAM is Seg-Grad-CAM (Vinogradova et al., arXiv 2002.11434), up to division by the number of
    pixels.

    Args:
        class_index: the class, by number or name.
        mask: (H, W), bool or nonnegative weights, over the model's input; resampled to the size of the
            logits by averaging over each cell.
        name: by default a text such as ``"dog at a mask of 340 pixels"``.
        p: with ``"sigmoid"`` the number is the mean of the class's log-odds, so that p is a probability.

    Raises:
        ValueError: if the mask has the wrong shape, is empty, or has negative or non-finite weights.

    Example:
        >>> import torch
        >>> from xattn import at_mask
        >>> at_mask(3, torch.ones(64, 64)).reads
        'pixels'
    """
    weights = torch.as_tensor(mask, device="cpu").detach()
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(
            f"mask: got shape {tuple(weights.shape)}; give (H, W), one mask over the model's input"
        )
    weights = weights.double()
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or not bool(weights.any()):
        raise ValueError(
            "mask: is empty, or has negative or non-finite weights; give a mask of one pixel or more, "
            "such as labels == 12"
        )
    pixels = int((weights > 0).sum())
    where = f"{{}} at a mask of {pixels} pixels"
    own = _AtMask(weights=weights)
    return SegmentationTarget(
        own, name, p, "pixels", _class(class_index), where, {"pixels": pixels}
    )


def at_point(
    class_index: int | str, row: float, column: float, name: str | None = None, p: P = "value"
) -> SegmentationTarget:
    """Create a target: the logit of a class at one point, for a segmentation network.

    Args:
        class_index: the class, by number or name.
        row, column: as fractions of the model's input, from 0 (top, left) to 1 (bottom, right).
        name: by default a text such as ``"dog at (0.5, 0.3)"``.
        p: with ``"sigmoid"`` the number is the class's log-odds, so that p is its probability.

    Raises:
        ValueError: if the point is outside the input.

    Example:
        >>> from xattn import at_point
        >>> at_point("cat", row=0.3, column=0.5).reads
        'pixels'
    """
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise ValueError(
            f"row, column: got {row}, {column}; give fractions of the input's height and width, 0..1"
        )
    where = f"{{}} at ({row:g}, {column:g})"
    own = _AtPoint(row=row, column=column)
    return SegmentationTarget(
        own, name, p, "pixels", _class(class_index), where, {"at": [row, column]}
    )


def at_query(
    number: int, class_index: int | str | None = None, name: str | None = None, p: P = "probability"
) -> SegmentationTarget:
    """Create a target: the score of one mask of a network that predicts masks and their classes.

    For networks such as Mask2Former, the score is the probability of the class times the mean of all
    sigmoids of the mask that are above one half (or, if there are none, times its largest sigmoid). This
    is the score that the model's own post-processing computes, in [0, 1].

    Args:
        number: the number of the mask, from 0.
        class_index: the class, by number or name; by default the mask's most probable one in each image.

    Raises:
        ValueError: if ``number`` is below 0.

    Example:
        >>> from xattn import at_query
        >>> at_query(5, class_index=3).reads
        'masks'
    """
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 0:
        raise ValueError(f"number: got {number!r}; give the number of a mask, from 0")
    number = int(number)
    label = None if class_index is None else _class(class_index)
    where, record = f"mask {number}, {{}}", {"mask": number}
    return SegmentationTarget(_AtQuery(number=number), name, p, "masks", label, where, record)


def like_mask(mask: Tensor, scores: Tensor, where: str = "masks like one") -> SegmentationTarget:
    """Create a target: how similar a given mask is to the network's mask that is most like it.

    The formula is that of D-RISE (Petsiuk et al., arXiv 2006.03204), with masks in place of boxes:

        p = max_q IoU(m, m_q) cos(P, P_q) O_q

    m_q is mask q, thresholded where its sigmoid is above one half, P_q are its class probabilities, and O_q
    is one minus the probability of "no class". No gradient passes through the masks.

    Args:
        mask: (h, w) bool, of the size of the network's masks, with at least one pixel.
        scores: (K,) the class probabilities P.

    Raises:
        ValueError: if the mask is empty.

    Example:
        >>> import torch
        >>> from xattn.backbone.targets import like_mask
        >>> like_mask(torch.ones(8, 8, dtype=torch.bool), torch.tensor([0.9, 0.1])).reads
        'masks'
    """
    if mask.ndim != 2 or not bool(mask.any()):
        raise ValueError("mask: has no pixel above one half; give another place, or by='mask'")
    function = _LikeMask(mask=mask.flatten().cpu(), scores=scores.detach().cpu())
    return SegmentationTarget(function, None, "probability", "masks", None, where, {})


def _class(label: int | str) -> int | str:
    if isinstance(label, str) and label.strip():
        return label
    if isinstance(label, bool) or not isinstance(label, Integral) or label < 0:
        raise ValueError(f"class_index: got {label!r}; give a class by name, or its number from 0")
    return int(label)


@dataclass(frozen=True, eq=False)
class _AtPlace:
    index: int | None = None
    classes: int = 0
    odds: Callable[[Tensor], Tensor] | None = None

    def class_of(self, logits: Tensor) -> Tensor:
        """Select the logits or log-odds (B, h, w) of the class from those of all classes (B, K, h, w)."""
        assert self.index is not None
        return (logits if self.odds is None else self.odds(logits))[:, self.index]


@dataclass(frozen=True, eq=False, kw_only=True)
class _AtMask(_AtPlace):
    weights: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        size = (logits.shape[2], logits.shape[3])
        given = tuple(self.weights.shape)
        if abs(given[0] * size[1] - given[1] * size[0]) >= max(*given, *size):
            raise ValueError(
                f"mask: got {given} for logits of {size}; give a mask over the model's input, with the "
                f"same aspect ratio"
            )
        weights = F.adaptive_avg_pool2d(self.weights[None, None], size)[0, 0]
        dtype = torch.promote_types(
            logits.dtype, torch.float32
        )  # sums of a large mask outgrow fp16
        weights = (weights / weights.sum()).to(logits.device, dtype)
        return (self.class_of(logits) * weights).sum((1, 2))


@dataclass(frozen=True, eq=False, kw_only=True)
class _AtPoint(_AtPlace):
    row: float
    column: float

    def __call__(self, logits: Tensor) -> Tensor:
        height, width = logits.shape[2:]
        y, x = min(int(self.row * height), height - 1), min(int(self.column * width), width - 1)
        return self.class_of(logits)[:, y, x]


@dataclass(frozen=True, eq=False, kw_only=True)
class _AtQuery(_AtPlace):
    number: int

    def __call__(self, packed: Tensor) -> Tensor:
        if self.number >= packed.shape[1]:
            raise ValueError(
                f"number: got {self.number}; the network returns masks 0..{packed.shape[1] - 1}"
            )
        own = packed[:, self.number]
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        p = own[:, : self.classes + 1].softmax(1)[:, :-1]
        mask = own[:, self.classes + 1 :].sigmoid()
        inside = mask > 0.5
        mean = (mask * inside).sum(1) / inside.sum(1).clamp(min=1)
        sure = torch.where(inside.any(1), mean, mask.amax(1))
        return sure * (p.amax(1) if self.index is None else p[:, self.index])


@dataclass(frozen=True, eq=False, kw_only=True)
class _LikeMask(_AtPlace):
    mask: Tensor
    scores: Tensor

    def __call__(self, packed: Tensor) -> Tensor:
        packed = packed.to(torch.promote_types(packed.dtype, torch.float32))
        p = packed[..., : self.classes + 1].softmax(2)
        theirs = packed[..., self.classes + 1 :] > 0
        own = self.mask.to(packed.device)
        overlap = (theirs & own).sum(2) / (theirs | own).sum(2)
        alike = F.cosine_similarity(p[..., :-1], self.scores.to(p)[None, None], dim=2)
        return (overlap * alike * (1 - p[..., -1])).amax(1)
