"""The study of orders of cells: rows, resuming, refusals, and what is learned."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from plackett_luce import plackett_luce
from small_transformers import tiny

from xattn.backbone import load_backbone
from xattn.eval.studies import cell_orders
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.cell_orders import (
    KINDS,
    Lessons,
    OrderStudyConfig,
    expected_places,
    fewest_sufficient_steps,
    kept_cells,
    learn,
    with_end,
    without_end,
)
from xattn.heads import load_head
from xattn.heads.pointer import Cells

SHORT = OrderStudyConfig(photos=5, tested=3, cells=3, passes=24, draws=1, epochs=1)


@pytest.fixture(scope="module")
def backbone():
    network = tiny(grid=(6, 6), depth=4, num_classes=3)
    return load_backbone(network.model, class_names=["a", "b", "c"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def done(photos, backbone, tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return output, list(cell_orders.study(backbone, photos, output, SHORT))


def test_a_report_of_every_row(done, backbone):
    output, lines = done
    assert "5 photos to learn from, 3 tested; 3 x 3 cells, 24 passes" in lines[0]
    for row in ("chance", "mean order", "class map, untrained head", "score regression", "teacher"):
        assert sum(line.startswith(f"| {row} |") and line.count("|") == 6 for line in lines) == 1
    for row in ("pointer head, its own end", "teacher, as few as it takes"):
        assert sum(line.startswith(f"| {row} |") and line.count("|") == 4 for line in lines) == 1
    assert sum("cells of every photo |" in line for line in lines) == 3
    restored = next(line for line in lines if line.startswith("| teacher, as few"))
    assert restored.endswith("| 1.000 [1.000, 1.000] |")
    assert sum(line.startswith("| balanced | ") for line in lines) == 2
    assert (output / "report.md").read_text().count("\n") >= 25
    head = load_head(output / "head", backbone)
    kept = json.loads((output / "orders" / "pointer-0.json").read_text())["sequences"]
    assert np.array(kept).shape == (3, 10) and head.decoder is None


def test_one_number_of_cells_for_every_photo_is_that_of_the_first_pointer_head(
    photos, backbone, tmp_path, monkeypatch
):
    def learned(_, kind, lessons, tested, config, seed):
        cells = np.roll(np.arange(9), KINDS.index(kind)).tolist()
        places = [4, 6, 6] if kind == "pointer" and seed == 0 else [2, 2, 2]  # of the end symbol
        return {"sequences": [[*cells[:at], 9, *cells[at:]] for at in places], "seconds": 1.0}

    monkeypatch.setattr(cell_orders, "_learned", learned)
    lines = list(cell_orders.study(backbone, photos, tmp_path, dataclasses.replace(SHORT, draws=2)))
    for row in ("pointer head", "class map", "mean order"):
        assert sum(line.startswith(f"| {row}, 5 cells of every photo |") for line in lines) == 1
    kept = json.loads((tmp_path / "ends" / "pointer-head-usual.json").read_text())
    assert kept["orders"] == [list(range(9))] * 3


def test_a_killed_study_goes_on_and_gives_the_same_report(done, photos, backbone, monkeypatch):
    output, lines = done
    for name in ("teacher-0/00004.json", "orders/pointer-0.json", "curves/pointer-0.json"):
        (output / name).unlink()
    (output / "cells.safetensors").unlink()
    calls = []
    monkeypatch.setattr(
        cell_orders, "learn", lambda kind, *args: (calls.append(kind), learn(kind, *args))[1]
    )
    torch.manual_seed(9)
    again = list(cell_orders.study(backbone, photos, output, SHORT))
    assert calls == ["pointer"]
    same = [line.rsplit("|", 2)[0] for line in lines]  # all but the seconds
    assert [line.rsplit("|", 2)[0] for line in again] == same
    with pytest.raises(ValueError, match="output: .* has other settings or photos"):
        list(cell_orders.study(backbone, photos, output, dataclasses.replace(SHORT, ridge=1.0)))


def test_the_end_symbol_stands_behind_the_cells_that_suffice():
    orders = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3], [2, 0, 3, 1]])
    ended = with_end(orders, torch.tensor([1, 4, 2]))
    assert ended.tolist() == [[3, 4, 1, 0, 2], [0, 1, 2, 3, 4], [2, 0, 4, 3, 1]]
    assert kept_cells(ended).tolist() == [1, 4, 2] and torch.equal(without_end(ended), orders)
    assert kept_cells(torch.tensor([[2, 0, 1]])).tolist() == [1]  # never none
    assert fewest_sufficient_steps([False, False, True, False], (0, 1, 4, 9)) == 4
    assert fewest_sufficient_steps([True, False], (0, 9)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_heads_learn_an_order_that_the_inputs_show(backbone, kind):
    generator = torch.Generator().manual_seed(0)
    head_ranks = 2 + 3 + 3
    ranks = torch.rand(60, 1, 9, head_ranks, generator=generator) * 2 - 1
    weights = -ranks[:, 0, :, 4].double()  # the first cells are those where the fifth map is low
    cells = Cells(ranks, torch.zeros(60, 9, 16), (3, 3))
    kept = torch.full((60,), 3)
    config = dataclasses.replace(SHORT, epochs=60)
    made = learn(kind, backbone, Lessons(cells.of(slice(40)), weights[:40], kept[:40]), config, 0)
    found = without_end(made.head.orders(cells.of(slice(40, None)))[:, 0])
    place = found.argsort(1).double()
    truth = weights[40:].argsort(1, descending=True).argsort(1).double()
    assert np.corrcoef(place.flatten(), truth.flatten())[0, 1] > 0.75
    if kind != "regression":
        counts = kept_cells(made.head.orders(cells.of(slice(40, None)))[:, 0])
        assert (counts - 3).abs().double().mean() <= 1


def test_expected_places_are_those_of_plackett_and_luce():
    scores = torch.tensor([[0.3, -1.0, 0.8, 0.0]], dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    p = plackett_luce(scores.expand(24, -1), orders).exp()
    torch.testing.assert_close(p.sum(), torch.ones(()).double())
    expected = (p[:, None] * orders.argsort(1)).sum(0)
    torch.testing.assert_close(expected_places(scores)[0], expected)


def test_the_mean_order_is_that_of_mean_ranks():
    weights = torch.tensor([[0.1, 0.9, 0.2], [5.0, 6.0, 7.0]], dtype=torch.float64)
    lessons = Lessons(Cells(torch.zeros(2), torch.zeros(2), (1, 3)), weights, torch.tensor([1, 2]))
    assert lessons.mean_ranks.tolist() == [1.0, 2.5, 2.5]
    assert lessons.sequences.tolist() == [[1, 3, 2, 0], [2, 1, 3, 0]]


def test_what_does_not_fit_is_refused(backbone, photos, tmp_path):
    for changes, words in (
        ({"tested": 6}, "data: got 8 photos; give at least 10"),
        ({"cells": 4}, "cells: got 4; give a divisor of the grid"),
        ({"passes": 3}, "passes: got 3; balanced halves"),
    ):
        with pytest.raises(ValueError, match=words):
            config = dataclasses.replace(SHORT, **changes)
            list(cell_orders.study(backbone, photos, tmp_path / "x", config))
    cnn = load_backbone("test_efficientnet", weights=None, input_size=32)
    with pytest.raises(ValueError, match="backbone: test_efficientnet is no plain ViT"):
        list(cell_orders.study(cnn, photos, tmp_path / "x", SHORT))
    assert not (tmp_path / "x").exists()


def test_the_command(done, photos, backbone, monkeypatch, capsys):
    monkeypatch.setattr("xattn.cli.model.BackboneArgs.load", lambda self: backbone)
    command = ["pointer-photos", str(photos), "--photos", "5"]
    for name in ("tested", "cells", "passes", "draws", "epochs"):
        command += [f"--{name}", str(getattr(SHORT, name))]
    assert main([*command, "--output", str(done[0])]) in (0, None)
    assert "| pointer head, by likelihood, with memory |" in capsys.readouterr().out
