"""Statistics of how a layer's heads attend: entropy of the rows, distance on the grid, attention to prefix
tokens and sinks, and divergence from the rows of another layer.

    H_i = - sum_j p_ij ln p_ij                      p_ij = A_ij / sum_k A_ik, over all keys
    d_i = sum_j A_ij |x_i - x_j| / sum_j A_ij       j over patches only, x in patches
    m_j = mean_i p_ij                               the attention that key j receives
    KL_i = sum_j p_ij ln(p_ij / p'_ij)              from rows p to rows p' of another A

The query i runs over the patches, or over a sample of them. Prefix tokens (class token, registers) are
always among the keys but have no position, so they count in H and m and are left out of d. The distance is
that of Dosovitskiy et al. 2021, arXiv 2010.11929, section 4.5 and appendix D.7, which does not say how the
class token counts. Because d is divided by the attention to patches only, a head that attends to the class
token does not look local. For sinks, see Xiao et al. 2023, arXiv 2309.17453, and Darcet et al. 2023,
arXiv 2309.16588.

The statistics assume weights of at least 0. Rows that do not sum to 1 are scaled, so every query counts
once in m_j. If an operator has negative entries, the caller has to ask for the statistics of |A|.

The eight indicators of a layer (:func:`indicators`) are those of "Deconstructing Attention",
arXiv 2510.11602, with neighbours on the grid instead of earlier tokens, and prefix tokens instead of the
first token.

Rows of A are computed block by block, so memory is O(block x N). Sums are computed in float64.

The module also compares the rows A of a mechanism with the rows P of the softmax that it replaces, for each
head.

    KL   mean_i sum_j P_ij ln(P_ij / A_ij)          H   mean_i - sum_j A_ij ln A_ij, and the same for P
    rho  mean_i Spearman(A_i, P_i)

P_ij increases with the score q_i . k_j, so rho measures whether A_ij does, too. It is 1 if the weights are
monotone in the scores, as they are with an exponential; with elu + 1 or a Taylor series, this is not
guaranteed (Zhang et al. 2024, arXiv 2402.04347, section 3). Rows that do not sum to 1 are divided by their
sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.attention.operators.base import Operator
from xattn.correlation import spearman


@dataclass(frozen=True, eq=False)
class Statistics:
    """One layer's statistics in float64, for B images, H heads and N tokens. The first ``prefix`` of the
    tokens are prefix tokens."""

    entropy: Tensor
    """Mean of H_i in nats, (B, H), in [0, ln N]; see :func:`bits`."""
    distance: Tensor
    """Mean of d_i in patches, (B, H); NaN if no query attends to any patch."""
    received: Tensor
    """m_j, (B, H, N). The values of a head sum to 1, or to less if some query sees no key."""
    queries: int
    """The number of patches used as queries."""
    prefix: int

    @property
    def prefix_mass(self) -> Tensor:
        """The share of attention that goes to the prefix tokens, (B, H)."""
        return self.received[..., : self.prefix].sum(-1)

    def sinks(self, count: int) -> tuple[Tensor, Tensor]:
        """Find the ``count`` patches that receive the most attention on average over heads.

        Returns:
            their token numbers, LongTensor (B, count), in descending order of attention, and their shares
            of the attention, (B, count). If there are fewer patches, all of them are returned.
        """
        if count < 1:
            raise ValueError(f"count: got {count}; give at least 1")
        patches = self.received.mean(1)[:, self.prefix :]
        share, index = patches.topk(min(count, patches.shape[1]), dim=-1)
        return index + self.prefix, share


@torch.no_grad()
def statistics(
    operator: Operator,
    grid: tuple[int, int],
    prefix: int,
    queries: Tensor | None = None,
    absolute: bool = False,
) -> Statistics:
    """Compute the entropy, distance and received attention of one layer, a block of rows at a time.

    Args:
        operator: A, of shape (B, H, N, N).
        grid: (h, w), the side lengths of the patch grid after the ``prefix`` tokens; h w = N - prefix.
        queries: LongTensor (R,), token numbers of patches, in prefix..N - 1; all patches by default. See
            :func:`sample_queries`.
        absolute: whether to use |A| instead of A, which is required for signed operators.

    Raises:
        ValueError: if the grid does not fit, if a query is not a patch, or if the operator may have
            negative entries and ``absolute`` is False.
    """
    _check_weights(operator, absolute)
    tokens, keys = operator.shape[2:]
    height, width = grid
    if tokens != keys or height * width != tokens - prefix or prefix < 0:
        raise ValueError(
            f"grid, prefix: got {height} x {width} and {prefix} for attention of {tokens} to {keys} "
            f"tokens; give a grid of all tokens after the prefix"
        )
    if queries is None:
        queries = torch.arange(prefix, tokens, device="cpu")
    elif not len(queries) or int(queries.min()) < prefix or int(queries.max()) >= tokens:
        raise ValueError(f"queries: give at least one token number, each in {prefix}..{tokens - 1}")
    size = operator.row_chunks()[0].stop
    entropy = received = distance = count = torch.zeros((), dtype=torch.float64, device="cpu")
    for index in queries.split(size):
        rows = operator.rows(index.to(operator.device)).cpu().double()
        rows = rows.abs() if absolute else rows
        p = _shares(rows)
        entropy = entropy + _entropy(p).sum(-1)
        received = received + p.sum(-2)
        away = row_distance(rows, index, grid, prefix)
        distance = distance + away.nan_to_num(0.0).sum(-1)
        count = count + (~away.isnan()).sum(-1)
    n = len(queries)
    return Statistics(entropy / n, distance / count, received / n, n, prefix)


APART = 4  # attention to neighbours is computed for distances 0 to 3


@dataclass(frozen=True, eq=False)
class Indicators:
    """Eight indicators of one layer, in float64, for B images and H heads."""

    entropy: Tensor
    """Mean entropy of the rows in nats, (B, H)."""
    concentration: Tensor
    """Frobenius norm of A, (B, H): from 1 for uniform rows to sqrt(N) if each row reads a single key."""
    diversity: Tensor
    """Standard deviation of A_ij over the heads, averaged over all i and j (only j <= i if causal),
    (B,)."""
    sink: Tensor
    """Mean attention of a query to the prefix tokens or, if there are none, to the first token, (B, H)."""
    focus: Tensor
    """Mean of A_ij over all pairs of patches at distance n = 0 to 3, (B, H, 4); NaN if there is no such
    pair. The distance is the number of rows or of columns between the patches, whichever is larger."""


@torch.no_grad()
def indicators(
    operator: Operator, grid: tuple[int, ...], prefix: int, absolute: bool = False
) -> Indicators:
    """Compute eight indicators of how a layer attends, a block of rows at a time.

    Args:
        operator: A, of shape (B, H, N, N).
        grid: side lengths of the patch grid after the ``prefix`` tokens; (n,) for tokens in a row.
        absolute: whether to use |A| instead of A, which is required for signed operators.

    Raises:
        ValueError: as in :func:`statistics`.
    """
    _check_weights(operator, absolute)
    batch, heads, tokens, keys = operator.shape
    if tokens != keys or math.prod(grid) != tokens - prefix or prefix < 0:
        raise ValueError(
            f"grid, prefix: got {grid} and {prefix} for attention of {tokens} to {keys} tokens; give a "
            f"grid of all tokens after the prefix"
        )
    places = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in grid)).view(
        -1, len(grid)
    )
    total = torch.zeros(4, batch, heads, dtype=torch.float64, device="cpu")
    near = torch.zeros(batch, heads, APART, dtype=torch.float64, device="cpu")
    pairs = torch.zeros(APART, dtype=torch.float64, device="cpu")
    for part in operator.row_chunks():
        rows = operator.tile(part, slice(None)).cpu().double()
        rows = rows.abs() if absolute else rows
        index = torch.arange(tokens, device="cpu")[part]
        total[0] += row_entropy(rows).sum(-1)
        total[1] += rows.square().sum((-2, -1))
        total[2] += rows.std(1, correction=0).sum((-2, -1))[:, None]
        total[3] += rows[..., : max(1, prefix)].sum((-2, -1))
        own = index[index >= prefix]
        away = (places[own - prefix, None] - places).abs().amax(-1)
        if operator.causal:
            away[torch.arange(len(places), device="cpu") > (own - prefix)[:, None]] = APART
        patches = rows[:, :, index >= prefix, prefix:]
        for n in range(APART):
            near[..., n] += (patches * (away == n)).sum((-2, -1))
            pairs[n] += (away == n).sum()
    count = tokens * (tokens + 1) / 2 if operator.causal else tokens**2
    return Indicators(
        total[0] / tokens, total[1].sqrt(), total[2][:, 0] / count, total[3] / tokens, near / pairs
    )


def row_entropy(rows: Tensor) -> Tensor:
    """Compute the entropy (...) in nats of rows (..., S) of A, in [0, ln S]; 0 for a row of zeros.

    Raises:
        ValueError: if an entry is negative.
    """
    return _entropy(_shares(rows))


def _check_weights(operator: Operator, absolute: bool) -> None:
    if operator.signed and not absolute:
        raise ValueError(
            "operator: its entries may be negative, but entropy needs weights of at least 0; give "
            "absolute=True for the statistics of |A|"
        )


def row_shares(rows: Tensor) -> Tensor:
    """Return |rows|, (..., S), with every row scaled to sum to 1; a row of zeros stays zero."""
    rows = rows.abs()
    total = rows.sum(-1, keepdim=True)
    return rows / torch.where(total > 0, total, 1.0)


def _shares(rows: Tensor) -> Tensor:
    if (rows < 0).any():
        raise ValueError(
            "rows: got negative entries, but entropy needs weights of at least 0; give rows.abs()"
        )
    return row_shares(rows)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def common_rows(queries: Tensor | None, **operators: Operator) -> Tensor:
    """Return the numbers of the rows to compare in two operators: ``queries``, or all rows if it is None.

    Error messages use the argument names of ``operators``.

    Raises:
        ValueError: if the operators have different shapes or a row is out of range.
    """
    (first, one), (second, other) = operators.items()
    if one.shape != other.shape:
        raise ValueError(f"{second}: got shape {other.shape}; the {first} has shape {one.shape}")
    tokens = one.shape[2]
    if queries is None:
        return torch.arange(tokens, device="cpu")
    if not len(queries) or int(queries.min()) < 0 or int(queries.max()) >= tokens:
        raise ValueError(f"queries: give at least one token number, each in 0..{tokens - 1}")
    return queries


@torch.no_grad()
def mean_row_divergence(
    teacher: Operator, student: Operator, queries: Tensor | None = None
) -> Tensor:
    """Compute the mean over rows of KL(teacher's row || student's row) in nats, (B, H) in float64.

    Args:
        teacher, student: both of shape (B, H, N, S).
        queries: LongTensor (R,), row numbers in 0..N - 1; all rows by default. See :func:`sample_queries`.

    Raises:
        ValueError: if the shapes differ, a row is out of range, or an entry is negative.
    """
    queries = common_rows(queries, teacher=teacher, student=student)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for index in queries.split(teacher.row_chunks()[0].stop):
        given, found = (
            operator.rows(index.to(operator.device)).cpu().double()
            for operator in (teacher, student)
        )
        total = total + row_divergence(given, found).sum(-1)
    return total / len(queries)


def row_divergence(rows: Tensor, others: Tensor) -> Tensor:
    """Compute KL(rows || others) (...) in nats for rows (..., S). It is differentiable in both arguments.

    Rows are scaled to sum to 1. Weights of ``others`` below the smallest normal number of their dtype count
    as that number, so a key that ``others`` do not read gives a large but finite divergence.

    Raises:
        ValueError: if an entry is negative.
    """
    p, other = _shares(rows), _shares(others)
    floor = torch.finfo(other.dtype).tiny
    return -_entropy(p) - (p * other.clamp_min(floor).log()).sum(-1)


def bits(nats: float) -> float:
    """Convert an entropy from nats to bits."""
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """Return exp(H), the perplexity: attention that is spread equally over this number of tokens has the
    entropy H."""
    return math.exp(nats)


def row_distance(rows: Tensor, index: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Compute the mean distance, in patches, from each patch of ``index`` (R,) to the patches it attends
    to.

    ``rows`` (..., R, N) are the rows of A for these patches, and their entries for patches are the weights
    of the mean. The result is (..., R), with NaN for a row without weight on patches.
    """
    places = positions(grid, rows.dtype)
    away = torch.cdist(
        places[index.cpu() - prefix], places, compute_mode="donot_use_mm_for_euclid_dist"
    )
    patches = rows[..., prefix:]
    return (patches * away).sum(-1) / patches.sum(-1)


def positions(grid: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return (row, column) of each patch in raster order, (h w, 2)."""
    rows, columns = (torch.arange(n, dtype=dtype, device="cpu") for n in grid)
    return torch.cartesian_prod(rows, columns)


def uniform_distance(grid: tuple[int, int]) -> float:
    """Return the mean of :func:`row_distance` for uniform attention, in patches."""
    (height, width), total = grid, 0.0
    for dy in range(height):
        for dx in range(width):  # pairs of patches at distance (dy, dx)
            pairs = (height - dy) * (width - dx) * (1 + (dy > 0)) * (1 + (dx > 0))
            total += pairs * math.hypot(dy, dx)
    return total / (height * width) ** 2


def sample_queries(tokens: int, prefix: int, most: int, seed: int = 0) -> Tensor:
    """Draw at most ``most`` of the patches prefix..tokens - 1 without replacement; return them sorted."""
    if most < 1:
        raise ValueError(f"most: got {most}; give at least 1")
    patches = tokens - prefix
    if patches <= most:
        return torch.arange(prefix, tokens, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(patches, generator=generator, device="cpu")[:most].sort().values + prefix


def kept_keys(rows: Tensor) -> Tensor:
    """Return which keys the rows of a sparse mechanism read, bool: True where A is not exactly 0.

    The entry of a hidden key is exactly 0. If a weight is smaller than the smallest number of its dtype
    (1e-45 in float32), its entry is also 0, and the key counts as hidden here.
    """
    return rows != 0


@dataclass(frozen=True, eq=False)
class RowComparison:
    """Means over rows, in float64, for B images and H heads."""

    divergence: Tensor
    """KL in nats, (B, H)."""
    entropy: Tensor
    """H of the mechanism's rows in nats, (B, H)."""
    softmax_entropy: Tensor
    """H of the softmax rows in nats, (B, H)."""
    order: Tensor
    """rho, (B, H), in [-1, 1]; rows without an order, such as uniform ones, count as 0."""


@torch.no_grad()
def compare_rows(
    softmax: Operator, operator: Operator, queries: Tensor | None = None
) -> RowComparison:
    """Compare the rows of two operators of the same shape (B, H, N, S).

    Args:
        queries: LongTensor (R,), row numbers in 0..N - 1; all rows by default.

    Raises:
        ValueError: if the shapes differ, a row is out of range, or an entry is negative.
    """
    queries = common_rows(queries, softmax=softmax, operator=operator)
    sums = [torch.zeros(softmax.shape[:2], dtype=torch.float64, device="cpu") for _ in range(4)]
    for index in queries.split(softmax.row_chunks()[0].stop):
        p, a = (x.rows(index.to(x.device)).cpu().double() for x in (softmax, operator))
        order = spearman(a.flatten(0, 2), p.flatten(0, 2)).nan_to_num(0.0).view(a.shape[:3])
        found = row_divergence(p, a), row_entropy(a), row_entropy(p), order
        for total, values in zip(sums, found, strict=True):
            total += values.sum(-1)
    return RowComparison(*(total / len(queries) for total in sums))
