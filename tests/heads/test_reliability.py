"""Reliability balancing: ARBEx's limit cases, and no dependence on the batch."""

from __future__ import annotations

import math

import pytest
import torch
from attentive_fakes import GRID, make, random_tokens, vit

from xattn.heads import load_head, save_head
from xattn.heads.reliability import ReliabilityBalancing, confidence

K, D = 4, 6
N = GRID[0] * GRID[1]


def balancing(anchors=3, **options):
    torch.manual_seed(0)
    return ReliabilityBalancing(K, D, anchors, **options).double()


def sample(batch=5):
    torch.manual_seed(1)
    return torch.randn(batch, D).double(), 2 * torch.randn(batch, K).double()


def loss(module, e, logits, target):
    """What a head with anchors is trained with, at full trust."""
    p = module(e, logits).probabilities.gather(1, target[:, None])
    pulled = module.center_loss(e, logits, target)
    return -p.clamp_min(1e-12).log().mean() + module.anchor_loss() + pulled


def test_confidence_is_one_for_one_hot_and_zero_for_uniform():
    p = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(confidence(p), torch.tensor([1.0, 0.0, 0.5]))


@pytest.mark.parametrize("trust", [0.0, 0.3, 1.0])
def test_probabilities_sum_to_one(trust):
    e, logits = sample()
    found = balancing()(e, logits, trust)
    for p in (found.probabilities, found.geometric, found.attention):
        torch.testing.assert_close(p.sum(1), torch.ones(5).double())
    assert ((found.reliability >= 0) & (found.reliability <= 1)).all()


def test_without_trust_nothing_is_corrected():
    e, logits = sample()
    found = balancing(temperature=2.0)(e, logits, 0.0)
    torch.testing.assert_close(found.probabilities, (logits / 2).softmax(1))


@pytest.mark.parametrize("trust", [0.5, 1.0])
def test_a_sure_classifier_is_not_corrected(trust):
    e, _ = sample()
    logits = torch.full((5, K), -1e4).double()
    logits[:, 2] = 1e4
    found = balancing()(e, logits, trust)
    torch.testing.assert_close(found.probabilities, logits.softmax(1))


def test_the_equations_written_as_loops():
    module = balancing(delta=0.7)
    e, logits = sample(2)
    found = module(e, logits, 0.4)
    a = module.anchors
    for b in range(2):
        near = torch.stack([-(e[b] - a[c]).norm(dim=1) / 0.7 for c in range(K)])
        g = (near.exp() / near.exp().sum()).sum(1)
        hot = torch.stack([(module.query(e[b]) * module.key(a[c])).sum(1) for c in range(K)])
        hot = (hot / math.sqrt(D)).exp()
        t = (hot / hot.sum()).sum(1)
        p0 = logits[b].softmax(0)
        conf = [1 + (p * p.log()).sum().item() / math.log(K) for p in (g, t, p0)]
        correction = (conf[0] * g + conf[1] * t) / (conf[0] + conf[1])
        p = 0.6 * p0 + 0.4 * (conf[2] * p0 + (1 - conf[2]) * correction)
        torch.testing.assert_close(found.geometric[b], g)
        torch.testing.assert_close(found.attention[b], t)
        torch.testing.assert_close(found.probabilities[b], p)


def test_an_embedding_on_an_anchor_far_from_the_others_is_its_class():
    module = balancing(anchors=1, delta=0.1)
    with torch.no_grad():
        module.anchors.copy_(10 * torch.eye(D).double()[:K, None])
    g = module.geometric(module.anchors[2])
    torch.testing.assert_close(g, torch.eye(K).double()[2:3])


def test_equal_anchors_know_nothing_and_give_no_nan():
    module = balancing(anchors=1)
    with torch.no_grad():
        module.anchors.zero_()
    e, logits = sample()
    found = module(e, logits, 1.0)
    uniform = torch.full((5, K), 1 / K).double()
    torch.testing.assert_close(found.geometric, uniform)
    torch.testing.assert_close(found.attention, uniform)
    sure = confidence(logits.softmax(1))[:, None]
    expected = sure * logits.softmax(1) + (1 - sure) * uniform
    torch.testing.assert_close(found.probabilities, expected)
    loss(module, e, logits, torch.tensor([0, 1, 2, 3, 0])).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_a_prediction_does_not_depend_on_its_batch():
    module = balancing()
    e, logits = sample()
    whole = module(e, logits)
    for i in range(5):
        alone = module(e[i : i + 1], logits[i : i + 1])
        torch.testing.assert_close(alone.probabilities, whole.probabilities[i : i + 1])


def test_anchors_start_apart_and_repel_only_below_the_margin():
    module = balancing()
    assert module.distances(torch.zeros(1, D).double()).std() > 0
    assert module.anchor_loss() > 0  # of norm about 1, closer than sqrt(D)
    with torch.no_grad():
        module.anchors.copy_(torch.randn(K, 1, D) * 100)
    assert module.anchor_loss() == 0


def test_anchors_of_one_class_do_not_repel():
    module = balancing(anchors=2)
    with torch.no_grad():
        module.anchors.copy_((100 * torch.eye(D).double()[:K, None]).expand(-1, 2, -1))
    assert module.anchor_loss() == 0


def test_the_pull_to_the_anchors_has_no_gradient_to_the_logits():
    module = balancing()
    e, logits = sample()
    logits.requires_grad_()
    module.center_loss(e, logits, torch.tensor([0, 1, 2, 3, 0])).backward()
    assert logits.grad is None
    assert module.anchors.grad.abs().sum() > 0


def test_gradients_are_right():
    module = balancing(anchors=2)
    e, logits = sample(3)
    target = torch.tensor([0, 3, 1])

    def loss(e, anchors):
        return torch.func.functional_call(
            module, {"anchors": anchors}, (e, logits, 0.7)
        ).probabilities.gather(1, target[:, None])

    anchors = module.anchors.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (e.requires_grad_(), anchors))


def test_training_lowers_the_loss_and_the_anchors_learn_the_classes():
    torch.manual_seed(0)
    centres = 3 * torch.randn(K, D)
    y = torch.arange(80) % K
    e = centres[y] + 0.5 * torch.randn(80, D)
    module = ReliabilityBalancing(K, D, 2)
    logits = torch.zeros(80, K)  # a classifier that knows nothing
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    first = loss(module, e, logits, y).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(module, e, logits, y).backward()
        optimizer.step()
    found = module(e, logits)
    assert loss(module, e, logits, y).item() < first / 2
    assert (found.probabilities.argmax(1) == y).float().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": 0}, "anchors: got 0"),
        ({"delta": 0.0}, "delta: got 0.0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReliabilityBalancing(K, D, **options)


# ---------------------------------------------------------------------- as an option of a head


@pytest.mark.parametrize("name", ["efficient_probe", "gap", "v_jepa"])
def test_a_head_with_anchors_answers_with_balanced_probabilities(name):
    head = make(name, reliability={"anchors": 2})
    tokens = random_tokens(head)
    with torch.no_grad():
        attended = head.attend(tokens)
        found, e = head.balance(attended), head.embed(attended)
        expected = head.balancing(e, head.logits(tokens), 1.0)
        torch.testing.assert_close(found.probabilities, expected.probabilities)
        torch.testing.assert_close(head.predict(attended).softmax(1), found.probabilities)
        head.trust = 0.0
        plain = head.logits(tokens).softmax(1)
        torch.testing.assert_close(head.predict(attended).softmax(1), plain)


def test_class_maps_of_a_head_with_anchors_still_share_out_its_logits():
    head = make("efficient_probe", reliability={"anchors": 2})
    tokens = random_tokens(head)
    with torch.no_grad():
        maps, rest = head.class_maps(tokens)
        torch.testing.assert_close(maps.sum((2, 3)) + rest, head.logits(tokens))


def test_anchors_are_saved_with_their_head(tmp_path):
    head = make("efficient_probe", reliability={"anchors": 3, "delta": 0.5})
    save_head(head, tmp_path / "h")
    loaded = load_head(tmp_path / "h", vit())
    tokens = random_tokens(head)
    with torch.no_grad():
        for a, b in zip(
            head.balance(head.attend(tokens)), loaded.balance(loaded.attend(tokens)), strict=True
        ):
            assert torch.equal(a, b)


def test_a_head_without_anchors_says_so():
    head = make("gap")
    with pytest.raises(ValueError, match="gap has no anchors"):
        head.balance(head.attend(random_tokens(head)))


def test_sure_logits_and_far_anchors_have_finite_gradients():
    module = balancing().float()
    e = (100 * torch.randn(3, D)).requires_grad_()
    logits = torch.tensor([[200.0, 0, 0, 0], [0, 90, 0, 0], [0, 0, 0, 0]]).requires_grad_()
    loss(module, e, logits, torch.tensor([0, 1, 2])).backward()
    assert e.grad.isfinite().all() and logits.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_anchors_work_in_half_precision(dtype):
    head = make("gap", reliability={"anchors": 3}).to(dtype)
    tokens = random_tokens(head, dtype=dtype)
    with torch.no_grad():
        answer = head.predict(head.attend(tokens))
    assert answer.isfinite().all()
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(3), rtol=1e-3, atol=1e-3)


def test_balancing_is_exported_with_a_free_batch():
    module = balancing(anchors=2).float()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.randn(3, D), torch.randn(3, K)
    free = {0: batch}, {0: batch}
    exported = torch.export.export(_Answer(module), example, dynamic_shapes=free)
    assert exported.module()(torch.randn(40, D), torch.randn(40, K)).shape == (40, K)


class _Answer(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, e, logits):
        return self.module(e, logits).probabilities
