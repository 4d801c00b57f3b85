"""Detectors: families, detections as targets, methods, packs, metrics, and what is refused."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_detectors import (
    CLASSES,
    SIDE,
    Words,
    Yolo,
    torchvision_detector,
    transformers_detector,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision.ops import batched_nms

import xattn
from xattn.cli.detections import requested_objects
from xattn.detection import (
    Candidates,
    DetectionNetwork,
    Detections,
    Detector,
    Suppression,
    load_detector,
)
from xattn.detection.candidates import iou, log_odds
from xattn.eval import evaluate
from xattn.eval.annotations import DetectedObjects
from xattn.explainers import create_explainer
from xattn.photos.preprocessing import Preprocessing
from xattn.photos.view import prepare

TORCHVISION = ("fasterrcnn", "maskrcnn", "retinanet", "fcos", "ssd")
QUERIES = (
    "detr", "table-transformer", "conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine",
    "yolos", "grounding-dino",
)  # fmt: skip
ONE_MAP = ("detr", "table-transformer", "conditional_detr", "yolos")
PLAIN = Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "border")


def random_image(side=SIDE, seed=0):
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- families


@pytest.mark.parametrize("kind", TORCHVISION)
def test_torchvision_gives_the_detectors_own_answer(kind):
    net = torchvision_detector(kind)
    found = load_detector(net).detect(random_image(), threshold=None)
    with torch.no_grad():
        own = net([random_image()])[0]
    assert len(found) == len(own["boxes"]) > 5
    mine = [(one.label, round(one.score, 5), *(round(v, 3) for v in one.box)) for one in found]
    theirs = [
        (int(label), round(float(score), 5), *(round(v, 3) for v in box.tolist()))
        for label, score, box in zip(own["labels"], own["scores"], own["boxes"], strict=True)
    ]
    assert np.allclose(sorted(mine), sorted(theirs), atol=2e-3)


@pytest.mark.parametrize("kind", QUERIES)
def test_transformers_gives_the_detectors_own_answer_and_maps_that_lead_to_it(kind):
    net = transformers_detector(kind)
    text = {"class_names": ["a cat", "dog"], "processor": Words()} if "ground" in kind else {}
    detector = load_detector(net, input_size=SIDE, **text)
    x = detector.normalize(torch.stack([random_image(), random_image(seed=1)]))
    packed, maps = detector.model.forward_candidates(x)
    found = Candidates.of(packed, detector.num_classes)
    inputs = {key: getattr(detector.model, key).expand(2, -1) for key in detector.model.text_keys}
    with torch.no_grad():
        own = net(pixel_values=x, **inputs)
    if kind in ("detr", "table-transformer", "yolos"):
        expected = own.logits.softmax(-1)[..., :-1]
        assert torch.allclose(found.objectness, expected.sum(-1), atol=1e-5)
    elif "ground" in kind:  # [CLS] a cat . dog . [SEP]
        p = own.logits.sigmoid()
        expected = torch.stack([p[..., 1:3].amax(-1), p[..., 4]], -1)
    else:
        expected = own.logits.sigmoid()
    assert torch.allclose(found.classes, expected, atol=1e-5)
    middle = (found.boxes[:, :, 0, :2] + found.boxes[:, :, 0, 2:]) / 2 / SIDE
    sides = (found.boxes[:, :, 0, 2:] - found.boxes[:, :, 0, :2]) / SIDE
    assert torch.allclose(torch.cat([middle, sides], -1), own.pred_boxes, atol=1e-5)
    assert len(maps) == len(detector.model.points) == (1 if kind in ONE_MAP else 3)
    view = detector.of(detector.best_candidates(random_image(), 2))
    gradcam = create_explainer("gradcam", view).attribute(x[:1].clamp(0, 1), 1)
    odam = create_explainer("odam", view).attribute(random_image()[None], 1)
    assert odam.shape == (1, 1, SIDE, SIDE) and float(odam.max()) > 0 and gradcam.isfinite().all()


def test_a_name_of_transformers_takes_trained_or_random_weights(tmp_path, monkeypatch):
    net = transformers_detector("yolos")
    net.save_pretrained(tmp_path)
    name, key = f"transformers:{tmp_path}", "class_labels_classifier.layers.0.weight"
    given = {"input_size": SIDE, "processor": object()}
    made, random = (load_detector(name, w, **given) for w in ("DEFAULT", None))
    assert torch.equal(made.model.net.state_dict()[key], net.state_dict()[key])
    assert not torch.equal(random.model.net.state_dict()[key], net.state_dict()[key])
    with pytest.raises(ValueError, match="^weights: got 'COCO_V1' for transformers:.*; give"):
        load_detector(name, "COCO_V1", **given)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"^model: .* needs transformers; run: pip install"):
        load_detector(name, **given)


def test_the_patches_of_yolos_are_those_of_its_input():
    detector = load_detector(transformers_detector("yolos"), input_size=(400, 200))
    maps = detector.model.forward_candidates(torch.zeros(1, 3, 400, 200))[1]
    assert maps[0].shape[2:] == (25, 12)


def test_a_function_of_boxes_labels_and_scores_is_a_detector():
    net = torchvision_detector("fcos")

    @torch.no_grad()
    def function(images):
        return net(list(images))

    names = ["a", "b", "c", "d"]
    black = load_detector(function, input_size=SIDE, class_names=names)
    found, own = black.detect(random_image(), None), load_detector(net).detect(random_image(), None)
    assert [one.box for one in found] == [one.box for one in own] and found[0].name in names
    one = black.of(found[:2])
    maps = create_explainer("d_rise", one, masks=8).attribute(random_image()[None], 1)
    assert maps.shape == (1, 1, SIDE, SIDE) and float(maps.max()) > 0
    with pytest.raises(ValueError, match="^explainer: .* answers without a gradient; use a method"):
        create_explainer("saliency", one).attribute(random_image()[None], 0)
    for name in ("odam", "gradcam"):
        with pytest.raises(
            ValueError, match=f"^explainer: '{name}' reads feature maps, .*'d_rise'"
        ):
            create_explainer(name, one)
    with pytest.raises(ValueError, match="^prior: 'gradcam' reads feature maps"):
        create_explainer("mda", one)


@pytest.mark.parametrize(
    "answer",
    [
        5,
        {"boxes": torch.zeros(1, 4), "scores": torch.ones(1)},
        [(torch.zeros(2, 4), torch.zeros(1), torch.ones(1))],
        [(torch.zeros(1, 4), torch.zeros(1), torch.full((1,), 70.0))],
        {
            "boxes": torch.zeros(1, 4),
            "labels": torch.zeros(1),
            "scores": torch.ones(1),
            "probabilities": torch.ones(1, 3),
        },
    ],
)
def test_an_answer_that_is_not_understood_says_what_to_return(answer):
    with pytest.raises(ValueError, match=r"^model: its answer is not understood, .*; return for"):
        load_detector(lambda images: answer, input_size=32, class_names=["a", "b"])


# ---------------------------------------------------------------------- limit cases


class OneBox(DetectionNetwork):
    """A network of one class as a detector with one box, and with a second whose score is half."""

    box, second = (4.0, 6.0, 20.0, 28.0), (4.0, 6.0, 20.0, 17.0)

    def __init__(self, net):
        super().__init__(net, 1, PLAIN, Suppression(), 1)

    def parts(self, x):
        maps = self.through([self.net[:2](x)])
        p = self.net[2:](maps[0]).sigmoid()
        boxes = x.new_tensor([self.box, self.second]).expand(len(x), 2, 4)
        scores = torch.cat([p, p / 2], 1)
        return [Candidates(boxes[:, :, None], scores, scores[..., None])], maps


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 1),
    ).eval().double()  # fmt: skip


def test_a_detector_of_one_fixed_box_has_the_classifiers_maps():
    net = classifier()
    detector = load_detector(OneBox(net), class_names=["thing"])
    images = torch.stack([random_image(32), random_image(32, 1)]).double()
    (one,) = detector.detect(images[0], 0.2, most=1)
    assert one.place == OneBox.box
    plain = xattn.load_backbone(
        net, input_size=32, task="multilabel", class_names=["thing"], mean=0.0, std=1.0, taps=["1"]
    )
    for view in (detector.of([one]), detector.of([one], score="class")):
        assert torch.allclose(view.logits(images), plain.logits(images), atol=1e-10)
        for name, options in (
            ("gradcam", {}), ("layercam", {}), ("hirescam", {}), ("saliency", {}), ("occlusion", {}),
            ("rise", {"masks": 12}),
        ):  # fmt: skip
            expected = create_explainer(name, plain, **options).attribute(images, 0)
            found = create_explainer(name, view, **options).attribute(images, 0)
            assert (found - expected).abs().max() <= 1e-6 * expected.abs().max() > 0, name
        # Without the Gaussian ODAM is HiResCAM of the one level.
        flat = create_explainer("odam", view, sigma=0.0).attribute(images, 0)
        hires = create_explainer("hirescam", plain).attribute(images, 0)
        hires = nn.functional.interpolate(hires, (32, 32), mode="bilinear")
        assert torch.allclose(flat, hires, atol=1e-9)


class Linear(DetectionNetwork):
    """Two boxes and two classes, whose scores are linear in the pixels."""

    boxes = torch.tensor([[2.0, 2.0, 18.0, 18.0], [6.0, 2.0, 22.0, 18.0]])

    def __init__(self):
        super().__init__(nn.Identity(), 2, PLAIN, Suppression(), 0)
        weights = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(4))
        self.register_buffer("weights", (weights / weights.flatten(1).sum(1)[:, None, None, None]))
        self.tap_names = ["pixels"]

    def parts(self, x):
        scores = torch.einsum("bchw,kchw->bk", x, self.weights.to(x)).unflatten(1, (2, 2))
        boxes = self.boxes.to(x).expand(len(x), 2, 4)
        return [Candidates(boxes[:, :, None], scores.amax(2), scores)], (x,)


def test_d_rise_is_its_definition_on_a_linear_scorer():
    detector = load_detector(Linear())
    image, masks = random_image(32), 10
    detections = detector.best_candidates(image, 3)
    explainer = create_explainer("d_rise", detector.of(detections), masks=masks, cells=4)
    found = explainer.attribute_classes(image[None], lambda z: torch.tensor([[0, 1, 2]]))[2][0]
    drawn = explainer._random_masks(image)(torch.arange(masks))[:, 0].double()
    for number, one in enumerate(detections):
        total = torch.zeros(32, 32, dtype=torch.float64)
        for mask in drawn:
            p = [[float((image * mask * w).sum()) for w in pair]
                 for pair in detector.model.weights.unflatten(0, (2, 2))]  # fmt: skip
            similar = []
            for (x0, y0, x1, y1), scores in zip(Linear.boxes.tolist(), p, strict=True):
                a, b, c, d = one.place
                both = max(0, min(x1, c) - max(x0, a)) * max(0, min(y1, d) - max(y0, b))
                overlap = both / ((x1 - x0) * (y1 - y0) + (c - a) * (d - b) - both)
                own = one.classes.double().numpy()
                cosine = own @ scores / np.linalg.norm(own) / np.linalg.norm(scores)
                similar.append(overlap * cosine * max(scores))
            total += max(similar) * mask
        expected = total / (masks * explainer.keep)
        assert torch.allclose(found[number].double(), expected, rtol=1e-5, atol=1e-7)


def test_at_the_detections_own_box_the_gradient_is_that_of_the_objectness():
    detector = load_detector(torchvision_detector("fcos")).double()
    image = random_image().double()[None].requires_grad_()
    one = detector.best_candidates(image[0].detach())[0]
    view = detector.of([one])
    slope = torch.autograd.grad(view.logits(image).sum(), image)[0]
    packed, _ = detector.model.forward_candidates(detector.normalize(image))
    score = Candidates.of(packed, CLASSES).objectness[0].max()
    expected = torch.autograd.grad(torch.logit(score), image)[0]
    assert (slope - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", ["fcos", "ssd"])
def test_maps_of_gradients_are_the_same_in_a_batch_and_alone(kind):
    detector = load_detector(torchvision_detector(kind))
    images = torch.stack([random_image(seed=i) for i in range(5)])
    # Found in another batch: its box differs in the last bits.
    one = detector.best_candidates(images[0])[0]
    near = replace(one, place=tuple(v + 1e-5 for v in one.place))
    maps = [
        create_explainer("gradcam", detector.of([d])).attribute(images[:n], 0)[0]
        for d, n in ((one, 1), (one, 5), (near, 1))
    ]
    assert all((m - maps[0]).abs().max() <= 1e-3 * maps[0].abs().max() > 0 for m in maps)


@pytest.mark.parametrize("ends", [False, True])
def test_a_yolo_answers_as_its_own_network_and_has_maps(ends):
    yolo, image = Yolo(ends), random_image()
    detector = load_detector(yolo, input_size=SIDE)
    assert detector.class_names == ["cat", "dog", "cow", "hen"] and detector.model.ends is ends
    with torch.no_grad():
        own = yolo.model.eval()(image[None])[0][0]
    if ends:
        boxes, scores, labels = own[:, :4], own[:, 4], own[:, 5]
    else:
        boxes = torch.cat([own[:2] - own[2:4] / 2, own[:2] + own[2:4] / 2]).T
        scores, labels = own[4:].max(0)
        kept = batched_nms(boxes, scores, labels, 0.7)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    found = detector.detect(image, None)
    assert len(found) == int((scores > 0.25).sum()) > 3
    for i, one in enumerate(found):
        assert one.label == int(labels[i]) and one.score == pytest.approx(float(scores[i]))
        assert one.place == pytest.approx(boxes[i].tolist(), abs=1e-4)
    view = detector.of(found[:2])
    for name in ("odam", "layercam"):
        assert create_explainer(name, view).attribute(image[None], 1).abs().max() > 0
    with pytest.raises(ValueError, match=r"^input_size: got \(72, 72\); give multiples of 16"):
        load_detector(yolo, input_size=72)
    yolo.model.model = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match="^model: a Yolo of YoloNetwork has no detection head"):
        load_detector(yolo)


def test_iou_of_boxes():
    box = torch.tensor([0.0, 0.0, 2.0, 2.0])
    others = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 2.0, 4.0]])
    assert torch.allclose(iou(others, box), torch.tensor([1.0, 1 / 7, 0.0]))


def test_of_half_precision_areas_and_log_odds_are_those_of_single():
    packed = torch.tensor([[[0.0, 0.0, 300.0, 300.0, 1.0, 1.0]]], dtype=torch.float16)
    found = Candidates.of(packed, 1)
    assert float(iou(found.boxes, found.boxes)) == 1 and log_odds(found.classes).isfinite().all()


# ---------------------------------------------------------------------- methods


@pytest.mark.parametrize("kind", ["fcos", "fasterrcnn"])
def test_ten_detections_cost_odam_one_pass_of_the_backbone(kind):
    detector = load_detector(torchvision_detector(kind))
    view = detector.of(detector.best_candidates(random_image(), 10))
    passes = []
    detector.model.net.backbone.register_forward_hook(lambda *_: passes.append(1))
    explainer = create_explainer("odam", view)
    every = torch.arange(10)[None]
    _, _, maps = explainer.attribute_classes(random_image()[None], lambda z: every)
    assert maps.shape == (1, 10, SIDE, SIDE) and len(passes) == 1
    for i in (0, 7):
        one = explainer.attribute(random_image()[None], i)
        assert torch.allclose(maps[:, i : i + 1], one, atol=1e-6)


class Flops(TorchDispatchMode):
    """How many floating point operations run inside."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def test_odam_of_two_stages_goes_back_through_its_own_proposals_alone():
    detector = load_detector(torchvision_detector("fasterrcnn"))
    view = detector.of(detector.best_candidates(random_image(), 10))
    explainer = create_explainer("odam", view, sigma=0.0)
    image = random_image()[None].requires_grad_()
    with Flops() as whole:
        view.logits(image)[0, 0].backward()
    with Flops() as own:
        maps = explainer.attribute_classes(image.detach(), lambda z: torch.arange(10)[None])[2]
    assert own.total <= 2.5 * whole.total
    (part,), found = detector.model.parts(detector.normalize(image))
    score = view.scores(part, [4]).amax()
    slopes = torch.autograd.grad(torch.logit(score), found)
    up = [nn.functional.interpolate((g * f).sum(1, True).relu() * f[0, 0].numel(), (SIDE, SIDE), mode="bilinear")
          for g, f in zip(slopes, found, strict=True)]  # fmt: skip
    expected = sum(up)[0, 0] / found[0][0, 0].numel()
    assert (maps[0, 4] - expected).abs().max() <= 1e-5 * expected.abs().max() > 0


def test_layer_methods_read_all_scales_and_one_that_is_named():
    detector = load_detector(torchvision_detector("fasterrcnn"))
    view = detector.of(detector.detect(random_image(), 0.5, most=3))
    images = random_image()[None]
    every = create_explainer("layercam", view)
    assert every.layer_name == "model.points.0, model.points.1"
    first, second = (
        create_explainer("layercam", view, layer=f"points.{i}").attribute(images, 0)
        for i in range(2)
    )
    from xattn.explainers.cams.layers import fuse_maps

    both = every.attribute(images, 0)
    assert torch.allclose(both, fuse_maps([first, second], (SIDE, SIDE)), atol=1e-6)
    inner = create_explainer("gradcam", view, layer="backbone.first.0").attribute(images, 0)
    assert inner.shape == (1, 1, SIDE // 4, SIDE // 4)


# ---------------------------------------------------------------------- photos, packs, metrics


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "wide.png"
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def detector():
    return load_detector(torchvision_detector("fcos"), class_names=["cat", "dog", "cow", "hen"])


def test_boxes_are_in_pixels_of_the_photo_whose_borders_are_no_part_of_it(detector, photo):
    found, view = detector.candidates(photo)
    assert view.input_size == (SIDE, SIDE) and view.photo_size == (96, 160)
    one = detector.best_candidates(photo)[0]
    # 160 pixels became 64, 96 became 38 with 13 rows of border above.
    x0, y0, x1, y1 = one.place
    expected = [x0 * 2.5, (y0 - 13) * 96 / 38, x1 * 2.5, (y1 - 13) * 96 / 38]
    limits = [160, 96, 160, 96]
    clipped = [min(max(v, 0), most) for v, most in zip(expected, limits, strict=True)]
    assert np.allclose(one.box, clipped, atol=1e-3)
    assert torch.allclose(found.classes[0].max(), torch.tensor(one.score))


def test_a_missed_object_is_the_best_candidate_of_its_class_that_overlaps(detector, photo):
    found, _ = detector.candidates(photo)
    asked = detector.best_candidates(photo, 40)[-1]
    one = detector.missed(photo, "cow", asked.box)
    overlaps = iou(found.boxes[0, :, 0], torch.tensor(asked.place))
    near = found.classes[0, overlaps >= 0.5, 2]
    assert one.kind == "missed" and one.label == 2 and one.classes.tolist() == [0, 0, 1, 0]
    assert one.score == pytest.approx(float(near.max())) and one.title.startswith("missed cow 0.")


class Fixed(DetectionNetwork):
    """The same candidates for all images: of two classes, with the given boxes and scores (n, 2)."""

    def __init__(self, boxes, scores):
        super().__init__(nn.Identity(), 2, PLAIN, Suppression(), 0)
        self.found = torch.tensor(boxes)[None, :, None], torch.tensor(scores)[None]
        self.tap_names = ["pixels"]

    def parts(self, x):
        boxes, scores = (t.expand(len(x), *t.shape[1:]) for t in self.found)
        return [Candidates(boxes, scores.amax(2), scores)], (x,)


def test_scores_of_zero_and_true_objects_that_compete(monkeypatch):
    far, near, all_ = [0.0, 0.0, 4.0, 4.0], [10.0, 10.0, 20.0, 20.0], [10.0, 10.0, 20.0, 30.0]
    detector = load_detector(Fixed([far, near], [[0.0, 0.9], [0.0, 0.0]]), class_names=["a", "b"])
    assert detector.missed(random_image(32), "a", all_).place == tuple(near)
    assert detector.missed(random_image(32), "a", (15, 15, 25, 25)).place == tuple(near)
    assert [one.place for one in detector.best_candidates(random_image(32), 4)] == [tuple(far)]
    empty = load_detector(Fixed([far], [[0.0, 0.0]]), class_names=["a", "b"])
    with pytest.raises(ValueError, match="^threshold: .* and no candidate with a score above 0"):
        xattn.explain_detections(random_image(32), empty, "occlusion", candidates=1)
    # The best true object goes, and one of two that are equal.
    single = load_detector(Fixed([near], [[0.9, 0.0]]), class_names=["a", "b"])
    other, asked, missed = [10.0, 10.0, 20.0, 19.0], [], Detector.missed
    monkeypatch.setattr(Detector, "missed", lambda *a: asked.append(a[2:]) or missed(*a))
    for truth, left in (([other, near], other), ([near, near], near)):
        judged = single.judged(random_image(32), [("a", box) for box in truth])
        assert [one.kind for one in judged] == ["found", "missed"]
        assert asked.pop() == (0, tuple(left)) and not asked


def test_detections_are_judged_by_the_objects_that_are_there(detector, photo):
    first, second, third = detector.detect(photo, most=3)
    level = (second.score + third.score) / 2
    other = (second.label + 1) % 4
    judged = detector.judged(photo, [(first.label, first.box), (other, second.box)], level)
    assert [one.kind for one in judged] == ["found", "false", "missed"]
    assert judged[0] == first and replace(judged[1], kind="found") == second
    assert judged[2].label == other and judged[2].score < level


def test_a_pack_has_an_entry_and_a_box_for_each_detection(detector, photo, tmp_path):
    missed = [("cow", (20.0, 10.0, 120.0, 90.0))]
    made = xattn.explain_detections(
        [photo], detector, ["odam", "d_rise"], threshold=0.3, most=3, missed=missed,
        options={"d_rise": {"masks": 4, "seed": 0}}, output=tmp_path / "pack",
    )  # fmt: skip
    assert len(made) == 8 and made[3].target_name.startswith("missed cow")
    rows = xattn.load_pack(tmp_path / "pack")
    boxes = {tuple(row.protocol["detection"]["box"]) for row in rows}
    expected = {tuple(round(v, 2) for v in one.box) for one in detector.detect(photo, 0.3)[:3]}
    assert len(boxes) == 4 and expected < boxes
    assert json.dumps(rows[0].protocol["detection"]["name"]) and rows[0].protocol["view"] == "crop"
    # Masks and passes are shared: the map of one alone is the same.
    alone = xattn.explain_detections(
        photo, detector, "d_rise", detections=detector.detect(photo, 0.3)[1:2],
        options={"d_rise": {"masks": 4}},
    )  # fmt: skip
    assert np.allclose(alone[0].map, made[5].map, atol=1e-6)


def test_each_photo_is_compared_with_its_own_detections_alone(detector, photo, monkeypatch):
    counts, scores = [], Detections.scores
    monkeypatch.setattr(
        Detections, "scores", lambda *a: counts.append(len(a[2])) or scores(*a)
    )  # fmt: skip
    images = [random_image(), random_image(seed=1), photo]
    made = xattn.explain_detections(images, detector, "gradcam", threshold=0.3, most=2)
    monkeypatch.undo()
    alone = xattn.explain_detections(photo, detector, "gradcam", threshold=0.3, most=2)
    assert len(made) == 6 and max(counts) == 2
    for mine, own in zip(made[4:], alone, strict=True):
        assert np.allclose(mine.map, own.map, atol=1e-5)
        assert mine.probability == pytest.approx(own.probability, rel=1e-4)


def failing(*args):
    raise ValueError("model: its own error")


def test_where_nothing_is_detected_the_best_candidate_is_named_and_offered(
    detector, photo, monkeypatch
):
    best = detector.best_candidates(photo)[0]
    expected = (
        rf"^threshold: no detection above 0.99 in wide.png; the best candidate is {best.name} "
    )
    with pytest.raises(ValueError, match=expected + rf"{best.score:.3f} at \(.*candidates=1"):
        xattn.explain_detections(photo, detector, "odam", threshold=0.99)
    made = xattn.explain_detections(photo, detector, "odam", threshold=0.99, candidates=1)
    assert made[0].protocol["detection"]["kind"] == "candidate"
    broken = photo.with_name("broken.png")
    broken.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"left out broken.png \("):
        made = xattn.explain_detections([broken, photo], detector, "box", threshold=0.3, most=2)
    assert [one.file_name for one in made] == ["wide.png"] * 2
    with pytest.raises(ValueError, match=r"in 2 photos: broken.png \(.*, wide.png \(no detection"):
        xattn.explain_detections([broken, photo], detector, "box", threshold=0.99)
    with pytest.raises(ValueError, match="^candidates: "):
        xattn.explain_detections(photo, detector, "box", candidates=-1)
    monkeypatch.setattr(Detector, "detect", failing)
    with pytest.raises(ValueError, match="^model: its own error"):
        xattn.explain_detections([photo, photo], detector, "box")


def test_metrics_take_the_similarity_as_score(detector, photo):
    view = detector.of(detector.detect(photo, 0.3, most=2))
    rows = ["odam", "random", "box", "box_centre"]
    results = evaluate(
        view, {name: create_explainer(name, view) for name in rows}, photo,
        metrics=("insertion-deletion", "road", "localization"), classes=1, max_forward_batch=8,
        annotations=DetectedObjects(view), progress=False,
    )  # fmt: skip
    assert results.protocol.score == "sigmoid"
    assert results.protocol.target.startswith("2 detections by similarity")
    pixels = prepare(Image.open(photo), view.preprocessing)[0]
    p = view.probabilities(view.logits(pixels[None]))[0, 1]
    assert results.images[0].p == pytest.approx(float(p), rel=1e-5)
    own = {column.key: float(v[0]) for column, v in results.methods["box"].values.items()}
    assert [own[key] for key in ("pointing", "energy-pointing", "IoU", "VEA")] == [100, 1, 1, 1]
    assert all(m.valid.all() and 0 <= own["deletion"] <= 1 for m in results.methods.values())


def test_masks_are_mask_rcnns_own_and_annotate_its_detections():
    net = torchvision_detector("maskrcnn")
    detector = load_detector(net)
    found = detector.detect(random_image(), None, most=3)
    with torch.no_grad():
        own = net([random_image()])[0]["masks"][:3, 0] > 0.5
    masks = detector.masks(random_image(), found)
    assert torch.equal(masks, own) and bool(own.any())
    view = detector.of(found)
    annotation = DetectedObjects(view, {1: masks[1]}).of("photo", found[0].view)
    assert torch.equal(annotation.mask(1)[0], masks[1])
    box = create_explainer("box", view).attribute(random_image()[None], 2)[0]
    assert torch.equal(annotation.mask(2), box > 0)
    with pytest.raises(
        ValueError, match=r"^masks: the mask of detection 0 has shape \(2, 2\); give"
    ):
        DetectedObjects(view, {0: torch.ones(2, 2)})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d, p: d.missed(p, "horse", (0, 0, 9, 9)), "horse"),
        (
            lambda d, p: d.missed(p, "cow", (200, 0, 300, 50)),
            "^box: .* lies outside the photo of 160",
        ),
        (lambda d, p: d.missed(p, "cow", (9, 9, 3, 20)), "^box: got .*; give x0, y0, x1, y1"),
        (lambda d, p: d.detect(p, 3), "^threshold: got 3; give a score from 0 to 1"),
        (lambda d, p: d.of([]), "^detections: give a list of one or more"),
        (lambda d, p: d.of(d.best_candidates(p), "iou"), "^score: got 'iou'; choose one of"),
        (lambda d, p: create_explainer("d_rise", d), "^explainer: 'd_rise' explains detections"),
        (
            lambda d, p: create_explainer("cam", d),
            "classifier's rows.*use 'gradcam' or 'occlusion'",
        ),
        (lambda d, p: load_detector("torchvision/fcoss"), "^model: got 'torchvision/fcoss'"),
        (lambda d, p: load_detector("yolo"), "^model: got 'yolo'; give torchvision/NAME"),
        (lambda d, p: load_detector(lambda x: x), "^class_names: a function does not say its"),
        (lambda d, p: load_detector(5), "^model: got 5; give"),
        (lambda d, p: load_detector(Linear(), input_size=64), "^input_size: a Linear has its own"),
        (
            lambda d, p: load_detector("torchvision/ssdlite320_mobilenet_v3_large", p),
            "^weights: .*wide.png does not fit torchvision/ssdlite320",
        ),
        (
            lambda d, p: xattn.explain_detections(p, d, "box", options={"odam": {"sigma": 0.0}}),
            "^options: 'odam' is not among the explainers",
        ),
        (
            lambda d, p: requested_objects(["dog@1.2.3,1,2,3"]),
            "^missed: got 'dog@1.2.3,1,2,3'; give",
        ),
        (lambda d, p: xattn.explain_detections(p, d.model), "^detector: got a TorchvisionDetector"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_argument(detector, photo, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(detector, photo)
    assert "\n" not in str(caught.value)
