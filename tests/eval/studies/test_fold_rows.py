"""Rows on held-out folds: what a row is, that each is scored alone, and that all fit side by side."""

import pytest
import torch
from test_class_folds import backbone, paths  # noqa: F401

import xattn
from xattn.eval import create_metric, evaluate
from xattn.eval.studies import fold_rows
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.class_folds import class_folds, merge
from xattn.eval.studies.fold_rows import Row, differences, score_row, side_by_side, table_of
from xattn.explainers import create_explainer

METRICS = (create_metric("pixel-flipping", patch=16),)


def test_a_row_splits_its_options_between_training_and_head():
    row = Row.parse("few photos=evidence:recipe=outcomes,photos=50,components=4,epochs=2")
    assert (row.label, row.name, row.photos) == ("few photos", "evidence", 50)
    assert row.train == {"recipe": "outcomes", "epochs": 2} and row.options == {"components": 4}
    row = Row.parse("rise:masks=40")
    assert (row.label, row.name, row.options) == ("rise:masks=40", "rise", {"masks": 40})


def test_rows_scored_alone_are_those_scored_together(backbone, paths, tmp_path):  # noqa: F811
    folds = class_folds(paths, 2)
    names = ("gradcam", "centre")
    tables = []
    for k, held_out in enumerate(folds):
        scored = [
            score_row(
                backbone, Row.parse(name), [], held_out, tmp_path / str(k) / name,
                metrics=METRICS, max_forward_batch=4, seed=k, progress=False,
            )
            for name in names
        ]  # fmt: skip
        tables.append(side_by_side(scored))
    table = merge(tables)
    explainers = {name: create_explainer(name, backbone, max_forward_batch=4) for name in names}
    images = [path for fold in folds for path in fold]
    together = evaluate(
        backbone, explainers, images, metrics=METRICS, max_forward_batch=4, progress=False
    )
    for alone, row in zip(table.rows(), together.rows(), strict=True):
        assert alone[:3] == row[:3] and alone.mean == pytest.approx(row.mean, abs=1e-5)
    text = differences(table, "gradcam", ["centre"])
    assert text.count("\n") == 1 + len(table.columns) and "- centre" in text


def test_heads_are_trained_on_their_fold_and_a_finished_row_is_read(
    backbone, paths, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    row = Row.parse("few=evidence:recipe=outcomes,epochs=1,workers=0,components=4,photos=4,masks=4")
    with pytest.warns(UserWarning, match="10 photos could be read"):
        table = table_of(row, backbone, paths, tmp_path / "tables")
    assert table_of(Row.parse("gradcam"), backbone, paths, tmp_path) is None
    held_out = class_folds(paths, 2)[0]
    train = sorted(set(paths) - set(held_out))
    arguments = dict(metrics=METRICS, max_forward_batch=4, progress=False, table=table)
    scored = score_row(backbone, row, train, held_out, tmp_path / "row", **arguments)
    head = xattn.load_head(tmp_path / "row" / "run" / "head", backbone)
    assert head.summary["images"] == 4 and list(scored.methods) == ["few"]
    monkeypatch.setattr(fold_rows, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = score_row(backbone, row, train, held_out, tmp_path / "row", **arguments)
    assert again.rows() == scored.rows()
    with pytest.raises(ValueError, match="other settings"):
        score_row(backbone, row, train[1:], held_out, tmp_path / "row", **arguments)


def test_rows_of_other_photos_do_not_stand_side_by_side(backbone, paths, tmp_path):  # noqa: F811
    rows = [
        score_row(
            backbone, Row.parse("centre"), [], part, tmp_path / str(len(part)),
            metrics=METRICS, max_forward_batch=4, progress=False,
        )
        for part in (paths[:3], paths[:4])
    ]  # fmt: skip
    with pytest.raises(ValueError, match="photos or protocols differ"):
        side_by_side(rows)


def test_the_command_prints_and_keeps_means_and_differences(
    backbone, paths, tmp_path, monkeypatch, capsys  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(fold_rows.FoldRows, "load", lambda self: backbone)
    output = ["--output", str(tmp_path), "--rows", "gradcam", "mid=centre", "--folds", "2"]
    main(["fold-rows", str(paths[0].parents[1]), *output, "--metrics", "pixel-flipping"])
    text = (tmp_path / "rows.md").read_text()
    assert text in capsys.readouterr().out
    assert "| gradcam |" in text and "| mid " in text and "gradcam minus the others" in text
    assert text.splitlines()[-1].startswith("| AOPC |")
    assert f"{len(paths)} images on" in text


def test_a_part_of_each_fold_is_scored_with_none_of_the_fold_trained_on(paths):  # noqa: F811
    data, folds = str(paths[0].parents[1]), class_folds(paths, 2)
    args = fold_rows.FoldRows(data=data, rows=("gradcam",), folds=2, per_fold=2)
    for k, (fold, scored) in enumerate(args.parts(paths).values()):
        assert fold == k and len(scored) == 2 and set(scored) < set(folds[k])
        assert set(args.training_photos(paths, fold, scored)) == set(paths) - set(folds[k])


@pytest.mark.slow
def test_compiled_passes_give_the_same_logits(backbone):  # noqa: F811
    import copy

    twin, images = copy.deepcopy(backbone), torch.rand(2, 3, 64, 64)
    fold_rows.with_compiled_passes(twin)
    with torch.no_grad():
        torch.testing.assert_close(twin.logits(images), backbone.logits(images))
    assert twin.logits(images.requires_grad_()).requires_grad
