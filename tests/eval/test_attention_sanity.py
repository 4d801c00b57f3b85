"""Sanity rows that take content out of a ViT's attention: their networks, and how like maps are by chance."""

import pytest
import torch
from small_networks import made
from small_transformers import tiny

from xattn import create_explainer
from xattn.attention import conversion, record
from xattn.correlation import spearman
from xattn.eval.evaluation.results import is_baseline
from xattn.eval.leaderboard import Comparison, compare
from xattn.eval.sanity import (
    first_photos,
    likeness,
    qk_randomized_backbone,
    sanity_rows,
    static_backbone,
    without_content,
)


@pytest.fixture(scope="module")
def backbone():
    return tiny(depth=3)


@pytest.fixture(scope="module")
def photos(backbone):
    return torch.rand(5, 3, *backbone.preprocessing.input_size)


def test_entries_of_queries_and_keys_are_permuted_and_nothing_else(backbone):
    twin = qk_randomized_backbone(backbone, 3)
    pairs = zip(backbone.model.named_parameters(), twin.model.named_parameters(), strict=True)
    for (name, before), (_, after) in pairs:
        if not name.endswith("qkv.weight"):
            assert torch.equal(before, after)
            continue
        for part, (old, new) in enumerate(zip(before.chunk(3), after.chunk(3), strict=True)):
            assert torch.equal(old, new) == (part == 2)
            assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    again = qk_randomized_backbone(backbone, 3)
    assert again.fingerprint == twin.fingerprint != backbone.fingerprint


def test_the_last_third_attends_by_mean_maps(backbone, photos):
    network = static_backbone(backbone, photos)
    assert [made.layers for made in conversion(network.model)] == [(2,)]
    with record(backbone.model) as calls, torch.no_grad():
        backbone.logits(photos)
    mean = calls[2].operator.rows(torch.arange(16)).mean(0)
    assert torch.allclose(network.model.blocks[2].attn.mechanism.kept, mean, atol=1e-6)
    assert network.fingerprint != static_backbone(backbone, photos[:2]).fingerprint
    assert conversion(backbone.model) is None


def test_rows_of_a_vit_and_of_a_cnn(backbone, photos):
    rows = sanity_rows(backbone, "rollout", photos=photos)
    assert list(without_content(rows)) == ["qk_randomized_rollout", "static_rollout"]
    assert all(map(is_baseline, rows)) and not is_baseline("rollout")
    assert list(without_content(sanity_rows(backbone, "rollout"))) == ["qk_randomized_rollout"]
    cnn = made("cnn")
    assert not without_content(sanity_rows(cnn, "gradcam", photos=photos))
    assert first_photos(photos, cnn) is None
    with pytest.raises(
        ValueError, match="backbone: .* has no blocks with a 'qkv' layer; choose a ViT"
    ):
        qk_randomized_backbone(cnn)


def test_likeness_is_the_mean_correlation_beside_that_of_another_photo(backbone, photos):
    method = create_explainer("rollout", backbone)
    rows = {"itself": method, **without_content(sanity_rows(backbone, "rollout", photos=photos))}
    found = {one.row: one for one in likeness(backbone, method, rows, photos)}
    assert found["itself"].correlation == pytest.approx(1) and found["itself"].photos == 5
    maps = method.attribute(photos, 0)
    chance = spearman(maps, maps.roll(1, 0)).abs().mean()
    assert found["static_rollout"].chance == pytest.approx(float(chance), abs=1e-6)
    other = rows["qk_randomized_rollout"].attribute(photos, 0)
    expected = spearman(maps, other).abs().mean()
    assert found["qk_randomized_rollout"].correlation == pytest.approx(float(expected), abs=1e-6)
    assert "rollout: |correlation|" in str(found["static_rollout"])
    with pytest.raises(ValueError, match="photos: got 1; give at least 2"):
        likeness(backbone, method, rows, photos[:1])


def test_compare_has_the_rows_and_writes_down_how_like_maps_are(backbone, photos, tmp_path):
    said = []
    job = Comparison(backbone=backbone, explainers=("rollout",), metrics=("masking",))
    results, files = compare(job, photos, tmp_path / "out", progress=False, say=said.append)
    assert {"qk_randomized_rollout", "static_rollout"} <= set(results.methods)
    lines = (tmp_path / "out" / "sanity.csv").read_text().splitlines()
    assert lines[0] == "row,method,correlation,chance,photos" and len(lines) == 3
    assert lines[2].startswith("static_rollout,rollout,0.") and lines[2].endswith(",5")
    assert tmp_path / "out" / "sanity.csv" in files
    assert sum("with its map of another photo (5 photos)" in line for line in said) == 2
