"""Labels of photos as classes of a classifier: what is right and what is wrong."""

import json
from pathlib import Path

import pytest

from xattn.training.labels import read_groups, read_labels, true_classes

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


@pytest.mark.parametrize(
    "content",
    ["[", "[" * 50_000, "[]", '{"n1": {"group": "a"}, "n2": {"label": "b"}}', '{"n1": 1, "n2": 2}',
     '{"n1": {"group": "a"}, "n2": {"group": ["b"]}}'],
)  # fmt: skip
def test_a_table_of_groups_of_another_form_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="data: .* (is damaged|has another form)"):
        read_groups([Path(name) for name in NAMES], table(tmp_path, content))
