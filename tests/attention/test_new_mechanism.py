"""A mechanism of one's own is a class and its registration: tests, tables, lists and viewer find it."""

import subprocess
import sys
import textwrap

import pytest
import torch

from xattn.attention import Mechanism, SoftmaxOperator, list_attention, register_attention
from xattn.attention.base import MECHANISMS, Size
from xattn.cli import main

TOY = """
    from xattn.attention import Mechanism, SoftmaxOperator, register_attention


    @register_attention("toy", paper="none", complexity="N^2 D", cases=({"power": 2},))
    class Toy(Mechanism):
        def __init__(self, dim, num_heads, power=1, *, backend="auto"):
            super().__init__(dim, num_heads, backend=backend)
            self.power = power

        def operator(self, inputs):
            return SoftmaxOperator(
                inputs.q, inputs.k, inputs.scale * self.power, backend=self.backend
            )
"""


@pytest.fixture
def toy():
    @register_attention(
        "toy",
        paper="none",
        complexity="N^2 D",
        bench=({"power": 2},),
        size=Size("power", "Toys", "Power", (1, 2, 3), 2),
    )
    class Toy(Mechanism):
        def __init__(self, dim, num_heads, power=1, *, backend="auto"):
            super().__init__(dim, num_heads, backend=backend)
            self.power = power

        def operator(self, inputs):
            return SoftmaxOperator(inputs.q, inputs.k, inputs.scale * self.power)

    yield Toy
    MECHANISMS.remove("toy")


def test_every_parametrised_test_runs_it(tmp_path):
    (tmp_path / "toy_plugin.py").write_text(textwrap.dedent(TOY))
    suite = "tests/attention/test_mechanisms.py"
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "toy_plugin", suite, "-k", "toy", "-q",
            "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}", "-rA", "-n", "0",
        ],
        capture_output=True, text=True, env={**_environment(), "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    passed = {
        line.split("::")[1].split("[")[0] for line in run.stdout.splitlines() if "PASSED" in line
    }
    assert len(passed) > 15
    assert (
        f"{suite}::test_all_questions_to_the_operator_agree_with_its_matrix[toy-power=2-2]"
        in run.stdout
    )


def test_lists_and_benchmarks_show_it(toy, capsys):
    from xattn.eval.bench.attention import jobs

    assert "toy" in list_attention()
    assert main(["list"]) == 0
    assert "toy" in capsys.readouterr().out
    made, visited = jobs(["toy"], 64, "cpu", torch.float32)
    assert "toy power=2" in made and visited["toy power=2"] == 64 * 64


def test_the_attention_page_offers_it(toy):
    from xattn.app.attention.attention_pass import Choice, default_size, sizes, trial_mechanisms
    from xattn.app.attention.view import choice_of

    assert trial_mechanisms()["toy"].what == "Toys"
    assert sizes("toy", (3, 5)) == [1, 2, 3] and default_size("toy", (3, 5)) == 2
    assert choice_of({"mechanism": "toy", "size": "3"}, (3, 5)) == (Choice("toy", 3), [])


def _environment():
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
