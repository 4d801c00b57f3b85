"""Attention without its sinks, and relative to that of other words."""

from contextlib import contextmanager

import pytest
import torch
from conversations import conversation, explained, loaded, of_sequence

from xattn.vlm.explainers.base import create_token_explainer, exclusive_use
from xattn.vlm.explainers.relative_attention import GENERAL
from xattn.vlm.explainers.sinks import sink_table, tower_outliers
from xattn.vlm.reading import read_rows

METHODS = ("attention", "relative_attention", "localization_heads", "rollout")


@pytest.fixture
def with_sinks():
    """A conversation of which the first token and some others have one dimension that is far too large."""
    context = conversation(asked=[0, 2], prompt="describe <image> what is on the table ?")
    embed = context.vlm.model.get_input_embeddings()
    before = embed.weight.detach().clone()
    with torch.no_grad():
        embed.weight[context.sequence[[0, 19]], 7] = 300
    yield context
    with torch.no_grad():
        embed.weight.copy_(before)


def test_sinks_are_large_where_the_first_token_is(with_sinks):
    context = with_sinks
    table = sink_table(context, ratio=4.0)
    assert not table[:2].any() and table[2].nonzero()[:, 0].tolist() == [0, 19]
    with torch.no_grad():
        x = context.output(output_hidden_states=True).hidden_states[2][0]
    phi = x.abs() / x.square().mean(1, keepdim=True).sqrt()
    dims = phi[0] > 4
    assert dims.tolist() == [d == 7 for d in range(32)]
    assert torch.equal(table[2], phi[:, 7] > 4)
    assert not sink_table(context, ratio=6.0).any()  # 32 dimensions: at most sqrt(32) = 5.66


@pytest.mark.parametrize("name", METHODS)
def test_without_sinks_nothing_changes(name, with_sinks):
    kept = explained(name, with_sinks)
    dropped = explained(name, with_sinks, sinks="drop", sink_ratio=6.0)
    torch.testing.assert_close(dropped.image, kept.image, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["attention", "rollout"])
def test_dropped_sinks_count_nothing_and_rows_keep_their_sum(name, with_sinks):
    context = with_sinks
    sinks = sink_table(context, ratio=4.0)[2]
    options = {"layers": (2,)} if name == "attention" else {}
    dropped = of_sequence(context, explained(name, context, sinks="drop", sink_ratio=4, **options))
    torch.testing.assert_close(dropped.sum(1), torch.ones(2))
    if name == "attention":
        kept = of_sequence(context, explained(name, context, **options))
        assert (kept[:, sinks] > 0).any() and (dropped[:, sinks] == 0).all()
        heads = []
        with read_rows(context.vlm.decoder, heads.append, context.rows[[0, 2]].tolist()):
            context.logits()
        rows = heads[2].weights[0].masked_fill(sinks, 0)  # (H, R, S)
        wanted = (rows / rows.sum(-1, keepdim=True)).mean(0)
        torch.testing.assert_close(dropped, wanted[:, : dropped.shape[1]], atol=1e-6, rtol=1e-5)


def test_rollout_without_sinks_is_the_product_of_changed_matrices(with_sinks):
    context = with_sinks
    table = sink_table(context, ratio=4.0)
    every = []
    places = range(len(context.sequence))
    with read_rows(context.vlm.decoder, every.append, places):
        context.logits()
    product = torch.eye(len(places))
    for rows, sinks in zip(every, table, strict=True):
        a = rows.weights[0].masked_fill(sinks, 0)
        a = torch.nan_to_num(a / a.sum(-1, keepdim=True)).mean(0)
        product = (a + torch.eye(len(places))) / 2 @ product
    found = explained("rollout", context, sinks="drop", sink_ratio=4.0)
    wanted = product[context.rows[[0, 2]]]
    torch.testing.assert_close(of_sequence(context, found), wanted, atol=1e-6, rtol=1e-4)


def test_the_number_of_sinks_is_told(with_sinks):
    explainer = create_token_explainer("attention", sinks="drop", sink_ratio=4.0)
    with exclusive_use(with_sinks.vlm):
        explainer.explain(with_sinks)
        assert explainer.notes(with_sinks) == ["2 sinks left out, 0 of 16 image tokens"]
        assert create_token_explainer("attention").notes(with_sinks) == []
        none = create_token_explainer("rollout", sinks="drop")
        assert none.notes(with_sinks) == ["no token is a sink"]


def test_hidden_states_are_asked_for_once(with_sinks, monkeypatch):
    asked, output = [], with_sinks.output
    monkeypatch.setattr(
        with_sinks,
        "output",
        lambda *a, **k: asked.append("output_hidden_states" in k) or output(*a, **k),
    )
    explainer = create_token_explainer("attention", sinks="drop", sink_ratio=4.0)
    with exclusive_use(with_sinks.vlm):
        explainer.explain(with_sinks)
        explainer.notes(with_sinks)
        create_token_explainer("logit_lens").explain(with_sinks)
    assert asked.count(True) == 1


def test_sinks_of_models_that_cross_attend_are_refused():
    context = conversation("mllama")
    for name in ("attention", "rollout"):
        with pytest.raises(ValueError, match="sinks: got 'drop'.*give 'keep'"):
            explained(name, context, sinks="drop")


# ---------------------------------------------------------------------- relative attention


@pytest.mark.parametrize("kind", ["llava", "florence2", "mllama", "blip"])
def test_relative_attention_is_a_quotient_of_rows(kind):
    context = conversation(kind)
    rows = explained("attention", context).image  # each word is a token
    found = explained("relative_attention", context).image
    torch.testing.assert_close(found * rows.mean(0), rows)
    assert found.mean(0) == pytest.approx(torch.ones(rows.shape[1]), abs=1e-5)
    only = conversation(kind, answer="red")
    assert explained("relative_attention", only).image == pytest.approx(torch.ones_like(found[:1]))


@pytest.mark.parametrize("kind", ["llava", "florence2"])
def test_a_prompt_as_reference_is_that_prompts_last_row(kind):
    context = conversation(kind, asked=[2])
    other = conversation(kind, prompt=GENERAL, asked=[0])
    reference = explained("attention", other).image[0]  # of the row that makes the first word
    rows = explained("attention", context).image
    found = explained("relative_attention", context, reference=GENERAL).image
    torch.testing.assert_close(found, rows / reference)
    same = conversation(kind, prompt=GENERAL, asked=[0])
    ones = explained("relative_attention", same, reference=GENERAL).image
    torch.testing.assert_close(ones, torch.ones_like(ones))


@contextmanager
def grown(vlm):
    """Inside, the third vector that the projector is given is 1000 times as long."""
    names = ("multi_modal_projector", "merger")
    projector = next(m for n, m in vlm.model.named_modules() if n.endswith(names))

    def grow(module, args):
        change = torch.ones(args[0].shape[:-1].numel(), 1)
        change[2] = 1000
        return (args[0] * change.reshape(*args[0].shape[:-1], 1), *args[1:])

    handle = projector.register_forward_pre_hook(grow)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["llava", "paligemma", "internvl"])
def test_outliers_of_the_tower_are_sinks_of_every_layer(kind):
    context = conversation(kind)
    assert not tower_outliers(context).any()
    with grown(context.vlm):
        context = conversation(kind)
        assert tower_outliers(context).nonzero().flatten().tolist() == [2]
        found = explained("attention", context, sinks="drop")
    assert (found.image[:, 2] == 0).all() and (found.image[:, 3] > 0).all()
    whole = found.image.sum(1) + found.text.sum(1)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    told = create_token_explainer("attention", sinks="drop").notes(context)
    assert told[0].endswith("1 of them outliers of the image tower")


def test_towers_whose_tokens_are_put_together_later_have_no_known_outliers():
    for kind in ("qwen2_vl", "mistral3", "llava_next"):
        with grown(loaded(kind)):
            assert not tower_outliers(conversation(kind)).any()
