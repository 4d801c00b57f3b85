"""Attention whose weights are trained on what masks do to words."""

import json

import pytest
import torch
from conversations import conversation, explained

from xattn.vlm.explainers.base import create_token_explainer, exclusive_use
from xattn.vlm.explainers.layers import HeadRows
from xattn.vlm.explainers.outcomes import Outcomes, OutcomesTrainer


def rows_of(context):
    return torch.stack(list(HeadRows(context.vlm).of_words(context, image=True)))


@pytest.mark.parametrize("kind", ["llava", "florence2"])
def test_equal_weights_are_the_mean_of_all_heads(kind):
    context = conversation(kind, asked=[0, 2])
    found = explained("outcomes", context, above_mean=False)
    wanted = rows_of(context).mean(1)
    torch.testing.assert_close(found.image, wanted)
    above = (wanted - wanted.mean(1, keepdim=True)).clamp_min(0)
    torch.testing.assert_close(explained("outcomes", context).image, above)
    if kind == "llava":
        attention = explained("attention", context)
        torch.testing.assert_close(found.image, attention.image, atol=1e-3, rtol=0)  # float16
        torch.testing.assert_close(found.text, attention.text, atol=1e-3, rtol=0)
    assert create_token_explainer("outcomes").notes(context) == [
        "not trained: all heads have the same weight"
    ]


def test_training_finds_the_weights_that_made_the_outcomes():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(6, generator=generator, dtype=torch.float64)
    trainer = OutcomesTrainer()
    for _ in range(20):
        sums = torch.rand(32, 6, generator=generator, dtype=torch.float64)
        trainer.examples.append((sums, 3 + 7 * sums @ wanted))
    head = trainer.fit(decay=0)
    weights = torch.tensor(head.weights, dtype=torch.float64)
    torch.testing.assert_close(weights / weights.sum(), wanted / wanted.sum(), atol=1e-3, rtol=0)
    assert trainer.correlation(head) > 0.9999 > 0.99 > trainer.correlation()
    assert head.about["words"] == 20 and head.about["correlation"] == trainer.correlation(head)
    tied = torch.tensor(trainer.fit(decay=1e3).weights)  # which hardly lets them differ
    torch.testing.assert_close(tied, torch.full((6,), 1 / 6), atol=1e-3, rtol=0)


def test_the_loss_is_one_less_the_correlation_and_has_its_gradient():
    generator = torch.Generator().manual_seed(2)
    sums, lost = (torch.rand(*n, generator=generator, dtype=torch.float64) for n in ((8, 3), (8,)))
    trainer = OutcomesTrainer()
    trainer.examples.append((sums, lost))
    w = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    loss = trainer.loss(w)
    own = (sums @ w).detach()
    r = float(torch.corrcoef(torch.stack([own, lost]))[0, 1])
    assert float(loss.detach()) == pytest.approx(1 - r)
    # d r / d s_j = (b_j - r a_j) / |s - mean s|, a and b the centred sums and outcomes of length 1.
    a, b = ((x - x.mean()) / (x - x.mean()).norm() for x in (own, lost))
    wanted = -sums.T @ (b - r * a) / (own - own.mean()).norm()
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], wanted)


def test_the_head_that_masks_follow_is_found():
    context = conversation("llava_next", photos=2)
    with exclusive_use(context.vlm):
        rows = rows_of(context)  # (4, 12, n)
        context.hidden = lambda masks: context.scores().cpu() - masks.float() @ rows[:, 7].T * 9
        trainer = OutcomesTrainer(masks=64, cells=None)
        trainer.explain(context)
        assert [tuple(x.shape) for x, _ in trainer.examples] == [(64, 12)] * 4
        head = trainer.fit(decay=1e-4)
        assert int(torch.tensor(head.weights).argmax()) == 7
        assert trainer.correlation(head) > 0.99 > trainer.correlation() + 0.02
        head.above_mean = False
        found, best = head.explain(context).image, rows[:, 7]
    for own, wanted in zip(found, best, strict=True):
        assert float(torch.corrcoef(torch.stack([own, wanted]))[0, 1]) > 0.95


def test_words_that_need_no_image_are_not_learned_from():
    context = conversation()
    trainer = OutcomesTrainer(masks=4, needed=1e6)
    with exclusive_use(context.vlm):
        trainer.explain(context)
    for asked in (trainer.fit, trainer.correlation):
        with pytest.raises(ValueError, match=r"examples: none of the words lost 1000000.0 nats"):
            asked()


def test_weights_are_saved_and_read_and_fit_one_model(tmp_path):
    context = conversation(asked=[1])
    weights = torch.rand(12, generator=torch.Generator().manual_seed(0))
    Outcomes(weights=weights.tolist()).save(tmp_path / "head.json")
    read = create_token_explainer("outcomes", weights=str(tmp_path / "head.json"))
    with exclusive_use(context.vlm):
        image, wanted = read.explain(context).image[0], weights @ rows_of(context)[0]
        torch.testing.assert_close(image, (wanted - wanted.mean()).clamp_min(0))
    assert read.notes(context) == []
    with pytest.raises(ValueError, match="weights: got 3, but 12 heads of a Llava"):
        explained("outcomes", context, weights=[0.1, 0.2, 0.3])
    (tmp_path / "other.json").write_text(json.dumps({"w": []}))
    for name in ("other.json", "missing.json"):
        with pytest.raises(ValueError, match=f"weights: .*{name} holds no weights"):
            create_token_explainer("outcomes", weights=str(tmp_path / name))
