"""One photo has one id in every command, and a limit takes the same photos in all of them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xattn import load_backbone
from xattn.cli import main
from xattn.eval.evaluation.stream import ImageStream
from xattn.explaining.naming import named_photos
from xattn.packs.reader import Pack
from xattn.photos.base import Photos
from xattn.photos.image_names import LONGEST, file_stem, photo_ids
from xattn.photos.sources import limit_photos, open_photos, sample_photos, split_every_nth
from xattn.runtime.stores import StorePath

SIZES = {"birds/owl": 6, "dogs": 2, "fish": 3}
MODEL = "--backbone test_efficientnet --weights random --input-size 64 --device cpu".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photos in folders of their classes, with the same names in each, and two that differ by suffix."""
    root = tmp_path_factory.mktemp("ids") / "photos"
    for number, (name, count) in enumerate(SIZES.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng([number, i]).integers(0, 256, (6, 7, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((70, 60)).save(root / name / f"{i}.png")
    Image.open(root / "fish/0.png").save(root / "fish/0.jpg")
    return root


def every(folder: Path) -> set[str]:
    """The ids by their definition."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix() for p in files}


def ids(images) -> list[str]:
    return [image_id for image_id, _ in named_photos(images)]


def test_commands_on_one_folder_name_and_choose_the_same_photos(folder, tmp_path):
    found = {}
    for name, more in (("all", []), ("few", ["--limit", "5", "--seed", "3"])):
        line = [str(folder), *more, *MODEL, "--output"]
        assert main(["explain", *line, str(tmp_path / name), "--explainers", "saliency"]) == 0
        compared = tmp_path / f"compared-{name}"
        methods = ["--explainers", "saliency", "--metrics", "complexity"]
        assert main(["compare", *line, str(compared), *methods]) == 0
        evaluated = tmp_path / f"evaluated-{name}"
        assert main(["evaluate", *line, str(evaluated), *methods, "--no-sanity"]) == 0
        images = json.loads((evaluated / "results.json").read_text())["images"]
        with (compared / "images.csv").open() as stream:
            rows = {row["image"] for row in csv.DictReader(stream)}
        packs = (Pack(tmp_path / name), Pack(compared / "pack"))
        found[name] = [{i["id"] for i in images}, rows, *(set(p.image_ids) for p in packs)]
    assert all(names == every(folder) for names in found["all"])
    assert all(names == found["few"][0] for names in found["few"]) and len(found["few"][0]) == 5
    assert found["few"][0] < every(folder)


def test_lists_single_files_and_other_spellings_of_a_folder(folder, tmp_path, monkeypatch):
    files = sorted(folder.rglob("*.png"))
    wanted = [p.relative_to(folder).as_posix() for p in files]
    assert ids(files) == ids([str(p) for p in files]) == wanted
    assert ids(files[0]) == ids([files[0]]) == [files[0].name]
    (folder.parent / "list.txt").write_text("\n".join(f"photos/{name}" for name in wanted))
    assert ids(folder.parent / "list.txt") == [f"photos/{name}" for name in wanted]
    elsewhere = tmp_path / "list.txt"
    elsewhere.write_text("\n".join(map(str, files)))
    assert ids(elsewhere) == wanted
    monkeypatch.chdir(folder / "fish")
    assert set(ids("../../photos")) == set(ids("..")) == every(folder)


def test_ids_are_unique_and_of_a_length_that_packs_hold():
    twice = [Path("a/x.jpg"), Path("b/x.jpg"), Path("a/x.jpg")]
    assert photo_ids(twice) == ["a/x.jpg", "b/x.jpg", "a/x.jpg-2"]
    long = [Path("/".join(["deep"] * 99) + f"/{end}.jpg") for end in "ab"]
    found = photo_ids([*long, Path("x.jpg")])
    assert len(set(found)) == 3 and max(map(len, found)) <= LONGEST


def test_photos_of_a_store_are_named_as_those_on_disk():
    files = [StorePath(f"s3://bucket/photos/{name}") for name in ("fish/x.jpg", "dog/x.jpg")]
    assert photo_ids(files, StorePath("s3://bucket/photos")) == ["fish/x.jpg", "dog/x.jpg"]
    assert photo_ids(files[:1]) == ["x.jpg"]


def test_a_part_of_the_photos_keeps_the_ids_of_the_whole(folder):
    photos = open_photos([folder / "fish/0.jpg", folder / "fish/1.png", folder / "dogs/0.png"])
    assert ids(photos.part([1])) == ["fish/1.png"]
    rest, held = split_every_nth(photos, 3)
    assert ids(rest) == ["fish/0.jpg", "fish/1.png"] and ids(held) == ["dogs/0.png"]


def test_images_without_files_are_numbered_alike_by_explain_and_evaluate(folder):
    backbone = load_backbone("test_efficientnet", weights=None, input_size=64)
    pixels = np.zeros((64, 64, 3), np.uint8)
    images = [
        Image.fromarray(pixels),
        Image.open(folder / "fish/1.png"),
        pixels,
        folder / "fish/1.png",
    ]
    wanted = ["image 0", "1.png", "image 2", "1.png-2"]
    stream = ImageStream(images, backbone.preprocessing)
    assert [item.id for block in stream.blocks(4) for item in block] == ids(images) == wanted


# ---------------------------------------------------------------------- a limit


class Numbered(Photos):
    """Photos without folders; streamed ones can be read in order alone."""

    def __init__(self, count: int, streamed: bool = False) -> None:
        self.count, self.streamed = count, streamed

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"row-{index}"

    load = describe = None  # type: ignore[assignment]


Numbered.__abstractmethods__ = frozenset()


def test_a_limit_takes_as_many_of_each_folder_until_one_is_empty(folder):
    photos = open_photos(folder)
    for limit in range(1, len(photos) + 1):
        counts = Counter(i.rpartition("/")[0] for i in ids(sample_photos(photos, limit, seed=1)))
        assert sum(counts.values()) == limit
        full = [n for n in SIZES if counts[n] == SIZES[n] + (n == "fish")]
        open_ones = [counts[n] for n in SIZES if n not in full]
        assert max(open_ones, default=0) - min(open_ones, default=0) <= 1


def test_a_larger_limit_goes_on_from_a_smaller_one_and_the_seed_draws(folder):
    photos = open_photos(folder)
    few, more = (ids(sample_photos(photos, limit, seed=1)) for limit in (4, 9))
    assert more[:4] == few
    assert len({tuple(ids(sample_photos(photos, 4, seed))) for seed in range(20)}) > 10


def test_a_limit_of_photos_without_folders_is_a_sample_and_of_streamed_ones_the_first():
    drawn = [sample_photos(Numbered(100), 5, seed).numbers for seed in range(200)]
    assert all(len(set(numbers)) == 5 for numbers in drawn)
    assert abs(np.mean(drawn) - 49.5) < 4  # standard error .9
    assert list(sample_photos(Numbered(100, streamed=True), 3).numbers) == [0, 1, 2]


def test_a_limit_below_one_is_refused_and_pixels_are_left_alone():
    with pytest.raises(ValueError, match="^limit: got 0; give at least 1"):
        limit_photos("photos", 0)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    assert limit_photos(pixels, 2) == (pixels, 2)


# ---------------------------------------------------------------------- files


def test_file_names_made_of_ids_differ_on_every_system():
    taken: set[str] = set()
    names = [
        "fish/x.jpg",
        "fish__x.jpg",
        "Fish/X.jpg",
        "a:b?.png",
        "a b.png",
        "é.jpg",
        "/" * 300,
        "..",
        "x" * 500,
    ]
    stems = [file_stem(name, taken) for name in names]
    assert len({stem.casefold() for stem in stems}) == len(names)
    assert all(len(f"{stem}.jpg".encode()) < 255 and stem[0] != "." for stem in stems)
    assert not set("".join(stems)) & set('/\\:*?"<>| ')
