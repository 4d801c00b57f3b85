"""Maps of fixed photos while a head trains: of which step they are, and that training does not notice."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.backbone import load_backbone
from xattn.config import TrainConfig
from xattn.explaining.photos import explain
from xattn.heads import create_head
from xattn.packs.explanation import blank_note
from xattn.packs.reader import Pack, load_pack
from xattn.training import fit
from xattn.training.sample import Sample


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("resnet18", weights=None, input_size=64)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(random.integers(0, 255, (80, 96, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def new_head(backbone):
    torch.manual_seed(0)
    return create_head("ttame", backbone)


CONFIG = TrainConfig("small", epochs=2, batch_size=3, workers=0, checkpoint_every=2)


def weights(result) -> dict:
    return result.head.state_dict()


def test_training_is_the_same_with_and_without_a_sample(backbone, photos, tmp_path):
    plain = weights(fit(new_head(backbone), backbone, photos, CONFIG, progress=False))
    sample = Sample(backbone, photos, tmp_path / "sample", 4)
    shown = fit(new_head(backbone), backbone, photos, CONFIG, progress=False, on_checkpoint=sample)
    for name, value in weights(shown).items():
        assert torch.equal(value, plain[name]), name


def test_the_pack_holds_the_maps_of_before_and_of_the_last_checkpoint(backbone, photos, tmp_path):
    head = new_head(backbone)
    sample = Sample(backbone, photos, tmp_path / "sample", 4)
    fit(head, backbone, photos, CONFIG, progress=False, on_checkpoint=sample)
    found = load_pack(tmp_path / "sample")
    assert {e.method for e in found} == {"step 0", "step 6"}
    assert [e.protocol["step"] for e in found] == [0, 6] * 4
    assert len({e.image_id for e in found}) == 4
    first, last = found[::2], found[1::2]
    assert [e.image_id for e in first] == [e.image_id for e in last]
    again = explain(sample.photos.paths, backbone, head)
    for a, b in zip(again, last, strict=True):
        np.testing.assert_array_equal(a.map, b.map)


def test_a_resumed_run_keeps_the_maps_of_before(backbone, photos, tmp_path):
    head = new_head(backbone)
    Sample(backbone, photos, tmp_path / "sample", 2)(0, head)
    first = load_pack(tmp_path / "sample")
    Sample(backbone, photos, tmp_path / "sample", 2)(8, head)
    found = load_pack(tmp_path / "sample")
    assert [e.protocol["step"] for e in found] == [0, 8] * 2
    for a, b in zip(first, found[::2], strict=True):
        np.testing.assert_array_equal(a.map, b.map)


def test_photos_that_cannot_be_read_are_passed_over(backbone, photos, tmp_path):
    for name in ("0.png", "2.png"):
        (photos / name).write_bytes(b"")
    chosen = Sample(backbone, photos, tmp_path / "sample", 4).photos.paths
    assert len(set(chosen)) == 4 and not {"0.png", "2.png"} & {p.name for p in chosen}
    assert len(Sample(backbone, photos, tmp_path / "sample", 99).photos) == 7
    for path in photos.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="sample: none of the photos"):
        Sample(backbone, photos, tmp_path / "sample", 4)


def test_other_counts_and_datasets_are_refused(backbone, photos, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        Sample(backbone, photos, tmp_path / "sample", 0)


def test_a_photo_that_went_is_skipped_and_a_class_that_is_none_is_refused(
    backbone, photos, tmp_path
):
    head = create_head("gap", backbone, classes=2)
    classes = {path: 1 for path in photos.iterdir()}
    sample = Sample(backbone, photos, tmp_path / "sample", 3, classes=classes)
    sample.photos.paths[0].unlink()
    sample(0, head)
    assert [e.target for e in load_pack(tmp_path / "sample")] == [1, 1]
    ((name, reason),) = Pack(tmp_path / "sample").skipped
    assert name == sample.photos.paths[0].name and "no file" in reason
    classes[sample.photos.paths[1]] = 2
    with pytest.raises(ValueError, match="class 2 is out of range"):
        sample(1, head)


def test_only_expected_warnings_are_kept_back(backbone, photos, tmp_path, monkeypatch):
    def warning(*args, **options):
        for text in (
            "skipped 1 of 4 images",
            blank_note(["by a of b on c"]),
            blank_note(["by a of b on c", "by a of b on d"]),
            "new",
        ):
            warnings.warn(f"explain: {text}", stacklevel=1)
        return explain(*args, **options)

    monkeypatch.setattr("xattn.training.sample.explain", warning)
    sample = Sample(backbone, photos, tmp_path / "sample", 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sample(0, new_head(backbone))
    assert [str(w.message) for w in told if "explain" in str(w.message)] == ["explain: new"]
