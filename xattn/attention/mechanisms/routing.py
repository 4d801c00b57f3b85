"""Routing attention: tokens attend within clusters of similar queries and keys.

    mu_c, |mu_c| = 1                         centroids of a head, from k-means on directions
    Q_c, K_c = the w queries and w keys with the largest q^ . mu_c and k^ . mu_c
    y_i = mean over the c with i in Q_c of softmax_{j in K_c}(q_i . k_j / sqrt(D)) v_j

q^ and k^ are q and k scaled to length 1. All clusters have w = N / C tokens. A token may be in several
clusters, or in none, in which case its row of A is 0. Prefix tokens are keys of every cluster and see all
tokens. The commitment loss is the mean of |x^ - mu|^2 / D over tokens x and their nearest mu. In training,
its backward pass also updates the centroids:

    mu <- 0.999 mu + 0.001 (mean direction of the tokens nearest to mu), scaled to length 1

A causal call uses Q_c = K_c, so that every token sees itself. Even so, which tokens are in a cluster also
depends on later tokens. The method is from Roy et al., arXiv 2003.05997.

For a trained network, centroids can be set without training, by k-means on its own queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.subsets import SubsetsOperator
from xattn.attention.order import take_rows
from xattn.attention.plans import cache_plan
from xattn.attention.record import replace_products
from xattn.kernels.softmax.reference import widen

SELF = -5e4  # if queries are keys, added to a token's score with itself, so that others come first


@register_attention(
    "routing",
    paper="arXiv 2003.05997",
    complexity="N C D + N^2 D / C",
    causal=True,
    cases=(
        {"clusters": 3},
        {"clusters": 6, "centroids": "call", "rounds": 1},
        {"clusters": 3, "shared": True},
    ),
    bench=({"clusters": 8}, {"clusters": 32}),
    studies={
        "swap": ({"options": {"centroids": "call"}},),
        "attention-maps": {
            "options": {"centroids": "call"},
            "channels": {"cluster": ("head", (0,))},
            "legends": {"cluster": ("first", "last", "cluster", "turbo")},
        },
    },
)
class Routing(Mechanism):
    """Attention within clusters, which are either the same for all images or computed in each call.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        clusters: C, the number of clusters per head.
        window: w, the number of tokens per cluster, at most N; by default N / C, rounded up.
        centroids: "kept" stores them in a buffer, which training updates and :func:`fit_centroids` sets;
            "call" computes them in each call from its own tokens, by ``rounds`` rounds of k-means.
        shared: whether the queries, scaled to length 1, also serve as keys. The layer's own keys are then
            not read.
        decay: the decay of the centroids' moving average.
        commitment: the weight of the commitment loss in ``aux``.
        rounds: the number of rounds of k-means for "call".

    Raises:
        ValueError: if ``centroids`` is unknown, or a number is out of range.
    """

    centroid: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        clusters: int = 8,
        window: int | None = None,
        centroids: str = "kept",
        shared: bool = False,
        decay: float = 0.999,
        commitment: float = 1e-4,
        rounds: int = 4,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.clusters, self.rounds = (
            check_whole("clusters", clusters),
            check_whole("rounds", rounds),
        )
        self.window = None if window is None else check_whole("window", window)
        if centroids not in ("kept", "call"):
            raise ValueError(f"centroids: got {centroids!r}; give 'kept' or 'call'")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: got {decay}; give a share from 0 to 1")
        if commitment < 0:
            raise ValueError(f"commitment: got {commitment}; give a weight of 0 or more")
        self.of_call, self.shared = centroids == "call", shared
        self.decay, self.commitment = decay, commitment
        start = torch.randn(num_heads, clusters, dim // num_heads)
        self.register_buffer("centroid", F.normalize(start, dim=-1))

    def operator(self, inputs: Inputs) -> Operator:
        prefix, n = inputs.prefix, inputs.q.shape[2]
        if self.shared:
            inputs = inputs.replace(k=F.normalize(inputs.q, dim=-1))
        q, k = inputs.q[:, :, prefix:], inputs.k[:, :, prefix:]
        with torch.autocast(q.device.type, enabled=False):  # rounding could change the clusters
            # A copy, because the backward pass updates the centroids.
            mu = self._call_centroids(q, k) if self.of_call else self.centroid.clone()
            mu = mu.to(widen(q[:0]).dtype).expand(len(q), -1, -1, -1)
            near_q, near_k = (_near(mu, widen(x)) for x in (q, k))
        chosen_q, chosen_k = self._members(near_q, near_k, inputs.causal)
        queries, keys = chosen_q, chosen_k
        if prefix:
            first = torch.arange(prefix, device=q.device).expand(*chosen_k.shape[:3], -1)
            queries, keys = queries + prefix, torch.cat([first, keys + prefix], 3)
        taken_q, taken_k = (
            take_rows(x, at.flatten(2)).unflatten(2, (self.clusters, -1)).flatten(1, 2)
            for x, at in ((inputs.q, queries), (inputs.k, keys))
        )
        hidden = self._hidden(queries.shape[3], prefix, inputs)
        inner = SoftmaxOperator(
            taken_q, taken_k, inputs.scale, hidden, None, self.backend, every_row=True,
            causal=inputs.causal and hidden is None,
        )  # fmt: skip
        operator = SubsetsOperator(
            inner, queries, keys, n, self._first(inputs), causal=inputs.causal
        )
        operator.context = mu
        operator.selection = float(self.clusters * (n - prefix))
        if self.training and self.commitment:
            operator.aux = {"commitment": self._commit(q, k, near_q, near_k)}
        return operator

    @torch.no_grad()
    def _members(self, near_q: Tensor, near_k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return the numbers of the queries and of the keys in each cluster, (B, H, C, w) each."""
        n = near_q.shape[3]
        w = min(n, -(-n // self.clusters) if self.window is None else self.window)
        if self.shared or causal:
            both = near_q if self.shared else near_q + near_k
            at = both.topk(w, sorted=False).indices.sort(-1).values
            return at, at
        return near_q.topk(w, sorted=False).indices, near_k.topk(w, sorted=False).indices

    def _hidden(self, w: int, prefix: int, inputs: Inputs) -> Tensor | None:
        """Return the term added to the scores of a cluster's w queries and prefix + w keys, or None."""
        if not self.shared and not (inputs.causal and prefix):
            return None
        q = inputs.q
        return cluster_mask(w, prefix, self.shared, inputs.causal, device=q.device).to(q.dtype)

    def _first(self, inputs: Inputs) -> Operator | None:
        """Return the rows of the prefix tokens; None if there are none."""
        q, prefix, hidden = inputs.q, inputs.prefix, None
        if not prefix:
            return None
        if inputs.causal:
            hidden = prefix_causal_mask(prefix, q.shape[2], device=q.device).to(q.dtype)
        return SoftmaxOperator(
            q[:, :, :prefix], inputs.k, inputs.scale, hidden, None, self.backend, every_row=True
        )

    @torch.no_grad()
    def _call_centroids(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute centroids (B, H, C, D) from each image's own tokens."""
        x = F.normalize(widen(torch.cat([q, k], 2)), dim=-1)
        n = k.shape[2]
        start = torch.arange(self.clusters, device=q.device) * n // self.clusters
        mu = x[:, :, n + start]
        for _ in range(self.rounds):
            mu = means(x, mu)
        return mu

    def _commit(self, q: Tensor, k: Tensor, near_q: Tensor, near_k: Tensor) -> Tensor:
        """Return the commitment loss, whose backward pass updates the centroids."""
        near = torch.cat([near_q] if self.shared else [near_q, near_k], 3)
        loss = self.commitment * (2 - 2 * near.amax(2)).mean() / q.shape[3]  # |x^|, |mu| = 1
        if self.of_call or torch.compiler.is_compiling() or not loss.requires_grad:
            return loss
        with torch.no_grad():
            x = q if self.shared else torch.cat([q, k], 2)
            x = F.normalize(widen(x), dim=-1).transpose(0, 1).flatten(1, 2)
            new = means(x, self.centroid.to(x.dtype))
        return _Moves.apply(loss, self.centroid, new, self.decay)  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, x: Tensor, rounds: int = 10, seed: int = 0) -> None:
        """Set the centroids by k-means on tokens x (H, M, D), starting from randomly chosen tokens.

        Raises:
            ValueError: if there are fewer tokens than clusters.
        """
        generator = torch.Generator().manual_seed(seed)
        start = torch.randperm(x.shape[1], generator=generator)[: self.clusters]
        if len(start) < self.clusters:
            raise ValueError(f"x: got {x.shape[1]} tokens; give at least {self.clusters}")
        x = F.normalize(widen(x), dim=-1)
        mu = x[:, start.to(x.device)]
        for _ in range(rounds):
            mu = means(x, mu)
        self.centroid.copy_(mu)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``cluster``, the number of the centroid nearest to each patch's key, and ``members``, the
        number of clusters in which the patch is a query (0 if it sees nothing). If there is a prefix token,
        also return ``with_class``, which is 1 for the keys of the cluster nearest to the first prefix
        token's query. All maps are per head."""
        if inputs.grid is None or len(inputs.grid) != 2:
            return {}
        assert isinstance(operator, SubsetsOperator)
        prefix, mu = inputs.prefix, operator.context
        k = F.normalize(inputs.q, dim=-1) if self.shared else inputs.k
        cluster = (mu @ widen(k[:, :, prefix:]).transpose(2, 3)).argmax(2).float()
        found = {"cluster": cluster, "members": operator.subset_counts()[..., prefix:].float()}
        if prefix:
            own = (mu @ widen(inputs.q[:, :, :1]).transpose(2, 3)).argmax(2)[..., None]
            keys = operator.keys.unflatten(2, (self.clusters, -1))[..., prefix:] - prefix
            mine = keys.gather(2, own.expand(-1, -1, 1, keys.shape[3]))[:, :, 0]
            found["with_class"] = torch.zeros_like(cluster).scatter_(2, mine, 1.0)
        return {name: x.unflatten(-1, inputs.grid) for name, x in found.items()}


class _Moves(torch.autograd.Function):
    """The identity, whose backward pass updates the centroids, as in the authors' training."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, centroid: Tensor, new: Tensor, decay: float) -> Tensor:
        ctx.centroid, ctx.new, ctx.decay = centroid, new, decay
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        moved = ctx.decay * ctx.centroid + (1 - ctx.decay) * ctx.new
        ctx.centroid.copy_(F.normalize(moved, dim=-1))
        return grad, None, None, None


def means(x: Tensor, mu: Tensor) -> Tensor:
    """Run one round of k-means.

    For each centroid in ``mu``, return the direction of the sum of those unit tokens x (..., M, D) that are
    nearest to it, (..., C, D). A centroid without tokens does not change.
    """
    nearest = (x @ mu.transpose(-2, -1)).argmax(-1)
    sums = F.one_hot(nearest, mu.shape[-2]).to(x.dtype).transpose(-2, -1) @ x
    return torch.where((sums != 0).any(-1, keepdim=True), F.normalize(sums, dim=-1), mu)


def _near(mu: Tensor, x: Tensor) -> Tensor:
    """Compute mu . x^ for centroids (B, H, C, D) and tokens x (B, H, N, D): (B, H, C, N)."""
    length = torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-12)
    return mu @ x.transpose(2, 3) / length[:, :, None]


@cache_plan
def cluster_mask(w: int, prefix: int, shared: bool, causal: bool) -> Tensor:
    """Create the term added to the scores of a cluster's w queries and prefix + w keys,
    (1, 1, w, prefix + w)."""
    own, hidden = torch.arange(w), torch.zeros(w, w)
    if shared:
        hidden = hidden.masked_fill(own == own[:, None], SELF)
    if causal:
        hidden = hidden.masked_fill(own > own[:, None], -torch.inf)
    return F.pad(hidden, (prefix, 0))[None, None]


@cache_plan
def prefix_causal_mask(prefix: int, n: int) -> Tensor:
    """Create the term that is added to the scores of the ``prefix`` tokens with all ``n`` tokens, so that
    each prefix token sees only the tokens up to itself."""
    return torch.full((1, 1, prefix, n), -torch.inf).triu(1)


class _Collects:
    """Runs softmax attention in place of mechanisms, and collects the tokens that routing would cluster."""

    def __init__(self, most: int) -> None:
        self.most, self.tokens = most, {}  # type: ignore[var-annotated]

    def attend(self, mechanism: Any, inputs: Inputs) -> Tensor:
        inputs = mechanism.check_inputs(inputs)
        if not isinstance(mechanism, Routing):
            local = mechanism.local(inputs)
            y = mechanism.operator(inputs).matvec(inputs.v)
            return y if local is None else y + local  # type: ignore[no-any-return]
        q, k = (
            x[:, :, inputs.prefix :].transpose(0, 1).flatten(1, 2) for x in (inputs.q, inputs.k)
        )
        x = q if mechanism.shared else torch.cat([q, k], 1)
        step = -(-x.shape[1] // self.most)
        self.tokens.setdefault(mechanism, []).append(x[:, ::step])
        return SoftmaxOperator(inputs.q, inputs.k, inputs.scale, causal=inputs.causal).matvec(
            inputs.v
        )

    def mix(self, name: str, operator: Operator, value: Tensor) -> Tensor:
        return operator.matvec(value)


@torch.no_grad()
def fit_centroids(
    model: nn.Module, batches: Iterable[Tensor], rounds: int = 10, most: int = 2048, seed: int = 0
) -> None:
    """Set the centroids of all routing layers of ``model`` from its own softmax attention.

    Args:
        model: a model or backbone with routing in some of its layers, for example from ``convert``.
        batches: inputs of the model.
        rounds: number of rounds of k-means.
        most: largest number of tokens used per batch.
        seed: seed for the choice of the first centroids.

    Raises:
        ValueError: if no routing layer was called, or there are fewer tokens than clusters.

    Example:
        >>> import torch
        >>> from xattn.attention import create_attention, fit_centroids
        >>> layer = create_attention("routing", 32, 4)
        >>> fit_centroids(layer, [torch.rand(2, 16, 32)], rounds=2)
        >>> layer(torch.rand(1, 16, 32)).shape
        torch.Size([1, 16, 32])
    """
    forward = getattr(model, "logits", model)
    collects = _Collects(most)
    with replace_products(collects):
        for batch in batches:
            forward(batch)
    if not collects.tokens:
        raise ValueError("model: no layer has routing attention; convert it first")
    for mechanism, found in collects.tokens.items():
        mechanism.fit(torch.cat(found, 1), rounds, seed)
