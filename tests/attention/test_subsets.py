"""Attention within subsets: tokens of several subsets, of none, and rows of their own."""

import pytest
import torch

from xattn.attention import SoftmaxOperator, SubsetsOperator

B, H, N, G, W, S, D = 2, 3, 11, 2, 4, 5, 6


def operator(first, keys=S):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, H * G, n, D, generator=generator).double() for n in (W, keys))
    start = 2 if first else 0
    queries, seen = (
        torch.rand(B, H, G, N - start, generator=generator).argsort(-1)[..., :n] + start
        for n in (W, keys)
    )
    own = None
    if first:
        own = SoftmaxOperator(*torch.randn(2, B, H, N, D, generator=generator).double())
        own = SoftmaxOperator(own.q[:, :, :2], own.k)
    return SubsetsOperator(SoftmaxOperator(q, k), queries, seen, N, own), queries, seen


@pytest.mark.parametrize("first", [False, True])
def test_rows_are_means_over_the_subsets_of_a_token(first):
    a, queries, seen = operator(first)
    inner = a.inner.rows(torch.arange(W)).unflatten(1, (H, G))
    expected, count = torch.zeros(B, H, N, N).double(), torch.zeros(B, H, N)
    for b, h, g, i in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, G, W))).tolist():
        token = queries[b, h, g, i]
        count[b, h, token] += 1
        expected[b, h, token].index_add_(0, seen[b, h, g], inner[b, h, g, i])
    expected = expected / count.clamp_min(1)[..., None]
    if first:
        expected[:, :, :2] = a.first.rows(torch.arange(2))
    assert torch.equal(a.subset_counts(), count.to(a.subset_counts().dtype))
    assert torch.allclose(a.rows(torch.arange(N)), expected)
    x = torch.randn(B, H, N, 3).double()
    assert torch.allclose(a.matvec(x), expected @ x)
    assert torch.allclose(a.matvec_and_keep(x), expected @ x)
    r = torch.randn(B, H, 2, N).double()
    assert torch.allclose(a.vecmat(r), r @ expected)
    assert a.pairs == G * W * S + (2 * N if first else 0)
