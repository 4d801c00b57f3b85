"""Labels of photos as classes of a classifier: what is right and what is wrong."""

import json

import pytest

from xattn.training.labels import true_classes

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
