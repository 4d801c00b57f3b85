"""Attention AT, iAT, VAT and iVAT: adversarial training on the attention scores of a head.

    AT    g = dL(s + r)/dr at r = 0,            r = eps g / |g|                      arXiv 2009.12064
    iAT   r_t = alpha_t . D_t, D_t = (s_t - s_k)_k / norm: the same in alpha         arXiv 2009.12064
    VAT   d <- dKL(p(s) | p(s + r))/dr at r = xi d / |d|, repeated,  r = eps d / |d| arXiv 2104.08763
    iVAT  the same in alpha
    released iAT   -1 times the r of AT, as computed by the authors' program
    loss  L(s) + weight L(s + r)   (AT, both iAT, random),   L(s) + weight KL(p(s) | p(s + r))   (VAT, iVAT)

s (B, Q, T) are the scores before the softmax. The norm |.| is taken over the tokens, so each query of each
example has its own change r of norm eps; r is treated as a constant in the loss. Only the part of alpha_t
along D_t changes r, so iAT never has to compute the T x T differences: with m_t = |D_t|, alpha_t = a_t D_t
/ m_t gives r = m a, dL/da = m g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.heads.attended import AttentionTerms
from xattn.heads.attentive import AttentiveHead
from xattn.heads.base import frozen_statistics
from xattn.kernels.softmax.reference import widen
from xattn.registry import Registry, Table, make_adopter, with_checked_name
from xattn.runtime.option_checks import Count, Positive

LossFn: TypeAlias = Callable[[Tensor], Tensor]

UNLABELLED = -100
SCALE = 2.0**7


class _Clean(NamedTuple):
    """The clean pass of :meth:`Perturbation.loss`; ``clean`` (B,) are the losses at s."""

    scores: Tensor
    valid: Tensor
    predict: LossFn
    logits: Tensor
    clean: Tensor | None
    target: Tensor | None


def masked_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the softmax over the positions of the last axis where ``mask`` is true and scores are above
    -inf; it is 0 elsewhere.

    A row without any such position is 0 everywhere, and its gradient is 0, too.
    """
    valid = _valid(scores, mask)
    weights = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~valid, 0.0)


class Perturbation:
    """Base class of the methods that compute a change r of the attention scores and the loss of training
    with it.

    Args:
        epsilon: norm of r over the tokens, for each example and query.
        weight: factor of the loss at s + r, which is added to the clean loss.
        seed: random numbers are a function of the seed and of ``step``, which increases by 1 with each call
            of :meth:`loss`; a resumed run sets ``step``. They are drawn for the whole batch. If several
            processes share a batch, each sets ``examples`` to its own rows and the size of the whole batch.
    """

    name: ClassVar[str]
    examples: tuple[Sequence[int], int] | None = None

    def __init__(self, epsilon: Positive, weight: float = 1.0, seed: int = 0) -> None:
        self.epsilon, self.weight, self.seed, self.step = epsilon, weight, seed, 0

    def perturbation(self, scores: Tensor, loss_fn: LossFn, mask: Tensor | None = None) -> Tensor:
        """Compute r, in the shape of ``scores``, detached, in float32 or wider.

        Args:
            scores: (B, Q, T) or (B, T), before the softmax; -inf masks a position.
            loss_fn: a function from scores to losses (B,), or to their sum. AT and iAT increase this loss;
                for VAT and iVAT it is the divergence from the prediction at ``scores``, see
                :func:`divergence`.
            mask: (B, T), true at real tokens. At masked tokens r is exactly 0.
        """
        raise NotImplementedError

    def loss(
        self,
        scores: Tensor,
        predict: LossFn,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        module: nn.Module | None = None,
    ) -> Tensor:
        """Compute the training loss of a batch, a mean over its examples.

        Args:
            scores: as for :meth:`perturbation`, with the autograd graph that computed them.
            predict: a function from scores to logits (B, K). The function is called on s and on s + r, and
                for VAT also in each iteration, with the same dropout each time; the scores themselves are
                computed only once.
            target: class indices (B,), or -100 for an unlabelled example. VAT and iVAT also accept None.
            module: the module whose BatchNorm layers ``predict`` runs; if it is given, only the clean pass
                updates their running statistics.
        """
        valid = _valid(scores, mask)
        wide = widen(scores)
        if not wide.requires_grad:
            wide = wide.detach().requires_grad_()
        again = _replaying(predict, wide.device)
        logits = predict(wide)
        again = again if module is None else frozen_statistics(module)(again)
        clean = None if target is None else _cross_entropy(logits, target)
        extra = self._extra(_Clean(wide, valid, again, logits, clean, target))
        self.step += 1
        total = self.weight * extra
        return total if target is None or clean is None else _mean(clean, target) + total

    def _extra(self, done: _Clean) -> Tensor:
        """The loss at s + r, before its weight."""
        raise NotImplementedError

    def _noise(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Random unit vectors, drawn on the CPU so that they are the same for every device."""
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + self.step) % 2**64)
        rows, count = self.examples or (range(len(scores)), len(scores))
        shape = (count, *scores.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=scores.dtype, device="cpu")[
            list(rows)
        ]
        return _unit(noise.to(scores.device).masked_fill(~valid, 0.0))

    def _stretch(self, scores: Tensor, valid: Tensor) -> Tensor:
        """m in r = m a, where the gradient is taken with respect to a."""
        return scores.new_ones(())

    def _sized(self, r: Tensor) -> Tensor:
        return self.epsilon * _unit(r)


@dataclass(frozen=True)
class PerturbationEntry:
    """The registry's entry for a method that perturbs the scores."""

    name: str


def register_perturbation(name: str) -> Callable[[type[Perturbation]], type[Perturbation]]:
    """Register a method for :func:`create_perturbation` under ``name``; this is a class decorator."""
    return METHODS.register(PerturbationEntry(name))


METHODS: Registry[Perturbation, PerturbationEntry] = Registry(
    "xattn.perturbations",
    argument="attention training",
    ordered=True,
    adopt=make_adopter(Perturbation, register_perturbation),
    mark=with_checked_name,
)
PERTURBATIONS: Table[type[Perturbation]] = METHODS.classes()
"""The methods by their names."""


@register_perturbation("none")
class NoPerturbation(Perturbation):
    """No perturbation; the loss is the clean loss."""

    def __init__(self, epsilon: float = 0.0, weight: float = 0.0, seed: int = 0) -> None:
        self.epsilon, self.weight, self.seed, self.step = epsilon, weight, seed, 0

    def perturbation(self, scores: Tensor, loss_fn: LossFn, mask: Tensor | None = None) -> Tensor:
        return torch.zeros_like(widen(scores.detach()))

    def _extra(self, done: _Clean) -> Tensor:
        return done.scores.new_zeros(())


@register_perturbation("at")
class AttentionAT(Perturbation):
    """Change the scores in the direction that increases the loss most, to first order."""

    def perturbation(self, scores: Tensor, loss_fn: LossFn, mask: Tensor | None = None) -> Tensor:
        leaf = widen(scores).detach().requires_grad_()
        with torch.enable_grad():
            gradient = _gradient(loss_fn(leaf), leaf)
        return self._along(gradient, leaf.detach(), _valid(scores, mask))

    def _along(self, gradient: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        stretch = self._stretch(scores, valid)
        return self._sized(stretch * _unit(stretch * gradient.masked_fill(~valid, 0.0)))

    def _extra(self, done: _Clean) -> Tensor:
        assert done.clean is not None and done.target is not None
        # The clean pass is differentiated twice: here w.r.t. the scores, later w.r.t. the parameters.
        gradient = _gradient(done.clean, done.scores, retain_graph=True)
        r = self._along(gradient, done.scores.detach(), done.valid)
        return _mean(_cross_entropy(done.predict(done.scores + r), done.target), done.target)


@register_perturbation("random")
class RandomPerturbation(Perturbation):
    """Change the scores in a random direction, as a control for AT."""

    def perturbation(self, scores: Tensor, loss_fn: LossFn, mask: Tensor | None = None) -> Tensor:
        return self._sized(self._noise(widen(scores.detach()), _valid(scores, mask)))

    def _extra(self, done: _Clean) -> Tensor:
        assert done.target is not None
        r = self._sized(self._noise(done.scores.detach(), done.valid))
        return _mean(_cross_entropy(done.predict(done.scores + r), done.target), done.target)


@register_perturbation("vat")
class AttentionVAT(Perturbation):
    """Change the scores in the direction that affects the prediction most; no labels are used.

    Args:
        xi: length of the step at which the divergence is differentiated (at 0 its gradient vanishes).
        iterations: number of iterations of the power method.
    """

    def __init__(
        self,
        epsilon: Positive,
        weight: float = 1.0,
        seed: int = 0,
        xi: Positive = 0.1,
        iterations: Count = 1,
    ) -> None:
        super().__init__(epsilon, weight, seed)
        self.xi, self.iterations = xi, iterations

    def perturbation(self, scores: Tensor, loss_fn: LossFn, mask: Tensor | None = None) -> Tensor:
        valid = _valid(scores, mask)
        scores = widen(scores.detach())
        stretch = self._stretch(scores, valid)
        a = self._noise(scores, valid)
        for _ in range(self.iterations):
            step = (self.xi * _unit(stretch * a)).requires_grad_()
            with torch.enable_grad():
                gradient = _gradient(loss_fn(scores + step), step)
            a = _unit(stretch * gradient.masked_fill(~valid, 0.0))
        return self._sized(stretch * a)

    def _extra(self, done: _Clean) -> Tensor:
        def moved(scores: Tensor) -> Tensor:
            return divergence(done.logits, done.predict(scores))

        r = self.perturbation(done.scores, moved, done.valid)
        return moved(done.scores + r).mean()


class _Differences(Perturbation):
    """The stretch of iAT and iVAT: m_t = |D_t|, normalised by the matrix or by its rows."""

    norm: str = "matrix"
    rescale: bool = True

    def _stretch(self, scores: Tensor, valid: Tensor) -> Tensor:
        if self.norm == "released":
            return super()._stretch(scores, valid)
        # |D_t|^2 = n c_t^2 + C with c_t = s_t - mean(s), C = sum_k c_k^2; over all t it is 2 n C.
        count = valid.sum(-1, keepdim=True).clamp_min(1)
        filled = scores.masked_fill(~valid, 0.0)
        centred = (filled - filled.sum(-1, keepdim=True) / count).masked_fill(~valid, 0.0)
        spread = centred.square().sum(-1, keepdim=True)
        if self.norm == "row":
            return (spread > 0).to(scores.dtype).expand_as(scores)
        total = (2 * count * spread).clamp_min(torch.finfo(scores.dtype).tiny)
        return ((count * centred.square() + spread) / total).sqrt()

    def _sized(self, r: Tensor) -> Tensor:
        return super()._sized(r) if self.rescale else self.epsilon * r


@register_perturbation("iat")
class AttentionIAT(_Differences, AttentionAT):
    """AT applied to the weights alpha of the differences between an example's scores, instead of to the
    scores.

    Args:
        norm: ``"matrix"`` divides all differences by |D|, so that r is larger where a score stands out.
            ``"row"`` divides each D_t by its own norm, which gives AT's r wherever scores differ.
            ``"released"`` computes what the authors' program computes, which is -1 times AT's r: the
            program takes differences between sentences, which cancel in the gradient with respect to r,
            and reverses the sign.
        rescale: whether r is scaled to norm epsilon, for comparison with AT; otherwise alpha has that
            norm, as in the paper.
    """

    def __init__(
        self,
        epsilon: Positive,
        weight: float = 1.0,
        seed: int = 0,
        norm: Literal["matrix", "row", "released"] = "matrix",
        rescale: bool = True,
    ) -> None:
        super().__init__(epsilon, weight, seed)
        self.norm, self.rescale = norm, rescale

    def _sized(self, r: Tensor) -> Tensor:
        return super()._sized(-r if self.norm == "released" else r)


@register_perturbation("iat_released")
class AttentionIATReleased(AttentionIAT):
    """iAT as the authors' program computes it: :class:`AttentionIAT` with ``norm="released"``.

    The authors' training step also adds the gradient of the clean loss twice, which has the same effect as
    ``weight=0.5`` at twice the learning rate.
    """

    def __init__(self, epsilon: Positive, weight: float = 1.0, seed: int = 0) -> None:
        super().__init__(epsilon, weight, seed, norm="released")


@register_perturbation("ivat")
class AttentionIVAT(_Differences, AttentionVAT):
    """VAT with respect to the weights alpha of :class:`AttentionIAT`, with its ``rescale`` and ``norm``
    (``"matrix"`` or ``"row"``)."""

    def __init__(
        self,
        epsilon: Positive,
        weight: float = 1.0,
        seed: int = 0,
        xi: Positive = 0.1,
        iterations: Count = 1,
        norm: Literal["matrix", "row"] = "matrix",
        rescale: bool = True,
    ) -> None:
        super().__init__(epsilon, weight, seed, xi, iterations)
        self.norm, self.rescale = norm, rescale


def create_perturbation(name: str, **options: Any) -> Perturbation:
    """Create the method ``name`` of :data:`PERTURBATIONS` with its ``epsilon`` and other options.

    Raises:
        ValueError: the name is unknown, or the method does not take an option.
    """
    try:
        return METHODS.create(name, **options)
    except TypeError as error:
        raise ValueError(
            f"attention training: {name} does not take {options} ({error}); give only options of "
            "this method"
        ) from error


def head_loss(
    perturbation: Perturbation, head: AttentiveHead, attended: AttentionTerms, target: Tensor
) -> Tensor:
    """Compute :meth:`Perturbation.loss` for a head's predictions and labels (B,).

    The head's scores s are computed once for all passes and replaced by s + r; without a perturbation,
    they are not taken out of the pooling operation.
    """
    if isinstance(perturbation, NoPerturbation):
        perturbation.step += 1
        return _mean(_cross_entropy(head.predict(attended), target), target)
    return perturbation.loss(
        attended.scores,
        lambda scores: head.predict(attended.with_scores(scores)),
        target,
        module=head,
    )


def divergence(clean: Tensor, changed: Tensor) -> Tensor:
    """Compute KL(p | q) (B,), where p is the softmax of the logits ``clean``, treated as a constant, and q
    that of ``changed`` (B, K)."""
    p, q = (F.log_softmax(widen(logits), -1) for logits in (clean.detach(), changed))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(widen(logits), target, reduction="none", ignore_index=UNLABELLED)


def _mean(losses: Tensor, target: Tensor) -> Tensor:
    """Mean over the labelled examples; the losses of the others are 0."""
    return losses.sum() / (target != UNLABELLED).sum().clamp_min(1)


def _gradient(loss: Tensor, at: Tensor, retain_graph: bool = False) -> Tensor:
    """dL/d(at) up to a positive factor, because only directions count.

    The factor keeps small gradients in the range of half precision. It is the same for all examples in all
    processes: BatchNorm may couple them, and different factors would then change the directions.
    """
    loss = SCALE * loss.sum()
    return torch.autograd.grad(loss, at, retain_graph=retain_graph)[0]


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, 0 where x is 0; squares neither underflow nor overflow."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp_min(tiny)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(tiny)


def _valid(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Where the scores (B, Q, T) or (B, T) are real; ``mask`` is (B, T), or has their shape."""
    valid = scores.detach() > -torch.inf
    if mask is None:
        return valid
    return valid & (mask if mask.shape == scores.shape else mask[:, None])


def _replaying(predict: LossFn, device: torch.device) -> LossFn:
    """``predict`` with the random numbers, such as dropout's, that it would draw now.

    Two passes then differ only in their scores. With different dropout, KL(p(s) | p(s)) would not be 0.
    """
    state = torch.get_rng_state()
    cuda = [device] if device.type == "cuda" else []
    states = [torch.cuda.get_rng_state(d) for d in cuda]

    def run(scores: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=cuda):
            torch.set_rng_state(state)
            for d, cuda_state in zip(cuda, states, strict=True):
                torch.cuda.set_rng_state(cuda_state, d)
            return predict(scores)

    return run
