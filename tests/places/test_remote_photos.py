"""Photos in an object store: listed, named and explained as those of a local folder."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from fsspec.implementations.memory import MemoryFileSystem
from object_stores import fresh_file_systems, upload
from PIL import Image

import xattn
import xattn.explaining.photos
from xattn.backbone import Preprocessing
from xattn.cli import main
from xattn.photos.images import list_images, load_image
from xattn.photos.sources import open_photos
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.stores import StoreError, file_system
from xattn.training.data import TrainImages, load_batches

MODEL = "-b test_resnet --weights random --device cpu --explainers gradcam".split()


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return xattn.load_backbone(timm.create_model("test_resnet", num_classes=5), input_size=64)


@pytest.fixture
def remote(photos, bucket):
    return upload(photos, f"{bucket}/photos")


def test_a_folder_is_listed_as_a_local_one(photos, remote):
    local = [p.relative_to(photos).as_posix() for p in list_images(photos)]
    found = list_images(remote)
    assert [str(p).removeprefix(f"{remote}/") for p in found] == local and len(local) == 4
    assert all(p.size == (photos / n).stat().st_size for p, n in zip(found, local, strict=True))
    assert np.array_equal(load_image(found[0]), load_image(photos / local[0]))
    assert np.array_equal(load_image(f"{remote}/b.png"), load_image(photos / "b.png"))


def test_explanations_have_the_ids_file_names_and_classes_of_local_photos(photos, remote, backbone):
    def explained(images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no folder is a class of this network
            found = xattn.explain(images, backbone, explainer="gradcam", labels="folders")
        return [(e.id, e.file_name, e.facts.label_name, e.map.tolist()) for e in found]

    photos_of_a_class = photos / "a"
    assert explained(f"{remote}/a") == explained(photos_of_a_class)
    assert explained(f"{remote}/b.png") == explained(photos / "b.png")


def test_lists_name_photos_beside_them_and_in_stores(photos, remote, bucket, tmp_path, backbone):
    lines = "# mine\n\na/1.jpg 3\n./b.png\n" + f"{remote}/a-b/2.png\t7\n"
    (tmp_path / "list.txt").write_text(lines)
    upload(tmp_path, f"{bucket}/photos")
    urls = [f"{remote}/{name}" for name in ("a/1.jpg", "b.png", "a-b/2.png")]
    assert [str(p) for p in list_images(f"{remote}/list.txt")] == urls
    (photos / "list.txt").write_text(lines)
    found = list_images(photos / "list.txt")
    assert [str(p) for p in found] == [str(photos / "a/1.jpg"), str(photos / "b.png"), urls[2]]
    mixed = xattn.explain([str(photos / "b.png"), urls[0]], backbone, explainer="gradcam")
    assert [e.file_name for e in mixed] == ["b.png", "1.jpg"]


def test_labels_may_lie_in_a_store(remote, bucket, tmp_path, backbone):
    (tmp_path / "labels.csv").write_text("1.jpg,3\n4.PNG,0\n")
    (tmp_path / "labels.json").write_text(json.dumps({"1.jpg": 3, "4.PNG": 0}))
    upload(tmp_path, bucket)
    for name in ("labels.csv", "labels.json"):
        found = xattn.explain(
            f"{remote}/a", backbone, explainer="gradcam", labels=f"{bucket}/{name}"
        )
        assert [e.facts.label for e in found] == [3, 0]


def test_figures_are_those_of_local_photos(photos, remote, backbone):
    def table(images):
        found = xattn.evaluate(backbone, {"cam": "gradcam"}, images, progress=False)
        return [i.id for i in found.images], found.methods["cam"].values

    local, far = table(str(photos)), table(remote)
    assert far[0] == local[0] and far[0][-1] == "b.png"
    assert all(np.array_equal(far[1][k], local[1][k], equal_nan=True) for k in local[1])


def test_photos_are_read_when_their_turn_comes(remote, fetched):
    photos = open_photos(remote)
    described = photos.describe()
    assert fetched == [] and described["count"] == 4
    photos.load(0)
    assert [name for name, _ in fetched] == ["1.jpg"]
    upload_again = list_images(remote)[0].write
    upload_again(b"another photo")
    assert open_photos(remote).describe() != described  # a run is not resumed on other photos


def test_photos_that_cannot_be_read_are_skipped_and_named(remote, bucket, backbone):
    list_images(remote)[0].write(b"no photo")
    with pytest.warns(UserWarning, match=r"skipped 1 of 4 images: image: 1\.jpg is not an"):
        found = xattn.explain(remote, backbone, explainer="gradcam")
    assert len(found) == 3
    with pytest.raises(
        FileNotFoundError, match=r"^images: no file or folder memory://.*/none; give"
    ):
        xattn.explain(f"{bucket}/none", backbone, explainer="gradcam")
    with pytest.raises(
        FileNotFoundError, match=r"^image: no file memory://.*/none\.png; check the URL$"
    ):
        load_image(f"{bucket}/none.png")


def test_a_store_that_stops_answering_ends_the_work_and_what_was_explained_is_kept(
    photos, backbone, monkeypatch, impatient, tmp_path
):
    url = upload(photos, "memory://stops/photos")
    read, failing = MemoryFileSystem.cat_file, []

    def sometimes(self, path, **options):
        if failing and path.endswith("b.png"):
            raise ConnectionResetError("the line is cut")
        return read(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", sometimes)
    failing.append(True)
    with pytest.warns(RuntimeWarning, match="contains what was explained so far"):
        with pytest.raises(StoreError, match=r"^memory://stops does not answer \(the line is cut"):
            xattn.explain(
                url, backbone, explainer="gradcam", batch_size=1, output=tmp_path / "pack"
            )
    assert len(xattn.load_pack(tmp_path / "pack")) == 3
    with pytest.raises(StoreError, match="does not answer"):
        xattn.evaluate(backbone, {"cam": "gradcam"}, url, progress=False)


def test_a_server_that_is_closed_in_the_middle_is_named_and_nothing_is_half_written(
    photos, backbone, store, impatient, monkeypatch, tmp_path
):
    monkeypatch.setattr("xattn.photos.images._RECENT", LRUCache(0))
    server = type(store)(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    batch = xattn.explaining.photos.explain_batch

    def closing(*arguments):
        server.stop()
        return batch(*arguments)

    for i in range(8):
        (photos / f"more-{i}.png").write_bytes((photos / "b.png").read_bytes())
    with fresh_file_systems():
        file_system("s3").mkdir("closed")
        url = upload(photos, "s3://closed/photos")
        monkeypatch.setattr("xattn.explaining.photos.explain_batch", closing)
        options = {"explainer": "gradcam", "batch_size": 1, "output": tmp_path / "pack"}
        with pytest.warns(RuntimeWarning, match="contains what was explained so far"):
            with pytest.raises(StoreError, match=r"^s3://closed does not answer .*; 2 attempts in"):
                xattn.explain(url, backbone, **options)
    found = xattn.load_pack(tmp_path / "pack")
    assert 1 <= len(found) < 12 and found[0].photo().size
    assert [p.name for p in tmp_path.iterdir() if "pack" in p.name] == ["pack"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_stops_answering_ends_a_training(workers, photos, impatient, monkeypatch):
    images = TrainImages(upload(photos, "memory://trains/photos"), Preprocessing(), seed=0)

    def failing(self, path, **options):
        raise ConnectionResetError("the line is cut")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    with pytest.raises(
        StoreError, match=r"^memory://trains does not answer \(the line is cut; 2 att"
    ):
        list(load_batches(images, [[(0, 0), (0, 1)]], workers))


def test_shards_of_many_photos_are_a_pack_of_what_was_explained(
    photos, impatient, monkeypatch, tmp_path, capsys
):
    url, read = upload(photos, "memory://shards/photos"), MemoryFileSystem.cat_file

    def sometimes(self, path, **options):
        if path.endswith("b.png"):
            raise ConnectionResetError("the line is cut")
        return read(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", sometimes)
    words = [url, *MODEL, "--batch-size", "1", "--output"]
    assert main(["explain", *words, str(tmp_path / "pack")]) == 2
    assert "error: memory://shards does not answer (the line is cut" in capsys.readouterr().err
    found = xattn.load_pack(tmp_path / "pack")
    assert [e.file_name for e in found] == ["1.jpg", "4.PNG", "2.png"]
    assert found[0].photo().size == (50, 40)


def test_commands_take_urls(remote, tmp_path, capsys):
    for command, written in (("explain", "manifest.json"), ("evaluate", "results.json")):
        output = tmp_path / command
        assert (
            main([command, f"{remote}/a", f"{remote}/b.png", *MODEL, "--output", str(output)]) == 0
        )
        assert (output / written).is_file()
    output = tmp_path / "compared"
    words = [remote, *MODEL, "--metrics", "masking", "--output", str(output), "--labels", "folders"]
    assert main(["compare", *words]) == 0
    assert len(xattn.load_pack(output / "pack")) >= 4
    capsys.readouterr()
    assert main(["explain", f"{remote}/clip.mp4"]) == 2
    assert (
        "is a clip in an object store; copy it to a local folder first" in capsys.readouterr().err
    )
    assert main(["explain", f"{remote}/none.jpg"]) == 2
    assert "images: no file or folder memory://" in capsys.readouterr().err


def test_heads_and_probes_train_on_urls(bucket, tmp_path):
    for i in range(20):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (i * 9, 90, 200 - i)).save(path)
    url = upload(tmp_path / "photos", f"{bucket}/photos")
    model = "-b test_resnet --weights random --device cpu --input-size 64".split()
    words = [*model, "--epochs", "1", "--batch-size", "8", "--workers", "1"]
    train = ["train", url, *words, "--head", "ttame", "--sample", "2"]
    assert main([*train, "--output", str(tmp_path / "head")]) == 0
    assert (tmp_path / "head/head/config.json").is_file()
    words = [
        *model,
        "--taps",
        "stage.-2",
        "--heads",
        "gap",
        "--epochs",
        "1",
        "--output",
        str(tmp_path / "probe"),
    ]
    assert main(["probe", url, *words]) == 0
    assert (tmp_path / "probe/results.json").is_file()
