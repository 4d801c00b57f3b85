"""AGUNet, DAUNet and the plain U-Net: limit cases, sizes, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xattn.models.agunet import (
    AGUNet,
    ChannelAttention,
    DualAttention,
    Gate,
    PositionAttention,
)

FEW = (4, 6, 8)
PLAIN = {"gates": False, "multi_scale": False, "deep_supervision": False}


def made(dims=2, filters=FEW, **options):
    """An untrained network in eval mode whose norms are no identities."""
    torch.manual_seed(0)
    net = AGUNet(dims, filters=filters, **options)
    for module in net.modules():
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("size", [(1, 2, 3), (5, 7, 11), (16, 9, 6)])
def test_any_size_gives_a_mask_of_that_size(dims, size):
    net = made(dims, dual=True, guided=True)
    found = net.outputs(torch.rand(2, 1, *size[-dims:]))
    assert found.logits.shape == (2, 1, *size[-dims:]) and found.logits.isfinite().all()
    assert len(found.gates) == 2 and len(found.deep) == 1
    for psi in found.gates:
        assert psi.shape[:2] == (2, 1) and 0 < psi.min() <= psi.max() < 1
    assert found.gates[0].shape[2:] == size[-dims:] and found.gates[1].shape == found.deep[0].shape


def test_axes_of_at_most_four_places_are_not_pooled():
    deepest = made(3, filters=(4, 4, 4, 4)).outputs(torch.rand(1, 1, 4, 9, 16)).deepest
    assert deepest.shape[2:] == (4, 3, 4)  # 9 -> 5 -> 3, 16 -> 8 -> 4


@pytest.mark.parametrize("dims, combine", itertools.product([2, 3], ["concat", "add"]))
def test_with_psi_of_one_it_is_the_plain_net_with_the_same_weights(dims, combine):
    net, plain = made(dims, combine=combine), made(dims, gates=False)
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith("gates.")}
    plain.load_state_dict(weights)
    x = torch.rand(2, 1, *(12, 10, 8)[:dims])
    assert (net(x) - plain(x)).abs().max() > 1e-4
    for gate in net.gates:
        gate.psi[1].weight.data.zero_()
        gate.psi[1].bias.data.fill_(40.0)
    assert torch.equal(net(x), plain(x))


def test_a_gate_is_its_equation():
    torch.manual_seed(0)
    gate = Gate(2, 4, "batch", "concat").eval().double()
    g, x = (torch.randn(1, 4, 3, 3, dtype=torch.float64) for _ in range(2))
    psi = gate(g, x)[0, 0, 1, 2]
    w_g, w_x, w = gate.of_decoder[0], gate.of_skip[0], gate.psi[0]
    both = []
    for part, y in ((w_g, g), (w_x, x)):
        both.append(part.weight[:, :, 0, 0].detach().numpy() @ y[0, :, 1, 2].numpy())
        both[-1] = (both[-1] + part.bias.detach().numpy()) / np.sqrt(1 + 1e-5)
    inner = np.maximum(np.concatenate(both), 0)
    logit = (w.weight[0, :, 0, 0].detach().numpy() @ inner + w.bias.item()) / np.sqrt(1 + 1e-5)
    assert abs(psi.item() - 1 / (1 + np.exp(-logit))) < 1e-12


# ---------------------------------------------------------------------- dual attention


@pytest.mark.parametrize("attention", [PositionAttention(2, 16), ChannelAttention()])
def test_gamma_starts_at_zero_and_the_attention_is_the_identity(attention):
    x = torch.randn(2, 16, 5, 4)
    assert torch.equal(attention(x), x)
    attention.gamma.data.fill_(0.5)
    assert not torch.allclose(attention(x), x)


def test_position_attention_without_keys_adds_the_mean_value():
    torch.manual_seed(0)
    pam = PositionAttention(3, 16).double()
    pam.gamma.data.fill_(0.7)
    pam.key.weight.data.zero_()
    x = torch.randn(2, 16, 3, 4, 2, dtype=torch.float64)
    mean = pam.value(x).mean((2, 3, 4), keepdim=True)
    torch.testing.assert_close(pam(x), x + 0.7 * mean.expand_as(x))


@pytest.mark.parametrize("attention", [PositionAttention(2, 16), ChannelAttention()])
def test_permuted_places_give_permuted_answers(attention):
    torch.manual_seed(0)
    attention.double().gamma.data.fill_(1.3)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    order = torch.randperm(20)
    moved = x.flatten(2)[..., order].unflatten(2, (4, 5))
    torch.testing.assert_close(attention(moved).flatten(2), attention(x).flatten(2)[..., order])


@pytest.mark.parametrize("mean", [True, False])
def test_channel_attention_is_its_equation(mean):
    cam = ChannelAttention(mean).double()
    cam.gamma.data.fill_(1.0)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64) * 0.5
    rows = x[0].flatten(1).numpy().T  # (N, C)
    logits = rows.T @ rows / (4 if mean else 1)
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = rows @ weights + rows
    np.testing.assert_allclose(cam(x)[0].flatten(1).detach().numpy().T, expected, rtol=1e-12)


def test_the_net_says_whether_its_attention_over_channels_is_a_mean():
    x, found = torch.randn(1, 64, 4, 4), []
    for mean in (False, True):
        net = AGUNet(**AGUNet(dual=True, channel_mean=mean).settings)
        net.bottleneck.channel.gamma.data.fill_(1.0)
        found.append(net.bottleneck.channel(x))
    assert not torch.allclose(*found)


def test_the_bottleneck_of_daunet_drops_channels_in_training_alone():
    torch.manual_seed(0)
    dual = DualAttention(2, 8, "batch", 0.5)
    x = torch.randn(2, 8, 4, 4)
    assert not torch.allclose(dual(x), dual(x))
    dual.eval()
    assert torch.equal(dual(x), dual(x))


# ---------------------------------------------------------------------- two and three dimensions


def inflated(net):
    """A 3-D net whose kernels are those of the 2-D ``net`` at their middle, and 0 above and below."""
    deep = AGUNet(**{**net.settings, "dims": 3}).train(net.training)
    state = deep.state_dict()
    for name, value in net.state_dict().items():
        if state[name].ndim == value.ndim:
            state[name] = value
        else:
            state[name].zero_()
            state[name][:, :, state[name].shape[2] // 2] = value
    deep.load_state_dict(state)
    return deep


@pytest.mark.parametrize("options", [{}, PLAIN, {"dual": True, "guided": True, "combine": "add"}])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_flat_net_is_a_deep_one_on_depth_one(options, norm):
    net = made(2, norm=norm, **options).double()
    x = torch.rand(2, 1, 11, 14, dtype=torch.float64)
    deep = inflated(net).double()
    torch.testing.assert_close(deep(x[:, :, None])[:, :, 0], net(x))
    for flat, other in zip(net.outputs(x).gates, deep.outputs(x[:, :, None]).gates, strict=True):
        torch.testing.assert_close(other[:, :, 0], flat)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_no_answer_depends_on_the_batch(norm):
    net = made(2, norm=norm, dual=True).double()
    x = torch.rand(3, 1, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


def test_every_parameter_learns():
    net = made(2, dual=True, guided=True).train()
    for module in net.modules():
        if hasattr(module, "gamma"):
            module.gamma.data.fill_(0.5)  # at 0 its projections get no gradient
    found = net.outputs(torch.rand(2, 1, 16, 16))
    sum(F.softplus(x).mean() for x in (found.logits, *found.deep)).backward()
    for name, p in net.named_parameters():  # a bias before a norm has the gradient 0
        assert p.grad is not None and (p.grad.abs().sum() > 0 or name.endswith("bias")), name


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dims": 4}, "^dims: got 4; give 2 or 3"),
        ({"filters": (8,)}, r"^filters: got \(8,\); give the channels of at least 2 levels"),
        ({"filters": (8, 0)}, "^filters: got 0; give a whole number of at least 1"),
        ({"norm": "layer"}, "^norm: got 'layer'; give 'batch' or 'instance'"),
        ({"combine": "max"}, "^combine: got 'max'; give 'concat' or 'add'"),
        ({"dropout": 1.0}, "^dropout: got 1.0; give a number from 0 to below 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AGUNet(**options)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"^x: got shape \(1, 1, 8, 8, 8\); give \(B, 1, H, W\)"):
        made()(torch.rand(1, 1, 8, 8, 8))
    with pytest.raises(
        ValueError, match=r"^x: got shape \(1, 2, 8, 8, 8\); give \(B, 1, D, H, W\)"
    ):
        made(3)(torch.rand(1, 2, 8, 8, 8))
