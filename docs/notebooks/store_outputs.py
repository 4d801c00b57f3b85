"""Run notebooks from top to bottom and store their outputs, pictures as small JPEGs.

pip install -e ".[demo,weights,app,docs]" ipykernel nbclient
python docs/notebooks/store_outputs.py quick_start vit_attention
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
WIDEST, QUALITY = 900, 80  # pixels and JPEG quality of a stored picture


def as_jpeg(png: str) -> str:
    """A picture in base64, as a JPEG no wider than :data:`WIDEST`."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail((WIDEST, 10 * WIDEST))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def store(path: Path) -> None:
    """Run the notebook in an empty folder, and write it with its outputs."""
    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=1800, resources=place).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                png = data.pop("image/png")
                if "text/html" not in data:  # shows the same
                    data["image/jpeg"] = as_jpeg(png)
            if output.output_type != "stream" or output.name == "stdout":
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        store(FOLDER / f"{name}.ipynb")
