"""Causal attention of low rank: every question to the operator agrees with its masked matrix."""

import pytest
import torch

from xattn.attention import CausalLowRankOperator

N = 75


def factors(dtype=torch.float64):
    torch.manual_seed(0)
    left, right = torch.rand(2, 3, N, 4, dtype=dtype), torch.rand(2, 3, 4, N, dtype=dtype)
    return left, right


def test_all_questions_agree_with_the_masked_matrix():
    left, right = factors()
    a = (left @ right).tril()
    operator = CausalLowRankOperator(left, right)
    assert operator.shape == a.shape
    x, r = torch.randn(2, 3, N, 5).double(), torch.randn(2, 4, N).double()
    some = torch.tensor([N - 1, 0, 40])
    assert torch.allclose(operator.matvec(x), a @ x)
    assert torch.allclose(operator.rows(some), a[:, :, some])
    tile = operator.tile(slice(5, 60), slice(30, None))
    assert torch.allclose(tile, a[:, :, 5:60, 30:])
    assert torch.allclose(operator.row_sums(), a.sum(-1))
    assert torch.allclose(operator.vecmat(r), r[:, None] @ a)
    assert torch.allclose(operator.vecmat(r, "mean"), (r[:, None] @ a).mean(1))
    own = torch.randn(2, 3, 1, N).double()
    assert torch.allclose(operator.vecmat(own), own @ a)
    grad = torch.randn_like(x)
    e = (a * (grad @ x.transpose(-2, -1))).clamp_min(0).mean(1)
    assert torch.allclose(operator.gradient_vecmat(x, grad, r), r @ e)


def test_row_vectors_times_it_have_gradients():
    left, right = (x.requires_grad_() for x in factors())
    r = torch.randn(2, 1, N).double()
    found = CausalLowRankOperator(left, right).vecmat(r).square().sum()
    expected = (r[:, None] @ (left @ right).tril()).square().sum()
    for one, other in zip(
        *(torch.autograd.grad(y, (left, right)) for y in (found, expected)), strict=True
    ):
        assert torch.allclose(one, other)


def test_half_precision_answers_in_single_and_values_keep_their_type():
    left, right = factors()
    operator = CausalLowRankOperator(left.bfloat16(), right.bfloat16())
    exact = CausalLowRankOperator(left.bfloat16().double(), right.bfloat16().double())
    x, r = torch.rand(2, 3, N, 2).bfloat16(), torch.rand(2, 1, N)
    assert operator.matvec(x).dtype == torch.bfloat16
    assert operator.matvec(x.float()).dtype == torch.float32
    assert torch.allclose(operator.matvec(x).double(), exact.matvec(x.double()), rtol=1e-2)
    assert torch.allclose(operator.vecmat(r).double(), exact.vecmat(r.double()), rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert operator.rows(torch.tensor([3])).dtype == torch.float32


def test_factors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"left, right: got shapes \(1, 2, 9, 4\), \(1, 2, 4, 8\)"):
        CausalLowRankOperator(torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 4, 8))
