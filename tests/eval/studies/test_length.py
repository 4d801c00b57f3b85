"""The length study: its network, what is trained and tested, resuming, refusals, and the command."""

import dataclasses
import json

import pytest
import torch

from xattn.eval.evaluation.split import Split
from xattn.eval.studies import context_length
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.context_length import study
from xattn.eval.studies.length.network import (
    FIXED,
    LengthStudyConfig,
    Recall,
    Regression,
    ShortConvolution,
    held_out,
    made,
    scores,
    train,
    training_seeds,
)

CONFIG = dataclasses.replace(
    LengthStudyConfig().quick(),
    mechanisms=("softmax", "hedgehog:feature=softmax"),
    longest={"hedgehog": 32},
    learning_rates=(0.01, 0.03),
    seeds=2,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return output, list(study(output, CONFIG, progress=False))


def test_a_report_of_every_mechanism_at_every_length(done):
    output, lines = done
    rows = [line for line in lines if line.startswith("| `softmax` |")]
    assert len(rows) == 3 and all(row.count("[") == 2 for row in rows)
    short = [line for line in lines if line.startswith("| `hedgehog:feature=softmax` |")]
    assert len(short) == 3 and all(row.endswith("| - |") for row in short)
    assert "| chance | 1.6 | 1.6 |" in lines
    assert any(line.startswith("| ridge |") for line in lines)
    figures = (output / "figures.csv").read_text().splitlines()
    assert len(figures) == 1 + 3 * 2 * (2 + 1) + 2 * 2 + 2 * 2
    assert (output / "length.png").is_file() and (output / "report.md").is_file()


def test_both_forms_of_recall_are_the_same_where_it_was_trained(done):
    kept = json.loads((done[0] / "recall" / "softmax" / "seed-0" / "32.json").read_text())
    assert kept["fixed"] == kept["growing"]


def test_a_stopped_study_goes_on_and_gives_the_same_report(done, monkeypatch):
    output, _ = done
    report = (output / "figures.csv").read_bytes()
    folder = output / "recall" / "softmax" / "seed-1"
    (folder / "training.json").unlink()
    for length in CONFIG.lengths:
        (folder / f"{length}.json").unlink()
    (output / "regression" / "softmax" / "seed-0" / "64.json").unlink()
    titles = []
    monkeypatch.setattr(context_length, "train", lambda *a: (titles.append(a[5]), train(*a))[1])
    torch.manual_seed(5)
    list(study(output, CONFIG, progress=False))
    assert titles == ["softmax, recall, seed 1"]
    assert (output / "figures.csv").read_bytes() == report
    more = dataclasses.replace(CONFIG, seeds=3, tasks=("regression",), lengths=(32, 128))
    list(study(output, more, progress=False))
    assert len(titles) == 3  # the third seed of both
    with pytest.raises(ValueError, match="output: .* has other settings"):
        list(study(output, dataclasses.replace(CONFIG, steps=5), progress=False))
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="output: .*model.safetensors is damaged .* train again"):
        list(study(output, CONFIG, progress=False))


def test_the_convolution_is_that_of_conv1d_and_causal():
    layer, x = ShortConvolution(2, 3), torch.randn(4, 2, 9, 3)
    weight = layer.weight.flip(0).reshape(3, 6).T[:, None]
    padded = torch.nn.functional.pad(x.mT.flatten(1, 2), (2, 0))
    expected = torch.nn.functional.conv1d(padded, weight, groups=6).unflatten(1, (2, 3)).mT
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:, :, :1]), x[:, :, :1] * layer.weight[0])


@pytest.mark.parametrize("mechanism", LengthStudyConfig().mechanisms)
@pytest.mark.parametrize(
    "task", [Recall(2, 32), Regression(tested=100)], ids=lambda task: task.name
)
def test_no_answer_depends_on_what_comes_later(mechanism, task):
    network = made(mechanism, task, 0, CONFIG)
    batch = task.draw(48, 2, 0)
    at = batch.asked.nonzero()[0, 1] + 1  # behind the first question
    changed = batch.tokens.clone()
    changed[:, at:] = task.draw(48, 2, 1).tokens[:, at:]
    first = batch._replace(asked=torch.zeros_like(batch.asked))
    first.asked[:, at - 1] = True
    with torch.no_grad():
        torch.testing.assert_close(network(first), network(first._replace(tokens=changed)))


def test_training_learns_and_is_repeatable():
    task = Regression(width=1, noise=0.0)
    config = dataclasses.replace(CONFIG, steps=60, batch_size=8, width=32, test_tokens=2048)
    found = []
    for _ in range(2):
        network = made("softmax", task, 3, config)
        train(network, task, 0.03, training_seeds(3, config), config, progress=False)
        found.append(scores(network, task, held_out(task, "test", 32, config, Split("test"))))
    assert torch.equal(*found) and float(found[0].mean()) < 0.5


def test_a_training_that_runs_out_of_time_says_so(tmp_path):
    config = dataclasses.replace(
        CONFIG, mechanisms=("softmax",), tasks=("recall",), minutes=1e-9, learning_rates=(0.01,)
    )
    lines = list(study(tmp_path, config, progress=False))
    assert any("| 1 of 4, out of time |" in line for line in lines)


def test_held_out_sequences_are_no_training_sequences():
    task = Recall(2, 32)
    test = held_out(task, "test", 32, CONFIG, Split("test"), FIXED)
    assert not torch.equal(
        test.tokens, held_out(task, "validation", 32, CONFIG, Split("test")).tokens
    )


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    for changes, words in (
        ({"mechanisms": ("softmacks",)}, "unknown attention 'softmacks'; did you mean"),
        ({"mechanisms": ("agent",)}, "mechanisms: agent has no causal form; choose others"),
        ({"mechanisms": ("softmax:p=1",)}, "p"),
        ({"lengths": (8,), "pairs": 3}, "pairs: got 3 for 8 tokens"),
        ({"lengths": (2**15,)}, "pairs: got 2048 of 1024 keys"),
    ):
        with pytest.raises(ValueError, match=words):
            config = dataclasses.replace(CONFIG, **changes)
            list(study(tmp_path / "x", config, progress=False))
    assert not (tmp_path / "x").exists()


def test_the_command_runs_quickly(tmp_path, capsys):
    assert main(["length", "--quick", "--output", str(tmp_path / "out")]) in (0, None)
    printed = capsys.readouterr().out
    for mechanism in LengthStudyConfig().mechanisms:
        assert printed.count(f"| `{mechanism}` |") == 5  # three tables, two lines of training
