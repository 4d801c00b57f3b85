"""Image-text models: the rebuilt image tower, texts as targets, prompts as classes."""

import pytest
import torch
import torch.nn.functional as F
from small_clip import pair
from small_networks import PAIRS, cheap, made

import xattn
from xattn.backbone.families.clip import Clip
from xattn.backbone.scored import scored

pytest.importorskip("transformers")
TEXT = "a photo of a cat"
PROMPTS = [TEXT, "a photo of a dog", "grass"]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def both(request):
    model, tokenizer = pair(request.param)
    return model, tokenizer, xattn.load_clip(model, tokenizer)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def theirs(model, tokenizer, clip, images, texts):
    """transformers' own logits of prompts, (B, T)."""
    fixed = {} if model.config.model_type == "clip" else {"max_length": 12}
    padding = "max_length" if fixed else True
    tokens = tokenizer(texts, padding=padding, return_tensors="pt", **fixed)
    tokens = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        return model(pixel_values=clip.normalize(images), **tokens).logits_per_image


def test_prompts_have_the_logits_of_transformers(both, images):
    model, tokenizer, clip = both
    backbone = clip.with_prompts(PROMPTS)
    with torch.no_grad():
        logits = backbone.logits(images)
    expected = theirs(model, tokenizer, clip, images, PROMPTS)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert backbone.class_names == PROMPTS
    p = backbone.probabilities(logits)
    softmax = model.config.model_type == "clip"
    assert torch.allclose(p, logits.double().softmax(1) if softmax else logits.double().sigmoid())


def test_a_text_target_is_the_cosine_similarity(both, images):
    model, _, clip = both
    view = scored(clip, TEXT)
    with torch.no_grad():
        cosine = view.logits(images)[:, 0]
        found = model.get_image_features(clip.normalize(images)).pooler_output
        own = F.normalize(found, dim=1) @ clip.embed([TEXT])[0]
    assert torch.allclose(cosine, own, atol=1e-6) and bool((cosine.abs() <= 1).all())
    assert view.class_names == [TEXT] and view.score == "value"


@pytest.mark.parametrize("name", [name for name, kind in PAIRS if kind == "vit"])
def test_every_vit_explainer_takes_a_text_and_prompts(name, images):
    model, tokenizer = pair("clip")
    clip = xattn.load_clip(model, tokenizer)
    if name in ("cam", "head", "token_path"):
        for backbone in (scored(clip, TEXT), clip.with_prompts(PROMPTS)):
            with pytest.raises(ValueError, match=r"^(target|explainer|head): "):
                cheap(name, backbone)
        return
    maps = cheap(name, clip).attribute(images, TEXT)
    assert maps.shape[:2] == (2, 1) and bool(maps.isfinite().all())
    of_prompts = cheap(name, clip.with_prompts(PROMPTS)).attribute(images, torch.tensor([0, 2]))
    assert of_prompts.shape == maps.shape and bool(of_prompts.isfinite().all())


def test_texts_differ_in_their_maps(images):
    explainer = xattn.create_explainer("generic_relevance", xattn.load_clip(*pair("siglip")))
    maps = [explainer.attribute(images, text) for text in PROMPTS]
    assert not torch.allclose(maps[0], maps[1], rtol=1e-2)


def test_any_towers_can_be_put_together(images):
    texts = torch.randn(3, 7)
    clip = Clip(made("cnn"), lambda given: texts[: len(given)], scale=10.0)
    with torch.no_grad():
        embedding = clip.base.logits(images)
        expected = 10 * F.normalize(embedding, dim=1) @ F.normalize(texts, dim=1).T
        assert torch.allclose(clip.with_prompts(PROMPTS).logits(images), expected, atol=1e-5)
    maps = xattn.create_explainer("rise", clip, masks=4).attribute(images, "any text")
    assert maps.shape == (2, 1, 32, 32)


def test_a_converted_tower_keeps_its_texts(images):
    from xattn.backbone import converted

    clip = xattn.load_clip(*pair("clip")).with_prompts(PROMPTS)
    other = converted(clip, "gna", options={"kernel": 3})
    assert other.class_names == PROMPTS and other.fingerprint != clip.fingerprint
    with torch.no_grad():
        assert not torch.allclose(other.logits(images), clip.logits(images))


def test_explain_takes_a_text(tmp_path):
    from PIL import Image

    clip = xattn.load_clip(*pair("clip"))
    photo = Image.effect_noise((40, 36), 90).convert("RGB")
    found = xattn.explain(photo, clip, explainer="gradcam", target=TEXT, output=tmp_path / "pack")
    assert found[0].target_name == TEXT and -1 <= found[0].probability <= 1
    assert found[0].protocol["probability"] == "value"
    assert found[0].protocol["target"].startswith(TEXT)
    again = xattn.load_pack(tmp_path / "pack")[0]
    assert again.probability == found[0].probability and again.is_value
    assert f"{again.probability:.4g}" in again._repr_html_()
