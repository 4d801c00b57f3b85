"""Trials of the evidence head: each runs and gives other maps, and its numbers are those it names."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_class_folds import backbone, paths  # noqa: F401

from xattn.eval import create_metric
from xattn.eval.annotations.objects import Annotation
from xattn.eval.studies import fold_rows, outcome_trials, trial_training
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.fold_rows import score_row, table_of
from xattn.eval.studies.outcome_losses import (
    efficiency_gap,
    shapley_weights,
    squared_error,
    weighted_correlation,
)
from xattn.eval.studies.outcome_trials import TRIALS, parse_trial, score_trial, unannotated
from xattn.eval.studies.trial_training import (
    EvidenceWithPositions,
    JoinedOutcomes,
    MeanOfHeads,
    Positions,
    TrialRun,
    guided_filter,
    more_outcomes,
    opened_job,
)
from xattn.heads import create_head
from xattn.heads.fusion import resize
from xattn.heads.maps.evidence import standardise
from xattn.training.objectives.outcomes import correlation, outcome_terms
from xattn.training.outcomes import OutcomeBatch

pytestmark = pytest.mark.filterwarnings("ignore:.*a head needs 20 or more")
QUICK = {"epochs": 2, "batch_size": 4, "workers": 0, "masks": 10, "lr": 0.02}
METRICS = (create_metric("pixel-flipping", patch=16),)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Where the trials keep their common tables."""
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def run(backbone, paths, tables, tmp_path):  # noqa: F811
    return TrialRun(
        backbone=backbone, photos=paths, train=paths[2:], folder=tmp_path / "trial", tables=tables,
        settings=QUICK, max_forward_batch=4, progress=False,
    )  # fmt: skip


def made(name, run):
    """The explainer of a trial; that of a teacher with few passes."""
    trial = TRIALS[name]
    if name == "distilled":
        trial = replace(trial, options={"lime": {"samples": 8}, "rise": {"masks": 8}})
    return trial.make(trial, run)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base_maps(backbone, paths, tables, images, tmp_path_factory):  # noqa: F811
    run = TrialRun(
        backbone=backbone, photos=paths, train=paths[2:], folder=tmp_path_factory.mktemp("base"),
        tables=tables, settings=QUICK, progress=False,
    )  # fmt: skip
    return made("base", run).attribute(images, 3)


OTHERS = [name for name in TRIALS if name != "base"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (i % 6 > 0)) for i, n in enumerate(OTHERS)]
)
def test_every_trial_gives_maps_of_its_own(name, run, images, base_maps):
    maps = made(name, run).attribute(images, 3)
    assert maps.isfinite().all() and maps.shape[:2] == (2, 1)
    assert not torch.allclose(resize(maps, (28, 28)), resize(base_maps, (28, 28)), atol=1e-4)


def test_records_tell_trials_apart(run):
    records = [json.dumps(trial.record(run), sort_keys=True) for trial in TRIALS.values()]
    assert len(set(records)) == len(TRIALS) and all(trial.about for trial in TRIALS.values())
    assert records[0] != json.dumps(TRIALS["base"].record(replace(run, seed=1)), sort_keys=True)


def test_a_trial_is_changed_by_its_text():
    label, trial = parse_trial("few=edge_aware:photos=5,radius=3,epochs=2,passes=4,components=4")
    assert (label, trial.photos, trial.options["radius"]) == ("few", 5, 3)
    assert trial.options["eps"] == 1e-3 and trial.train == {"epochs": 2}
    assert trial.shown == {"passes": 4} and trial.head == {"components": 4}
    assert parse_trial("base") == ("base", TRIALS["base"])
    with pytest.raises(ValueError, match="trials: got 'on-policy'; did you mean on_policy"):
        parse_trial("on-policy")


def test_base_is_the_row_of_its_settings_and_finished_trials_are_read(
    backbone, paths, run, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    options = ",".join(f"{key}={value}" for key, value in QUICK.items())
    row = fold_rows.Row.parse(f"base=evidence:recipe=outcomes,{options}")
    table, trial = table_of(row, backbone, paths, run.tables), TRIALS["base"]
    assert more_outcomes(run, trial.config(run), {}).folder == table.folder
    scored = score_trial("base", trial, run, paths[:2], metrics=METRICS)
    as_row = score_row(
        backbone, row, run.train, paths[:2], tmp_path / "row",
        table=table, metrics=METRICS, max_forward_batch=4, progress=False,
    )  # fmt: skip
    assert as_row.rows() == scored.rows()
    monkeypatch.setattr(trial_training, "fit_job", lambda *a: pytest.fail("trained again"))
    assert score_trial("base", trial, run, paths[:2], metrics=METRICS).rows() == scored.rows()
    with pytest.raises(ValueError, match="other settings"):
        score_trial("base", TRIALS["shapley"], run, paths[:2], metrics=METRICS)


def test_the_command_compares_trials_and_rows(backbone, paths, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(fold_rows.FoldRows, "load", lambda self: backbone)
    quick = "epochs=1,masks=4,components=4"
    folders = ["--output", str(tmp_path / "out"), "--tables", str(tmp_path / "tables")]
    data = [
        "outcome-trials",
        str(paths[0].parents[1]),
        "--held-out",
        str(paths[0].parent),
        "--folds",
        "2",
    ]
    trials = ["--trials", f"base:{quick}", f"mirrored=passes_2:{quick}", "--rows", "centre"]
    main([*data, *trials, *folders, "--metrics", "pixel-flipping"])
    text = (tmp_path / "out" / "trials.md").read_text()
    assert text in capsys.readouterr().out
    assert "| AOPC ↑ | n | invalid | forwards |" in " ".join(text.split())
    first, _, mirrored, centre = text.splitlines()[-4:]
    assert f"minus base:{quick}" in first and "AOPC" in first
    assert "mirrored | the mean of the photo's map" in mirrored and centre.startswith("| centre |")
    record = json.loads((tmp_path / "out/held-out-0/mirrored/record.json").read_text())
    assert record["shown"] == {"passes": 2} and len(record["train"]) < len(paths)


def test_photos_whose_class_has_no_annotation_are_picked(backbone, paths, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "images").symlink_to(paths[0].parents[1])
    of = {paths[0].name: {}, paths[1].name: dict.fromkeys(range(7), torch.ones(1, 64, 64))}

    def annotation(path, view):
        if path.name not in of:
            raise ValueError("annotations: none")
        return Annotation(of[path.name])

    fake = SimpleNamespace(of=annotation)
    monkeypatch.setattr(outcome_trials, "load_annotations", lambda folder, backbone: fake)
    found = {path.name for path in unannotated(backbone, tmp_path)}
    assert found == {path.name for path in paths} - {paths[1].name}


# ---------------------------------------------------------------- losses


def masks_and_maps(masks=9, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.rand(2, masks, 5, 7, generator=draw, dtype=torch.float64),
        torch.randn(2, 3, 5, 7, generator=draw, dtype=torch.float64),
        torch.randn(2, 3, masks, generator=draw, dtype=torch.float64),
    )


def test_equal_weights_give_the_plain_correlation():
    masks, maps, outcomes = masks_and_maps()
    found = weighted_correlation(maps, masks, outcomes, masks.new_ones(2, 9))
    torch.testing.assert_close(found, correlation(maps, masks, outcomes))
    plain = weighted_correlation(maps, masks, outcomes, masks.new_ones(2, 9), area=False)
    effects = torch.einsum("bmhw,bnhw->bmn", maps, masks)
    expected = torch.corrcoef(torch.stack([effects[1, 2], outcomes[1, 2]]))[0, 1]
    torch.testing.assert_close(plain[1, 2], expected)


def test_a_mask_of_weight_two_counts_as_two_masks():
    masks, maps, outcomes = masks_and_maps()
    weights = masks.new_ones(2, 9)
    weights[:, 4] = 2
    twice = [torch.cat([v, v[index]], dim) for v, index, dim in (
        (masks, (slice(None), slice(4, 5)), 1), (outcomes, (..., slice(4, 5)), 2)
    )]  # fmt: skip
    expected = correlation(maps, *twice)
    torch.testing.assert_close(weighted_correlation(maps, masks, outcomes, weights), expected)


@pytest.mark.parametrize("players", [6, 13])
def test_weights_are_those_of_the_shapley_kernel_for_all_sets_of_a_size(players):
    sizes = torch.arange(1, players, dtype=torch.float64)
    found = shapley_weights(sizes / players)
    kernel = [
        (players - 1) / (math.comb(players, s) * s * (players - s)) * math.comb(players, s)
        for s in range(1, players)
    ]
    expected = torch.tensor(kernel, dtype=torch.float64)
    torch.testing.assert_close(found, expected * (players - 1) / expected.sum())
    assert found.sum().item() == pytest.approx(players - 1)
    assert found[0].item() == pytest.approx(found[-1].item()) == found.max().item()
    assert found[len(found) // 2] < found[1] < found[0]


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_efficiency_asks_nothing_of_an_additive_map(scale):
    masks, maps, _ = masks_and_maps()
    odds = torch.einsum("bmhw,bnhw->bmn", maps, masks) + 3
    difference = maps.sum((2, 3))
    found = efficiency_gap(scale * maps, masks, odds, difference)
    torch.testing.assert_close(found, torch.zeros_like(found))
    assert (efficiency_gap(scale * (maps + 0.5), masks, odds, difference) > 0.1).all()
    assert efficiency_gap(torch.zeros_like(maps), masks, odds, difference).isfinite().all()


def test_squared_error_has_one_scale_for_all_photos():
    masks, maps, _ = masks_and_maps(masks=28)
    masks, maps = masks.float(), maps.float()
    logits = torch.einsum("bmhw,bnhw->bnm", maps, masks)
    logits = torch.cat([maps.sum((2, 3))[:, None], logits], 1)
    index = torch.tensor([[0, 2], [1, 0]])
    scores = maps.gather(1, index[..., None, None].expand(-1, -1, 5, 7))
    batch = OutcomeBatch(masks, logits, None, None, "multilabel", 3, ("a", "b"))
    found = squared_error(scores, batch, index)
    torch.testing.assert_close(found["log_odds"], torch.ones(()))
    scores[1] *= 3
    assert squared_error(scores, batch, index)["log_odds"] < 0.95
    torch.testing.assert_close(outcome_terms(scores, batch, index)["log_odds"], torch.ones(()))


# ---------------------------------------------------------------- tables and heads


def test_joined_tables_have_the_masks_of_both(run):
    config = TRIALS["base"].config(run)
    parts = [more_outcomes(run, config, settings) for settings in ({}, {"seed": 1000})]
    joined = JoinedOutcomes.of(*parts)
    assert joined.digest not in {part.digest for part in parts} and joined.masks == 20
    batch, (a, b) = joined.batch([3, 1]), (part.batch([3, 1]) for part in parts)
    assert batch.names == a.names and torch.equal(batch.logits[:, 0], a.logits[:, 0])
    assert torch.equal(batch.masks, torch.cat([a.masks, b.masks], 1))
    classes = torch.tensor([[0, 2], [1, 5]])
    both = torch.cat([a.log_odds(classes), b.log_odds(classes)], 2)
    torch.testing.assert_close(batch.log_odds(classes), both)
    assert joined.subset([1, 3]).batch([0]).masks.shape[1] == 20
    with pytest.raises(ValueError, match="have other photos"):
        JoinedOutcomes.of(parts[0], parts[1].subset([0]))


def test_the_closed_form_beats_cam_on_its_own_table(run):
    losses = []
    for name in ("cam_only", "closed_form"):
        trial = TRIALS[name]
        head = made(name, run).head
        with opened_job(trial, run, run.folder / "run") as (job, *_), torch.no_grad():
            taps, outcomes, index = job.draw(job.batches.places, 0)
            losses.append(outcome_terms(head(taps, index), outcomes, index)["loss"].item())
    assert losses[1] < losses[0] - 0.01
    assert len(json.loads((run.folder / "numbers.json").read_text())) == 2 + len(head.features)


def test_the_closed_form_finds_the_numbers_of_an_additive_network(backbone):  # noqa: F811
    """Outcomes made from the head's own maps give back the numbers that they were made with."""
    head = create_head("evidence", backbone, parts=["contrast", "features"])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        taps = backbone(torch.rand(5, 3, 64, 64, generator=draw))
        numbers = torch.randn(2 + len(head.features), generator=draw)
        head.cam.copy_(numbers[0])
        head.contrast.copy_(numbers[1])
        head.features.copy_(numbers[2:])
        masks = (torch.rand(5, 60, 28, 28, generator=draw) < 0.5).float()
        effects = torch.einsum("bkhw,bnhw->bnk", resize(head(taps), (28, 28)), masks)
        effects = 1e-2 * effects  # nearly linear where a probability is made of them
        batch = OutcomeBatch(
            masks,
            torch.cat([effects[:, :1], effects], 1),
            None,
            None,
            "multilabel",
            7,
            tuple("abcde"),
        )
        index = torch.tensor([[0, 1]] * 5)
        found = trial_training.fit_in_closed_form(head, [(taps, batch, index)])
    similarity = torch.nn.functional.cosine_similarity(found, numbers.double(), dim=0)
    assert similarity > 0.999


def test_a_guided_filter_takes_edges_from_the_photo():
    draw = torch.Generator().manual_seed(0)
    guide = torch.rand(2, 1, 31, 26, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(guided_filter(3 * guide + 1, guide, 4, 1e-9), 3 * guide + 1)
    maps = torch.rand(2, 3, 31, 26, generator=draw, dtype=torch.float64)
    even = guided_filter(maps, torch.full_like(guide, 0.3), 2, 1e-3)
    torch.testing.assert_close(even[:, :, 10, 10], smoothed(maps)[:, :, 10, 10])
    torch.testing.assert_close(
        guided_filter(torch.ones_like(maps), guide, 4, 1e-3), torch.ones_like(maps)
    )


def smoothed(maps):
    """Means of 5 x 5 pixels, twice."""
    return torch.nn.functional.avg_pool2d(torch.nn.functional.avg_pool2d(maps, 5, 1, 2), 5, 1, 2)


def test_a_mean_of_equal_heads_is_the_head(backbone, images):  # noqa: F811
    head = create_head("evidence", backbone)
    with torch.no_grad():
        taps = backbone(images)
        mean = MeanOfHeads(backbone, [head] * 3)
        torch.testing.assert_close(mean(taps, 2), standardise(head(taps, 2)))
        torch.testing.assert_close(mean.explanation(taps, 2), head.explanation(taps, 2))


def test_positions_are_rows_and_columns_from_edge_to_edge():
    x = torch.rand(2, 4, 2, 3)
    found = Positions()(x)
    torch.testing.assert_close(found[:, :4], x)
    rows, columns = found[:, 4:].unbind(1)
    torch.testing.assert_close(rows, torch.tensor([-1.0, 1.0])[:, None].expand(2, 2, 3))
    torch.testing.assert_close(columns, torch.tensor([-1.0, 0.0, 1.0]).expand(2, 2, 3))


def test_a_network_that_reads_positions_starts_as_cam(backbone, images):  # noqa: F811
    head = EvidenceWithPositions(backbone)
    with torch.no_grad():
        taps = backbone(images)
        cam = create_head("evidence", backbone, parts=[])(taps, 2)
        torch.testing.assert_close(head(taps, 2), cam)
        head.network[-1].weight.normal_()
        flat = taps.each(torch.zeros_like)
        assert head(flat, 2).std() > 0 and head.options["positions"]
