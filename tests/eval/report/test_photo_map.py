"""Pooled maps, their neighbours and groups, projections, and what is kept of them."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from xattn.eval.report.photo_map import cache as cache_module
from xattn.eval.report.photo_map.cache import load_or_make
from xattn.eval.report.photo_map.clusters import clusters, k_means
from xattn.eval.report.photo_map.pooled_maps import (
    describe_place,
    nearest,
    normalise_rows,
    pool_map,
    sample,
    standardise_rows,
)
from xattn.eval.report.photo_map.projection import available_methods, principal, project


def blob(row, column, side=8, width=1.0):
    """A map that is strongest at a cell."""
    y, x = np.mgrid[:side, :side] + 0.5
    scale = side / 8
    away = (y / scale - row - 0.5) ** 2 + (x / scale - column - 0.5) ** 2
    return np.exp(-away / (2 * width**2)).astype(np.float32)


# ---------------------------------------------------------------------- pooled maps


def test_maps_of_all_sizes_come_onto_one_grid():
    fine = blob(2, 5, side=64)
    cells = fine.reshape(8, 8, 8, 8).mean((1, 3)).ravel()
    assert np.allclose(pool_map(fine), cells, atol=1e-6)
    assert np.array_equal(
        pool_map(np.eye(4, dtype=np.float32)), np.kron(np.eye(4), np.ones((2, 2))).ravel()
    )
    toward = standardise_rows(np.stack([pool_map(blob(2, 5, side)) for side in (7, 14, 64)]))
    assert (toward @ toward.T).min() > 0.9


def test_a_map_and_a_scaled_one_are_the_same_and_a_constant_one_is_near_to_nothing():
    values = np.stack(
        [
            pool_map(blob(1, 1)),
            0.5 * pool_map(blob(1, 1)) + 0.3,
            pool_map(blob(6, 6)),
            np.full(64, 0.5),
        ]
    )
    toward = standardise_rows(values)
    found, distance = nearest(toward[1:], toward[0])
    assert found.tolist() == [0, 1] and distance[0] < 1e-5 and distance[1] > 0.9
    assert len(nearest(toward[:3], toward[3])[0]) == 0


def test_the_nearest_are_those_of_the_definition_and_equals_keep_their_order():
    rng = np.random.default_rng(0)
    toward = normalise_rows(np.repeat(rng.normal(size=(20, 5)), 2, 0))
    found, distance = nearest(toward, toward[7], 6)
    expected = 1 - toward @ toward[7]
    assert found.tolist() == np.argsort(expected.round(6), kind="stable")[:6].tolist()
    assert np.allclose(distance, expected[found], atol=1e-6)


def test_a_sample_is_the_same_every_time():
    once, twice = sample(1000, 10), sample(1000, 10)
    assert np.array_equal(once, twice) and len(set(once.tolist())) == 10
    assert (np.diff(once) > 0).all()


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        (0, 0, "top left corner"),
        (7, 7, "bottom right corner"),
        (7, 3.5, "bottom edge"),
        (3.5, 0, "left edge"),
        (3.5, 3.5, "the middle"),
    ],
)
def test_a_place_in_words(row, column, words):
    assert describe_place(blob(row, column).ravel()) == words


# ---------------------------------------------------------------------- projections


def test_principal_components_are_those_of_the_singular_values():
    rng = np.random.default_rng(0)
    for shape in ((40, 7), (9, 30)):
        values = rng.normal(size=shape) * np.linspace(1, 3, shape[1])
        u, s, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
        found = principal(values, 3)
        assert np.allclose(np.abs(found), np.abs(u[:, :3] * s[:3]), atol=1e-3)


@pytest.mark.parametrize(
    "values",
    [np.zeros((1, 5)), np.ones((4, 5)), np.eye(2, 1)],
    ids=["one photo", "all equal", "one number"],
)
def test_rows_without_two_components_have_finite_points(values):
    assert np.isfinite(project(values, "pca")).all()
    assert project(values, "pca").shape == (len(values), 2)


def test_umap_gets_a_seed_and_starts_from_components(monkeypatch):
    asked = {}

    class UMAP:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, rows):
            asked["shape"] = rows.shape
            return rows[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    values = np.random.default_rng(0).normal(size=(60, 90))
    assert project(values, "umap", seed=3).shape == (60, 2)
    assert asked["random_state"] == 3 and asked["shape"] == (60, 50)


def test_what_cannot_be_projected_is_refused_in_a_line():
    values = np.zeros((5, 3))
    with pytest.raises(ValueError, match=r"^method: got 'tsne'; give one of umap, pca$"):
        project(values, "tsne")
    needs = r"^method: got umap for 5 photos, but it needs at least 16; give pca$"
    with pytest.raises(ValueError, match=needs):
        project(values, "umap")
    assert available_methods(5) == ["pca"]


@pytest.mark.slow
def test_umap_keeps_groups_apart_and_gives_the_same_points_again():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 40)
    values = rng.normal(size=(3, 30))[group] * 3 + rng.normal(size=(120, 30))
    found = project(values, "umap")
    assert np.array_equal(found, project(values, "umap"))
    middles = np.stack([found[group == g].mean(0) for g in range(3)])
    own = np.linalg.norm(found - middles[group], axis=1).max()
    assert min(np.linalg.norm(middles[a] - middles[b]) for a, b in [(0, 1), (0, 2), (1, 2)]) > own


# ---------------------------------------------------------------------- groups


def test_k_means_finds_groups_that_are_apart_and_is_the_same_again():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    toward = normalise_rows(np.eye(6)[truth] + 0.05 * rng.normal(size=(200, 6)))
    found = k_means(toward, 4)
    assert len(set(zip(truth.tolist(), found.tolist(), strict=True))) == 4
    assert np.array_equal(found, k_means(toward, 4))


def scene(corner=20):
    """Sixty photos of three classes with maps near the middle; ``corner`` of the first class look into the
    bottom left corner, too."""
    rng = np.random.default_rng(0)
    values, classes = [], []
    for i in range(120):
        value = blob(*rng.uniform(2.5, 4.5, 2), width=1.2)
        if i % 3 == 0 and i // 3 < corner:
            value = np.maximum(value, blob(7, 0))
        values.append(pool_map(value))
        classes.append("abc"[i % 3])
    return np.stack(values), classes


def test_the_group_that_looks_elsewhere_comes_first():
    values, classes = scene()
    right = [i % 2 == 0 if i % 3 else None for i in range(120)]
    first, *others = clusters(values, classes, right)
    assert (first.place, first.class_name, first.share) == ("bottom left corner", "a", 1.0)
    assert set(first.rows.tolist()) == {3 * i for i in range(20)}
    assert np.allclose(first.mean, values[first.rows].mean(0), atol=1e-6)
    assert first.accuracy.n == 0 and any(one.accuracy.n for one in others)
    assert first.suspicion > 2 * others[0].suspicion


def test_without_it_no_group_is_in_that_corner():
    values, classes = scene(corner=0)
    assert all("corner" not in one.place for one in clusters(values, classes, [None] * 120))


def test_a_whole_class_that_looks_elsewhere_is_compared_with_the_other_classes():
    values, classes = scene(corner=40)
    first = clusters(values, classes, [None] * 120)[0]
    assert (first.place, first.class_name, len(first.rows)) == ("bottom left corner", "a", 40)


def test_constant_maps_and_few_photos_make_no_group():
    assert clusters(np.full((9, 64), 0.5, np.float32), ["a"] * 9, [True] * 9) == []
    values, classes = scene()
    assert clusters(values[:2], classes[:2], [None] * 2) == []
    values[3:9] = 0
    found = clusters(values, [None] * 120, [None] * 120)
    assert not set(range(3, 9)) & {row for one in found for row in one.rows.tolist()}
    with pytest.raises(ValueError, match=r"^count: got 0; give 1 or more groups$"):
        clusters(values, classes, [None] * 120, count=0)


# ---------------------------------------------------------------------- what is kept


def test_what_was_computed_is_read_again_and_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return {"points": np.eye(2), "names": np.array(["a", "b"], str)}

    for _ in range(2):
        found = load_or_make("0123", "umap", make)
        assert np.array_equal(found["points"], np.eye(2)) and found["names"].tolist() == ["a", "b"]
    assert len(made) == 1
    load_or_make("4567", "umap", make)
    assert len(made) == 2
    for file in cache_module.cache_folder().iterdir():
        file.write_bytes(file.read_bytes()[:50])
    load_or_make("0123", "umap", make)
    assert len(made) == 3


def test_old_files_go_and_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache_module, "MOST_FILES", 3)
    for i in range(6):
        load_or_make(str(i), "x", lambda: {"a": np.zeros(1)})
    assert len(list(cache_module.cache_folder().iterdir())) == 3
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_or_make("0", "x", lambda: {"a": np.ones(1)})["a"].tolist() == [1]
