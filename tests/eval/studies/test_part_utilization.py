"""The study of visual part utilization: what it trains on, what it measures, and that it goes on."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data

from xattn.config import ProbeConfig
from xattn.eval.studies import part_utilization
from xattn.eval.studies.part_utilization import (
    FORMS,
    TESTS,
    PartStudyConfig,
    Scenario,
    accuracy,
    scenarios,
    study,
    summary,
    training_set,
)

PLAIN, TEXT, MACRO, CROP = range(4)


def counts(chosen):
    return [sum(form == k for form, _ in chosen) for k in range(len(FORMS))]


@pytest.mark.parametrize(
    ("p_conc", "p_txt", "want"),
    [
        (1.0, 0.0, [12, 0, 12, 0]),
        (1.0, 0.5, [6, 6, 12, 0]),
        (1 / 3, 1.0, [0, 4, 12, 8]),
        (2 / 3, 0.5, [4, 4, 12, 4]),
        (0.0, 0.5, [0, 0, 12, 12]),
    ],
)
def test_regular_class_is_made_of_web_photos_and_crops_as_asked(p_conc, p_txt, want):
    photos = np.random.default_rng(0).permutation(60)[:24]
    chosen = training_set(photos, Scenario(p_conc, p_txt), np.ones(60, bool))
    assert counts(chosen) == want
    bases = {i for form, i in chosen if form == MACRO}
    assert {i for form, i in chosen if form == CROP} <= bases  # crops of the very macros
    assert not bases & {i for form, i in chosen if form in (PLAIN, TEXT)}
    assert {i for _, i in chosen} <= set(photos.tolist()) and len(set(chosen)) == len(chosen)


def test_macros_without_a_crop_are_passed_over():
    has_crop = np.ones(40, bool)
    has_crop[:10] = False
    chosen = training_set(np.arange(40), Scenario(0.5, 0.0), has_crop)
    assert all(has_crop[i] for form, i in chosen if form == CROP)
    assert counts(chosen) == [10, 0, 20, 10]


def test_scenarios_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"p_conc, p_txt: got 1\.5"):
        Scenario(1.5, 0)


def test_close_shares_are_other_scenarios():
    config = PartStudyConfig(p_conc=(1 / 3, 0.33, 0.334, 0.996, 1.0), p_txt=(0.0, 0.004, 1))
    labels = [scenario.label for scenario in scenarios(config)]
    assert len(set(labels)) == len(labels) == 15
    assert Scenario(1, 0).label == Scenario(1.0, 0.0).label  # the control is found by its label


@pytest.mark.parametrize(
    ("head", "message"),
    [("abmlip", "did you mean abmilp"), ("ttame", "'ttame' is not a classifier")],
)
def test_an_unknown_head_is_refused_before_any_work(head, message, photos, tmp_path):
    config = PartStudyConfig(backbone="test_vit", head=head, folds=2)
    with pytest.raises(ValueError, match=message):
        next(study(photos, tmp_path / "out", config, None))
    assert not (tmp_path / "out").exists()


def test_accuracy_is_that_of_the_mixture_that_a_test_stands_for():
    correct = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, np.nan]])
    assert accuracy(correct, "web").tolist() == [1.0, 0.5]
    assert accuracy(correct, "web, half with text").tolist() == [0.75, 0.5]
    assert accuracy(correct, "web with text").tolist() == [0.5, 0.5]
    crops = accuracy(correct, "crops")
    assert crops[0] == 1 and np.isnan(crops[1])  # a macro without a crop does not count


def test_differences_are_paired_by_photo_and_compare_with_the_same_p_txt():
    config = PartStudyConfig(p_conc=(0.5, 1.0), p_txt=(0.0, 1.0), folds=2)
    rng = np.random.default_rng(0)
    results = {}
    for scenario in scenarios(config):
        bonus = 0.25 * (scenario.p_conc < 1) + 0.1 * scenario.p_txt
        base = np.random.default_rng(7).uniform(0, 0.5, 30)
        results[scenario.label] = {
            "correct": rng.integers(0, 2, (30, 4)).astype(float),
            "energy": base + bonus,
            "class_energy": base,
            "area": np.full(30, 0.2),
            "fold": np.repeat([0, 1], 15),
        }
    found = summary(config, scenarios(config), results)
    assert found["area"] == 20 and set(found["differences"]) == {"0.5-0.0", "0.5-1.0"}
    for cell in found["differences"].values():
        energy = cell["energy"]
        assert energy["mean"] == energy["lo"] == energy["hi"] == 25 and energy["folds"] == [25, 25]
        assert energy["fold_lo"] == energy["fold_hi"] == 25
        assert cell["class energy"]["mean"] == 0
    assert set(found["table"]["1.0-0.0"]) == {*TESTS, "energy", "class energy"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    image = Image.fromarray(data.coffee())
    for i in range(40):
        x, y = 11 * i, 7 * i
        image.crop((x, y, x + 120, y + 90)).save(folder / f"{i:02d}.png")
    return folder


def test_heads_of_other_taps_have_features_of_their_own(photos, tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    monkeypatch.setattr(
        part_utilization, "recipe", lambda seed: ProbeConfig(recipe="small", epochs=1, warmup=0)
    )
    for head in ("abmilp", "memetector", "efficient_probe"):
        config = PartStudyConfig(
            backbone="test_vit", input_size=64, head=head, hidden=(8,), folds=2,
            p_conc=(1.0,), p_txt=(0.0,),
        )  # fmt: skip
        lines = study(photos, tmp_path / "out", config, tmp_path / "vit.pth")
        assert any("fold 0:" in line for line in lines)
        lines.close()
    folder = tmp_path / "out" / "features-test_vit-64-worn"
    taps = {p.name: json.loads((p / "key.json").read_text())["taps"] for p in folder.iterdir()}
    assert len(taps) == 2 and all(name == "+".join(own) for name, own in taps.items())


def test_study_trains_tests_and_reports_and_goes_on_where_it_stopped(photos, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    config = PartStudyConfig(
        backbone="test_vit", input_size=64, head="abmilp", folds=2,
        p_conc=(1 / 3, 1.0), p_txt=(0.5,),
    )  # fmt: skip
    lines = study(photos, tmp_path / "out", config, tmp_path / "vit.pth")
    for line in lines:
        if "fold 1:" in line:  # killed after two of four heads
            lines.close()
    first = {p.name: p.read_bytes() for p in (tmp_path / "out" / "heads").iterdir()}
    assert len(first) == 2
    text = list(study(photos, tmp_path / "out", config, tmp_path / "vit.pth"))
    assert sum(line.startswith("p_conc") for line in text) == 2
    heads = {p.name: p.read_bytes() for p in (tmp_path / "out" / "heads").iterdir()}
    assert len(heads) == 4 and first.items() <= heads.items()
    found = json.loads(Path(text[-1].split(",")[0]).read_text())
    assert 0 <= found["table"][f"{1 / 3}-0.5"]["energy"]["mean"] <= 100
    assert Image.open(text[-1].split(", ")[1]).size[1] > 300
    tested = [np.load(tmp_path / "out" / "heads" / name) for name in sorted(heads)[:2]]
    seen = np.concatenate([values["photos"] for values in tested])
    assert sorted(seen.tolist()) == list(range(40))  # each photo is tested once
    np.testing.assert_allclose(tested[0]["attention"].sum((1, 2)), 1, rtol=1e-5)
    with next((tmp_path / "out").glob("*.csv")).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 40  # each photo in both settings
    own = [row for row in rows if float(row["p_conc"]) == 1]
    shown = [100 * float(row["energy"]) for row in own]
    assert np.mean(shown) == pytest.approx(found["table"]["1.0-0.5"]["energy"]["mean"], abs=0.01)
    right = [50 * (int(row["macro"]) + int(row["plain"])) for row in own]
    assert np.mean(right) == pytest.approx(found["table"]["1.0-0.5"]["web"]["mean"], abs=0.01)
    with pytest.raises(ValueError, match="other settings or photos"):
        next(study(photos, tmp_path / "out", replace(config, seed=1), None))
