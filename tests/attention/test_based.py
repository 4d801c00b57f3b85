"""Based: the Taylor features, what they sum to, causal chunks, and layers that alternate."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, conversion, convert, create_mechanism, record
from xattn.attention.mechanisms.based import taylor_features

HEADS, WIDTH = 2, 8
DIM = HEADS * WIDTH


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(n, batch=2, size=1.0, **more):
    q, k, v = (random(batch, HEADS, n, WIDTH, seed=i) for i in range(3))
    return Inputs(
        (size * q).requires_grad_(), (size * k).requires_grad_(), v.requires_grad_(), **more
    )


def based(**options):
    torch.manual_seed(0)
    layer = create_mechanism("based", DIM, HEADS, **options).double()
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)
    return layer


def defined(layer, asked):
    """A from its definition, every pair of tokens by itself."""
    q, k = asked.q, asked.k
    if layer.q_map is not None:
        q, k = q @ layer.q_map, k @ layer.k_map
    z = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    a = 1 + z + z**2 / 2
    a = a.tril() if asked.causal else a
    return a / a.sum(-1, keepdim=True)


@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_products_of_features_are_the_series_and_no_pair_is_held_twice(width):
    x, y = random(7, width), random(9, width, seed=1)
    z = x @ y.T / width**0.5
    features = taylor_features(x)
    assert features.shape[-1] == 1 + width + width * (width + 1) // 2
    assert torch.allclose(features @ taylor_features(y).T, 1 + z + z**2 / 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize(
    "prefix, grid", [(0, (1,)), (1, (5, 6)), (2, (3, 7)), (5, (9, 9)), (1, (150,))]
)
def test_it_is_what_its_equations_say(prefix, grid, width, causal):
    asked = inputs(prefix + math.prod(grid), grid=grid, prefix=prefix, causal=causal)
    layer = based(width=width)
    a, y = defined(layer, asked), layer.attend(asked)
    assert torch.allclose(y, a @ asked.v, atol=1e-6)
    leaves, g = [asked.q, asked.k, asked.v, *layer.parameters()], random(*y.shape, seed=9)
    expected, found = torch.autograd.grad(a @ asked.v, leaves, g), torch.autograd.grad(y, leaves, g)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_positive_and_sum_to_one_also_where_products_are_large(causal):
    asked = inputs(40, size=1e3, causal=causal)
    rows = based(width=4).operator(asked).rows(torch.arange(40))
    assert torch.allclose(rows.sum(-1), torch.ones(2, HEADS, 40).double())
    assert (rows > -1e-12).all()


def test_no_queries_at_all_give_the_mean_and_small_ones_softmax_to_third_order():
    asked = inputs(20)
    zero = asked.replace(q=torch.zeros_like(asked.q))
    assert torch.allclose(
        based(width=None).attend(zero), asked.v.mean(2, keepdim=True).expand_as(asked.v)
    )
    errors = []
    for size in (0.2, 0.1):
        small = inputs(20, size=size)
        exact = F.scaled_dot_product_attention(small.q, small.k, small.v)
        errors.append((based(width=None).attend(small) - exact).abs().max().item())
    # z is of second order in the size: halving it takes the error to 1 / 64
    assert errors[1] < errors[0] / 40 < 1e-3


@pytest.mark.parametrize("prefix", [0, 2])
def test_odd_layers_are_windows(prefix):
    grid = (6, 7)
    asked = inputs(prefix + 42, grid=grid, prefix=prefix)
    y = based(layer=1, window=10).attend(asked)  # 3 x 3
    assert torch.equal(y, create_mechanism("gna", DIM, HEADS, kernel=3).attend(asked))
    dense = F.scaled_dot_product_attention(asked.q, asked.k, asked.v)
    assert torch.allclose(based(form="window", window=400).attend(asked), dense)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_windows_of_a_row_and_of_a_causal_call_hold_so_many_tokens(prefix):
    n = prefix + 20
    for causal in (False, True):
        asked = inputs(n, prefix=prefix, causal=causal, grid=(4, 5) if causal else None)
        a = based(layer=1, window=7).operator(asked).rows(torch.arange(n))[:, :, prefix:, prefix:]
        count = torch.arange(1, 21).clamp(max=7) if causal else torch.full((20,), 7)
        assert ((a > 0).sum(-1) == count).all()


@torch.no_grad()
def test_layers_of_a_model_alternate_by_their_number():
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=DIM, num_heads=HEADS, depth=5, num_classes=3
    ).eval()
    convert(net, "based", "1-4", {"width": 4, "window": 4})
    forms = [block.attn.mechanism.form for block in list(net.blocks)[1:]]
    assert forms == ["window", "taylor", "window", "taylor"]
    assert len(conversion(net)) == 1 and conversion(net)[0].layers == (1, 2, 3, 4)
    names = [name for name in net.state_dict() if "mechanism" in name]
    assert names == [f"blocks.{i}.attn.mechanism.{x}_map" for i in (2, 4) for x in "qk"]
    with record(net) as calls:
        assert net(torch.randn(2, 3, 64, 64)).isfinite().all()
    assert all(call.maps["received"].shape == (2, 1, 4, 4) for call in calls[1:])


def test_keys_that_are_not_numbers_do_not_reach_earlier_tokens():
    asked = inputs(30, causal=True)
    k = asked.k.detach().clone()
    k[:, :, 20] = torch.nan
    y = based(width=4).attend(asked.replace(k=k))
    assert y[:, :, :20].isfinite().all() and y[:, :, 20:].isnan().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 0}, "width: got 0"),
        ({"window": 0}, "window: got 0"),
        ({"layer": -1}, "layer: got -1"),
        ({"form": "both"}, "form: got 'both'; give 'alternate', 'taylor' or 'window'"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_mechanism("based", DIM, HEADS, **options)
