"""A small network."""

import pytest
import torch

import xattn


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return xattn.load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)
