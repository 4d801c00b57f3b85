"""Photos of three classes, for studies of a network that knows them."""

import numpy as np
import pytest
from PIL import Image

NAMES = ("tench", "goldfish", "great white shark")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with two photos of noise in each of three folders."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        (folder / NAMES[i % 3]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / NAMES[i % 3] / f"{i}.png")
    return folder
