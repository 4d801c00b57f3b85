"""``XATTN_TEST_DEVICE=cuda``: the tests' own tensors and layers are on that device.

Tensors are made on a CPU, by its generators, and moved, so that the numbers are the same everywhere. Only
what a file of tests makes is moved: the library has to make its own tensors on the device of its inputs.
"""

import sys
from pathlib import Path

import pytest
import torch

TESTS = str(Path(__file__).parent)
MADE = (
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros",
)  # fmt: skip
LAYERS = ("create_attention", "create_mechanism")  # what tests make layers with


def moved_tensors(make, device):
    def made(*args, **options):
        found = make(*args, **options)
        if torch.compiler.is_compiling() or "device" in options:
            return found
        if not sys._getframe(1).f_code.co_filename.startswith(TESTS):
            return found
        return found.detach().to(device).requires_grad_(found.requires_grad)

    return made


def moved_layers(make, device):
    return lambda *args, **options: make(*args, **options).to(device)


class Plugin:
    """Registered where a device is named."""

    def __init__(self, device):
        self.device = torch.device(device)
        for name in MADE:
            setattr(torch, name, moved_tensors(getattr(torch, name), self.device))

    @pytest.fixture(autouse=True)
    def layers_on_the_device(self, request, monkeypatch):
        for name in LAYERS:
            if hasattr(request.module, name):
                make = moved_layers(getattr(request.module, name), self.device)
                monkeypatch.setattr(request.module, name, make)
