"""Answers: a map a word on the photo, what a word loses without the image, and what is refused."""

from dataclasses import dataclass, replace
from textwrap import dedent

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
import vlm_models as tiny
from PIL import Image

from xattn.packs.reader import Pack
from xattn.vlm.explain import explain_tokens
from xattn.vlm.explainers import base
from xattn.vlm.explainers.attention import Means
from xattn.vlm.explainers.base import (
    TOKEN_EXPLAINERS,
    TokenExplainer,
    TokenScores,
    create_token_explainer,
    register_token_explainer,
)
from xattn.vlm.loading import load_vlm
from xattn.vlm.reading import QueryRows

QUESTION = "what is on the table ?"
ANSWER = "a red fork and a blue fork ."


@pytest.fixture(scope="module")
def loaded():
    found = {}

    def load(kind="llava"):
        if kind not in found:
            found[kind] = load_vlm(tiny.network(kind), tiny.processor(kind))
        return found[kind]

    return load


@dataclass(eq=False)
class Kept(TokenExplainer):
    """Keeps the context; scores are numbered."""

    name = "kept"

    def explain(self, context, seen=None):
        self.context = context
        count = len(context.asked), len(context.features)
        image = torch.arange(count[0] * count[1]).reshape(count).float()
        return TokenScores(image, torch.ones(count[0], len(context.text)))


def context_of(vlm, photo=None, answer=ANSWER, **options):
    method = Kept()
    explain_tokens(photo or tiny.photo(), vlm, QUESTION, answer, method, **options)
    return method.context


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_every_family_has_a_map_a_word(loaded, kind):
    method = create_token_explainer("occlusion", size=1)
    answer = explain_tokens(tiny.photo(), loaded(kind), QUESTION, None, method, max_new_tokens=5)[0]
    assert answer.words
    for i, word in enumerate(answer.words):
        shown = answer[i]
        assert (shown.target, shown.target_name, shown.method) == (i, word.text, "occlusion")
        assert np.isfinite(shown.map).all() and shown.probability == pytest.approx(
            answer.probabilities[i]
        )
        assert shown.overlay().size == (40, 24)
    assert not answer[0].is_blank


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "florence2", "blip", "mllama"])
def test_what_a_word_loses_is_the_score_without_the_image(loaded, kind):
    vlm = loaded(kind)
    answer = explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, Kept())[0]
    context = context_of(vlm)
    everything = torch.ones(1, len(context.features), dtype=torch.bool)
    full, none = context.scores()[0].detach(), context.hidden(everything)[0]
    np.testing.assert_allclose(answer.log_probs, full, atol=1e-4)
    np.testing.assert_allclose(answer.lost, full - none, atol=1e-4)


def test_a_given_answer_is_the_generated_one(loaded):
    vlm = loaded()
    made = explain_tokens(tiny.photo(), vlm, QUESTION, explainer="occlusion", max_new_tokens=5)[0]
    given = explain_tokens(tiny.photo(), vlm, QUESTION, made.text, "occlusion")[0]
    assert given.words == made.words
    np.testing.assert_allclose(given.log_probs, made.log_probs, atol=1e-4)
    np.testing.assert_allclose(given[0].map, made[0].map, atol=1e-4)


def test_words_are_found_and_have_sources(loaded):
    vlm = loaded()
    answer = explain_tokens(
        tiny.photo(), vlm, QUESTION, ANSWER, [Kept(), create_token_explainer("occlusion")]
    )[0]
    assert answer.methods == ("kept", "occlusion")
    assert answer["fork"].target == 2 and answer["fork", 2].target == 6 and answer[-1].target == 7
    assert answer.of("fork", "occlusion").explanations[0].method == "occlusion"
    tokens = [token for token, _ in answer.sources("fork", "kept")]
    assert "".join(tokens) == f"{QUESTION} a red"
    maps = answer.of("fork")
    assert sum(maps.shares) == pytest.approx(1)
    told = answer["blue"].facts.answer
    assert (told.text, "".join(told.tokens)) == (ANSWER, f"{QUESTION} {ANSWER}")
    assert told.words[2].shares == {"kept": maps.shares}
    assert told.words[2].log_prob == pytest.approx(float(answer.log_probs[2]))
    lines = answer.table().splitlines()
    assert len(lines) == 1 + len(answer.words) and lines[3].startswith("fork ")
    with pytest.raises(ValueError, match="^method: occlusion scores only image tokens"):
        answer.sources("fork", "occlusion")
    with pytest.raises(ValueError, match="^method: got 'rise'; explained by: kept, occlusion"):
        answer.of("fork", "rise")


def test_only_the_words_that_were_asked_for_are_explained(loaded):
    vlm = loaded()
    answer = explain_tokens(
        tiny.photo(), vlm, QUESTION, ANSWER, Kept(), words=["red", ("fork", 2)]
    )[0]
    assert list(answer.maps) == [1, 6]
    with pytest.raises(ValueError, match="^words: 'blue' was not explained; explained: red, fork"):
        answer["blue"]
    visual = explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, Kept(), words="visual")[0]
    assert list(visual.maps) == [i for i, lost in enumerate(visual.lost) if lost >= 0.1]


def test_scores_are_those_that_were_asked_for(loaded):
    vlm = loaded()
    context = context_of(vlm)
    logits = context.logits()[0]
    ids, cat = context.ids, tiny.processor("llava").tokenizer.convert_tokens_to_ids("cat")
    log_probs = logits.log_softmax(1)
    torch.testing.assert_close(context.scores()[0], log_probs[range(8), ids])
    by_logit = context_of(vlm, score="logit")
    torch.testing.assert_close(by_logit.scores()[0], logits[range(8), ids])
    other = context_of(vlm, instead={"fork": "cat"}, words="fork")
    torch.testing.assert_close(other.scores()[0, 0], log_probs[2, ids[2]] - log_probs[2, cat])
    with pytest.raises(ValueError, match="^instead: 'fork' starts with the same token as 'fork'"):
        context_of(vlm, instead={"fork": "fork"})
    with pytest.warns(UserWarning, match=r"^instead: 'cat dog' consists of 'cat'\+'dog'"):
        context_of(vlm, instead={"fork": "cat dog"})


def test_photos_of_a_tuple_are_shown_together(loaded):
    vlm, photos = loaded(), (tiny.photo(0), tiny.photo(1))
    answers = explain_tokens([photos, tiny.photo(2)], vlm, QUESTION, ANSWER, Kept(), words="red")
    first, second = answers
    maps = first.of("red").explanations
    assert [e.image_id for e in maps] == ["image 0#1", "image 0#2"]
    # Scores are numbered over all tokens: those of the second photo follow.
    assert [e.map.sum() for e in maps] == [sum(range(16)), sum(range(16, 32))]
    assert [e.image_id for e in second.of("red").explanations] == ["image 1"]


def test_a_photo_that_cannot_be_read_is_skipped(loaded, tmp_path):
    tiny.photo().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no photo")
    vlm = loaded()
    with pytest.warns(UserWarning, match="^explain: skipped 1 of 2 images"):
        answers = explain_tokens(tmp_path, vlm, QUESTION, ANSWER, Kept())
    assert [a.image_id for a in answers] == ["a.png"] and answers.skipped[0][0] == "b.png"
    with pytest.raises(ValueError, match="b.png"):
        explain_tokens(tmp_path / "b.png", vlm, QUESTION, ANSWER, Kept())
    with pytest.warns(UserWarning, match="'cup' is not in the answer"):
        answers = explain_tokens(
            [tiny.photo(0), tiny.photo(1)], vlm, QUESTION, ["a cup", "a cat"], Kept(), words="cup"
        )
    assert len(answers) == 1


def test_an_empty_answer_is_an_answer_without_words(loaded):
    vlm = loaded()
    tokenizer = vlm.tokenizer
    other = [i for i in range(len(tokenizer)) if i != tokenizer.eos_token_id]
    with pytest.warns(UserWarning, match="the answer is empty"):
        answer = explain_tokens(
            tiny.photo(), vlm, QUESTION, explainer=Kept(), generate={"suppress_tokens": other}
        )[0]
    assert (answer.text, answer.words, answer.explanations) == ("", (), [])
    assert len(answer.table().splitlines()) == 1


def test_out_of_memory_halves_the_batch(loaded, monkeypatch):
    vlm = loaded()
    whole = explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, "occlusion", words="red")[0]["red"]
    run = type(vlm).output

    def small(self, forced, entered, features=None, **asked):
        if features is not None and len(features) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, forced, entered, features, **asked)

    monkeypatch.setattr(type(vlm), "output", small)
    with pytest.warns(RuntimeWarning, match="out of memory with 8 images; continuing with 4"):
        found = explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, "occlusion", words="red")[0][
            "red"
        ]
    np.testing.assert_allclose(found.map, whole.map, atol=1e-5)


def test_the_model_is_left_as_it_was(loaded):
    vlm = load_vlm(tiny.network("qwen2_vl"), tiny.processor("qwen2_vl"))
    before = {k: v.clone() for k, v in vlm.model.state_dict().items()}

    @dataclass(eq=False)
    class Fails(Kept):
        def explain(self, context, seen=None):
            context.gradients()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, Fails())
    assert all(torch.equal(v, before[k]) for k, v in vlm.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in vlm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.model.modules())
    assert "get_image_features" not in vars(vlm.entrance.module)


def test_what_does_not_fit_is_refused_in_a_line(loaded):
    vlm = loaded()
    for options, match in (
        ({"answer": " "}, "^answer: empty"),
        ({"answer": ["a", "b"]}, "^answer: got 2 texts for 1 photos"),
        ({"answer": ANSWER, "words": "forks"}, "^words: 'forks' is not in the answer; .*fork"),
        ({"answer": ANSWER, "words": []}, "^words: got an empty list"),
        ({"answer": ANSWER, "instead": {"cup": "cat"}}, "^instead: 'cup' is not in the answer"),
        ({"explainer": "oclusion"}, "^explainer: unknown token explainer 'oclusion'; .*occlusion"),
        ({"explainer": ["occlusion", "occlusion"]}, "^explainer: got .*; give each method once"),
        ({"explainer": 3}, "^explainer: got a int; give a name"),
        ({"score": "prob"}, "^score: "),
        ({"batch_size": 0}, "^batch_size: "),
        ({"max_new_tokens": 0}, "^max_new_tokens: "),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            explain_tokens(tiny.photo(), vlm, QUESTION, **{"explainer": "occlusion", **options})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^images: got a int"):
        explain_tokens(3, vlm, QUESTION)
    training = load_vlm(tiny.network("llava"), tiny.processor("llava"))
    training.model.train()
    with pytest.raises(ValueError, match="^vlm: the model is in training mode"):
        explain_tokens(tiny.photo(), training, QUESTION)


# ---------------------------------------------------------------------- explainers


@pytest.mark.parametrize(
    ("name", "case"),
    [(e.name, c) for e in TOKEN_EXPLAINERS.entries() for c in e.cases],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llava_next", "florence2"])
def test_an_explainer_scores_every_token_of_every_word(loaded, kind, name, case):
    context = context_of(loaded(kind), words=["red", "blue"])
    method = create_token_explainer(name, **case)
    if context.vlm.kind not in TOKEN_EXPLAINERS.entry(name).kinds:
        with pytest.raises(
            ValueError, match=f"^explainer: {name} needs .*; give one of attention, "
        ):
            method.explain(context)
        return
    scores = method.explain(context)
    assert scores.image.shape == (2, len(context.features))
    assert scores.image.isfinite().all() and scores.image.abs().max() > 0
    if scores.text is not None:
        assert scores.text.shape == (2, len(context.text))
        after = context.text >= len(context.prompt_ids) + 1  # of "red", the second token
        assert not scores.text[0, after].any()
    again = create_token_explainer(name, **case).explain(context)
    assert torch.equal(again.image, scores.image)


def test_own_explainers_are_registered_and_checked(loaded):
    @register_token_explainer("own-tokens", title="Mine")
    @dataclass(kw_only=True, eq=False)
    class Own(Kept):
        factor: float = 1.0

    try:
        answer = explain_tokens(
            tiny.photo(), loaded(), QUESTION, ANSWER, "own_tokens", words="red"
        )[0]
        assert answer["red"].method_title == "Mine"
        assert answer["red"].protocol["options"] == {"seed": 0, "factor": 1.0}
        with pytest.raises(ValueError, match="^factor: "):
            create_token_explainer("own-tokens", factor="a")
    finally:
        TOKEN_EXPLAINERS.remove("own-tokens")


def test_the_example_of_the_base_module_runs(loaded):
    code = dedent(base.__doc__.partition("features:\n")[2].partition("\nIts fields")[0])
    try:
        exec(code, {**vars(base)})
        context = context_of(loaded(), words=["red", "blue"])
        found = create_token_explainer("mine").explain(context).image
    finally:
        TOKEN_EXPLAINERS.remove("mine")
    f = context.features.clone().requires_grad_()
    gradient = torch.autograd.grad(context.scores(f[None])[0, 1], f)[0]
    wanted = (gradient * (f - f.mean(0))).sum(1)
    torch.testing.assert_close(found[1], wanted.detach(), atol=1e-5, rtol=1e-4)


def test_windows_that_hide_all_tokens_take_the_image_away(loaded):
    context = context_of(loaded())
    found = create_token_explainer("occlusion", size=9).explain(context).image
    everything = torch.ones(1, len(context.features), dtype=torch.bool)
    wanted = context.scores()[0] - context.hidden(everything)[0]
    torch.testing.assert_close(found, wanted.detach()[:, None].expand_as(found))


def test_occlusion_is_the_mean_fall_over_the_windows_of_a_token(loaded):
    context = context_of(loaded(), words="red")
    full = context.scores()[0, 0].detach()
    falls = torch.zeros(4, 4, 9)
    for top in range(3):
        for left in range(3):
            mask = torch.zeros(4, 4, dtype=torch.bool)
            mask[top : top + 2, left : left + 2] = True
            falls[top : top + 2, left : left + 2, 3 * top + left] = (
                full - context.hidden(mask.reshape(1, -1))[0, 0]
            )
    wanted = falls.sum(2) / (falls != 0).sum(2)
    found = create_token_explainer("occlusion").explain(context).image[0].reshape(4, 4)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_token_that_nothing_reads_has_no_effect(loaded):
    context = context_of(loaded("mllama"), tiny.photo(0, 32, 32))
    masks = torch.zeros(1, len(context.features), dtype=torch.bool)
    masks[:, 17:] = True  # of the second tile, which a square photo does not have
    torch.testing.assert_close(
        context.hidden(masks), context.scores().detach(), atol=1e-5, rtol=1e-5
    )


def test_queries_without_a_place_are_hidden_one_by_one(loaded):
    context = context_of(loaded("blip_2"), words="red")
    method = create_token_explainer("occlusion")
    wanted = context.scores()[0] - context.hidden(torch.eye(5, dtype=torch.bool))[:, 0]
    torch.testing.assert_close(method.explain(context).image[0], wanted.detach())
    told = ["image tokens have no positions, so each is hidden by itself"]
    assert method.notes(context) == told and not method.notes(context_of(loaded()))
    match = "^where: got 'pixel', but image tokens of a Blip2.* have no position; give 'token'$"
    with pytest.raises(ValueError, match=match):
        create_token_explainer("occlusion", where="pixel").explain(context)


def test_hidden_pixels_are_those_of_the_window(loaded):
    vlm = loaded("paligemma")
    photo = tiny.photo(0, 32, 32)
    context = context_of(vlm, photo, words="red")
    pixels = np.array(photo)
    pixels[:16, 16:] = pixels.mean((0, 1)).round()
    other = context_of(vlm, Image.fromarray(pixels), words="red")
    method = create_token_explainer("occlusion", size=2, stride=2, where="pixel")
    found = method.explain(context).image.reshape(4, 4)
    wanted = (context.scores() - other.scores())[0, 0].detach()
    torch.testing.assert_close(found[:2, 2:], wanted.expand(2, 2), atol=1e-4, rtol=1e-4)


def test_changed_photos_have_as_many_tokens(loaded):
    context = context_of(loaded("qwen2_vl"))
    with pytest.raises(ValueError, match="^photos: 8 image tokens instead of 4"):
        context.features_of([tiny.photo(0, 64, 40)])
    assert torch.equal(context.features_of([tiny.photo()]), context.features)
    assert len(replace(context, asked=[0]).scores()[0]) == 1


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_attention_while_generating_is_that_of_a_pass(loaded, kind):
    vlm = loaded(kind)
    method = create_token_explainer("attention")
    made = explain_tokens(tiny.photo(), vlm, QUESTION, max_new_tokens=5)[0]
    context = context_of(vlm)
    ids = torch.tensor(made.token_ids)
    inputs = vlm.inputs([tiny.photo()], QUESTION)
    context = replace(
        context,
        ids=ids,
        words=made.words,
        asked=range(len(made.words)),
        forced=vlm.forced(inputs, ids),
    )
    scores = method.explain(context)
    total = scores.image.sum(1) + scores.text.sum(1)
    if kind != "florence2":  # what its decoder's start token gets is nobody's
        torch.testing.assert_close(total, torch.ones(len(made.words)), atol=1e-5, rtol=0)
    for j in range(len(made.words)):
        np.testing.assert_allclose(made.of(j).text, scores.text[j], atol=1e-6)
        np.testing.assert_allclose(made[j].map, context.layouts[0].maps(scores.image)[j], atol=1e-6)
        parts = scores.image[j].sum(), scores.text[j].sum()
        assert made.of(j).shares[0] == pytest.approx(float(parts[0] / sum(parts)), abs=1e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_attention_is_the_mean_of_eager_rows(kind):
    model = tiny.network(kind)
    vlm = load_vlm(model, tiny.processor(kind))
    context = context_of(vlm)
    scores = create_token_explainer("attention").explain(context)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        tables = context.output(output_attentions=True).attentions
    rows = torch.stack([a[0, :, context.rows] for a in tables])  # (L, H, T, S)
    sees = (rows[..., context.image].sum((1, 3)) > 0).float()[:, None, :, None]
    mean = (rows * sees).sum((0, 1)) / (sees.sum((0, 1)) * rows.shape[1])
    torch.testing.assert_close(
        scores.image, context.word_mean(mean[:, context.image]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        scores.text, context.word_mean(mean[:, context.text]), atol=1e-6, rtol=0
    )


def test_equal_queries_look_at_all_tokens_alike():
    model = tiny.network("llava")
    for layer in model.get_decoder().layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    context = context_of(load_vlm(model, tiny.processor("llava")))
    found = create_token_explainer("attention").explain(context)
    wanted = 1 / (context.rows + 1.0)[:, None]
    torch.testing.assert_close(found.image, wanted.expand_as(found.image))


def test_layers_heads_and_the_first_token_are_chosen(loaded):
    context = context_of(loaded(), words="blue")
    alone = [
        create_token_explainer("attention", layers=(i,)).explain(context).image for i in range(3)
    ]
    every = create_token_explainer("attention").explain(context).image
    torch.testing.assert_close(torch.stack(alone).mean(0), every)
    last = create_token_explainer("attention", layers=(-1,)).explain(context).image
    assert torch.equal(last, alone[2])
    heads = [
        create_token_explainer("attention", heads=(i,)).explain(context).image for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(heads).mean(0), every)
    zeroed = create_token_explainer("attention", first="zero").explain(context)
    first = torch.cat([context.image, context.text]).argmin()
    both = torch.cat([zeroed.image, zeroed.text], 1)
    assert both[0, first] == 0
    torch.testing.assert_close(both.sum(), torch.tensor(1.0))


def test_without_its_first_token_the_mean_row_of_each_layer_has_the_sum_1(loaded):
    heads = torch.tensor([[[0.999, 0.001, 0, 0]], [[0.2, 0.1, 0.6, 0.1]]])[None]  # (1, H, 1, S)
    rows, kept = QueryRows("layers.0.self_attn", 0, False, (3,), heads, 0), Means()
    explainer = create_token_explainer("attention", first="zero")
    explainer._keep(loaded(), rows, torch.tensor([2]), kept)
    wanted = torch.tensor([[0, 0.0505, 0.3, 0.05]]) / 0.4005  # 0, 0.13, 0.75, 0.12
    torch.testing.assert_close(kept.of([3], False, 4), wanted)


@pytest.mark.parametrize("option", ["layers", "heads"])
@pytest.mark.parametrize("given", [99, -5])
def test_layers_and_heads_that_are_not_there_are_refused(loaded, option, given):
    count = {"layers": 3, "heads": 4}[option]
    method = create_token_explainer("attention", **{option: (0, given)})
    match = f"^{option}: got {given}; the model has {count}, numbered from 0$"
    for answer in (ANSWER, None):  # in a pass, and while generating
        with pytest.raises(ValueError, match=match):
            explain_tokens(tiny.photo(), loaded(), QUESTION, answer, method, max_new_tokens=2)


def test_an_answer_of_beams_is_explained_as_a_given_one(loaded):
    vlm = loaded()
    options = {"generate": {"num_beams": 3}, "max_new_tokens": 5}
    made = explain_tokens(tiny.photo(), vlm, QUESTION, **options)[0]
    given = explain_tokens(tiny.photo(), vlm, QUESTION, made.text)[0]
    np.testing.assert_allclose(made.log_probs, given.log_probs, atol=1e-5)
    np.testing.assert_allclose(made[0].map, given[0].map, atol=1e-6)


def test_tuples_keep_their_photos(loaded):
    vlm, photo = loaded(), tiny.photo()
    with pytest.raises(ValueError, match="images: an item of a tuple holds several photos"):
        explain_tokens([(photo, torch.rand(2, 3, 32, 32)), photo], vlm, QUESTION, ANSWER)
    pair = explain_tokens([(photo, torch.rand(3, 32, 32)), photo], vlm, QUESTION, ANSWER)
    assert [len(one.of(0).explanations) for one in pair] == [2, 1]
    assert len({one.image_id for one in pair}) == 2


def test_a_pair_is_a_word_and_its_number(loaded):
    [answer] = explain_tokens(tiny.photo(), loaded(), QUESTION, ANSWER, words=("fork", 2))
    assert list(answer.maps) == [6]


def test_where_no_word_is_explained_there_is_no_pack_and_nothing_is_lost(
    loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr("xattn.vlm.explain.NEEDED", 1e9)
    with pytest.warns(UserWarning, match="output: no word was explained"):
        found = explain_tokens(
            [tiny.photo()] * 2, loaded(), QUESTION, ANSWER, words="visual", output=tmp_path / "pack"
        )
    assert len(found) == found.total == 2 and not (tmp_path / "pack").exists()


def test_few_answers_are_kept_where_a_pack_has_all(loaded, tmp_path):
    photos = [tiny.photo(seed) for seed in range(3)]
    found = explain_tokens(
        photos, loaded(), QUESTION, ANSWER, words="fork", output=tmp_path / "pack", keep=1
    )
    assert (len(found), found.total, len(Pack(tmp_path / "pack").entry_ids)) == (1, 3, 3)


def test_one_bad_photo_is_skipped(loaded):
    wide = Image.new("RGB", (900, 3))
    with pytest.warns(UserWarning, match="skipped 1 of 2 images"):
        found = explain_tokens([tiny.photo(), wide], loaded("qwen2_vl"), QUESTION, ANSWER)
    assert len(found) == 1 and found.skipped[0][1].startswith("image, prompt: the processor of")


def test_what_is_set_here_and_messages_without_an_image_are_refused(loaded):
    vlm = loaded()
    with pytest.raises(ValueError, match="generate: output_logits is set by xattn"):
        explain_tokens(tiny.photo(), vlm, QUESTION, generate={"output_logits": True})
    with pytest.raises(ValueError, match="prompt: 0 images in the messages for 1 image"):
        explain_tokens(tiny.photo(), vlm, [{"role": "user", "content": "what ?"}])


def test_methods_that_read_attention_share_one_pass(loaded, monkeypatch):
    vlm, passes = loaded(), []
    forward = type(vlm.model).forward
    monkeypatch.setattr(
        type(vlm.model), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k)
    )
    names = ["attention", "relative_attention", "localization_heads", "outcomes"]
    together = explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, names)[0]
    assert len(passes) == 3  # what enters, this answer, and without the image
    for name in names:
        alone = explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, name)[0]
        for i in range(len(alone.words)):
            np.testing.assert_allclose(together.of(i, name).explanations[0].map, alone[i].map)


def test_a_place_in_a_store_is_refused_before_the_work(loaded):
    with pytest.raises(ValueError, match="^output: got memory://bucket/pack; write the pack to a"):
        explain_tokens(
            tiny.photo(), loaded(), QUESTION, ANSWER, Kept(), output="memory://bucket/pack"
        )


def test_views_of_tiles_are_maps_of_these(loaded):
    vlm, maps = loaded("llava_next"), {}
    for views in ("all", "base", "tiles"):
        answer = explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, Kept(), "red", views=views)[0]
        maps[views] = answer["red"].map
        assert answer["red"].protocol["views"] == views
    np.testing.assert_allclose(maps["base"] + maps["tiles"], maps["all"], rtol=1e-5)
    with pytest.raises(ValueError, match="^views: got 'half'; give 'all', 'base'"):
        explain_tokens(tiny.photo(), vlm, QUESTION, ANSWER, Kept(), views="half")


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_tiles_of_zeros_are_not_taken_for_padding(loaded, kind, monkeypatch):
    vlm = loaded(kind)
    monkeypatch.setattr(vlm.processor.image_processor, "do_normalize", False)  # so that black is 0
    context = context_of(vlm, words="red")
    pixels = np.array(tiny.photo())
    pixels[:, :20] = 0
    for dark in (pixels, 0 * pixels):
        found = context.features_of([Image.fromarray(dark)])
        assert found.shape == context.features.shape


def test_rise_hides_pixels_of_the_tokens_of_a_mask(loaded):
    context = context_of(loaded("paligemma"), tiny.photo(0, 32, 32), words="red")
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 5]] = True  # of 4 x 4 tokens of 8 pixels
    pixels = np.array(tiny.photo(0, 32, 32))
    mean = pixels.mean((0, 1)).round()
    pixels[:8, :8] = pixels[8:16, 8:16] = mean
    wanted = context.scores(context.features_of([Image.fromarray(pixels)])[None]).detach()
    torch.testing.assert_close(context.hidden(mask, "pixel"), wanted)
