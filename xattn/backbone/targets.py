"""What is explained where it is no class: one number an image, made of what the network answers.

    Target(lambda logits: logits[:, 281] - logits[:, 282], name="tabby rather than tiger cat")
    at_mask(12, mask), at_point(12, 80, 120)     a class of a segmentation network at some pixels

A plain function is one, too. :func:`xattn.backbone.scored.scored` makes a backbone of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from xattn.backbone.backbone import Backbone

P = Literal["value", "probability", "sigmoid"]
Reads = Literal["logits", "features", "pixels"]
SHAPES = {"logits": "logits (B, K)", "features": "features (B, C)", "pixels": "logits (B, K, h, w)"}
_TRIED = 3  # images of the batch that a function is tried on


@dataclass(frozen=True, eq=False)
class Target:
    """A number of the network's answer.

    Args:
        function: gets what ``reads`` says for a batch of B images, returns the numbers (B,). Gradients
            flow through it.
        name: for tables, packs and protocols; by default the function's own, and for a lambda one that is
            made of a hash of its outputs.
        p: what metrics and methods that mask the image take for the probability of a class:
            ``"value"``, the number itself, whatever its size; ``"probability"``, the number itself, which
            is promised to be in [0, 1]; or ``"sigmoid"`` of it.
        reads: ``"logits"`` (B, K); ``"features"`` (B, C), what the classifier reads; or ``"pixels"``, the
            logits (B, K, h, w) of a segmentation network.

    Raises:
        ValueError: ``function`` cannot be called, an empty name, an unknown ``p`` or ``reads``.
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
            raise ValueError("name: got an empty one; give a few words that say what the number is")
        for argument, given, choices in (("p", self.p, P), ("reads", self.reads, Reads)):
            if given not in get_args(choices):
                raise ValueError(
                    f"{argument}: got {given!r}; choose one of {', '.join(get_args(choices))}"
                )

    def of(self, backbone: Backbone) -> Target:
        """The target for this backbone; one that begins with a photo embeds it here."""
        return self

    def scores(self, outputs: Tensor) -> Tensor:
        """The numbers (B,) of ``outputs``, B images.

        Raises:
            ValueError: the function fails, or returns anything but B numbers.
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
                f"return one number an image, float ({count},), such as logits[:, 281]"
            )
        return found

    def digest(self, shape: tuple[int, ...], like: Tensor) -> str:
        """Eight hex digits of its outputs for fixed random numbers, shape ``(B, *shape)``."""
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn(_TRIED, *shape, generator=generator, device="cpu").to(like)
        with torch.no_grad():
            found = self.scores(outputs)
        text = " ".join(f"{v:.3e}" for v in found.double().tolist())
        return hashlib.sha256(f"{self.reads} {text}".encode()).hexdigest()[:8]

    @property
    def own_name(self) -> str | None:
        """``name``, or that of the function; None for a lambda."""
        if self.name is not None:
            return str(self.name).strip()
        name = getattr(self.function, "__name__", None)
        return None if name in (None, "<lambda>") else str(name)

    @property
    def _shown(self) -> str:
        return self.own_name or "the function"


def as_target(target: Any) -> Target:
    """A target from a function, or the target itself."""
    return target if isinstance(target, Target) else Target(target)


# ---------------------------------------------------------------------- segmentation


def at_mask(class_index: int, mask: Any, name: str | None = None, p: P = "value") -> Target:
    """Mean logit of a class over the pixels of a mask, for a segmentation network.

    Args:
        mask: (H, W), bool or weights of at least 0, over the model's input; brought to the size of the
            logits by the mean of each cell.
        name: by default such as ``"class 12 at a mask of 340 pixels"``.

    Raises:
        ValueError: a mask of another shape, without a pixel, or with negative or non-finite weights.
    """
    weights = torch.as_tensor(mask, device="cpu").detach()
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(
            f"mask: got shape {tuple(weights.shape)}; give (H, W), one mask over the model's input"
        )
    weights = weights.double()
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or not bool(weights.any()):
        raise ValueError(
            "mask: is empty, or has negative or non-finite weights; give a mask with a pixel or more, "
            "such as labels == 12"
        )
    pixels = int((weights > 0).sum())
    name = name or f"class {class_index} at a mask of {pixels} pixels"
    return Target(_AtMask(_checked_class(class_index), weights), name, p, "pixels")


def at_point(
    class_index: int, row: float, column: float, name: str | None = None, p: P = "value"
) -> Target:
    """Logit of a class at one point, for a segmentation network.

    Args:
        row, column: as shares of the model's input, from 0 (top, left) to 1 (bottom, right).

    Raises:
        ValueError: a point outside.
    """
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise ValueError(
            f"row, column: got {row}, {column}; give shares of the input's height and width, 0..1"
        )
    name = name or f"class {class_index} at ({row:g}, {column:g})"
    return Target(_AtPoint(_checked_class(class_index), row, column), name, p, "pixels")


def _checked_class(index: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"class_index: got {index!r}; give the number of a class, from 0")
    return index


def _class_of(logits: Tensor, index: int) -> Tensor:
    """(B, K, h, w) -> (B, h, w) of one class."""
    if index >= logits.shape[1]:
        raise ValueError(f"target: class {index} is out of range 0..{logits.shape[1] - 1}")
    return logits[:, index]


@dataclass(frozen=True, eq=False)
class _AtMask:
    index: int
    weights: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        size = (logits.shape[2], logits.shape[3])
        given = tuple(self.weights.shape)
        if abs(given[0] * size[1] - given[1] * size[0]) >= max(*given, *size):
            raise ValueError(
                f"mask: got {given} for logits of {size}; give a mask over the model's "
                f"input, of its aspect ratio"
            )
        weights = F.adaptive_avg_pool2d(self.weights[None, None], size)[0, 0].to(logits)
        return (_class_of(logits, self.index) * weights).sum((1, 2)) / weights.sum()


@dataclass(frozen=True, eq=False)
class _AtPoint:
    index: int
    row: float
    column: float

    def __call__(self, logits: Tensor) -> Tensor:
        height, width = logits.shape[2:]
        y, x = min(int(self.row * height), height - 1), min(int(self.column * width), width - 1)
        return _class_of(logits, self.index)[:, y, x]
