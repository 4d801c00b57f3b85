"""Rows on held-out folds: what a row is, that each is scored alone, that all fit side by side, what they
cost, and that none saw a class that it is scored on."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_transformers import tiny
from test_class_folds import backbone, paths  # noqa: F401

import xattn
from xattn.eval import create_metric, evaluate
from xattn.eval.evaluation.results import ImageRecord, MethodResult, Results
from xattn.eval.evaluation.split import LeakError
from xattn.eval.evaluation.store import Store
from xattn.eval.metrics.base import Column
from xattn.eval.protocol import Protocol
from xattn.eval.sanity import randomized_explainer
from xattn.eval.studies import fold_rows
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.class_folds import class_folds, merge
from xattn.eval.studies.fold_rows import (
    SHOWN_COLUMNS,
    Row,
    differences_table,
    holm,
    p_values,
    passes_to_train,
    report,
    score_row,
    side_by_side,
    table_of,
)
from xattn.eval.studies.random_labels import RandomOutcomes
from xattn.explainers import create_explainer
from xattn.heads import create_head
from xattn.training import fit
from xattn.training.outcomes import cache_outcomes

pytestmark = pytest.mark.filterwarnings("ignore:.*a head needs 20 or more")
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
    text = differences_table(table, "gradcam")
    assert text.count("\n") == 2 and "minus gradcam | AOPC" in text and "| centre |" in text


def test_heads_are_trained_on_their_fold_and_a_finished_row_is_read(
    backbone, paths, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    row = Row.parse("few=evidence:recipe=outcomes,epochs=1,workers=0,components=4,photos=4,masks=4")
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
    given = ["fold-rows", str(paths[0].parents[1]), "--output", str(tmp_path), "--folds", "2"]
    quick = ["--metrics", "pixel-flipping"]
    main([*given, *quick, "--rows", "gradcam", "mid=centre"])
    text = (tmp_path / "rows.md").read_text()
    assert text in capsys.readouterr().out
    assert "| gradcam |" in text and "| minus gradcam | AOPC |" in text
    assert f"{len(paths)} images on" in text
    main([*given, *quick, "--rows", "random", "--only", "1", "--against", "ours"])
    again = (tmp_path / "rows.md").read_text()
    lines = {line.split(" | ")[0]: line.split(" | ") for line in again.splitlines()}
    assert [lines[f"| {name}"][2] for name in ("random", "gradcam", "mid")] == ["4", "10", "10"]
    assert "No row ours is finished" in again and "minus" not in again
    monkeypatch.setattr(fold_rows.FoldRows, "load", lambda self: pytest.fail("nothing to do"))
    capsys.readouterr()
    main([*given, "--against", "random"])  # from what is stored
    stored = capsys.readouterr().out
    assert "| minus random | AOPC |" in stored and stored.count("| random | ") == 1
    with open(tmp_path / "values.csv") as file:
        values = [row["AOPC"] for row in csv.DictReader(file) if row["method"] == "random"]
    assert values.count("") == 6 and len(values) == 10


def test_a_part_of_each_fold_is_scored_with_none_of_the_fold_trained_on(paths):  # noqa: F811
    data, folds = str(paths[0].parents[1]), class_folds(paths, 2)
    args = fold_rows.FoldRows(data=data, rows=("gradcam",), folds=2, per_fold=2)
    for k, (fold, scored) in enumerate(args.parts(paths).values()):
        assert fold == k and len(scored) == 2 and set(scored) < set(folds[k])
        assert set(args.training_photos(paths, fold, scored)) == set(paths) - set(folds[k])


@pytest.fixture(scope="module")
def cats(tmp_path_factory):
    """Ten pieces of a photo that scikit-image ships, two a class."""
    photo = pytest.importorskip("skimage.data").chelsea()
    root, found = tmp_path_factory.mktemp("cats"), []
    for i in range(10):
        path = root / f"class{i // 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo[12 * i : 12 * i + 150, 25 * i : 25 * i + 200]).save(path)
        found.append(path)
    return found


QUICK = "epochs=2,workers=0,batch_size=4"
SHAPLEY = f"ours=evidence:recipe=outcomes,objective=shapley,cells=3,masks=6,components=4,{QUICK}"


def test_a_run_that_is_stopped_goes_on_to_the_same_values(
    backbone, cats, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(fold_rows.FoldRows, "load", lambda self: backbone)

    def run(folder):
        args = fold_rows.FoldRows(
            data=str(cats[0].parents[1]), rows=(SHAPLEY, "gradcam"), folds=2, output=folder,
            tables=folder / "tables", metrics=("pixel-flipping", "masking"),
        )  # fmt: skip
        return *fold_rows.study(args), (folder / "values.csv").read_text()

    text, values = run(tmp_path / "whole")
    table, steps = 5 * (1 + 6 + 1), 5  # of 4 and 6 photos, a pass for each outcome and one for taps
    assert f" {table} + {steps} |" in text and "† |" in text
    left, stored = [9], []

    def stopping(*arguments, on_checkpoint, **options):
        def keep(step, head):
            on_checkpoint(step, head)
            if step == 1 and left[0] == 9:  # of the first training
                raise KeyboardInterrupt

        return fit(*arguments, on_checkpoint=keep, **options)

    def add(store, row):
        if len(stored) == left[0]:
            raise KeyboardInterrupt
        stored.append((row.method, row.position))
        return kept(store, row)

    kept = Store.add
    monkeypatch.setattr(fold_rows, "fit", stopping)
    monkeypatch.setattr(Store, "add", add)
    for left[0] in (9, 2, 7, 15):  # photos scored in all
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    left[0] = 20
    assert run(tmp_path / "stopped")[1] == values
    assert len(stored) == 20  # none twice
    for name in (fold_rows.COST, fold_rows.DONE):  # as if trained before costs were kept
        (tmp_path / "stopped" / "fold-0" / "ours" / name).unlink()
    assert run(tmp_path / "stopped")[1] == values and len(stored) == 20


def test_a_row_that_saw_a_scored_class_is_refused(backbone, paths, tmp_path):  # noqa: F811
    row = Row.parse(f"few=ttame:recipe=small,{QUICK}")
    arguments = {"metrics": METRICS, "progress": False}
    with pytest.raises(LeakError, match="few, by class, scores 1 of .* class0"):
        score_row(backbone, row, paths[1:], paths[:1], tmp_path / "class", **arguments)
    with pytest.raises(LeakError, match="few scores 1 of .* fitted on"):  # a folder is no class
        score_row(backbone, row, paths[:2], paths[:1], tmp_path / "photo", **arguments)


def test_controls_are_options_of_a_row(backbone, paths, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(ValueError, match="labels: got 'photos'; give classes or outcomes"):
        Row.parse("evidence:labels=photos")
    assert "controls" not in Row.parse("gradcam").record(backbone, 0)
    explainers, tables = [], []
    monkeypatch.setattr(
        fold_rows, "evaluate", lambda b, methods, *a, **k: explainers.append(*methods.values())
    )
    monkeypatch.setattr(fold_rows, "write_json", lambda *a: None)
    monkeypatch.setattr(
        fold_rows, "fit", lambda *a, table, **k: tables.append(table) or fit(*a, table=table, **k)
    )
    recipe = f"recipe=outcomes,masks=4,components=4,{QUICK}"
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    controls = ("trained=false", "network=random", "labels=outcomes", "labels=classes")
    monkeypatch.setitem(vars(backbone), "logits_normalized", backbone.logits_normalized)
    for text in (f"evidence:{recipe}", *(f"evidence:{recipe},{c}" for c in controls)):
        row = Row.parse(text)
        table = table_of(row, backbone, paths, tmp_path / "tables")
        arguments = {"table": table, "max_forward_batch": 4, "progress": False}
        score_row(backbone, row, paths[2:], paths[:2], tmp_path / text, **arguments)
    _, untrained, random, *_ = maps = [e.attribute(images, 3) for e in explainers]
    assert all(not torch.allclose(a, b) for i, a in enumerate(maps) for b in maps[:i])
    cam = create_head("evidence", backbone, parts=[]).eval()
    expected = create_explainer("head", backbone, cam).attribute(images, 3)
    torch.testing.assert_close(untrained, expected)
    head = xattn.load_head(tmp_path / f"evidence:{recipe}" / "run" / "head", backbone)
    expected = randomized_explainer("head", backbone, head=head).attribute(images, 3)
    torch.testing.assert_close(random, expected)
    assert "logits_normalized" not in vars(explainers[2].backbone)
    assert [t.labels for t in tables if isinstance(t, RandomOutcomes)] == ["outcomes", "classes"]
    assert {len(t) for t in tables[2:]} == {8}  # no outcome of a scored photo
    with pytest.raises(ValueError, match="labels: .* is trained on no table"):
        row = Row.parse(f"ttame:recipe=small,labels=outcomes,{QUICK}")
        score_row(backbone, row, paths[2:], paths[:2], tmp_path / "mask", progress=False)


# ---------------------------------------------------------------- the price of training


@pytest.mark.parametrize(
    "text",
    [
        "ttame:recipe=small",
        "evidence:recipe=small,objective=select:draws=3,components=4",
        "evidence:recipe=small,objective=rank:steps=3,components=4",
        "evidence:recipe=outcomes,masks=6,components=4",
        "evidence:recipe=outcomes,masks=4,crops=2,components=4",
        "evidence:recipe=outcomes,objective=labels,cells=3,masks=6,components=4",
        "evidence:recipe=outcomes,objective=greedy,cells=2,components=4",
    ],
)
def test_passes_are_those_that_the_network_makes(text, backbone, paths, tmp_path):  # noqa: F811
    row = Row.parse(f"{text},{QUICK}")
    head, config = row.untrained(backbone, 0), row.config(0)
    counted = [0]

    def count(module, inputs):
        counted[0] += len(inputs[0]) * (3 if torch.is_grad_enabled() else 1)

    hook = backbone.model.conv_stem.register_forward_pre_hook(count)
    try:
        table = table_of(row, backbone, paths[:4], tmp_path)
        in_table = counted[0]
        fit(head, backbone, paths[:4], config, table=table, progress=False)
    finally:
        hook.remove()
    found = passes_to_train(head, backbone, config, 4)
    assert sum(found.values()) == counted[0]
    if config.crops == 1:  # a table of several crops is computed with the training
        assert found["table passes"] == in_table


def test_a_dropped_mask_counts_the_patches_that_it_keeps(paths, tmp_path):  # noqa: F811
    vit = tiny(grid=(4, 4))
    options = {"fills": ["drop"], "masks": 8, "players": 4, "empty": True, "sizes": "shapley"}
    masks = cache_outcomes(vit, paths[:2], tmp_path, progress=False, **options).batch([0, 1]).masks
    kept = torch.cat([torch.zeros(2, 1), masks.sum((2, 3))], 1)  # with the empty photo
    row = Row.parse("ttame:recipe=outcomes,objective=shapley,fill=drop,masks=8,cells=4")
    found = passes_to_train(row.untrained(vit, 0), vit, row.config(0), 2)
    assert found["table passes"] == pytest.approx(float(2 + ((1 + kept) / 17).sum()))
    row = Row.parse("copy:recipe=outcomes,fill=drop,epochs=5")  # a second network, with gradients
    head = row.untrained(vit, 0)
    assert passes_to_train(head, vit, row.config(0), 2)["passes"] == 2 + 2 * 5 * 3
    assert create_explainer("head", vit, head).forwards == 2


# ---------------------------------------------------------------- differences


def drawn_table(count=40, missing=3):
    """Three methods with drawn values in the columns that are corrected together."""
    rng, columns = np.random.default_rng(5), [Column(key) for key in SHOWN_COLUMNS[0]]

    def method(shift):
        values = {c: rng.normal(shift * i, 1, count) for i, c in enumerate(columns)}
        values[columns[0]][:missing] = np.nan
        measured = {c: np.ones(count, bool) for c in columns}
        return MethodResult(1, False, np.ones(count, bool), {}, values, measured)

    images = [ImageRecord(str(i), 0, "cat", 0.5) for i in range(count)]
    methods = {"ours": method(0.0), "lime": method(0.1), "rise": method(-0.3)}
    return Results(Protocol(n=count, n_invalid=0), images, methods), columns


def test_differences_and_p_values_are_those_of_paired_resamples():
    table, columns = drawn_table()
    index = np.random.default_rng(0).integers(0, 40, (10_000, 40))
    p = p_values(table, "lime", "ours", columns)
    text = differences_table(table, "ours", columns)
    line = next(line for line in text.splitlines() if line.startswith("| lime |"))
    for i, (column, cell) in enumerate(zip(columns, line.split(" | ")[1:], strict=True)):
        pairs = table.methods["lime"].values[column] - table.methods["ours"].values[column]
        means = np.nanmean(pairs[index], 1)
        lo, hi = np.quantile(means, (0.025, 0.975))
        assert cell.startswith(f"{np.nanmean(pairs):+.4f} [{lo:+.4f}, {hi:+.4f}] ")
        rarer = min((means <= 0).sum(), (means >= 0).sum())
        assert p[i] == pytest.approx(min(1, 2 * (rarer + 1) / 10_001))
        assert f"(Holm {holm(p)[i]:.2g})" in cell
    assert "Holm" not in differences_table(table, "ours", columns[:3])


def test_holm_rejects_step_by_step():
    for seed in range(20):
        p = np.random.default_rng(seed).beta(0.3, 3, 5)
        adjusted = holm(p.tolist())
        for level in (0.01, 0.05, 0.2, 0.7):
            rejected = set()
            for rank, i in enumerate(np.argsort(p)):  # the definition
                if p[i] > level / (5 - rank):
                    break
                rejected.add(int(i))
            assert {i for i, value in enumerate(adjusted) if value <= level} == rejected


def test_a_metric_that_an_objective_trained_on_is_marked():
    table, columns = drawn_table()
    table.methods["lime"] = replace(table.methods["lime"], objective="rank")
    first = report(table, {}).split("\n\n")[0].splitlines()
    marked = {line.split(" | ")[0][2:]: line.count("†") for line in first[2:]}
    close = [table.trained_on("lime", column) for column in columns]
    assert marked == {"ours": 0, "lime": sum(close), "rise": 0} and close[:2] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_compiled_passes_give_the_same_logits(backbone, precision, error):  # noqa: F811
    import copy

    twin, images = copy.deepcopy(backbone), torch.rand(2, 3, 64, 64)
    fold_rows.with_compiled_passes(twin, precision)
    with torch.no_grad():
        got, expected = twin.logits(images), backbone.logits(images)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= error
    assert precision == "float32" or not got.equal(expected)
    assert twin.logits(images.requires_grad_()).requires_grad
