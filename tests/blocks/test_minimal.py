"""The minimal block: its flags, its limit cases, and contributions that are exact."""

import pytest
import torch

from xattn.attention import SoftmaxOperator
from xattn.blocks import create_block
from xattn.blocks.minimal import contributions

C, N = 32, 15


def tokens(batch=2, seed=0):
    return torch.randn(
        batch, N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def made(seed=0, **options):
    torch.manual_seed(seed)
    return create_block("minimal", C, **options).double().eval()


def stack(residual="average", heads=4, qk="symmetric", depth=3, norm="qk"):
    options = {"mlp": False, "vo": False, "norm": norm, "residual": residual}
    return [made(i, qk=qk, heads=heads, **options) for i in range(depth)]


def test_collapsed_is_separate_with_the_product_of_both_matrices():
    separate = made(qk="separate", mlp=False)
    collapsed = made(qk="collapsed", mlp=False)
    with torch.no_grad():
        collapsed.q.weight.copy_(separate.k.weight.T @ separate.q.weight)
    for mine, other in ((collapsed.v, separate.v), (collapsed.proj, separate.proj)):
        mine.load_state_dict(other.state_dict())
    torch.testing.assert_close(collapsed(tokens()), separate(tokens()))


def test_without_vo_it_is_the_block_whose_matrices_are_the_identity():
    whole, bare = made(mlp=False, heads=4), made(mlp=False, heads=4, vo=False)
    with torch.no_grad():
        for layer in (whole.v, whole.proj):
            layer.weight.copy_(torch.eye(C))
    bare.load_state_dict(whole.state_dict(), strict=False)
    torch.testing.assert_close(bare(tokens()), whole(tokens()))


def test_a_zero_mlp_is_none():
    block, bare = made(), made(mlp=False)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    bare.load_state_dict(block.state_dict(), strict=False)
    torch.testing.assert_close(block(tokens()), bare(tokens()))


@pytest.mark.parametrize("qk", ["symmetric", "cholesky"])
def test_one_matrix_for_q_and_k_makes_a_kernel(qk):
    block = made(qk=qk, mlp=False)
    s = block.logits(tokens())
    torch.testing.assert_close(s, s.transpose(-2, -1))
    assert torch.linalg.eigvalsh(s).min() > -1e-9
    diagonal = s.diagonal(dim1=-2, dim2=-1)
    limit = (diagonal[..., :, None] * diagonal[..., None, :]).sqrt()
    assert diagonal.min() >= 0 and (s.abs() <= limit + 1e-9).all()


def test_cholesky_is_the_triangle_times_itself():
    block = made(qk="cholesky", mlp=False, norm="none")
    t = torch.zeros(C, C, dtype=torch.float64)
    t[torch.ones(C, C).tril().bool()] = block.triangle.detach()
    expected = tokens() @ t @ t.T @ tokens().transpose(1, 2) / C**0.5
    torch.testing.assert_close(block.logits(tokens())[:, 0], expected)


@pytest.mark.parametrize("norm", ["qk", "none"])
def test_without_vo_and_residual_the_output_lies_between_its_inputs(norm):
    block = made(mlp=False, vo=False, heads=4, norm=norm, residual="none")
    x = tokens()
    y = block(x)
    lowest, highest = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    assert (y >= lowest - 1e-12).all() and (y <= highest + 1e-12).all()


def test_residuals():
    x = tokens()
    plain, average, none = (
        made(mlp=False, residual=residual)(x) for residual in ("plain", "average", "none")
    )
    torch.testing.assert_close(plain, x + none)
    torch.testing.assert_close(average, (x + none) / 2)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"mlp": False, "vo": False, "qk": "cholesky"}, C * (C + 1) // 2),
        ({"mlp": False, "vo": False, "qk": "collapsed"}, C * C),
        ({"mlp": False, "vo": False, "qk": "symmetric"}, C * C),
        ({"mlp": False, "qk": "collapsed"}, 3 * C * C),
        ({"mlp": False}, 4 * C * C),
        ({}, 12 * C * C + 5 * C),
    ],
)
def test_parameters(options, count):
    block = made(norm="none", **options)
    assert sum(p.numel() for p in block.parameters()) == count


# ---------------------------------------------------------------------- contributions


def logits_of(blocks, x, weight):
    for block in blocks:
        x = block(x)
    return x.mean(1) @ weight.T


@pytest.mark.parametrize("residual", ["average", "plain", "none"])
@pytest.mark.parametrize(("qk", "heads"), [("symmetric", 4), ("cholesky", 1), ("separate", 2)])
def test_contributions_sum_to_the_logits(qk, heads, residual):
    blocks, x = stack(residual, heads, qk), tokens()
    weight = torch.randn(5, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = contributions(blocks, x, weight)
    assert found.shape == (2, 5, N)
    assert (found.sum(-1) - logits_of(blocks, x, weight)).abs().max() < 1e-12


def test_they_are_each_heads_own_chain_and_the_mean_of_heads_is_not_exact():
    blocks, x, weight = stack(depth=2), tokens(), torch.eye(C, dtype=torch.float64)[:3]
    index = torch.arange(N)
    first = [(a + torch.eye(N)) / 2 for a in blocks[0].operator(x, None, 0).rows(index).unbind(1)]
    y = blocks[0](x)
    second = [(a + torch.eye(N)) / 2 for a in blocks[1].operator(y, None, 0).rows(index).unbind(1)]
    chains = [(b @ a).mean(1) for a, b in zip(first, second, strict=True)]
    found = contributions(blocks, x, weight)
    torch.testing.assert_close(found[:, 0], chains[0] * x[..., 0])  # channel 0 is of head 0
    mean = (sum(second) / 4 @ (sum(first) / 4)).mean(1)
    assert ((mean * x[..., 0]).sum(1) - found[:, 0].sum(1)).abs().max() > 1e-4


def test_a_readout_of_one_token():
    blocks, x, weight = stack(), tokens(), torch.eye(C, dtype=torch.float64)[:2]
    start = torch.zeros(1, N, dtype=torch.float64)
    start[0, 4] = 1
    y = x
    for block in blocks:
        y = block(y)
    found = contributions(blocks, x, weight, start=start)
    torch.testing.assert_close(found.sum(-1), y[:, 4, :2])


def test_blocks_that_are_not_linear_given_a_are_refused():
    x, weight = tokens(), torch.zeros(2, C, dtype=torch.float64)
    for block in (made(), made(mlp=False), made(mlp=False, vo=False), create_block("attention", C)):
        with pytest.raises(
            ValueError, match="^blocks: block 0 is not linear .* give minimal blocks"
        ):
            contributions([block], x, weight)
    with pytest.raises(ValueError, match=r"^blocks: got \[1, 4\] heads; give blocks with as many"):
        contributions([*stack(heads=1, depth=1), *stack(depth=1)], x, weight)


# ---------------------------------------------------------------------- maps and bad input


def test_maps_of_a_kernel():
    block, x = made(qk="symmetric", heads=2), tokens()
    maps = block.maps(x, (2, 7), 1)
    operator = block.operator(x, None, 0)
    assert isinstance(operator, SoftmaxOperator)
    received = operator.rows(torch.arange(N)).mean(2)[..., 1:]
    torch.testing.assert_close(maps["received"].flatten(2), received)
    q = operator.q[:, :, 1:] - operator.q[:, :, 1:].mean(2, keepdim=True)
    gram = q @ q.transpose(-2, -1)
    first = maps["component"].flatten(2)
    values = torch.linalg.eigvalsh(gram)[..., -1]
    torch.testing.assert_close(gram @ first[..., None], values[..., None, None] * first[..., None])
    assert set(made(qk="separate").maps(x, (2, 7), 1)) == {"received"} and not block.maps(
        x, None, 1
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"qk": "joint"},
            "^qk: got 'joint'; give 'separate', 'collapsed', 'symmetric' or 'cholesky'",
        ),
        ({"norm": "post"}, "^norm: got 'post'; give"),
        ({"residual": "half"}, "^residual: got 'half'; give"),
        ({"heads": 0}, "^heads: got 0"),
        ({"heads": 5}, "^heads: got 5; give a divisor of dim, 32"),
        ({"heads": 2, "qk": "collapsed"}, "^heads: got 2; qk='collapsed' has one matrix"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        made(**options)
