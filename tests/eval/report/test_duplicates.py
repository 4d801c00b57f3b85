"""Duplicates that were planted among drawn pictures are found, and nothing else."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from xattn.eval.report.data_issues.duplicates import (
    Pair,
    Picture,
    compare,
    find_duplicates,
    groups,
)


def drawn(seed, size=(120, 90)):
    """A picture of smooth patches with some fine texture."""
    rng = np.random.default_rng(seed)
    coarse, fine = (rng.integers(0, 255, (n, n, 3), dtype=np.uint8) for n in (5, 24))
    parts = [Image.fromarray(v).resize(size, Image.Resampling.BICUBIC) for v in (coarse, fine)]
    return Image.blend(*parts, 0.3)


def jpeg(image, quality=40):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")


CHANGES = {
    "exact": lambda image: image.copy(),
    "copy": jpeg,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "crop": lambda image: image.crop((9, 20, 99, 85)).resize((300, 216)),
    "mirrored crop": lambda image: CHANGES["mirrored"](image.crop((30, 10, 110, 70))),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_changed_photo_is_recognised_with_its_kind_from_both_sides(kind, seed):
    one = drawn(seed)
    two = CHANGES[kind](one)
    for pair in ((one, two), (two, one)):
        found, agreement = compare(*map(Picture.of, pair))
        assert found == kind and 0.5 < agreement <= 1


def test_different_photos_of_one_layout_are_no_duplicates():
    ramp = np.linspace(40, 220, 90)[:, None, None]
    rng = np.random.default_rng(0)
    pictures = [
        Picture.of(
            Image.fromarray((ramp + rng.normal(0, 9, (90, 120, 3))).clip(0, 255).astype("u1"))
        )
        for _ in range(6)
    ]
    assert find_duplicates(pictures) == []


def test_only_what_was_planted_is_found_among_forty_photos():
    images = [drawn(seed) for seed in range(40)]
    planted = {}
    for i, kind in enumerate(CHANGES):
        planted[i, len(images)] = kind
        images.append(CHANGES[kind](images[i]))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 16))
    features = np.concatenate([features, features[:5] + 0.3 * rng.normal(size=(5, 16))])
    found = find_duplicates(list(map(Picture.of, images)), features)
    assert {(p.first, p.second): p.kind for p in found} == planted
    assert [p.agreement for p in found] == sorted((p.agreement for p in found), reverse=True)


def test_identical_files_are_found_even_if_they_show_nothing():
    blank = [Picture.of(Image.new("RGB", (20, 20), "grey"), data) for data in (b"a", b"b", b"a")]
    assert find_duplicates(blank) == [Pair(0, 2, "exact", 1.0)]


def test_progress_and_bad_arguments():
    pictures, told = [Picture.of(drawn(seed)) for seed in range(3)], []
    find_duplicates(pictures, progress=told.append)
    assert told[0] == 0 and find_duplicates(pictures[:1]) == [] == find_duplicates([])
    with pytest.raises(ValueError, match="nearest"):
        find_duplicates(pictures, nearest=0)
    with pytest.raises(ValueError, match="features"):
        find_duplicates(pictures, np.ones((2, 4)))


def test_pairs_are_joined_into_groups_in_any_order():
    pairs = [
        Pair(4, 5, "copy", 1),
        Pair(0, 1, "copy", 1),
        Pair(1, 4, "copy", 1),
        Pair(2, 9, "crop", 1),
    ]
    assert groups(pairs) == [[0, 1, 4, 5], [2, 9]]
    assert groups([]) == [] and groups([*pairs, Pair(0, 5, "copy", 1)]) == groups(pairs)
