"""The papers' settings: their figures are printed, measured on a GPU, or said not to be."""

import dataclasses

import pytest
import torch

from xattn.attention import create_mechanism, list_attention
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.benches import published
from xattn.eval.studies.benches.published import NOT_MEASURED, SETTINGS, gains_of, jobs, study

SMALL = {
    "nsa": {"block": 8, "stride": 4, "select_block": 8, "selected": 3, "window": 4},
    "dma": {"window": 8},
}


def small(name):
    """The paper's setting at 64 tokens."""
    setting = next(s for s in SETTINGS if s.mechanism == name)
    return dataclasses.replace(
        setting, grid=(64,), heads=4, kv_heads=2, width=8, options=SMALL[name]
    )


def rows(lines):
    return {line.split(" | ")[0].split()[1]: line for line in lines if line.startswith("| ")}


def test_published_figures_stand_beside_what_was_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = rows(study())
    for setting in SETTINGS:
        figures = (setting.forward, setting.backward, setting.both)
        wanted = [("", "-") if f is None else (NOT_MEASURED, f"{f:.1f}x") for f in figures]
        cells = [cell.strip() for cell in found[setting.mechanism].split("|")]
        assert cells[4:10] == [cell for pair in wanted for cell in pair]


def test_a_mechanism_that_is_not_there_is_skipped_and_the_others_go_on():
    other = dataclasses.replace(SETTINGS[0], mechanism="nobody")
    found = rows(study(settings=(other, SETTINGS[0])))
    assert "skipped: no such mechanism is registered" in found["nobody"]
    assert "9.0x" in found["nsa"]
    assert found["nobody"].count("|") == found["nsa"].count("|")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.mechanism)
def test_the_options_are_those_of_the_mechanism(setting):
    assert setting.mechanism in list_attention()
    create_mechanism(setting.mechanism, setting.heads * 8, setting.heads, **setting.options)


@pytest.mark.parametrize("name", ["nsa", "dma"])
def test_both_sides_of_a_ratio_do_the_same_task(name):
    setting = small(name)
    made = jobs(setting, "cpu", torch.float32)
    outputs = [made[side][0]() for side in ("dense", "sparse")]
    assert outputs[0].shape == outputs[1].shape == (1, 4, 64, 8)
    # Causal: the first token sees itself alone, so dense attention gives its value.
    assert outputs[0][0, :, 0].unique(dim=0).shape[0] == 2


def test_a_gain_is_the_time_of_dense_attention_over_that_of_the_mechanism(monkeypatch):
    took = iter(
        [{"dense": [8.0] * 3, "sparse": [2.0] * 3}, {"dense": [20.0] * 3, "sparse": [4.0] * 3}]
    )
    monkeypatch.setattr(published, "measure", lambda jobs, rounds, of: next(took))
    assert gains_of(small("dma"), 3, "cpu", torch.float32) == (8 / 2, (20 - 8) / (4 - 2), 20 / 4)


def test_the_command_prints_them(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench-published"]) == 0
    assert "49.8x" in capsys.readouterr().out
