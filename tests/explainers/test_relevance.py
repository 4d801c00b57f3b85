"""The relevance engine: every rule against its sums written out, and what is conserved in whole networks."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from xattn import load_backbone
from xattn.cli import main
from xattn.eval.studies.families import FAMILIES, SAMPLE, network
from xattn.explainers import create_explainer
from xattn.explainers.relevance import lrp
from xattn.explainers.relevance.engine import Engine, apply_rules
from xattn.explainers.relevance.linear import in_cache
from xattn.explainers.relevance.rules import (
    COMPOSITES,
    INPUT_RULES,
    RULES,
    Composite,
    alpha_beta_rule,
    epsilon_rule,
    gamma_rule,
    register_rule,
)
from xattn.explaining.provenance import provenance_of


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relevance(function, *inputs, composite="libragrad", out=None):
    """R of each input of ``function``, and of its output, whose gradient is ``out``."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    engine = Engine(composite)
    with engine:
        y = engine.whole(function(*(x.clone() for x in leaves)))
    engine.check("test", "this")
    out = draw(*y.shape, seed=9) if out is None else out
    grads = torch.autograd.grad(y, leaves, out, allow_unused=True)
    found = [x * (0 if g is None else g) for x, g in zip(leaves, grads, strict=True)]
    return [r.detach() for r in found], (y * out).detach()


def close(got, expected, tolerance=1e-10):
    return (got - expected).abs().max() <= tolerance * expected.abs().max()


# ---------------------------------------------------------------------- one linear layer

LOW, HIGH = -2.0, 3.0


def shares(z, bias, rule):
    """The share of each input i, and of a bias, in each output j, from the contributions z_ij (I, J)."""
    whole = z.sum(0) + bias
    up, down = z.clamp(min=0), z.clamp(max=0)
    plus, minus = up.sum(0) + bias.clamp(min=0), down.sum(0) + bias.clamp(max=0)
    if rule == "epsilon":
        return z / (whole + 0.3 * whole.sign())
    if rule == "gamma":
        preferred = torch.where(whole > 0, up, down)
        return (z + 0.7 * preferred) / (whole + 0.7 * torch.where(whole > 0, plus, minus))
    if rule == "alpha_beta":
        return (3 * up / plus).nan_to_num() - (2 * down / minus).nan_to_num()
    return z / whole


LAYER_RULES = {
    "zero": None,
    "epsilon": epsilon_rule(0.3),
    "gamma": gamma_rule(0.7, 0.0),
    "alpha_beta": alpha_beta_rule(3.0, 0.0),
}
CONVOLUTIONS = {
    "linear": (lambda x, w, b: F.linear(x.flatten(1), w.flatten(1), b), (5, 4, 3, 3), (4, 3, 3)),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, 1), (5, 4, 3, 3), (4, 6, 5)),
    "groups": (lambda x, w, b: F.conv2d(x, w, b, 1, 0, 2, 2), (6, 2, 2, 2), (4, 6, 5)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1), (5, 4, 3), (4, 7)),
    "transposed": (lambda x, w, b: F.conv_transpose2d(x, w, b, 2), (4, 5, 2, 3), (4, 3, 2)),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(
            F.conv2d(x, w), torch.ones(5).double(), torch.full((5,), 4.0).double(), b + 1, b, eps=0
        ),
        (5, 4, 3, 3),
        (4, 5, 4),
    ),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("rule", LAYER_RULES)
def test_a_linear_layer_shares_by_its_contributions(kind, rule):
    function, size, shape = CONVOLUTIONS[kind]
    weight, bias = draw(*size), draw(5 if kind != "groups" else 6, seed=1)
    x = draw(1, *shape, seed=2)

    def layer(x):
        return function(x, weight, bias)

    start = layer(torch.zeros_like(x))  # the bias at every place
    unit = torch.eye(x.numel(), dtype=x.dtype).view(-1, *shape)
    z = x.flatten()[:, None] * (layer(unit) - start).flatten(1)
    made = LAYER_RULES[rule]
    (got,), out = relevance(layer, x, composite=Composite(made, made))
    expected = (shares(z, start.flatten(), rule) * out.flatten()).sum(1)
    assert close(got.flatten(), expected)


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "alpha_beta"])
def test_the_engine_keeps_a_layers_output_and_counts_its_bias(rule):
    """Whatever the rule, and whether constants are collected or not."""
    weight, bias, x = draw(5, 4), draw(5, seed=1), draw(1, 4, seed=2)
    plain, made = F.linear(x, weight, bias), LAYER_RULES[rule]
    grads = []
    for weigh in (False, True):
        engine, leaf = Engine(Composite(made, made), weigh=weigh), x.clone().requires_grad_()
        with engine:
            y = engine.whole(F.linear(leaf.clone(), weight, bias))
        assert close(y.detach(), plain, 1e-12)
        grads += torch.autograd.grad(y.sum(), leaf)
    assert close(*grads)
    reached = (x * grads[1]).sum()
    found = engine.balance(float(plain.sum()), float(reached))
    z = x.T * weight.T
    expected = (shares(z, bias, rule) * plain).sum()
    assert float(reached) == pytest.approx(float(expected)) and found.constants != 0
    if rule != "epsilon":  # which absorbs
        assert found.constants == pytest.approx(float(plain.sum() - expected))


@pytest.mark.parametrize("shape", [(), (1,), (3, 70_000), (0, 4)])
def test_parts_in_cache_cover_a_tensor_once(shape):
    x = torch.zeros(shape)
    for part in in_cache(x):
        x[part] += 1
    assert (x == 1).all()


@pytest.mark.parametrize("rule", INPUT_RULES)
@pytest.mark.parametrize("unfolded", [False, True])
def test_input_rules_share_by_weights_and_bounds(rule, unfolded):
    """The first layer as a convolution of patches, and as unfolding and a linear layer."""
    weight, bias = draw(5, 3, 2, 2), draw(5, seed=1)
    x = draw(1, 3, 4, 4, seed=2).clamp(LOW, HIGH)

    def patches(x):
        return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)

    def layer(x):
        x.relevance_bounds = [torch.full_like(x, v) for v in (LOW, HIGH)]
        if unfolded:
            return F.linear(patches(x), weight.flatten(1), bias)
        return F.conv2d(x, weight, bias, 2).permute(0, 2, 3, 1)

    (got,), out = relevance(layer, x, composite=Composite(first=INPUT_RULES[rule]))
    w, seen = weight.flatten(1).T, patches(x).flatten(0, 2)[:, :, None]  # (12, 5), (4, 12, 1)
    parts = {
        "flat": torch.ones_like(w).expand(4, -1, -1),
        "wsquare": (w**2).expand(4, -1, -1),
        "box": seen * w - LOW * w.clamp(min=0) - HIGH * w.clamp(max=0),
    }[rule]
    whole = parts.sum(1, keepdim=True) + (bias**2 if rule == "wsquare" else 0)
    expected = (parts / whole * out.flatten(0, 2)[:, None]).sum(2)
    assert close(patches(got).flatten(0, 2), expected, 1e-4)  # its epsilon is relative


@pytest.mark.parametrize("rule", LAYER_RULES)
def test_a_linear_layer_is_the_same_however_it_is_called(rule):
    weight, x = draw(5, 4), draw(2, 3, 4, seed=1)
    same = Composite(LAYER_RULES[rule], LAYER_RULES[rule])
    forms = [
        lambda x: F.linear(x, weight),
        lambda x: x @ weight.T,
        lambda x: torch.einsum("bni,ji->bnj", x, weight),
        lambda x: torch.matmul(x, weight.mT),
        lambda x: F.conv1d(x.mT, weight[:, :, None]).mT,
        lambda x: torch.addmm(torch.zeros(5).double(), x.flatten(0, 1), weight.T).view(2, 3, 5),
    ]
    first, *others = (relevance(form, x, composite=same)[0][0] for form in forms)
    assert all(close(other, first) for other in others)


# ---------------------------------------------------------------------- functions

SHAPE = (2, 4, 6, 6)
ONE = {
    **{
        name: getattr(F, name)
        for name in "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish hardswish tanh softsign".split()
    },
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2, 0.1, 0.3, 0.4], dtype=x.dtype)),
    "in place": lambda x: F.silu(x, inplace=True),
    "relu_": torch.relu_,
    "gate": lambda x: x * torch.sigmoid(x),
    "squeeze-and-excite": lambda x: x * F.hardsigmoid(x.mean((2, 3), keepdim=True)),
    "exp": lambda x: x * x.exp(),
    "square": lambda x: x.square(),
    "pow": lambda x: x.pow(3),
    "learned power": lambda x: x.clamp(min=0).pow(torch.tensor([3.0], dtype=x.dtype)),
    "root": lambda x: x.abs().sqrt(),
    "x x x": lambda x: x * x * x,
    "star": lambda x: F.relu6(x) * x.flip(1),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "einsum of a list": lambda x: torch.einsum("bchw,bdhw->bcd", [x, x]),
    "matmul": lambda x: x @ x.mT,
    "layer_norm": lambda x: F.layer_norm(x, (6,), draw(6)),
    "group_norm": lambda x: F.group_norm(x, 2, draw(4)),
    "instance_norm": lambda x: F.instance_norm(x, weight=draw(4)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), draw(6)),
    "normalize": lambda x: F.normalize(x, dim=1),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "standardised by hand": lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
    "moments": lambda x: (lambda v, m: (x - m) * (v + 1e-5).rsqrt())(*torch.var_mean(x, 1, keepdim=True)),
    "global response norm": lambda x: x * (x.norm(dim=(2, 3), keepdim=True) / x.norm()),
    "glu": lambda x: F.glu(x, 1),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "layouts": lambda x: F.pixel_shuffle(x.roll(1, 2).flip(3), 2).unfold(2, 3, 2).reshape(2, -1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].movedim(1, 3), align_corners=False),
    "softmax": lambda x: x.softmax(1) * x,
    "attention": lambda x: F.scaled_dot_product_attention(x, x.flip(2), x),
    "in place sum": lambda x: x.add_(x.flip(1)).mul_(2),
    "assigned": lambda x: _assigned(x),
    "lstm": lambda x: LSTM(x.flatten(0, 1))[0],
    "one number": lambda x: (F.gelu(x.abs().mean()) * torch.tanh(x[0, 0].abs().mean())).view(1),
    "live kernel": lambda x: F.conv2d(x, x.mean(0)[:1, None, :3, :3].expand(4, 4, 3, 3)),
}  # fmt: skip
LSTM = nn.LSTM(6, 3, bias=False, bidirectional=True, num_layers=2, batch_first=True).double()


def _assigned(x):
    y = x * 2
    y[:, 0] = x[:, 1] * 3
    return y


@pytest.mark.parametrize("name", ONE)
def test_a_function_conserves_relevance(name):
    x = draw(*SHAPE)
    (got,), out = relevance(ONE[name], x)
    assert float(got.sum()) == pytest.approx(float(out.sum())) and got.abs().sum() > 0
    with torch.no_grad():
        engine = Engine("libragrad")
        leaf = x.clone().requires_grad_()
        with torch.enable_grad(), engine:
            y = ONE[name](leaf.clone())
        assert close(y, ONE[name](x.clone()), 1e-12)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.clamp(min=0.3), torch.cos, lambda x: torch.maximum(x, torch.full_like(x, 0.2))],
)
def test_the_value_at_zero_is_a_constant(function):
    x = draw(*SHAPE)
    engine, leaf = Engine("libragrad", weigh=True), x.requires_grad_()
    with engine:
        y = function(leaf.clone()).sum()
    (grad,) = torch.autograd.grad(y, leaf)
    found = engine.balance(float(y.detach()), float((x * grad).sum()))
    start = function(torch.zeros_like(x)).sum()
    assert found.constants == pytest.approx(float(start)) and found.error < 1e-12


def test_products_share_and_constants_get_nothing():
    x, y = draw(3, 4), draw(3, 4, seed=1)
    (rx, ry), out = relevance(torch.mul, x, y)
    assert close(rx, out / 2) and close(ry, out / 2)
    (rx,), out = relevance(lambda x: x * y / (x.detach() + 9), x)
    assert close(rx, out)
    (rx, ry), out = relevance(lambda x, y: x / (y.abs() + 1), x, y)
    assert close(rx, out) and not ry.any()


@pytest.mark.parametrize("weights", [False, True])
def test_attention_of_a_module_follows_the_rules_of_its_parts(weights):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True).double().requires_grad_(False)
    x, mask = draw(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    plain = module(x, x, x, key_padding_mask=mask)

    def attend(x):
        found, a = module(x, x, x, key_padding_mask=mask, need_weights=weights)
        assert close(found, plain[0], 1e-12) and (a is None or close(a, plain[1], 1e-12))
        return found

    def by_hand(x):
        q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v))
        a = (q @ k.mT / 2).masked_fill(mask[:, None, None], -torch.inf).softmax(-1)
        return module.out_proj((a @ v).transpose(1, 2).flatten(2))

    exact = epsilon_rule(0.0)
    for composite in (Composite(attention="shared"), Composite(exact, exact)):
        (got,), out = relevance(attend, x, composite=composite)
        (expected,), _ = relevance(by_hand, x, composite=composite, out=out / plain[0])
        assert close(got, expected)


def test_the_residual_rule_prefers_the_sums_sign():
    a, b = draw(40), draw(40, seed=1)
    (ra, rb), out = relevance(torch.add, a, b, composite=Composite(residual=0.5))
    za, zb = (torch.where(t * (a + b) > 0, 1.5 * t, t) for t in (a, b))
    assert close(ra, za / (za + zb) * out) and close(ra + rb, out)
    assert ((ra.abs() + rb.abs()) <= 5 * out.abs() + 1e-12).all()


@pytest.mark.parametrize("name", [n for n in COMPOSITES if n != "gradient"])
def test_a_dead_input_gets_nothing(name):
    """A pixel of no weight, an activation of 0, and a unit that is off."""
    weight = draw(6, 3)
    weight[:, 1], weight[2] = 0, 0

    def net(x):
        x.relevance_bounds = [torch.full_like(x, v) for v in (LOW, HIGH)]
        return F.linear(F.gelu(F.linear(x, weight)).square(), draw(4, 6, seed=1))

    x = torch.tensor([[0.7, 0.4, -0.6]], dtype=torch.float64)
    (got,), _ = relevance(net, x, composite=name)
    assert got.isfinite().all() and (name.endswith("flat") or got[0, 1] == 0) and got[0, 0] != 0


def test_a_network_that_reads_again_what_changed_in_place_keeps_its_answer():
    def net(x):
        x = x - 0.5
        F.relu(x, inplace=True)
        return x * 3

    x = draw(3, 4)
    (got,), out = relevance(net, x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(leaf), leaf, out / net(x).where(net(x) != 0, 1.0))
    assert close(got, (leaf * grad).detach())


def _written_over(x):
    """Memory of what linear layers gave is written over, through the tensor and a view of it."""
    y = F.silu(F.conv2d(x, draw(4, 4, 1, 1), draw(4, seed=1)), inplace=True)
    z = F.conv2d(y, draw(6, 4, 1, 1, seed=2), draw(6, seed=3))
    z.flatten(2)[:, :2] = y.flatten(2)[:, 1:3] * 3
    z += F.conv2d(y, draw(6, 4, 1, 1, seed=4))
    u = F.linear(z.movedim(1, 3), draw(5, 6, seed=5))
    u.view(2, -1, 5).mul_(2)
    return F.relu(F.linear(u, draw(3, 5, seed=6)), inplace=True)


def _written_elsewhere(x):
    y = F.silu(F.conv2d(x, draw(4, 4, 1, 1), draw(4, seed=1)))
    z = F.conv2d(y, draw(6, 4, 1, 1, seed=2), draw(6, seed=3))
    z = torch.cat([y[:, 1:3] * 3, z[:, 2:]], 1) + F.conv2d(y, draw(6, 4, 1, 1, seed=4))
    u = F.linear(z.movedim(1, 3), draw(5, 6, seed=5)) * 2
    return F.relu(F.linear(u, draw(3, 5, seed=6)))


@pytest.mark.parametrize("name", [n for n in COMPOSITES if not n.endswith(("flat", "box"))])
def test_writing_in_place_changes_no_relevance(name):
    x = draw(*SHAPE)
    (got,), out = relevance(_written_over, x, composite=name)
    (expected,), same = relevance(_written_elsewhere, x, composite=name)
    assert close(out, same) and close(got, expected)


def _convolved(x):
    return F.conv2d(x, draw(4, 4, 1, 1), draw(4, seed=1))


def _into_constant(x):
    out = torch.zeros_like(x)
    first = out[:, :1]
    out.add_(_convolved(x))
    out.mul_(2)
    return torch.cat([first, out], 1)


def _view_before(x, view):
    y = _convolved(x)
    v = view(y)
    y.mul_(2)
    return torch.cat([v.flatten(1), F.silu(y, inplace=True).flatten(1), y.flatten(1)], 1)


def _view_after(x, view):
    z = F.silu(_convolved(x) * 2)
    return torch.cat([view(z).flatten(1), z.flatten(1), z.flatten(1)], 1)


VIEWS = {
    "slice": lambda y: y[:, :2],
    "flat": lambda y: y.flatten(2),
    "itself": lambda y: y.contiguous(),
    "written": lambda y: y.mul_(1),
}


@pytest.mark.parametrize("composite", ["libragrad", "gamma"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_shows_what_is_written_in_place(name, composite):
    x, view = draw(*SHAPE), VIEWS[name]
    (got,), out = relevance(lambda x: _view_before(x, view), x, composite=composite)
    (expected,), same = relevance(lambda x: _view_after(x, view), x, composite=composite)
    assert close(out, same) and close(got, expected)


@pytest.mark.parametrize("composite", ["libragrad", "gamma"])
def test_activations_are_added_to_a_constant_in_place(composite):
    x = draw(*SHAPE)
    (got,), out = relevance(_into_constant, x, composite=composite)
    (expected,), same = relevance(
        lambda x: _convolved(x)[:, [0, *range(4)]] * 2, x, composite=composite
    )
    assert close(out, same) and close(got, expected)


def _read_and_dropped(x, dropped=True):
    y = F.conv2d(x, draw(4, 4, 1, 1), draw(4, seed=1))
    u = y * 1.0
    if dropped:
        F.silu(y)
    y[:, :2] = 0
    return u + y


@pytest.mark.parametrize("name", ["epsilon", "gamma", "alpha_beta"])
def test_a_result_that_nobody_uses_changes_no_relevance(name):
    (got,), _ = relevance(_read_and_dropped, draw(*SHAPE), composite=name)
    (expected,), _ = relevance(lambda x: _read_and_dropped(x, False), draw(*SHAPE), composite=name)
    assert close(got, expected)


# ---------------------------------------------------------------------- what is not known


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize(
    "function, words",
    [
        (torch.special.i0, "special_i0 in Calls"),
        (Own.apply, "Own"),
        (lambda x: x + x.abs().pow(x), "powers whose exponent is a tensor"),
        (lambda x: F.batch_norm(x, None, None, training=True), "statistics of the batch"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(function, words):
    class Calls(nn.Module):
        def forward(self, x):
            return function(x)

    x = draw(2, 4).requires_grad_()
    engine = Engine("libragrad")
    with engine:
        y = Calls()(x)
    with pytest.raises(ValueError, match=rf"test has no rule for .*{words}.*register_rule"):
        engine.check("test", "this", y.sum())


def test_a_scripted_part_is_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.GELU()))
    with pytest.raises(ValueError, match=r"cannot see into scripted GELU; give the module as it"):
        with apply_rules(net, "libragrad"):
            net(torch.rand(2, 4, requires_grad=True))


def test_a_function_gets_a_rule_in_one_line():
    register_rule("special_i0e", "activation")
    try:
        (got,), out = relevance(lambda x: torch.special.i0e(x) * 1, draw(3, 4))
        assert close(got, out)
    finally:
        del RULES["special_i0e"]
    with pytest.raises(ValueError, match="rule: got 'own'; give one of linear, activation"):
        register_rule("special_i0e", "own")


class Wrong(nn.Module):
    """Has a function that a user took for a linear one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3)

    def forward_taps(self, x):
        x = torch.special.erfcx(self.layer(x))
        return x.sum((2, 3)), (x,)


def test_relevance_that_is_lost_is_told_with_the_function_at_fault():
    register_rule("special_erfcx", "linear")
    try:
        torch.manual_seed(0)
        backbone = load_backbone(Wrong(), input_size=8)
        with pytest.warns(
            UserWarning, match=r"lrp: \d+% of .*most is lost in special_erfcx in Wrong"
        ):
            explainer = create_explainer("lrp", backbone)
        record = provenance_of(backbone, explainer, "crop")["relevance"]
        assert record["in"] == pytest.approx(sum(record.values()) - record["in"])
        assert abs(record["absorbed"]) > 0.05 * abs(record["in"])
    finally:
        del RULES["special_erfcx"]


@pytest.mark.parametrize("warned", [False, True])
def test_measured_relevance_is_warned_of_if_more_is_lost_than_the_limit(monkeypatch, warned):
    torch.manual_seed(0)
    backbone = load_backbone(timm.create_model("test_resnet", num_classes=5), input_size=32)
    lost = create_explainer("lrp", backbone).measured.error
    assert 0 < lost < lrp.LOST
    monkeypatch.setattr(lrp, "LOST", lost * (1 - 1e-6 * warned))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert create_explainer("lrp", backbone).measured.error == lost
    assert ["reaches neither" in str(w.message) for w in seen] == [True] * warned


# ---------------------------------------------------------------------- whole networks

RIGHT = {"libragrad": 1e-7, "epsilon": 1e-3, "gamma": 1e-3, "vit": 1e-3}


def balance(model, size, composite):
    """Where the largest logit went, and how far the engine's logits are from the network's own."""
    x = draw(1, 3, size, size).requires_grad_()
    plain = model(x.detach().clone()).detach()
    engine = Engine(composite, weigh=True)
    with engine:
        logits = model(x.clone())
        score = logits[0, plain[0].abs().argmax()]
    engine.check(composite, "this", score)
    (grad,) = torch.autograd.grad(score, x)
    assert close(logits.detach(), plain, 1e-7)
    with Engine(composite):  # without counting, which takes other ways
        again = model(x.clone())[0, plain[0].abs().argmax()]
    assert close(torch.autograd.grad(again, x)[0], grad, 1e-6), composite
    return engine.balance(float(score.detach()), float((x * grad).sum().detach()))


@pytest.mark.parametrize(
    "family",
    [f if f in SAMPLE else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_relevance_of_every_family_is_conserved(family):
    model, size = network(family)
    for composite, tolerance in RIGHT.items():
        found = balance(model, size, composite)
        assert found.error < tolerance, (composite, found)
    found = balance(model, size, "attn_lrp")  # softmax alone absorbs
    assert found.error < 1e-7 or "attention" in found.fault or "softmax" in found.fault


def mapped_relevance(model, x, composite):
    """R of the image for each picture's logit 2, and those logits."""
    leaf = x.clone().requires_grad_()
    engine = Engine(composite)
    with engine:
        scores = engine.whole(model(leaf.clone()))[:, 2]
    (grad,) = torch.autograd.grad(scores.sum(), leaf)
    return (leaf * grad).detach(), scores.detach()


def test_a_linear_network_gives_each_pixel_its_weight_times_its_value():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )
    model.double().requires_grad_(False)
    x = draw(2, 3, 8, 8)
    expected, _ = mapped_relevance(model, x, "gradient")
    exact = epsilon_rule(1e-13)
    for composite in ("libragrad", "attn_lrp", "res_lrp", Composite(exact, exact)):
        assert close(mapped_relevance(model, x, composite)[0], expected, 1e-9)


@pytest.mark.parametrize("family", ["resnet", "densenet"])
def test_without_epsilon_a_network_of_relus_has_input_times_gradient(family):
    model, size = network(family)
    x = draw(1, 3, size, size)
    expected, _ = mapped_relevance(model, x, "gradient")
    small = epsilon_rule(1e-9)
    assert close(mapped_relevance(model, x, "libragrad")[0], expected, 1e-12)
    assert close(mapped_relevance(model, x, Composite(small, small))[0], expected, 1e-4)


@pytest.mark.parametrize("family", ["resnet", "convnext", "mambaout", "mobilevit"])
def test_without_biases_the_map_sums_to_the_logit(family):
    model, size = network(family)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(("bias", "running_mean", "pos_embed", "cls_token", "beta")):
            value.zero_()
    x = draw(2, 3, size, size)
    for composite, tolerance in (("libragrad", 1e-9), ("gamma", 1e-2)):
        found, logits = mapped_relevance(model, x, composite)
        assert found.flatten(1).sum(1).allclose(logits, rtol=tolerance)


@pytest.mark.parametrize("family", ["repghost", pytest.param("fastvit", marks=pytest.mark.slow)])
def test_merged_branches_change_nothing_without_a_rule_for_linear_layers(family):
    model, size = network(family)
    merged = timm.utils.reparameterize_model(copy.deepcopy(model)).requires_grad_(False)
    x = draw(1, 3, size, size)
    assert len(list(merged.modules())) < len(list(model.modules()))
    for composite in ("libragrad", "attn_lrp"):
        got, expected = (mapped_relevance(m, x, composite)[0] for m in (merged, model))
        assert close(got, expected, 1e-9)


@pytest.mark.parametrize(
    "composite", ["libragrad", "attn_lrp", "res_lrp", "epsilon", "gamma", "vit"]
)
def test_single_precision_is_as_double_precision(composite):
    for family in ("resnet", "mobilevit"):
        model, size = network(family)
        x = draw(2, 3, size, size)
        expected, _ = mapped_relevance(model, x, composite)
        got, _ = mapped_relevance(model.float(), x.float(), composite)
        error = (got - expected).norm() / expected.norm()
        assert error < 1e-3, (family, error)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model, _ = network("resnet")
    return load_backbone(model, input_size=32)


def test_several_places_are_read_in_one_pass_as_one_by_one(net):
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    explainer = create_explainer("lrp", net, max_forward_batch=2)
    targets = torch.tensor([1, 0, 5])
    places = ["pixels", "layer1", "layer3"]
    found = explainer.relevance(images, targets, places)
    assert list(found) == places and found["pixels"].shape == images.shape
    for place, r in found.items():
        alone = create_explainer("lrp", net, at=place)
        assert close(alone.attribute(images, targets), r.sum(1, keepdim=True))
        (kept,) = alone.balance(images[:1], 1)
        assert kept.reached == pytest.approx(float(r[0].sum())) and kept.error < 1e-4
    with pytest.raises(ValueError, match="has no module 'layer9'"):
        explainer.relevance(images, targets, ["layer9"])


def test_making_an_explainer_takes_no_backward_pass(net, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(torch.autograd, "grad")
        explainer = create_explainer("lrp", net)
    found = explainer.measured
    assert found.error < 1e-4 and explainer.facts["relevance"]["in"] == found.score


def test_rewrites_that_keep_the_function_change_nothing(net):
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    last = load_backbone(
        copy.deepcopy(net.model).to(memory_format=torch.channels_last), input_size=32
    )
    for name, options in (
        ("lrp", {}),
        ("lrp", {"composite": "alpha_beta"}),
        ("attn_lrp", {"at": "pixels"}),
    ):
        expected = create_explainer(name, net, **options).attribute(images, 3)
        assert close(create_explainer(name, last, **options).attribute(images, 3), expected)
        assert close(create_explainer(name, net, **options).attribute(images[1:], 3), expected[1:])


def test_fused_attention_is_attention_written_out():
    model = timm.create_model("test_vit3", num_classes=5, img_size=64).double().eval()
    found = []
    for fused in (True, False):
        for layer in model.modules():
            if hasattr(layer, "fused_attn"):
                layer.fused_attn = fused
        x = draw(1, 3, 64, 64).requires_grad_()
        with apply_rules(model, "attn_lrp"):
            score = model(x)[0, 2]
        found.append(torch.autograd.grad(score, x)[0])
    assert close(*found)


def test_a_language_model_conserves_the_logit_at_what_enters_it():
    """RMSNorm, SiLU gates, rotary positions, grouped keys and fused attention, without biases."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    embedded = draw(2, 7, 32).requires_grad_()
    absorbed = {}
    for composite in ("cp_lrp", "attn_lrp", "epsilon"):
        with apply_rules(model, composite):
            score = model(inputs_embeds=embedded).logits[:, -1, 11].sum()
        (grad,) = torch.autograd.grad(score, embedded)
        absorbed[composite] = float((score - (embedded * grad).sum()) / score)
    assert abs(absorbed["cp_lrp"]) < 1e-6  # its norms compute in float32
    assert abs(absorbed["epsilon"]) < 1e-3 and abs(absorbed["attn_lrp"]) > 1e-3
    assert all(p.requires_grad for p in model.parameters())


def test_the_command_tells_what_explains_a_network(capsys):
    assert main(["list", "explainers", "--for", "test_vit3"]) == 0
    told = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    told = dict(told)
    assert told["gradcam"] == "runs" and told["head"] == "needs a trained head"
    assert told["lrp"] == "runs; 0.0% of the logit is absorbed"
    assert told["guided_backprop"].startswith("no: backbone: test_vit3 calls no ReLU")
