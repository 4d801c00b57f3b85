"""FullGrad: complete where it claims to be, and its map is that of the definition."""

import pytest
import torch
import torch.nn.functional as F
from test_gradient_explainers import TARGET, Net, backbone, close
from torch import nn

from xattn import load_backbone
from xattn.explainers import create_explainer

IMAGES = torch.rand(3, 3, 13, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_input_and_biases_sum_to_the_logit_of_a_piecewise_linear_network(norm, activation):
    net = backbone(activation=activation, norm=norm)
    image, biases = create_explainer("fullgrad", net).contributions(IMAGES, TARGET)
    logits = net.logits(IMAGES).gather(1, TARGET[:, None])[:, 0]
    assert close(image + biases, logits) and biases.abs().min() > 0.01 * logits.abs().max()
    alone = create_explainer("fullgrad", net).contributions(IMAGES[:1], 3)
    assert close(alone[0], image[:1]) and close(alone[1], biases[:1])


@pytest.mark.parametrize("name", ["resnet18", "repvgg_a0", "vgg11"])
def test_it_is_complete_on_timms_networks_of_relus(name):
    torch.manual_seed(0)
    net = load_backbone(name, weights=None, input_size=32, num_classes=5).double()
    for key, value in (*net.model.named_parameters(), *net.model.named_buffers()):
        if key.endswith(("bias", "running_mean")):
            value.data.normal_(0, 0.1)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    image, biases = create_explainer("fullgrad", net).contributions(images, 2)
    assert close(image + biases, net.logits(images)[:, 2])


def test_it_is_not_complete_where_an_activation_is_curved():
    net = backbone(activation=nn.SiLU)
    parts = create_explainer("fullgrad", net).contributions(IMAGES, TARGET)
    assert not close(sum(parts), net.logits(IMAGES).gather(1, TARGET[:, None])[:, 0], 1e-2)


def psi(part, size):
    part = part.abs()
    low, high = part.amin((1, 2, 3), keepdim=True), part.amax((1, 2, 3), keepdim=True)
    return F.interpolate((part - low) / (high - low), size, mode="bilinear").sum(1, keepdim=True)


def test_the_map_adds_up_what_every_layer_gives():
    net = backbone(activation=nn.ReLU)
    x = net.normalize(IMAGES).requires_grad_()
    layers, outputs = [net.model.stem, net.model.depthwise, net.model.point], []
    handles = [  # clones, which activations in place leave alone
        layer.register_forward_hook(lambda m, i, z: outputs.append(z) or z.clone())
        for layer in layers
    ]
    score = net.logits_normalized(x).gather(1, TARGET[:, None]).sum()
    for handle in handles:
        handle.remove()
    image, *slopes = torch.autograd.grad(score, [x, *outputs])
    parts = [image * x.detach()]
    parts += [g * m.bias[:, None, None] for g, m in zip(slopes, layers, strict=True)]
    expected = sum(psi(part.detach(), (13, 10)) for part in parts)
    assert close(create_explainer("fullgrad", net).attribute(IMAGES, TARGET), expected)


@pytest.mark.parametrize(
    "name, layer, placed",
    [
        ("test_vit", "blocks.0.mlp.fc2", lambda g, b: (g * b)[:, 1:].mT.unflatten(2, (4, 4))),
        ("test_convnext", "stages.1.blocks.0.mlp.fc1", lambda g, b: (g * b).permute(0, 3, 1, 2)),
        ("test_resnet", "layer1.0.conv1", lambda g, b: g * b[:, None, None]),
        ("test_resnet", "fc", None),
    ],
)
def test_biases_lie_where_their_layer_saw_them(name, layer, placed):
    """All but one bias are 0, so that the map has two parts: tokens, channels last, and no place."""
    torch.manual_seed(0)
    net = load_backbone(name, weights=None, input_size=64, num_classes=5).double()
    for key, value in net.model.named_parameters():
        if value.ndim == 1:  # timm's blocks begin with norms of weight 0
            value.data.fill_(0 if key.endswith("bias") else 1)
    module = net.model.get_submodule(layer)
    module.bias = nn.Parameter(torch.randn(len(module.weight), dtype=torch.float64))
    images, found = torch.rand(2, 3, 64, 64, dtype=torch.float64), []
    handle = module.register_forward_hook(lambda m, i, z: found.append(z) or z.clone())
    x = net.normalize(images).requires_grad_()
    score = net.logits_normalized(x)[:, 1].sum()
    handle.remove()
    image, slope = torch.autograd.grad(score, [x, found[0]])
    expected = psi(image * x.detach(), (64, 64))
    if placed is not None:
        expected = expected + psi(placed(slope, module.bias.detach()), (64, 64))
    assert close(create_explainer("fullgrad", net).attribute(images, 1), expected)


def test_a_number_of_the_answer_is_explained_as_well():
    net = backbone(Net)
    explainer = create_explainer("fullgrad", net)
    image, biases = explainer.contributions(IMAGES, lambda z: z[:, 1] - z[:, 2])
    logits = net.logits(IMAGES)
    assert close(image + biases, logits[:, 1] - logits[:, 2])
