"""Coarse groups: the folds are even, the probe is a minimum, the heads explain the probed model."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from xattn import TrainConfig, load_backbone
from xattn.eval.studies import coarse_groups as module
from xattn.eval.studies.coarse_groups import (
    Groups,
    compare_on_groups,
    fit_probe,
    photos_by_group,
    stratified_folds,
)


def test_folds_split_every_group_evenly_and_hold_out_each_photo_once():
    groups = ["dog"] * 23 + ["cat"] * 6 + ["fish"] * 4 + ["bird"] * 17
    folds = stratified_folds(groups, 5, seed=3)
    assert sorted(i for part in folds for i in part) == list(range(50))
    assert {len(part) for part in folds} == {10}
    for name, count in Counter(groups).items():
        held = [sum(groups[i] == name for i in part) for part in folds]
        assert max(held) - min(held) <= 1 and sum(held) == count
    assert folds == stratified_folds(groups, 5, seed=3) != stratified_folds(groups, 5, seed=4)


def test_the_probe_is_the_minimum_on_features_of_any_scale():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 4, generator=generator) + labels[:, None]
    scaled = features * torch.tensor([1.0, 100.0, 0.01, 3.0]) + 7
    probe, same = fit_probe(features, labels, 3), fit_probe(scaled, labels, 3)
    assert torch.allclose(probe(features), same(scaled), atol=1e-2)
    # the gradient of loss and decay on standardised features vanishes
    std = features.std(0)
    x = (features - features.mean(0)) / std
    weight = (probe.weight.detach() * std).requires_grad_()
    bias = (probe.bias.detach() + probe.weight.detach() @ features.mean(0)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight.t() + bias, labels)
    (loss + 0.01 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4
    assert (probe(features).argmax(1) == labels).double().mean() > 0.6


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    classes = {}
    for i in range(24):
        name, group = f"n{i:02}", ["dog", "cat", None][i % 3]
        (folder / name).mkdir(parents=True)
        colour = {"dog": (200, 40, 40), "cat": (40, 40, 200), None: (0, 200, 0)}[group]
        noise = np.random.default_rng(i).integers(0, 50, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise + np.array(colour, np.uint8)).save(folder / name / "a.png")
        classes[name] = {"group": group}
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def test_photos_without_a_group_are_left_out(photos):
    assert Counter(photos_by_group(photos).values()) == {"dog": 8, "cat": 8}


def test_heads_of_all_variants_are_trained_on_four_fifths_and_scored_on_the_other(
    photos, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    encoder = load_backbone("test_resnet", weights=None, input_size=64)
    used, probed = [], []
    score, fit_on = module.train_and_score, module.fit_probe

    def spy(backbone, train, held_out, *args, **options):
        used.append((backbone, set(train), set(held_out)))
        return score(backbone, train, held_out, *args, **options)

    def probe(features, *args):
        probed.append(len(features))
        return fit_on(features, *args)

    monkeypatch.setattr(module, "train_and_score", spy)
    monkeypatch.setattr(module, "fit_probe", probe)
    monkeypatch.setattr(module, "load_backbone", fake_load(encoder))
    args = Groups(
        data=photos,
        output=tmp_path / "out",
        only=(0, 1),
        variants=("mask_policy=raw_normalize", "mask_policy=normalized"),
        train=TrainConfig("small", epochs=1, workers=0),
    )
    results, about = compare_on_groups(args, progress=False)
    assert about.startswith("2 groups: cat 8, dog 8. Probe: accuracy 1.000 on the 7 photos")
    assert len(results.images) == 7 and not used[0][2] & used[1][2]
    assert probed == [len(train) for _, train, _ in used]
    for backbone, train, held_out in used:
        assert not train & held_out and len(train | held_out) == 16
        assert backbone.class_names == ["cat", "dog"]
        assert backbone.preprocessing == encoder.preprocessing
    rows = ["ttame mask_policy=raw_normalize", "ttame mask_policy=normalized", "gradcam"]
    assert set(rows) < set(results.methods)
    assert "ttame mask_policy=normalized, mask" in results.methods
    runs = {p.parent.name for p in (tmp_path / "out").rglob("head") if p.is_dir()}
    assert runs == {"run-ttame mask_policy=raw_normalize", "run-ttame mask_policy=normalized"}


def fake_load(encoder):
    def load(name_or_module, *args, **options):
        if isinstance(name_or_module, str):
            return encoder
        return load_backbone(name_or_module, *args, **options)

    return load
