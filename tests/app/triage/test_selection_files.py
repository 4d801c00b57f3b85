"""What leaves a selection: the list that xattn reads, CSV, a pack, a FiftyOne data set."""

import csv
import io
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("streamlit")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_packs import described, explanation, picture, small_pack

from xattn.app.library import Library
from xattn.app.triage import selection_files, tag_files
from xattn.app.triage.selection import Selection, View, table
from xattn.app.triage.selection_files import selection_csv
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.photos.images import list_images


def opened(folder):
    library = Library(folder.parent)
    return library.open(next(info.id for info in library.packs() if info.name == folder.name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pack(tmp_path_factory.mktemp("root") / "first", 6, ("gradcam", "saliency"))


@pytest.fixture
def pack(folder):
    yield opened(folder)
    for left in folder.parent.glob("*.sqlite"):
        left.unlink()


@pytest.fixture
def found(pack):
    """The maps of three photos by both methods."""
    return Selection(table(pack), View(), ["photo-00001", "photo-00003", "photo-00005"])


def test_xattn_reads_the_list_in_the_folder_of_the_photos(tmp_path):
    names = ["a b.jpg", "#first.jpg", "fish/é 2.jpg", "two\nlines.jpg"]
    packed = [replace(explanation(i, source=picture(i)), image_id=n) for i, n in enumerate(names)]
    pack = opened(save_pack(tmp_path / "root" / "odd", packed, overlays=False))
    text = selection_files.image_list(Selection(table(pack), View()))
    (tmp_path / "fish").mkdir()
    for name in names[:3]:
        picture(0).save(tmp_path / name)
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    listed = list_images(tmp_path / "list.txt")
    assert [p.relative_to(tmp_path).as_posix() for p in listed] == names[:3]


def test_the_csv_has_tags_rating_and_note_and_runs_no_formula(pack, found):
    store = tag_files.store_of(pack)
    store.change_tags("ann", ["photo-00001"], ["night", "=cmd()"])
    store.set_rating("ann", ["photo-00001"], 4)
    store.set_note("ann", "photo-00003", "=1+1")
    rows = list(csv.DictReader(io.StringIO("".join(selection_csv(found, store)))))
    assert len(rows) == 6
    first, other = rows[0], rows[2]
    assert (first["image_id"], first["tags"], first["rating"]) == (
        "photo-00001",
        "'=cmd(); night",
        "4",
    )
    assert (other["image_id"], other["tags"], other["note"]) == ("photo-00003", "", "'=1+1")
    parts = selection_csv(found, store, 4)
    assert [part.count("\r\n") for part in parts] == [1, 4, 2]


def test_a_missing_figure_is_an_empty_cell(tmp_path):
    found = [explanation(i, metrics={"ROAD": -0.25} if i else {}) for i in range(2)]
    pack = opened(save_pack(tmp_path / "root" / "pack", found, False, metrics=described()))
    lines = "".join(selection_csv(Selection(table(pack), View()), None))
    assert [row["ROAD"] for row in csv.DictReader(io.StringIO(lines))] == ["", "-0.25"]


@given(st.text())
def test_no_cell_of_text_starts_a_formula(text):
    found = selection_files.cell(text)
    assert found[:1] not in ("=", "+", "-", "@") and found.lstrip()[:1] not in tuple("=+-@")
    assert found in (text, f"'{text}")


def test_a_pack_of_the_selection_has_its_maps_figures_and_photos(pack, found, tmp_path):
    assert selection_files.write_pack(pack, found, tmp_path / "part") == 6
    new = opened(tmp_path / "part")
    assert list(new.entries.index) == found.ids()
    for e in load_pack(tmp_path / "part"):
        old = pack.explanation(e.id)
        assert np.array_equal(e.map, old.map) and e.metrics == old.metrics and e.facts == old.facts
        assert new.photo_bytes(e.image_id) == pack.photo_bytes(e.image_id)
    assert [m.key for m in new.metrics] == [m.key for m in pack.metrics]


def test_too_many_maps_are_refused_before_anything_is_written(pack, found, tmp_path, monkeypatch):
    monkeypatch.setattr(selection_files, "MOST_WRITTEN", 5)
    with pytest.raises(ValueError, match="has 6 maps; 1 to 5 can be written"):
        selection_files.write_pack(pack, found, tmp_path / "part")
    assert not (tmp_path / "part").exists()


# ---------------------------------------------------------------------- FiftyOne, by a stand-in


class Label(SimpleNamespace):
    pass


class Dataset:
    """As much of ``fiftyone.Dataset`` as is used; media are read when the data set is exported."""

    made: ClassVar[list] = []

    def __init__(self):
        self.samples, self.deleted = [], False
        Dataset.made.append(self)

    def add_samples(self, samples):
        self.samples += samples

    def __len__(self):
        return len(self.samples)

    def export(self, export_dir, dataset_type, export_media):
        assert dataset_type == "FiftyOneDataset" and export_media
        for sample in self.samples:
            sample.photo = Image.open(sample.filepath).copy()
            for field in vars(sample).values():
                if hasattr(field, "map_path"):
                    field.values = np.asarray(Image.open(field.map_path))
        with open(f"{export_dir}/samples.json", "w") as stream:
            stream.write("{}")

    def delete(self):
        self.deleted = True


@pytest.fixture
def library(monkeypatch):
    fake = SimpleNamespace(
        **{"Dataset": Dataset, "Sample": Label, "Classification": Label, "Heatmap": Label},
        types=SimpleNamespace(FiftyOneDataset="FiftyOneDataset"),
    )
    monkeypatch.setitem(sys.modules, "fiftyone", fake)
    Dataset.made.clear()


def test_a_fiftyone_data_set_has_heatmaps_classes_and_tags(pack, found, tmp_path, library):
    store = tag_files.store_of(pack)
    store.change_tags("ann", ["photo-00003"], ["night"])
    store.set_rating("ann", ["photo-00003"], 2)
    assert selection_files.write_fiftyone(pack, found, tmp_path / "set", store) == 3
    assert (tmp_path / "set" / "samples.json").is_file()
    [dataset] = Dataset.made
    assert dataset.deleted
    sample = dataset.samples[1]
    assert (sample.image_id, sample.tags, sample.rating) == ("photo-00003", ["night"], 2)
    entry = pack.explanation(found.ids()[2])
    _, name, p = entry.facts.top[0]
    assert (sample.prediction.label, sample.prediction.confidence) == (name, p)
    assert sample.ground_truth.label == entry.facts.label_name
    heatmap = sample.gradcam
    assert heatmap.range == [0, 255] and heatmap.label == entry.target_name
    size = (sample.photo.height, sample.photo.width)
    assert heatmap.values.shape == size
    wanted = np.nan_to_num(entry.on_photo(size)) * 255
    assert np.abs(heatmap.values - wanted).max() <= 0.5
    assert sample.saliency.values.shape == size


def test_without_fiftyone_one_line_says_so(pack, found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(ValueError, match="run: pip install fiftyone"):
        selection_files.write_fiftyone(pack, found, tmp_path / "set")
    assert not (tmp_path / "set").exists()
