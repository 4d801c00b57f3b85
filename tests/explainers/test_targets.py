"""Every explainer with every form of target: a class, a number of the network's answer, a photo's features."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import PAIRS, cheap, made

from xattn import Target, at_mask, at_point, create_explainer, load_backbone, similarity_to
from xattn.backbone.scored import scored
from xattn.heads import create_head

# All others read logits, or no class at all.
READS_P = ("rise", "occlusion", "lime", "kernel_shap", "igos_pp", "mda")
PER_CLASS = ("cam", "head", "gates", "token_path", "box", "box_centre", "d_rise", "odam")
K = 3


@pytest.fixture(scope="module")
def backbones():
    return {kind: made(kind) for kind in ("cnn", "vit", "masks", "detector")}


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def of(kind, images):
    return images if kind == "cnn" else images[..., ::2, ::2]


def explainer_of(name, backbone):
    head = create_head("ttame", backbone, fusion="classifier") if name == "head" else None
    return cheap(name, backbone, head)


@pytest.mark.parametrize("name, kind", PAIRS)
def test_a_function_that_is_the_class_has_its_map(backbones, images, name, kind):
    backbone, images = backbones[kind], of(kind, images)
    explainer = explainer_of(name, backbone)

    def same(outputs):
        return (outputs.double().softmax(1) if name in READS_P else outputs)[:, K]

    if name in PER_CLASS:
        with pytest.raises(ValueError, match=f"^target: explainer '{name}' explains only classes"):
            explainer.attribute(images, same)
        return
    own, found = explainer.attribute(images, K), explainer.attribute(images, same)
    assert (found - own).abs().max() <= 1e-5 * own.abs().max()
    assert torch.equal(found, explainer.with_target(same).attribute(images, 0))


@pytest.mark.parametrize(
    "name", ["input_x_gradient", "integrated_gradients", "attn_lrp", "occlusion"]
)
def test_linear_methods_explain_a_contrast_by_the_difference(backbones, images, name):
    images = of("vit", images)
    explainer = cheap(name, backbones["vit"])

    def contrast(outputs):
        outputs = outputs.softmax(1) if name in READS_P else outputs
        return outputs[:, 1] - outputs[:, 2]

    difference = explainer.attribute(images, 1) - explainer.attribute(images, 2)
    found = explainer.attribute(images, contrast)
    assert (found - difference).abs().max() <= 1e-4 * difference.abs().max()


def test_the_sigmoid_is_what_methods_that_mask_see(backbones, images):
    images = of("vit", images)
    explainer = cheap("occlusion", backbones["vit"])
    score = Target(lambda z: z[:, 1] - z[:, 2], p="sigmoid")
    p = Target(lambda z: (z[:, 1] - z[:, 2]).sigmoid())
    assert torch.allclose(
        explainer.attribute(images, score), explainer.attribute(images, p), atol=1e-6
    )


# ---------------------------------------------------------------------- the view


def test_a_view_shares_the_network_and_says_what_it_shows(backbones, images):
    backbone = backbones["cnn"]
    view = scored(backbone, Target(lambda z: z[:, 1] - z[:, 2], name="one rather than two"))
    with torch.no_grad():
        z = backbone.logits(images)
        assert torch.equal(view.logits(images)[:, 0], z[:, 1] - z[:, 2])
        assert torch.equal(view(images).logits, view.logits(images))
        final = backbone(images).maps[-1]
        assert torch.allclose(view.head_logits(final), view.logits(images), atol=1e-6)
    assert view.class_names == ["one rather than two"] and view.num_classes == 1
    assert view.fingerprint == backbone.fingerprint and view.model is backbone.model
    assert view.classifier_weight is None and not view.pools_linearly
    assert list(view.parameters()) == list(backbone.parameters())


def test_views_follow_taps_copies_and_types(backbones, images):
    view = scored(backbones["cnn"], lambda z: z[:, 1])
    assert view.with_taps(["head"]).taps == ("head",)
    with torch.no_grad():
        expected = view.logits(images)
        twin = copy.deepcopy(view).double()
        assert twin.model is not view.model and twin.base.model is twin.model
        assert torch.allclose(twin.logits(images.double()).float(), expected, atol=1e-5)


def test_functions_are_told_apart_by_what_they_give(backbones):
    def ids(*functions):
        return {scored(backbones["cnn"], function).target_id for function in functions}

    assert len(ids(lambda z: z[:, 1], lambda z: z[:, 2], lambda z: z[:, 1] * 2)) == 3
    assert len(ids(lambda z: z[:, 1], lambda z: z.select(1, 1))) == 1
    assert len(ids(Target(lambda z: z[:, 1], "same"), Target(lambda z: z[:, 2], "same"))) == 2


def test_a_probed_backbone_has_views(backbones, images):
    from xattn.heads.probed import probed

    images, backbone = of("vit", images), backbones["vit"]
    torch.manual_seed(0)
    head = create_head("efficient_probe", backbone, classes=4)
    network = probed(backbone, head)
    own = cheap("gradcam", network)
    assert torch.equal(own.attribute(images, 1), own.attribute(images, lambda z: z[:, 1]))


# ---------------------------------------------------------------------- similarity, regression


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_similarity_is_the_cosine_of_pooled_features(backbones, images, kind):
    backbone, images = backbones[kind], of(kind, images)
    view = scored(backbone, similarity_to(images[1]))
    model = backbone.model
    with torch.no_grad():
        features = model.forward_head(
            model.forward_features(backbone.normalize(images)), pre_logits=True
        )
        expected = F.cosine_similarity(features, features[1:], dim=1)
        assert torch.allclose(view.logits(images)[:, 0], expected, atol=1e-5)
        same = scored(backbone, similarity_to(features[1]))
        assert torch.allclose(same.logits(images), view.logits(images), atol=1e-5)
    for name in ("gradcam", "saliency", "rise"):
        maps = cheap(name, backbone).attribute(images, similarity_to(images[1]))
        assert bool(maps.isfinite().all())


def test_an_encoder_is_explained_by_its_own_output(images):
    import timm

    torch.manual_seed(0)
    encoder = load_backbone(timm.create_model("test_resnet", num_classes=0), input_size=64)
    view = scored(encoder, similarity_to(images[0]))
    with torch.no_grad():
        assert float(view.logits(images)[0]) == pytest.approx(1, abs=1e-5)
    assert bool(cheap("gradcam", encoder).attribute(images, similarity_to(images[0])).any())


def test_a_regression_model_has_numbers_and_no_classes(images):
    import timm

    torch.manual_seed(0)
    backbone = load_backbone(
        timm.create_model("test_resnet", num_classes=1), input_size=64, task="regression"
    )
    assert backbone.class_names == ["value"]
    with torch.no_grad():
        z = backbone.logits(images)
    assert z.shape == (2, 1) and torch.equal(backbone.probabilities(z), z.double())
    maps = create_explainer("input_x_gradient", backbone).attribute(images, 0)
    assert bool(maps.any())
    with pytest.raises(ValueError, match=r"^backbone: .* heads are trained on classes"):
        create_head("ttame", backbone)


# ---------------------------------------------------------------------- segmentation


@pytest.fixture(scope="module")
def segmenter():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    return net, load_backbone(net, input_size=64)


def test_a_segmentation_network_is_explained_at_a_mask(segmenter, images):
    net, backbone = segmenter
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:30, 5:50] = True
    view = scored(backbone, at_mask(2, mask))
    with torch.no_grad():
        pixels = net(backbone.normalize(images))["out"]
        assert torch.allclose(view.logits(images)[:, 0], pixels[:, 2, mask].mean(1), atol=1e-5)
        point = scored(backbone, at_point(1, 0.5, 0.25)).logits(images)[:, 0]
        assert torch.allclose(point, pixels[:, 1, 32, 16], atol=1e-5)
    for name in ("gradcam", "saliency", "occlusion"):
        maps = cheap(name, backbone).attribute(images, at_mask(2, mask))
        assert maps.shape[:2] == (2, 1) and bool(maps.any())


def test_a_segmentation_network_is_a_classifier_of_its_masks(segmenter, images):
    net, backbone = segmenter
    with torch.no_grad():
        p = net(backbone.normalize(images))["out"].softmax(1)
        scores = backbone.logits(images)
    assert scores.shape == (2, 4) and backbone.task == "multilabel"
    assert torch.equal(scores > 0, (p > 0.5).flatten(2).any(2))


def test_a_network_of_encoder_decoder_and_head_segments(images):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder = Levels()
            self.decoder = Last()
            self.segmentation_head = torch.nn.Conv2d(6, 3, 1)

        def forward(self, x):
            return self.segmentation_head(self.decoder(self.encoder(x)))

    class Levels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)

        def forward(self, x):
            return [x, self.convolution(x)]

    class Last(torch.nn.Module):
        def forward(self, features):
            return features[-1].relu()

    with pytest.warns(UserWarning, match="normalised"):
        backbone = load_backbone(Small(), input_size=64)
    maps = cheap("gradcam", backbone).attribute(images, at_point(2, 0.5, 0.5))
    assert maps.shape == (2, 1, 32, 32) and bool(maps.any())


def test_masks_of_our_own_networks_are_targets(backbones):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(32, 32)
    mask[8:20, 8:20] = 1
    backbone = backbones["masks"]
    view = scored(backbone, at_mask(4, mask))
    with torch.no_grad():
        pixels = backbone.model.net.outputs(backbone.normalize(images)).logits
        expected = pixels[:, 4, 8:20, 8:20].mean((1, 2))
        assert torch.allclose(view.logits(images)[:, 0], expected, atol=1e-5)
