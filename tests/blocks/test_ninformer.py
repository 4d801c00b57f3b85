"""NiNformer's block: its gate, its mixer, other grids, and what is refused."""

import warnings

import pytest
import torch
from torch.autograd.functional import jacobian

from xattn.blocks import create_block

C, GRID, N = 32, (5, 6), 30


def tokens(prefix=0, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, prefix + N, C, generator=generator, dtype=torch.float64)


def made(grid=GRID, **options):
    torch.manual_seed(0)
    return create_block("ninformer", C, grid=grid, token_hidden=7, **options).double().eval()


def zero(*layers):
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def test_a_gate_of_ones_and_a_mixer_that_does_nothing_give_the_normalised_tokens():
    block, n = made(), tokens()
    zero(block.gate, block.token_out, block.channel_mlp.fc2)
    torch.nn.init.ones_(block.gate.bias)
    torch.testing.assert_close(block.gated(n), n)


def test_without_token_weights_every_token_is_on_its_own():
    block = made()
    zero(block.token_out)
    x = tokens(batch=1)
    found = jacobian(lambda x: block(x, GRID).sum(-1), x)[0].abs().sum(-1)[:, 0]  # (N, N)
    assert found.diagonal().min() > 0
    assert not (found - found.diagonal().diag()).any()
    assert jacobian(lambda x: made()(x, GRID).sum(-1), x)[0].abs().sum(-1)[:, 0].min() > 0


def test_the_order_of_tokens_counts():
    block, x = made(), tokens()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert (block(x[:, order], GRID) - block(x, GRID)[:, order]).abs().max() > 1e-2


def test_the_gate_is_linear_in_its_projection_with_the_mixer_held():
    block, n = made(), tokens()
    single = block.gated(n)
    with torch.no_grad():
        block.gate.weight *= 3
        block.gate.bias *= 3
    torch.testing.assert_close(block.gated(n), 3 * single)


def test_its_operator_is_the_jacobian_of_the_token_mlp():
    block = made()
    x = tokens(prefix=2, batch=1)
    n = block.norm(x)[:, 2:]
    places = block.token_norm(n).detach()

    def moved(t):
        inner = t.transpose(1, 2) @ block.token_in.weight.T + block.token_in.bias
        return torch.nn.functional.gelu(inner) @ block.token_out.weight.T

    found = torch.stack(
        [
            jacobian(lambda t, c=c: moved(torch.cat([places[..., :c], t, places[..., c + 1 :]], 2))[0, c],
                     places[..., c : c + 1])[:, 0, :, 0]
            for c in range(C)
        ]
    ).mean(0)  # fmt: skip
    operator = block.operator(x, GRID, 2)
    rows = operator.rows(torch.arange(N + 2))[0, 0]
    assert not rows[:2].any() and not rows[:, :2].any()
    # The mean over channels of W_2 diag(g_c) W_1 is W_2 diag(mean g) W_1.
    torch.testing.assert_close(rows[2:, 2:], found)
    gate = block.gated(block.norm(x), 2).abs().mean(-1)[:, None, 2:]
    torch.testing.assert_close(block.maps(x, GRID, 2)["gate"].flatten(2), gate)


def test_prefix_tokens_are_neither_read_nor_written_by_the_token_mlp():
    block, x = made(), tokens(prefix=2)
    y = block(x, GRID, 2)
    other = x.clone()
    other[:, 0] += 1
    changed = (block(other, GRID, 2) - y).abs().amax((0, 2)) > 0
    assert changed[0] and not changed[1:].any()


def test_repeated_weights_on_repeated_tokens_repeat_the_output():
    block, x = made(), tokens()
    with pytest.warns(UserWarning, match=r"^grid: .* trained on \(5, 6\), .* untuned"):
        larger = block.at_grid((10, 12), "nearest")
    assert larger.token_in.weight.shape == (7, 120) and larger.grid == (10, 12)

    def repeated(t):
        plane = t.unflatten(1, GRID)
        return plane.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)

    found = larger(repeated(x), (10, 12))
    assert (found - repeated(block(x, GRID))).abs().max() < 1e-6


def test_other_grids_need_another_block_which_warns():
    block = made()
    with pytest.raises(ValueError, match=r"^grid: got \(6, 5\); .* weights for \(5, 6\).*at_grid"):
        block(tokens(), (6, 5))
    with pytest.raises(ValueError, match="^grid: ninformer needs the grid"):
        block(tokens())
    with pytest.warns(UserWarning, match="bilinear"):
        larger = block.at_grid((7, 9))
    x = torch.rand(1, 63, C, dtype=torch.float64)
    assert larger(x, (7, 9)).shape == x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = block.at_grid(GRID)
    assert torch.equal(same(tokens(), GRID), block(tokens(), GRID))
    assert block.grid == GRID and block.token_in.weight.shape == (7, N)


def test_one_norm_or_two():
    names = {name.partition(".")[0] for name, _ in made().named_parameters()}
    assert "second_norm" not in names
    assert any(
        name.startswith("second_norm") for name, _ in made(shared_norm=False).named_parameters()
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: made(grid=(0, 6)), "^grid: got 0"),
        (lambda: made(grid=()), r"^grid: got \(\); give 1 to 3 sides"),
        (lambda: made(hidden=0), "^hidden: got 0"),
        (lambda: made(dropout=1.0), "^dropout: got 1.0"),
        (lambda: made().at_grid((30,)), r"^grid: got \(30,\); give 2 sides"),
        (lambda: made().at_grid((6, 6), "bicubic"), "^mode: got 'bicubic'"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
