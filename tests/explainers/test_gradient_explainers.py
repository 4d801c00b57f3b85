"""Gradient explainers and LRP: each against its definition, Captum or a limit case; and contracts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from captum import attr as captum
from torch import nn

from xattn.backbone import Backbone, Preprocessing, load_backbone
from xattn.explainers import create_explainer, gradients, integrated_gradients
from xattn.explainers.relevance.engine import Engine
from xattn.explainers.relevance.rules import Composite, epsilon_rule, gamma_rule

assert gradients and integrated_gradients  # importing them registers them
NAMES = {
    "saliency": {},
    "input_x_gradient": {},
    "guided_backprop": {},
    "integrated_gradients": {"steps": 5},
    "gradient_shap": {"samples": 5, "noise": 0.1},
    "smoothgrad": {"samples": 5},
    "lrp": {},
    "fullgrad": {},
}
SUMS = ["integrated_gradients", "gradient_shap", "smoothgrad"]
TARGET = torch.tensor([3, 0, 4])
SIZE = (13, 10)


class Net(nn.Module):
    """Convolutions, a depthwise one, a residual sum, activations in place, pools, a linear layer."""

    preprocessing = Preprocessing(SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self, activation=nn.ReLU, bias=True, norm=False, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.bn0 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.act0 = activation(inplace=True)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.act1 = activation(inplace=True)
        self.point = nn.Conv2d(6, 6, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.act2 = activation(inplace=True)
        self.classifier = nn.Linear(6, classes, bias=bias)

    def forward_taps(self, x):
        x = F.max_pool2d(self.act0(self.bn0(self.stem(x))), 2)
        y = self.bn2(self.point(self.act1(self.bn1(self.depthwise(x)))))
        y += x
        x = self.act2(y)
        return self.classifier(x.mean((2, 3))), (x,)


class Smooth(nn.Module):
    preprocessing = Net.preprocessing

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Linear(6, 5)

    def forward_taps(self, x):
        x = torch.tanh(0.2 * self.conv(x))
        return self.classifier(x.mean((2, 3))).square(), (x,)


class Straight(nn.Module):
    """f(x) = W x."""

    preprocessing = Net.preprocessing

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(3 * SIZE[0] * SIZE[1], 5, bias=False)

    def forward_taps(self, x):
        return self.classifier(x.flatten(1)), (x,)


def backbone(module=Net, preprocessing=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = module(**options)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                for value in (layer.weight, layer.bias):
                    if value is not None:
                        nn.init.normal_(value, 0.1, 0.6)
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, 0, 0.3)
                nn.init.uniform_(layer.running_var, 0.5, 2)
    return Backbone(model.double(), "tiny", preprocessing or model.preprocessing)


def gradient(model, images, target):
    images = images.clone().requires_grad_()
    logits = model.logits(images).gather(1, target[:, None])
    return torch.autograd.grad(logits.sum(), images)[0]


def close(a, b, tolerance=1e-9):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, *SIZE, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def net():
    normal = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    return backbone(preprocessing=normal, norm=True)


# ---------------------------------------------------------------------- contracts


@pytest.mark.parametrize("name", SUMS)
def test_an_image_never_shares_a_micro_batch_and_draws_by_its_seed(net, images, name):
    explainer = create_explainer(name, net, seed=3, **NAMES[name])
    batch = explainer.attribute(images, TARGET)
    turned = explainer.attribute(images.flip(0), TARGET.flip(0)).flip(0)
    assert torch.equal(turned, batch) and explainer.forwards == 5 and not explainer.perturbs
    other = create_explainer(name, net, seed=4, **NAMES[name]).attribute(images, TARGET)
    assert torch.equal(other, batch) == (name == "integrated_gradients")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_pass_exceeds_max_forward_batch(images, name, size):
    net, seen = backbone(norm=True), []
    explainer = create_explainer(name, net, max_forward_batch=size, **NAMES[name])
    net.model.stem.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    explainer.attribute(images, TARGET)
    assert max(seen) <= size and sum(seen) == 3 * explainer.forwards


@pytest.mark.parametrize("name", SUMS)
def test_memory_that_runs_out_halves_the_steps_of_one_image(images, name):
    net = backbone()
    explainer = create_explainer(name, net, **NAMES[name])
    expected = explainer.attribute(images[:1], 3)

    def fail(module, args):
        if len(args[0]) > 2:
            raise MemoryError("out of memory")

    net.model.stem.register_forward_pre_hook(fail)
    with pytest.warns(RuntimeWarning, match=r"out of memory with 5 images; continuing with 2"):
        got = explainer.attribute(images[:1], 3)
    assert close(got, expected) and explainer.max_forward_batch == 2


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("integrated_gradients", {"steps": 0}, r"steps: got 0; give an int of at least 1"),
        ("integrated_gradients", {"baseline": "blur"}, r"baseline: got 'blur'; give 'black' or"),
        ("gradient_shap", {"noise": -0.1}, r"noise: got -0.1; give the standard deviation"),
        ("gradient_shap", {"baselines": torch.rand(3, 4, 4)}, r"baselines: got \(3, 4, 4\)"),
        ("gradient_shap", {"baselines": torch.ones(2, 3, 1, 1) * 9}, r"baselines: got values in"),
        ("gradient_shap", {"baselines": torch.full((1, 3, 1, 1), torch.nan)}, r"got values in"),
        ("smoothgrad", {"noise": 0}, r"noise: got 0"),
        ("lrp", {"gamma": -1}, r"gamma: got -1; give a finite number of at least 0"),
        ("saliency", {"abs": True}, r"saliency does not take that option"),
    ],
)
def test_bad_options_are_refused(net, name, options, message):
    with pytest.raises(ValueError, match=message):
        create_explainer(name, net, **options)


# ---------------------------------------------------------------------- gradients


def test_saliency_and_input_x_gradient_are_the_gradient_by_hand(net, images):
    expected = gradient(net, images, TARGET)
    got = create_explainer("saliency", net).attribute(images, TARGET)
    assert close(got, expected.abs().amax(1, keepdim=True)) and got.min() >= 0
    got = create_explainer("input_x_gradient", net).attribute(images, TARGET)
    assert close(got, (images * expected).sum(1, keepdim=True)) and got.min() < 0 < got.max()


def test_guided_backprop_equals_captum_where_captum_has_the_rule(net, images):
    got = create_explainer("guided_backprop", net).attribute(images, TARGET)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net.logits(x)

    with pytest.warns(UserWarning, match="backward hooks"):
        expected = captum.GuidedBackprop(Logits()).attribute(
            images.clone().requires_grad_(), TARGET
        )
    assert close(got, expected.abs().amax(1, keepdim=True))
    plain = create_explainer("saliency", net).attribute(images, TARGET)
    assert not torch.allclose(got, plain)


@pytest.mark.parametrize("called", ["nn.ReLU6", "relu6", "hardtanh", "relu_", "Tensor.relu"])
def test_guided_backprop_knows_the_forms_of_relu(images, called):
    functions = {
        "nn.ReLU6": nn.ReLU6(inplace=True),
        "relu6": F.relu6,
        "hardtanh": lambda x: F.hardtanh(x, 0, 6),
        "relu_": torch.relu_,
        "Tensor.relu": lambda x: x.relu(),
    }
    upper = torch.inf if called in ("relu_", "Tensor.relu") else 6

    class One(Straight):
        def forward_taps(self, x):
            x = functions[called](20 * x - 6 + 0)
            return self.classifier(x.flatten(1)), (x,)

    net = backbone(One)
    got = create_explainer("guided_backprop", net).attribute(images, TARGET)
    weight = net.model.classifier.weight[TARGET].view_as(images)
    z = 20 * images - 6
    expected = 20 * weight.clamp(min=0) * ((z > 0) & (z < upper))
    assert close(got, expected.amax(1, keepdim=True)) and (z > 6).any()


def test_guided_backprop_refuses_a_network_without_relu_and_warns_of_others():
    vit = load_backbone("test_vit", weights=None, input_size=64)
    with pytest.raises(ValueError, match=r"calls no ReLU \(activations found: gelu in GELU\)"):
        create_explainer("guided_backprop", vit)
    with pytest.raises(ValueError, match=r"activations found: tanh in Smooth\)"):
        create_explainer("guided_backprop", backbone(Smooth))

    class Mixed(Net):
        def forward_taps(self, x):
            return super().forward_taps(x.sigmoid())

    with pytest.warns(
        UserWarning, match=r"also calls sigmoid in Mixed, which keep their usual derivative"
    ):
        create_explainer("guided_backprop", backbone(Mixed))


# ---------------------------------------------------------------------- sums of gradients


@pytest.mark.parametrize("baseline", ["black", "mean"])
def test_integrated_gradients_are_complete_and_equal_captums(images, baseline):
    net = backbone(Smooth, Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    explainer = create_explainer("integrated_gradients", net, steps=16, baseline=baseline)
    got = explainer.attribute(images, TARGET)
    base = torch.zeros_like(images) + (net.mean.double() if baseline == "mean" else 0)
    difference = net.logits(images) - net.logits(base)
    assert close(got.sum((1, 2, 3)), difference.gather(1, TARGET[:, None])[:, 0], 1e-6)
    expected = captum.IntegratedGradients(net.logits).attribute(images, base, TARGET, n_steps=16)
    assert close(got, expected.sum(1, keepdim=True), 1e-6)  # Captum's weights are float32
    one = create_explainer("integrated_gradients", net, steps=1, baseline=baseline)
    middle = gradient(net, (images + base) / 2, TARGET) * (images - base)
    assert close(one.attribute(images, TARGET), middle.sum(1, keepdim=True))


def test_smoothgrad_is_the_mean_gradient_of_noisy_images(net, images):
    tiny = create_explainer("smoothgrad", net, noise=1e-9).attribute(images, TARGET)
    assert close(tiny, create_explainer("saliency", net).attribute(images, TARGET), 1e-5)
    seen = []
    explainer = create_explainer("smoothgrad", net, samples=40, noise=0.1)
    handle = net.model.stem.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    dim = images[:1] * 0.5
    got = explainer.attribute(dim, 3)
    handle.remove()
    noisy = net.denormalize(torch.cat(seen))
    noise = (noisy - dim).detach()
    assert len(noisy) == 40 and abs(noise.mean()) < 0.002
    assert float(noise.std()) == pytest.approx(0.1 * float(dim.max() - dim.min()), rel=0.02)
    mean = gradient(net, noisy.detach(), torch.full((40,), 3)).mean(0, keepdim=True)
    assert close(got, mean.abs().amax(1, keepdim=True))


def test_gradient_shap_of_a_linear_model_is_exact(images):
    net = backbone(Straight)
    weight = net.model.classifier.weight[TARGET].view_as(images)
    colour = torch.tensor([0.2, 0.7, 0.4], dtype=torch.float64).view(1, 3, 1, 1)
    explainer = create_explainer("gradient_shap", net, samples=3, baselines=colour)
    expected = ((images - colour) * weight).sum(1, keepdim=True)
    assert close(explainer.attribute(images, TARGET), expected)
    noisy = create_explainer("gradient_shap", net, samples=3, baselines=colour, noise=0.2)
    assert not torch.allclose(noisy.attribute(images, TARGET), expected)
    photos = create_explainer("gradient_shap", net, samples=400, baselines=images[:2])
    mean = ((images - images[:2].mean(0)) * weight).sum((1, 2, 3))
    got = photos.attribute(images, TARGET).sum((1, 2, 3))
    spread = ((images[0] - images[1]) * weight).sum((1, 2, 3)).abs() / 2 / 20
    assert ((got - mean).abs() < 4 * spread).all()
    other = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"baselines: got images of \(9, 9\) pixels for images of"):
        create_explainer("gradient_shap", net, baselines=other).attribute(images, TARGET)


def test_gradient_shap_of_one_baseline_tends_to_integrated_gradients(images):
    net = backbone(Smooth)
    black = torch.zeros(1, 3, 1, 1)
    expected = create_explainer("integrated_gradients", net).attribute(images, TARGET)
    errors = []
    for samples in (4, 400):
        shap = create_explainer("gradient_shap", net, samples=samples, baselines=black)
        errors.append(float((shap.attribute(images, TARGET) - expected).norm() / expected.norm()))
    assert errors[1] < 0.1 and errors[1] < errors[0]


# ---------------------------------------------------------------------- LRP


@pytest.mark.parametrize("gamma", [0.0, 0.25, 10.0])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU])
def test_lrp_conserves_relevance_without_biases(images, activation, gamma):
    net = backbone(activation=activation, bias=False)
    explainer = create_explainer("lrp", net, gamma=gamma, epsilon=1e-9)
    got = explainer.attribute(images, TARGET).sum((1, 2, 3))
    logits = net.logits(images).gather(1, TARGET[:, None])[:, 0]
    assert close(got, logits, 1e-6) and logits.abs().min() > 0.1


@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_what_the_biases_keep_is_the_rest_of_the_logit(images, gamma):
    net = backbone(activation=nn.ReLU6)
    biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
    x = images.clone().requires_grad_()
    for bias in biases:
        bias.requires_grad_()
    with Engine(Composite(gamma_rule(gamma, 1e-9), epsilon_rule(1e-9))):
        logit = net.logits(x)[0, 3]
    c, *keeps = torch.autograd.grad(logit, [x, *biases])
    kept = sum(float((b.detach() * k).sum()) for b, k in zip(biases, keeps, strict=True))
    assert abs(kept) > 0.01 * abs(logit)
    assert (images * c).sum().item() + kept == pytest.approx(logit.item(), rel=1e-6)


def test_epsilon_lrp_of_a_relu_network_without_biases_is_input_x_gradient(images):
    net = backbone(bias=False)
    got = create_explainer("lrp", net, gamma=0, epsilon=0).attribute(images, TARGET)
    assert close(got, create_explainer("input_x_gradient", net).attribute(images, TARGET))
    large = create_explainer("lrp", net, gamma=0, epsilon=0.5).attribute(images, TARGET)
    assert large.sum((1, 2, 3)).abs().sum() < 0.9 * got.sum((1, 2, 3)).abs().sum()  # eps absorbs


class Chain(nn.Module):
    """A sequence that Captum's LRP knows."""

    preprocessing = Net.preprocessing

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4, 5)

    def forward(self, x):
        return self.classifier(self.pool(self.layers(x)).flatten(1))

    def forward_taps(self, x):
        return self(x), (self.layers(x),)


def test_epsilon_lrp_equals_captums_on_a_sequence(images):
    net = backbone(Chain)
    got = create_explainer("lrp", net, gamma=0, epsilon=1e-9).attribute(images, TARGET)
    expected = captum.LRP(copy.deepcopy(net.model)).attribute(
        images.clone().requires_grad_(), TARGET
    )
    assert close(got, expected.sum(1, keepdim=True), 1e-6)


def test_the_gamma_rule_of_one_layer_by_its_sums():
    """Inputs and outputs of both signs: contributions of the output's sign count 1 + gamma."""

    class Layer(nn.Module):
        preprocessing = Preprocessing((1, 1), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward_taps(self, x):
            return self.conv(x).flatten(1), (x,)

    net = backbone(Layer)
    images = torch.tensor([0.9, 0.1, 0.7], dtype=torch.float64).view(1, 3, 1, 1)
    x, gamma, signs = (images.flatten() - 0.5).tolist(), 0.7, set()
    weight, bias = net.model.conv.weight.flatten(1).tolist(), net.model.conv.bias.tolist()
    explainer = create_explainer("lrp", net, gamma=gamma, epsilon=0.3)
    for j, z in enumerate(net.logits(images)[0].tolist()):
        parts = [v * w for v, w in zip(x, weight[j], strict=True)] + [bias[j]]
        parts = [p * (1 + gamma) if p * z > 0 else p for p in parts]
        expected = z * sum(parts[:3]) / (sum(parts) + (0.3 if z > 0 else -0.3))
        assert float(explainer.attribute(images, j)) == pytest.approx(expected)
        signs.add(z > 0)
    assert signs == {True, False}


@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_a_batchnorm_is_one_layer_with_its_convolution(images, gamma):
    net = backbone(norm=True)
    folded = backbone(norm=True)
    for conv, norm in (("stem", "bn0"), ("depthwise", "bn1"), ("point", "bn2")):
        layers = (getattr(folded.model, conv), getattr(folded.model, norm))
        setattr(folded.model, conv, nn.utils.fusion.fuse_conv_bn_eval(*layers))
        setattr(folded.model, norm, nn.Identity())
    maps = [
        create_explainer("lrp", model, gamma=gamma, epsilon=0.01).attribute(images, TARGET)
        for model in (net, folded)
    ]
    assert close(*maps)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "tf_efficientnet_lite0", "test_efficientnet", "repvgg_a0", "efficientnet_b0"],
)
def test_lrp_of_timm_networks_conserves_relevance(name):
    """Residual sums, depthwise convolutions, ReLU6, SiLU and squeeze-excite; logits down to 1e-6."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = load_backbone(name, weights=None, input_size=32, num_classes=5).double()
        images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    for key, value in net.model.named_parameters():
        if key.endswith("bias"):
            value.data.zero_()
    for gamma in (0.0, 0.25):
        got = create_explainer("lrp", net, gamma=gamma).attribute(images, 3)
        assert got.shape == (2, 1, 32, 32)
        assert close(got.sum((1, 2, 3)), net.logits(images)[:, 3], 1e-3)


def test_epsilon_is_relative_to_the_layer_and_a_given_one_is_not(images):
    """A network without biases is homogeneous: its relevance is as small as its first weights."""
    net, small = backbone(bias=False), backbone(bias=False)
    with torch.no_grad():
        small.model.stem.weight.mul_(1e-8)
    expected = create_explainer("lrp", net).attribute(images, TARGET)
    got = create_explainer("lrp", small).attribute(images, TARGET)
    assert close(1e8 * got, expected)
    assert close(create_explainer("lrp", small).attribute(images[:1], TARGET[:1]), got[:1])
    absorbed = create_explainer("lrp", small, epsilon=1e-6).attribute(images, TARGET)
    assert absorbed.abs().max() < 0.1 * got.abs().max()


def test_a_module_that_counts_as_false_keeps_its_output(images):
    """As GhostNet's empty shortcuts: an empty ``nn.Sequential`` has no length."""
    net, plain = backbone(), backbone()
    net.model.bn0 = nn.Sequential()
    expected = create_explainer("lrp", plain).attribute(images, TARGET)
    assert torch.equal(create_explainer("lrp", net).attribute(images, TARGET), expected)


@pytest.mark.parametrize("kept", [True, False])
def test_lrp_refuses_statistics_of_the_batch(kept):
    net = backbone(norm=True)
    norm = net.model.bn0
    running = (norm.running_mean.clone(), norm.running_var.clone()) if kept else (None, None)
    norm.forward = lambda x: F.batch_norm(x, *running, training=True)
    with pytest.raises(ValueError, match="no rule for batch_norm with statistics of the batch"):
        create_explainer("lrp", net)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("guided_backprop", "lrp")])
def test_a_vit_is_explained_pixel_by_pixel(name):
    vit = load_backbone("test_vit", weights=None, input_size=64, num_classes=5)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    got = create_explainer(name, vit, **NAMES[name]).attribute(image, 3)
    assert got.shape == (2, 1, 64, 64) and got.isfinite().all() and got.std() > 0
