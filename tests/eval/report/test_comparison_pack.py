"""The pack of a comparison: maps as explained, every method's numbers, and the same bytes again."""

import csv
import json
import sqlite3

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone
from PIL import Image

from xattn import load_backbone
from xattn.eval import evaluate
from xattn.eval.evaluation.store import ImageRow, Store, kept_images
from xattn.eval.leaderboard import Comparison, compare
from xattn.explainers import create_explainer
from xattn.packs.format import read_manifest
from xattn.packs.reader import load_pack
from xattn.photos.images import load_image
from xattn.photos.view import prepare

METRICS = ("masking", "road")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        coarse = np.random.default_rng(i).integers(0, 255, (7, 8, 3), dtype=np.uint8)
        (folder / "abc"[i]).mkdir()
        Image.fromarray(coarse).resize((80, 70)).save(folder / "abc"[i] / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def job(backbone, **changes):
    options = {"explainers": ("saliency", "gradcam"), "metrics": METRICS, "max_forward_batch": 4}
    return Comparison(backbone=backbone, **{**options, "seed": 3, **changes})


def run(photos, output, wanted, **options):
    said = []
    results, _ = compare(wanted, photos, output, progress=False, say=said.append, **options)
    return results, said


@pytest.fixture(scope="module")
def compared(backbone, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    results, said = run(photos, output, job(backbone))
    return output, results, said


def files(folder):
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and "sqlite" not in p.name)
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "seconds.js"}


def test_every_method_has_its_maps_as_explained(compared, backbone, photos):
    output, results, _ = compared
    found = load_pack(output / "pack")
    methods = list(results.methods)
    assert [e.method for e in found if e.image_id == "a/0.png"] == methods
    assert [e.method for e in found if e.sanity] == methods[2:] * 3
    gradcam = create_explainer("gradcam", backbone, max_forward_batch=4)
    for e in found:
        if e.method != "gradcam":
            continue
        path = photos / e.image_id
        pixels, view = prepare(load_image(path), backbone.preprocessing)
        batch = pixels[None].expand(4, -1, -1, -1)  # the shape that compare explains at
        own = gradcam.attribute(batch, torch.full((4,), e.target))[0, 0].numpy()
        assert np.allclose(e.map, own, atol=1e-6) and e.view == view
        assert e.photo().size == (80, 70)


def test_numbers_are_those_of_the_report(compared):
    output, results, _ = compared
    with (output / "images.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    entries = {(e.method, e.image_id): e for e in load_pack(output / "pack")}
    checked = 0
    for row in rows:
        if row["valid"] == "0":
            continue
        e = entries[row["method"], row["image"]]
        for column in results.columns:
            written = row[column.key]
            assert e.metrics.get(column.key) == (float(written) if written else None)
            checked += bool(written)
    assert checked > 100
    manifest = read_manifest(output / "pack")
    assert set(manifest["metrics"]) == {c.key for c in results.columns}
    column = results.columns[0]
    assert manifest["metrics"][column.key]["protocol_id"] == results.metric_id(column)


def test_a_photo_too_long_and_narrow_is_left_out_of_the_pack_by_name(backbone, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("fine.png", (80, 70)), ("strip.png", (20_000, 1))):
        Image.new("RGB", size, "grey").save(folder / name)
    wanted = job(backbone, metrics=("masking",), explainers=("saliency",))
    results, said = run(folder, tmp_path / "out", wanted)
    assert [image.id for image in results.images] == ["fine.png", "strip.png"]
    assert {e.image_id for e in load_pack(tmp_path / "out/pack")} == {"fine.png"}
    (left_out,) = (line for line in said if "left out" in line)
    assert "strip.png" in left_out and "20000 x 1 pixels" in left_out


def test_curves_begin_or_end_with_the_clean_score(backbone, photos, tmp_path):
    wanted = job(backbone, metrics=("insertion-deletion", "road"), explainers=("saliency",))
    results, _ = run(photos, tmp_path, wanted, limit=1)
    shares = read_manifest(tmp_path / "pack")["shares"]
    (p,) = (image.p for image in results.images)
    found = [e for e in load_pack(tmp_path / "pack") if e.curves]
    assert "saliency" in {e.method for e in found}
    for e in found:
        assert e.curves["deletion"][0] == pytest.approx(p, rel=1e-5)
        assert e.curves["insertion"][-1] == pytest.approx(p, rel=1e-5)
        curve = np.array(e.curves["deletion"])
        area = (curve[1:] + curve[:-1]).mean() / 2
        assert area == pytest.approx(e.metrics["deletion"], abs=1e-4)
        assert len(shares["morf"]) == len(e.curves["morf"])
        assert np.mean(e.curves["morf"]) == pytest.approx(e.metrics["ROAD-MoRF"], abs=1e-5)


def test_what_cannot_be_read_is_listed_without_a_path(compared, photos):
    output, _, said = compared
    (skipped,) = read_manifest(output / "pack")["skipped"]
    assert skipped["file_name"] == "broken.png" and "not an image" in skipped["reason"]
    assert str(photos) not in (output / "pack" / "manifest.json").read_text()
    assert any("pack" in line for line in said)


def test_a_randomised_row_names_the_weights_it_explains(compared, backbone):
    output = compared[0]
    found = {e.method: e.protocol for e in load_pack(output / "pack")}
    assert "explained_weights" not in found["gradcam"]
    assert found["randomized_saliency"]["explained_weights"] != backbone.fingerprint
    assert found["gradcam"]["fidelity"]["id"] == compared[1].protocol.id


def test_a_second_run_and_a_read_one_give_the_same_bytes(compared, backbone, photos, tmp_path):
    output = compared[0]
    first = files(output)
    assert {"pack/maps-00000.safetensors", "pack/thumbnails-00000.safetensors"} <= set(first)
    run(photos, tmp_path / "again", job(backbone))
    assert files(tmp_path / "again") == first
    run(photos, output, job(backbone))
    assert files(output) == first


def test_a_state_without_maps_is_gone_on_with(compared, backbone, photos, tmp_path):
    """Its maps are explained again; nothing is measured twice."""
    run(photos, tmp_path / "old", job(backbone, maps=0))
    assert not (tmp_path / "old" / "pack").exists()
    results, _ = run(photos, tmp_path / "old", job(backbone))
    assert results.cost["images_scored"] == 3, "the first classes of three photos"
    assert files(tmp_path / "old") == files(compared[0])


def test_only_so_many_maps_are_kept(compared, backbone, photos, tmp_path):
    run(photos, tmp_path / "out", job(backbone, maps=2, metrics=("masking",)))
    found = load_pack(tmp_path / "out" / "pack")
    assert {e.image_id for e in found} == {"a/0.png", "b/1.png"}


def test_labels_are_checked_first_and_written(backbone, photos, tmp_path):
    names = backbone.class_names
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"a": {"group": names[2]}, "b": {"group": None}}))
    wanted = job(backbone, labels=labels, metrics=("masking",))
    with pytest.raises(ValueError, match="labels: .* names no label of 2 of 4 photos"):
        run(photos, tmp_path / "out", wanted)
    assert not (tmp_path / "out" / "state.sqlite").exists()
    table = {"a/0.png": names[2], "b/1.png": None, "c/2.png": "unicorn", "broken.png": None}
    labels.write_text(json.dumps(table))
    run(photos, tmp_path / "out", wanted)
    found = [e.facts for e in load_pack(tmp_path / "out" / "pack")]
    assert [(facts.label, facts.label_name) for facts in dict.fromkeys(found)] == [
        (2, names[2]),
        (None, None),
        (None, "unicorn"),
    ]
    assert all(len(facts.top) == 5 for facts in found)


def test_a_folder_named_pack_that_is_none_is_refused_before_the_work(backbone, photos, tmp_path):
    (tmp_path / "out" / "pack").mkdir(parents=True)
    (tmp_path / "out" / "pack" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not written by xattn"):
        run(photos, tmp_path / "out", job(backbone))
    assert not (tmp_path / "out" / "state.sqlite").exists()


# ---------------------------------------------------------------------- the state


def test_a_state_keeps_maps_of_every_shape_bit_by_bit(tmp_path):
    rng = np.random.default_rng(0)
    maps = {
        "a": rng.normal(size=(3, 5)),
        "b": rng.normal(size=(1, 1)),
        "c": 1e-30 * rng.random((9, 2)),
    }
    evaluate(
        FakeBackbone(),
        fakes.rows(),
        fakes.images(6),
        max_forward_batch=4,
        progress=False,
        state=tmp_path / "state.sqlite",
        kept_maps=5,
    )
    with sqlite3.connect(tmp_path / "state.sqlite") as database:
        database.execute("DELETE FROM maps WHERE position = 0")
    database.close()
    store = Store(tmp_path / "other.sqlite", {})
    store.add_images([ImageRow(0, "0.png", 1, "bee", 0.5)])
    for name, values in maps.items():
        store.add_map(0, name, values)
    store.close()
    kept = list(kept_images(tmp_path / "state.sqlite", None, 99))
    assert [k.position for k in kept] == list(range(6))
    assert [len(k.maps) for k in kept] == [0, *[len(kept[1].maps)] * 4, 0]
    assert all(k.maps["bright"].shape == (5, 6) for k in kept[1:5])
    assert [len(k.top) for k in kept] == [5] * 5 + [0]
    (other,) = kept_images(tmp_path / "other.sqlite", None, 1)
    for name, values in maps.items():
        assert np.array_equal(other.maps[name], values.astype(np.float32))
