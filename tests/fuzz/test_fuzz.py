"""A part of ``make fuzz`` in every run of the tests, and what its verdicts mean."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fuzz import TARGETS, Failure, Target, attempt, make_input, run, shares, workspace
from fuzz import engine as fuzz_engine
from fuzz.__main__ import suite
from fuzz.mutations import KINDS

COUNT, SEED = 1_000, 0
SHARES = shares(list(TARGETS.values()), COUNT)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux's means")


@pytest.mark.parametrize("name", TARGETS)
def test_no_hostile_input_gives_a_traceback(name, tmp_path):
    found = [f for _, f in run(TARGETS[name], range(SHARES[name]), SEED) if isinstance(f, Failure)]
    saved = "\n".join(f"{failure.what}: {failure.save(tmp_path)}" for failure in found)
    assert not found, f"{saved}\nread one again by: python -m fuzz --target {name!r} --input FILE"


def test_the_inputs_add_up_and_every_target_gets_some():
    assert sum(SHARES.values()) == COUNT and min(SHARES.values()) > 0
    assert sum(shares(list(TARGETS.values()), 24_000).values()) == 24_000


def test_inputs_are_a_function_of_seed_target_and_number():
    for name in ("labels csv", "labels json", "list of photos"):
        inputs = [make_input(TARGETS[name], i, 0) for i in range(60)]
        assert inputs == [make_input(TARGETS[name], i, 0) for i in range(60)]
        assert inputs != [make_input(TARGETS[name], i, 1) for i in range(60)]
        assert set(TARGETS[name].inputs("valid")) <= set(inputs)
        assert len(set(inputs)) > 40


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_change_almost_every_input(kind):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0" * 4
    base = data if kind == "safetensors" else b'{"a": [1, "b", {"c": null}]}\n{"a": 5}'
    made = [KINDS[kind](base, random.Random(i), [base]) for i in range(200)]
    assert sum(data != base for data in made) > 150 and len(set(made)) > 100


def reader(read):
    return Target("planted", read, "input", lambda: [b"ok"], lambda: [])


def slow(folder: Path) -> None:
    end = time.process_time() + 5
    while time.process_time() < end:
        pass


def greedy(folder: Path) -> None:
    np.ones(1 << 28)


def cut(folder: Path) -> None:
    raise ValueError(f"labels: {folder} is cut short")


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda folder: {}["group"], "KeyError"),
        (lambda folder: json.loads("["), "JSONDecodeError"),
        (lambda folder: float("x"), "foreign words"),
        (lambda folder: sys.exit(1), "SystemExit"),
        (lambda folder: (folder / "gone").read_bytes(), None),
        (cut, None),
        (slow, "processor time"),
        (greedy, "MB of memory"),
    ],
)
def test_what_is_no_error_of_the_project_is_a_failure(read, what, monkeypatch):
    monkeypatch.setattr(fuzz_engine, "SECONDS", 0.2)
    with workspace(reader(read)) as place:
        found = attempt(reader(read), b"x", place)
    if what is None:
        assert not isinstance(found, Failure)
    else:
        assert isinstance(found, Failure) and what in found.what


def test_a_process_that_dies_is_a_failure_and_the_rest_goes_on(monkeypatch):
    def read(folder: Path) -> None:
        if (folder / "input").read_bytes() != b"ok":
            os._exit(3)

    planted = Target("planted", read, "input", lambda: [b"ok", b"ok"], lambda: [b"x", b"y"], "text")
    monkeypatch.setitem(TARGETS, "planted", planted)
    tally = suite(["planted"], 3, 0, 1)["planted"]
    assert (tally.count, tally.accepted) == (3, 2)
    assert tally.failures[0].data == b"x" and "ended with code 3" in tally.failures[0].what


def test_a_valid_input_that_is_refused_is_a_failure():
    ((_, found),) = run(reader(cut), [0], 0)
    assert isinstance(found, Failure) and found.what == "a valid input was refused"
