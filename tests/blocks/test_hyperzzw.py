"""HyperZZW's block: kernels of places, its parts, prefix tokens, and the slow loss."""

import pytest
import torch

from xattn.blocks import create_block
from xattn.blocks.hyper_kernel import (
    HyperKernel,
    hyper_interact,
    hyper_score,
    plane_product,
    standardise,
)
from xattn.blocks.hyperzzw import slow_loss

C, GRID, N = 16, (5, 6), 30


def tokens(prefix=0, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, prefix + N, C, generator=generator, dtype=torch.float64)


def made(seed=0, dim=C, **options):
    torch.manual_seed(seed)
    return create_block("hyperzzw", dim, **{"hidden": 8, **options}).double().eval()


def planes(x):
    return x.transpose(1, 2).unflatten(2, GRID)


@pytest.mark.parametrize("n", [2, 8])
def test_a_finer_kernel_holds_the_coarse_one(n):
    torch.manual_seed(0)
    kernel = HyperKernel(C).float()
    fine = kernel((2 * n - 1, 2 * n - 1))[:, ::2, ::2]
    assert (fine - kernel((n, n))).abs().max() < 1e-6
    assert kernel((n, n)).std() > 0.05, "it is no constant"


def test_a_kernel_is_the_product_of_sines():
    torch.manual_seed(0)
    kernel = HyperKernel(3, 1, 4, 2).double()
    c = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    first, second, third = (layer(c).sin() for layer in kernel.filters)
    h = third * kernel.linears[1](second * kernel.linears[0](first))
    torch.testing.assert_close(kernel((5,)), kernel.out(h).T)


def test_standardised_planes_have_mean_0_and_variance_1():
    x = standardise(7 + 5 * torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert x.mean((2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(
        x.var((2, 3), unbiased=False), torch.ones(2, 3).double(), rtol=1e-5, atol=0
    )


def test_the_block_equals_its_equations():
    block, x = made(), tokens()
    n = planes(block.norm(x))
    y, k = n.mean((2, 3)), block.channel_kernel((C,))[0]
    context = n * block.kernel(GRID)
    features = standardise(planes(block.features(block.norm(x))))
    parts = (
        standardise(plane_product(context, features)),
        context * n,
        n * (y * k * y).sigmoid()[..., None, None],
    )
    u = torch.cat(parts, 1).flatten(2).transpose(1, 2) @ block.join.weight.T + block.join.bias
    score = (u.mean(-1, keepdim=True) * (y * k * y)[:, None]).sigmoid()
    expected = x + block.proj(score * u)
    torch.testing.assert_close(block(x, GRID), expected)
    maps = block.maps(x, GRID, 0)
    torch.testing.assert_close(maps["context"], context.mean(1, keepdim=True))
    torch.testing.assert_close(maps["score"].flatten(1), score.mean(-1))


def test_a_product_of_square_planes_is_that_of_matrices():
    a, b = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(plane_product(a, b), a @ b / 4)
    ones = torch.ones(1, 1, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(plane_product(ones, ones), ones)  # rows are interpolated


def test_2e_is_of_degree_two_and_a_kernel_of_ones_leaves_the_context_alone():
    y, k = tokens()[:, 0], tokens()[0, 1]
    torch.testing.assert_close(hyper_score(y / 3, k).logit(), hyper_score(y, k).logit() / 9)
    score = hyper_interact(torch.zeros(2, C, 3, 4), y)
    assert torch.equal(score, torch.full_like(score, 0.5))
    block, x = made(parts=("global",)), tokens()
    torch.nn.init.zeros_(block.kernel.out.weight)
    torch.nn.init.ones_(block.kernel.out.bias)
    n = planes(block.norm(x))
    torch.testing.assert_close(block.maps(x, GRID, 0)["context"], n.mean(1, keepdim=True))


def test_its_operator_is_the_product_with_the_mean_context():
    block, x = made(), tokens(prefix=2)
    operator = block.operator(x, GRID, 2)
    context = block.maps(x, GRID, 2)["context"]
    v = torch.randn(2, 1, N + 2, 3, dtype=torch.float64)
    expected = plane_product(
        context.expand(-1, 3, -1, -1), v[:, 0, 2:].transpose(1, 2).unflatten(2, GRID)
    )
    found = operator.matvec(v)
    assert not found[:, :, :2].any()
    torch.testing.assert_close(found[:, 0, 2:].transpose(1, 2).unflatten(2, GRID), expected)
    torch.testing.assert_close(operator.rows(torch.arange(N + 2)) @ v, found)
    assert made(parts=("2e",)).operator(x, GRID, 2) is None


def test_prefix_tokens_pass_and_kernels_depend_on_no_image():
    block, x = made(), tokens(prefix=3)
    y = block(x, GRID, 3)
    assert torch.equal(y[:, :3], x[:, :3])
    torch.testing.assert_close(y[:, 3:], block(x[:, 3:], GRID))


def test_the_slow_loss_is_0_only_where_kernels_agree():
    first, second = made(0), made(1)
    assert slow_loss([first, second], GRID) > 0
    expected = (first.kernel(GRID) - second.kernel(GRID)).square().mean()
    torch.testing.assert_close(slow_loss([first, second], GRID), expected)
    second.kernel.load_state_dict(first.kernel.state_dict())
    assert slow_loss([first, second], GRID) == 0
    wide = made(2, dim=2 * C)
    wide.kernel.load_state_dict(
        {
            k: v.repeat(2, *[1] * (v.ndim - 1)) if k.startswith("out") else v
            for k, v in first.kernel.state_dict().items()
        }
    )
    assert slow_loss([first, wide, second], GRID).abs() < 1e-24
    with pytest.raises(ValueError, match="^blocks: got 1; the slow loss compares two"):
        slow_loss([first], GRID)
    with pytest.raises(
        ValueError, match="^blocks: got kernels of 16 and 24 channels; give multiples"
    ):
        slow_loss([first, made(dim=24)], GRID)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: made(parts=()), r"^parts: got \(\); give some of global, 2e, channel"),
        (lambda: made(parts=("local",)), r"^parts: got \('local',\)"),
        (lambda: made(parts=("2e", "2e")), "^parts: got"),
        (lambda: made(hidden=0), "^hidden: got 0"),
        (lambda: made(layers=0), "^layers: got 0"),
        (lambda: made(omega=0), "^omega: got 0"),
        (lambda: made()(tokens()), "^grid: hyperzzw needs the grid"),
        (lambda: HyperKernel(3)((4,)), r"^grid: got \(4,\); the kernel has 2 coordinates"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
