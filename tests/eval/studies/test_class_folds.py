"""Cross-validation over classes: disjoint classes, finished folds are kept, parts add up."""

import numpy as np
import pytest
import torch
from PIL import Image

import xattn
from xattn.config import TrainConfig
from xattn.eval import evaluate, format_table, read_json
from xattn.eval.studies import class_folds as module
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.class_folds import (
    SquashedExplainer,
    class_folds,
    cross_validate,
    format_differences,
    merge,
)
from xattn.explainers import create_explainer


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return xattn.load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    found = []
    for i in range(10):
        path = root / f"class{i // 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((90, 80)).save(path)
        found.append(path)
    return found


def test_no_class_is_in_two_folds(paths):
    folds = class_folds(paths, 3, seed=1)
    assert sorted(p for f in folds for p in f) == sorted(paths)
    classes = [{p.parent for p in f} for f in folds]
    assert sum(len(c) for c in classes) == len(set().union(*classes)) == 5
    with pytest.raises(ValueError, match="folds"):
        class_folds(paths, 6)


def test_every_photo_is_scored_once_and_finished_folds_are_kept(
    backbone, paths, tmp_path, monkeypatch
):
    config = TrainConfig(epochs=1, batch_size=4, workers=0)
    arguments = dict(folds=2, max_forward_batch=4, progress=False)
    results = cross_validate(backbone, paths, config, tmp_path, **arguments)
    assert len(results.images) == 10 and results.protocol.n == 10
    assert {"ttame", "ttame, raw scores", "gradcam", "gradcam, squashed", "random"} <= set(
        results.methods
    )
    text = format_differences(results.compare("ttame", "gradcam"), "ttame", "gradcam")
    assert text.count("\n") == 1 + len(results.columns)
    monkeypatch.setattr(
        "xattn.eval.studies.class_folds.fit", lambda *a, **k: pytest.fail("trained again")
    )
    again = cross_validate(backbone, paths, config, tmp_path, **arguments)
    assert again.rows() == results.rows()
    other = TrainConfig(epochs=2, batch_size=4, workers=0)
    with pytest.raises(ValueError, match="other settings"):
        cross_validate(backbone, paths, other, tmp_path, **arguments)


def test_merged_parts_equal_one_evaluation(backbone, paths):
    explainers = {"gradcam": create_explainer("gradcam", backbone)}
    whole = evaluate(backbone, explainers, paths, max_forward_batch=4, progress=False)
    parts = [
        evaluate(backbone, explainers, p, max_forward_batch=4, progress=False)
        for p in (paths[:3], paths[3:])
    ]
    for a, b in zip(merge(parts).rows(), whole.rows(), strict=True):
        assert a.mean == pytest.approx(b.mean, rel=1e-6, abs=1e-9) and a.n == b.n


def test_the_command_keeps_the_table_and_every_value(
    backbone, paths, tmp_path, monkeypatch, capsys
):
    methods = {name: create_explainer("centre", backbone) for name in ("ttame", "gradcam")}
    found = evaluate(backbone, methods, paths[:3], max_forward_batch=4, progress=False)
    monkeypatch.setattr(module, "study_backbone", lambda *_, **options: backbone)
    monkeypatch.setattr(module, "cross_validate", lambda *_, **options: found)
    main(["class-folds", str(paths[0].parents[1]), "--output", str(tmp_path)])
    assert format_table(found, "markdown") in capsys.readouterr().out
    assert read_json(tmp_path / "results.json").rows() == found.rows()
    assert (tmp_path / "values.csv").read_text() == found.to_csv(per_image=True)
    assert (tmp_path / "results.csv").read_text().count("\n") == 1 + len(found.rows())


def test_squashing_keeps_the_ranking(backbone):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    cam = create_explainer("cam", backbone)
    raw, soft = cam.attribute(images, 3), SquashedExplainer(cam).attribute(images, 3)
    assert torch.equal(raw.flatten(1).argsort(1), soft.flatten(1).argsort(1))
    assert 0 < soft.min() and soft.max() < 1
