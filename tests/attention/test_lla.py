"""Local linear attention: equal to least squares row by row, exact on affine values, and honest on failure."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, create_attention, create_mechanism, record
from xattn.attention.mechanisms import lla
from xattn.kernels.covariance_solve import covariance_solve
from xattn.kernels.softmax import softmax_attention

HEADS, WIDTH = 2, 8
EXACT = {"iterations": 64, "tolerance": 1e-13}


def inputs(n, s=None, prefix=0, causal=False, grad=False, dtype=torch.float64, scale=None):
    generator = torch.Generator().manual_seed(n)
    s = n if s is None else s
    q, k, v = (
        torch.randn(2, HEADS, m, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for m in (n, s, s)
    )
    q, k, v = (x.requires_grad_(grad) for x in (q, k + 1, v))
    return Inputs(q, k, v, prefix=prefix, causal=causal, scale=scale)


def made(dtype=torch.float64, **options):
    return create_mechanism("lla", HEADS * WIDTH, HEADS, **options).to(dtype)


def ridges(asked, kind, factor, p_logits):
    """What the equations call ridge_i, (B, H, N), for weights that sum to 1."""
    b, h, n = p_logits.shape[:3]
    if kind == "relative":
        return torch.full((b, h, n), factor, dtype=p_logits.dtype)
    if kind == "absolute":
        return factor * torch.exp(-p_logits.logsumexp(-1))
    seen = [slice(0, i + 1) if asked.causal else slice(None) for i in range(n)]
    own = [asked.k[:, :, j].var(2, unbiased=False).mean(-1) for j in seen]
    own[0] = own[0] + float(asked.causal)  # of a single key any ridge makes A = 1
    return factor * torch.stack(own, -1)


def by_least_squares(asked, kind, factor):
    """A from the augmented least-squares problem of every query: b_i as a linear function of the values."""
    q, k = asked.q, asked.k
    logits = asked.scale * q @ k.transpose(-2, -1)
    n, s = logits.shape[-2:]
    if asked.causal:
        logits = logits.masked_fill(torch.ones(n, s).triu(1).bool(), -torch.inf)
    p, ridge = logits.softmax(-1), ridges(asked, kind, factor, logits)
    root = (torch.where(p > 0, p, 1.0).sqrt() * (p > 0))[..., None]  # (B, H, N, S, 1)
    away = k[:, :, None] - q[:, :, :, None]
    design = torch.cat([root, root * away], -1)  # of b and W
    shape = (*ridge.shape, WIDTH, 1 + WIDTH)
    penalty = F.pad(torch.eye(WIDTH, dtype=q.dtype), (1, 0)).expand(shape)
    design = torch.cat([design, ridge.sqrt()[..., None, None] * penalty], -2)
    target = torch.cat([root * torch.eye(s, dtype=q.dtype), q.new_zeros(*shape[:-1], s)], -2)
    return torch.linalg.lstsq(design, target).solution[..., 0, :]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "kind, factor", [("key_variance", 1.0), ("relative", 0.3), ("absolute", 5.0)]
)
@pytest.mark.parametrize("n, prefix", [(4, 0), (13, 1), (30, 5)])
def test_it_is_least_squares_row_by_row_with_the_same_gradients(n, prefix, kind, factor, causal):
    asked = inputs(n, prefix=prefix, causal=causal, grad=True)
    leaves = (asked.q, asked.k, asked.v)
    operator = made(ridge=kind, ridge_lambda=factor, **EXACT).operator(asked)
    expected = by_least_squares(asked, kind, factor)
    rows = operator.rows(torch.arange(n))
    assert torch.allclose(rows, expected, rtol=0, atol=1e-10)
    y, wanted = operator.matvec(asked.v), expected @ asked.v
    assert torch.allclose(y, wanted, rtol=0, atol=1e-10)
    found = torch.autograd.grad(y.square().sum(), leaves)
    right = torch.autograd.grad(wanted.square().sum(), leaves)
    for ours, theirs in zip(found, right, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_gradients_equal_those_through_a_dense_solve_to_ten_digits(factor):
    n, width = 40, 6
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, n, width)
    q, k, right = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    )
    ridge = (factor * k.detach().var(2).mean() * torch.ones(1, 1, n).double()).requires_grad_()
    leaves = (q, k, right, ridge)
    p = (q @ k.mT * width**-0.5).softmax(-1)
    mean = p @ k
    away = k[:, :, None] - mean[:, :, :, None]
    matrix = torch.einsum("bhns,bhnsd,bhnse->bhnde", p, away, away)
    matrix = matrix + ridge[..., None, None] * torch.eye(width, dtype=q.dtype)
    expected = torch.autograd.grad(torch.linalg.solve(matrix, right).square().sum(), leaves)
    mean, lse = softmax_attention(q, k, k)
    x = covariance_solve(q, k, k, lse, mean, right, ridge, iterations=4 * width, tolerance=1e-13)
    found = torch.autograd.grad(x.square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_an_infinite_ridge_is_softmax_attention(causal):
    asked = inputs(20, causal=causal)
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v, is_causal=causal)
    y = made(ridge="relative", ridge_lambda=1e12).attend(asked)
    assert torch.allclose(y, expected, rtol=0, atol=1e-9)


def test_without_a_ridge_affine_values_and_the_query_itself_are_reproduced():
    asked = inputs(15, 40)
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    layer = made(ridge="relative", ridge_lambda=1e-9, iterations=200, tolerance=1e-12)
    affine = asked.replace(v=asked.k @ weight + 3)
    assert torch.allclose(layer.attend(affine), asked.q @ weight + 3, atol=1e-5)
    own = asked.replace(v=asked.k)
    assert torch.allclose(layer.attend(own), asked.q, atol=1e-5)


def test_the_scale_of_keys_and_a_constant_added_to_them_change_nothing_but_the_weights():
    asked = inputs(20)
    larger = asked.replace(q=asked.q * 3, k=asked.k * 3, scale=asked.scale / 9)
    layer = made(**EXACT)
    assert torch.allclose(layer.attend(larger), layer.attend(asked), atol=1e-10)
    moved = asked.replace(q=asked.q + 5, k=asked.k + 5, scale=0.0)
    assert torch.allclose(layer.attend(moved), layer.attend(asked.replace(scale=0.0)), atol=1e-10)


def conditioned(condition, n=96, width=16):
    """Single-precision systems whose worst row has this condition, and the exact solution."""
    generator = torch.Generator().manual_seed(1)
    q, k, right = (
        torch.randn(1, 1, n, width, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    k = k * torch.linspace(0.02, 1, width, dtype=k.dtype) + 3
    mean, lse = softmax_attention(q, k, k)
    p = (q @ k.mT * width**-0.5).softmax(-1)
    away = k[:, :, None] - mean[:, :, :, None]
    values = torch.linalg.eigvalsh(torch.einsum("bhns,bhnsd,bhnse->bhnde", p, away, away))
    ridge = (values[..., -1] - condition * values[..., 0]) / (condition - 1)
    given = (q, k, k, lse, mean, right, ridge.clamp_min(1e-9))
    exact = covariance_solve(*given, backend="reference")
    return [x.float() for x in given], exact


def test_single_precision_holds_to_a_condition_of_300():
    given, exact = conditioned(300.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = covariance_solve(*given, iterations=64, tolerance=1e-5)
    assert ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 1e-3


def test_beyond_what_single_precision_can_do_the_residual_is_said():
    given, _ = conditioned(1e9)
    with pytest.warns(
        RuntimeWarning, match=r"conjugate gradients: \d+ of 96 rows have not conv.*res"
    ):
        covariance_solve(*given, iterations=64, tolerance=1e-5)


def test_a_gradient_that_does_not_converge_is_said_too():
    asked = inputs(40, grad=True)
    layer = made(iterations=2, tolerance=1e-6)
    with pytest.warns(RuntimeWarning, match="give more iterations, a larger ridge, or float64"):
        y = layer.attend(asked)
    with pytest.warns(RuntimeWarning, match="have not converged"):
        y.square().sum().backward()


def test_a_row_with_all_weight_on_one_far_key_keeps_its_digits():
    asked = inputs(50)
    k = asked.k.clone()
    k[:, :, 7] = 200.0
    asked = asked.replace(k=k, q=asked.q.abs(), scale=1.0)
    single = asked.replace(q=asked.q.float(), k=k.float(), v=asked.v.float())
    y = made(torch.float32).attend(single)
    assert torch.allclose(y.double(), made(backend="reference").attend(asked), atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_tokens_equal_keys_and_nan_keys_do_not_fail(dtype, n, causal):
    asked = inputs(n, causal=causal, dtype=dtype)
    same = asked.replace(k=asked.k[:, :, :1].expand(-1, -1, n, -1))
    layer = made(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (same, asked.replace(k=0 * asked.k)):
            expected = F.scaled_dot_product_attention(one.q, one.k, one.v, is_causal=causal)
            assert torch.allclose(layer.attend(one), expected, atol=1e-2)
    single = inputs(1, causal=causal, dtype=dtype)
    assert torch.allclose(layer.attend(single), single.v, atol=1e-3)
    assert layer.attend(asked.replace(k=asked.k * torch.nan)).isnan().all()


def test_half_precision_is_solved_in_single_and_that_is_said_once():
    asked = inputs(30)
    half = asked.replace(q=asked.q.bfloat16(), k=asked.k.bfloat16(), v=asked.v.bfloat16())
    wide = half.replace(q=half.q.float(), k=half.k.float(), v=half.v.float())
    layer = made(torch.float32)
    lla._say_promoted.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="lla: got torch.bfloat16; its linear systems are solved in float32"
    ):
        y = layer.attend(half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer.attend(wide).bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.attend(half)


@pytest.mark.parametrize("prefix", [0, 2])
def test_its_maps_are_the_row_of_the_class_token_and_what_softmax_lacks(prefix):
    layer = create_attention("lla", HEADS * WIDTH, HEADS).double()
    n = prefix + 12
    with record() as calls:
        layer(torch.randn(2, n, HEADS * WIDTH).double(), (3, 4), prefix)
    (call,) = calls
    a, p = (o.rows(torch.arange(n)) for o in (call.operator, call.operator.softmax))
    one, without = (m[:, :, 0] if prefix else m.mean(2) for m in (a, p))
    expected = {"row": one, "correction": one - without, "received": a.sum(2).mean(1, keepdim=True)}
    assert call.maps.keys() == expected.keys()
    for name, row in expected.items():
        right = row[..., prefix:].unflatten(-1, (3, 4))
        assert torch.allclose(call.maps[name], right, atol=1e-10), name


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ridge_lambda": 0.0}, "ridge_lambda: got 0.0; give a positive number"),
        ({"ridge_lambda": -1.0}, "ridge_lambda: got -1.0; give a positive number"),
        ({"ridge": "none"}, "ridge: got 'none'; choose one of key_variance, relative, absolute"),
        ({"iterations": 0}, "iterations: got 0; give a whole number of at least 1"),
        ({"tolerance": 0.0}, "tolerance: got 0.0; give a share between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def mesa(q, k, v, ridge):
    """Mesa layer (arXiv 2309.05858): the ridge regression of the values on the keys so far, without an
    intercept, read at each query."""
    rows = []
    for i in range(q.shape[2]):
        seen, values = k[:, :, : i + 1], v[:, :, : i + 1]
        gram = seen.mT @ seen + ridge * (i + 1) * torch.eye(WIDTH, dtype=q.dtype)
        weights = torch.linalg.solve(gram, seen.mT @ values)  # (B, H, D, D)
        rows.append(q[:, :, i, None] @ weights)
    return torch.cat(rows, 2)


def test_with_even_weights_it_is_one_ridge_regression_for_all_queries():
    asked, ridge = inputs(30, scale=1e-9), 0.3
    centred = asked.k - asked.k.mean(2, keepdim=True)
    gram = centred.mT @ centred / 30 + ridge * torch.eye(WIDTH, dtype=torch.float64)
    weights = torch.linalg.solve(gram, centred.mT @ asked.v / 30)
    expected = asked.v.mean(2, keepdim=True) + (asked.q - asked.k.mean(2, keepdim=True)) @ weights
    y = made(ridge="relative", ridge_lambda=ridge, **EXACT).attend(asked)
    assert torch.allclose(y, expected, rtol=0, atol=1e-7)


def test_with_even_weights_and_means_of_zero_it_is_the_mesa_layer():
    """Every key and value is followed by its negative, so that the intercept, a mean, is 0."""
    given, ridge = inputs(9, scale=1e-9, causal=True), 0.3
    q, k, v = (
        torch.stack([x, sign * x], 3).flatten(2, 3)
        for x, sign in ((given.q, 1), (given.k, -1), (given.v, -1))
    )
    y = made(ridge="relative", ridge_lambda=ridge, **EXACT).attend(given.replace(q=q, k=k, v=v))
    expected = mesa(q, k, v, ridge)
    assert torch.allclose(y[:, :, 1::2], expected[:, :, 1::2], rtol=0, atol=1e-7)
