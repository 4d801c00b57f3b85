"""Segmentation networks as backbones: equal to the networks' own answers, and right where the answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_segmenters import (
    CLASSES,
    SIDE,
    UNet,
    sam,
    smp_segmenter,
    torchvision_segmenter,
    transformers_segmenter,
)
from torch import nn

import xattn
from xattn.backbone.scored import scored
from xattn.backbone.segmentation import Masks, class_scores, log_odds
from xattn.backbone.targets import like_mask
from xattn.photos.images import load_image
from xattn.photos.view import prepare

HALF = {"mean": 0.5, "std": 0.5}
TORCHVISION = ("fcn", "deeplabv3", "lraspp")
SEMANTIC, MASKED = ("segformer", "upernet"), ("maskformer", "mask2former")


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mask():
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[16:32, 16:48] = True
    return mask


def made(kind):
    net = torchvision_segmenter(kind) if kind in TORCHVISION else transformers_segmenter(kind)
    return net, xattn.load_segmenter(net, input_size=SIDE, **HALF)


def own_logits(net, x):
    answer = net(x)
    if "masks_queries_logits" not in answer:
        return answer["out"] if "out" in answer else answer.logits
    p = answer.class_queries_logits.softmax(-1)[..., :-1]
    return sum(
        p[:, q, :, None, None] * answer.masks_queries_logits[:, q, None].sigmoid()
        for q in range(p.shape[1])
    ).log()


# ---------------------------------------------------------------------- families


@pytest.mark.parametrize("kind", TORCHVISION + SEMANTIC + MASKED)
def test_a_network_answers_as_its_own_output_and_is_explained(kind, image, mask):
    net, segmenter = made(kind)
    with torch.no_grad():
        own = own_logits(net, segmenter.normalize(image))
        scale = SIDE // own.shape[2]
        rows = own[0, :, 5, 7]
        points = [
            xattn.at_point(k, *((v + 0.5) / own.shape[2] for v in (5, 7))) for k in range(CLASSES)
        ]
        assert torch.allclose(scored(segmenter, points).logits(image)[0], rows, atol=1e-5)
        at = scored(segmenter, xattn.at_mask(2, mask)).logits(image)
        inside = own[:, 2, 16 // scale : 32 // scale, 16 // scale : 48 // scale]
        assert torch.allclose(at[0], inside.mean((1, 2)), atol=1e-5)
        assert torch.allclose(segmenter.logits(image), class_scores(own), atol=1e-5)
    for name, options in (
        ("gradcam", {"relu": False}),
        ("saliency", {}),
        ("occlusion", {"size": 32, "stride": 32}),
    ):
        maps = xattn.create_explainer(name, segmenter, **options).attribute(
            image, xattn.at_mask(2, mask)
        )
        assert maps.isfinite().all() and maps.any(), name
    first = "thing 1" if kind in SEMANTIC + MASKED else "class 1"
    assert segmenter.class_names[1] == first


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("fcn", "backbone"),
        ("segformer", "segformer.stages.3"),
        ("upernet", "backbone"),
        ("mask2former", "model.pixel_level_module.encoder"),
    ],
)
def test_the_bottleneck_is_what_the_encoder_hands_on(kind, layer):
    assert made(kind)[1].model.path == layer


def test_the_bottleneck_of_a_network_without_an_encoder_is_its_coarsest_map():
    assert xattn.load_segmenter(UNet(), input_size=32, **HALF).model.path == "middle"


@pytest.mark.parametrize("kind", MASKED)
def test_by_class_the_likeliest_one_is_that_of_the_own_post_processing(kind, image):
    transformers = pytest.importorskip("transformers")
    net, segmenter = made(kind)
    name = "MaskFormer" if kind == "maskformer" else "Mask2Former"
    processor = getattr(transformers, f"{name}ImageProcessor")()
    with torch.no_grad():
        x = segmenter.normalize(image)
        answer = net(x)
        if kind == "mask2former":  # which resizes to 384 pixels first
            answer.masks_queries_logits = nn.functional.interpolate(
                answer.masks_queries_logits, (384, 384), mode="bilinear", align_corners=False
            )
        (found,) = processor.post_process_semantic_segmentation(answer)
        logits = segmenter.model.forward_pixels(x)[0]
        if kind == "mask2former":
            logits = nn.functional.interpolate(logits, (384, 384), mode="bilinear")
    assert (found == logits[0].argmax(0)).float().mean() > 0.97


@pytest.mark.parametrize("kind", MASKED)
def test_a_mask_has_the_score_of_its_class_and_pixels(kind, image):
    net, segmenter = made(kind)
    with torch.no_grad():
        answer = net(segmenter.normalize(image))
        p = answer.class_queries_logits[0, 4].softmax(0)[:-1]
        pixels = answer.masks_queries_logits[0, 4].sigmoid()
        inside = pixels[pixels > 0.5]
        sure = inside.mean() if len(inside) else pixels.max()
        view = scored(segmenter, [xattn.at_query(4), xattn.at_query(4, "thing 1")])
        assert torch.allclose(view.logits(image)[0], sure * torch.stack([p.max(), p[1]]), atol=1e-5)
    assert view.class_names == ["mask 4, the likeliest class", "mask 4, thing 1"]
    assert xattn.create_explainer("gradcam", view, relu=False).attribute(image, 0).any()


@pytest.mark.parametrize("kind", MASKED)
def test_masks_like_one_are_compared_as_boxes_are_by_d_rise(kind, image):
    _, segmenter = made(kind)
    with torch.no_grad():
        asked = [("thing 1", (20, 30))]
        (target,) = xattn.segment_targets(image[0], segmenter, asked, by="similarity")
        view = scored(segmenter, target)
        number = target.record["like"]

        def expected(x, own=None):
            found = segmenter.model.masks(segmenter.normalize(x))[0]
            p, masks = found.classes[0].softmax(1), found.masks[0] > 0
            own = own or (p[number, :-1], masks[number])
            value = max(
                float((mask & own[1]).sum() / (mask | own[1]).sum())
                * float(q[:-1] @ own[0] / (q[:-1].norm() * own[0].norm()))
                * float(1 - q[-1])
                for q, mask in zip(p, masks, strict=True)
                if mask.any()
            )
            return value, own

        value, own = expected(image)
        assert view.logits(image).item() == pytest.approx(value, abs=1e-5)
        hidden = image.clone()
        hidden[..., 20:50, 10:40] = 0
        changed = expected(hidden, own)[0]
        assert view.logits(hidden).item() == pytest.approx(changed, abs=1e-5) and changed < value
    assert xattn.create_explainer("occlusion", view, size=32, stride=32).attribute(image, 0).any()
    with pytest.raises(ValueError, match="mask: has no pixel above one half"):
        like_mask(torch.zeros(4, 4, dtype=torch.bool), torch.ones(2))


def test_sam_cuts_out_what_its_points_show(image):
    pytest.importorskip("transformers")
    net = sam()
    segmenter = xattn.load_segmenter(net, prompt=[(0.25, 0.5)], **HALF)
    x = segmenter.normalize(image)
    with torch.no_grad():
        own = net(pixel_values=x, input_points=torch.tensor([[[[32.0, 16.0]]]])).pred_masks[:, 0]
        assert torch.allclose(segmenter.model.forward_pixels(x)[0], own, atol=1e-5)
        assert torch.allclose(segmenter.logits(image), class_scores(own, True), atol=1e-5)
    maps = xattn.create_explainer("gradcam", segmenter, relu=False).attribute(image, 0)
    assert maps.shape[2:] == (4, 4) and maps.any()
    with pytest.raises(ValueError, match=r"^prompt: .* give \(row, column\)"):
        xattn.load_segmenter(net, **HALF)
    with pytest.raises(ValueError, match=r"^prompt: got \(2, 0\)"):
        xattn.load_segmenter(net, prompt=[(2, 0)], **HALF)
    with pytest.raises(ValueError, match=r"^prompt: a UNet takes no points"):
        xattn.load_segmenter(UNet(), prompt=[(0, 0)], **HALF)


@pytest.mark.parametrize("kind", ["Unet", "FPN", "DeepLabV3Plus"])
def test_segmentation_models_pytorch(kind, image):
    pytest.importorskip("segmentation_models_pytorch")
    net = smp_segmenter(kind)
    segmenter = xattn.load_backbone(net, input_size=SIDE, task="multilabel", **HALF)
    assert segmenter.model.path == "encoder" and segmenter.task == "multilabel"
    with torch.no_grad():
        own = net(segmenter.normalize(image))
        assert torch.allclose(segmenter.logits(image), class_scores(own, True), atol=1e-5)
        view = scored(segmenter, xattn.at_point(1, 0.5, 0.5, p="sigmoid"))
        assert torch.allclose(view.logits(image)[0], own[0, 1, 32, 32], atol=1e-5)


def test_torchvision_by_name_says_its_classes():
    segmenter = xattn.load_segmenter("torchvision/lraspp_mobilenet_v3_large", None, input_size=SIDE)
    assert segmenter.class_index("dog") == 12
    assert segmenter.preprocessing.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match="did you mean.*fcn_resnet50"):
        xattn.load_segmenter("torchvision/fcn_resnet5", None)
    with pytest.raises(ValueError, match=r"^backbone: .*load_segmenter"):
        xattn.load_backbone("torchvision/fcn_resnet50", None)


def test_transformers_by_name(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers_segmenter("segformer").save_pretrained(tmp_path)
    transformers.SegformerImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(
        tmp_path
    )
    segmenter = xattn.load_segmenter(f"transformers:{tmp_path}")
    assert segmenter.class_names[4] == "thing 4"
    assert segmenter.preprocessing.crop_mode == "squash"
    with pytest.raises(ValueError, match="^weights: got 'mine.pth'"):
        xattn.load_segmenter(f"transformers:{tmp_path}", "mine.pth")


def test_a_file_with_the_auxiliary_classifier_of_training_is_loaded(tmp_path):
    from torchvision.models.segmentation import fcn_resnet50

    net = fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True).eval()
    torch.save(net.state_dict(), tmp_path / "fcn.pth")
    segmenter = xattn.load_segmenter(
        "torchvision/fcn_resnet50", tmp_path / "fcn.pth", input_size=33
    )
    x = torch.rand(1, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = class_scores(net(segmenter.normalize(x))["out"])
    assert torch.allclose(segmenter.logits(x), own, atol=1e-5)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gap", [2, 10, 40])
def test_log_odds_are_exact_and_have_a_gradient_however_sure_the_network_is(dtype, gap):
    z = torch.tensor([0.0, 1.0, gap, -gap], dtype=dtype)[None, :, None, None].requires_grad_()
    odds = log_odds(z)
    wide = z.detach().double()[0, :, 0, 0]
    others = [torch.cat([wide[:k], wide[k + 1 :]]).logsumexp(0) for k in range(4)]
    expected = wide - torch.stack(others)
    assert torch.allclose(odds.double()[0, :, 0, 0], expected, rtol=1e-5, atol=1e-5)
    for k in range(4):
        (gradient,) = torch.autograd.grad(odds[0, k], z, torch.ones(1, 1), retain_graph=True)
        share = -(wide.clone().index_fill(0, torch.tensor(k), -torch.inf)).softmax(0)
        share[k] = 1
        assert torch.allclose(gradient.double()[0, :, 0, 0], share, atol=1e-2), k


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_class_of_a_pixel_far_from_every_mask_is_still_told(dtype):
    draw = torch.Generator().manual_seed(0)
    classes = (20 * torch.randn(1, 3, 4, generator=draw)).to(dtype)
    masks = (10 * torch.randn(1, 3, 4, 4, generator=draw) - 30).to(dtype).requires_grad_()
    log_p = classes.double().log_softmax(-1)[..., :-1]
    inside = nn.functional.logsigmoid(masks.double())
    expected = (log_p[:, :, :, None, None] + inside[:, :, None]).logsumexp(1)
    found = Masks(classes, masks).by_class()
    assert torch.allclose(found.double(), expected, atol=1e-3)
    assert torch.autograd.grad(found.sum(), masks)[0].amax(1).min() > 0.1


def test_a_mask_of_many_pixels_in_half_precision_has_the_score_of_single_precision():
    net = nn.Conv2d(3, 4, 1)
    image, mask = torch.rand(1, 3, 300, 300), torch.ones(300, 300)
    segmenter = xattn.load_segmenter(net, input_size=300, mean=0.0, std=1.0)
    expected = scored(segmenter, xattn.at_mask(1, mask)).logits(image)
    segmenter = segmenter.to(torch.float16)
    found = scored(segmenter, xattn.at_mask(1, mask)).logits(image.half())
    assert torch.allclose(found.float(), expected, atol=1e-3)
    assert class_scores(torch.full((1, 1, 300, 300), 2.0).half(), True).item() == 2
    packed = Masks(torch.tensor([[[9.0, 0.0]]]), torch.full((1, 1, 300, 300), 9.0)).pack()
    read = replace(xattn.at_query(0).function, classes=1)
    assert read(packed.half()).item() == pytest.approx(float(torch.tensor(9.0).sigmoid()) ** 2)


def test_numbers_of_numpy_name_classes_and_masks():
    assert xattn.at_point(np.int64(1), 0.5, 0.5).label == 1
    assert xattn.at_query(np.int32(4)).about() == xattn.at_query(4).about()
    with pytest.raises(ValueError, match="class_index: got .*True"):
        xattn.at_point(True, 0.5, 0.5)


# ---------------------------------------------------------------------- functions


def test_a_function_is_explained_by_methods_that_mask(image):
    def bright(images):
        found = images.numpy().mean(1, keepdims=True)
        return np.concatenate([found, 1 - found], 1)

    segmenter = xattn.load_segmenter(bright, input_size=SIDE)
    assert segmenter.name == "bright"
    point = xattn.at_point(0, 0.1, 0.6)
    value = scored(segmenter, point).logits(image)[0, 0]
    assert torch.allclose(value, image[0, :, 6, 38].mean())
    maps = xattn.create_explainer("occlusion", segmenter, size=8, stride=8).attribute(image, point)
    assert maps[0, 0, :8, 32:40].all() and maps.count_nonzero() == 64
    with pytest.raises(ValueError, match="^explainer: the output of the network has no gradient"):
        xattn.create_explainer("saliency", segmenter).attribute(image, point)
    with pytest.raises(ValueError, match="^explainer: 'gradcam' reads feature maps"):
        xattn.create_explainer("gradcam", segmenter)


@pytest.mark.parametrize("answer", [lambda x: x.mean((2, 3)), lambda x: {"boxes": x}, lambda x: 3])
def test_an_answer_that_is_not_understood_is_refused(answer):
    with pytest.raises(
        ValueError, match=r"^name_or_module: the output .*return logits \(1, K, h, w\)"
    ):
        xattn.load_segmenter(answer, input_size=SIDE)


def test_channels_last_are_refused():
    for size in (SIDE, (32, 48)):
        with pytest.raises(ValueError, match=r"channels first: .permute\(0, 3, 1, 2\)"):
            xattn.load_segmenter(lambda x: x.permute(0, 2, 3, 1), input_size=size)
        assert xattn.load_segmenter(lambda x: x[..., ::2, ::2], input_size=size).num_classes == 3


def test_what_cannot_be_a_segmenter_is_refused(image):
    with pytest.raises(ValueError, match=r"^model: got 3; give torchvision/NAME"):
        xattn.load_segmenter(3)
    with pytest.raises(ValueError, match=r"^task: got 'regression'"):
        xattn.load_segmenter(UNet(), task="regression", **HALF)
    with pytest.raises(ValueError, match=r"fails on images of 224 x 224"):
        xattn.load_segmenter(nn.Linear(3, 3), **HALF)
    segmenter = xattn.load_segmenter(UNet(), input_size=SIDE, **HALF)
    for target, reason in (
        (xattn.at_point("dog", 0.5, 0.5), "^target: class 'dog' is not a class of UNet"),
        (xattn.at_point(7, 0.5, 0.5), "^target: class 7 is out of range"),
        (xattn.at_query(1), "^target: UNet returns logits of pixels, not masks"),
    ):
        with pytest.raises(ValueError, match=reason):
            scored(segmenter, target)
    with pytest.raises(ValueError, match=r"^target: .*reads pixels.*one by one"):
        scored(segmenter, [xattn.at_point(0, 0, 0), xattn.at_point(0, 0, 0, p="sigmoid")])


# ---------------------------------------------------------------------- known answers


class Linear(nn.Module):
    """Logits of each pixel from that pixel alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.mix(x)


def test_maps_of_a_linear_function_of_each_pixel_are_its_weights(image, mask):
    net = Linear()
    segmenter = xattn.load_segmenter(net, input_size=SIDE, mean=0.0, std=1.0)
    target = xattn.at_mask(2, mask)
    share = mask.float() / mask.sum()
    weight = net.mix.weight[2, :, 0, 0].detach()
    expected = {
        "saliency": weight.abs().max() * share,
        "input_x_gradient": (weight[:, None, None] * image[0]).sum(0) * share,
        "integrated_gradients": (weight[:, None, None] * image[0]).sum(0) * share,
    }
    for name, maps in expected.items():
        found = xattn.create_explainer(name, segmenter).attribute(image, target)[0, 0]
        assert torch.allclose(found, maps, atol=1e-6), name
    found = xattn.create_explainer("occlusion", segmenter, size=4, stride=4).attribute(
        image, target
    )
    cells = nn.functional.adaptive_max_pool2d(mask.float()[None, None], found.shape[2:])
    assert found[cells == 0].abs().max() < 1e-6 and found[cells == 1].abs().min() > 0


def test_gradcam_is_seg_grad_cam_written_by_hand(image, mask):
    torch.manual_seed(0)
    net = UNet()
    segmenter = xattn.load_segmenter(net, input_size=SIDE, **HALF)
    x = segmenter.normalize(image)
    down = net.down(x)
    activations = net.middle(down).detach().requires_grad_()
    pixels = net.last(torch.cat([down, net.up(activations).relu()], 1))
    (gradient,) = torch.autograd.grad(pixels[0, 1][mask].sum(), activations)
    weights = gradient.mean((2, 3), keepdim=True)
    expected = (weights * activations).sum(1, keepdim=True).relu() / mask.sum()
    found = xattn.create_explainer("gradcam", segmenter).attribute(image, xattn.at_mask(1, mask))
    assert expected.any() and torch.allclose(found, expected.detach(), atol=1e-6)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()
        )
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class OnePixel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Classifier()

    def forward(self, x):
        return self.net(x)[:, :, None, None]


@pytest.mark.parametrize(
    ("name", "options"),
    [("gradcam", {}), ("layercam", {}), ("saliency", {}), ("smoothgrad", {"samples": 2}),
     ("integrated_gradients", {"steps": 4}), ("lrp", {}), ("occlusion", {"size": 32, "stride": 32}), ("rise", {"masks": 20}),
     ("ablationcam", {})],
)  # fmt: skip
def test_a_classifier_as_a_segmenter_of_one_pixel_gives_its_maps(name, options, image):
    classifier = xattn.load_backbone(Classifier(), input_size=SIDE, **HALF)
    segmenter = xattn.load_segmenter(OnePixel(), input_size=SIDE, **HALF)
    p = "sigmoid" if name in ("occlusion", "rise") else "value"
    expected = xattn.create_explainer(name, classifier, **options).attribute(image, 2)
    target = xattn.at_point(2, 0.5, 0.5, p=p)
    found = xattn.create_explainer(name, segmenter, **options).attribute(image, target)
    assert expected.any() and torch.allclose(found, expected, atol=1e-6)


def test_several_targets_have_the_maps_that_each_has_alone(image, mask):
    torch.manual_seed(0)
    segmenter = xattn.load_segmenter(UNet(), input_size=SIDE, **HALF)
    targets = [xattn.at_point(1, 0.2, 0.7), xattn.at_mask(0, mask)]
    for name, options in (("gradcam", {}), ("rise", {"masks": 10})):
        found = xattn.explain(
            image,
            segmenter,
            explainer=xattn.create_explainer(name, segmenter, **options),
            target=targets,
        )
        assert [one.target_name for one in found] == [
            "class 1 at (0.2, 0.7)",
            "class 0 at a mask of 512 pixels",
        ]
        for one, target in zip(found, targets, strict=True):
            alone = xattn.create_explainer(name, segmenter, **options).attribute(image, target)[
                0, 0
            ]
            assert np.allclose(one.map, alone, atol=1e-6)


def test_with_p_sigmoid_p_is_the_probability_of_the_class_at_the_point(image):
    segmenter = xattn.load_segmenter(UNet(), input_size=SIDE, **HALF)
    x = segmenter.normalize(image)
    with torch.no_grad():
        p = segmenter.model.forward_pixels(x)[0].softmax(1)[0, 1, 32, 32]
        assert torch.allclose(
            log_odds(segmenter.model.forward_pixels(x)[0])[0, 1, 32, 32].sigmoid(), p
        )
    one = xattn.explain(
        image, segmenter, explainer="gradcam", target=xattn.at_point(1, 0.5, 0.5, p="sigmoid")
    )
    assert one[0].probability == pytest.approx(float(p), abs=1e-5)


# ---------------------------------------------------------------------- questions in pixels of a photo


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A photo of 160 x 80 pixels, red where x is from 100 and y is from 40."""
    path = tmp_path_factory.mktemp("photos") / "wide.png"
    pixels = np.zeros((80, 160, 3), np.uint8)
    pixels[40:, 100:, 0] = 255
    Image.fromarray(pixels).save(path)
    return path


def reds(images):
    return torch.cat([0.5 - images[:, :1], images[:, :1] - 0.5], 1)


def test_points_and_masks_lie_on_the_photo(wide, tmp_path):
    segmenter = xattn.load_segmenter(reds, input_size=SIDE, class_names=["black", "red"])
    mask = np.zeros((80, 160), bool)
    mask[50:70, 110:150] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    asked = [
        ("red", (120, 60)),
        ("red", (90, 60)),
        (None, (90, 60)),
        ("red", mask),
        (None, tmp_path / "mask.png"),
    ]
    targets = xattn.segment_targets(wide, segmenter, asked)
    found = xattn.explain(wide, segmenter, explainer="occlusion", target=targets)
    names = ["red at (120, 60)", "red at (90, 60)", "black at (90, 60)"]
    assert [one.target_name for one in found[:3]] == names
    assert found[4].target_name == "red in mask.png"
    p = [one.probability for one in found]
    high = float(torch.tensor(1.0).sigmoid())
    assert p == pytest.approx([high, 1 - high, high, high, high], abs=1e-5)
    assert found[0].protocol["segment"] == {"class": "red", "point": [120.0, 60.0]}


SEEN = []


class Seeing(nn.Module):
    """Two classes by the first channel; all copies put what they see into one list."""

    def __init__(self, channels):
        super().__init__()
        self.mix = nn.Conv2d(channels, 2, 1, bias=False)
        self.mix.weight.data.zero_()[:, 0, 0, 0] = torch.tensor([1.0, -1.0])

    def forward(self, x):
        SEEN.append(x)
        return self.mix(x)


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("side", [SIDE, 48])
def test_an_image_of_any_channels_is_seen_as_by_explain(channels, side):
    image = torch.rand(channels, side, side, generator=torch.Generator().manual_seed(0))
    segmenter = xattn.load_segmenter(
        Seeing(channels), input_size=SIDE, mean=[0.2] * channels, std=[0.5] * channels
    )
    mask = torch.zeros(side, side)
    mask[3, 40] = 1
    SEEN.clear()
    targets = xattn.segment_targets(image, segmenter, [(0, (40, 3)), (0, mask)])
    found = xattn.explain(image, segmenter, explainer="random", target=targets)
    assert torch.equal(SEEN[0], SEEN[-1])
    if side == SIDE:
        p = float((2 * (image[0, 3, 40] - 0.2) / 0.5).sigmoid())
        assert [one.probability for one in found] == pytest.approx([p, p], abs=1e-5)


def test_a_mask_of_the_network_is_asked_for_by_a_point(wide):
    net, segmenter = made("mask2former")
    (target,) = xattn.segment_targets(wide, segmenter, [("thing 1", (50, 20))], by="mask")
    number = target.record["mask"]
    pixels, _ = prepare(load_image(wide), segmenter.preprocessing)
    answer = net(segmenter.normalize(pixels[None]))
    p = answer.class_queries_logits[0].softmax(-1)[:, 1]
    # (50, 20) of 160 x 80 is column 20, row 24 of 64 x 64: cell (6, 5) of 16 x 16.
    assert number == int((p * answer.masks_queries_logits[0, :, 6, 5].sigmoid()).argmax())
    (one,) = xattn.explain(wide, segmenter, explainer="gradcam", target=[target])
    assert one.target_name == f"thing 1, mask {number} at (50, 20)"


def test_questions_that_have_no_answer_are_refused(wide):
    segmenter = xattn.load_segmenter(reds, input_size=SIDE, class_names=["black", "red"])
    for at, reason in (
        ([("red", (160, 10))], r"^at: \(160, 10\) lies outside the photo of 160 x 80 pixels"),
        ([("blue", (1, 1))], "^at: class 'blue' is not a class"),
        ([("red", np.zeros((80, 160)))], "^at: got a mask without a pixel"),
        ([("red", np.ones((8, 8)))], r"^at: got a mask of \(8, 8\) for a photo of 160 x 80"),
        ([("red", "nothing.png")], "^at: "),
        (["red"], r"^at: got 'red'; give \(class"),
        ([("red", (1,))], "^at: "),
        ([], "^at: got"),
    ):
        with pytest.raises((ValueError, OSError), match=reason):
            xattn.segment_targets(wide, segmenter, at)
    with pytest.raises(ValueError, match="^by: got 'box'"):
        xattn.segment_targets(wide, segmenter, [("red", (1, 1))], by="box")
    with pytest.raises(ValueError, match="^by: reds answers no masks; leave it out"):
        xattn.segment_targets(wide, segmenter, [("red", (1, 1))], by="mask")
    with pytest.raises(ValueError, match="^segmenter: .*load_segmenter"):
        classifier = xattn.load_backbone("test_resnet", weights=None)
        xattn.segment_targets(wide, classifier, [(0, (1, 1))])


# ---------------------------------------------------------------------- a planted cue


class Planted(nn.Module):
    """Learns what :func:`planted` draws: each place sees its surroundings and the mean of the picture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
        )
        self.last = nn.Sequential(nn.Conv2d(64, 32, 1), nn.ReLU(), nn.Conv2d(32, 3, 1))

    def forward(self, x):
        near = self.encoder(x)
        far = near.mean((2, 3), keepdim=True).expand(near.shape)
        coarse = self.last(torch.cat([near, far], 1))
        return nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")


def planted(count, seed):
    """Grey squares in the middle of noise, (n, 3, 32, 32), of class 1 or 2 by whether a mark in a corner is
    red or blue; the labels (n, 32, 32), and the corners (n,)."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.4 + 0.1 * torch.rand(count, 3, 32, 32, generator=draw)
    labels = torch.zeros(count, 32, 32, dtype=torch.long)
    kind = torch.randint(0, 2, (count,), generator=draw)
    corner = torch.randint(0, 4, (count,), generator=draw)
    images[:, :, 12:20, 12:20] = 0.8
    labels[:, 12:20, 12:20] = 1 + kind[:, None, None]
    for i in range(count):
        top, left = 25 * (int(corner[i]) // 2), 25 * (int(corner[i]) % 2)
        images[i, :, top : top + 7, left : left + 7] = 0.0
        images[i, 2 * int(kind[i]), top : top + 7, left : left + 7] = 1.0
    return images, labels, corner


@pytest.fixture(scope="module")
def planted_segmenter():
    net = Planted()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    images, labels, _ = planted(512, 0)
    weight = torch.tensor([0.2, 1.0, 1.0])
    for step in range(100):
        own = torch.arange(64) + 64 * (step % 8)
        loss = nn.functional.cross_entropy(net(images[own] - 0.5), labels[own], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return xattn.load_segmenter(net, input_size=32, mean=0.5, std=1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("occlusion", {"size": 8, "stride": 4}), ("input_x_gradient", {}), ("integrated_gradients", {"steps": 16})],
)  # fmt: skip
def test_maps_of_a_class_at_a_point_are_largest_at_the_far_cue_that_decides_it(
    name, options, planted_segmenter
):
    images, labels, corners = planted(24, 1)
    kinds = labels[:, 16, 16]
    pixels = planted_segmenter.model.forward_pixels(images - 0.5)[0]
    assert (pixels[:, :, 16, 16].argmax(1) == kinds).all()
    # Rather one class than the other: both know from the square itself that it is one.
    contrast = xattn.Target(
        lambda logits: logits[:, 1, 16, 16] - logits[:, 2, 16, 16], "one", "sigmoid", "pixels"
    )
    maps = xattn.create_explainer(name, planted_segmenter, **options).attribute(images, contrast)
    signed = maps[:, 0] * torch.where(kinds == 1, 1, -1)[:, None, None]
    quarters = nn.functional.avg_pool2d(signed.clamp_min(0)[:, None], 16).flatten(1)
    assert (quarters.argmax(1) == corners).float().mean() > 0.9
    # The square alone as a map says nothing of it.
    assert (
        nn.functional.avg_pool2d((labels > 0).float()[:, None], 16).flatten(1).argmax(1) == corners
    ).float().mean() < 0.6


# ---------------------------------------------------------------------- the command


def test_the_command_explains_places_of_a_photo(wide, tmp_path, capsys):
    from xattn.cli import main

    (tmp_path / "reds_of_a_test.py").write_text(
        "import torch, xattn\n"
        "def made():\n"
        "    reds = lambda x: torch.cat([0.5 - x[:, :1], x[:, :1] - 0.5], 1)\n"
        "    return xattn.load_segmenter(reds, input_size=64, class_names=['black', 'red'])\n"
    )
    network = ["--segmenter", f"{tmp_path}/reds_of_a_test.py:made", "--explainers", "occlusion"]
    output = ["--output", str(tmp_path / "pack")]
    assert main(["explain", str(wide), *network, "--at", "red@120,60", "@90,60", *output]) == 0
    pack = xattn.load_pack(tmp_path / "pack")
    assert [e.target_name for e in pack] == ["red at (120, 60)", "black at (90, 60)"]
    assert (
        main(["explain", str(wide), *network, "--top", "2", "--output", str(tmp_path / "top")]) == 0
    )
    capsys.readouterr()
    for words, reason in (
        ([*network, "--at", "red@200,5"], "at: (200, 5) lies outside the photo"),
        ([*network, "--at", "red"], "at: got 'red'; give CLASS@x,y"),
        ([*network, "--at", "red@1,1", "--by", "mask"], "by: "),
        ([*network, "--by", "mask"], "by: needs --at"),
        (
            ["--at", "red@1,1"],
            "at: places can only be explained with a segmentation network; give --segmenter",
        ),
        (["--segmenter", "unet"], "segmenter: got 'unet'; give torchvision/NAME"),
    ):
        assert main(["explain", str(wide), *words]) == 2
        assert f"error: {reason}" in capsys.readouterr().err
