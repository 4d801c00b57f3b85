"""Rows of two operators side by side: divergence, entropy and order, against their definitions."""

import pytest
import torch

from xattn.attention import Inputs, LowRankOperator, SoftmaxOperator, create_mechanism
from xattn.attention.statistics import compare_rows, mean_row_divergence
from xattn.correlation import spearman


def inputs(n=23, size=1.0):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, n, 8, generator=generator, dtype=torch.float64)
    return Inputs(size * q, k, v)


def operators(size=1.0):
    asked = inputs(size=size)
    other = create_mechanism("hedgehog", 24, 3, feature="elu").operator(asked)
    return SoftmaxOperator(asked.q, asked.k), other


@pytest.mark.parametrize("queries", [None, [4], [0, 7, 22]])
def test_means_over_rows_are_those_of_the_definitions(queries):
    softmax, other = operators()
    index = torch.arange(23) if queries is None else torch.tensor(queries)
    found = compare_rows(softmax, other, None if queries is None else index)
    p, a = (x.rows(index) for x in (softmax, other))
    assert torch.allclose(found.divergence, mean_row_divergence(softmax, other, index))
    assert torch.allclose(found.entropy, -(a * a.log()).sum(-1).mean(-1))
    assert torch.allclose(found.softmax_entropy, -(p * p.log()).sum(-1).mean(-1))
    for b in range(2):
        for h in range(3):
            assert found.order[b, h] == pytest.approx(float(spearman(a[b, h], p[b, h]).mean()))


def test_the_softmax_itself_is_in_order_and_uniform_rows_have_none():
    softmax, _ = operators(3.0)
    same = compare_rows(softmax, softmax)
    assert torch.allclose(same.divergence, torch.zeros(()).double(), atol=1e-12)
    assert torch.allclose(same.order, torch.ones(()).double())
    ones = torch.ones(2, 3, 23, 1).double()
    flat = compare_rows(softmax, LowRankOperator(ones / 23, ones.transpose(-2, -1), signed=False))
    assert (flat.order == 0).all()
    assert torch.allclose(flat.entropy, torch.tensor(23.0).double().log())


def test_what_does_not_fit_is_refused():
    softmax, other = operators()
    with pytest.raises(ValueError, match="operator: got shape"):
        compare_rows(softmax, SoftmaxOperator(inputs(5).q, inputs(5).k))
    with pytest.raises(ValueError, match="queries: give at least one token number, each in 0..22"):
        compare_rows(softmax, other, torch.tensor([23]))
    signed = LowRankOperator(-torch.ones(2, 3, 23, 1), torch.ones(2, 3, 1, 23))
    with pytest.raises(ValueError, match="negative"):
        compare_rows(softmax, signed)
