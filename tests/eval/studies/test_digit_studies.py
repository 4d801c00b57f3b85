"""The studies on digits: exact rollout, blocks, resuming, refusals, and their commands."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.eval.evaluation.split import Split
from xattn.eval.studies import block_digits, digits, exact_rollout
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.exact_rollout import ExactRolloutConfig

SHORT = ExactRolloutConfig(seeds=1, epochs=1, digits=4)


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    seen, held_out = digits.load_digits()
    some = (digits.Digits(*(x[:128] for x in seen)), held_out)
    for module in (digits, exact_rollout, block_digits):
        monkeypatch.setattr(module, "load_digits", lambda: some)


def test_the_split_is_fixed_and_holds_every_class():
    _, held_out = digits.load_digits()
    assert held_out.images.shape == (360, 1, 8, 8) and held_out.images.max() == 1
    assert held_out.labels.bincount().min() >= 34


def test_logits_are_sums_of_contributions_and_heads_differ():
    found = exact_rollout.measure("symmetric-4-heads", SHORT, Split("test"), 0)
    assert found["error"] < 1e-12 < 1e-4 < found["mean_head_error"]
    assert set(found["correlations"]) == set(exact_rollout.MAPS)
    found = exact_rollout.measure("cholesky-1-head", SHORT, Split("test"), 0)
    assert found["error"] < 1e-12 and found["mean_head_error"] < 1e-12


def test_deletion_leaves_a_token_out_of_every_layer():
    net = exact_rollout.network("cholesky-1-head").double()
    x = torch.randn(2, 16, 64, dtype=torch.float64)
    classes = torch.tensor([3, 5])
    found = exact_rollout.deletion(net, x, classes)

    def logit(tokens):
        for block in net.blocks:
            tokens = block(tokens)
        return (tokens.mean(1) @ net.classifier.weight.T + net.classifier.bias)[[0, 1], classes]

    kept = [j for j in range(16) if j != 7]
    torch.testing.assert_close(found[:, 7], logit(x) - logit(x[:, kept]))


def test_networks_on_digits_have_a_row_each(tmp_path):
    lines = list(exact_rollout.study(tmp_path, SHORT))
    assert any(line.startswith("| logistic regression on pixels | 0.") for line in lines)
    assert sum(line.startswith("| symmetric-4-heads |") for line in lines) == 2


def test_the_command_of_blocks_runs_quickly(tmp_path, capsys):
    assert main(["blocks", "--quick", "--output", str(tmp_path)]) in (0, None)
    shown = capsys.readouterr().out
    for name, measures in block_digits.ROWS.items():
        assert shown.count(f"\n| {name} |") == len(measures)
    found = json.loads((tmp_path / "hyperzzw-0.json").read_text())
    assert found["parameters"] <= 25_000 and found["kernel_gap"] <= 1e-6
    found = json.loads((tmp_path / "shrp-0.json").read_text())
    assert found["share"] <= 0.4 and len(found["usage"]) == 3
    for name, maps in {
        "ninformer": {"gate": 4, "gradient x gate": 4},
        "hyperzzw": {"context": 8, "score": 8},
        "shrp": {"received": 4},
    }.items():
        shown = json.loads((tmp_path / f"{name}-0.json").read_text())["shown"]
        assert len(shown["classes"]) == 4 and list(shown["maps"]) == list(maps)
        for title, side in maps.items():
            assert np.shape(shown["maps"][title]) == (4, side, side)
        if name == "shrp":
            assert np.sum(shown["maps"]["received"][0]) == pytest.approx(1, abs=1e-5)
    assert "shown" not in json.loads((tmp_path / "ninformer-no-gate-0.json").read_text())
    with Image.open(tmp_path / "maps.png") as picture:
        assert len(picture.getcolors(1 << 24)) > 200  # maps in colour, not four grey digits


def test_the_picture_says_which_class_and_which_range(tmp_path, monkeypatch):
    drawn = []
    sheet = block_digits.contact_sheet_image
    monkeypatch.setattr(
        block_digits,
        "contact_sheet_image",
        lambda rows, **how: drawn.extend(rows) or sheet(rows, **how),
    )
    ramp = torch.linspace(-1, 2, 64).unflatten(0, (4, 4, 4)).tolist()
    found = {"ninformer": {"classes": [7, 1, 2, 3], "maps": {"gradient x gate": ramp}}}
    block_digits.draw(found, tmp_path / "maps.png")
    digit, gate = drawn[0].cells
    assert (digit.title, gate.title) == ("digit 0", "gradient x gate")
    assert gate.detail == "class 7; -1 to -0.29"
