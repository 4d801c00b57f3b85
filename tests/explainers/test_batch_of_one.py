"""A photo's gradients do not depend on how many photos share its pass: see xattn.backbone.norm_gradients."""

import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from small_networks import cheap
from torch import nn

from xattn import load_backbone
from xattn.backbone.norm_gradients import correct_norm_gradients
from xattn.explainers import create_explainer, explainer_class, list_explainers

# Norms whose incoming gradient lies channels-last, as small as timm makes them.
FAMILIES = {
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 2},
    "levit_128s": {
        **{"img_size": 64, "embed_dim": (16, 24, 32), "num_heads": (1, 2, 2)},
        "depth": (1, 1, 1),
    },
    "nextvit_small": {"depths": (1, 1, 5, 1)},
    "efficientformer_l1": {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 16, 24)},
    "lambda_resnet26t": {"img_size": 32},
}
SIZES = {"efficientformer_l1": 224, "lambda_resnet26t": 32}
# Options with which methods read pixels, and so need no blocks of tokens.
AT_PIXELS = {
    "attn_lrp": {"at": "pixels"},
    "libragrad": {"base": "input_x_gradient", "at": "pixels"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def net(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(request.param, num_classes=7, **FAMILIES[request.param])
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
        return load_backbone(model, input_size=SIZES.get(request.param, 64))


def pictures(net):
    size = net.preprocessing.input_size
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def explained(name, net):
    """The explainer of that name; None where it does not explain the network."""
    try:
        if name in AT_PIXELS:
            return create_explainer(name, net, **AT_PIXELS[name])
        return cheap(name, net)
    except ValueError:
        return None


def test_a_photo_alone_has_the_map_that_it_has_beside_another(net):
    images, tried = pictures(net), set()
    for name in list_explainers():
        cls = explainer_class(name)
        if cls.perturbs or cls.one_by_one or cls.needs_head:  # no gradients, or never two photos
            continue
        explainer = explained(name, net)
        if explainer is None:
            continue
        both, alone = explainer.attribute(images, 3)[:1], explainer.attribute(images[:1], 3)
        assert (both - alone).abs().max() <= 1e-4 * both.abs().max(), name
        tried.add(name)
    assert tried >= {"saliency", "input_x_gradient", "attn_lrp", "libragrad"}


def test_gradients_of_a_pass_are_right_without_an_explainer_as_well(net):
    """As in the training of a head that masks the photo."""

    def gradient(images):
        images = images.clone().requires_grad_()
        return torch.autograd.grad(net.logits(images)[:, 3].sum(), images)[0]

    images = pictures(net)
    both, alone = gradient(images)[:1], gradient(images[:1])
    assert (both - alone).abs().max() <= 1e-4 * both.abs().max()
    net(images)  # and nothing stays behind
    assert (
        F.batch_norm is nn.functional.batch_norm and not torch.overrides._len_torch_function_stack()
    )


# ---------------------------------------------------------------------- the norms themselves

MEAN, VAR = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
WEIGHT, BIAS = torch.linspace(-2, 1, 8), torch.linspace(0, 1, 8)
NORMS = {
    "batch_norm": lambda x: F.batch_norm(x, MEAN.to(x), VAR.to(x), WEIGHT.to(x), BIAS.to(x)),
    "no weights": lambda x: F.batch_norm(x, MEAN.to(x), VAR.to(x), training=False, eps=0.1),
    "module": nn.BatchNorm2d(8).eval(),
    "instance_norm": lambda x: F.instance_norm(x, weight=WEIGHT.to(x), bias=BIAS.to(x)),
    "instance_norm of the run": lambda x: F.instance_norm(
        x, MEAN.to(x), VAR.to(x), use_input_stats=False
    ),
}


def numbers(*size, dtype=torch.float64, seed=0):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NORMS)
def test_gradients_that_lie_channels_last_are_those_of_the_definition(name):
    norm = NORMS[name].double() if name == "module" else NORMS[name]
    images = numbers(1, 8, 4, 4).requires_grad_()
    incoming = numbers(1, 16, 8, seed=1).transpose(1, 2).reshape(1, 8, 4, 4)
    with correct_norm_gradients():
        output = norm(images)
        (got,) = torch.autograd.grad(output, images, incoming)
    assert torch.allclose(output, norm(images.detach()))
    twice = images.detach().repeat(2, 1, 1, 1).requires_grad_()  # which torch does right
    (expected,) = torch.autograd.grad(norm(twice), twice, incoming.repeat(2, 1, 1, 1))
    assert torch.allclose(got, expected[:1])


@pytest.mark.parametrize("size", [(3, 8), (3, 8, 5), (1, 8, 3, 4), (2, 8, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_those_of_torch_in_every_shape_and_precision(size, dtype):
    x = numbers(*size, dtype=dtype)
    own = torch.promote_types(dtype, torch.float32)  # modules in half precision keep float32 norms
    mean, var, weight, bias = (v.to(own) for v in (MEAN, VAR, WEIGHT, BIAS))
    expected = F.batch_norm(x, mean, var, weight, bias)
    weight = weight.clone().requires_grad_()  # also where only a weight is trained
    with correct_norm_gradients():
        got = F.batch_norm(x, mean, var, weight, bias)
    assert got.dtype == expected.dtype == dtype and got.grad_fn.name() != "NativeBatchNormBackward0"
    assert torch.allclose(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_statistics_of_the_batch_are_taken_and_updated_as_ever():
    norm = nn.BatchNorm2d(8)
    x = numbers(2, 8, 3, 3, dtype=torch.float32).requires_grad_()
    with correct_norm_gradients():
        y = norm(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(8), atol=1e-5)
    assert norm.num_batches_tracked == 1 and norm.running_mean.abs().min() > 0


def test_passes_without_gradients_are_torchs_own_to_the_last_bit():
    x = numbers(1, 8, 4, 4, dtype=torch.float32)
    expected = NORMS["batch_norm"](x)
    with correct_norm_gradients():
        assert torch.equal(NORMS["batch_norm"](x), expected)
        with torch.no_grad():
            assert torch.equal(NORMS["batch_norm"](x.clone().requires_grad_()), expected)


def test_it_nests_belongs_to_its_thread_and_ends_after_an_error():
    x = numbers(1, 8, 4, 4).requires_grad_()

    def rewritten():
        return NORMS["batch_norm"](x).grad_fn.name() != "NativeBatchNormBackward0"

    other = []
    with pytest.raises(ZeroDivisionError), correct_norm_gradients():
        with correct_norm_gradients():
            assert rewritten()
        assert rewritten()
        thread = threading.Thread(target=lambda: other.append(rewritten()))
        thread.start()
        thread.join()
        _ = 1 / 0
    assert other == [False] and not rewritten()
