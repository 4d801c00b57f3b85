"""Random-feature attention as a probe (NeurIPS 2023, arXiv 2307.11353): random, frozen heads and a ridge
regression.

    logit_k = b_k + sum_m 1/N sum_i relu(x~_0^T W_m x~_i) <v_km, x~_i>,    x~ = [x; 1]

W_m of each of M heads is random and stays fixed; the v_km solve a ridge regression in closed form, see
:meth:`RandomFeature.solve`. A logit is therefore a sum over patches. Maps show how much more a patch adds
than the mean patch does: logit_k = f_k(query, mean patch) + sum_i C_ki.

W_m has independent entries of variance 1/4 (RFA); in BRFA W_0 = [I 0; 0 0] is added, so that a head starts
from the product <x_0, x_i>. As M grows, the kernel of RFA becomes the arc-cosine kernel (Cho and Saul
2009). Patches x and queries x_0 are centred, reduced and scaled by :class:`TokenScale`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Queries, Tokens, pool_by
from xattn.heads.attentive import AttentiveHead, LabelledTokens, SharedOptions
from xattn.heads.base import register_head
from xattn.runtime.option_checks import Count, NotNegative

ALIKE = 1e-10  # a variance below this share of the mean square is rounding


class TokenScale(nn.Module):
    """Centring, reduction to D dimensions, and scaling of patches and queries (..., C).

        x = V^T (u - mean u) / s,   x_0 = V^T (u_0 - mean u_0) / s_0,   with mean |x|^2 = mean |x_0|^2 = 1

    :meth:`fit` computes the statistics from photos; until then x = V^T u, with V selecting the first
    channels.

    Args:
        channels: C.
        components: D, the number of principal components; None keeps the channels.
        queries: whether there are queries, which have their own mean and scale.
    """

    mean: Tensor
    factor: Tensor
    basis: Tensor | None
    query_mean: Tensor
    query_factor: Tensor

    def __init__(self, channels: int, components: int | None, queries: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer(
            "basis", None if components is None else torch.eye(channels)[:, :components]
        )
        self.queries = queries
        if queries:
            self.register_buffer("query_mean", torch.zeros(channels))
            self.register_buffer("query_factor", torch.ones(()))

    def patches(self, u: Tensor) -> Tensor:
        """x for ``u`` (..., C)."""
        return self._projected(u - self.mean) * self.factor

    def query(self, u: Tensor) -> Tensor:
        """x_0 for ``u`` (..., C)."""
        return self._projected(u - self.query_mean) * self.query_factor

    def _projected(self, u: Tensor) -> Tensor:
        return u if self.basis is None else u @ self.basis

    @torch.no_grad()
    def fit(self, photos: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Compute statistics of ``photos``, batches of patches (B, N, C) and queries (B, C), in float64.

        Raises:
            ValueError: all patches are the same, or all queries are.
        """
        channels = len(self.mean)
        shape = (channels,) if self.basis is None else (channels, channels)
        total, products = (self.mean.new_zeros(s, dtype=torch.float64) for s in (channels, shape))
        count, found = 0, []
        for patches, query in photos:
            flat = patches.flatten(0, 1).double()
            count += len(flat)
            total += flat.sum(0)
            products += flat.square().sum(0) if self.basis is None else flat.mT @ flat
            if query is not None:
                found.append(query.double())
        mean = total / count
        if self.basis is None:
            spread = float((products / count - mean.square()).sum())
            whole = float(products.sum()) / count
        else:
            values, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
            kept = slice(len(values) - self.basis.shape[1], None)
            spread = float(values[kept].sum())
            whole = float(products.diagonal().sum()) / count
            self.basis.copy_(vectors[:, kept].flip(1))
        self.mean.copy_(mean)
        self.factor.fill_(_factor(spread, whole, "patches"))
        if found:
            queries = torch.cat(found)
            self.query_mean.copy_(queries.mean(0))
            centred = queries - queries.mean(0)
            if self.basis is not None:
                centred = centred @ self.basis.double()
            spread = float(centred.square().sum(1).mean())
            whole = float(queries.square().sum(1).mean())
            self.query_factor.fill_(_factor(spread, whole, "queries"))


def _factor(spread: float, whole: float, what: str) -> float:
    if not spread > ALIKE * whole:
        raise ValueError(
            f"features: all {what} are alike, so nothing tells the photos apart; give photos that differ"
        )
    return spread**-0.5


DEVIATION = 0.5  # standard deviation of the entries of W


def random_weights(
    rows: int,
    heads: int,
    width: int,
    biased: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """W as (P, M, D + 1), over query channels, heads and key channels. ``width`` is D + 1, and P is D + 1,
    or 1 if only the last row is wanted."""
    w = DEVIATION * torch.randn(rows, heads, width, generator=generator)
    if biased:
        channels = torch.arange(width - 1)
        w[channels, :, channels] += 1
    return w


def append_one(x: Tensor) -> Tensor:
    """x~ = [x; 1] for x (..., D)."""
    return F.pad(x, (0, 1), value=1.0)


def queries_of(x_0: Tensor, weights: Tensor) -> Tensor:
    """x~_0^T W_m for each head, (B, M, D + 1), from x~_0 (B, P)."""
    return (x_0 @ weights.flatten(1)).unflatten(1, weights.shape[1:])


def attention(scores: Tensor) -> Tensor:
    """The weights relu(scores) / N of scores (B, M, N), which do not sum to 1."""
    return scores.relu() / scores.shape[-1]


def features(queries: Tensor, keys: Tensor) -> Tensor:
    """Phi (B, M, D + 1) of ``queries`` (B or 1, M, D + 1) and ``keys`` x~ (B, N, D + 1)."""
    return attention(queries @ keys.mT) @ keys


# Half decades of lambda, relative to the mean eigenvalue.
RIDGES = tuple(10 ** (k / 2) for k in range(-12, 7))
SINGULAR = 1e-12  # eigenvalues below this share of the largest count as 0
TEMPERATURES = tuple(2 ** (k / 4) for k in range(0, 41))


class RidgeFit(NamedTuple):
    """``alpha`` (n, K), which sums to 0 over the examples if ``ridge`` > 0; ``intercept`` (K,);
    ``left_out`` (n, K): the prediction for each example from the fit to all others; ``ridge``: lambda
    divided by the mean eigenvalue."""

    alpha: Tensor
    intercept: Tensor
    left_out: Tensor
    ridge: float


class DualRidge:
    """Ridge regression in the dual, in float64, on the ``kernel`` (n, n) of n examples.

        alpha = (H K H + lambda I)^-1 H Y,    f(x) = b + sum_i alpha_i k(x_i, x),    H = I - 1 1^T / n

    The intercept b is not shrunk. lambda is given relative to the mean eigenvalue of H K H, so it
    does not depend on the scale of the features. All leave-one-out residuals follow from a single
    decomposition, alpha_i / (H C H)_ii with C = (H K H + lambda I)^-1 (Allen 1974), and determine lambda.

    Raises:
        ValueError: a kernel that is not finite, or is the same for all examples.
    """

    def __init__(self, kernel: Tensor) -> None:
        kernel = kernel.double()
        n = len(kernel)
        if not kernel.isfinite().all():
            raise ValueError("features: got numbers that are not finite; check the tokens")
        self.means = kernel.mean(0)
        rows = kernel - self.means
        centred = rows - rows.mean(1, keepdim=True)
        # The constant direction is made the largest, so that it can be identified and left out.
        apart = float(centred.diagonal().abs().sum()) or 1.0
        values, vectors = torch.linalg.eigh(centred + 2 * apart / n)
        self.values, self.vectors = values[:-1].clamp_min(0), vectors[:, :-1]
        if not float(self.values[-1]) > SINGULAR * float(kernel.diagonal().abs().max()):
            raise ValueError(
                "features: all examples are alike, so nothing can be learned from them; give photos "
                "that differ"
            )

    @property
    def rank(self) -> int:
        """Rank of the centred kernel, which is singular if this is less than n - 1."""
        return int((self.values > SINGULAR * self.values[-1]).sum())

    def fit(self, targets: Tensor, ridge: float | None = None) -> RidgeFit:
        """Fit ``targets`` (n, K).

        Args:
            ridge: lambda divided by the mean eigenvalue of the centred kernel; None chooses the value of
                :data:`RIDGES` with the smallest squared leave-one-out error.

        Raises:
            ValueError: a ridge of 0 with a singular kernel.
        """
        if ridge == 0 and self.rank < len(self.values):
            raise ValueError(
                f"ridge: got 0, but the kernel of {len(self.means)} examples is singular (rank "
                f"{self.rank}); give a positive ridge, or None to choose it"
            )
        targets = targets.double()
        mean = targets.mean(0)
        turned = self.vectors.mT @ (targets - mean)
        fits = [self._fit(turned, r) for r in (RIDGES if ridge is None else (ridge,))]
        alpha, residuals, chosen = min(fits, key=lambda fit: float(fit[1].square().sum()))
        return RidgeFit(alpha, mean - self.means @ alpha, targets - residuals, chosen)

    def _fit(self, turned: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
        """alpha, the leave-one-out residuals, and the ridge."""
        inverse = 1 / (self.values + ridge * float(self.values.sum()) / len(self.means))
        alpha = self.vectors @ (inverse[:, None] * turned)
        return alpha, alpha / (self.vectors.square() @ inverse)[:, None], ridge


def best_temperature(predictions: Tensor, labels: Tensor) -> float:
    """The factor of :data:`TEMPERATURES` that minimises the cross-entropy of ``predictions`` (n, K) with
    ``labels`` (n,). Applied to left-out predictions of class indicators, it turns them into logits."""
    losses = [F.cross_entropy(t * predictions.double(), labels) for t in TEMPERATURES]
    return TEMPERATURES[int(torch.stack(losses).argmin())]


Query = Literal["constant", "gap", "cls"]
# Entries of features computed at once, and kept between the kernel and the values.
BLOCK, KEPT = 2**23, 2**27
LARGEST = 2**28  # entries of W, 1 GB in float32
MOST = 20_000  # photos; their kernel takes 3 GB


@register_head(
    "random_feature",
    cases=(
        {"heads": 7},
        {"heads": 7, "query": "gap", "biased": True, "components": 5},
        {"heads": 7, "query": "cls"},
    ),
)
class RandomFeature(AttentiveHead):
    """M heads of random scores on the tokens of the last tap, with one query shared by all heads.

    Patches are centred by the mean patch of the training photos and scaled to a mean square norm of 1; the
    query is centred and scaled likewise by its own statistics. Iterative training also works, but
    ``xattn probe`` calls :meth:`solve`. The random weights are saved with the head.

    Args:
        heads: M; the classifier has M (D + 1) weights per class.
        query: x_0 is ``"constant"``, 0; ``"gap"``, the mean of the image's patches; or ``"cls"``, its class
            token, which then does most of the classifying: :meth:`solve` measures how much, and warns.
        biased: whether to draw W_m around the identity (BRFA); not available for a constant query, which
            stays at 0.
        components: number D of principal components of the patches; None keeps all channels.
        ridge: lambda of the regression, see :class:`~xattn.heads.random_feature.DualRidge`; None chooses
            it.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Raises:
        ValueError: more components than channels, a class token that the backbone does not have, or
            ``biased`` with a constant query.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("random_feature", net, heads=16, classes=5)
        >>> head(net(torch.rand(2, 3, 32, 32))).shape
        torch.Size([2, 5, 2, 2])
    """

    learns_scores: ClassVar[bool] = False
    gated = True  # the rest depends on the query, and therefore on the image

    def __init__(
        self,
        backbone: Backbone,
        heads: Count = 1000,
        query: Query = "constant",
        biased: bool = False,
        components: Count | None = None,
        ridge: NotNegative | None = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        channels = backbone.channels[-1]
        if components is not None and components > channels:
            raise ValueError(
                f"components: got {components}; tokens have {channels} channels; give at most that many"
            )
        if biased and query == "constant":
            raise ValueError(
                "biased: the bias multiplies the query, and the constant one is 0; choose query='gap' "
                "or 'cls'"
            )
        options = {
            "heads": heads,
            "query": query,
            "biased": biased,
            "components": components,
            "ridge": ridge,
        }
        width = components or channels
        rows = 1 if query == "constant" else width + 1  # [0; 1] multiplies only the last row
        if rows * heads * (width + 1) > LARGEST:
            raise ValueError(
                f"heads={heads}: their matrices have {rows * heads * (width + 1):,} entries for tokens of "
                f"width {width}; give fewer heads, or components=128"
            )
        super().__init__(
            backbone, options, heads * (width + 1), reads_prefix=query == "cls", **shared
        )
        if query == "cls" and not self.has_class_token:
            raise ValueError(
                f"query='cls': {backbone.name} has no class token; choose query='gap' or 'constant'"
            )
        self.query, self.ridge = query, ridge
        self.scale = TokenScale(channels, components, query != "constant")
        self.random: Tensor
        self.register_buffer("random", random_weights(rows, heads, width + 1, biased))

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        return self._attended(tokens, slice(None))

    def _attended(self, tokens: Tokens, heads: slice) -> AttentionTerms:
        keys = append_one(self.scale.patches(tokens.patches[-1]))
        queries = queries_of(self._query(tokens), self.random[:, heads])
        # The mean patch is [0; 1], so its score is the last entry of a query.
        return AttentionTerms(Queries(queries, keys), keys[:, None], queries[..., -1].relu())

    def _raw_query(self, tokens: Tokens) -> Tensor | None:
        """(B, C) before scaling; None for a constant query."""
        patches = tokens.patches[-1]
        if self.query == "gap":
            return patches.mean(1)
        return tokens.prefix[:, 0].to(patches.dtype) if self.query == "cls" else None

    def _query(self, tokens: Tokens) -> Tensor:
        """x~_0; for a constant query only the 1."""
        raw = self._raw_query(tokens)
        return self.random.new_ones(1, 1) if raw is None else append_one(self.scale.query(raw))

    def weights(self, scores: Tensor) -> Tensor:
        return attention(scores)

    def reference_shares(self, rows: Tensor, attended: AttentionTerms) -> Tensor:
        """The mean patch's share for each class, as one patch of the image: (B or 1, M)."""
        shares = (rows[..., -1] * attended.context[:, None]).sum(-1)
        return shares / attended.values.shape[2]

    def mean_patch_logits(self, tokens: Tokens) -> Tensor:
        """(B, K): the images' logits if every patch is replaced by the mean patch and each image keeps its
        own query."""
        attended = self.attend(tokens)
        weights = attended.context.expand(len(attended.values), -1)[..., None]
        patch = append_one(weights.new_zeros(len(weights), 1, self.random.shape[-1] - 1))
        z = pool_by(weights, patch[:, None]).flatten(1)
        return self.classifier(z if self.norm is None else self.norm(z))

    # ------------------------------------------------------------------ the solver

    @torch.no_grad()
    def solve(self, train: LabelledTokens, validation: LabelledTokens) -> dict[str, Any]:
        """Solve for v and b by ridge regression of class indicators on the features of ``train``, in the
        dual and in float64. The solution is multiplied by the factor that turns predictions into logits.

        Returns:
            ``ridge``, ``temperature`` (the factor) and ``left_out``, the share of training photos that are
            classified correctly by fits to all other photos. Unless the query is constant, there are also
            two accuracies on ``validation``: ``with_patches``, and ``without_patches``, for which every
            patch is replaced with the mean patch.

        Raises:
            ValueError: fewer photos than classes, or more than :data:`MOST`; photos that are all the same;
                ``ridge=0`` with a singular kernel; a mixer or anchors, which the solver does not train.
        """
        self._check(len(train.labels))
        self.scale.fit((t.patches[-1], self._raw_query(t)) for t in train.batches())
        labels = train.labels.cpu()
        kept = len(labels) * self.classifier.in_features <= KEPT
        blocks: Iterable[Tensor] = self._features(train)
        blocks = list(blocks) if kept else blocks
        kernel = torch.zeros(len(labels), len(labels), dtype=torch.float64)
        for block in blocks:
            wide = block.double()
            kernel += (wide @ wide.mT).cpu()
        fit = DualRidge(kernel).fit(F.one_hot(labels, self.num_classes), self.ridge)
        temperature = best_temperature(fit.left_out, labels)
        if self.norm is not None:
            self.norm.reset_running_stats()
        gain = 1.0 if self.norm is None else (1 + self.norm.eps) ** -0.5
        values = (temperature * fit.alpha.mT).to(self.classifier.weight.device)
        start = 0
        for block in blocks if kept else self._features(train):
            part = slice(start, start + block.shape[1])
            self.classifier.weight[:, part] = ((values / gain) @ block.double()).to(block.dtype)
            start = part.stop
        self.classifier.bias.copy_(temperature * fit.intercept)
        right = float((fit.left_out.argmax(1) == labels).double().mean())
        found = {"ridge": fit.ridge, "temperature": temperature, "left_out": right}
        return found if self.query == "constant" else {**found, **self._without_patches(validation)}

    def _check(self, photos: int) -> None:
        if photos < self.num_classes:
            raise ValueError(
                f"train: got {photos} photos for {self.num_classes} classes; give at least one per class"
            )
        if photos > MOST:
            raise ValueError(
                f"train: got {photos} photos, but the kernel grows with their square; give at most {MOST}"
            )
        for name, part in (("mixer", self.mixer), ("reliability", self.balancing)):
            if part is not None:
                raise ValueError(
                    f"{name}: {self.name} solves for its weights in closed form, which does not train "
                    f"this; leave it out"
                )

    def _features(self, photos: LabelledTokens) -> Iterator[Tensor]:
        """Phi of all ``photos``, (n, m (D + 1)), for successive groups of m heads."""
        heads, width = self.random.shape[1:]
        size = max(1, BLOCK // (len(photos.labels) * width))
        for first in range(0, heads, size):
            parts = []
            for tokens in photos.batches():
                attended = self._attended(tokens, slice(first, first + size))
                parts.append(pool_by(self.weights(attended.scores), attended.values).flatten(1))
            yield torch.cat(parts)

    def _without_patches(self, photos: LabelledTokens) -> dict[str, float]:
        """The accuracy on ``photos``, and the accuracy with the mean patch alone; warns if the query is a
        class token.
        """
        full, alone = [], []
        for tokens in photos.batches():
            full.append(self.logits(tokens).argmax(1).cpu())
            alone.append(self.mean_patch_logits(tokens).argmax(1).cpu())
        labels = photos.labels.cpu()
        right, kept = (float((torch.cat(x) == labels).double().mean()) for x in (full, alone))
        if self.query == "cls":
            warnings.warn(
                f"query='cls': with every patch replaced by the mean patch, {kept:.3f} of {right:.3f} "
                f"accuracy is left: the class token classifies, and no map shows where it got that from",
                stacklevel=2,
            )
        return {"with_patches": right, "without_patches": kept}
