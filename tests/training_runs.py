"""Runs of ``xattn train`` in a process of its own, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file, save_file


def write_weights(path, backbone):
    save_file(backbone.model.state_dict(), str(path))
    return path


def check_killed_and_resumed(command, root, steps, environment):
    """:func:`killed_and_resumed` of ``xattn train``."""
    command = ["train", *command, "--workers", "2", "--device", "cpu"]
    killed_and_resumed(command, root, steps, environment, "head", steps // 3)


def killed_and_resumed(command, root, steps, environment, made, enough):
    """Run ``command`` whole, then killed by SIGKILL after more than ``enough`` steps and resumed: the
    tensors in the folder ``made`` are equal. Seconds of the whole run, and those of a core's work."""
    command = [sys.executable, "-m", "xattn.cli", *command]
    environment = {**os.environ, **environment}
    started = time.perf_counter(), os.times()
    whole = subprocess.run(
        [*command, "--output", str(root / "whole")], env=environment, capture_output=True, text=True
    )
    work = sum(b - a for a, b in zip(started[1][2:4], os.times()[2:4], strict=True))
    seconds = time.perf_counter() - started[0]
    assert whole.returncode == 0, whole.stderr

    killed = [*command, "--output", str(root / "killed")]
    process = subprocess.Popen(
        killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = root / "killed/log.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) > enough:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = len(log.read_text().splitlines())
    assert enough < seen < steps, "the run was not killed half-way"
    assert not (root / "killed" / made).exists()

    again = subprocess.run([*killed, "--resume"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    a, b = (load_file(root / run / made / "model.safetensors") for run in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    return seconds, work
