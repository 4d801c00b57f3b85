"""Attentive heads: pool tokens by attention, classify, and distribute every logit over the patches.

    A = softmax_t s,   y_q = sum_t A_qt v_qt,   logits = W norm(finish(y)) + b
    C_kt = sum_q A_qt (g_kq . v_qt),            logit_k = rest_k + sum_t C_kt   (exactly)

with scores s (B, Q, T) of Q queries and values v (B, Q or 1, T, V). g_k is row k of W pulled back
through ``norm`` and ``finish``, whose data-dependent gains (activations, deviations of norms) are held
constant. If ``finish`` is linear, rest_k is the classifier's bias (and the norm's), the same for every
image. T = P + N: a head that attends to prefix tokens puts them first, and their shares belong to rest;
maps show the N patches. With a ``mixer``, the tokens are its outputs. A head defines
:meth:`AttentiveHead.scores_and_values` and, unless it concatenates its queries,
:meth:`AttentiveHead.finish`. A :class:`Solvable` head computes its weights in closed form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.attended import AttentionTerms, Tokens, pool_by, softmax
from xattn.heads.base import Head, frozen_statistics
from xattn.heads.fusion import class_rows
from xattn.heads.mixer import Depth
from xattn.heads.pullback import Step
from xattn.heads.reliability import TINY, Balanced, ReliabilityBalancing, create_balancing
from xattn.runtime.option_checks import Count, Names, checked


class LabelledTokens(NamedTuple):
    """Labelled photos for a solver or for measurements. Each call of ``batches`` yields the tokens of
    all photos, in the order of ``labels`` (n,).
    """

    batches: Callable[[], Iterable[Tokens]]
    labels: Tensor


@runtime_checkable
class Solvable(Protocol):
    """A classifier with its own closed-form solver, which ``xattn probe`` calls."""

    def solve(self, train: LabelledTokens, validation: LabelledTokens) -> dict[str, Any]:
        """Set the weights from ``train``, and return facts for the head's config, some of them measured on
        ``validation``."""


CHUNK = 2**24  # largest number of entries of a tensor (B, classes, Q, tokens or channels) in memory


class SharedOptions(TypedDict, total=False):
    """Options of all attentive heads, see :class:`AttentiveHead`."""

    classes: int | None
    class_names: Sequence[str] | None
    norm: bool
    explain_with: Literal["scores", "mask", "attention"]
    reliability: dict[str, Any] | None
    mixer: str | None
    mixer_depth: int
    mixer_options: dict[str, Any] | None


class ClassMaps(NamedTuple):
    """``maps`` (B, M, h, w): each patch's share of a logit; ``rest`` (B, M): the part that comes from no
    patch.

    Example:
        >>> import torch
        >>> from xattn.heads import ClassMaps
        >>> maps = ClassMaps(maps=torch.ones(1, 2, 4), rest=torch.tensor([[0.5, -0.5]]))
        >>> maps.maps.sum(-1) + maps.rest  # the logits
        tensor([[4.5000, 3.5000]])
    """

    maps: Tensor
    rest: Tensor


class FeatureNorm(nn.BatchNorm1d):
    """BatchNorm without affine weights before the classifier, as in probing recipes."""

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False, eps=1e-6)

    def gain(self, z: Tensor) -> Tensor:
        """(Z,): the factor by which :meth:`forward` multiplies z (B, Z) after subtracting the mean."""
        variance = self.moments(z)[1] if self.training else self.running_var
        assert variance is not None
        return (variance + self.eps).rsqrt()

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (Z,) of a batch z (B, Z)."""
        return z.mean(0), z.var(0, unbiased=False)


class AttentiveHead(Head):
    """Base class of the heads that pool by attention, each of which is a classifier that explains itself.

    ``head(taps, class_index)`` returns the shares C as maps (B, M, h, w); :meth:`logits` classifies.

    Args:
        options: the head's own options, as passed to its constructor.
        pooled: width Z of the pooled vector.
        num_taps: how many of the backbone's last taps are read. ``reads_prefix``: whether the
            last layer's prefix tokens are read as well.
        classes: number of classes; by default the number of ``class_names``, or the backbone's.
        class_names: one unique name per class; only the backbone's own names may repeat.
        norm: whether to put a :class:`FeatureNorm` before the classifier.
        explain_with: the maps that the head shows: ``"scores"``, the shares; ``"mask"``, their sigmoid;
            or ``"attention"``, the mean of the query maps, which is the same for every class.
        reliability: options of :class:`~xattn.heads.reliability.ReliabilityBalancing`, such as
            ``{"anchors": 8}``, to correct the predictions; if None, they are not corrected.
        mixer: a mechanism of :func:`~xattn.attention.list_attention`, such as ``"gna"``, whose layers
            mix the last tap's tokens before the head reads them, see :mod:`xattn.heads.mixer`; if None,
            they are not mixed. With a mixer, maps hold the exact shares of the mixed tokens.
        mixer_depth: number of mixer layers.
        mixer_options: options of :func:`~xattn.attention.create_attention`, for example ``{"kernel": 7}``.

    Raises:
        ValueError: the last tap is a single token, or an option or the mixer does not fit.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("efficient_probe", net, class_names=["cat", "dog"])
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape  # one map per class
        (torch.Size([2, 2]), torch.Size([2, 2, 2, 2]))
    """

    is_classifier: ClassVar[bool] = True
    learns_scores: ClassVar[bool] = True  # False if weights are uniform or random
    gated: bool = False  # whether ``finish`` has gains that depend on the image
    permutes: ClassVar[bool] = (
        True  # whether permuted patches give permuted maps and the same logits
    )
    inert: tuple[str, ...] = ()  # published parameters that the softmax cancels

    @checked
    def __init__(
        self,
        backbone: Backbone,
        options: dict[str, Any],
        pooled: int,
        num_taps: int = 1,
        reads_prefix: bool = False,
        *,
        classes: Count | None = None,
        class_names: Names | None = None,
        norm: bool = True,
        explain_with: Literal["scores", "mask", "attention"] = "scores",
        reliability: dict[str, Any] | None = None,
        mixer: str | None = None,
        mixer_depth: Depth = 1,
        mixer_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, {**options, "explain_with": explain_with})
        if explain_with == "attention" and not self.learns_scores:
            raise ValueError(
                f"explain_with='attention': {self.name} does not learn its weights; choose 'scores'"
            )
        names = None if class_names is None else list(class_names)
        self.options.update(classes=classes, class_names=names, norm=norm)
        if reliability is not None:
            self.options["reliability"] = dict(reliability)
        if not 1 <= num_taps <= len(backbone.taps):
            raise ValueError(
                f"num_taps: got {num_taps}; {backbone.name} has {len(backbone.taps)} taps"
            )
        height, width = backbone.tap_sizes[-1]
        if height * width < 2:
            raise ValueError(
                f"taps: {backbone.taps[-1]!r} of {backbone.name} is {height} x {width}, which leaves "
                f"nothing to attend to; load the backbone with an earlier tap last (taps=['stage.-2']) "
                f"or a larger input_size"
            )
        self.num_taps, self.reads_prefix = num_taps, reads_prefix
        if mixer is not None and type(self).attend is not AttentiveHead.attend:
            raise ValueError(
                f"mixer: got {mixer!r}; {self.name} overrides attend and would skip the mixer; let it "
                f"define scores_and_values instead"
            )
        prefix = backbone.prefix_tokens if reads_prefix else 0
        self.add_mixer(backbone, mixer, mixer_depth, mixer_options, prefix)
        self.has_class_token = has_class_token(backbone)
        self.num_classes = _class_count(classes, names, backbone)
        self.class_names = names
        self.norm: FeatureNorm | None = FeatureNorm(pooled) if norm else None
        self.classifier = nn.Linear(pooled, self.num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.balancing: ReliabilityBalancing | None = None
        if reliability is not None:
            self.balancing = create_balancing(self.num_classes, pooled, reliability)
        self.trust = 1.0  # in the correction; training raises it from 0 to 1

    @staticmethod
    def default_taps(depth: int) -> tuple[str, ...]:
        """Default taps for a backbone of ``depth`` blocks or stages: the final tokens."""
        return ("head",)

    # ------------------------------------------------------------------ defined by each head

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        """Scores and values of ``tokens``, which the head's mixer has already mixed."""
        raise NotImplementedError

    def weights(self, scores: Tensor) -> Tensor:
        """The weights A (B, Q, T) of ``scores``: their softmax over the tokens, in float32 at least. A head
        may append rows without scores, for paths that bypass attention (residuals)."""
        return softmax(scores)

    def pool(self, attended: AttentionTerms) -> Tensor:
        """sum_t A_qt v_qt, (B, Q, V): by the core's op, or with the head's own :meth:`weights`."""
        if type(self).weights is AttentiveHead.weights:
            return attended.pool()
        return pool_by(self.weights(attended.scores), attended.values)

    def sources(self, weights: Tensor, attended: AttentionTerms) -> tuple[Tensor, Tensor]:
        """The weights (B, Q, T) and values (B, G, T, V) from which maps are computed. If the head mixes the
        patches before pooling, these weights and values differ from those used in pooling, but their
        products have the same sum."""
        return weights, attended.values

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        """The vector z (B, Z) computed from ``pooled`` (B, Q, V), by default by concatenating the queries,
        and its pullback: a function from rows (B or 1, M, Z) over z to rows (B or 1, M, Q, V) over
        ``pooled``."""
        shape = pooled.shape[1:]
        return pooled.flatten(1), lambda rows: rows.unflatten(-1, shape)

    def reference_shares(self, rows: Tensor, attended: AttentionTerms) -> Tensor:
        """The reference from which every patch's share is measured, (B or 1, M): the share of an
        uninformative patch, given the pulled-back ``rows`` (B or 1, M, Q, V). Maps show the difference from
        this reference, which is 0 by default."""
        return rows.new_zeros(1, rows.shape[1])

    # ------------------------------------------------------------------ shared by all heads

    def attend(self, tokens: Tokens) -> AttentionTerms:
        """Scores and values of ``tokens``."""
        return self.scores_and_values(self.mixed_tokens(tokens))

    def mixed_tokens(self, tokens: Tokens) -> Tokens:
        """``tokens`` after the head's mixer has processed the last tap; prefix tokens are mixed with the
        patches if the head reads them."""
        if self.mixer is None:
            return tokens
        patches = tokens.patches[-1]
        prefix = tokens.prefix if self.reads_prefix else tokens.prefix[:, :0]
        count = prefix.shape[1]
        x = self.mixer(torch.cat([prefix.to(patches.dtype), patches], 1), tokens.grid, count)
        kept = x[:, :count] if self.reads_prefix else tokens.prefix
        return Tokens((*tokens.patches[:-1], x[:, count:]), kept, tokens.grid)

    def class_token(self, tokens: Tokens) -> Tensor | None:
        """The class token (B, C) of the last layer; None if the backbone has none."""
        return tokens.prefix[:, 0] if self.has_class_token else None

    def tokens(self, taps: Taps) -> Tokens:
        """The tokens of the last ``num_taps`` taps; grids that differ from the last tap's are resampled to
        it by averaging.
        """
        maps = taps.maps[-self.num_taps :]
        patches = patches_of(maps)
        prefix = patches[-1][:, :0] if taps.prefix is None else taps.prefix
        return Tokens(patches, prefix, (int(maps[-1].shape[2]), int(maps[-1].shape[3])))

    def logits(self, tokens: Tokens, scores: Tensor | None = None) -> Tensor:
        """(B, K) logits; ``scores`` (B, Q, T) replace the head's own."""
        attended = self.attend(tokens)
        return self.classify(attended if scores is None else attended.with_scores(scores))

    def pooled(self, attended: AttentionTerms) -> Tensor:
        """The vector (B, Z) before norm and classifier."""
        return self.finish(self.pool(attended), attended)[0]

    def embed(self, attended: AttentionTerms) -> Tensor:
        """The input of the classifier (B, Z): the pooled vector, normalised."""
        z = self.pooled(attended)
        return z if self.norm is None else self.norm(z)

    def classify(self, attended: AttentionTerms) -> Tensor:
        """(B, K) logits from the result of :meth:`attend`, possibly with perturbed scores."""
        return self.classifier(self.embed(attended))

    def predict(self, attended: AttentionTerms) -> Tensor:
        """Values (B, K) whose softmax is the head's prediction: the logits or, with ``reliability``, the
        logarithm of the balanced probabilities. Class maps always distribute the logits.
        """
        if self.balancing is None:
            return self.classify(attended)
        return self.balance(attended).probabilities.clamp_min(TINY).log()

    def balance(self, attended: AttentionTerms) -> Balanced:
        """The balanced probabilities, their reliability, and the distributions used for the correction.

        Raises:
            ValueError: the head has no anchors.
        """
        e = self.embed(attended)
        return self._anchored().forward(e, self.classifier(e), self.trust)

    def anchor_loss(self, attended: AttentionTerms, target: Tensor) -> Tensor:
        """The sum of the anchors' two losses, a scalar, for labels (B,)."""
        balancing, e = self._anchored(), self.embed(attended)
        return balancing.anchor_loss() + balancing.center_loss(e, self.classifier(e), target)

    def _anchored(self) -> ReliabilityBalancing:
        if self.balancing is None:
            raise ValueError(
                f"reliability: {self.name} has no anchors; create it with "
                f"reliability={{'anchors': 8}} and train it"
            )
        return self.balancing

    def class_maps(self, tokens: Tokens, class_index: Tensor | int | None = None) -> ClassMaps:
        """Each patch's share of the logits of some classes, see :class:`ClassMaps`. This never updates
        running statistics, even in training mode; only a call of the head updates them.

        Args:
            class_index: as for :class:`~xattn.heads.Head`.
        """
        with frozen_statistics(self):
            return self._share_out(tokens, class_index)

    def _share_out(self, tokens: Tokens, class_index: Tensor | int | None) -> ClassMaps:
        attended = self.attend(tokens)
        weights = self.weights(attended.scores)
        z, pull = self.finish(pool_by(weights, attended.values), attended)
        index = class_rows(class_index, self.num_classes, z.shape[0])
        rows = self.classifier.weight[None]
        normed = z if self.norm is None else self.norm(z)
        logits = self.classifier(normed)
        if index is not None:
            index = index.to(z.device)
            rows = self.classifier.weight[index]
            logits = logits.gather(1, index.expand(z.shape[0], -1))
        if self.norm is not None:
            rows = rows * self.norm.gain(z)
        weights, values = self.sources(weights, attended)
        batch, queries, count = weights.shape
        size = rows.shape[1]
        if not torch.compiler.is_compiling():  # a graph has no fixed batch size and needs no chunks
            size = max(1, CHUNK // (batch * queries * max(count, values.shape[-1])))
        parts = [rows] if rows.shape[1] <= size else rows.split(size, 1)
        shares = torch.cat(
            [
                _shares(own, weights, values) - self.reference_shares(own, attended)[..., None]
                for own in map(pull, parts)
            ],
            1,
        )
        patches = shares[..., count - tokens.grid[0] * tokens.grid[1] :]
        return ClassMaps(patches.unflatten(-1, tokens.grid), logits - patches.sum(-1))

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        return self._share_out(self.tokens(taps), class_index).maps

    def query_maps(self, tokens: Tokens) -> Tensor:
        """The patches' weights as maps (B, Q, h, w); if there are prefix tokens, a map sums to less than
        1."""
        with frozen_statistics(self):
            attended = self.attend(tokens)
        weights, _ = self.sources(self.weights(attended.scores), attended)
        weights = weights[:, : attended.scores.shape[1]]
        return weights[..., weights.shape[-1] - tokens.grid[0] * tokens.grid[1] :].unflatten(
            -1, tokens.grid
        )

    def explanation(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        if self.explain_with != "attention":
            return super().explanation(taps, class_index)
        tokens = self.tokens(taps)
        index = class_rows(class_index, self.num_classes, tokens.prefix.shape[0])
        count = self.num_classes if index is None else index.shape[1]
        return self.query_maps(tokens).mean(1, keepdim=True).expand(-1, count, -1, -1)


def patches_of(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Maps (B, C_i, h_i, w_i) as tokens (B, N, C_i); grids that differ from the last one are resampled to
    it by averaging.
    """
    grid = (int(maps[-1].shape[2]), int(maps[-1].shape[3]))
    return tuple(
        (m if m.shape[2:] == maps[-1].shape[2:] else F.adaptive_avg_pool2d(m, grid))
        .flatten(2)
        .transpose(1, 2)
        for m in maps
    )


def prefixed(tokens: Tokens) -> Tensor:
    """(B, P + N, C): the prefix tokens, then the patches of the last tap."""
    return torch.cat([tokens.prefix.to(tokens.patches[-1].dtype), tokens.patches[-1]], 1)


def overlap(query_maps: Tensor) -> Tensor:
    """(B,): mean cosine similarity over pairs of maps (B, Q, h, w): 1 if all are the same, low if the
    queries look at different places. NaN for a single query.

    Example:
        >>> import torch
        >>> from xattn.heads import overlap
        >>> one = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> same, other = torch.stack([one, one])[None], torch.stack([one, one.roll(1)])[None]
        >>> overlap(same), overlap(other)
        (tensor([1.]), tensor([0.]))
    """
    unit = F.normalize(query_maps.flatten(2), dim=-1)
    count = unit.shape[1]
    if count == 1:
        return unit.new_full((unit.shape[0],), torch.nan)
    return ((unit @ unit.transpose(1, 2)).sum((1, 2)) - count) / (count * (count - 1))


def _shares(rows: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """sum_q A_qt (g_kq . v_qt): rows (B or 1, M, Q, V) -> (B, M, T)."""
    groups = values.shape[1]
    if groups == 1:  # one product for all queries
        flat = rows.flatten(1, 2) @ values[:, 0].transpose(1, 2)
        products = flat.unflatten(1, rows.shape[1:3])  # (B, M, Q, T)
    else:
        grouped = rows.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)  # (B, G, M Q/G, V)
        flat = grouped @ values.transpose(2, 3)
        products = flat.unflatten(2, (rows.shape[1], -1)).transpose(1, 2).flatten(2, 3)
    return (products * weights[:, None]).sum(2)


def has_class_token(backbone: Backbone) -> bool:
    """Whether the first prefix token is a class token; it may be a register."""
    model = backbone.model
    own = getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)
    return bool(own) and backbone.prefix_tokens > 0


def _class_count(classes: int | None, names: list[str] | None, backbone: Backbone) -> int:
    if names is None:
        return classes or backbone.num_classes
    count = len(names) if classes is None else classes
    if len(names) != count:
        raise ValueError(
            f"class_names: got {len(names)} names for {count} classes; give one per class"
        )
    for index, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"class_names: got {name!r} for class {index}; give it a name")
    if len(set(names)) < count and names != list(backbone.class_names):
        twice = next(name for name, n in Counter(names).items() if n > 1)
        raise ValueError(f"class_names: got {twice!r} twice; give every class a name of its own")
    return count
