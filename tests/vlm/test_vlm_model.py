"""A vision-language model of every family: what enters of the image, and one pass as generation."""

import pytest

pytest.importorskip("transformers")
import torch
import transformers
import vlm_models as tiny

from xattn.vlm.loading import load_vlm
from xattn.vlm.model import VLM, entrance_of

QUESTION = "what is on the table ?"


@pytest.fixture(scope="module")
def loaded():
    """The tiny model of a family, checked once."""
    found: dict[str, VLM] = {}

    def load(kind):
        if kind not in found:
            found[kind] = load_vlm(tiny.network(kind), tiny.processor(kind))
        return found[kind]

    return load


@pytest.mark.parametrize("photos", [1, 2])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_one_pass_gives_the_logits_of_generation(loaded, kind, photos):
    if photos > 1 and kind not in tiny.SEVERAL_IMAGES:
        pytest.skip("takes one image")
    vlm = loaded(kind)
    inputs = vlm.inputs([tiny.photo(i) for i in range(photos)], QUESTION)
    made = vlm.generate(inputs, 6, logits=True)
    forced = vlm.forced(inputs, made.ids)
    entered = made.entered or vlm.entered(inputs)
    with torch.no_grad():
        found = vlm.logits(forced, entered)
        own = vlm.model(**forced.inputs).logits[:, forced.rows]
    torch.testing.assert_close(found[0], made.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, own)
    places = vlm.image_places(inputs["input_ids"][0])
    assert len(places) == (0 if vlm.kind == "cross" else len(entered.features))
    assert torch.equal(vlm.entered(inputs).features, entered.features)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_features_of_another_photo_are_all_that_enters_of_it(loaded, kind):
    vlm = loaded(kind)
    passes = []
    for seed in (1, 2):
        inputs = vlm.inputs([tiny.photo(seed)], QUESTION)
        forced = vlm.forced(inputs, torch.tensor([20, 21, 22]))
        entered = vlm.entered(inputs)
        with torch.no_grad():
            passes.append((forced, entered, vlm.logits(forced, entered)[0]))
    (forced, entered, own), (_, other, wanted) = passes
    with torch.no_grad():
        both = torch.stack([entered.features, other.features, entered.features])
        found = vlm.logits(forced, entered, both)
    torch.testing.assert_close(found, torch.stack([own, wanted, own]), atol=1e-5, rtol=1e-5)
    assert (own - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "mllama", "florence2"])
def test_gradients_are_those_of_finite_differences(kind):
    model = tiny.network(kind).double()
    vlm = VLM(model, tiny.processor(kind), entrance_of(model), loaded_kind(kind))
    inputs = vlm.inputs([tiny.photo()], QUESTION)
    forced, entered = vlm.forced(inputs, torch.tensor([20, 21])), vlm.entered(inputs)

    def score(f):
        keep = vlm.output(forced, entered, f[None]).logits[0, forced.rows]
        return keep.log_softmax(1)[:, 23].sum()

    f = entered.features.clone().requires_grad_()
    gradient = torch.autograd.grad(score(f), f)[0]
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        wanted = score(f + step) - score(f - step)
    torch.testing.assert_close(2 * (gradient * step).sum(), wanted, rtol=1e-3, atol=0)


def loaded_kind(kind):
    return {"mllama": "cross", "florence2": "encoder"}.get(kind, "decoder")


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "blip_2", "mllama"])
def test_a_folder_is_the_model_that_was_saved(loaded, tmp_path, kind):
    tiny.save(kind, tmp_path)
    inputs = loaded(kind).inputs([tiny.photo()], QUESTION)
    wanted = loaded(kind).generate(inputs, 5, logits=True).logits
    for name in (str(tmp_path), f"transformers:{tmp_path}"):
        vlm = load_vlm(name)
        assert torch.equal(vlm.inputs([tiny.photo()], QUESTION)["input_ids"], inputs["input_ids"])
        found = vlm.generate(inputs, 5, logits=True).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_messages_and_places_of_images_in_a_text_are_one_prompt(loaded):
    vlm, photos = loaded("qwen2_vl"), [tiny.photo(0), tiny.photo(1)]
    content = [{"type": "image"}, {"type": "text", "text": "a cat"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}]
    one = vlm.inputs(photos, "<image>a cat<image>")["input_ids"]
    assert torch.equal(one, vlm.inputs(photos, messages)["input_ids"])
    assert not torch.equal(one, vlm.inputs(photos, "a cat")["input_ids"])


def test_sampling_is_a_function_of_the_seed(loaded):
    vlm = loaded("llava")
    inputs = vlm.inputs([tiny.photo()], QUESTION)
    before = torch.get_rng_state()
    one, again, other = (
        vlm.generate(inputs, 12, {"do_sample": True}, seed).ids.tolist() for seed in (0, 0, 1)
    )
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_explained_is_refused_in_a_line(loaded, tmp_path):
    def refused(match, *arguments, error=ValueError, **options):
        with pytest.raises(error, match=match) as caught:
            load_vlm(*arguments, **options)
        assert "\n" not in str(caught.value)

    model, processor = tiny.network("llava"), tiny.processor("llava")
    text = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_hidden_layers=1,
            vocab_size=9,
        )
    ).eval()
    refused(
        r"^vlm: a LlamaForCausalLM has no image tokens .*; give a model of: LLaVA", text, processor
    )
    refused("^processor: missing", model)
    refused("^processor: a .* does not take images", model, processor.tokenizer)
    refused("^model: in training mode", tiny.network("llava").train(), processor)
    refused("^model: got a int", 3, error=TypeError)
    refused("holds no config.json", str(tmp_path), error=FileNotFoundError)
    refused("^vlm: no folder 'nowhere'", "nowhere", error=FileNotFoundError)
    vlm = loaded("llava")
    for prompt in ("<image> a <image>", [{"role": "user", "content": [{"type": "image"}] * 2}]):
        with pytest.raises(ValueError, match=r"^prompt: 2 .*for 1 image; give"):
            vlm.inputs([tiny.photo()], prompt)
    with pytest.raises(ValueError, match="^prompt: empty"):
        vlm.inputs([tiny.photo()], " ")
    inputs = vlm.inputs([tiny.photo()], "a " * 600)
    with pytest.raises(
        ValueError, match="^max_new_tokens: a prompt of 616 tokens leaves none of 512"
    ):
        vlm.generate(inputs)
    with pytest.raises(ValueError, match=r"^images: 17 image tokens in the prompt, 16 features"):
        extra = torch.cat([inputs["input_ids"][:, :1], inputs["input_ids"]], 1)
        vlm.entered({**inputs, "input_ids": extra, "attention_mask": torch.ones_like(extra)})


def test_a_pass_that_is_not_generation_is_refused(monkeypatch):
    model = tiny.network("paligemma")
    # As if the answer were part of the prefix, which sees itself.
    monkeypatch.setattr(VLM, "family", property(lambda vlm: "other"))
    with pytest.raises(
        ValueError, match="^model: a PaliGemma.* gives different logits in one pass"
    ):
        load_vlm(model, tiny.processor("paligemma"))


def test_a_type_by_name():
    model, processor = tiny.network("llava"), tiny.processor("llava")
    assert load_vlm(model, processor, dtype="float64").model.dtype == torch.float64
    with pytest.raises(ValueError, match="dtype: got 'float65'; give a type of torch"):
        load_vlm(model, processor, dtype="float65")
