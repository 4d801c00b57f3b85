"""What is in the wheel: the library and no study, benchmark of a page, or model that only they use."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

import pytest
from module_imports import imports, module_names
from packaging.requirements import Requirement

setuptools = pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[1]
# The goal: 75,000 and 520. Of them 5,000 for the words of vision-language models, 784 for one relevance engine, 323 for its relatives,
# 1,930 for detectors, 136 for their trained head, 70 for heads of clips.
MOST_LINES, MOST_MODULES = 116_404, 618
MOST_OUTSIDE = 24_054  # lines of studies and of the benchmarks behind pages; the goal: 13,000
OUTSIDE = "xattn.eval.studies"


def wheel_modules() -> dict[str, Path]:
    """Path by full module name, as setuptools packs them by ``pyproject.toml``."""
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files([str(ROOT / "pyproject.toml")])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    found = build.find_all_modules()
    return {
        f"{package}.{module}".removesuffix(".__init__"): ROOT / path
        for package, module, path in found
    }


@pytest.fixture(scope="module")
def wheel():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return wheel_modules()


def lines(paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_the_wheel_is_no_larger_than_it_was(wheel):
    assert len(wheel) <= MOST_MODULES, len(wheel)
    assert lines(wheel.values()) <= MOST_LINES, lines(wheel.values())


def test_what_is_outside_is_no_larger_than_it_was():
    outside = lines((ROOT / "eval" / "studies").rglob("*.py"))
    assert outside <= MOST_OUTSIDE, outside


def test_no_package_we_ask_for_pins_another_to_a_release_that_is_not_here():
    # One that pins an old torch sends pip through hours of older releases.
    here = {d.name.lower().replace("_", "-"): d for d in importlib.metadata.distributions()}
    ours = {Requirement(line).name.lower() for line in here["xattn"].requires or []} & here.keys()
    needs = [(name, Requirement(line)) for name in ours for line in here[name].requires or []]
    needs = [(n, r) for n, r in needs if not r.marker or r.marker.evaluate({"extra": ""})]
    assert len(needs) > 50
    for name, need in needs:
        found = here.get(need.name.lower().replace("_", "-"))
        assert found, f"{name} asks for {need}, which is not installed"
        assert need.specifier.contains(found.version, prereleases=True), f"{name} asks for {need}"


def test_the_wheel_has_every_module_but_those_of_studies(wheel):
    assert set(wheel) == {name for name in module_names() if not name.startswith(OUTSIDE)}


def test_no_module_imports_one_that_is_not_in_the_wheel(wheel):
    """Late imports count, and names of modules in strings."""
    every = module_names()
    used = set()
    for name, path in wheel.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        found = imports(tree, every) | {s for s in strings if isinstance(s, str) and s in every}
        assert found <= set(wheel), (name, sorted(found - set(wheel)))
        used |= found - {name}
    models = {name for name in wheel if name.startswith("xattn.models.")}
    assert models <= used | {"xattn.models.heads"}, sorted(models - used)
