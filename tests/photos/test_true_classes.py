"""Labels of photos as classes of a classifier: what is right and what is wrong."""

import json

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.models import ResNet18_Weights

from xattn import explain, load_backbone
from xattn.packs.reader import Pack
from xattn.photos.labels import read_labels, true_classes

CLASSES = ["tench, Tinca tinca", "crane", "crane, bird", "fish", "4"]
NAMES = ["n1/a.jpg", "n1/b.jpg", "n2/c.jpg"]


def table(tmp_path, content, name="labels.json"):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / name


def test_a_label_is_a_class_by_name_part_of_a_name_or_number(tmp_path):
    file = table(tmp_path, {"a.jpg": "TENCH", "b.jpg": "Tinca tinca", "c.jpg": 3})
    assert true_classes(NAMES, file, CLASSES) == [(0, CLASSES[0]), (0, CLASSES[0]), (3, "fish")]


def test_other_labels_have_a_name_and_no_class(tmp_path):
    file = table(tmp_path, "photo,label\na.jpg,unicorn\nb.jpg,\nc.jpg,99\n", "labels.csv")
    assert true_classes(NAMES, file, CLASSES) == [(None, "unicorn"), (None, None), (None, "99")]


def test_of_a_table_by_folder_the_finest_name_that_is_a_class_counts(tmp_path):
    entries = {"n1": {"index": 0, "label": "tench", "group": "fish"}, "n2": {"group": "fish"}}
    file = table(tmp_path, entries)
    assert true_classes(NAMES, file, CLASSES) == [(0, CLASSES[0]), (0, CLASSES[0]), (3, "fish")]
    groups = ["fish", "bird"]  # a classifier of the groups
    assert true_classes(NAMES, file, groups) == [(0, "fish")] * 3


def test_a_name_of_two_classes_needs_its_number(tmp_path):
    file = table(tmp_path, {"n1": {"label": "crane", "group": None}, "n2": {"group": None}})
    with pytest.raises(ValueError, match=r"'crane'.*classes 1, 2; write the number"):
        true_classes(NAMES, file, CLASSES)
    entries = {"n1": {"index": 2, "label": "crane", "group": None}, "n2": {"group": None}}
    file = table(tmp_path, entries)
    assert true_classes(NAMES, file, CLASSES) == [(2, "crane, bird")] * 2 + [(None, None)]


def test_folders_name_classes_without_a_file():
    names = ["photos/fish/1.jpg", "photos/other/2.jpg"]
    assert true_classes(names, "folders", CLASSES) == [(3, "fish"), (None, "other")]


def test_photos_without_a_label_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names no label of 1 of 3 photos, such as n2/c.jpg"):
        true_classes(NAMES, table(tmp_path, {"a.jpg": "x", "b.jpg": "x"}), CLASSES)
    with pytest.raises(FileNotFoundError, match="labels: no file"):
        true_classes(NAMES, tmp_path / "gone.json", CLASSES)


@pytest.mark.parametrize(
    "content",
    [{"n1": {"group": "a"}, "n2": "b"}, {"a.jpg": "a", "b.jpg": "b", "c.jpg": {"label": "c"}}],
)
def test_a_file_that_mixes_tables_and_labels_is_refused(tmp_path, content):
    file = table(tmp_path, content)
    for read in (lambda: true_classes(NAMES, file, CLASSES), lambda: read_labels(NAMES, file)):
        with pytest.raises(
            ValueError, match="labels: .* gives ('n1'|'c.jpg') a table .* throughout"
        ):
            read()


def test_a_cell_that_is_too_long_is_a_damaged_file(tmp_path):
    file = table(tmp_path, f"a.jpg,{'x' * 140_000}\n", "labels.csv")
    with pytest.raises(ValueError, match=r"labels: .* is damaged \(field larger"):
        read_labels(NAMES, file)


def test_a_number_of_thousands_of_digits_is_a_name(tmp_path):
    long = "9" * 5000
    file = table(tmp_path, f"a.jpg,{long}\nb.jpg,7\nc.jpg,fish\n", "labels.csv")
    assert read_labels(NAMES, file).names == ["7", long, "fish"]
    assert true_classes(NAMES, file, CLASSES)[0] == (None, long)


# ---------------------------------------------------------------------- ImageNet's own layout

IMAGENET = ImageNetInfo("imagenet-1k").label_descriptions()
WNIDS = ["train/n01440764/1.JPEG", "train/n02012849/2.JPEG", "train/n00007846/3.JPEG"]


@pytest.mark.parametrize("names", [IMAGENET, [name.split(",")[0] for name in IMAGENET]])
def test_folders_named_by_wordnet_ids_are_classes_of_an_imagenet_classifier(tmp_path, names):
    expected = [(0, names[0]), (134, names[134]), (None, "n00007846")]  # the last: not of the 1000
    assert true_classes(WNIDS, "folders", names) == expected
    file = table(tmp_path, {"1.JPEG": "n01440764", "2.JPEG": "n02012849", "3.JPEG": "n00007846"})
    assert true_classes(WNIDS, file, names) == expected


@pytest.mark.parametrize(
    "names", [CLASSES, [f"class {i}" for i in range(1000)], sorted(IMAGENET), IMAGENET[:999]]
)
def test_wordnet_ids_are_no_classes_of_other_classifiers(names):
    labels = ["n01440764", "n02012849", "n00007846"]
    assert true_classes(WNIDS, "folders", names) == [(None, label) for label in labels]


def test_a_class_that_is_named_like_an_id_is_the_class():
    names = [*IMAGENET[:-1], "n01440764"]
    assert true_classes(WNIDS[:1], "folders", names) == [(999, "n01440764")]


def test_a_pack_of_imagenet_folders_says_what_is_right(tmp_path):
    for i, wnid in enumerate(("n01440764", "n02012849")):
        (tmp_path / "photos" / wnid).mkdir(parents=True)
        noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / wnid / "photo.png")
    backbone = load_backbone("test_resnet", weights=None)
    explain(
        tmp_path / "photos",
        backbone,
        explainer="saliency",
        labels="folders",
        output=tmp_path / "pack",
    )
    images = Pack(tmp_path / "pack").images
    assert list(images["label"]) == [0, 134]
    assert list(images["label_name"]) == [IMAGENET[0], IMAGENET[134]]
    assert set(images["right"]) <= {True, False}


def test_classes_have_the_order_of_their_ids_and_the_names_of_torchvision():
    ids = sorted(ImageNetInfo("imagenet-1k").label_names())
    found = true_classes([f"{wnid}/a.jpg" for wnid in ids], "folders", IMAGENET)
    assert [number for number, _ in found] == list(range(1000))
    theirs = list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    theirs[134] = "crane"  # "crane bird" there, since another crane is a machine
    for (_, ours), name in zip(found, theirs, strict=True):
        assert ours.replace(",", "").lower().startswith(name.lower())
