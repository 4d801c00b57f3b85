"""What the demo works on: photos that installed packages ship, and the network of a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

BACKBONE = "tf_efficientnet_lite0"
PHOTOS = {
    "skimage": "data: astronaut.png camera.png chelsea.png clock_motion.png coffee.png coins.png "
    "horse.png motorcycle_left.png motorcycle_right.png retina.jpg rocket.jpg",
    "sklearn": "datasets/images: china.jpg flower.jpg",
}


def embedded_photos() -> list[Path]:
    """The photos inside the scikit-image and scikit-learn packages."""
    found = []
    for package, line in PHOTOS.items():
        folder, _, names = line.partition(": ")
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            found += [p for name in names.split() if (p := Path(root, folder, name)).is_file()]
    if not found:
        raise OSError('demo: no photos found; run: pip install "xattn[demo]"')
    return found
