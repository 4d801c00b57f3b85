"""The study of controls: what stands in which blocks, its report, resuming, and the tasks it trains on."""

import csv
import dataclasses
import json

import pytest
import torch
from small_transformers import tiny

from xattn import load_backbone
from xattn.attention import conversion
from xattn.eval.evaluation.split import Split
from xattn.eval.studies import content_controls
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.content_controls import (
    DIGITS,
    FREE,
    RECALL,
    Bound,
    ControlStudyConfig,
    Free,
    Networks,
    digits_right,
    network,
    recall_batch,
    recall_right,
    study,
)
from xattn.eval.studies.swapped_attention import labelled_photos

NAMES = ["tench", "goldfish", "great white shark"]
CONFIG = dataclasses.replace(
    ControlStudyConfig(), photos=6, fitted=3, compared=3, explainers=("rollout", "gradcam"),
    digit_steps=1, digit_rates=(1e-3, 3e-3), recall_steps=1,
)  # fmt: skip


def untrained(net, split, **_):
    split.score(["digits"])
    return {"right": 0.5, "seconds": 1.0}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Short sequences of training and of tests, and no training on digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content_controls, "BATCH", 8)
        patch.setattr(content_controls, "TESTED", 20)
        patch.setattr(content_controls, "digits_right", untrained)
        patch.setattr(content_controls, "pixels_right", lambda: 0.967)
        yield


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny(grid=(4, 4), num_classes=3, depth=6).model, class_names=NAMES)


@pytest.fixture(scope="module")
def done(photos, backbone, tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return output, list(study(backbone, photos, output=output, config=CONFIG))


def test_every_row_is_in_the_report(done):
    output, lines = done
    for name in (*(row.name for row in FREE), *DIGITS, *RECALL, "`rollout`", "`gradcam`"):
        assert any(line.startswith(f"| {name} |") for line in lines), name
    assert any("logistic regression on pixels | 0.9" in line for line in lines)
    assert (output / "report.md").read_text().strip() == "\n".join(lines[:-1]).strip()
    for rate in ("0.001", "0.003"):
        at = lines.index(
            f"\n## Trained with a control: digits, 2 blocks of width 64, learning rate {rate}"
        )
        table = lines[at : at + 3 + len(DIGITS) + 1]
        assert sum(line.startswith("| uniform | 0.500 | 1.0 |") for line in table) == 1
        assert any("at most 0.9: kept" in line for line in table)
    uniform = next(line for line in lines if line.startswith("| uniform | 2.83"))
    assert "| 1 | 0 |" in uniform  # entropy ln 17, concentration 1, no diversity


def test_static_maps_are_measured_on_photos_they_are_not_made_from(done):
    output, lines = done
    with (output / "photos.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    for row in FREE:
        scored = [one for one in rows if one[row.name]]
        assert scored == rows[3 if row.source in ("mean", "photo") else 0 :]
        share = sum(float(one[row.name]) for one in scored) / len(scored)
        assert any(
            line.startswith(f"| {row.name} | {len(scored)} | {share:.3f} |") for line in lines
        )
    split = json.loads((output / "split.json").read_text())
    assert split["scored"]["count"] == 6 and "fitted" not in split
    assert [split["folds"][0][key]["count"] for key in ("fitted", "scored")] == [3, 3]
    with (output / "maps.csv").open(newline="") as stream:
        maps = list(csv.DictReader(stream))
    assert len(maps) == 3 * (1 + len(CONFIG.explainers) * (1 + CONFIG.permutations))
    with (output / "trained.csv").open(newline="") as stream:
        tasks = [row["task"] for row in csv.DictReader(stream)]
    assert tasks.count("recall") == len(RECALL) and tasks.count("digits, 0.003") == len(DIGITS)


def test_the_same_command_goes_on_and_other_settings_are_refused(
    done, photos, backbone, monkeypatch
):
    output, lines = done
    monkeypatch.setattr(content_controls, "network", None)
    monkeypatch.setattr(content_controls, "classes_of", None)
    assert list(study(backbone, photos, output=output, config=CONFIG)) == lines
    (output / "rollout.json").write_text("{")
    with pytest.raises(ValueError, match="output: .*rollout.json .*; delete it, to measure again"):
        list(study(backbone, photos, output=output, config=CONFIG))
    (output / "rollout.json").unlink()
    with pytest.raises(
        ValueError, match="output: .* has other settings or photos; choose a new folder"
    ):
        list(study(backbone, photos, output=output, config=dataclasses.replace(CONFIG, fitted=2)))


def test_static_maps_are_those_of_the_first_photos(photos, backbone):
    some = labelled_photos(backbone, photos, "folders")[:3]
    networks = Networks(backbone, some)
    last = networks.of(Free("static", "last four", "mean"))
    assert [made.layers for made in conversion(last.model)] == [(2, 3, 4, 5)]
    second = networks.of(Free("static", "every second", "mean"))
    assert [made.layers for made in conversion(second.model)] == [(1, 3, 5)]
    kept = [n.model.blocks[3].attn.mechanism.kept for n in (last, second)]
    assert torch.equal(*kept)
    one = networks.of(Free("static", source="photo")).model.blocks[3].attn.mechanism.kept
    assert not torch.equal(one, kept[0]) and conversion(backbone.model) is None


def test_a_bound_says_whether_it_was_kept():
    assert Bound(most=0.02).verdict(0.02) == "at most 0.02: kept"
    assert Bound(0.2, 0.38).verdict(0.4) == "0.2 to 0.38: missed"
    assert Bound(least=0.93).verdict(0.9) == "at least 0.93: missed" and Bound().verdict(1.0) == ""


def test_recall_asks_for_the_value_beside_the_key():
    images, labels = recall_batch(50, torch.Generator().manual_seed(0))
    tokens = images[:, :, 0].transpose(1, 2)
    assert images.shape == (50, 16, 1, 9) and (tokens[:, 0, 8:] == 0).all()
    for sequence, label in zip(tokens, labels, strict=True):
        asked = sequence[0, :8].argmax()
        keys = sequence[1:, :8].argmax(1)
        assert keys.sort().values.tolist() == list(range(8))
        assert sequence[1:][keys == asked, 8:].argmax() == label


@pytest.mark.parametrize("name", RECALL)
def test_networks_of_both_tasks_train_with_every_control(name):
    torch.manual_seed(0)
    net = network("recall", RECALL[name].mechanism, RECALL[name].options)
    found = recall_right(net, Split("test"), 2, 0)
    assert 0 <= found["right"] <= 0.5 and found["seconds"] > 0
    digits = network("digits", DIGITS[name].mechanism, DIGITS[name].options)
    logits = digits(torch.rand(2, 1, 8, 8))
    assert logits.shape == (2, 10)
    logits.sum().backward()


def test_without_content_values_can_only_be_counted():
    """The class depends on the order of pairs and of nothing else than which value stands by which key."""
    torch.manual_seed(0)
    net = network("recall", "none", {}).eval()
    images, _ = recall_batch(4, torch.Generator().manual_seed(0))
    moved = images[..., [0, *torch.randperm(8).add(1).tolist()]]
    assert torch.allclose(net(images)[:, 0], net(moved)[:, 0], atol=1e-5)


def test_what_does_not_fit_is_refused(backbone, photos, tmp_path):
    for changes, words in (
        ({"fitted": 6}, "photos: got 6 with a class, fitted: 6; give more photos than these"),
        ({"explainers": ("rolout",)}, "unknown explainer 'rolout'; did you mean"),
    ):
        with pytest.raises(ValueError, match=words):
            list(
                study(
                    backbone,
                    photos,
                    output=tmp_path / "x",
                    config=dataclasses.replace(CONFIG, **changes),
                )
            )
    assert not (tmp_path / "x").exists()


def test_the_command_runs_quickly(photos, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("xattn.cli.model.BackboneArgs.load", lambda self: backbone)
    command = ["controls", str(photos), "--quick", "--explainers", "rollout"]
    assert main([*command, "--output", str(tmp_path / "out")]) in (0, None)
    assert "| static, mean, last four blocks |" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "record.json").read_text())
    assert kept["config"]["fitted"] == 3


def test_digits_train_for_whole_passes():
    torch.manual_seed(0)
    found = digits_right(network("digits", "uniform", {}), Split("test"), 22, 0, lr=3e-3)
    assert 0.05 < found["right"] < 0.9 and found["seconds"] > 0
