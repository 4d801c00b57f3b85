"""Runs of training and caching that are killed, in processes of their own or in a write; their photos."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from xattn.training import cache


def write_photos(folder, count, size=(70, 50)):
    """``folder`` with ``count`` photos of smooth noise, 000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (10, 14, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(folder / f"{i:03d}.png")
    return folder


@contextmanager
def dies_in_write(write):
    """The block ends with a SystemExit in the middle of that write of a shard, as by a kill: what was
    written stays, nothing is tidied up."""
    real, calls = cache._store, []

    def dying(path, data):
        calls.append(1)
        if len(calls) == write:
            real(path, data[: len(data) // 2])
            real(
                path.with_name(f".rows-{write}.safetensors"), data[: len(data) // 2]
            )  # as a kill leaves
            raise SystemExit
        return real(path, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(cache, "_store", dying)
        yield


def in_two_processes(command, environment):
    """Run ``command`` in two processes that find each other: their exit codes and standard errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, **environment, "ACCELERATE_USE_CPU": "1", "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    running = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=900)[1] for process in running]
    return [process.returncode for process in running], errors


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
    command = [sys.executable, "-m", "xattn", *command]
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
