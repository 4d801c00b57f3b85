"""Crops without evidence: the search against a loop, sources of evidence, macros, and the writer."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from xattn.cli import main
from xattn.parts import (
    BoxFile,
    MserText,
    cut_parts,
    cutting,
    draw_macro,
    draw_text,
    evidence_mask,
    largest_crop,
    open_evidence,
    rectangles,
    write_lettered,
)

PHOTOS = {name: Image.fromarray(getattr(data, name)()) for name in ("chelsea", "coffee", "rocket")}


def blank(width, height):
    return np.zeros((height, width), bool)


# ---------------------------------------------------------------------- the search


def by_loop(evidence, fractions, aspects, centres):
    """The definition, one rectangle after another: (largest p, boxes that have it)."""
    height, width = evidence.shape
    best, boxes = 0.0, set()
    for p in fractions:
        for r in np.linspace(math.sqrt(p), 1 / math.sqrt(p), aspects):
            w, h = math.sqrt(p) * r, math.sqrt(p) / r
            for cy in np.linspace(h / 2, 1 - h / 2, centres):
                for cx in np.linspace(w / 2, 1 - w / 2, centres):
                    x0, x1 = (cx - w / 2) * width, (cx + w / 2) * width
                    y0, y1 = (cy - h / 2) * height, (cy + h / 2) * height
                    x0, y0 = math.ceil(x0 - 1e-6), math.ceil(y0 - 1e-6)
                    x1, y1 = math.floor(x1 + 1e-6), math.floor(y1 + 1e-6)
                    if x0 >= x1 or y0 >= y1 or evidence[y0:y1, x0:x1].any():
                        continue
                    if p > best:
                        best, boxes = p, set()
                    if p == best:
                        boxes.add((x0, y0, x1, y1))
    return best, boxes


@settings(max_examples=15)
@given(
    st.integers(5, 61), st.integers(5, 47), st.integers(0, 5), st.integers(0, 2**31), st.booleans()
)
def test_search_equals_a_loop_over_all_rectangles(width, height, count, seed, published):
    rng = np.random.default_rng(seed)
    evidence = blank(width, height)
    for _ in range(count):
        x, y = rng.integers(0, width), rng.integers(0, height)
        evidence[y : y + rng.integers(1, 9), x : x + rng.integers(1, 20)] = True
    fractions = tuple(np.linspace(0.1, 0.9, 17 if published else 5).tolist())
    grid = {"fractions": fractions, "aspects": 4, "centres": 5}
    best, boxes = by_loop(evidence, **grid)
    crop = largest_crop(evidence, seed, 3, **grid)
    if not boxes:
        assert crop is None
        return
    assert crop.fraction == best and crop.box in boxes
    drawn = {largest_crop(evidence, seed, i, **grid).box for i in range(40)}
    assert drawn <= boxes and (len(boxes) == 1 or len(drawn) > 1)


def test_published_grid_has_17_areas_10_aspects_and_100_places_inside_the_image():
    p, unit = rectangles()
    assert p.shape == (17 * 10 * 100,) and unit.shape == (17000, 4)
    width, height = unit[:, 2] - unit[:, 0], unit[:, 3] - unit[:, 1]
    np.testing.assert_allclose(width * height, p)
    assert unit.min() > -1e-12 and unit.max() < 1 + 1e-12
    widest = width.reshape(17, 10, 100)[:, :, 0]  # from p x 1 to 1 x p
    np.testing.assert_allclose(widest[:, 0], np.linspace(0.1, 0.9, 17))
    np.testing.assert_allclose(widest[:, -1], 1)


def test_published_grid_agrees_with_a_loop_on_a_macro():
    image, boxes = draw_macro(PHOTOS["chelsea"], 0, 1)
    evidence = evidence_mask(boxes, image.size)
    best, candidates = by_loop(evidence, np.linspace(0.1, 0.9, 17), 10, 10)
    crop = largest_crop(evidence, 0, 1)
    assert crop.fraction == pytest.approx(best) and crop.box in candidates


def test_a_band_of_text_leaves_the_larger_side():
    evidence = blank(100, 100)
    evidence[30:40] = True
    crop = largest_crop(evidence)
    assert crop.fraction == pytest.approx(0.6) and crop.box == (0, 40, 100, 100)


def test_ties_are_drawn_by_seed_and_index_alone():
    evidence = blank(80, 60)
    evidence[25:35, 30:50] = True
    boxes = [largest_crop(evidence, 5, i).box for i in range(30)]
    np.random.seed(1)
    assert boxes == [largest_crop(evidence, 5, i).box for i in range(30)]
    assert boxes[7] == largest_crop(evidence, 5, 7).box  # whatever was asked before
    assert len(set(boxes)) > 1
    assert boxes != [largest_crop(evidence, 6, i).box for i in range(30)]
    assert len({largest_crop(evidence, 5, i).fraction for i in range(30)}) == 1


def test_all_evidence_leaves_no_crop_and_none_leaves_nine_tenths():
    assert largest_crop(~blank(31, 17)) is None
    assert largest_crop(blank(310, 170)).fraction == pytest.approx(0.9)


@pytest.mark.parametrize(
    "evidence", [np.zeros((4, 4)), np.zeros((0, 4), bool), np.zeros((1, 4, 4), bool)]
)
def test_search_refuses_what_is_no_bool_map(evidence):
    with pytest.raises(ValueError, match=r"evidence: got .* give bool \(H, W\)"):
        largest_crop(evidence)


def test_search_refuses_negative_seeds_and_fractions_out_of_range():
    with pytest.raises(ValueError, match="seed, index"):
        largest_crop(blank(9, 9), -1)
    with pytest.raises(ValueError, match="fractions"):
        largest_crop(blank(9, 9), fractions=(0.0, 0.5))


# ---------------------------------------------------------------------- evidence


def test_a_box_marks_every_pixel_that_it_touches_and_nothing_else():
    mask = evidence_mask([[2.5, 1, 4.01, 3]], (9, 7))
    want = blank(9, 7)
    want[1:3, 2:5] = True
    assert (mask == want).all()


def test_boxes_partly_outside_are_clipped_and_those_outside_refused():
    mask = evidence_mask([[-5, -5, 2, 3], [8, 6, 100, 100]], (9, 7))
    want = blank(9, 7)
    want[:3, :2] = want[6:, 8:] = True
    assert (mask == want).all()
    for box in ([9, 0, 12, 3], [0, 7, 3, 9], [-4, 0, 0, 3]):
        with pytest.raises(ValueError, match=r"outside the image of 9 x 7 pixels"):
            evidence_mask([box], (9, 7))


@pytest.mark.parametrize(
    "region",
    [
        [1, 2, 3],
        [3, 1, 3, 4],
        [0, 4, 3, 1],
        [0, 0, math.nan, 2],
        [0, 0, 10**400, 2],
        [[0, 0], [1, 1]],
        ["a", 0, 1, 1],
        [[0, 0, 0], [1, 1, 1], [2, 0, 0]],
    ],
)
def test_regions_that_are_none_are_refused(region):
    with pytest.raises(ValueError, match=r"^evidence: "):
        evidence_mask([region], (9, 7))


def test_a_polygon_covers_its_inside_and_at_most_a_pixel_more():
    size = (60, 50)
    diamond = [[30, 5], [50, 25], [30, 45], [10, 25]]
    mask = evidence_mask([diamond], size)
    y, x = np.mgrid[:50, :60] + 0.5
    distance = np.abs(x - 30) + np.abs(y - 25)
    assert mask[distance < 20].all() and not mask[distance > 20 + 4].any()
    square = [[10, 10], [20, 10], [20, 30], [10, 30]]
    assert evidence_mask([square], size)[10:30, 10:20].all()
    assert evidence_mask([[[-1e9, 10], [1e9, 10], [1e9, 20], [-1e9, 20]]], size)[10:20].all()


def test_a_mask_is_evidence_as_it_is_and_has_the_image_s_size():
    mask = blank(9, 7)
    mask[2, 3] = True
    assert evidence_mask(mask, (9, 7)) is mask
    with pytest.raises(ValueError, match=r"mask of \(9, 7\) for an image of \(7, 9\)"):
        evidence_mask(mask, (7, 9))


def test_box_files_take_boxes_polygons_and_the_form_of_annotations(tmp_path):
    path = tmp_path / "boxes.json"
    regions = [[1, 2, 3, 4], [[0, 0], [4, 0], [4, 4]], {"class": "text", "box": [5, 5, 7, 7]}]
    path.write_text(json.dumps({"a.jpg": regions, "x/b.jpg": [], "y/b.jpg": [[0, 0, 1, 1]]}))
    found = BoxFile(path)
    assert found("some/where/a.jpg", None) == [regions[0], regions[1], [5, 5, 7, 7]]
    assert found("data/x/b.jpg", None) == [] and found("data/y/b.jpg", None) == [[0, 0, 1, 1]]
    with pytest.raises(ValueError, match=r"no entry for b\.jpg"):
        found("data/z/b.jpg", None)


@pytest.mark.parametrize("text", ["[]", '{"a.jpg": 3}', "{", '{"a.jpg": [7]}', "[" * 50_000])
def test_damaged_box_files_are_refused(tmp_path, text):
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^evidence: "):
        open_evidence(path)("a.jpg", None)


def test_masks_are_found_by_name_and_choose_numbers(tmp_path):
    values = np.zeros((7, 9), np.uint8)
    values[1, 2], values[3, 4] = 5, 18
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (open_evidence(tmp_path)("x/a.jpg", None) == (values > 0)).all()
    assert (open_evidence(tmp_path, (18,))("a.jpg", None) == (values == 18)).all()
    with pytest.raises(ValueError, match="no mask"):
        open_evidence(tmp_path)("b.jpg", None)
    with pytest.raises(ValueError, match="only a folder of masks has numbers"):
        open_evidence("mser", (18,))


def test_sources_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder .*onnx:PATH"):
        open_evidence(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.onnx"):
        open_evidence(f"onnx:{tmp_path / 'none.onnx'}")
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="OpenCV cannot read"):
        open_evidence(f"onnx:{tmp_path / 'broken.onnx'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.png mask"):
        open_evidence(tmp_path / "empty")


def bright_is_text(path, shape):
    """An ONNX network that takes bright pixels for text: sigmoid(2 (r + g + b) - 3)."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    constants = {
        "w": np.full((1, 3, 1, 1), 2, np.float32),
        "b": np.array([-3], np.float32),
        "s": np.array(shape),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("Sigmoid", ["c"], ["p"]),
        helper.make_node("Reshape", ["p", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info("x", 1, [1, 3, 736, 736])],
        [helper.make_tensor_value_info("y", 1, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


def test_a_network_s_boxes_come_back_in_pixels_of_the_photo(tmp_path):
    photo = Image.new("RGB", (400, 300))
    photo.paste("white", (100, 50, 300, 90))
    bright_is_text(tmp_path / "db.onnx", [736, 736])
    mask = evidence_mask(open_evidence(f"onnx:{tmp_path / 'db.onnx'}")("a.jpg", photo), photo.size)
    assert mask[50:90, 100:300].all() and mask.mean() < 0.3
    bright_is_text(tmp_path / "other.onnx", [1, 1, 736, 736])
    with pytest.raises(ValueError, match=r"not a DB text detector .* \(736, 736\)"):
        open_evidence(f"onnx:{tmp_path / 'other.onnx'}")("a.jpg", photo)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("index", [1, 3])
def test_mser_finds_the_lettering_of_macros_and_leaves_room_for_a_crop(name, index):
    image, boxes = draw_macro(PHOTOS[name], 0, index)
    truth = evidence_mask(boxes, image.size)
    found = evidence_mask(MserText()("macro", image), image.size)
    assert found[truth].mean() > 0.85
    assert found[~truth].mean() < 0.25
    crop = largest_crop(found)
    x0, y0, x1, y1 = crop.box
    assert truth[y0:y1, x0:x1].mean() < 0.05


def test_mser_finds_nothing_in_plain_and_tiny_images():
    for size in ((200, 100), (1, 1), (3, 50)):
        assert MserText()("plain", Image.new("RGB", size, "gray")) == []


# ---------------------------------------------------------------------- macros


@pytest.mark.parametrize("draw", [draw_macro, draw_text])
@pytest.mark.parametrize("size", [(451, 300), (171, 256), (64, 48), (301, 83)])
def test_boxes_hold_all_changed_pixels_and_none_could_be_smaller(draw, size):
    for index in range(8):
        photo = Image.effect_noise(size, 90).convert("RGB")
        image, boxes = draw(photo, 2, index)
        assert boxes and image.size == photo.size
        changed = (np.asarray(image) != np.asarray(photo)).any(2)
        mask = evidence_mask(boxes, size)
        assert changed.any() and not changed[~mask].any()
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
            part = changed[y0:y1, x0:x1]
            # On noise nearly every inked pixel differs; an edge's faintest one may not.
            assert part[:2].any() and part[-2:].any() and part[:, :2].any() and part[:, -2:].any()


@pytest.mark.parametrize("draw", [draw_macro, draw_text])
def test_text_is_a_pure_function_of_seed_and_index(draw):
    photo = PHOTOS["coffee"]
    first = [draw(photo, 0, i) for i in range(6)]
    np.random.seed(0)
    for i in reversed(range(6)):
        again = draw(photo, 0, i)
        assert again.boxes == first[i].boxes and again.image.tobytes() == first[i].image.tobytes()
    assert len({item.image.tobytes() for item in first}) == 6
    assert draw(photo, 1, 0).image.tobytes() != first[0].image.tobytes()


def test_macros_have_white_letters_with_a_black_outline():
    image, boxes = draw_macro(Image.new("RGB", (400, 300), (90, 120, 200)), 0, 0)
    for box in boxes:
        pixels = np.asarray(image.crop(box)).reshape(-1, 3)
        assert (pixels == 255).all(1).mean() > 0.1 and (pixels == 0).all(1).mean() > 0.1


def test_photos_too_small_for_text_are_refused():
    with pytest.raises(ValueError, match="20 x 100 pixels; text needs at least 48 x 48"):
        draw_macro(Image.new("RGB", (20, 100)), 0, 0)


def folder_of_photos(folder):
    folder.mkdir()
    for name, photo in PHOTOS.items():
        photo.resize((180, 120)).save(folder / f"{name}.png")
    return folder


def test_lettered_data_sets_have_boxes_that_parts_and_annotations_read(tmp_path):
    from xattn.eval.annotations import Boxes
    from xattn.photos.view import View

    photos = folder_of_photos(tmp_path / "photos")
    files = write_lettered(photos, tmp_path / "macros", seed=4, worn=True)
    assert [f.name for f in files] == [
        "000000-chelsea.jpg",
        "000001-coffee.jpg",
        "000002-rocket.jpg",
    ]
    first = [f.read_bytes() for f in files]
    write_lettered(photos, tmp_path / "macros", seed=4, worn=True)
    assert [f.read_bytes() for f in files] == first
    boxes = BoxFile(tmp_path / "macros" / "boxes.json")(str(files[0]), None)
    width, height = size = Image.open(files[0]).size
    view = View("whole", (height, width), (height, width), (0, 0, height, width), (height, width))
    annotation = Boxes(tmp_path / "macros" / "boxes.json", {0: "text"}, {1: "text"}).of(
        files[0], view
    )
    assert (annotation.mask(1)[0].numpy() == evidence_mask(boxes, size)).all()


# ---------------------------------------------------------------------- the writer


def lettered_folder(tmp_path):
    """Three macros, a photo that is all text, one without text, one without an entry, a broken one."""
    files = write_lettered(folder_of_photos(tmp_path / "photos"), tmp_path / "macros")
    table = json.loads((tmp_path / "macros" / "boxes.json").read_text())
    for name in ("bare", "covered", "unknown", "far"):
        PHOTOS["chelsea"].save(tmp_path / "macros" / f"{name}.png")
    (tmp_path / "macros" / "broken.jpg").write_bytes(files[0].read_bytes()[:100])
    table |= {"bare.png": [], "covered.png": [[0, 0, 451, 300]], "far.png": [[900, 0, 999, 9]]}
    table["broken.jpg"] = [[0, 0, 5, 5]]
    (tmp_path / "boxes.json").write_text(json.dumps(table))
    return tmp_path / "macros", tmp_path / "boxes.json"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_writer_cuts_what_it_can_and_counts_the_rest(tmp_path):
    macros, boxes = lettered_folder(tmp_path)
    parts = cut_parts(macros, boxes, tmp_path / "out", seed=3, progress=False)
    assert parts.counts == {"cut": 3, "covered": 1, "bare": 1, "skipped": 3}
    reasons = {r["photo"]: r["reason"] for r in parts.records if "reason" in r}
    assert "no entry" in reasons["unknown.png"] and "outside the image" in reasons["far.png"]
    assert "broken.jpg" in reasons["broken.jpg"]
    record = parts.records[0]
    photo = Image.open(macros / record["photo"])
    crop = Image.open(parts.crops[0])
    assert crop.tobytes() == photo.crop(record["crop"]).tobytes()  # without loss
    mask = evidence_mask(record["boxes"], photo.size)
    x0, y0, x1, y1 = record["crop"]
    assert not mask[y0:y1, x0:x1].any()
    assert record["area"] == pytest.approx((x1 - x0) * (y1 - y0) / math.prod(photo.size), abs=1e-6)
    written = json.loads((tmp_path / "out" / "parts.json").read_text())
    assert written["parts"] == parts.records and written["counts"] == parts.counts


def test_an_interrupted_run_goes_on_and_ends_as_a_whole_one(tmp_path, monkeypatch):
    macros, boxes = lettered_folder(tmp_path)
    cut_parts(macros, boxes, tmp_path / "whole", progress=False)
    calls, source = [], open_evidence(boxes)

    def stop(name, image):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return source(name, image)

    stop.description = source.description
    with pytest.raises(KeyboardInterrupt):
        cut_parts(macros, stop, tmp_path / "out", progress=False)
    assert len(json.loads((tmp_path / "out" / "parts.json").read_text())["parts"]) == 1
    again = cut_parts(macros, boxes, tmp_path / "out", progress=False)
    assert again.counts["cut"] == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    monkeypatch.setattr(cutting, "largest_crop", None)  # nothing is searched again
    cut_parts(macros, boxes, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="crops of other photos, evidence or options"):
        cut_parts(macros, boxes, tmp_path / "out", seed=1, progress=False)


@pytest.mark.parametrize(
    "change",
    [{"index": "x"}, {"index": 1e999}, {"outcome": "eaten"}, {"outcome": []}, {"photo": 5}, {"file": 5},
     {"file": "../boxes.json"}, {"file": "crops/" + "x" * 300 + ".png"}],
)  # fmt: skip
def test_a_record_that_parts_did_not_write_is_refused(tmp_path, change):
    PHOTOS["chelsea"].save(tmp_path / "a.png")
    (tmp_path / "boxes.json").write_text('{"a.png": [[0, 0, 9, 9]]}')
    run = tmp_path / "a.png", tmp_path / "boxes.json", tmp_path / "out"
    cut_parts(*run, progress=False)
    record = json.loads((tmp_path / "out" / "parts.json").read_text())
    record["parts"][0] |= change
    (tmp_path / "out" / "parts.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="output: .*parts.json is damaged"):
        cut_parts(*run, progress=False)


def test_an_entry_or_mask_that_stands_for_two_photos_is_refused(tmp_path):
    for folder, name in (("a", "coffee"), ("b", "chelsea")):
        (tmp_path / "p" / folder).mkdir(parents=True)
        PHOTOS[name].resize((60, 40)).save(tmp_path / "p" / folder / "7.png")
    Image.new("RGB", (60, 40)).save(tmp_path / "p" / "8.png")
    file, out = tmp_path / "boxes.json", tmp_path / "out"
    file.write_text('{"7.png": [[0, 0, 9, 9]], "8.png": []}')
    with pytest.raises(ValueError, match=r"entry '7.png' of .* belongs to .*a/7.png and .*b/7.png"):
        cut_parts(tmp_path / "p", file, out, progress=False)
    assert not out.exists()
    file.write_text('{"7.png": [[0, 0, 9, 9]], "b/7.png": [[0, 20, 60, 40]], "8.png": []}')
    parts = cut_parts(tmp_path / "p", file, out, progress=False)
    boxes = {r["photo"]: r["boxes"] for r in parts.records}
    assert boxes["a/7.png"] == [[0, 0, 9, 9]] and boxes["b/7.png"] == [[0, 20, 60, 40]]
    (tmp_path / "masks").mkdir()
    Image.fromarray(blank(60, 40)).save(tmp_path / "masks" / "8.png")
    open_evidence(tmp_path / "masks").check(["a/7.png", "b/7.png", "8.png"])  # 7 has no mask
    Image.fromarray(blank(60, 40)).save(tmp_path / "masks" / "7.png")
    with pytest.raises(ValueError, match=r"mask .*7.png belongs to .*a/7.png and .*b/7.png"):
        cut_parts(tmp_path / "p", tmp_path / "masks", tmp_path / "other", progress=False)


def test_any_evidence_can_be_cropped_away_by_masks_or_a_function(tmp_path):
    photos = folder_of_photos(tmp_path / "photos")
    mask = blank(180, 120)
    mask[40:80, 60:120] = True
    (tmp_path / "masks").mkdir()
    for name in PHOTOS:
        Image.fromarray(mask.astype(np.uint8) * 18).save(tmp_path / "masks" / f"{name}.png")
    by_mask = cut_parts(photos, tmp_path / "masks", tmp_path / "a", numbers=(18,), progress=False)
    by_hand = cut_parts(photos, lambda name, image: mask, tmp_path / "b", progress=False)
    assert [r["crop"] for r in by_mask.records] == [r["crop"] for r in by_hand.records]
    assert by_mask.counts["cut"] == 3 and all("boxes" not in r for r in by_mask.records)
    other = cut_parts(photos, tmp_path / "masks", tmp_path / "c", numbers=(7,), progress=False)
    assert other.counts["bare"] == 3


def test_command_line_says_what_became_of_the_photos(tmp_path, capsys):
    macros, boxes = lettered_folder(tmp_path)
    command = ["parts", str(macros), "--evidence", str(boxes), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "3 crops written" in out and "no entry for unknown.png" in err
    assert Path(tmp_path / "out" / "parts.json").is_file()
    boxes.write_text('{"other.jpg": [[0, 0, 1, 1]]}')
    assert main([*command[:-1], str(tmp_path / "none")]) == 2
    assert "all 8 photos were skipped" in capsys.readouterr().err


def test_the_example_of_the_docs_runs_as_printed(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "parts.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(text.split("```python\n")[1].split("```")[0], "parts.md", "exec"), {})
    assert Image.open("regular.png").size[0] > 100


def test_crops_of_a_killed_run_are_not_taken_for_those_of_other_evidence(tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    for i in range(3):
        Image.new("RGB", (60, 40), (40 * i, 90, 0)).save(tmp_path / "p" / f"{i}.png")
    saved = []
    real = cutting._save

    def save_once(*args):  # a killed process writes nothing more
        if not saved:
            saved.append(1)
            real(*args)

    monkeypatch.setattr(cutting, "_save", save_once)
    cut_parts(tmp_path / "p", lambda name, image: [(0, 0, 9, 9)], tmp_path / "o", progress=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "o" / "crops").iterdir())) == 3
    assert json.loads((tmp_path / "o" / "parts.json").read_text())["parts"] == []

    def other(name, image):
        return [(30, 20, 59, 39)]

    with pytest.raises(ValueError, match="holds crops of other photos"):
        cut_parts(tmp_path / "p", other, tmp_path / "o", progress=False)
