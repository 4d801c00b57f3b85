"""A process that dies: the others end with one line, and resume goes on from the last checkpoint."""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from training_runs import in_two_processes

import xattn
from xattn.runtime.distributed import peer_errors

JOB = """
import os, signal, sys
from xattn.cli import main
from xattn.training.fitting import PhotosJob

at, *arguments = sys.argv[1:]
calls, step = [], PhotosJob.step

def dying(*args):
    calls.append(1)
    if len(calls) == int(at) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)  # as the out-of-memory killer does
    return step(*args)

PhotosJob.step = dying
sys.exit(main(arguments))
"""


def two_processes(root, at, *arguments):
    """Exit codes and standard errors of two processes, the second of which dies in step ``at``."""
    command = [sys.executable, str(root / "job.py"), str(at), *map(str, arguments)]
    return in_two_processes(command, {"OMP_NUM_THREADS": "1"})


def test_the_survivor_ends_with_one_line_and_resume_goes_on(tmp_path):
    torch.manual_seed(0)
    backbone = xattn.load_backbone("test_efficientnet", weights=None, input_size=64)
    save_file(backbone.model.state_dict(), str(tmp_path / "w.safetensors"))
    for i in range(16):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "p" / f"{i}.png")
    (tmp_path / "job.py").write_text(JOB)
    output = tmp_path / "out"
    arguments = [
        "train", tmp_path / "p", "--backbone", "test_efficientnet", "--input-size", "64", "--weights",
        tmp_path / "w.safetensors", "--epochs", "2", "--batch-size", "2", "--checkpoint-every", "2",
        "--workers", "0", "--device", "cpu", "--recipe", "published", "--output", output,
    ]  # fmt: skip
    codes, (survivor, _) = two_processes(tmp_path, 4, *arguments)
    assert codes == [2, -9], survivor
    assert "Traceback" not in survivor
    last = survivor.strip().splitlines()[-1]
    assert last.startswith("xattn: error: processes: another process") and "--resume" in last, (
        survivor
    )
    assert (output / "checkpoints/latest").read_text() == "step-00000002\n"
    assert len((output / "log.jsonl").read_text().splitlines()) == 3
    codes, errors = two_processes(tmp_path, 0, *arguments, "--resume")
    assert codes == [0, 0], errors
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4
    assert (output / "head/model.safetensors").is_file()


def test_errors_that_are_not_of_the_group_stay_what_they_are():
    with pytest.raises(RuntimeError, match="gloo") as error, peer_errors():
        raise RuntimeError("gloo, in a single process")
    assert not isinstance(error.value, ConnectionError)


def test_a_peer_that_dies_before_the_group_is_joined_is_one_line():
    with pytest.raises(
        ConnectionError, match="^processes: another process .* start all of them again"
    ):
        with peer_errors():
            torch.distributed.TCPStore(
                "127.0.0.1", 0, 2, is_master=True, timeout=timedelta(milliseconds=50)
            )
