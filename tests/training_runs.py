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
    """Run ``command`` whole, then killed by SIGKILL half-way and resumed: the heads are equal."""
    command = [
        sys.executable,
        "-m",
        "xattn.cli",
        "train",
        *command,
        "--workers",
        "2",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, **environment}
    whole = subprocess.run(
        [*command, "--output", str(root / "whole")], env=environment, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr

    killed = [*command, "--output", str(root / "killed")]
    process = subprocess.Popen(
        killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = root / "killed/log.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) > steps // 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = len(log.read_text().splitlines())
    assert steps // 3 < seen < steps, "the run was not killed half-way"
    assert not (root / "killed/head").exists()

    again = subprocess.run([*killed, "--resume"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    a = load_file(str(root / "whole/head/model.safetensors"))
    b = load_file(str(root / "killed/head/model.safetensors"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
