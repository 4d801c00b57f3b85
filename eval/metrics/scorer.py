"""Scores all perturbed images in micro-batches of one size, with bounded memory, and no image twice.

Every forward pass has exactly ``max_forward_batch`` images. At a different batch size, a network may return
slightly different bits, so that "q > p" could hold for identical images. This cannot happen if all passes
have the same shape. If the size is a multiple of 4, the position of an image in the micro-batch does not
matter either. (At other sizes, matrix products treat the last rows differently: at 6, lite0's logits move
by 1e-7.) If memory runs out, the passes continue at half the size (:mod:`xattn.runtime.memory`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.eval.interfaces import ScoredModel
from xattn.runtime.memory import ForwardBatches

# Smallest batch; masked copies of a single photo fill it, and larger ones are hardly faster.
LEAST = 8


def micro_batch(max_forward_batch: int, images: int | None) -> int:
    """Return the batch size of a run's passes: ``max_forward_batch``, or less if there are fewer images.

    It is a multiple of 4 and at least ``LEAST``, and depends only on the run's arguments, so that resumed
    runs and all processes of a run use the same size. ``images`` is None if their number is unknown.

    >>> [micro_batch(32, n) for n in (1, 8, 9, 30, 31, 1000, None)]
    [8, 8, 12, 32, 32, 32, 32]
    """
    if images is None:
        return max_forward_batch
    return min(max_forward_batch, max(LEAST, -(-images // 4) * 4))


@dataclass(eq=False, slots=True)
class PendingScore:
    """A score that has been requested; ``done`` is True once its micro-batch has run."""

    target: int
    score: float = float("nan")
    done: bool = False
    hit: bool = False


class CleanScores(NamedTuple):
    """The ``classes`` (b,) of b clean images, their scores p (b,), and all scores and logits (b, K)."""

    p: Tensor
    classes: Tensor
    scores: Tensor
    logits: Tensor


class MaskedScorer:
    """Scores a fixed class on many perturbed images, with micro-batches of a single shape.

    ``submit`` returns a :class:`PendingScore` at once. This score becomes available when the micro-batch is
    full, or after ``flush``, which pads the last micro-batch. At most ``max_forward_batch`` perturbed
    images are in memory.

    Args:
        score: ``"logit"``, or any other name for what ``backbone.probabilities`` returns.
        precision: ``"float32"``, or ``"bfloat16"`` for passes under autocast.

    Attributes:
        requested: number of scores requested.
        scored: number of images that went through the backbone, including clean images but not padding.
        batches: number of forward passes of ``max_forward_batch`` images.

    Example:
        >>> import torch, xattn
        >>> from xattn.eval import MaskedScorer
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> scorer = MaskedScorer(net, max_forward_batch=8)
        >>> scorer.max_forward_batch
        8
    """

    def __init__(
        self,
        backbone: ScoredModel,
        max_forward_batch: int = 32,
        score: str = "probability",
        precision: str = "float32",
    ) -> None:
        self.score, self.precision = score, precision
        self._batches = ForwardBatches(max_forward_batch)
        self.backbone = backbone
        self.max_forward_batch = max_forward_batch
        self.requested = self.scored = self.batches = 0
        self._buffer: Tensor | None = None
        self._waiting: list[list[PendingScore]] = []
        self._slots: dict[bytes, int] = {}
        self._known: dict[tuple[bytes, int, bool], PendingScore] = {}
        self._weights: Tensor | None = None

    def clean(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score unmasked images (b, 3, H, W), b <= max_forward_batch; return scores (b,) float64 and
        classes (b,).

        Without ``targets``, the predicted classes are scored. Later requests for an image that equals a
        clean image get the same score.
        """
        return self.clean_classes(images, targets)[:2]

    @torch.no_grad()
    def clean_classes(self, images: Tensor, targets: Tensor | None = None) -> CleanScores:
        """Do the same as :meth:`clean`, and also return the scores and logits (b, K) of all classes."""
        every = self._logits(pad_batch(images, self.max_forward_batch))[: len(images)]
        scores = self._scores(every)
        self.scored += len(images)
        classes = scores.argmax(1) if targets is None else targets.cpu()
        p = scores.gather(1, classes[:, None])[:, 0]
        hits = (scores.argmax(1) == classes).tolist()
        for image, target, value, hit in zip(
            images, classes.tolist(), p.tolist(), hits, strict=True
        ):
            digest = self._digest(image)
            self._known[digest, target, False] = PendingScore(target, value, done=True)
            self._known[digest, target, True] = PendingScore(
                target, float(hit), done=True, hit=True
            )
        return CleanScores(p, classes, scores, every.double())

    @torch.no_grad()
    def score_logits(
        self, inputs: Tensor, function: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Compute the logits (n, K) float64 of inputs (n, ...), n <= max_forward_batch.

        The inputs are images, or the arguments of ``function``. The pass is padded to the next multiple of
        4, so that equal inputs have equal logits.
        """
        self.scored += len(inputs)
        return self._logits(pad_batch(inputs, -(-len(inputs) // 4) * 4), function)[
            : len(inputs)
        ].double()

    def submit(
        self, perturbed: Tensor, target: int, shared: bool = True, hit: bool = False
    ) -> PendingScore:
        """Request the score of ``target`` on one perturbed image (3, H, W), which is copied.

        If ``shared``, look for an identical earlier image by a hash of its pixels. If ``hit``, the
        requested number is not the score, but 1 if the class has the highest score, else 0.
        """
        self.requested += 1
        if not shared:
            ticket = PendingScore(target, hit=hit)
            place = self._place(perturbed)  # this may run pending images and start a new list
            self._waiting[place].append(ticket)
            return ticket
        digest = self._digest(perturbed)
        known = self._known.get((digest, target, hit))
        if known is not None:
            return known
        ticket = self._known[digest, target, hit] = PendingScore(target, hit=hit)
        slot = self._slots.get(digest)
        if slot is None:
            slot = self._place(perturbed)
            self._slots[digest] = slot
        self._waiting[slot].append(ticket)
        return ticket

    def flush(self) -> None:
        """Run all pending images, padded to the fixed shape."""
        if self._waiting:
            self._run()

    def forget(self) -> None:
        """Forget earlier images, so that memory use stays constant. Pending scores stay valid."""
        self._known.clear()

    # ------------------------------------------------------------------ micro-batches

    def _place(self, perturbed: Tensor) -> int:
        if len(self._waiting) == self.max_forward_batch:
            self._run()
        if self._buffer is None or self._buffer.shape[1:] != perturbed.shape:
            self.flush()
            self._buffer = perturbed.new_zeros(self.max_forward_batch, *perturbed.shape)
        self._buffer[len(self._waiting)] = perturbed
        self._waiting.append([])
        return len(self._waiting) - 1

    @torch.no_grad()
    def _run(self) -> None:
        assert self._buffer is not None
        scores = self._forward(self._buffer)
        self.scored += len(self._waiting)
        for row, tickets in zip(scores, self._waiting, strict=False):
            for ticket in tickets:
                found = row.argmax() == ticket.target if ticket.hit else row[ticket.target]
                ticket.score, ticket.done = float(found), True
        self._waiting = []
        self._slots.clear()

    def _forward(self, images: Tensor) -> Tensor:
        """Compute (max_forward_batch, K) scores, float64 on CPU, of (max_forward_batch, 3, H, W) images."""
        return self._scores(self._logits(images))

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.double() if self.score == "logit" else self.backbone.probabilities(logits)

    def _logits(self, inputs: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Compute the logits (n, K), float32 on CPU."""
        with torch.autocast(
            inputs.device.type, torch.bfloat16, enabled=self.precision != "float32"
        ):
            parts = self._batches.run(function or self.backbone.logits, inputs)
        self.batches += len(parts)
        return torch.cat([part.float().cpu() for part in parts])

    def _digest(self, image: Tensor) -> bytes:
        """Hash the pixels to 128 bits with two multilinear hashes mod 2^64, on the image's device."""
        pixels = image.detach().float().contiguous().view(-1)
        words = (pixels if len(pixels) % 2 == 0 else F.pad(pixels, (0, 1))).view(torch.int64)
        words = words ^ (words >> 32)  # a change of only the highest bit must affect lower bits
        if self._weights is None or self._weights.shape[1] != len(words):
            generator = torch.Generator().manual_seed(0x5EED)
            weights = torch.randint(
                -(2**63), 2**63 - 1, (2, len(words)), generator=generator, device="cpu"
            )
            self._weights = weights.to(words.device)
        return (self._weights * words).sum(1).cpu().numpy().tobytes()


def pad_batch(images: Tensor, size: int) -> Tensor:
    """Pad (b, ...) to (size, ...) by repeating the last entry."""
    if not 0 < len(images) <= size:
        raise ValueError(f"images: got {len(images)}; give 1 to {size} per micro-batch")
    if len(images) == size:
        return images
    return torch.cat([images, images[-1:].expand(size - len(images), *images.shape[1:])])
