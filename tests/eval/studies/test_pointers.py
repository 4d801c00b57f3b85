"""The study of pointers on points: rows, resuming, refusals and the command."""

import dataclasses
import json

import pytest
import torch

from xattn.eval.studies import pointers
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.models.point_sets import draw, tour_length
from xattn.eval.studies.pointers import PointStudyConfig

SHORT = PointStudyConfig(seeds=1, samples=16, batch_size=4, tests=4, width=8)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return output, list(pointers.study(output, SHORT))


def test_a_report_of_every_task(done):
    output, lines = done
    for start, count in (("| hull-set | ", 5), ("| hull-lstm | ", 5), ("| tsp-lstm | ", 2)):
        assert sum(line.startswith(start) and line.count("|") > 5 for line in lines) == count
    assert any(line.startswith("| delaunay-set | 5 |") for line in lines)
    assert any(line.startswith("| hull-set | 15, untrained |") for line in lines)
    assert (output / "report.md").read_text().startswith("16 samples, width 8, 1 seeds")
    assert (output / "pointers.png").is_file()
    found = json.loads((output / "tsp-set-0.json").read_text())["tests"]["10"]
    assert found["greedy"] >= found["beam"] >= 1 and found["nearest"] >= found["two_opt"] >= 1


def test_a_stopped_study_goes_on_and_gives_the_same_values(done, monkeypatch):
    output, lines = done
    kept = json.loads((output / "hull-lstm-0.json").read_text())
    (output / "hull-lstm-0.json").unlink()
    names = []
    measure = pointers.measure
    monkeypatch.setattr(
        pointers, "measure", lambda name, *args: (names.append(name), measure(name, *args))[1]
    )
    again = list(pointers.study(output, SHORT))
    assert names == ["hull-lstm"]
    found = json.loads((output / "hull-lstm-0.json").read_text())
    assert found["tests"] == kept["tests"] and len(again) == len(lines)
    with pytest.raises(ValueError, match="output: .* has other settings"):
        next(pointers.study(output, dataclasses.replace(SHORT, lr=1e-4)))


def test_the_truth_has_every_score(monkeypatch):
    """What the tests say of a network that knows the answers."""

    class Knows(torch.nn.Module):
        def __init__(self, samples):
            super().__init__()
            self.samples = samples

        def answers(self, points, beam=1):
            return torch.from_numpy(self.samples.answers)

    for task, best in (
        ("hull", {"exact": 1, "failed": 0, "area": 1}),
        ("delaunay", {"exact": 1, "coverage": 1}),
    ):
        samples = draw(task, 6, 5)
        assert pointers.TESTS[task](Knows(samples), samples, SHORT) == best
    samples = draw("tsp", 6, 5)
    found = pointers.tour_test(Knows(samples), samples, SHORT)
    assert found["greedy"] == found["beam"] == 1
    assert found["length"] == pytest.approx(tour_length(samples.points, samples.answers).mean())
    # One that crosses itself has failed, whatever its area.
    samples = draw("hull", 8, 1)
    order = [i for i in samples.answers[0].tolist() if i >= 0]
    wrong = samples._replace(answers=samples.answers[:, [1, 0, *range(2, len(order))]])
    assert pointers.hull_test(Knows(wrong), samples, SHORT)["failed"] == 1


def test_the_command(done, capsys):
    command = ["pointer", "--seeds", "1", "--samples", "16", "--batch-size", "4"]
    command += ["--tests", "4", "--width", "8", "--output", str(done[0])]
    assert main(command) in (0, None)
    assert "| delaunay-set | 5 |" in capsys.readouterr().out
