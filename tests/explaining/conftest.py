"""A small network with named classes, and an untrained head of it."""

import pytest
import torch
from small_explanations import CLASSES

from xattn.backbone import load_backbone
from xattn.heads import create_head


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return load_backbone(
        "test_efficientnet", weights=None, input_size=64, num_classes=7, class_names=CLASSES
    )


@pytest.fixture(scope="module")
def head(backbone):
    torch.manual_seed(1)
    return create_head("ttame", backbone).eval()
