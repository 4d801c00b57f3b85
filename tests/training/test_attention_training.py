"""Changes of attention scores: closed forms, limit cases, and what training with them may not touch."""

import math

import pytest
import torch
import torch.nn.functional as F

from xattn import load_backbone
from xattn.heads import create_head
from xattn.heads.attentive import Tokens
from xattn.training.attention_training import (
    PERTURBATIONS,
    AttentionAT,
    AttentionIAT,
    AttentionVAT,
    create_perturbation,
    divergence,
    masked_softmax,
)

ALL = [name for name in PERTURBATIONS if name != "none"]
SHAPES = [(3, 7), (3, 2, 7)]


def pooling(shape, classes=4, width=5, seed=0, dtype=torch.float64, mask=None):
    """Scores and predict: softmax pooling of random values by Q queries, then a linear classifier."""
    generator = torch.Generator().manual_seed(seed)
    batch, count, queries = shape[0], shape[-1], math.prod(shape[1:-1])
    scores = torch.randn(shape, generator=generator, dtype=dtype)
    values = torch.randn(batch, count, width, generator=generator, dtype=dtype)
    weight = torch.randn(classes, queries * width, generator=generator, dtype=dtype)
    target = torch.randint(classes, (batch,), generator=generator)

    def predict(s):
        valid = None if mask is None else mask.reshape(batch, *[1] * (len(shape) - 2), count)
        a = masked_softmax(s, None if valid is None else valid.expand_as(s))
        return (a.reshape(batch, -1, count) @ values).flatten(1) @ weight.T

    return scores, predict, target


def losses(predict, target):
    return lambda s: F.cross_entropy(predict(s), target, reduction="none")


def gradient(scores, loss_fn):
    leaf = scores.clone().requires_grad_()
    return torch.autograd.grad(loss_fn(leaf).sum(), leaf)[0]


def changed(name, scores, predict, target, mask=None, **options):
    """r of one method, asked for with the loss that it takes."""
    p = create_perturbation(name, **{"epsilon": 1.5, **options})
    if name in ("vat", "ivat"):
        clean = predict(scores)
        return p.perturbation(scores, lambda s: divergence(clean, predict(s)), mask)
    return p.perturbation(scores, losses(predict, target), mask)


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("shape", SHAPES)
def test_at_is_the_normalised_gradient(shape):
    scores, predict, target = pooling(shape)
    g = gradient(scores, losses(predict, target))
    expected = 1.5 * g / g.norm(dim=-1, keepdim=True)
    assert torch.allclose(changed("at", scores, predict, target), expected, atol=1e-12)


def differences(scores, norm):
    d = scores[..., :, None] - scores[..., None, :]
    dims = (-2, -1) if norm == "matrix" else (-1,)
    return d / d.norm(dim=dims, keepdim=True)


@pytest.mark.parametrize("norm", ["matrix", "row"])
@pytest.mark.parametrize("shape", SHAPES)
def test_iat_is_the_gradient_by_alpha_with_stored_differences(shape, norm):
    scores, predict, target = pooling(shape)
    d = differences(scores, norm)
    alpha = torch.zeros_like(d).requires_grad_()
    loss = losses(predict, target)(scores + (alpha * d).sum(-1)).sum()
    g = torch.autograd.grad(loss, alpha)[0]
    alpha = 1.5 * g / g.norm(dim=(-2, -1), keepdim=True)
    expected = (alpha * d).sum(-1)
    found = changed("iat", scores, predict, target, norm=norm, rescale=False)
    assert torch.allclose(found, expected, atol=1e-12)
    sized = changed("iat", scores, predict, target, norm=norm)
    assert torch.allclose(
        F.cosine_similarity(sized, expected, dim=-1), torch.ones(shape[:-1]).double()
    )


def test_iat_by_rows_is_at_and_by_the_matrix_is_not():
    scores, predict, target = pooling((3, 2, 7), dtype=torch.float32)
    at = changed("at", scores, predict, target)
    assert torch.allclose(changed("iat", scores, predict, target, norm="row"), at, atol=1e-6)
    matrix = changed("iat", scores, predict, target)
    cosine = F.cosine_similarity(matrix, at, dim=-1)
    assert (cosine > 0.5).all() and (cosine < 0.999).any()


def test_iat_by_the_matrix_prefers_the_score_that_stands_out():
    scores = torch.tensor([[0.0, 0.1, -0.1, 0.0, 5.0]], dtype=torch.float64)
    slope = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    r = AttentionIAT(1.0).perturbation(scores, lambda s: (s * slope).sum(-1))
    assert r[0, 4] > 3 * r[0, :4].abs().max()


def test_the_released_form_lowers_the_loss_where_at_raises_it():
    scores, predict, target = pooling((3, 7))
    loss = losses(predict, target)
    at = changed("at", scores, predict, target, epsilon=0.01)
    released = changed("iat", scores, predict, target, epsilon=0.01, norm="released")
    assert torch.equal(released, -at)
    assert (loss(scores + released) < loss(scores)).all()
    assert (loss(scores + at) > loss(scores)).all()


def test_the_released_form_has_a_name_of_its_own():
    scores, predict, target = pooling((3, 2, 7))
    found = changed("iat_released", scores, predict, target)
    assert torch.equal(found, changed("iat", scores, predict, target, norm="released"))
    assert torch.equal(found, -changed("at", scores, predict, target))
    p = create_perturbation("iat_released", epsilon=1.5)
    lower = losses(predict, target)
    expected = (lower(scores) + lower(scores + found)).mean()
    assert torch.allclose(p.loss(scores, predict, target), expected)


def test_ivat_by_rows_is_vat():
    scores, predict, target = pooling((3, 2, 7))
    assert torch.allclose(
        changed("ivat", scores, predict, target, norm="row"),
        changed("vat", scores, predict, target),
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("epsilon", [1e-6, 1.0, 50.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_r_has_norm_epsilon_for_each_query_and_no_graph(name, epsilon, shape):
    scores, predict, target = pooling(shape)
    r = changed(name, scores, predict, target, epsilon=epsilon)
    assert r.shape == scores.shape and not r.requires_grad
    assert torch.allclose(r.norm(dim=-1), torch.full(shape[:-1], epsilon).double())


def test_the_paper_bounds_alpha_and_r_is_then_shorter():
    scores, predict, target = pooling((3, 7))
    for name in ("iat", "ivat"):
        r = changed(name, scores, predict, target, rescale=False)
        assert (r.norm(dim=-1) < 1.5).all() and (r.norm(dim=-1) > 0).all()


def test_the_loss_grows_by_epsilon_times_the_gradients_norm():
    scores, predict, target = pooling((5, 9))
    loss = losses(predict, target)
    g = gradient(scores, loss)
    r = changed("at", scores, predict, target, epsilon=1e-3)
    ratio = (loss(scores + r) - loss(scores)) / (1e-3 * g.norm(dim=-1))
    assert torch.allclose(ratio, torch.ones(5).double(), atol=1e-2)


# ------------------------------------------------------------------ VAT


def fisher(scores, predict):
    """J^T (diag(p) - p p^T) J of one example, (T, T)."""
    j = torch.autograd.functional.jacobian(lambda s: predict(s[None])[0], scores[0])
    p = predict(scores)[0].softmax(0)
    return j.T @ (p.diag() - p[:, None] * p) @ j


@pytest.fixture
def linear():
    """Logits that are linear in the scores of one example."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.zeros(1, 6, dtype=torch.float64), lambda s: s @ weight.T


def test_vat_finds_the_top_eigenvector_of_the_fisher_matrix(linear):
    scores, predict = linear
    values, vectors = torch.linalg.eigh(fisher(scores, predict))
    r = changed("vat", scores, predict, None, iterations=20, xi=1e-3)
    assert F.cosine_similarity(r[0], vectors[:, -1], dim=0).abs() > 0.99
    small = changed("vat", scores, predict, None, iterations=20, xi=1e-3, epsilon=1e-3)
    ratio = divergence(predict(scores), predict(scores + small)) / (1e-6 * values[-1] / 2)
    assert torch.allclose(ratio, torch.ones(1).double(), atol=1e-2)


def test_ivat_finds_the_top_eigenvector_in_the_weights_of_the_differences(linear):
    _, predict = linear
    scores = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m = differences(scores, "matrix").norm(dim=-1)[0]
    _, vectors = torch.linalg.eigh(m[:, None] * fisher(scores, predict) * m)
    r = changed("ivat", scores, predict, None, iterations=40, xi=1e-3)
    assert F.cosine_similarity(r[0], m * vectors[:, -1], dim=0).abs() > 0.99


@pytest.mark.parametrize("name", ["vat", "ivat"])
def test_vat_reads_no_labels(name):
    scores, predict, target = pooling((6, 7))
    unlabelled = create_perturbation(name, epsilon=1.0).loss(scores, predict)
    assert unlabelled > 0
    for labels in (target, target.flip(0)):
        total = create_perturbation(name, epsilon=1.0).loss(scores, predict, labels)
        clean = F.cross_entropy(predict(scores), labels)
        assert torch.allclose(total - clean, unlabelled)


@pytest.mark.parametrize("name", ["vat", "ivat"])
@pytest.mark.parametrize("epsilon", [1e-4, 0.1, 10.0, 1e3])
def test_the_divergence_is_never_negative(name, epsilon):
    for seed in range(5):
        scores, predict, _ = pooling((3, 2, 7), seed=seed)
        assert create_perturbation(name, epsilon=epsilon).loss(scores, predict) >= -1e-12


def test_labelled_and_unlabelled_examples_share_a_batch():
    scores, predict, target = pooling((6, 7))
    mixed = target.clone()
    mixed[2:] = -100
    total = AttentionVAT(1.0).loss(scores, predict, mixed)
    clean = F.cross_entropy(predict(scores)[:2], target[:2])
    assert torch.allclose(total, clean + AttentionVAT(1.0).loss(scores, predict))
    at = AttentionAT(1.0).loss(scores, predict, mixed)
    two = AttentionAT(1.0).loss(
        scores[:2], lambda s: predict(torch.cat([s, scores[2:]]))[:2], target[:2]
    )
    assert torch.allclose(at, two)
    assert AttentionAT(1.0).loss(scores, predict, torch.full((6,), -100)) == 0


# ------------------------------------------------------------------ the training loss


def test_the_loss_is_the_clean_one_and_the_one_at_the_changed_scores():
    scores, predict, target = pooling((3, 2, 7))
    for name in ("at", "iat"):
        r = changed(name, scores, predict, target)
        expected = F.cross_entropy(predict(scores), target) + 0.3 * F.cross_entropy(
            predict(scores + r), target
        )
        found = create_perturbation(name, epsilon=1.5, weight=0.3).loss(scores, predict, target)
        assert torch.allclose(found, expected)
    clean = create_perturbation("none").loss(scores, predict, target)
    assert torch.allclose(clean, F.cross_entropy(predict(scores), target))


@pytest.mark.parametrize("name", ["random", "at", "iat"])
def test_a_vanishing_epsilon_doubles_the_clean_loss(name):
    scores, predict, target = pooling((3, 2, 7))
    total = create_perturbation(name, epsilon=1e-9).loss(scores, predict, target)
    assert torch.allclose(total, 2 * F.cross_entropy(predict(scores), target), atol=1e-7)


@pytest.mark.parametrize("name", ["at", "iat", "vat", "ivat"])
def test_an_examples_r_depends_on_no_other_example(name):
    scores, predict, target = pooling((6, 2, 7))
    # VAT starts at a random direction, forgotten after enough iterations but for its sign.
    options = {"iterations": 400, "xi": 1e-3} if name in ("vat", "ivat") else {}
    whole = changed(name, scores, predict, target, **options)
    keep = torch.tensor([4, 1])

    def few(s):
        return predict(scores.index_copy(0, keep, s))[keep]

    part = changed(name, scores[keep], few, target[keep], **options)
    agreement = F.cosine_similarity(part, whole[keep], dim=-1)
    if options:
        agreement = agreement.abs()
    assert torch.allclose(agreement, torch.ones_like(agreement), atol=1e-4)


@pytest.mark.parametrize("seed", [2**62, 2**63 - 1, -(2**63)])
def test_every_seed_that_a_run_may_have_gives_random_numbers(seed):
    scores, predict, target = pooling((3, 7))
    change = create_perturbation("random", epsilon=1.0, seed=seed)
    assert change.loss(scores, predict, target).isfinite()


def test_random_numbers_are_a_function_of_seed_and_step():
    scores, predict, target = pooling((3, 7))
    state = torch.random.get_rng_state()
    first = create_perturbation("random", epsilon=1.0, seed=3)
    values = [first.loss(scores, predict, target).item() for _ in range(3)]
    resumed = create_perturbation("random", epsilon=1.0, seed=3)
    resumed.step = 2
    assert resumed.loss(scores, predict, target).item() == values[2]
    assert (
        len(
            {
                *values,
                create_perturbation("random", epsilon=1.0).loss(scores, predict, target).item(),
            }
        )
        == 4
    )
    assert torch.equal(torch.random.get_rng_state(), state)


# ------------------------------------------------------------------ masks and other edges


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by", ["mask", "infinity"])
def test_masked_positions_get_nothing_and_change_nothing(name, shape, by):
    mask = torch.ones(shape[0], shape[-1], dtype=torch.bool)
    mask[1, 4:] = False
    mask[2, 0] = False
    scores, predict, target = pooling(shape, mask=mask)
    places = mask.reshape(shape[0], *[1] * (len(shape) - 2), shape[-1]).expand(shape)
    if by == "infinity":
        scores, mask = scores.masked_fill(~places, -torch.inf), None
    r = changed(name, scores, predict, target, mask)
    assert (r[~places] == 0).all()
    assert torch.allclose(r.norm(dim=-1), torch.full(shape[:-1], 1.5).double())
    if by == "mask":  # whatever stands there
        other = torch.where(places, scores, 1e3)
        assert torch.allclose(changed(name, other, predict, target, mask), r)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_an_example_without_tokens_brings_no_nan(name):
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1] = False
    options = {} if name == "none" else {"epsilon": 2.0}
    for given in (mask, None):
        scores, predict, target = pooling((3, 2, 7), mask=mask)
        if given is None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        scores.requires_grad_()
        loss = create_perturbation(name, **options).loss(scores, predict, target, given)
        loss.backward()
        assert loss.isfinite() and scores.grad.isfinite().all()
        assert (scores.grad[1] == 0).all() and (scores.grad[0] != 0).any()


def test_masked_softmax_of_nothing_is_zero_with_a_zero_gradient():
    scores = torch.tensor(
        [[1.0, 2.0], [-torch.inf, -torch.inf], [0.5, -torch.inf]]
    ).requires_grad_()
    weights = masked_softmax(scores)
    assert torch.allclose(weights[0], torch.tensor([1.0, 2.0]).softmax(0))
    assert (weights[1] == 0).all() and torch.equal(weights[2], torch.tensor([1.0, 0.0]))
    weights.square().sum().backward()
    assert scores.grad.isfinite().all() and (scores.grad[1] == 0).all()


@pytest.mark.parametrize("name", ["at", "iat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_token_leaves_nothing_to_change(name, dtype):
    scores, predict, target = pooling((3, 2, 1), dtype=dtype)
    r = changed(name, scores, predict, target)
    assert (r == 0).all()
    loss = create_perturbation(name, epsilon=5.0).loss(scores, predict, target)
    assert torch.allclose(loss, 2 * F.cross_entropy(predict(scores), target))


@pytest.mark.parametrize("name", ["vat", "ivat", "random"])
def test_one_token_costs_nothing_beyond_the_clean_loss(name):
    scores, predict, target = pooling((3, 2, 1))
    total = create_perturbation(name, epsilon=5.0).loss(scores, predict, target)
    factor = 2 if name == "random" else 1
    assert torch.allclose(total, factor * F.cross_entropy(predict(scores), target))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("at", {"epsilon": 0}, "epsilon: got 0; give a positive"),
        ("ivat", {"epsilon": math.nan}, "epsilon: got nan"),
        ("vat", {"epsilon": 1.0, "xi": 0}, "xi: got 0"),
        (
            "ivat",
            {"epsilon": 1.0, "norm": "released"},
            "norm: got 'released'; give 'matrix' or 'row'",
        ),
        ("iatt", {"epsilon": 1.0}, "did you mean iat"),
        ("at", {"epsilon": 1.0, "xi": 0.1}, "at does not take that option"),
    ],
)
def test_what_a_method_cannot_be_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        create_perturbation(name, **options)


# ------------------------------------------------------------------ on a real head


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return load_backbone("test_vit", weights=None, num_classes=5)


def probe(backbone, batch=6, count=9, **options):
    torch.manual_seed(1)
    head = create_head("efficient_probe", backbone, **{"queries": 4, "norm": False, **options})
    width = head.queries.shape[1]
    with torch.no_grad():
        head.queries.mul_(30)
        head.classifier.weight.mul_(30)
    tokens = Tokens((torch.randn(batch, count, width),), torch.randn(batch, 1, width), (3, 3))
    return head.train(), tokens, torch.arange(batch) % 5


def step(head, tokens, target, perturbation, **options):
    attended = head.attend(tokens)
    return perturbation.loss(
        attended.scores, lambda s: head.classify(attended.with_scores(s)), target, **options
    )


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_head_gets_gradients_only_from_the_loss_itself(backbone, name):
    head, tokens, target = probe(backbone)
    options = {} if name == "none" else {"epsilon": 0.5}
    before = [p.clone() for p in head.parameters()]
    loss = step(head, tokens, target, create_perturbation(name, **options))
    assert all(p.grad is None for p in head.parameters())
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), before, strict=True))
    loss.backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in head.parameters())


def test_the_gradient_on_a_head_is_that_of_the_two_losses_with_r_held(backbone):
    head, tokens, target = probe(backbone)
    step(head, tokens, target, AttentionAT(0.5)).backward()
    found = [p.grad.clone() for p in head.parameters()]
    scores = head.attend(tokens).scores.detach()
    r = AttentionAT(0.5).perturbation(
        scores, lambda s: F.cross_entropy(head.logits(tokens, s), target, reduction="none")
    )
    head.zero_grad()
    attended = head.attend(tokens)
    both = sum(
        F.cross_entropy(head.classify(attended.with_scores(s)), target)
        for s in (attended.scores, attended.scores + r)
    )
    both.backward()
    for p, g in zip(head.parameters(), found, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-6)


@pytest.mark.parametrize("name", ["at", "vat"])
def test_running_statistics_follow_the_clean_pass_alone(backbone, name):
    head, tokens, target = probe(backbone, norm=True)
    head.logits(tokens, head.attend(tokens).scores)  # formed outside of the op, as in the step
    mean, seen = head.norm.running_mean.clone(), int(head.norm.num_batches_tracked)
    head.norm.reset_running_stats()
    step(head, tokens, target, create_perturbation(name, epsilon=5.0), module=head)
    assert torch.equal(head.norm.running_mean, mean)
    assert int(head.norm.num_batches_tracked) == seen and head.norm.track_running_stats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_mixed_precision_gives_the_loss_of_full_precision(backbone, name, dtype):
    head, tokens, target = probe(backbone)
    expected = step(head, tokens, target, create_perturbation(name, epsilon=0.5))
    with torch.autocast("cpu", dtype=dtype):
        found = step(head, tokens, target, create_perturbation(name, epsilon=0.5))
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=5e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    scaler.scale(found).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12  # no overflow
    assert all(p.isfinite().all() for p in head.parameters())


def test_half_precision_sees_the_direction_of_an_example_that_is_almost_right():
    scores, predict, _ = pooling((1, 9), dtype=torch.float32)
    with torch.no_grad():
        target = predict(scores).argmax(1)
    sharp = 15.0 / float(predict(scores).sort().values.diff()[0, -1])  # p = 1 - 3e-7

    def loss(s):
        return F.cross_entropy((sharp * predict(s)).float(), target, reduction="none")

    full = AttentionAT(1.0).perturbation(scores, loss)
    with torch.autocast("cpu", dtype=torch.float16):
        half = AttentionAT(1.0).perturbation(scores, loss)
    assert F.cosine_similarity(full, half).item() > 0.98


def test_at_follows_the_slope_of_the_batchs_loss_through_batch_norm(backbone):
    """Examples with very different losses, coupled by their batch's mean and variance."""
    head, tokens, target = probe(backbone, norm=True)
    head = head.double().train()
    tokens = Tokens((tokens.patches[0].double(),), tokens.prefix.double(), tokens.grid)
    scores = head.attend(tokens).scores.detach()
    with torch.no_grad():
        target = torch.where(torch.arange(6) < 4, head.logits(tokens, scores).argmax(1), target)
    loss = losses(lambda s: head.logits(tokens, s), target)
    assert loss(scores).max() > 20 * loss(scores).min()
    g = gradient(scores, loss)
    r = AttentionAT(0.5).perturbation(scores, loss)
    assert torch.allclose(r, 0.5 * g / g.norm(dim=-1, keepdim=True))


class _Unmoved(AttentionVAT):
    """VAT at r = 0."""

    def _extra(self, done):
        return divergence(done.logits, done.predict(done.scores)).mean()


def test_two_passes_of_a_step_have_the_same_dropout(backbone):
    torch.manual_seed(2)
    head = create_head("memetector", backbone, hidden=[32], num_taps=1, classes=5).train()
    width = backbone.channels[-1]
    tokens = Tokens((torch.randn(6, 9, width),), torch.randn(6, 1, width), (3, 3))
    attended = head.attend(tokens)

    def predict(scores):
        return head.classify(attended.with_scores(scores))

    assert not torch.equal(predict(attended.scores), predict(attended.scores))  # dropout is on
    assert _Unmoved(1.0).loss(attended.scores, predict, module=head) == 0
    state = torch.get_rng_state()
    predict(attended.scores)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    create_perturbation("at", epsilon=1.0).loss(
        attended.scores, predict, torch.arange(6) % 5, module=head
    )
    assert torch.equal(torch.get_rng_state(), after)  # one pass was drawn for
