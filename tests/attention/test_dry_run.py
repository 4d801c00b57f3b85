"""What each mechanism would launch on a GPU, and where it would wait, counted on one that is not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

from xattn.attention.base import MECHANISMS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs Triton and a torch in which Python can make up a device",
)
MOST = {"dma": 46, "hip": 60, "llsa": 60, "nsa": 44}  # launches of a forward pass; of others 40


@pytest.fixture(scope="module")
def found():
    """By mechanism, what was counted."""
    program = Path(__file__).with_name("dry_run.py")
    own = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, program, "--json"], capture_output=True, text=True, env=own
    )
    assert run.returncode == 0, run.stderr
    by_name = {}
    for case in json.loads(run.stdout):
        by_name.setdefault(case["case"].split()[0], []).append(case)
    return by_name


EVERY = pytest.mark.parametrize("name", MECHANISMS.names())


@EVERY
def test_devices_do_not_mix(name, found):
    for case in found[name]:
        assert not case["errors"], case


@EVERY
def test_later_calls_never_wait_for_the_gpu_nor_copy_to_it(name, found):
    for case in found[name]:
        assert not case["stops"], case


@EVERY
def test_launches_of_a_forward_pass_are_few_and_do_not_grow_with_the_tokens(name, found):
    for case in found[name]:
        assert max(case["forward"]) <= MOST.get(name, 40), case
        assert len({*case["forward"]}) == 1, case


@EVERY
def test_launches_of_a_backward_pass_do_not_grow_with_the_tokens(name, found):
    for case in found[name]:
        assert max(case["backward"]) - min(case["backward"]) == 2 * at_the_top(case), case


@EVERY
def test_answers_of_a_recorded_call_never_wait_nor_copy(name, found):
    for case in found[name]:
        assert {"maps", "rows", "vecmat"} <= case["answers"].keys()
        assert not case["waits"], case


@EVERY
def test_launches_of_an_answer_do_not_grow_with_the_tokens(name, found):
    for case in found[name]:
        for question, launches in case["answers"].items():
            assert max(launches) - min(launches) <= at_the_top(case), (question, case)


def at_the_top(case):
    """Whether the top level has one place at 4,096 tokens, which needs no copies, and two at 8,192."""
    return "levels=3" in case["case"]
