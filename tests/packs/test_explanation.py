"""The record, packs on disk (whole or not at all), and pictures of maps."""

import errno
import json
import re

import numpy as np
import pytest
from PIL import Image

from xattn.backbone import Preprocessing
from xattn.packs import writer as module
from xattn.packs.explanation import Explanation
from xattn.packs.format import check_output, read_manifest
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.photos.view import make_view
from xattn.pictures.contact_sheet import (
    Cell,
    Row,
    contact_sheet_html,
    contact_sheet_image,
    sheet_rows,
)
from xattn.pictures.overlay import colorize, colour_bar, overlay

SIZE = (60, 90)


def photo(seed=0, size=SIZE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def make(image_id="cat", target=3, method="head", mode="crop", seed=0, **options):
    options.setdefault("source", photo(seed))
    options.setdefault("file_name", f"{image_id}.png")
    return Explanation(
        map=np.random.default_rng(seed).normal(size=(7, 5)),
        target=target,
        target_name="tabby, tabby cat",
        probability=0.25,
        method=method,
        view=make_view(SIZE, Preprocessing(), mode),
        image_id=image_id,
        protocol={"backbone": {"name": "tiny", "sha256": "ab" * 32}, "explainer": method},
        **options,
    )


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
    for bad in ("../x", "a/b", ".x", "a\\b"):
        with pytest.raises(ValueError, match=r"image_id: .* cannot name a file"):
            make(image_id=bad, source=None)
    with pytest.raises(ValueError, match=r"source: the pixels of cat are not at hand"):
        make(source=None).photo()


# ---------------------------------------------------------------------- packs


def test_a_pack_gives_back_what_was_saved(tmp_path):
    saved = [make(), make(target=5, seed=1), make("dög", method="cam", mode="whole", seed=2)]
    folder = save_pack(tmp_path / "pack", saved, skipped=[("bad.jpg", "truncated")])
    loaded = load_pack(folder)
    for a, b in zip(saved, loaded, strict=True):
        assert np.array_equal(a.map, b.map) and a.view == b.view and a.protocol == b.protocol
        for key in ("id", "target", "target_name", "probability", "method", "file_name", "is_mask"):
            assert getattr(a, key) == getattr(b, key)
        assert b.photo().size == SIZE[::-1]
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == [
        "manifest.json",
        "maps.safetensors",
        *(f"overlays/{i}.jpg" for i in ("cat@3.head", "cat@5.head", "dög@3.cam")),
        "thumbnails/cat.jpg",
        "thumbnails/dög.jpg",
    ]
    manifest = read_manifest(folder)
    assert manifest["version"] == 1 and manifest["skipped"][0]["file_name"] == "bad.jpg"
    assert len(manifest["protocols"]) == 2
    assert manifest["entries"][0]["min"] == float(saved[0].map.min())
    assert str(tmp_path) not in (folder / "manifest.json").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]
    again = load_pack(save_pack(tmp_path / "copy", loaded))
    assert np.array_equal(again[2].map, saved[2].map)


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
        with pytest.raises(ValueError, match=r"output: .* is not a pack of xattn"):
            save_pack(other, [make()])
        assert (other / name).read_text() == content
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"output: .*file is a file; name a folder"):
        save_pack(tmp_path / "file", [make()])
    with pytest.raises(ValueError, match=r"explanations: got none"):
        save_pack(folder, [])
    with pytest.raises(ValueError, match=r"'cat@3.head' comes twice"):
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
    for function in (check_output, lambda f: save_pack(f, [make()])):
        with pytest.raises(OSError, match=r"output: cannot write .*choose a writable folder"):
            function(tmp_path / "file" / "pack")
    assert (tmp_path / "file").read_text() == "x"


def test_a_photo_that_vanished_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(ValueError, match=r"source: image: no file .*gone\.png"):
        save_pack(tmp_path / "pack", [make(source=tmp_path / "gone.png")])
    assert list(tmp_path.iterdir()) == []


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["entries"][0].update(changes.pop("entry", {}))
    manifest.update(changes)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_packs_are_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pack: no folder"):
        load_pack(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no readable manifest.json"):
        load_pack(tmp_path)
    folder = tmp_path / "pack"
    cases = [
        (lambda: edit(folder, format="other"), r"not of a pack"),
        (lambda: edit(folder, version=99), r"format version 99, this xattn reads up to 1"),
        (lambda: edit(folder, entry={"id": "gone@1.head"}), r"manifest.json is damaged"),
        (lambda: edit(folder, entry={"shape": [1, 1]}), r"manifest.json is damaged"),
        (lambda: edit(folder, entry={"view": {}}), r"manifest.json is damaged"),
        (lambda: edit(folder, entry={"thumbnail": "thumbnails/../../x.jpg"}), r"outside the pack"),
        (lambda: (folder / "manifest.json").write_text("{"), r"no readable manifest"),
        (lambda: (folder / "maps.safetensors").unlink(), r"maps.safetensors is missing or damaged"),
        (
            lambda: (folder / "maps.safetensors").write_bytes(
                (folder / "maps.safetensors").read_bytes()[:-9]
            ),
            r"maps.safetensors is missing or damaged",
        ),
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


# ---------------------------------------------------------------------- pictures


def test_colours_run_from_the_first_to_the_last_of_the_map():
    colours = colorize(np.array([[0, 1, np.nan, 2, -1]]), "viridis")
    assert colours.dtype == np.uint8 and colours.shape == (1, 5, 3)
    assert colours[0, 0].tolist() == colours[0, 4].tolist() == [68, 1, 84]
    assert colours[0, 1].tolist() == colours[0, 3].tolist() == [253, 231, 37]
    assert colours[0, 2].tolist() == [0, 0, 0]
    lightness = colorize(np.linspace(0, 1, 256)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > -1).all()
    assert colour_bar(64, 4).size == (64, 4)
    with pytest.raises(ValueError, match=r"cmap: no colour map 'infernal'; did you mean inferno"):
        colorize(np.zeros((1, 1)), "infernal")


def test_an_overlay_mixes_colours_over_a_photo_with_less_colour_of_its_own():
    photo, opacity = np.array([200.0, 40, 90]), 0.4
    image = Image.new("RGB", (9, 7), tuple(int(c) for c in photo))
    grey = photo @ [0.299, 0.587, 0.114]
    faded = opacity * grey + (1 - opacity) * photo
    colour = colorize(np.array([[0.7]]))[0, 0]
    out = np.asarray(overlay(image, np.full((7, 9), 0.7), opacity)).astype(float)
    assert np.abs(out - (opacity * colour + (1 - opacity) * faded)).max() <= 0.51


def test_an_overlay_colours_inside_and_dims_outside():
    image = Image.new("RGB", SIZE[::-1], (200, 120, 40))
    values = make().on_photo()
    out = np.asarray(overlay(image, values)).astype(int)
    outside = np.isnan(values)
    assert (out[outside] == out[outside][0]).all() and np.ptp(out[outside][0]) == 0
    assert out[outside].max() < 60
    assert np.array_equal(np.asarray(overlay(image, np.ones(SIZE), 0)), np.asarray(image))
    full = np.asarray(overlay(image, np.linspace(0, 1, 90)[None].repeat(60, 0), 1))
    assert np.array_equal(full, colorize(np.linspace(0, 1, 90)[None].repeat(60, 0)))
    with pytest.raises(ValueError, match=r"values: got shape \(3, 3\) for a photo of 60 x 90"):
        overlay(image, np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"opacity: got 2"):
        overlay(image, values, 2)


def test_rows_group_the_explanations_of_a_photo():
    rows = sheet_rows([make(), make("dog"), make(target=4)])
    assert [len(r.cells) for r in rows] == [3, 2]
    assert [c.title for c in rows[0].cells] == ["Photo", "tabby", "tabby"]
    assert rows[0].cells[1].alt == "head map of tabby (25.0%) on cat.png"


def test_the_html_sheet_is_self_contained_escaped_and_accessible():
    evil = Explanation(
        np.eye(3),
        0,
        "<script>alert(1)</script>",
        0.9,
        "head",
        make_view(SIZE, Preprocessing()),
        "x",
        file_name='"><b>.png',
        source=photo(),
    )
    page = contact_sheet_html(
        [make(), evil], "A & B", "sub", [["method", "AD"], ["<head>", 1.5]], "Figures", ["note"]
    )
    assert "<script" not in page and "&lt;script&gt;" in page and "A &amp; B" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 4 and all(re.search(r'alt="[^"]+"', i) for i in images)
    for part in (
        "prefers-color-scheme:dark",
        "width=device-width",
        "25.0%",
        "&lt;head&gt;",
        "note",
    ):
        assert part in page
    with pytest.raises(ValueError, match=r"rows: got none"):
        contact_sheet_html([])


def test_the_image_sheet_takes_rows_of_any_length_and_shape():
    rows = [
        Row("strip", [Cell(photo(size=(2, 400)), "a title that is far too long for its picture")]),
        Row("two", [Cell(photo(), "one", value=0.5), Cell(photo(size=(1, 1)), "two", "detail")]),
    ]
    light, dark = contact_sheet_image(rows, "title", side=100), contact_sheet_image(rows, dark=True)
    assert light.width < 260 and light.getpixel((0, 0)) == (255, 255, 255)
    assert dark.getpixel((0, 0)) != (255, 255, 255)
