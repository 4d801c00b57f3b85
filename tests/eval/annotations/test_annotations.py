"""Masks and boxes on the model's input, files that are damaged, and ImageNet's classes as COCO's."""

import json
import tracemalloc
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.eval.annotations import Boxes, MaskFolder, coco, load_annotations
from xattn.photos.images import list_images, load_image
from xattn.photos.view import View, make_view, prepare

DATA = Path(__file__).parents[4] / "shared" / "data" / "coco-masks"
NAMES = {1: "cat", 2: "dog", 7: "owl"}
CLASSES = {0: "cat", 4: "dog", 5: "dog"}


def preprocessing(size=(32, 32), crop_pct=0.8, crop_mode="center"):
    return SimpleNamespace(
        input_size=size,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation="bilinear",
        mean=(0.5, 0.4, 0.3),
    )


VIEWS = [
    ("crop", preprocessing()),
    ("crop", preprocessing(crop_mode="squash")),
    ("crop", preprocessing(crop_mode="border")),
    ("crop", preprocessing((24, 40))),
    ("whole", preprocessing()),
]


def plain(height: int, width: int) -> View:
    """The photo is the model's input."""
    return View("whole", (height, width), (height, width), (0, 0, height, width), (height, width))


def save_mask(path: Path, ids) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(ids, dtype=np.uint8)).save(path)
    return path


def folder(tmp_path: Path, ids) -> MaskFolder:
    save_mask(tmp_path / "masks/a.png", ids)
    return MaskFolder(tmp_path / "masks", NAMES, CLASSES)


def yolo(tmp_path: Path, text: str) -> Boxes:
    (tmp_path / "boxes").mkdir(exist_ok=True)
    (tmp_path / "boxes/a.txt").write_text(text)
    return Boxes(tmp_path / "boxes", NAMES, CLASSES)


def table(tmp_path: Path, content) -> Boxes:
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return Boxes(tmp_path / "boxes.json", NAMES, CLASSES)


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize(("mode", "model"), VIEWS)
@pytest.mark.parametrize("size", [(50, 90), (90, 50), (20, 21)])
def test_masks_and_boxes_lie_where_the_model_sees_the_object(tmp_path, mode, model, size):
    height, width = size
    top, left, bottom, right = height // 5, width // 4, height * 4 // 5, width * 3 // 4
    ids = np.zeros(size)
    ids[top:bottom, left:right] = 1
    photo = Image.fromarray((255 * ids).astype(np.uint8)).convert("RGB")
    pixels, view = prepare(photo, model, mode)
    entry = {"a.jpg": [{"class": 1, "box": [left, top, right, bottom]}]}
    masks = [a.of("a.jpg", view).mask(0) for a in (folder(tmp_path, ids), table(tmp_path, entry))]
    assert torch.equal(*masks)
    assert masks[0].dtype == torch.bool and masks[0].shape == (1, *model.input_size)
    # Away from the object's border, where the photo's interpolation mixes, they agree exactly.
    black = pixels[0] < 0.02
    if model.crop_mode == "border":
        black &= pixels[1] == pixels[0]  # padding has the mean colour
        assert not masks[0][0][pixels[1] != pixels[0]].any()
    white = pixels[0] > 0.98
    assert white.any() and not masks[0][0][black].any() and masks[0][0][white].all()
    half = pixels[0] > 0.5
    padding = (pixels[1] - pixels[0]).abs() > 0.01
    assert int((half & ~padding).logical_xor(masks[0][0]).sum()) <= 0.06 * masks[0].numel()


def test_a_pixel_belongs_to_the_object_on_which_its_centre_lies(tmp_path):
    view = View(
        "whole", (4, 4), (8, 8), (0, 2, 8, 4), (4, 4)
    )  # twice as large, then every second row
    ids = np.arange(16).reshape(4, 4) == 6  # row 1, column 2
    got = folder(tmp_path, ids).of("a.jpg", view).mask(0)
    # Rows 0..3 of the input have their centres at 0.5, 1.5, ... of the photo, columns at 1.25, 1.75, ...
    assert got[0].int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_objects_of_one_category_are_one_region_and_classes_may_share_it(tmp_path):
    boxes = [
        {"class": "dog", "box": [0, 0, 2, 2]},
        {"class": 2, "box": [1, 1, 4, 3]},
        {"class": "owl", "box": [0, 0, 6, 4]},
    ]
    got = table(tmp_path, {"a.jpg": boxes}).of(Path("x/a.jpg"), plain(4, 6))
    assert sorted(got.masks) == [4, 5] and got.mask(0) is None
    expected = torch.zeros(1, 4, 6, dtype=torch.bool)
    expected[:, :2, :2] = expected[:, 1:3, 1:4] = True
    assert torch.equal(got.mask(4), expected) and torch.equal(got.mask(5), expected)


def test_yolo_and_json_boxes_are_the_same(tmp_path):
    one = yolo(tmp_path, "1 0.5 0.25 0.5 0.5\n\n2 0.9 0.9 0.2 0.2\n").of("a.jpg", plain(8, 10))
    entry = [{"class": "cat", "box": [2.5, 0, 7.5, 4]}, {"class": "dog", "box": [8, 6.4, 10, 8]}]
    two = table(tmp_path, {"a.jpg": entry}).of("a.jpg", plain(8, 10))
    assert sorted(one.masks) == sorted(two.masks) == [0, 4, 5]
    for target in (0, 4):
        assert torch.equal(one.mask(target), two.mask(target)) and one.mask(target).any()


def test_what_the_view_cuts_off_is_not_there(tmp_path):
    ids = np.zeros((40, 40))
    ids[0, 0], ids[20, 20] = 1, 2
    view = make_view((40, 40), preprocessing((32, 32), 0.5))
    got = folder(tmp_path, ids).of("a.jpg", view)
    assert got.mask(0) is None and int(got.mask(4).sum()) in (1, 4)


def test_numbers_without_a_name_are_background(tmp_path):
    ids = np.full((4, 6), 255)
    ids[0, :2] = 1
    got = folder(tmp_path, ids).of("a.jpg", plain(4, 6))
    assert list(got.masks) == [0] and int(got.mask(0).sum()) == 2


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_masks_of_one_channel_are_read_in_any_depth(tmp_path, mode):
    ids = np.zeros((4, 6), dtype=np.uint8)
    ids[1:3] = 1
    image = Image.fromarray(ids * 255 if mode == "1" else ids)
    if mode == "P":
        image.putpalette([200, 10, 10] * 256)
    elif mode != "L":
        image = image.convert(mode) if mode == "1" else Image.fromarray(ids.astype(np.uint16))
    (tmp_path / "masks").mkdir()
    image.save(tmp_path / "masks/a.png")
    assert Image.open(tmp_path / "masks/a.png").mode == mode
    got = MaskFolder(tmp_path / "masks", NAMES, CLASSES).of("a.jpg", plain(4, 6)).mask(0)
    assert got[0].any(1).tolist() == [False, True, True, False]


# ---------------------------------------------------------------- bad input


def test_a_mask_that_claims_to_be_huge_takes_no_more_memory_than_its_file(tmp_path):
    annotations, path = folder(tmp_path, np.ones((40, 60))), tmp_path / "masks/a.png"
    whole = path.read_bytes()
    start = whole.index(b"IDAT") - 4
    path.write_bytes(whole[:start] + b"\xe8\xff\0\0" + whole[start + 4 :])
    tracemalloc.start()
    try:
        with suppress(ValueError):
            annotations.of("a.jpg", plain(40, 60))
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_masks_that_are_missing_empty_damaged_or_of_another_size_are_refused(tmp_path):
    ids = np.random.default_rng(0).integers(1, 3, (40, 60))
    annotations, view, path = folder(tmp_path, ids), plain(40, 60), tmp_path / "masks/a.png"
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"no file .*b\.png"):
        annotations.of("b.jpg", view)
    with pytest.raises(ValueError, match="has 60 x 40 pixels, but the upright photo has 40 x 60"):
        annotations.of("a.jpg", plain(60, 40))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png is empty \(0 bytes\)"):
        annotations.of("a.jpg", view)
    middle = len(whole) // 2
    for broken in (whole[:middle], b"no image", whole[:middle] + b"\0" * 9 + whole[middle + 9 :]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.png cannot be read as PNG"):
            annotations.of("a.jpg", view)
    save_mask(path, np.zeros((40, 60)))
    with pytest.raises(ValueError, match=r"a\.png has no pixel of any class in names"):
        annotations.of("a.jpg", view)
    save_mask(path, np.ones((40, 60, 3)))
    with pytest.raises(ValueError, match=r"the mode RGB; give class numbers in one channel"):
        annotations.of("a.jpg", view)
    path.write_bytes(whole)
    assert torch.equal(annotations.of("a.jpg", view).mask(0)[0], torch.from_numpy(ids == 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.txt is empty \(0 bytes\)"),
        ("\n \n", "no box for"),
        ("1 0.5 0.5 0.2", "got the line '1 0.5 0.5 0.2'; give 'class cx cy w h'"),
        ("1 0.5 0.5 0.2 x", "give 'class cx cy w h'"),
        ("1.5 0.5 0.5 0.2 0.2", "give 'class cx cy w h'"),
        ("9 0.5 0.5 0.2 0.2", "unknown class 9"),
        ("1 0.9 0.5 0.4 0.2", "the cat box .* extends beyond the photo of 10 x 8 pixels"),
        ("1 0.5 0.5 nan 0.2", "has no area"),
        ("1 0.5 0.5 0.2 0", "has no area"),
        ("1 0.5 0.5 inf 0.2", "extends beyond the photo"),
    ],
)
def test_yolo_files_that_say_no_box_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        yolo(tmp_path, text).of("a.jpg", plain(8, 10))


def test_boxes_may_leave_the_photo_by_the_rounding_of_their_numbers(tmp_path):
    got = yolo(tmp_path, "1 0.5000004 0.5 1 1.000001").of("a.jpg", plain(8, 10))
    assert got.mask(0).all()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([{"class": "cta", "box": [0, 0, 1, 1]}], "unknown class 'cta'; did you mean cat"),
        ([{"class": 1, "box": [0, 0, 1]}], "give .*name or number"),
        ([{"class": 1, "box": [0, 0, 1, 10**400]}], "give .*name or number"),
        ([{"box": [0, 0, 1, 1]}], "give .*name or number"),
        (["cat"], "give .*name or number"),
        ([], "no box for a.jpg"),
        ([{"class": 1, "box": [0, 0, 10, 9]}], "extends beyond the photo of 10 x 8 pixels"),
    ],
)
def test_json_boxes_that_are_none_are_refused(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, {"a.jpg": entry}).of("a.jpg", plain(8, 10))


def test_a_photo_without_an_entry_or_a_name_is_refused(tmp_path):
    annotations = table(tmp_path, {"a.jpg": [{"class": 1, "box": [0, 0, 1, 1]}]})
    with pytest.raises(ValueError, match=r"no entry for b\.jpg"):
        annotations.of("x/b.jpg", plain(8, 10))
    with pytest.raises(ValueError, match="the photo has no file name"):
        annotations.of(Image.new("RGB", (10, 8)), plain(8, 10))


def test_json_of_another_form_is_refused(tmp_path):
    for content, message in (
        ("[]", "is not {file name"), ('{"a": 1}', "is not {"), ("{", "not JSON"), ("[" * 50_000, "not JSON .*too deep"),
    ):  # fmt: skip
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Boxes(tmp_path / "b.json", NAMES, CLASSES)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        Boxes(tmp_path / "b.json", NAMES, CLASSES)


def test_classes_and_places_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="annotations: no file or folder"):
        MaskFolder(tmp_path / "nowhere", NAMES, CLASSES)
    with pytest.raises(ValueError, match=r"classes contains \['cow'\]"):
        MaskFolder(tmp_path, NAMES, {0: "cow"})
    with pytest.raises(ValueError, match="no class of the model has a category"):
        MaskFolder(tmp_path, NAMES, {})


def test_the_fingerprint_is_of_files_and_classes(tmp_path):
    one, ids = folder(tmp_path, np.ones((4, 6))), np.ones((4, 6))
    first = one.fingerprint
    assert MaskFolder(tmp_path / "masks", NAMES, CLASSES).fingerprint == first
    assert MaskFolder(tmp_path / "masks", NAMES, {0: "cat"}).fingerprint != first
    ids[0, 0] = 2
    save_mask(tmp_path / "masks/a.png", ids)
    assert one.fingerprint != first


# ---------------------------------------------------------------- a folder for a model


def model(*names: str):
    return SimpleNamespace(class_names=names, name="mine")


def test_a_folder_of_masks_with_its_own_names_and_a_model_with_the_same(tmp_path):
    save_mask(tmp_path / "masks/a.png", [[0, 1, 2, 2]])
    (tmp_path / "classes.yaml").write_text("classes:\n  0: unlabeled\n  1: Cat\n  2: dog\n")
    annotations = load_annotations(tmp_path, model("bee", "DOG", "cat"))
    assert annotations.classes == {1: "dog", 2: "Cat"}
    got = annotations.of("a.jpg", plain(1, 4))
    assert got.mask(2)[0].tolist() == [[False, True, False, False]]
    assert got.mask(1)[0].tolist() == [[False, False, True, True]]
    with pytest.raises(ValueError, match="no class of mine is a category of .* such as Cat, dog"):
        load_annotations(tmp_path, model("bee"))
    for text in ("names: [cat]", "classes: {.inf: cat}", "classes: {1: [cat]}"):
        (tmp_path / "classes.yaml").write_text(text)
        with pytest.raises(ValueError, match="has no 'classes: {number: name}'"):
            load_annotations(tmp_path, model("cat"))
    (tmp_path / "classes.yaml").write_text("classes: {1: !!python/none cat}")
    with pytest.raises(ValueError, match="is not plain YAML"):
        load_annotations(tmp_path, model("cat"))


def test_a_folder_of_masks_or_boxes_without_names_has_cocos(tmp_path):
    (tmp_path / "one").mkdir()
    save_mask(tmp_path / "one/masks/a.png", [[0, 17, 18, 200]])
    masks = load_annotations(tmp_path / "one", model("cat", "dog")).of("a.jpg", plain(1, 4))
    assert [masks.mask(i)[0, 0].tolist().index(True) for i in (0, 1)] == [1, 2]
    (tmp_path / "two/boxes").mkdir(parents=True)
    (tmp_path / "two/boxes/a.txt").write_text("15 0.5 0.5 0.5 1")
    boxes = load_annotations(tmp_path / "two", model("cat", "dog")).of("a.jpg", plain(1, 4))
    assert boxes.mask(0)[0].tolist() == [[False, True, True, False]] and boxes.mask(1) is None


def test_a_folder_with_neither_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is neither a folder with masks/ or boxes/"):
        load_annotations(tmp_path, model("cat"))


# ---------------------------------------------------------------- ImageNet's classes as COCO's


def test_categories_have_cocos_order_and_ids():
    assert len(coco.THINGS) == len(set(coco.THINGS)) == 80
    assert (coco.THINGS[0], coco.THINGS[23], coco.THINGS[79]) == ("person", "giraffe", "toothbrush")
    ids = {1: "person", 13: "stop sign", 25: "giraffe", 44: "bottle", 67: "dining table", 90: "toothbrush"}  # fmt: skip
    assert ids.items() <= coco.THING_IDS.items()


def test_each_class_has_one_category_of_cocos():
    listed = [i for text in coco._IMAGENET.values() for i in coco._indices(text)]
    assert len(listed) == len(set(listed)) == len(coco.IMAGENET_TO_COCO)
    assert min(listed) >= 0 and max(listed) < 1000
    assert set(coco.IMAGENET_TO_COCO.values()) <= set(coco.THINGS)


# The label is timm's; None: not a clear case.
SPOTS = {
    "tabby, tabby cat": "cat",
    "timber wolf, grey wolf, gray wolf, Canis lupus": None,
    "cock": "bird",
    "kite": "bird",
    "tusker": "elephant",
    "sorrel": "horse",
    "ox": "cow",
    "bison": None,
    "sloth bear, Melursus ursinus, Ursus ursinus": "bear",
    "car wheel": None,
    "fire engine, fire truck": "truck",
    "pickup, pickup truck": None,
    "mountain bike, all-terrain bike, off-roader": "bicycle",
    "wing": None,
    "yawl": "boat",
    "ballplayer, baseball player": "person",
    "baseball": "sports ball",
    "coffee mug": "cup",
    "lemon": None,
    "cheeseburger": "sandwich",
    "toilet seat": "toilet",
    "television, television system": "tv",
    "space bar": None,
    "stove": "oven",
    "teddy, teddy bear": "teddy bear",
}


def test_spot_cases_by_the_labels_of_timm():
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    labels = [info.index_to_description(i, detailed=False) for i in range(1000)]
    for label, category in SPOTS.items():
        index = labels.index(label)
        assert coco.IMAGENET_TO_COCO.get(index) == category, f"{index} {label}"
    assert [i for i, n in enumerate(labels) if n == "crane" and i in coco.IMAGENET_TO_COCO] == [134]
    assert coco.model_classes(labels, coco.THINGS) == coco.IMAGENET_TO_COCO


def test_a_model_that_only_shares_some_names_goes_by_its_names():
    names = ["Banana", "sloth", "hot dog"]
    assert coco.model_classes(names, coco.THINGS) == {0: "banana", 2: "hot dog"}
    assert coco.model_classes(names, ["hot dog"]) == {2: "hot dog"}


def test_some_classes_of_a_model_are_enough():
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    some = {i: info.index_to_description(i, detailed=False) for i in (0, 207, 281)}
    assert coco.model_classes(some, coco.THINGS) == {207: "dog", 281: "cat"}
    assert coco.model_classes({281: "banana", 3: "tabby"}, coco.THINGS) == {281: "banana"}


# ---------------------------------------------------------------- real photos


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/coco-masks")
def test_masks_and_boxes_of_the_coco_photos_agree():
    categories = model(*coco.THINGS)
    masks = load_annotations(DATA, categories)
    boxes = Boxes(DATA / "boxes", dict(enumerate(coco.THINGS)), dict(enumerate(coco.THINGS)))
    shares = []
    for path in list_images(DATA / "images")[:25]:
        view = make_view(load_image(path).size[::-1], preprocessing((224, 224), 0.875))
        one = masks.of(path, view)
        two = boxes.of(path, view)
        for target, mask in one.masks.items():
            box = two.mask(target)
            if box is not None and mask.sum() >= 200:
                shares.append(float((mask & box).sum() / mask.sum()))
    assert len(shares) > 30 and min(shares) > 0.8
