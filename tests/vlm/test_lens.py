"""What image tokens would say as words: the logit lens, and TAM."""

import numpy as np
import pytest
import torch
from conversations import conversation, explained, of_sequence

from xattn.vlm.explainers.base import create_token_explainer
from xattn.vlm.explainers.tam import rank_filter, unexplained_part


@pytest.mark.parametrize("kind", ["llava", "blip_2"])
def test_the_lens_of_the_last_layer_gives_the_models_own_logits(kind):
    context = conversation(kind, asked=[0, 3])
    found = of_sequence(context, explained("logit_lens", context))
    with torch.no_grad():
        logits = context.output().logits[0].float()
    for row, i in zip(found, context.asked, strict=True):
        (t,) = context.words[i].tokens
        end = int(context.rows[t]) + 1
        wanted = logits[:, context.ids[t]]
        image = context.image[context.image < end]
        torch.testing.assert_close(row[image], wanted[image])
        torch.testing.assert_close(row[:end], wanted[:end])
        assert (row[end:] == 0).all()


def test_the_lens_of_an_earlier_layer_goes_through_the_last_norm():
    context = conversation("gemma3", asked=[1])
    decoder = context.vlm.model.get_decoder()
    kept = []
    hook = decoder.layers[0].register_forward_hook(lambda m, a, out: kept.append(out))
    found = explained("logit_lens", context, layer=0)
    hook.remove()
    output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    with torch.no_grad():
        logits = context.vlm.model.lm_head(decoder.norm(output))[0]
    torch.testing.assert_close(found.image[0], logits[context.image, context.ids[1]])
    torch.testing.assert_close(explained("logit_lens", context, layer=-3).image, found.image)
    with pytest.raises(ValueError, match="layer: got 3; the model has 3, numbered from 0"):
        explained("logit_lens", context, layer=3)


@pytest.mark.parametrize(("kind", "depends"), [("llava", 0), ("qwen3_vl", 0), ("paligemma", 1)])
def test_the_lens_does_not_know_the_question_unless_the_image_sees_it(kind, depends):
    one, other = (
        explained("logit_lens", conversation(kind, prompt=prompt, asked=[0])).image
        for prompt in ("what is on the table ?", "is there a dog ?")
    )
    change = float((one - other).abs().max())
    assert change > 1e-3 if depends else change < 1e-5


@pytest.mark.parametrize("name", ["logit_lens", "tam"])
@pytest.mark.parametrize("kind", ["florence2", "mllama"])
def test_models_whose_head_reads_no_image_token_are_told_what_can(name, kind):
    with pytest.raises(ValueError, match=f"explainer: {name} needs image tokens .*occlusion"):
        explained(name, conversation(kind))


def test_what_earlier_words_explain_is_taken_away():
    a = torch.tensor([1.0, 2.0, 0.0, 3.0])
    torch.testing.assert_close(unexplained_part(a, torch.zeros(0, 4), torch.zeros(0)), a)
    assert unexplained_part(a, (a / 2)[None], torch.tensor([3.0])).abs().max() < 1e-6
    earlier = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.0, 3.0])
    b = (weights / 4) @ earlier
    best = torch.linalg.lstsq(b[:, None], a[:, None]).solution[0, 0]
    torch.testing.assert_close(unexplained_part(a, earlier, weights), (a - best * b).clamp_min(0))
    assert torch.equal(unexplained_part(a, earlier, torch.zeros(3)), a)


def test_the_filter_weighs_sorted_values_by_their_rank():
    values = np.random.default_rng(0).random((4, 5), np.float32)
    found = rank_filter(values, 3)
    window = np.sort(values[0:3, 2:5].ravel())  # around (1, 3)
    v = window.std() / window.mean()
    weights = np.exp(-(np.arange(-4, 5) ** 2) / (2 * v**2))
    assert found[1, 3] == pytest.approx((weights * window).sum() / weights.sum(), rel=1e-5)
    corner = np.sort(values[[1, 0, 1]][:, [1, 0, 1]].ravel())  # the edges are reflected
    v = corner.std() / corner.mean()
    weights = np.exp(-(np.arange(-4, 5) ** 2) / (2 * v**2))
    assert found[0, 0] == pytest.approx((weights * corner).sum() / weights.sum(), rel=1e-5)
    np.testing.assert_allclose(rank_filter(np.full((3, 3), 0.3, np.float32), 3), 0.3)
    assert not rank_filter(np.zeros((1, 4), np.float32), 3).any()
    np.testing.assert_array_equal(rank_filter(values, 1), values)


def test_tam_follows_its_equations_word_by_word():
    context = conversation(asked=[0, 2], answer="a red fork")
    found = explained("tam", context, kernel=1)
    with torch.no_grad():
        logits = context.output().logits[0].clamp_min(0)
    special = context.vlm.tokenizer.all_special_ids
    prompt = [p for p in context.text.tolist() if p < len(context.prompt_ids)]
    prompt = [p for p in prompt if int(context.sequence[p]) not in special]
    assert len(prompt) == 6
    rows = [*prompt, *context.rows.tolist()]
    ids = [int(context.sequence[p]) for p in prompt] + context.ids.tolist()
    for w, t in enumerate((0, 2)):
        k = 6 + t
        a = logits[context.image][:, ids]
        u = torch.stack([logits[rows[j], ids[k]] for j in range(k)])
        mine = torch.tensor([float(ids[j] != ids[k]) for j in range(k)])
        b = sum((u * mine)[j] / ((u * mine).sum() + 1e-8) * a[:, j] for j in range(k))
        e = (a[:, k] - (a[:, k] @ b) / (b @ b) * b).clamp_min(0)
        both = torch.cat([e, u])
        both = (both - both.min()) / (both.max() - both.min())
        torch.testing.assert_close(found.image[w], both[:16], atol=1e-5, rtol=1e-4)
        place = {p: i for i, p in enumerate(context.text.tolist())}
        columns = [place[p] for p in prompt] + [
            place[len(context.prompt_ids) + j] for j in range(t)
        ]
        text = torch.zeros(len(context.text))
        text[columns] = both[16:]
        torch.testing.assert_close(found.text[w], text, atol=1e-5, rtol=1e-4)


def test_the_released_program_shows_the_prompts_first_word_for_the_answers():
    context = conversation("llava_next", asked=[0])
    with torch.no_grad():
        logits = context.output().logits[0]
    special = context.vlm.tokenizer.all_special_ids
    prompt = [p for p in context.text.tolist() if p < len(context.prompt_ids)]
    prompt = [p for p in prompt if int(context.sequence[p]) not in special]
    said = int(logits[prompt[0]].argmax())
    a, of_prompt = (logits[places, said].clamp_min(0) for places in (context.image, prompt))
    both = torch.cat([a, of_prompt])
    a = (a - both.min()) / (both.max() - both.min())
    found = explained("tam", context, released=True, kernel=1).image[0]
    torch.testing.assert_close(found, a, atol=1e-5, rtol=1e-4)
    filtered = explained("tam", context, released=True).image[0]
    base, tiles = (torch.from_numpy(g) for g in context.layouts[0].grids)
    for grid in (base, tiles):
        wanted = torch.from_numpy(rank_filter(found[grid].numpy(), 3))
        torch.testing.assert_close(filtered[grid], wanted, atol=1e-5, rtol=1e-4)


def test_kernels_are_odd():
    with pytest.raises(ValueError, match="kernel: got 2; give an odd int"):
        create_token_explainer("tam", kernel=2)


def test_the_released_program_leaves_out_words_that_are_written_alike():
    context = conversation(asked=[2], answer="red and red")
    found = explained("tam", context, released=True, kernel=1).image
    with torch.no_grad():
        logits = context.output().logits[0].clamp_min(0)
    prompt = [p for p in context.text.tolist() if p < len(context.prompt_ids)]
    prompt = [
        p for p in prompt if int(context.sequence[p]) not in context.vlm.tokenizer.all_special_ids
    ]
    rows = [*prompt, *context.rows.tolist()]
    ids = [int(logits[prompt[0]].argmax()), *context.sequence[prompt[1:]].tolist()]
    ids += [int(context.sequence[prompt[-1]]), *context.ids[1:].tolist()]
    k = len(prompt) + 2
    a = logits[context.image][:, ids]
    u = torch.stack([logits[rows[j], ids[k]] for j in range(k)])
    other = u.clone()
    other[len(prompt)] = 0  # the first "red", though shown by another token's id
    b = a[:, :k] @ (other / (other.sum() + 1e-8))
    e = (a[:, k] - (a[:, k] @ b) / (b @ b) * b).clamp_min(0)
    both = torch.cat([e, u])
    wanted = (e - both.min()) / (both.max() - both.min())
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-4)
