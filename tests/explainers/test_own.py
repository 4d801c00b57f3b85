"""Trained heads, Captum's objects, other objects and functions are explainers wherever one is taken."""

from __future__ import annotations

import captum.attr as captum
import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import made
from torch import nn

import xattn
from xattn.eval import evaluate
from xattn.eval.evaluation.facts import describe
from xattn.eval.leaderboard import Comparison, compare
from xattn.explainers import as_explainer, create_explainer
from xattn.explainers.adapters import single_channel_maps
from xattn.explainers.base import EXPLAINERS
from xattn.heads import create_head


@pytest.fixture(scope="module")
def backbone():
    return made("cnn")


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def brightness(images, target):
    """Not for B, 1: functions may return (B, h, w)."""
    return images.mean(1)


class Reds:
    """An object that has ``attribute`` and nothing else."""

    def attribute(self, inputs, target):
        return inputs[:, :1].numpy()


# ---------------------------------------------------------------- heads


def test_a_head_is_an_explainer_in_evaluate_explain_and_compare(backbone, images, tmp_path):
    head = create_head("ttame", backbone)
    named = evaluate(
        backbone, {"mine": create_explainer("head", backbone, head)}, images, progress=False
    )
    found = evaluate(backbone, {"mine": head}, images, progress=False)
    assert [row[3] for row in found.rows()] == [row[3] for row in named.rows()]
    photo = Image.fromarray((images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    [one] = xattn.explain(photo, backbone, explainer=head)
    [other] = xattn.explain(photo, backbone, head)
    assert one.method == "head" and np.array_equal(one.map, other.map)
    assert one.protocol == other.protocol


# ---------------------------------------------------------------- functions, objects


def test_functions_and_objects_give_their_maps_in_explain(backbone, images):
    photo = Image.fromarray((images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    found = xattn.explain(photo, backbone, explainer=[brightness, Reds(), "gradcam"], view="whole")
    assert [e.method for e in found] == ["brightness", "Reds", "gradcam"]
    pixels = np.asarray(photo) / 255
    np.testing.assert_allclose(found[0].map, pixels.mean(2), atol=1e-6)
    np.testing.assert_allclose(found[1].map, pixels[:, :, 0], atol=1e-6)
    assert found[1].protocol["notes"][1].endswith("test_own.Reds on raw pixels")
    [named] = xattn.explain(photo, backbone, explainer={"how bright": brightness})
    assert named.method == named.protocol["explainer"] == "how bright"


def test_a_function_may_ask_for_the_backbone_and_use_gradients(backbone, images):
    def times_gradient(images, target, backbone):
        images = images.clone().requires_grad_()
        backbone.logits(images).gather(1, target[:, None]).sum().backward()
        return images * images.grad

    wanted = create_explainer("input_x_gradient", backbone)
    for channels in ("signed", "absolute"):
        found = as_explainer(times_gradient, backbone, channels=channels)
        maps = found.attribute(images, 1)
        each = captum.InputXGradient(backbone.logits).attribute(
            images.clone().requires_grad_(), target=1
        )
        each = each.abs() if channels == "absolute" else each
        torch.testing.assert_close(maps, each.sum(1, keepdim=True).detach())
        assert f"attributions of several channels: {channels} sum" in found.notes
    assert wanted.attribute(images, 1).shape == maps.shape


def test_all_of_them_are_rows_of_one_evaluation(backbone, images):
    methods = {"bright": brightness, "reds": Reds(), "lambda": lambda x, t: x.amax(1, keepdim=True)}
    results = evaluate(backbone, methods, images, progress=False)
    assert list(results.methods) == list(methods)
    assert all(row.n == 3 and row.n_invalid == 0 for row in results.rows())


def test_compare_takes_methods_by_their_rows(tmp_path):
    backbone = made("vit")
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    head = create_head("ttame", backbone)
    methods = {"mine": brightness, "my head": head, "cam": "gradcam", "other": Reds()}
    job = Comparison(
        backbone=backbone, explainers=methods, metrics=("complexity",), max_forward_batch=4
    )
    results, _ = compare(job, tmp_path, tmp_path / "out", progress=False)
    assert {"mine", "my head", "cam", "other", "random", "randomized_head"} <= set(results.methods)
    names = [e.method for e in xattn.load_pack(tmp_path / "out" / "pack")]
    assert {"mine", "my head", "other"} <= set(names)
    alone = Comparison(backbone=backbone, explainers={"mine": brightness}, metrics=("complexity",))
    results, _ = compare(alone, tmp_path, tmp_path / "alone", progress=False)
    assert list(results.methods) == ["mine", "random", "centre", "ones"]
    with pytest.raises(
        ValueError, match=r"^explainers: got <function brightness.* in a list; give"
    ):
        compare(Comparison(backbone=backbone, explainers=[brightness]), tmp_path, tmp_path / "no")


def test_a_registered_function_is_an_explainer_by_name(backbone, images):
    try:

        @xattn.register_explainer("toy_gradient", networks=("cnn",))
        def gradient(images, target, backbone):
            images = images.clone().requires_grad_()
            backbone.logits(images).gather(1, target[:, None]).sum().backward()
            return images.grad

        assert gradient.__name__ == "gradient", "it stays a function"
        found = create_explainer("toy_gradient", backbone, channels="absolute")
        assert len(describe(found)["code"]) == 64, "a state does not go on with a changed function"
        wanted = captum.Saliency(backbone.logits).attribute(
            images.clone().requires_grad_(), target=4
        )
        torch.testing.assert_close(found.attribute(images, 4), wanted.sum(1, keepdim=True).detach())
        with pytest.raises(ValueError, match="^channels: got 'both'; give 'signed' or 'absolute'"):
            create_explainer("toy_gradient", backbone, channels="both")
        with pytest.raises(ValueError, match="^name: 'toy_gradient' is taken by"):
            xattn.register_explainer("toy_gradient")(brightness)
    finally:
        EXPLAINERS.remove("toy_gradient")


# ---------------------------------------------------------------- Captum


def captum_objects(backbone):
    forward = backbone.logits
    layer = backbone.model.layer2
    return {
        "saliency": captum.Saliency(forward),
        "of the backbone": captum.Saliency(backbone),
        "integrated": captum.IntegratedGradients(forward),
        "occlusion": captum.Occlusion(forward),
        "layer": captum.LayerGradCam(forward, layer),
        "guided": captum.GuidedGradCam(backbone, layer),
        "noise": captum.NoiseTunnel(captum.Saliency(backbone)),
    }


ARGUMENTS = {"occlusion": {"sliding_window_shapes": (3, 16, 16), "strides": (3, 8, 8)}}


@pytest.mark.parametrize("name", list(captum_objects(made("cnn"))))
def test_captum_objects_are_explainers(name, backbone, images):
    method = captum_objects(backbone)[name]
    if name == "occlusion":  # it has no defaults for what has to be chosen

        def method(images, target, attribute=method.attribute):
            return attribute(images, target=target, **ARGUMENTS["occlusion"])

    explainer = as_explainer(method, backbone, max_forward_batch=2)
    hooks = [len(m._forward_hooks) for m in backbone.modules()]
    maps = explainer.attribute(images, 1)
    assert maps.shape[:2] == (3, 1) and maps.isfinite().all() and not maps.requires_grad
    assert [len(m._forward_hooks) for m in backbone.modules()] == hooks
    assert evaluate(backbone, {name: method}, images, progress=False).methods[name].valid.any()
    if name == "of the backbone":
        wanted = captum_objects(backbone)["saliency"]
        torch.testing.assert_close(maps, as_explainer(wanted, backbone).attribute(images, 1))


def test_a_captum_object_of_the_network_itself_gets_normalised_images(backbone, images):
    explainer = as_explainer(captum.IntegratedGradients(backbone.model), backbone)
    assert explainer.pixels == "normalised" and explainer.notes[1].endswith("on normalised pixels")
    normalised = backbone.normalize(images).requires_grad_()
    wanted = captum.IntegratedGradients(backbone.model).attribute(normalised, target=1)
    found = explainer.attribute(images, 1)
    torch.testing.assert_close(
        found, wanted.sum(1, keepdim=True).detach().float(), rtol=1e-3, atol=1e-5
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    assert as_explainer(captum.Saliency(model), backbone).pixels == "raw"


# ---------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    "method, says",
    [
        (lambda x, t: x.mean((1, 2, 3)), r"explainers?: mine returned \(3,\) for 3 images; return \(B, h, w\)"),
        (lambda x, t: x[:1, 0], r"explainers?: mine returned \(1, 32, 32\) for 3 images"),
        (lambda x, t: torch.rand(3, 7, 4, 4), r"explainers?: mine returned \(3, 7, 4, 4\), 7 maps per image"),
        (lambda x, t: None, "explainers?: mine returned NoneType for 3 images"),
        (lambda x, t: 1 / 0, "explainers: mine cannot work: it raised ZeroDivisionError: division by zero"),
        (lambda x: x, "explainers: mine cannot work: it raised TypeError: .* takes 1 positional"),
        (lambda x, t: x.mean(1) * torch.nan, "explainers: mine cannot work: its maps contain NaN"),
        (lambda x, t: torch.zeros(3, 8, 8), "explainers: mine cannot work: its maps are constant on the first 3"),
        (captum.Saliency, "explainer: got <class .*; create an instance of it first"),
        (3, "explainer: got 3; give an explainer, a trained head, an object with attribute"),
        (captum.Saliency(lambda x: x.mean()), "explainers: mine cannot work: it raised"),
    ],
)  # fmt: skip
def test_a_method_that_cannot_work_is_one_line_before_anything_is_scored(
    method, says, backbone, images, monkeypatch
):
    scored = []
    monkeypatch.setattr("xattn.eval.metrics.scorer.MaskedScorer.submit", scored.append)
    with pytest.raises(ValueError, match=f"^{says}") as caught:
        methods = {"mine": method}
        evaluate(backbone, methods, images, progress=False, max_forward_batch=3)
    assert len(str(caught.value).splitlines()) == 1 and not scored


def test_a_method_that_fails_on_some_images_goes_on_with_the_others(backbone, images):
    def fails_on_dark(x, t):
        if x.mean((1, 2, 3)).min() < 0.2:
            raise RuntimeError("too dark")
        return x.mean(1)

    images[1] /= 10
    results = evaluate(
        backbone, {"mine": fails_on_dark}, images, progress=False, max_forward_batch=2
    )
    assert results.methods["mine"].valid.tolist() == [True, False, True]
    assert results.methods["mine"].reasons == {1: "RuntimeError: too dark"}


def test_maps_of_the_first_images_are_made_once(backbone, images):
    seen = []

    def spy(x, t):
        seen.append(len(x))
        return x.mean(1)

    evaluate(backbone, {"a": spy, "cam": create_explainer("gradcam", backbone)}, images,
             progress=False, max_forward_batch=2)  # fmt: skip
    assert seen == [2, 2], "the last one is padded"


@pytest.mark.parametrize(
    "found", [np.ones((2, 4, 5)), (torch.ones(2, 1, 4, 5),), torch.ones(2, 4, 5).int()]
)
def test_whatever_a_method_returns_becomes_one_float_map_an_image(found):
    maps = single_channel_maps(found, torch.zeros(2, 3, 8, 8), "mine")
    assert maps.shape == (2, 1, 4, 5) and maps.is_floating_point()


def test_explain_names_the_method_that_fails(backbone, images):
    photo = Image.fromarray((images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))

    def broken(x, t):
        raise RuntimeError("no\nluck")

    with pytest.raises(
        ValueError, match=r"^explainer: broken failed \(RuntimeError: no luck\); correct"
    ):
        xattn.explain(photo, backbone, explainer=broken)
    with pytest.raises(
        ValueError, match=r"^explainer: zeros returned \(3, 3\) for 1 images; return"
    ):
        xattn.explain(photo, backbone, explainer={"zeros": lambda x, t: torch.zeros(3, 3)})


# ---------------------------------------------------------------- records


def test_a_record_tells_functions_objects_and_options_apart(backbone):
    def records(*methods, **options):
        return [describe(as_explainer(m, backbone, **options)) for m in methods]

    one, other = records(brightness, lambda x, t: x.amax(1))
    assert one != other and one["class"].endswith("test_own.brightness")
    assert records(brightness) == [one] and records(brightness, channels="absolute") != [one]
    saliency, layer = records(
        captum.Saliency(backbone), captum.LayerGradCam(backbone, backbone.model.layer4)
    )
    assert saliency["class"] == "Saliency" and layer["options"]["layer"]
    assert records(Reds())[0]["class"] == "Reds"


def test_a_name_will_do_where_methods_have_rows(backbone, images):
    results = evaluate(backbone, {"cam": "gradcam", "mine": brightness}, images, progress=False)
    assert list(results.methods) == ["cam", "mine"]
    with pytest.raises(
        ValueError, match="^explainer: unknown explainer 'gradcm'; did you mean gradcam"
    ):
        evaluate(backbone, {"cam": "gradcm"}, images, progress=False)


def test_a_target_that_is_no_class_needs_a_method_that_asks_for_the_backbone(backbone, images):
    def gradient(images, target, backbone):
        images = images.clone().requires_grad_()
        backbone.logits(images).gather(1, target[:, None]).sum().backward()
        return images.grad

    def margin(logits):
        return logits[:, 1] - logits[:, 2]

    found = as_explainer(gradient, backbone).attribute(images, margin)
    wanted = [as_explainer(gradient, backbone).attribute(images, k) for k in (1, 2)]
    torch.testing.assert_close(found, wanted[0] - wanted[1], rtol=1e-3, atol=1e-6)
    for method in (brightness, captum.Saliency(backbone.logits)):
        with pytest.raises(
            ValueError,
            match="^target: explainer .* comes from outside xattn and explains only classes",
        ):
            as_explainer(method, backbone).attribute(images, margin)
