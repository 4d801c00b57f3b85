"""Every registered mechanism: A V is its output, and every operator method agrees with a dense A."""

import copy
import itertools
import pickle
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from xattn.attention import Inputs, convert, create_attention, create_mechanism, record, revert
from xattn.attention.base import MECHANISMS
from xattn.attention.inputs import on_cpu
from xattn.attention.mechanisms.dma import causal_choice
from xattn.attention.operators.patterns import BandedOperator
from xattn.attention.selection import Blocks, Segment, visible
from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.block_sparse.box import causal
from xattn.runtime.measuring import peak_memory

ENTRIES = MECHANISMS.entries()
CASES = [
    pytest.param(
        entry.name, options, id="-".join([entry.name, *(f"{k}={v}" for k, v in options.items())])
    )
    for entry in ENTRIES
    for options in entry.cases
]
GRID, DIM, HEADS = (5, 6), 32, 2
BY_ALL = {"act", "routing", "spatten"}  # choose keys by what all queries give them, later ones, too


def is_causal(name, options):
    """Whether a case has a causal form, which lays tokens out in a row: no option for each side."""
    return MECHANISMS.entry(name).causal and not any(isinstance(x, tuple) for x in options.values())


def inputs(prefix, grid=GRID, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, HEADS, prefix + grid[0] * grid[1], DIM // HEADS)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).unbind(0)


def tokens(q, seed=5):
    """x for queries (B, H, N, D)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(q.shape[0], q.shape[2], DIM, generator=generator, dtype=torch.float64)
    return x.to(q.dtype)


def given(q, k, v, grid=GRID, prefix=0, **more):
    return Inputs(q, k, v, tokens(q), grid, prefix, **more)


def mechanism(name, options, dtype=torch.float64):
    torch.manual_seed(0)
    made = create_mechanism(name, DIM, HEADS, **options).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("name, options", CASES)
def test_all_questions_to_the_operator_agree_with_its_matrix(name, options, prefix):
    q, k, v = inputs(prefix)
    layer = mechanism(name, options)
    asked = given(q, k, v, prefix=prefix)
    operator = layer.operator(asked)
    n = q.shape[2]
    assert operator.shape == (2, HEADS, n, n)
    a = operator.rows(torch.arange(n))
    local = layer.local(asked)
    output = layer(q, k, v, GRID, prefix, x=asked.x)
    assert torch.allclose(a @ v + (0 if local is None else local), output, atol=1e-10)
    x = torch.randn(2, HEADS, n, 3, dtype=q.dtype)
    assert torch.allclose(operator.matvec(x), a @ x, atol=1e-10)
    some = torch.tensor([n - 1, 0, 3])
    assert torch.allclose(operator.rows(some), a[:, :, some], atol=1e-10)
    assert torch.allclose(operator.row_sums(), a.sum(-1), atol=1e-10)
    rows, columns = slice(2, 9), slice(1, 20)
    assert torch.allclose(operator.tile(rows, columns), a[:, :, rows, columns], atol=1e-10)
    r = torch.randn(2, 3, n, dtype=q.dtype)
    expected = torch.einsum("brn,bhns->bhrs", r, a)
    assert torch.allclose(operator.vecmat(r), expected, atol=1e-9)
    assert torch.allclose(operator.vecmat(r, "mean"), expected.mean(1), atol=1e-9)
    own = torch.randn(2, HEADS, 3, n, dtype=q.dtype)
    assert torch.allclose(operator.vecmat(own), own @ a, atol=1e-9)


@pytest.mark.parametrize("count", [1, 17])
@pytest.mark.parametrize("name, options", CASES)
def test_gradient_weighted_rows_take_any_number_of_row_vectors(name, options, count):
    q, k, v = inputs(1)
    operator = mechanism(name, options).operator(given(q, k, v, prefix=1))
    n = q.shape[2]
    grad, r = torch.randn_like(v), torch.randn(2, count, n, dtype=q.dtype)
    e = (operator.rows(torch.arange(n)) * (grad @ v.transpose(-2, -1))).clamp_min(0).mean(1)
    assert torch.allclose(operator.gradient_vecmat(v, grad, r), r @ e, atol=1e-9)


@pytest.mark.parametrize("name, options", CASES)
def test_the_facts_that_an_operator_states_hold(name, options):
    q, k, v = inputs(1)
    operator = mechanism(name, options).operator(given(q, k, v, prefix=1))
    rows = operator.rows(torch.arange(31))
    if operator.stochastic:
        assert torch.allclose(rows.sum(-1), torch.ones(2, HEADS, 31, dtype=q.dtype))
    assert operator.signed or (rows >= 0).all()
    if operator.causal:
        assert (rows.triu(1) == 0).all()


@pytest.mark.parametrize("name, options", CASES)
def test_a_detached_operator_answers_alike_without_a_graph(name, options):
    q, k, v = (x.requires_grad_() for x in inputs(1))
    operator = mechanism(name, options).operator(given(q, k, v, prefix=1))
    twin = operator.detach()
    assert torch.equal(twin.matvec(v), operator.matvec(v))
    assert not twin.rows(torch.arange(3)).requires_grad
    assert not any(loss.requires_grad for loss in twin.aux.values())
    assert all(loss.ndim == 0 and loss.isfinite() for loss in operator.aux.values())


@pytest.mark.parametrize("name, options", CASES)
def test_it_trains_and_gradients_are_right(name, options):
    grid = (4, 4)
    q, k, v = (x.requires_grad_() for x in inputs(1, grid, batch=1))
    x = tokens(q).requires_grad_()
    layer = mechanism(name, options)
    assert torch.autograd.gradcheck(
        lambda q, k, v, x: layer(q, k, v, grid, 1, x=x), (q, k, v, x), atol=1e-5, fast_mode=True
    )
    with record() as calls:
        y = layer(q, k, v, grid, 1, x=x)
    (y.square().sum() + sum(calls[0].aux.values())).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("name, options", CASES)
def test_a_batch_equals_its_images_and_single_precision_is_near(name, options):
    q, k, v = inputs(2, batch=3)
    x = tokens(q)
    layer = mechanism(name, options)
    whole = layer(q, k, v, GRID, 2, x=x)
    for i in range(3):
        one = layer(*(t[i : i + 1] for t in (q, k, v)), GRID, 2, x=x[i : i + 1])
        assert torch.allclose(one[0], whole[i], atol=1e-10)
    single = copy.deepcopy(layer).float()
    found = single(q.float(), k.float(), v.float(), GRID, 2, x=x.float())
    assert torch.allclose(found.double(), whole, atol=1e-3)


@pytest.mark.parametrize("name, options", CASES)
def test_the_scale_of_the_scores_is_the_one_given(name, options):
    q, k, v = inputs(1)
    layer, x = mechanism(name, options), tokens(q)
    width = q.shape[-1]
    plain = layer(q, k, v, GRID, 1, x=x)
    assert torch.allclose(layer(q, k, v, GRID, 1, width**-0.5, x=x), plain)


@pytest.mark.parametrize("name, options", CASES)
def test_values_of_another_width(name, options):
    q, k, v = inputs(1)
    layer, x = mechanism(name, options), tokens(q)
    wide = torch.cat([v, v[..., :3]], -1)
    if "values" in MECHANISMS.get(name).reads:
        with pytest.raises(ValueError, match=f"v: got width 19; {name} needs 16"):
            layer(q, k, wide, GRID, 1, x=x)
        return
    y = layer(q, k, wide, GRID, 1, x=x)
    assert torch.allclose(y[..., :16], layer(q, k, v, GRID, 1, x=x), atol=1e-10)
    assert torch.allclose(y[..., 16:], y[..., :3], atol=1e-10)


@pytest.mark.parametrize("name, options", CASES)
def test_shared_keys_equal_repeated_ones(name, options):
    q, k, v = inputs(1)
    layer, x = mechanism(name, options), tokens(q)
    y = layer(q, k[:, :1], v[:, :1], GRID, 1, x=x)
    if MECHANISMS.entry(name).grouped:  # heads of a group may also share what they choose
        asked = given(q, k[:, :1], v[:, :1], prefix=1)
        operator = layer.operator(asked)
        a = operator.rows(torch.arange(31))
        assert torch.allclose(y, a @ v[:, :1], atol=1e-10)
        r = torch.randn(2, HEADS, 3, 31, dtype=q.dtype)
        assert torch.allclose(operator.vecmat(r), r @ a, atol=1e-9)
        assert torch.allclose(operator.row_sums(), a.sum(-1), atol=1e-10)
    else:
        both = [t[:, :1].expand(-1, HEADS, -1, -1) for t in (k, v)]
        assert torch.allclose(y, layer(q, *both, GRID, 1, x=x), atol=1e-10)


@pytest.mark.parametrize("name, options", CASES)
def test_heads_that_cannot_share_keys_evenly_are_refused(name, options):
    q, k, v = inputs(1)
    three = torch.cat([q, q[:, :1]], 1)
    layer = create_mechanism(name, 48, 3, **options)
    with pytest.raises(ValueError, match="k: got 2 heads for 3"):
        layer(three, k, v, GRID, 1, x=torch.zeros(2, 31, 48))


@pytest.mark.parametrize("name, options", CASES)
def test_other_keys_than_the_queries_own_work_or_are_refused(name, options):
    q, k, v = inputs(0)
    few = q[:, :, :4]
    layer, x = mechanism(name, options), tokens(few)
    if not MECHANISMS.entry(name).cross:
        with pytest.raises(ValueError, match="k: got 30 keys for 4 queries"):
            layer(few, k, v, (4,), x=x)
        return
    asked = Inputs(few, k, v, x)
    a = layer.operator(asked).rows(torch.arange(4))
    assert a.shape == (2, HEADS, 4, 30)
    assert torch.allclose(layer(few, k, v, x=x), a @ v, atol=1e-10)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_causal_call_sees_nothing_later_or_is_refused(entry):
    q, k, v = (x.requires_grad_() for x in inputs(0))
    layer, x = mechanism(entry.name, entry.cases[0]), tokens(q).requires_grad_()
    if not entry.causal:
        with pytest.raises(ValueError, match=f"causal: {entry.name} has no causal form"):
            layer(q, k, v, None if 0 in entry.grid else GRID, x=x, causal=True)
        return
    asked = Inputs(q, k, v, x, (30,), causal=True)
    operator = layer.operator(asked)
    a = operator.rows(torch.arange(30))
    y = layer(q, k, v, (30,), x=x, causal=True)
    assert operator.causal and torch.allclose(y, a @ v, atol=1e-10)
    assert (a.triu(1) == 0).all()
    r = torch.randn(2, 3, 30, dtype=q.dtype)
    assert torch.allclose(operator.vecmat(r), torch.einsum("brn,bhns->bhrs", r, a), atol=1e-9)
    found = torch.autograd.grad(y[:, :, :11].sum(), (q, k, v, x), allow_unused=True)
    for gradient in found[:3]:
        assert (gradient[:, :, 11:] == 0).all() and gradient.abs().sum() > 0
    assert found[3] is None or (found[3][:, 11:] == 0).all()
    few = [x.detach()[:1, :, :12].requires_grad_() for x in (q, k, v)]
    few.append(x.detach()[:1, :12].requires_grad_())
    assert torch.autograd.gradcheck(
        lambda *t: layer(*t[:3], (12,), x=t[3], causal=True), few, atol=1e-5, fast_mode=True
    )


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("name, options", [c for c in CASES if is_causal(*c.values)])
def test_later_tokens_change_no_row_of_a_causal_call_and_no_choice(name, options, prefix):
    q, k, v = inputs(prefix)
    layer = mechanism(name, options)
    asked = given(q, k, v, (30,), prefix, causal=True)
    a, y = layer.operator(asked).rows(torch.arange(q.shape[2])), layer.attend(asked)
    assert (a.triu(1) == 0).all()
    assert torch.allclose(y, a @ v, atol=1e-10)
    if name in BY_ALL:
        return
    for at in (prefix + 2, prefix + 17):
        later = (torch.arange(prefix + 30) > at)[:, None]
        moved = {key: getattr(asked, key) for key in "qkvx"}
        moved = {key: torch.where(later, 3 * x.flip(0), x) for key, x in moved.items()}
        found = layer.attend(asked.replace(**moved))
        assert torch.allclose(found[:, :, : at + 1], y[:, :, : at + 1], atol=1e-10)
        assert not torch.allclose(found, y)


@pytest.mark.parametrize("name, options", CASES)
def test_paths_for_other_devices_than_a_cpu_give_the_same_numbers(name, options, monkeypatch):
    layer, found = mechanism(name, options), []
    forms = [(GRID, False), ((30,), True)] if is_causal(name, options) else [(GRID, False)]
    for _ in range(2):
        for grid, late in forms:
            leaves = [x.requires_grad_() for x in inputs(2)]
            asked = given(*leaves, grid, 2, causal=late)
            y, operator = layer.attend(asked), layer.operator(asked)
            own = (
                operator.rows(torch.tensor([31, 0, 7, 2])),
                operator.tile(slice(1, 9), slice(3, None)),
            )
            product = operator.vecmat(torch.ones(2, 20, 32).double().cumsum(1))
            grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
            found.append((y, *grads, *own, product))
        for module in [m for m in sys.modules.values() if getattr(m, "on_cpu", 0) is on_cpu]:
            monkeypatch.setattr(module, "on_cpu", lambda x: False)
    for expected, others in zip(found, found[len(forms) :], strict=False):
        for a, b in zip(expected, others, strict=True):
            assert a is b is None or torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("name, options", CASES)
def test_keys_that_are_no_numbers_end_the_call(name, options):
    q, k, v = inputs(1)
    k[:, :, 5] = torch.nan
    layer, x = mechanism(name, options), tokens(q)
    if options.get("regions") == "recruited":  # by clusters of the keys
        with pytest.raises(ValueError, match="points: .* finite numbers"):
            layer(q, k, v, GRID, 1, x=x)
    else:
        assert layer(q, k, v, GRID, 1, x=x).shape == q.shape


@pytest.mark.parametrize("name, options", CASES)
def test_layers_work_under_gradient_checkpointing(name, options):
    layer, x = create_attention(name, DIM, HEADS, **options), torch.randn(1, 31, DIM)
    expected = torch.autograd.grad(layer(x, GRID, 1).square().sum(), layer.qkv.weight)[0]
    y = checkpoint(layer, x, GRID, 1, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), layer.qkv.weight)[0]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name, options", CASES)
def test_recorded_calls_and_layers_can_be_pickled_and_stay_small(name, options):
    layer, x = create_attention(name, DIM, HEADS, **options), torch.randn(1, 31, DIM)
    before = len(pickle.dumps(layer))
    with record() as calls, torch.no_grad():
        y = layer(x, GRID, 1)
    (twin,) = pickle.loads(pickle.dumps(calls))
    assert torch.allclose(twin.operator.matvec(twin.value), calls[0].output, atol=1e-5)
    assert twin.maps.keys() == calls[0].maps.keys()
    assert len(pickle.dumps(layer)) == before
    assert torch.allclose(copy.deepcopy(layer)(x, GRID, 1), y, atol=1e-6)


@pytest.mark.parametrize("name, options", CASES)
def test_a_layer_records_its_operator_and_maps(name, options):
    torch.manual_seed(0)
    layer = create_attention(name, DIM, HEADS, qk_norm=True, **options)
    x = torch.randn(2, 31, DIM)
    plain = layer(x, GRID, 1)
    with record() as calls:
        recorded = layer(x, GRID, 1)
    assert torch.allclose(plain, recorded, atol=1e-5)
    (call,) = calls
    assert torch.allclose(call.operator.matvec(call.value), call.output, atol=1e-5)
    for name, found in call.maps.items():
        assert found.shape[0] == 2 and found.shape[2:] == GRID, name
        assert found.isfinite().all() and not found.requires_grad


@pytest.mark.parametrize("name, options", CASES)
def test_recording_builds_the_operator_once(name, options, monkeypatch):
    layer = create_attention(name, DIM, HEADS, **options)
    built, make = [], type(layer.mechanism).operator
    monkeypatch.setattr(
        type(layer.mechanism),
        "operator",
        lambda self, given: built.append(1) or make(self, given),
    )
    with record() as calls:
        layer(torch.randn(1, 31, DIM), GRID, 1)
    assert calls[0].maps is calls[0].maps and built == [1]


@pytest.mark.parametrize("name, options", CASES)
def test_a_saved_layer_computes_the_same_when_loaded(name, options, tmp_path):
    layer, x = create_attention(name, DIM, HEADS, **options), torch.randn(1, 31, DIM)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    twin = create_attention(name, DIM, HEADS, **options)
    twin.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(twin(x, GRID, 1), layer(x, GRID, 1))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_layer_that_never_ran_compiles_as_one_graph_forward_and_backward(entry):
    grid = (7, 3)  # of no other test, so that no plan of it is kept
    layer = create_attention(entry.name, DIM, HEADS, **entry.cases[0]).eval()
    x = torch.randn(1, 22, DIM, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x, grid, 1)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    expected = layer(x, grid, 1)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(found, torch.autograd.grad(expected.square().sum(), x)[0], atol=1e-4)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=(80, 96), embed_dim=DIM, num_heads=HEADS, depth=2,
        num_classes=3,
    ).eval().to(torch.zeros(()).device)  # fmt: skip


@pytest.mark.parametrize("name, options", CASES)
def test_a_vit_is_converted_and_reverted(name, options, vit):
    x = torch.randn(2, 3, 80, 96)
    before = vit(x)
    try:
        torch.manual_seed(0)
        convert(vit, name, options=options)
        with torch.no_grad(), record(vit) as calls:
            logits = vit(x)
        assert logits.isfinite().all() and len(calls) == 2
        assert calls[0].operator.shape == (2, HEADS, 31, 31)
        vit(x).sum().backward()
    finally:
        revert(vit)
    assert torch.equal(vit(x), before)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_registry_says_what_it_is(entry):
    assert entry.paper and "N" in entry.complexity and entry.cases and entry.bench


# ---------------------------------------------------------------------- limit cases


def dense(q, k, v, bias=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize("prefix", [0, 2])
def test_gna_over_the_whole_grid_is_dense(prefix):
    q, k, v = inputs(prefix)
    layer = mechanism("gna", {"kernel": GRID, "backend": "cpu"})
    assert torch.allclose(layer(q, k, v, GRID, prefix), dense(q, k, v))


def test_gna_with_stride_as_kernel_is_attention_in_windows():
    q, k, v = inputs(0, (6, 8))
    y = mechanism("gna", {"kernel": (3, 4), "stride": (3, 4), "backend": "cpu"})(q, k, v, (6, 8))
    windows = (
        x.unflatten(2, (2, 3, 2, 4)).permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5) for x in (q, k, v)
    )
    expected = dense(*windows).unflatten(4, (3, 4)).permute(0, 1, 2, 4, 3, 5, 6).flatten(2, 5)
    assert torch.allclose(y, expected)


@pytest.mark.parametrize(
    "grid, options",
    [((11,), {"kernel": 4}), ((9, 10), {"kernel": 3, "dilation": 3}), ((3, 4, 5), {"kernel": 2})],
)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_gna_sees_exactly_the_kernel(grid, options, backend):
    generator = torch.Generator().manual_seed(0)
    n = torch.Size(grid).numel()
    q, k = torch.randn(2, 1, HEADS, n, 16, generator=generator, dtype=torch.float64)
    a = (
        mechanism("gna", {**options, "backend": backend})
        .operator(Inputs(q, k, k, None, grid))
        .rows(torch.arange(n))
    )
    assert ((a > 0).sum(-1) == options["kernel"] ** len(grid)).all()
    i, j = (a[0, 0] > 0).nonzero().unbind(-1)
    at = torch.stack(torch.unravel_index(torch.stack([i, j]), grid))
    assert ((at[:, 0] - at[:, 1]) % options.get("dilation", 1) == 0).all()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("causal", [False, (True, False)])
def test_gna_in_bands_of_queries_equals_the_definition(causal, prefix):
    grid = (16, 17)
    q, k, v = (x.requires_grad_() for x in inputs(prefix, grid, batch=1))
    found = []
    for backend in ("auto", "reference"):
        layer = mechanism("gna", {"kernel": 5, "causal": causal, "backend": backend})
        operator = layer.operator(given(q, k, v, grid, prefix))
        assert isinstance(operator, BandedOperator) == (backend == "auto")
        y = layer(q, k, v, grid, prefix)
        found.append((y, operator.matvec(v), *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for bands, definition in zip(*found, strict=True):
        assert torch.allclose(bands, definition, atol=1e-10)


def test_gna_is_causal_in_the_dimensions_asked_for():
    q, k, _ = inputs(0)
    layer = mechanism("gna", {"kernel": 3, "causal": (True, False), "backend": "cpu"})
    a = layer.operator(Inputs(q, k, k, None, GRID)).rows(torch.arange(30)).unflatten(-1, GRID)
    a = a.unflatten(2, GRID)
    for y in range(GRID[0]):
        assert (a[:, :, y, :, y + 1 :] == 0).all() and (a[:, :, y, :, y] > 0).any()


MEMORY = [
    ("softmax", {}, True, 1 / 4),
    ("act", {"alpha": 1.2}, None, 1),
    ("act", {"alpha": 1.2, "stride": 8}, None, 1),
    ("based", {"width": 4}, None, 1 / 4),
    ("flow", {}, None, 1 / 4),
    ("freeswim", {"kernel": 4, "refresh": 1}, False, 1 / 2),
    ("freeswim", {"kernel": 4, "refresh": 2}, False, 1 / 2),
    ("hip", {"keep": 128, "block": 16}, False, 1 / 4),
    ("infllm_v2", {"selected": 3, "local": 0}, False, 1 / 5),  # 4 windows of 16 patches in 64 x 64
    ("landmark", {"block": 4, "selected": 5}, False, 1 / 4),
    ("lla", {"iterations": 2, "tolerance": 0.5}, None, 1),
    ("llsa", {"selected": 4, "levels": 2}, False, 1 / 4),
    ("localist", {}, False, 1 / 4),
    ("lssar", {}, None, 1),
    ("routing", {}, None, 1),
    ("spatten", {"values": 0.5}, None, 1),
]


@pytest.mark.parametrize(
    "name, options, causal, share",
    [
        (name, options, form, share)
        for name, options, only, share in MEMORY
        for form in ((False, True) if only is None else (only,))
    ],
)
def test_no_square_matrix_is_stored(name, options, causal, share):
    n, grid = 4096, None if causal else (64, 64)
    q, k, v = (x.float()[:1, :1] for x in inputs(0, (64, 64)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    layer, r = create_mechanism(name, 16, 1, **options), torch.ones(1, 1, n)

    def run():
        layer(*leaves, grid, causal=causal).sum().backward()
        with torch.no_grad():
            if name in ("freeswim", "localist"):  # their maps, with a token that is no patch
                with record() as calls:
                    layer(*(torch.cat([x[:, :, :1], x], 2) for x in (q, k, v)), grid, 1)
                assert calls[0].maps
            operator = layer.operator(Inputs(q, k, v, None, grid, causal=causal))
            operator.vecmat(r), operator.rows(torch.tensor([5, n - 1]))

    assert peak_memory(run) < share * 4 * n * n


def test_gna_locality_is_the_dense_mass_inside_the_window():
    q, k, v = inputs(1)
    layer = mechanism("gna", {"kernel": 3})
    seen = layer.operator(given(q, k, v, prefix=1)).rows(torch.arange(31)) > 0
    scores = (q @ k.transpose(-2, -1) / 4).softmax(-1)
    expected = torch.where(seen, scores, 0.0).sum(-1)
    assert torch.allclose(layer.locality(q, k, GRID, 1), expected)
    assert torch.allclose(
        mechanism("gna", {"kernel": GRID}).locality(q, k, GRID, 1), torch.ones(()).double()
    )


def test_dma_that_keeps_all_is_biased_dense_and_with_a_zero_plain():
    q, k, v = inputs(1)
    layer = mechanism("dma", {"window": 30})
    b = F.pad(layer.key_bias(v[:, :, 1:]), (1, 0))
    assert torch.allclose(layer(q, k, v, GRID, 1), dense(q, k, v, b[:, :, None]))
    layer.a.data.zero_()
    assert torch.allclose(layer(q, k, v, GRID, 1), dense(q, k, v))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("window", [1, 3, 29])
def test_dma_keeps_the_keys_of_the_largest_bias_and_all_prefix_tokens(window, backend):
    q, k, v = inputs(2)
    layer = mechanism("dma", {"window": window, "backend": backend})
    b = layer.key_bias(v[:, :, 2:])
    bias = torch.full((2, HEADS, 32), -torch.inf, dtype=q.dtype)
    bias[..., :2] = 0
    for image in range(2):
        for head in range(HEADS):
            for j in sorted(range(30), key=lambda j: b[image, head, j].item())[-window:]:
                bias[image, head, 2 + j] = b[image, head, j]
    assert torch.allclose(layer(q, k, v, GRID, 2), dense(q, k, v, bias[:, :, None]))


def test_dma_ignores_a_constant_in_the_bias_and_the_order_of_tokens():
    q, k, v = inputs(0)
    layer = mechanism("dma", {"window": 7})
    y = layer(q, k, v, GRID)
    moved = copy.deepcopy(layer)
    moved.key_bias = lambda v, own=layer: own.key_bias(v) + 3.0
    assert torch.allclose(moved(q, k, v, GRID), y)
    order = torch.randperm(30)
    assert torch.allclose(layer(*(x[:, :, order] for x in (q, k, v)), GRID), y[:, :, order])


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("window", [3, 30])
def test_causal_dma_keeps_the_best_keys_up_to_each_query(window, backend):
    q, k, v = inputs(0)
    layer = mechanism("dma", {"window": window, "causal": True, "backend": backend})
    b = layer.key_bias(v)
    bias = torch.full((2, HEADS, 30, 30), -torch.inf, dtype=q.dtype)
    for i in range(30):
        scores = b[..., : i + 1].detach().clone()
        scores[..., i] = torch.inf
        best = scores.topk(min(window, i + 1)).indices
        bias[:, :, i].scatter_(-1, best, b.gather(-1, best))
    assert torch.allclose(layer(q, k, v, GRID), dense(q, k, v, bias))


@pytest.mark.parametrize("n, window", [(64, 1), (130, 3), (700, 64), (700, 90), (333, 400)])
def test_causal_dma_lists_for_blocks_of_queries_what_each_of_them_keeps(n, window):
    b = torch.randint(0, 40, (2, 1, n), generator=torch.Generator().manual_seed(1)).double()
    choice = causal_choice(b, window)
    assert choice.lists.shape == (2, 1, -(-n // 64), 63 + min(window, n + 1))
    rule = causal(n)._replace(rank=choice.rank, limit=choice.limit)
    segment = Segment(b[..., None], None, Blocks(choice.lists, 64, 1), rule)
    seen, lists = visible(segment, torch.arange(n)), choice.by_query(window)
    for image, i in itertools.product(range(2), range(n)):
        order = sorted(range(i), key=lambda j: (-b[image, 0, j].item(), j))
        expected = sorted([i, *order[: window - 1]])
        assert seen[image, 0, i].nonzero()[:, 0].tolist() == expected
        assert sorted(x for x in lists[image, 0, i].tolist() if x >= 0) == expected


def test_agents_that_are_the_queries_give_two_dense_stages():
    q, k, v = inputs(0, (3, 3))
    layer = mechanism("agent", {"agents": 9, "window": (3, 3)})
    for parameter in layer.parameters():
        parameter.data.zero_()
    first = (q @ q.transpose(-2, -1) / 4).softmax(-1)
    second = (q @ k.transpose(-2, -1) / 4).softmax(-1)
    y = layer(q, k, v, (3, 3))
    assert torch.allclose(y, first @ second @ v)
    assert not torch.allclose(y, dense(q, k, v))


def test_one_agent_gives_all_tokens_the_same_and_rank_is_bounded():
    q, k, v = inputs(1)
    layer = mechanism("agent", {"agents": 1})
    a = layer.operator(given(q, k, v, prefix=1)).rows(torch.arange(31))
    assert torch.allclose(a, a[:, :, :1].expand_as(a))
    four = (
        mechanism("agent", {"agents": 4}).operator(given(q, k, v, prefix=1)).rows(torch.arange(31))
    )
    assert (torch.linalg.matrix_rank(four) <= 4).all()


def test_permuting_patches_inside_a_pooling_cell_leaves_what_agents_read():
    q, k, v = inputs(0, (4, 4))
    layer = mechanism("agent", {"agents": 4, "training_free": True})
    order = torch.arange(16)
    order[[0, 1, 4, 5]] = torch.tensor([5, 4, 0, 1])  # the first 2 x 2 cell
    read = [
        layer.operator(Inputs(*x, None, (4, 4))).factors[1].matvec(x[2])
        for x in ((q, k, v), tuple(x[:, :, order] for x in (q, k, v)))
    ]
    assert torch.allclose(*read)


def test_agent_biases_fit_other_grids():
    layer = mechanism("agent", {"agents": 4, "window": (3, 3)})
    q, k, v = inputs(1, (5, 6))
    assert layer(q, k, v, (5, 6), 1).isfinite().all()


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create_attention("agnet", 32, 2), "unknown attention 'agnet'; did you mean agent"),
        (lambda: create_attention("gna", 32, 2, kernl=3), "gna does not take that option"),
        (lambda: create_attention("gna", 30, 4), "num_heads has to divide dim"),
        (lambda: create_attention("agent", 32, 2, agents=5), "agents: got 5; give a square"),
        (lambda: create_attention("dma", 32, 2, window=0), "window: got 0"),
        (lambda: create_attention("dma", 32, 2, causal="no"), "causal: got 'no'; give True or False"),
        (lambda: create_attention("softmax", 32, 2)(torch.zeros(1, 9, 32), 9), "grid: got 9; give its"),
        (lambda: create_attention("softmax", 32, 2)(torch.zeros(1, 9, 32), (-3, -3)), "whole numbers"),
        (lambda: create_attention("gna", 32, 2)(torch.zeros(1, 9, 32)), "grid: gna needs the grid"),
        (lambda: create_attention("gna", 32, 2)(torch.zeros(1, 9, 32), (3, 3)), "kernel, dilation: got 7"),
        (
            lambda: create_attention("gna", 32, 2, kernel=2, stride=3)(torch.zeros(1, 9, 32), (3, 3)),
            "stride: got 3",
        ),
        (lambda: create_attention("agent", 32, 2)(torch.zeros(1, 9, 32), (9,)), "agent supports 2"),
        (lambda: create_attention("softmax", 32, 2)(torch.zeros(1, 9, 16)), r"x: got \(1, 9, 16\)"),
        (lambda: create_attention("softmax", 32, 2)(torch.zeros(1, 9, 32), prefix=9), "prefix: got 9"),
        (
            lambda: create_attention("gna", 32, 2)(torch.zeros(1, 9, 32), (3, 3), 1),
            r"grid: \(3, 3\) holds 9 tokens; got 9 with 1 prefix",
        ),
        (
            lambda: create_mechanism("softmax", 32, 2)(*torch.zeros(3, 1, 4, 9, 8)),
            "q: got 4 heads of 8; softmax was made for 2 heads of 16",
        ),
        (
            lambda: create_mechanism("softmax", 32, 2).operator(
                Inputs(*torch.zeros(3, 1, 2, 9, 16))
            ).vecmat(torch.zeros(1, 3, 8)),
            r"r: got shape \(1, 3, 8\)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------- contexts of the caller


@pytest.mark.parametrize("name, options", CASES)
def test_inference_mode_neither_hinders_questions_nor_later_training(name, options):
    layer = create_attention(name, DIM, HEADS, **options)
    x = torch.randn(1, 31, DIM)
    with torch.inference_mode():
        with record() as calls:
            layer(x, GRID, 1)
        operator = calls[0].operator
        r = operator.vecmat(torch.ones(1, 1, 31), "mean")
    assert torch.allclose(r, operator.rows(torch.arange(31)).sum(-2).mean(1)[:, None], atol=1e-4)
    layer(x, GRID, 1).sum().backward()
    create_attention(name, DIM, HEADS, **options)(x, GRID, 1).sum().backward()


@pytest.mark.parametrize("name, options", CASES)
def test_it_works_under_autocast(name, options):
    torch.manual_seed(0)  # where a mechanism chooses, rounding may decide
    layer = create_attention(name, DIM, HEADS, **options)
    x = torch.randn(1, 31, DIM)
    some, ones = torch.tensor([0, 5]), torch.ones(1, 1, 31)
    with record() as calls:
        exact = layer(x, GRID, 1)
    with torch.autocast(x.device.type, torch.bfloat16):
        with record() as half:
            y = layer(x, GRID, 1)
        y.float().sum().backward()
        rows, r = half[0].operator.rows(some), half[0].operator.vecmat(ones)
    assert torch.allclose(y.float(), exact, atol=0.05)
    operator = calls[0].operator
    assert torch.allclose(rows.float().sum(-1), operator.rows(some).sum(-1), atol=0.02)
    assert torch.allclose(r.float().sum(-1), operator.vecmat(ones).sum(-1), atol=0.3)


@pytest.mark.parametrize("name, options", CASES)
def test_single_queries_and_keys_of_a_norm_are_rounded_under_autocast(name, options):
    q, k, v = inputs(1, dtype=torch.float32)
    layer, half = mechanism(name, options, torch.float32), torch.bfloat16
    with torch.autocast("cpu", half):  # on a GPU norms give float32 there, projections bfloat16
        mixed = layer.attend(given(q, k, v.to(half), prefix=1))
        alike = given(q, k, v, prefix=1).replace(q=q.to(half), k=k.to(half), v=v.to(half))
        assert torch.equal(mixed, layer.attend(alike))
    exact = given(*inputs(1), prefix=1)
    with torch.autocast("cpu", half):
        assert exact.autocast() is exact


@pytest.mark.parametrize("name, options", CASES)
def test_half_precision_answers_in_single(name, options):
    q, k, v = inputs(1)
    layer = mechanism(name, options)
    exact = layer.operator(given(q, k, v, prefix=1))
    half = [x.bfloat16() for x in (q, k, v)]
    near = layer.operator(given(*(x.double() for x in half), prefix=1))
    found = copy.deepcopy(layer).bfloat16().operator(given(*half, prefix=1))
    r = torch.rand(2, 1, 31, dtype=torch.float64)
    assert found.rows(torch.tensor([0])).dtype == torch.float32
    assert found.vecmat(r).dtype == torch.float32
    if name in ("softmax", "gna"):  # the others compute their agents and biases in half precision
        assert torch.allclose(found.vecmat(r).double(), near.vecmat(r), rtol=1e-3)
    assert exact.vecmat(r).dtype == torch.float64


def test_two_threads_record_their_own_calls():
    import threading

    layers = [create_attention("softmax", DIM, HEADS) for _ in range(2)]
    found, errors = [0, 0], []

    def work(i):
        try:
            for _ in range(30):
                with torch.no_grad(), record() as calls:
                    layers[i](torch.randn(1, 9, DIM))
                found[i] += len(calls)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == [30, 30] and not errors


def test_a_log_sum_exp_kept_without_gradient_serves_no_gradient():
    from xattn.attention import SoftmaxOperator

    q, k, _ = inputs(0)
    q.requires_grad_()
    operator = SoftmaxOperator(q, k, bias=torch.zeros(1, 1, 1, 30, dtype=q.dtype))
    with torch.no_grad():
        operator.row_sums()
    rows = operator.rows(torch.arange(5)).square().sum()
    dense_rows = (q @ k.transpose(-2, -1) / 4).softmax(-1)[:, :, :5].square().sum()
    assert torch.allclose(*(torch.autograd.grad(x, q)[0] for x in (rows, dense_rows)))


# ---------------------------------------------------------------------- Triton, in its interpreter


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("prefix", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name, options", [c for c in CASES if "backend" not in c.values[1]])
def test_triton_equals_the_reference_forward_and_backward(name, options, prefix):
    grid = (3, 5)
    qkv = inputs(prefix, grid, batch=1, dtype=torch.float32)
    g = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))

    def run(backend, dtype):
        layer = mechanism(name, {**options, "backend": backend}).to(dtype)
        leaves = [x.to(dtype).requires_grad_() for x in (*qkv, tokens(qkv[0]))]
        y = layer(*leaves[:3], grid, prefix, x=leaves[3])
        weights = list(layer.parameters())
        grads = torch.autograd.grad(y, [*leaves, *weights], g.to(dtype), allow_unused=True)
        return [y, *(x for x in grads if x is not None)]

    expected = run("reference", torch.float64)
    found = run("triton", torch.float32)
    assert len(found) == len(expected)
    near = [
        torch.allclose(a.double(), b, atol=1e-4, rtol=1e-4)
        for a, b in zip(found, expected, strict=True)
    ]
    if all(near):
        return
    # Random networks make scores so large that float32 itself is less exact.
    plain = run("reference", torch.float32)
    for i, (value, same, true) in enumerate(zip(found, plain, expected, strict=True)):
        bound = (3 if i else 2) * (same - true).abs().max()
        assert near[i] or (value - true).abs().max() <= bound
