"""Token explainers that multiply the attention of all layers: relevance, gradient x attention, rollout."""

import pytest
import torch
from conversations import conversation, explained, loaded, of_sequence
from vlm_models import EAGER_ONLY, network, processor

from xattn.vlm.explainers.base import create_token_explainer
from xattn.vlm.loading import load_vlm

DECODERS = ("llava", "qwen2_vl", "gemma3", "paligemma")


def written_out(context):
    """The model's attention as tables, (H, N, S) by kind and layer, with the graph of the words' scores."""
    model = context.vlm.model
    before = {name: c._attn_implementation for name, c in configs(model)}
    model.set_attn_implementation("eager")
    try:
        with torch.enable_grad():
            f = context.features[None].clone().requires_grad_()
            out = context.output(f, output_attentions=True)
            scores = context.scores_of(out.logits[:, context.forced.rows])[0]
    finally:
        for name, c in configs(model):
            c._attn_implementation = before[name]
    if context.vlm.kind == "encoder":
        tables = [out.encoder_attentions, out.decoder_attentions, out.cross_attentions]
    else:
        tables = [(), out.attentions, ()]
    return scores, tables


def configs(model):
    return [(n, m.config) for n, m in model.named_modules() if hasattr(m, "config")]


def words_rows(context):
    return [context.rows[list(context.words[i].tokens)] for i in context.asked]


def weighted(scores, tables, word):
    grads = torch.autograd.grad(scores[word], tables, retain_graph=True)
    return [(a * g).clamp_min(0).mean(1)[0].detach() for a, g in zip(tables, grads, strict=True)]


@pytest.mark.parametrize("kind", DECODERS)
def test_relevance_is_a_row_of_the_published_product_of_matrices(kind):
    context = conversation(kind, asked=[0, 2])
    found = of_sequence(context, explained("generic_relevance", context))
    only_layer_1 = of_sequence(context, explained("gradient_attention", context, layers=[1]))
    added = of_sequence(context, explained("gradient_attention", context))
    scores, (_, tables, _) = written_out(context)
    for w, rows in enumerate(words_rows(context)):
        weights = weighted(scores, tables, w)
        r = torch.eye(len(context.sequence))
        for e in weights:
            r = r + e @ r
        torch.testing.assert_close(found[w], r[rows].sum(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(only_layer_1[w], weights[1][rows].sum(0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(added[w], sum(weights)[rows].sum(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_relevance_of_an_encoder_decoder_is_the_published_one(normalise):
    context = conversation("florence2", asked=[2])
    found = explained("generic_relevance", context, normalise=normalise)
    scores, (encoder, decoder, cross) = written_out(context)
    flat = weighted(scores, [*encoder, *decoder, *cross], 0)
    e_i, e_q = flat[: len(encoder)], flat[len(encoder) : -len(cross)]

    def bar(r):
        rest = r - torch.eye(len(r))
        sums = rest.sum(1, keepdim=True)
        return torch.nan_to_num(rest / sums) + torch.eye(len(r)) if normalise else r

    r_ii, r_qq, r_qi = torch.eye(25), torch.eye(4), torch.zeros(4, 25)
    for e in e_i:
        r_ii = r_ii + e @ r_ii
    for e, crossed in zip(e_q, flat[-len(cross) :], strict=True):
        r_qq, r_qi = r_qq + e @ r_qq, r_qi + e @ r_qi
        r_qi = r_qi + bar(r_qq).T @ crossed @ bar(r_ii)
    (row,) = words_rows(context)[0].tolist()
    torch.testing.assert_close(found.image[0], r_qi[row, context.image], atol=1e-6, rtol=1e-4)
    prompt = context.text[context.text < 25]
    answer = torch.cat([r_qq[row, 1:], torch.zeros(1)])  # the first is no token of the answer
    wanted = torch.cat([r_qi[row, prompt], answer])
    torch.testing.assert_close(found.text[0], wanted, atol=1e-6, rtol=1e-4)


def test_without_a_gradient_relevance_stays_where_the_word_was_made():
    context = conversation(asked=[1])
    whole = context.scores
    context.scores = lambda features: whole(features) * 0
    found = of_sequence(context, explained("generic_relevance", context))
    one_hot = torch.zeros(len(context.sequence))
    one_hot[context.rows[1]] = 1
    torch.testing.assert_close(found[0], one_hot)
    assert explained("gradient_attention", context).image.abs().max() == 0


def test_relevance_of_one_layer_is_attention_times_its_gradient():
    vlm = load_vlm(network("llava", num_hidden_layers=1), processor("llava"))
    context = conversation(vlm=vlm, asked=[1])
    found = of_sequence(context, explained("generic_relevance", context))[0]
    scores, (_, tables, _) = written_out(context)
    row = int(context.rows[1])
    wanted = weighted(scores, tables, 0)[0][row]
    wanted[row] += 1
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_rollout_is_a_row_of_the_product_of_matrices():
    for kind in ("llava", "gemma3"):
        context = conversation(kind, asked=[0, 3])
        for c in (0.5, 0.3):
            found = of_sequence(context, explained("rollout", context, residual=c))
            product = torch.eye(len(context.sequence))
            for a in written_out(context)[1][1]:
                product = (c * torch.eye(len(product)) + (1 - c) * a.mean(1)[0].detach()) @ product
            wanted = torch.stack([product[rows].mean(0) for rows in words_rows(context)])
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_rollout_of_one_layer_is_half_of_attention():
    vlm = load_vlm(network("llava", num_hidden_layers=1), processor("llava"))
    context = conversation(vlm=vlm, asked=[1])
    found = explained("rollout", context).image[0]
    (table,) = written_out(context)[1][1]
    wanted = table[0, :, context.rows[1]].mean(0)[context.image] / 2
    torch.testing.assert_close(found, wanted.detach(), atol=1e-7, rtol=1e-5)


def test_rollout_of_uniform_attention_has_a_closed_form():
    vlm = load_vlm(network("llava", num_hidden_layers=2), processor("llava"))
    with torch.no_grad():
        for layer in vlm.model.model.language_model.layers:
            layer.self_attn.q_proj.weight.zero_()
    context = conversation(vlm=vlm, asked=[0])
    found = of_sequence(context, explained("rollout", context))[0]
    n = int(context.rows[0]) + 1
    # Row n of ((A + 1) / 2)^2, A_ij = 1 / i: half of A's own, and what comes by way of rows j..n.
    steps = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    by_way = torch.stack([steps[j:].sum() for j in range(n)])
    wanted = (by_way / n + 2 / n) / 4
    wanted[-1] += 1 / 4
    torch.testing.assert_close(found[:n].double(), wanted, atol=1e-6, rtol=1e-5)
    assert (found[n:] == 0).all()


@pytest.mark.parametrize("kind", ["florence2", "mllama", "blip_2"])
def test_all_of_a_word_is_accounted_for_where_attention_crosses(kind):
    context = conversation(kind, asked=[0, 3])
    found = explained("rollout", context)
    assert found.image.shape == (2, len(context.features)) and (found.image.sum(1) > 0).all()
    assert found.text.shape == (2, len(context.text))
    lost = 1 - found.image.sum(1) - found.text.sum(1)
    # Florence-2's answers start with a token that is in no text.
    assert (lost > 0.01).all() if kind == "florence2" else lost.abs().max() < 1e-5
    for name in ("generic_relevance", "gradient_attention"):
        scores = explained(name, context)
        assert (scores.image >= 0).all() and (scores.image.sum(1) > 0).all()


def test_layers_that_are_not_there_are_refused():
    context = conversation("mllama")
    with pytest.raises(ValueError, match="layers: got 7; the model has 3, numbered from 0"):
        explained("gradient_attention", context, layers=[0, 7])
    with pytest.raises(ValueError, match="layers: got"):
        create_token_explainer("gradient_attention", layers=[-1])


@pytest.mark.parametrize("kind", EAGER_ONLY)
def test_a_model_that_writes_its_softmax_out_is_told_what_can_explain_it(kind):
    context = conversation(kind)
    for name in ("rollout", "generic_relevance", "gradient_attention"):
        with pytest.raises(ValueError, match=f"explainer: {name} reads calls .*occlusion") as told:
            explained(name, context)
        assert "rollout," not in str(told.value) and "tam" not in str(told.value)
    assert loaded(kind) is context.vlm
