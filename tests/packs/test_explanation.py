"""The record of an explanation, and packs on disk, whole or not at all."""

import errno
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from pack_files import edit, rewritten
from small_explanations import SIZE, make

from xattn.backbone import Preprocessing
from xattn.packs import writer as module
from xattn.packs.explanation import Explanation
from xattn.packs.format import read_manifest
from xattn.packs.reader import Pack, load_pack
from xattn.packs.writer import save_pack
from xattn.photos.view import make_view

# ---------------------------------------------------------------------- the record


def test_a_map_is_float32_read_only_and_its_own_copy():
    values = np.zeros((2, 2))
    e = Explanation(values, 0, "a", 1.0, "head", make_view(SIZE, Preprocessing()), "x")
    values[:] = 9
    assert e.map.dtype == np.float32 and e.map.max() == 0 and not e.map.flags.writeable
    with pytest.raises(AttributeError):
        e.target = 2


def test_on_photo_is_min_maxed_and_nan_outside():
    e = make()
    on = e.on_photo()
    assert on.shape == SIZE and np.isnan(on).any()
    assert 0 <= np.nanmin(on) < 0.1 and 0.9 < np.nanmax(on) <= 1
    assert e.normalized().min() == 0 and e.normalized().max() == 1
    assert not np.isnan(make(mode="whole").on_photo()).any()
    assert e.on_photo((30, 45)).shape == (30, 45)


def test_constant_maps_are_zero_and_masks_are_not_stretched():
    view = make_view(SIZE, Preprocessing(), "whole")
    flat = Explanation(np.full((3, 3), 7.0), 0, "a", 0.5, "cam", view, "x")
    assert flat.is_constant and (flat.on_photo() == 0).all()
    ones = Explanation(np.ones((3, 3)), 0, "a", 0.5, "ones", view, "x", is_mask=True)
    assert np.allclose(ones.on_photo(), 1)
    assert flat.is_blank and not ones.is_blank
    assert Explanation(np.zeros((3, 3)), 0, "a", 0.5, "head", view, "x", is_mask=True).is_blank
    huge = Explanation(np.array([[-3e38, 3e38]]), 0, "a", 0.5, "cam", view, "x")
    assert huge.normalized().tolist() == [[0, 1]]


def test_a_bad_record_is_refused():
    view = make_view(SIZE, Preprocessing())
    for values, message in [
        (np.zeros(3), r"map: got shape"),
        ([[np.nan]], r"head map of x holds NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            Explanation(values, 0, "a", 0.5, "head", view, "x")
    with pytest.raises(ValueError, match=r"probability: got nan"):
        Explanation(np.zeros((2, 2)), 0, "a", float("nan"), "head", view, "x")
    for bad in ("", "a\0"):
        with pytest.raises(ValueError, match=r"image_id, method: got .*without null characters"):
            make(image_id=bad, source=None)
    with pytest.raises(ValueError, match=r"source: the pixels of cat are not available"):
        make(source=None).photo()


# ---------------------------------------------------------------------- packs


def test_a_pack_gives_back_what_was_saved(tmp_path):
    shown = {"method_title": "Explanation head"}
    saved = [
        make(**shown),
        make(target=5, seed=1, **shown),
        make("dög", method="cam", mode="whole", seed=2),
    ]
    folder = save_pack(tmp_path / "pack", saved, skipped=[("bad.jpg", "truncated")])
    loaded = load_pack(folder)
    for a, b in zip(saved, loaded, strict=True):
        assert np.array_equal(a.map, b.map) and a.view == b.view and a.protocol == b.protocol
        for key in (
            "id",
            "target",
            "target_name",
            "probability",
            "method",
            "method_title",
            "file_name",
            "is_mask",
        ):
            assert getattr(a, key) == getattr(b, key)
        assert b.photo().size == SIZE[::-1]
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == [
        "entries-00000.parquet",
        "images-00000.parquet",
        "manifest.json",
        "maps-00000.safetensors",
        *(f"overlays/{i}.jpg" for i in ("cat@3.head", "cat@5.head", "dög@3.cam")),
        "thumbnails-00000.safetensors",
    ]
    manifest = read_manifest(folder)
    assert manifest["version"] == 1 and manifest["skipped"][0]["file_name"] == "bad.jpg"
    rows = pq.read_table(folder / "entries-00000.parquet").to_pylist()
    assert [row["protocol"] for row in rows] == [json.dumps(e.protocol) for e in saved]
    assert rows[0]["min"] == float(saved[0].map.min())
    assert not any(str(tmp_path).encode() in (folder / name).read_bytes() for name in names)
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]
    again = load_pack(save_pack(tmp_path / "copy", loaded))
    assert np.array_equal(again[2].map, saved[2].map)


def test_names_with_any_character_are_kept_and_become_files_inside_the_pack(tmp_path):
    names = ["../x", "a/b.jpg", "a__b.jpg", "A/b.jpg", ".x", "a\\b", "x" * 240, "é\n"]
    folder = save_pack(tmp_path / "pack", [make(name, method="m/n") for name in names])
    pack = Pack(folder)
    assert list(pack.image_ids) == names
    assert all(pack.photo(name).size == SIZE[::-1] for name in names)
    files = [p.relative_to(folder) for p in folder.rglob("*.jpg")]
    assert len({str(p).casefold() for p in files}) == len(names)
    assert {len(p.parts) for p in files} == {2} and [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_a_pack_without_pixels_or_overlays(tmp_path):
    folder = save_pack(tmp_path / "pack", [make(source=None), make("dog")], overlays=False)
    assert not (folder / "overlays").exists()
    first, second = load_pack(folder)
    assert first.source is None and second.photo().size == SIZE[::-1]


def test_a_new_pack_replaces_an_old_one_and_nothing_else(tmp_path):
    folder = save_pack(tmp_path / "pack", [make()])
    save_pack(folder, [make("dog")])
    assert [e.image_id for e in load_pack(folder)] == ["dog"]
    (tmp_path / "empty").mkdir()
    save_pack(tmp_path / "empty", [make()])
    for name, content in [("notes.txt", "mine"), ("manifest.json", '{"name": "web app"}')]:
        other = tmp_path / f"other-{name}"
        other.mkdir()
        (other / name).write_text(content)
        with pytest.raises(ValueError, match=r"output: .* was not written by xattn"):
            save_pack(other, [make()])
        assert (other / name).read_text() == content
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"output: .*file is a file; name a folder"):
        save_pack(tmp_path / "file", [make()])
    with pytest.raises(ValueError, match=r"explanations: got none"):
        save_pack(folder, [])
    with pytest.raises(ValueError, match=r"'cat@3.head' occurs twice"):
        save_pack(folder, [make(), make()])
    assert [e.image_id for e in load_pack(folder)] == ["dog"]


@pytest.mark.parametrize("written", range(4))
def test_a_full_disk_leaves_the_earlier_pack_intact(tmp_path, monkeypatch, written):
    folder = save_pack(tmp_path / "pack", [make()])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    real, calls = module.write_file, []

    def full(path, data):
        calls.append(path)
        if len(calls) > written:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(OSError, match=r"output: cannot write .*No space left on device") as caught:
        save_pack(folder, [make("dog"), make("dog", target=9)])
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert "free space" in str(caught.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"output: cannot write .*choose a writable folder"):
        save_pack(tmp_path / "file" / "pack", [make()])
    assert (tmp_path / "file").read_text() == "x"


def test_a_photo_that_vanished_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(ValueError, match=r"source: image: no file .*gone\.png"):
        save_pack(tmp_path / "pack", [make(source=tmp_path / "gone.png")])
    assert list(tmp_path.iterdir()) == []


def test_damaged_packs_are_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pack: there is no folder"):
        load_pack(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no readable manifest.json"):
        load_pack(tmp_path)
    folder = tmp_path / "pack"
    cases = [
        (lambda: edit(folder, lambda m: m.update(format="other")), r"does not belong to a pack"),
        (
            lambda: edit(folder, lambda m: m.update(version=99)),
            r"format version 99, but this xattn reads only up to 1",
        ),
        (lambda: rewritten(folder, "height", 1), r"maps-.* is missing or damaged"),
        (lambda: (folder / "manifest.json").write_text("{"), r"no readable manifest"),
    ]
    for damage, message in cases:
        if (folder / "manifest.json").is_file():
            (folder / "manifest.json").unlink()
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        save_pack(folder, [make()])
        damage()
        with pytest.raises(ValueError, match=message) as caught:
            load_pack(folder)
        assert "\n" not in str(caught.value)
