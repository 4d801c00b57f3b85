"""The benchmark of a busy machine: its loops run beside the job and end with it; its ratio is the jobs'."""

import subprocess
import sys

import pytest

from xattn.eval.studies.benches import load
from xattn.eval.studies.benches.startup import Took, seconds_of


def test_a_round_compares_the_demo_alone_with_the_demo_beside_loops(monkeypatch):
    running = []

    class Loop(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            running.append(self)

    def demo(environment):
        busy = [loop for loop in running if loop.poll() is None]
        assert len(busy) in (0, 3)
        return Took(10, 20 + 4 * len(busy) + 10 * len(environment))

    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(load.subprocess, "Popen", Loop)
    monkeypatch.setattr(load, "_demo", demo)
    said, _, _, asleep, spinning = load.study(rounds=2)
    assert "3 busy loops on 2 cores" in said
    assert asleep.endswith("| 10 | 20 | 10 | 32 | 1.60 | 1.5 (missed) |")
    assert spinning.endswith("| 10 | 40 | 10 | 52 | 1.30 |  |")
    assert len(running) == 12 and all(loop.poll() is not None for loop in running)


def test_a_program_is_given_its_variables_and_may_not_fail(tmp_path):
    code = "import os, sys; sys.exit(os.environ.get('MARK') != 'set')"
    seconds_of([sys.executable, "-c", code], str(tmp_path), check=True, MARK="set")
    with pytest.raises(subprocess.CalledProcessError):
        seconds_of([sys.executable, "-c", code], str(tmp_path), check=True)
