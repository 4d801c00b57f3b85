"""Every attentive head of the registry: exact class maps, permutation, gradients, files, half, processes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attentive_fakes import (
    CLASSES,
    GRID,
    HEADS,
    PREFIXES,
    cnn,
    make,
    map_patches,
    pool,
    random_tokens,
    read_by,
)
from torch.overrides import TorchFunctionMode

import xattn
from xattn.explainers import create_explainer
from xattn.heads import create_head, head_entry, load_head, overlap, save_head

N = GRID[0] * GRID[1]


class FrozenGates(TorchFunctionMode):
    """Autograd with data-dependent gains held: the definition that the class maps are tested with."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.gelu:
            (x,) = args
            return x * torch.special.ndtr(x.detach())
        if function is F.layer_norm:
            x, weight, bias = args[0], kwargs["weight"], kwargs["bias"]
            deviation = (x.detach().var(-1, unbiased=False, keepdim=True) + kwargs["eps"]).sqrt()
            return (x - x.mean(-1, keepdim=True)) / deviation * weight + bias
        if function in (torch.Tensor.pow, torch.Tensor.__pow__, torch.pow):
            base, exponent = args
            return base * base.detach().pow(exponent - 1)
        return function(*args, **kwargs)


def gradient_shares(head, tokens):
    """(B, K, T): value times gradient of each logit by it, weights and gates held, less the reference."""
    with torch.no_grad():
        attended = head.attend(tokens)
        weights, values = head.sources(head.weights(attended.scores), attended)
    values = values.clone().requires_grad_()
    with FrozenGates():
        z, _ = head.finish(pool(weights, values), attended)
        logits = head.classifier(z if head.norm is None else head.norm(z))
    shares = []
    for k in range(logits.shape[1]):
        (slope,) = torch.autograd.grad(logits[:, k].sum(), values, retain_graph=True)
        shares.append((slope * values).sum((1, 3)))
    return torch.stack(shares, 1).detach() - reference(head, tokens)


def reference(head, tokens):
    """(B, K, 1): what a patch's share is compared with; of random_feature, that of the mean patch."""
    if head.name != "random_feature":
        return 0.0
    with torch.no_grad():
        attended = head.attend(tokens)
        nothing = dataclasses.replace(attended, values=torch.zeros_like(attended.values))
        return (head.mean_patch_logits(tokens) - head.classify(nothing))[..., None] / N


VARIANTS = [(name, case) for name in HEADS for case in head_entry(name).cases]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_shares_are_value_times_slope_with_held_gates_and_sum_to_the_logit(name, options, norm):
    head = make(name, norm=norm, **options)
    tokens = random_tokens(head)
    with torch.no_grad():
        logits, (maps, rest) = head.logits(tokens), head.class_maps(tokens)
    assert maps.shape == (3, CLASSES, *GRID) and rest.shape == (3, CLASSES)
    scale = logits.abs().max()
    assert (maps.sum((2, 3)) + rest - logits).abs().max() <= 1e-5 * scale
    expected = gradient_shares(head, tokens)
    torch.testing.assert_close(maps.flatten(2), expected[..., -N:], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", HEADS)
def test_where_nothing_is_gated_the_rest_is_the_folded_bias_of_every_image(name):
    head = make(name)
    tokens = random_tokens(head)
    with torch.no_grad():
        attended = head.attend(tokens)
        maps, rest = head.class_maps(tokens)
        if head.gated:
            pytest.skip("its gains depend on the image, and so may the rest")
        if attended.values.shape[2] != N:
            pytest.skip("it attends to prefix tokens, whose shares are in the rest")
        folded = head.classify(
            dataclasses.replace(attended, values=torch.zeros_like(attended.values))
        )
    scale = (maps.sum((2, 3)) + rest).abs().max()
    torch.testing.assert_close(rest, folded, rtol=0, atol=float(1e-5 * scale))
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=float(1e-5 * scale))


@pytest.mark.parametrize("name", HEADS)
def test_class_maps_are_exact_in_training_mode_too(name):
    head = make(name).train()
    tokens = random_tokens(head, batch=4)
    torch.manual_seed(3)
    maps, rest = head.class_maps(tokens)
    torch.manual_seed(3)  # of dropout
    logits = head.logits(tokens)
    torch.testing.assert_close(maps.sum((2, 3)) + rest, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_explaining_in_training_mode_moves_no_running_statistics(name):
    backbone = read_by(name)
    head = make(name, backbone, reliability={"anchors": 2}).train()
    with torch.no_grad():
        taps = backbone(torch.rand(4, 3, 24, 40, generator=torch.Generator().manual_seed(4)))
    before = {k: v.clone() for k, v in head.named_buffers()}
    assert before  # at least of the norm before the classifier
    tokens = head.tokens(taps)
    head.class_maps(tokens)
    head.class_maps(tokens, 1)
    head.query_maps(tokens)
    for shown in ("scores", "mask", *(("attention",) if head.learns_scores else ())):
        head.explain_with = shown
        head.explanation(taps, 2)
    with pytest.raises(ValueError, match="class_index"):
        head.class_maps(tokens, CLASSES)
    assert all(torch.equal(v, before[k]) for k, v in head.named_buffers())
    assert all(m.training for m in head.modules())
    head(taps)  # a step of training
    assert not torch.equal(head.norm.running_mean, before["norm.running_mean"])


@pytest.mark.parametrize("name", ["ttame", "lcam"])
def test_other_heads_explain_without_moving_statistics_too(name):
    backbone = cnn()
    head = create_head(name, backbone, fusion="per_class").train()
    with torch.no_grad():
        taps = backbone(torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(5)))
    before = {k: v.clone() for k, v in head.named_buffers()}
    expected = copy.deepcopy(head)(taps, 1)
    torch.testing.assert_close(head.explanation(taps, 1), expected)  # by the batch's statistics
    assert all(torch.equal(v, before[k]) for k, v in head.named_buffers())


@pytest.mark.parametrize("name", HEADS)
def test_permuted_patches_give_permuted_maps_and_the_same_logits(name):
    head = make(name)
    tokens = random_tokens(head)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    other = map_patches(tokens, lambda x: x[:, order])
    with torch.no_grad():
        same = torch.allclose(head.logits(tokens), head.logits(other), rtol=1e-4, atol=1e-5)
        maps, permuted = (head.class_maps(t).maps.flatten(2) for t in (tokens, other))
        assert same == head.permutes
        if head.permutes:
            torch.testing.assert_close(permuted, maps[..., order], rtol=1e-4, atol=1e-5)
            a, b = (head.query_maps(t).flatten(2) for t in (tokens, other))
            torch.testing.assert_close(b, a[..., order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_every_parameter(name):
    head = make(name)  # in eval mode: a batch's own mean would cancel the bias before the norm
    tokens = random_tokens(head, batch=4)
    F.cross_entropy(head.logits(tokens), torch.tensor([0, 1, 2, 3])).backward()
    sizes = {k: float(p.grad.abs().max()) for k, p in head.named_parameters()}
    largest = max(sizes.values())
    for parameter, size in sizes.items():
        if parameter in head.inert:  # the softmax cancels it
            assert size < 1e-6 * largest
        else:
            assert size > 1e-6 * largest, parameter


@pytest.mark.parametrize("name", HEADS)
def test_saved_heads_load_bit_identical(name, tmp_path):
    backbone = read_by(name)
    head = make(name, classes=3, class_names=["a", "b", "c"], norm=False)
    save_head(head, tmp_path / "h")
    loaded = load_head(tmp_path / "h", backbone)
    tokens = random_tokens(head)
    with torch.no_grad():
        assert torch.equal(head.logits(tokens), loaded.logits(tokens))
        assert all(map(torch.equal, head.class_maps(tokens), loaded.class_maps(tokens)))
    assert loaded.options == head.options and loaded.class_names == ["a", "b", "c"]
    assert loaded.num_classes == 3 and loaded.norm is None and not loaded.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_half_precision_stays_close(name, dtype):
    head = make(name)
    tokens = random_tokens(head)
    with torch.no_grad():
        expected, exact = head.logits(tokens), head.class_maps(tokens)
        half = head.to(dtype)
        tokens = random_tokens(head, dtype=dtype)
        logits, (maps, rest) = half.logits(tokens), half.class_maps(tokens)
    assert logits.dtype == maps.dtype == dtype and maps.isfinite().all()
    size = 0.06 if dtype is torch.bfloat16 else 0.01
    assert (logits.float() - expected).abs().max() < size * expected.abs().max()
    assert (maps.float() - exact.maps).abs().max() < 2 * size * exact.maps.abs().max() + 1e-6
    assert (maps.float().sum((2, 3)) + rest.float() - logits.float()).abs().max() < (
        size * exact.rest.abs().max() + size * expected.abs().max()
    )


@pytest.mark.parametrize("name", HEADS)
def test_autocast_trains(name):
    head = make(name).train()
    tokens = random_tokens(head, batch=4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(head.logits(tokens), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert head.eval().class_maps(tokens).maps.isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_equals_a_loop_over_its_images(name):
    head = make(name)
    tokens = random_tokens(head, batch=5)
    with torch.no_grad():
        logits, (maps, rest) = head.logits(tokens), head.class_maps(tokens)
        for i in range(5):
            one = map_patches(tokens, lambda x, i=i: x[i : i + 1])
            one = one._replace(prefix=tokens.prefix[i : i + 1])
            close = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, float(logits.abs().max()))}
            torch.testing.assert_close(head.logits(one), logits[i : i + 1], **close)
            torch.testing.assert_close(head.class_maps(one).maps, maps[i : i + 1], **close)
            torch.testing.assert_close(head.class_maps(one).rest, rest[i : i + 1], **close)


@pytest.mark.parametrize("name", HEADS)
def test_classes_that_are_asked_for_are_slices_of_all(name, monkeypatch):
    head = make(name)
    tokens = random_tokens(head)
    with torch.no_grad():
        maps, rest = head.class_maps(tokens)
        rows = torch.arange(3)
        own = torch.tensor([4, 0, 2])
        for index, expected in (
            (2, [maps[:, [2]], rest[:, [2]]]),
            (own, [maps[rows, own][:, None], rest[rows, own][:, None]]),
            (torch.tensor([[3, 1]]), [maps[:, [3, 1]], rest[:, [3, 1]]]),
        ):
            for got, want in zip(head.class_maps(tokens, index), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr("xattn.heads.attentive.CHUNK", 1)  # a class at a time
        torch.testing.assert_close(head.class_maps(tokens).maps, maps, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="class_index: 5 is out of range"):
            head.class_maps(tokens, CLASSES)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", HEADS)
def test_prefix_tokens_never_become_patches(name, prefix):
    backbone = read_by(name, prefix)
    head = make(name, backbone)
    with torch.no_grad():
        taps = backbone(torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(4)))
        tokens = head.tokens(taps)
        maps, rest = head.class_maps(tokens)
        logits = head.logits(tokens)
        assert head(taps, 1).shape == (2, 1, *GRID)
    class_token, registers = PREFIXES[prefix]
    assert tokens.prefix.shape == (2, class_token + registers, 32)
    assert torch.equal(tokens.patches[-1].transpose(1, 2).unflatten(2, GRID), taps.maps[-1])
    assert maps.shape == (2, CLASSES, *GRID)
    torch.testing.assert_close(maps.sum((2, 3)) + rest, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        maps.flatten(2), gradient_shares(head, tokens)[..., -N:], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", HEADS)
def test_query_maps_and_their_overlap(name):
    head = make(name)
    tokens = random_tokens(head)
    with torch.no_grad():
        maps = head.query_maps(tokens)
    assert maps.shape[0] == 3 and maps.shape[2:] == GRID and (maps >= 0).all()
    attended = head.attend(tokens)
    queries = GRID[0] * GRID[1] if name == "dino_block" else 1  # of a head, whose mean is its map
    assert maps.shape[1] * queries == attended.scores.shape[1]
    values = overlap(maps)
    if maps.shape[1] == 1:
        assert values.isnan().all()
    else:
        assert ((values > 0) & (values <= 1)).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_cnn_will_do_and_explains_through_the_explainer(name):
    backbone = cnn()
    head = make(name, backbone)
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        taps = backbone(images)
        tokens = head.tokens(taps)
        maps, rest = head.class_maps(tokens)
        torch.testing.assert_close(
            maps.sum((2, 3)) + rest, head.logits(tokens), rtol=1e-4, atol=1e-4
        )
    explainer = create_explainer("head", backbone, head)
    target = torch.tensor([1, 3])
    shown = explainer.attribute(images, target)
    torch.testing.assert_close(shown, head(taps, target).detach(), rtol=1e-4, atol=1e-6)
    if head.learns_scores:
        attention = create_explainer("head", backbone, head, maps="attention")
        if name == "words":  # of each word its own
            expected = head.reading_maps(tokens).detach()[torch.arange(2), target][:, None]
        else:
            expected = head.query_maps(tokens).detach().mean(1, keepdim=True)
        torch.testing.assert_close(attention.attribute(images, target), expected)
        assert make(name, backbone, explain_with="attention").explanation(taps).shape == maps.shape
    else:
        with pytest.raises(ValueError, match="maps: got 'attention'"):
            create_explainer("head", backbone, head, maps="attention")
        with pytest.raises(ValueError, match="does not learn its weights"):
            create_head(name, backbone, explain_with="attention")


@pytest.mark.parametrize("name", HEADS)
def test_a_single_token_is_refused(name):
    torch.manual_seed(0)
    small = xattn.load_backbone("test_resnet", weights=None, input_size=32, num_classes=3)
    small.tap_sizes = (*small.tap_sizes[:-1], (1, 1))
    with pytest.raises(ValueError, match=r"taps: .*is 1 x 1.*larger input_size"):
        create_head(name, small)


@pytest.mark.parametrize("name", HEADS)
def test_the_core_pools_as_the_weights_do_and_with_the_same_gradients(name, monkeypatch):
    monkeypatch.setattr("xattn.heads.attended.FEW", 0)
    head = make(name).double()
    tokens = random_tokens(head, dtype=torch.float64)

    def gradients(pooled):
        head.zero_grad()
        head.finish(pooled, attended)[0].square().sum().backward()
        return {k: p.grad for k, p in head.named_parameters() if p.grad is not None}

    attended = head.attend(tokens)
    found = head.pool(attended)
    expected = pool(head.weights(attended.scores), attended.values)
    torch.testing.assert_close(found, expected)
    given = attended.with_scores(attended.scores.detach() + 0.1)
    torch.testing.assert_close(head.pool(given), pool(head.weights(given.scores), given.values))
    if not found.requires_grad:
        pytest.skip("no parameter comes before its pooling")
    slopes = gradients(found)
    attended = head.attend(tokens)
    for parameter, slope in gradients(pool(head.weights(attended.scores), attended.values)).items():
        torch.testing.assert_close(slopes[parameter], slope)


def test_scores_of_queries_and_keys_are_formed_in_the_op_unless_asked_for(monkeypatch):
    head = make("efficient_probe")
    attended = head.attend(random_tokens(head))
    monkeypatch.setattr("xattn.heads.attended.FEW", 0)
    expected = head.pool(attended)
    assert "scores" not in vars(attended)
    monkeypatch.setattr("xattn.heads.attended.FEW", 2**30)
    torch.testing.assert_close(head.pool(attended), expected)
    assert "scores" in vars(attended)


@pytest.mark.parametrize("few", [0, 2**30])
def test_a_query_without_a_token_pools_zeros_and_passes_no_gradient_on(few, monkeypatch):
    monkeypatch.setattr("xattn.heads.attended.FEW", few)
    head = make("efficient_probe")
    attended = head.attend(random_tokens(head))
    hidden = attended.scores.detach().clone()
    hidden[0, 1] = -torch.inf
    hidden[1, 0, 2:] = -torch.inf
    hidden.requires_grad_()
    pooled = head.pool(attended.with_scores(hidden))
    assert not pooled[0, 1].any() and pooled.isfinite().all()
    weights = head.weights(hidden)
    assert not weights[0, 1].any()
    torch.testing.assert_close(torch.vmap(head.weights)(hidden[None])[0], weights)
    torch.testing.assert_close(pooled, pool(weights, attended.values))
    for loss in (pooled.square().sum(), weights.square().sum()):
        (slope,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        assert slope.isfinite().all() and slope.any() and not slope[0, 1].any()


@pytest.mark.parametrize("few", [0, 2**30])
@pytest.mark.parametrize("name", HEADS)
def test_autocast_leaves_float64_as_it_is(name, few, monkeypatch):
    monkeypatch.setattr("xattn.heads.attended.FEW", few)
    head = make(name).double()
    tokens = random_tokens(head, dtype=torch.float64)
    expected = head.logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head.logits(tokens), expected)
