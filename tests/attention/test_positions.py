"""Rotations of queries and keys: a definition pair by pair, and scores of differences of positions."""

import math

import pytest
import torch

from xattn.attention import (
    Attention,
    AxialRotation,
    Rotation,
    create_attention,
    create_mechanism,
)
from xattn.attention.positions import positions


def queries_and_keys(tokens=15, width=12, key_heads=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, tokens, width, generator=generator, dtype=torch.float64)
    k = torch.randn(2, key_heads, tokens, width, generator=generator, dtype=torch.float64)
    return q, k


@pytest.mark.parametrize("prefix", [0, 2])
def test_positions_are_coordinates_on_the_grid_behind_the_prefix(prefix):
    found = positions((2, 3), prefix, torch.zeros(1, dtype=torch.bfloat16))
    grid = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert found.tolist() == [[0, 0]] * prefix + grid and found.dtype == torch.float32
    assert positions((300,), 0, torch.zeros(1).bfloat16())[-1] == 299
    assert positions((2, 3, 4), prefix, torch.zeros(1).double()).shape == (prefix + 24, 3)


@pytest.mark.parametrize(("grid", "width", "base"), [((15,), 6, 1e4), ((3, 5), 12, 100.0)])
def test_each_pair_of_channels_turns_by_its_angle(grid, width, base):
    rotation = AxialRotation(width, len(grid), base)
    q, k = queries_and_keys(width=width)
    places = positions(grid, 0, q)
    turned = rotation(q, k, places)
    pairs = width // (2 * len(grid))
    for x, found in zip((q, k), turned, strict=True):
        expected = torch.empty_like(x)
        for n in range(15):
            for axis in range(len(grid)):
                for m in range(pairs):
                    angle = float(places[n, axis]) * base ** (-m / pairs)
                    c, s = math.cos(angle), math.sin(angle)
                    i = 2 * (axis * pairs + m)
                    expected[..., n, i] = c * x[..., n, i] - s * x[..., n, i + 1]
                    expected[..., n, i + 1] = s * x[..., n, i] + c * x[..., n, i + 1]
        torch.testing.assert_close(found, expected)


def test_gradients_reach_queries_keys_and_positions():
    rotation = AxialRotation(4, 1)
    generator = torch.Generator().manual_seed(0)
    args = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, 3, 4), (1, 1, 3, 4), (3, 1))
    ]
    assert torch.autograd.gradcheck(rotation, args)


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_layer_rotates_grid_tokens_and_leaves_prefix_tokens(prefix):
    torch.manual_seed(0)
    rotation = AxialRotation(12)
    layer = create_attention("softmax", 24, 2, kv_heads=1, rotate=rotation).double()
    x = torch.randn(2, prefix + 15, 24, dtype=torch.float64)
    qkv = layer.qkv(x).unflatten(2, (4, 12)).transpose(1, 2)
    q, k, v = qkv.split((2, 1, 1), 1)
    places = positions((3, 5), 0, x)
    some = rotation(q[:, :, prefix:], k[:, :, prefix:], places)
    q, k = (torch.cat([a[:, :, :prefix], b], 2) for a, b in zip((q, k), some, strict=True))
    y = (q @ k.transpose(-2, -1) / 12**0.5).softmax(-1) @ v
    expected = layer.proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, (3, 5), prefix), expected)
    with pytest.raises(ValueError, match="grid: got None; give the grid of the tokens"):
        layer(x)


def test_a_rotation_with_parameters_is_trained_with_its_layer():
    class Learned(Rotation):
        def __init__(self):
            super().__init__()
            self.frequency = torch.nn.Parameter(torch.tensor([0.3, 0.7]))

        def forward(self, q, k, positions):
            turn = (positions * self.frequency.to(positions)).sum(1, keepdim=True)
            return q * turn.cos(), k * turn.cos()

    layer = create_attention("softmax", 8, 2, rotate=Learned())
    assert "mechanism.rotate.frequency" in layer.state_dict()
    layer(torch.randn(1, 7, 8), (2, 3), 1).square().sum().backward()
    assert layer.mechanism.rotate.frequency.grad.abs().min() > 0


@pytest.mark.parametrize("rotate", ["axial", AxialRotation(4), lambda q, k, places: (q, k)])
def test_a_layer_never_replaces_the_rotation_of_its_mechanism(rotate):
    mechanism = create_mechanism("softmax", 8, 2, rotate="axial")
    with pytest.raises(ValueError, match="rotate: the mechanism already has AxialRotation;"):
        Attention(mechanism, rotate=rotate)
    assert Attention(mechanism).mechanism.rotate is mechanism.rotate


def test_what_does_not_fit_is_refused():
    q, k = queries_and_keys()
    places = positions((3, 5), 0, q)
    for call, words in (
        (lambda: AxialRotation(6), "width, axes: got 6, 2; twice"),
        (lambda: AxialRotation(8, 0), "width, axes: got 8, 0"),
        (lambda: AxialRotation(8, base=0.5), "base: got 0.5"),
        (lambda: AxialRotation(8)(q, k, places), "q: got 15 tokens of width 12; .* width 8"),
        (lambda: AxialRotation(12)(q, k, places[1:]), "q: got 15 tokens .* has 14 positions"),
        (
            lambda: AxialRotation(12, 1)(q, k, places),
            r"positions: got shape \(15, 2\); give \(N, 1\)",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
