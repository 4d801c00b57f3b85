"""Two processes train the head or mechanism that one trains: each parameter and buffer."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
import two_process_job as job
from PIL import Image
from safetensors.torch import save_file

import xattn
from xattn.heads import list_heads
from xattn.training.processes import Share, whole_batch

TOLERANCES = {"float32": 3e-4, "float64": 1e-6}  # relative; float32 only rounds, float64 tells


def write_photos(folder, count):
    """Red, green or blue noise in turn."""
    folder.mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 90, (10, 14, 3), dtype=np.uint8)
        noise[..., i % 3] += 120
        Image.fromarray(noise).resize((70, 50)).save(folder / f"{i:03d}.png")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """(of one process, of the first of two, of the second); the two are started once for all heads."""
    root = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    cnn = xattn.load_backbone("test_efficientnet", None, input_size=64, num_classes=5)
    torch.nn.init.constant_(cnn.model.get_classifier().bias, 0.3)  # several labels are positive
    save_file(cnn.model.state_dict(), str(root / "cnn.safetensors"))
    vit = xattn.load_backbone("test_vit", None, input_size=64)
    torch.nn.init.normal_(vit.model.pos_embed)  # tokens and photos apart, or gradients are rounding
    torch.nn.init.normal_(vit.model.patch_embed.proj.weight, std=0.1)
    save_file(vit.model.state_dict(), str(root / "vit.safetensors"))
    write_photos(root / "photos", job.PHOTOS)
    (root / "photos/003.png").write_bytes(b"no picture")
    write_photos(root / "probed", job.PROBED + 7)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        job.__file__, str(root),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    two = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        one = job.trained(root, 1)
        output, _ = two.communicate(timeout=900)
    finally:
        two.terminate()  # torchrun ends its processes, too
        two.wait()
    assert two.returncode == 0, output.decode()
    return one, *(torch.load(root / f"states-{rank}.pt") for rank in range(2))


CASES = [(d, case[0]) for d in TOLERANCES for case in job.cases(d)]


@pytest.mark.parametrize(("dtype", "case"), [*CASES, ("float64", "distill")])
def test_two_processes_train_the_head_of_one(states, dtype, case):
    """Each tensor differs by at most 3e-4 (float32) or 1e-6 (float64) of its largest number. Tensors
    below 0.01, such as biases that the next norm takes out again, count as 0.01: they are rounding."""
    one, first, second = (state[f"{case}-{dtype}"] for state in states)
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), f"{key} differs between the processes"
        scale = max(value.abs().max().item(), 0.01)
        apart = (first[key] - value).abs().max().item()
        assert apart <= TOLERANCES[dtype] * scale, f"{key}: {apart / scale:.1e}"


def test_every_head_of_the_registry_is_trained():
    assert {case[1] for case in job.cases("float64")} == set(list_heads())


@pytest.fixture
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 2, 4)], ids=str)
def test_batch_norm_of_one_process_is_that_of_torch(process_group, shape, options):
    torch.manual_seed(0)
    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    own = kind(5, **options).double()
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter)
    given, answers = copy.deepcopy(own), []
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    weights = torch.randn(shape, dtype=torch.float64)
    for layer in (own, given):
        with whole_batch(layer) if layer is given else nullcontext(Share()) as share:
            share.rows, share.count = range(len(x)), len(x)
            leaf = x.clone().requires_grad_()
            y = [layer(leaf), layer(leaf * 2)][0]  # twice, for the running statistics
            (y * weights).sum().backward()
        answers.append([y, leaf.grad, *layer.state_dict().values(), layer.eval()(x)])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs)
