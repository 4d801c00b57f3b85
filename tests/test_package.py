"""The wheel holds the package ``xattn`` and nothing else, and imports outside the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_has_only_xattn_at_its_top_and_imports(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
         "-w", str(tmp_path), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    wheel = next(tmp_path.glob("xattn-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"xattn"}
    folders = {"kernels": "xattn/kernels", "models": "xattn/models", "eval": "xattn/eval"}
    for folder, place in {"xattn": "xattn", "app": "xattn/app", **folders}.items():
        for file in (source / folder).rglob("*.py"):
            assert f"{place}/{file.relative_to(source / folder).as_posix()}" in names
    data = [f for kind in ("*.js", "*.css", "*.html") for f in (ROOT / "app").rglob(kind)]
    data += [f for f in (ROOT / "eval").rglob("page/*") if f.is_file()]
    assert data and all(f"xattn/{f.relative_to(ROOT).as_posix()}" in names for f in data)
    assert "xattn/py.typed" in names
    assert any(n.startswith("xattn/models/heads/") and n.endswith(".safetensors") for n in names)
    code = (
        "import sys, xattn, xattn.kernels, xattn.eval, xattn.models, xattn.app\n"
        "assert xattn.__file__.startswith(sys.argv[1]), xattn.__file__\n"
        "assert xattn.eval.__file__.startswith(sys.argv[1])\n"
        "from xattn.heads import shipped_heads; assert shipped_heads()"
    )
    site = str(tmp_path / "site")
    # -S keeps the editable install's finder out; the dependencies come by path.
    path = [site, *(p for p in sys.path if p.endswith("site-packages"))]
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {path!r}\n{code}", site],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
