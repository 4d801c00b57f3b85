"""Learned rotations: the RoPE equation, axial RoPE as a limit, folding, and every mechanism with them."""

import copy
import math
import pickle

import pytest
import timm
import torch
from small_transformers import photos, tiny
from torch.nn.utils import parametrize

from xattn.attention import (
    Inputs,
    conversion,
    convert,
    create_attention,
    create_mechanism,
    create_rotation,
    folded,
    list_attention,
    list_rotations,
    mechanism_class,
    record,
    revert,
)
from xattn.attention.comrope import ComRope
from xattn.attention.model.spec import format_mechanism, parse_mechanism
from xattn.attention.positions import ROTATIONS, positions, rotate_inputs
from xattn.backbone import converted, load_conversion
from xattn.backbone.conversion import save_conversion
from xattn.config import DistillConfig
from xattn.explainers import create_explainer
from xattn.training.students.distilled import Student

FORMS = ("comrope:form=ap,block=4", "comrope:form=ld,block=4")
CASES = [(name, case) for name in list_rotations() for case in ROTATIONS.entry(name).cases]


def made(text, width=16, num_heads=2, seed=0, **options):
    torch.manual_seed(seed)
    return create_rotation(text, width, num_heads, **options).double()


def tensors(tokens=31, width=16, heads=2, key_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, h, tokens, width, generator=generator, dtype=torch.float64)
        for h in (heads, key_heads)
    )


def places(count=7, axes=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, axes, generator=generator, dtype=torch.float64) - 0.5


# ---------------------------------------------------------------------- the RoPE equation


def broken(rotation, x, y):
    """The largest entry of R(x)^T R(y) - R(y - x)."""
    difference = rotation.matrices(x).mT @ rotation.matrices(y) - rotation.matrices(y - x)
    return float(difference.detach().abs().max())


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("form", ["ap", "ld"])
def test_commuting_matrices_satisfy_the_rope_equation(form, axes):
    rotation = made("comrope", 24, form=form, block=4, axes=axes)
    x, y = 5 * places(9, axes), 5 * places(9, axes, seed=4)
    assert broken(rotation, x, y) < 1e-13
    a = rotation.generators()
    for first in a:
        for second in a:
            torch.testing.assert_close(first @ second, second @ first)
    r = rotation.matrices(x)
    torch.testing.assert_close(r.mT @ r, torch.eye(4, dtype=r.dtype).expand_as(r))
    torch.testing.assert_close(torch.linalg.det(r), torch.ones_like(r[..., 0, 0]))


def test_matrices_that_do_not_commute_break_it():
    rotation = made("liere", block=4)
    x, y = places(), places(seed=4)
    assert broken(rotation, x, y) > 0.1
    first, second = rotation.generators()
    assert (first @ second - second @ first).abs().max() > 1
    x[:, 1] = y[:, 1] = 0  # along one axis it holds
    assert broken(rotation, x, y) < 1e-13


@pytest.mark.parametrize(("name", "case"), CASES)
def test_scores_depend_on_differences_of_places_where_the_entry_says_so(name, case):
    rotation = made(name, **case)
    (q, k), p = tensors(7), places() / 4
    by_places = [
        q @ k.mT for q, k in (rotation(q, k, p), rotation(q, k, p + p.new_tensor([0.2, -0.3])))
    ]
    same = torch.allclose(*by_places, rtol=0, atol=1e-12)
    assert same == ROTATIONS.entry(name).relative


@pytest.mark.parametrize(("name", "case"), CASES)
def test_lengths_stay_and_prefix_tokens_are_left_alone(name, case):
    rotation, (q, k) = made(name, **case), tensors(2 + 20)
    turned = rotation(q, k, rotation.places((4, 5), 2, q))
    for x, found in zip((q, k), turned, strict=True):
        torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(found[:, :, :2], x[:, :, :2])
        assert not torch.allclose(found[:, :, 2:], x[:, :, 2:], atol=0.01)


@pytest.mark.parametrize("text", [*FORMS, "liere:block=4"])
def test_each_token_is_multiplied_by_the_exponential_of_its_matrices(text):
    rotation, (q, k), p = made(text, num_heads=1), tensors(7, heads=4, key_heads=2), places()
    a = rotation.generators()
    for x, found in zip((q, k), rotation(q, k, p), strict=True):
        expected = torch.empty_like(x)
        for t in range(7):
            r = torch.block_diag(
                *(torch.matrix_exp(p[t, 0] * a[0, 0, m] + p[t, 1] * a[1, 0, m]) for m in range(4))
            )
            expected[:, :, t] = x[:, :, t] @ r.mT
        torch.testing.assert_close(found, expected)


def test_blocks_of_two_channels_along_axes_are_axial_rotations():
    axial, rotation = made("axial"), made("comrope:form=ap,block=2,span=null", num_heads=1)
    order = torch.arange(8).view(2, 4).T.flatten()  # axial has the pairs of an axis side by side
    channels = (2 * order[:, None] + torch.arange(2)).flatten()
    rates = (100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)).repeat(2)[order]
    with torch.no_grad():
        rotation.raw.zero_()[0, :, 1, 0] = rates
    (q, k), p = tensors(12), positions((3, 4), 0, torch.zeros(1, dtype=torch.float64))
    found = rotation(q[..., channels], k[..., channels], p)
    for x, y in zip(axial(q, k, p), found, strict=True):
        torch.testing.assert_close(y, x[..., channels])


@pytest.mark.parametrize("text", [*FORMS, "liere:block=4"])
def test_without_matrices_nothing_turns(text):
    rotation, (q, k) = made(text, init_std=0.0), tensors(30)
    turned = rotation(q, k, rotation.places((5, 6), 0, q))
    torch.testing.assert_close(turned, (q, k))
    turned[0].square()[..., :3].sum().backward()
    assert rotation.raw.grad.abs().max() > 0  # and learns from there


@pytest.mark.parametrize("text", FORMS)
def test_few_exponentials_of_coordinates_are_those_of_all_places(text):
    rotation = made(text)
    p = rotation.places((3, 5), 1, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(rotation.rotations(p), rotation.matrices(p))
    p.requires_grad_()
    assert torch.autograd.grad(rotation.rotations(p).square()[..., 0].sum(), p)[0].shape == p.shape


@pytest.mark.parametrize(
    "text", ["comrope:form=ap,block=2", "comrope:form=ld,block=4", "liere:block=4"]
)
def test_gradcheck_through_the_exponential(text):
    rotation, (q, k), p = made(text, 4, 1), tensors(2, 4, 1, 1), places(2)
    names = [name for name, _ in rotation.named_parameters()]

    def run(q, k, *values):
        return torch.func.functional_call(
            rotation, dict(zip(names, values, strict=True)), (q, k, p)
        )

    args = [q[:1], k[:1], *(x.detach() for x in rotation.parameters())]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in args])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", [FORMS[1], "liere:block=4", "axial"])
def test_half_precision_is_rotated_in_float32(text, dtype):
    rotation, (q, k) = made(text), (x.to(dtype) for x in tensors(30))
    p = rotation.places((5, 6), 0, q)
    found, _ = copy.deepcopy(rotation).to(dtype)(q, k, p)
    expected, _ = copy.deepcopy(rotation).to(dtype).double()(q.double(), k.double(), p.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0.02)


# ---------------------------------------------------------------------- places


def test_a_span_holds_every_grid_with_the_prefix_in_its_middle():
    rotation, like = made("comrope", span=2.0), torch.zeros(1, dtype=torch.float64)
    for grid in ((1, 1), (4, 5), (8, 10)):
        p = rotation.places(grid, 2, like)
        assert not p[:2].any() and p.abs().max() < 1
        torch.testing.assert_close(p[2:].mean(0), torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(p[2], 1 / p.new_tensor(grid) - 1)
    assert torch.equal(made("axial").places((2, 3), 1, like), positions((2, 3), 1, like))


def test_jitter_moves_tokens_in_training_by_half_a_token_at_most():
    rotation, like = made("comrope", jitter=3.0), torch.zeros(1, dtype=torch.float64)
    still = rotation.eval().places((4, 10), 1, like)
    torch.manual_seed(0)
    moved = rotation.train().places((4, 10), 1, like)
    tokens = (moved - still) * still.new_tensor([4, 10])
    assert not tokens[0].any() and tokens[1:].abs().max() == pytest.approx(0.5)
    torch.manual_seed(0)
    assert torch.equal(rotation.places((4, 10), 1, like), moved)
    rotation(*tensors(41), moved)  # never outside of the grid


def test_what_does_not_fit_is_refused():
    q, k = tensors(30)
    p = positions((5, 6), 0, q)
    layer = create_attention("softmax", 32, 2, rotate="comrope").double()
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    for call, words in (
        (lambda: made("comrope", 15), "block: got 8 for heads of 15 channels; give an even number"),
        (lambda: made("comrope:block=3", 15), "block: got 3 for heads of 15"),
        (lambda: made("liere:block=6"), "block: got 6 for heads of 16"),
        (lambda: made("axial", 15), "width, axes: got 15, 2; twice"),
        (
            lambda: made("comrope:form=ap,block=16"),
            "block: got 1 blocks of 16 .* 2 axes must divide",
        ),
        (lambda: made("comrope:form=pa"), "form: got 'pa'; give 'ap' or 'ld'"),
        (lambda: made("comrope:init_std=-1"), "init_std: got -1"),
        (lambda: made("comrope:span=0"), "span: got 0; give a positive number, or None"),
        (lambda: made("comrope:jitter=-1"), "jitter: got -1"),
        (lambda: made("comrop"), "rotate: unknown rotation 'comrop'; did you mean comrope"),
        (lambda: made("comrope:blok=2"), r"rotate: .*\(blok\).* did you mean block"),
        (lambda: made("comrope:block"), "rotate: got 'block' in 'comrope:block'"),
        (lambda: made("comrope")(q, k, p), "positions: got 5, outside of the grid, .* -0.5 to 0.5"),
        (lambda: made("comrope")(q, k, p * torch.nan), "positions: got nan, outside of the grid"),
        (
            lambda: made("comrope", axes=1)(q, k, p),
            r"positions: got shape \(30, 2\); give \(N, 1\)",
        ),
        (lambda: made("comrope")(q, k[:, :1], p / 20), "k: got 1 heads; .* num_heads=2"),
        (lambda: layer(x), "grid: got None; give the grid of the tokens"),
        (lambda: layer(x, (5, 7)), "grid: .* holds 35 tokens; got 30"),
        (
            lambda: create_mechanism("softmax", 32, 2, rotate="axial")(q, k[:, :, 1:], k[:, :, 1:]),
            "k: got 29 keys for 30 queries; a rotation needs",
        ),
        (lambda: create_mechanism("softmax", 32, 2, rotate=3), "rotate: got 3; give a name"),
        (
            lambda: convert(tiny().model, "softmax", options={"rotate": made("axial")}),
            "rotate: got AxialRotation.*; give a name",
        ),
        (
            lambda: convert(tiny().model, "spatten", options={"rotate": "axial"}),
            "spatten removes tok",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# ---------------------------------------------------------------------- every mechanism


@pytest.mark.parametrize("name", list_attention())
def test_the_rows_of_every_mechanism_are_those_for_rotated_queries_and_keys(name):
    entry = mechanism_class(name).entry
    torch.manual_seed(0)
    mechanism = create_mechanism(name, 32, 2, rotate=FORMS[1], **entry.cases[0]).double().eval()
    plain = create_mechanism(name, 32, 2, **entry.cases[0]).double().eval()
    plain.load_state_dict(mechanism.state_dict(), strict=False)
    q, k = tensors()
    x = torch.randn(2, 31, 32, dtype=torch.float64)
    inputs = Inputs(q, k, q - k, x, (5, 6), 1)
    turned = rotate_inputs(mechanism.rotate, inputs)
    calls = []
    for m, given in ((mechanism, inputs), (plain, turned)):
        torch.manual_seed(1)
        with record(alone=True) as kept:
            m.attend(given)
        calls.append(kept[0])
    index = torch.tensor([0, 7, 30])
    rows, expected = (call.operator.rows(index) for call in calls)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(rows @ calls[0].value, calls[0].output[:, :, index])


@pytest.mark.parametrize("key_heads", [1, 2])
def test_fewer_key_heads_turn_with_their_queries(key_heads):
    layer = create_attention("softmax", 64, 4, kv_heads=key_heads, rotate="comrope").double()
    assert layer.mechanism.rotate.num_heads == key_heads
    x = torch.randn(2, 31, 64, dtype=torch.float64)
    with record(alone=True) as calls:
        y = layer(x, (5, 6), 1)
    torch.testing.assert_close(folded(layer)(x, (5, 6), 1), y)
    q, k = tensors(30, heads=4, key_heads=key_heads)
    mechanism = create_mechanism("softmax", 64, 4, rotate="comrope").double()
    full = k.repeat_interleave(4 // key_heads, 1)
    torch.testing.assert_close(mechanism(q, k, k, (5, 6)), mechanism(q, full, full, (5, 6)))
    assert len(calls) == 1


def test_causal_tokens_in_a_row_need_no_grid():
    q, k = tensors(9)
    mechanism = create_mechanism("softmax", 32, 2, rotate="comrope:axes=1").double()
    y = mechanism(q, k, k, causal=True)
    torch.testing.assert_close(y[:, :, 0], k[:, :, 0])
    torch.testing.assert_close(mechanism(q, k, k, (9,), causal=True), y)
    with pytest.raises(ValueError, match="grid: got None"):
        create_mechanism("softmax", 32, 2, rotate="comrope").double()(q, k, k, causal=True)


# ---------------------------------------------------------------------- models


def vit(name):
    """A small one of timm, whose layers add as much as in a trained one."""
    torch.manual_seed(0)
    sizes = {"img_size": (32, 48), "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **sizes).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
            if "gamma" in key:
                parameter.fill_(1)
    return model


def pixels(model):
    return torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)


VITS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
)


@pytest.mark.parametrize("name", VITS)
def test_timm_models_with_and_without_rotations_of_their_own(name):
    model = vit(name)
    x = pixels(model)
    before = model(x)
    convert(model, "softmax", options={"rotate": "comrope:form=ap"})
    assert conversion(model)[0].options == {"rotate": "comrope:form=ap"}
    y = model(x)
    assert not torch.allclose(y, before, rtol=0.01)
    quick = folded(model)
    torch.testing.assert_close(quick(x), y)
    torch.testing.assert_close(pickle.loads(pickle.dumps(quick))(x), y)
    with pytest.raises(ValueError, match="model: its rotations are folded"):
        revert(quick)
    with pytest.raises(ValueError, match="model: its rotations are folded"):
        convert(quick, "gna")
    # Without matrices places count for nothing in attention, so the model's own rotation is gone, too.
    convert(model, "softmax", options={"rotate": "comrope:init_std=0"})
    bare = copy.deepcopy(revert(model))
    rope = getattr(bare, "rope", None)
    torch.testing.assert_close(bare(x), before)
    convert(model, "softmax", options={"rotate": "comrope:init_std=0"})
    torch.testing.assert_close(model(x), before) if rope is None else None
    if rope is not None:
        for block in bare.blocks:
            block.attn.register_forward_pre_hook(
                lambda m, args, kwargs: (args, {**kwargs, "rope": None}), with_kwargs=True
            )
        assert not torch.allclose(bare(x), before, rtol=0.01)
        torch.testing.assert_close(model(x), bare(x))


def test_weights_are_shared_and_stay_as_they_were():
    model = convert(vit(VITS[0]), "softmax", "1", {"rotate": "comrope"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quick = folded(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert quick.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    assert quick.blocks[1].attn.proj.weight is model.blocks[1].attn.proj.weight
    own, new = (m.blocks[1].attn.qkv.weight for m in (model, quick))
    assert not torch.allclose(own[:64], new[:64]) and torch.equal(own[128:], new[128:])


def test_blocks_with_channels_that_do_not_turn_or_turn_alike_fold():
    layer = create_attention("softmax", 32, 2, rotate="comrope").double()
    with torch.no_grad():
        raw = layer.mechanism.rotate.raw
        raw[0, 0] = 0
        raw[0, 1, 2:] = raw[0, 1, :, 2:] = 0
        raw[1] = torch.block_diag(*[torch.tensor([[0.0, 1], [0, 0]])] * 4)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(layer)(x, (5, 6)), layer(x, (5, 6)))


def test_what_cannot_be_folded_is_named():
    for layer, words in (
        (create_attention("softmax", 32, 2, rotate="liere"), "model: Attention has no layer with"),
        (create_attention("softmax", 32, 2), "model: Attention has no layer with"),
        (create_attention("gna", 32, 2, qk_norm=True, rotate="comrope"), r"q_norm is between"),
    ):
        with pytest.raises(ValueError, match=words):
            folded(layer)
    layer = create_attention("softmax", 32, 2, rotate="comrope")
    parametrize.register_parametrization(layer.qkv, "weight", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"qkv is a .*a plain nn.Linear"):
        folded(torch.nn.Sequential(layer))


def test_the_name_of_a_conversion_says_the_rotation():
    options = {"rotate": "comrope:form=ap,block=4", "kernel": 3}
    text = format_mechanism("gna", options)
    assert text == 'gna:rotate="comrope:form=ap,block=4",kernel=3'
    assert parse_mechanism(text) == ("gna", options)
    assert parse_mechanism("softmax:rotate=axial") == ("softmax", {"rotate": "axial"})


def test_a_trained_rotation_is_saved_and_loaded_with_its_conversion(tmp_path):
    backbone = tiny()
    options = {"rotate": "comrope:block=4"}
    student = Student(backbone, "softmax", None, options, DistillConfig())
    assert {name.split(".", 1)[1] for name, _ in student.mechanisms.named_parameters()} == {
        "rotate.raw",
        "rotate.direction",
    }
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.5)
    save_conversion(tmp_path / "c", backbone, student.conversion, student.trained(), {})
    images = photos(backbone, dtype=torch.float32)
    loaded = load_conversion(tmp_path / "c", backbone)
    torch.testing.assert_close(loaded.logits(images), student.network.logits(images))
    plain = converted(backbone, "softmax", None, options)
    assert plain.fingerprint != backbone.fingerprint
    assert plain.fingerprint != converted(backbone, "softmax").fingerprint
    torch.testing.assert_close(folded(loaded).logits(images), loaded.logits(images))


def test_explainers_read_rotated_layers():
    backbone = converted(tiny(), "softmax", None, {"rotate": "comrope:block=4"})
    images = photos(backbone, dtype=torch.float32)
    for name in ("rollout", "generic_relevance", "attn_lrp"):
        explainer = create_explainer(name, backbone)
        maps = explainer.attribute(images, torch.tensor([3, 6]))
        assert maps.isfinite().all() and maps.amax() > maps.amin()
        assert explainer.notes == ()


def test_a_compiled_layer_and_the_prior():
    layer = create_attention("softmax", 32, 2, rotate="comrope")
    x = torch.randn(1, 31, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, (5, 6), 1), layer(x, (5, 6), 1))
    prior = layer.mechanism.rotate.prior(layer.mechanism.rotate.places((5, 6), 1, x))
    assert prior.shape == (2, 31) and prior[:, 0].allclose(torch.ones(2)) and prior.amax() <= 1.0001
    assert isinstance(layer.mechanism.rotate, ComRope) and math.isclose(
        layer.mechanism.rotate.span, 1
    )


def test_a_recorded_layer_maps_what_its_rotation_alone_would_read():
    q, k = tensors(31)
    mechanism = create_mechanism("softmax", 32, 2, rotate="comrope").double()
    with record(alone=True) as calls:
        mechanism(q, k, k, (5, 6), 1)
    places = mechanism.rotate.places((5, 6), 1, q)
    means = [x[:, :, 1:].mean(2, keepdim=True).expand(-1, -1, 31, -1) for x in (q, k)]
    a, b = mechanism.rotate(*means, places)
    scores = (a[:, :, 1 + 2 * 6 + 2, None] @ b[:, :, 1:].transpose(-2, -1))[:, :, 0] / 4
    prior = calls[0].maps["prior"]
    torch.testing.assert_close(prior, scores.softmax(-1).unflatten(-1, (5, 6)))
    with record(alone=True) as calls:
        create_mechanism("softmax", 32, 2)(q, k, k, (5, 6), 1)
        create_mechanism("softmax", 32, 2, rotate="comrope:axes=1").double()(q, k, k, (31,))
    assert not any("prior" in call.maps for call in calls)
    layer = create_attention("softmax", 32, 2, rotate="comrope")
    with record(alone=True) as calls:
        layer(torch.randn(1, 31, 32), (5, 6), 1)
    assert calls[0].maps["prior"].shape == (1, 2, 5, 6)


def test_a_mechanism_rotates_raw_queries_and_keys_that_it_is_asked_about():
    q, k = tensors(31)
    raw, options = Inputs(q, k, k, None, (5, 6), 1), {"keep": 12, "block": 4}
    layer = create_mechanism("hip", 32, 2, rotate="comrope", **options).double()
    ready, plain = layer.check_inputs(raw), create_mechanism("hip", 32, 2, **options)
    assert torch.equal(layer.choice(raw).blocks.index, layer.choice(ready).blocks.index)
    rows = [
        m.operator(x).rows(torch.arange(31))
        for m, x in ((layer, raw), (layer, ready), (plain, raw))
    ]
    assert torch.equal(rows[0], rows[1]) and not torch.allclose(rows[0], rows[2])
