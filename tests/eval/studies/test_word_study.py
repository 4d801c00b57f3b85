"""The study of words: captions, what is measured, resuming, refusals, the command; bounds with a real ViT."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_transformers import tiny

from xattn import load_backbone
from xattn.eval.studies import words
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.words import WordStudyConfig, draw_captions, study
from xattn.heads import ClassMaps, load_head

NAMES = ["cat", "dog", "fish", "vehicle"]
CATEGORIES = {"cat": 17, "dog": 18, "vehicle": 3}  # a car
CONFIG = WordStudyConfig(caption=3, width=4, heads=1, steps=2, batch_size=4, folds=2, seeds=2)
DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
SAMPLE, COCO, VIT = DATA / "imagenet-sample", DATA / "coco-masks", DATA / "vit-tiny"


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 90, (20, 20, 3), dtype=np.uint8)
        pixels[..., i % 3] += 120
        save(pixels, folder / NAMES[i % 4] / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Photo 0 has a cat on the left and a dog on the right, 1 two cars, 2 a banana, of which no word is."""
    folder = tmp_path_factory.mktemp("objects")
    masks = np.zeros((3, 20, 20), dtype=np.uint8)
    masks[0, :, :10], masks[0, :5, 10:] = CATEGORIES["cat"], CATEGORIES["dog"]
    masks[1, :4], masks[1, 16:] = CATEGORIES["vehicle"], CATEGORIES["vehicle"]
    masks[2, 5:10] = 52
    for i, mask in enumerate(masks):
        pixels = np.random.default_rng(90 + i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        save(pixels, folder / "images" / f"{i}.png")
        save(mask, folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny(grid=(3, 3), num_classes=4, depth=3).model, class_names=NAMES)


@pytest.fixture(scope="module")
def done(photos, objects, backbone, tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return output, list(study(backbone, photos, objects, None, output, CONFIG, progress=False))


def rows(lines):
    found = [line.strip("| ").split(" | ") for line in lines]
    table = {}
    for row in found:
        table.setdefault(tuple(row[:2]), row[2:])  # "gap" stands in two tables
    return table


def test_a_caption_has_the_word_of_its_photo_and_others():
    labels = torch.tensor([0, 3, 3, 1])
    drawn = draw_captions(labels.repeat(100), 4, 2, torch.Generator().manual_seed(0))
    assert (drawn.sum(1) == 2).all() and drawn[torch.arange(400), labels.repeat(100)].all()
    assert drawn[::4][:, 1:].float().mean(0).sub(1 / 3).abs().max() < 0.15
    assert draw_captions(labels, 4, 9, torch.Generator()).all()


@pytest.fixture(scope="module")
def found(done, photos, objects, backbone):
    return words.material(backbone, photos, None, objects, done[0], CONFIG, progress=False)


def areas(found):
    return [float(o.mask.double().mean()) for o in found.objects]


def test_objects_of_a_word_are_taken_together(found):
    named = [(o.photo, NAMES[o.word]) for o in found.objects]
    assert named == [(0, "cat"), (0, "dog"), (1, "vehicle")], "a banana is no word here"
    assert areas(found) == pytest.approx([0.5, 0.125, 0.4], abs=0.05)


def test_a_report_of_inner_and_final_tokens_beside_gap_and_what_sees_nothing(done, found):
    output, lines = done
    assert "16 photos of 4 words, captions of 3, 2 folds, 2 seeds; 3 objects in 2 other" in lines[0]
    table = rows(lines)
    for tap in ("block.1", "head"):
        for name in ("words", "gap"):
            assert (tap, name) in table and (tap, f"{name}, shares") in table
        assert (tap, "gap") in table and (tap, "maps of other words") in table
        assert (tap, "words, attention") in table and (tap, "words, another word") in table
    assert table["none", "by chance"][:2] == ["0.333", "0.250"]
    assert table["none", "the most frequent word"][1].startswith("0.2"), "as many photos of each"
    cat, dog, cars = areas(found)  # of a photo's objects the mean
    said = table["none", "everywhere alike"][-1].strip("| ").split()[0]
    assert float(said) == pytest.approx(((cat + dog) / 2 + cars) / 2, abs=6e-4)
    assert (output / "report.md").read_text().splitlines() == "\n".join(lines[:-1]).splitlines()


def test_what_is_measured_of_a_map_is_that_of_its_word(done, found):
    head = load_head(done[0] / "block.1-words-0", found.backbones["block.1"])
    cars = areas(found)[2]

    class Known(type(head)):
        """The map of cat is 1 on the left half and -1 elsewhere, that of vehicle 1, those of others 0."""

        def class_maps(self, tokens, class_index=None):
            maps = torch.zeros(1, 4, 4, 4)
            maps[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
            maps[:, 3] = 1.0
            return ClassMaps(maps[:, class_index[0]], torch.zeros(1, len(class_index[0])))

    head.__class__ = Known
    values = words.measure_maps(found, "block.1", head, "shares")
    assert values["pointing"][0] == 1 and values["energy"][0] > 0.95
    assert values["energy"][1] is None, "a map that is 0 everywhere has no energy"
    assert values["pointing"][2] == pytest.approx(cars)
    assert values["energy"][2] == pytest.approx(cars)
    # Of the words that a photo does not show, dog and fish have no map: that of vehicle is left for photo
    # 0, that of cat for photo 1.
    others = words.measure_maps(found, "block.1", head, "another word")
    assert others["energy"][0] == pytest.approx(areas(found)[0])
    assert others["energy"][2] == pytest.approx(cars)


def test_photos_without_an_object_of_a_word_are_refused(photos, objects, backbone, tmp_path):
    for mask in (objects / "masks").glob("*.png"):
        save(np.full((20, 20), 52, dtype=np.uint8), tmp_path / "masks" / mask.name)
    (tmp_path / "images").symlink_to(objects / "images")
    with pytest.raises(ValueError, match="^objects: no mask in .* shows any of cat, dog, fish"):
        next(study(backbone, photos, tmp_path, None, tmp_path / "out", CONFIG, progress=False))


def test_the_command_runs_quickly(photos, objects, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("xattn.cli.model.BackboneArgs.load", lambda self: backbone)
    command = ["words", str(photos), "--annotations", str(objects), "--quick"]
    command += ["--heads", "1", "--tokens", "head", "--output", str(tmp_path / "out")]
    assert main(command) in (0, None)
    assert "| head | words, shares |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not (SAMPLE.is_dir() and VIT.is_dir()), reason="needs the photos and the ViT")
def test_words_match_and_their_maps_find_objects(tmp_path):
    vit = load_backbone("vit_tiny_patch16_224", VIT / "vit_tiny_patch16_224.safetensors")
    config = WordStudyConfig(tokens=("block.7",), seeds=1)
    labels = SAMPLE / "classes.json"
    table = rows(study(vit, SAMPLE, COCO, labels, tmp_path / "out", config, progress=False))
    matched, _, seconds = table["block.7", "words"]
    assert float(matched.split()[0]) >= 0.8 and float(seconds.split()[-1]) <= 10
    above = table["block.7", "words, shares"][2]
    assert float(above.split("[")[1].split(",")[0]) > 0
    kept = json.loads((tmp_path / "out" / "block.7-words-0.json").read_text())
    assert len(kept["matched"]) == 209


def test_a_quick_study_takes_three_steps_or_fewer():
    assert WordStudyConfig().quick().steps == 3
    assert WordStudyConfig(steps=2).quick().steps == 2
