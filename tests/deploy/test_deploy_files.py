"""Dockerfile, Space, recipe, workflows and metadata name what exists, and agree with pyproject.toml."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from xattn.cli.entry import COMMANDS
from xattn.runtime.arguments import choose

tomllib = pytest.importorskip("tomllib")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SPACE = DEPLOY / "space"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What conda-forge calls packages that have another name on PyPI.
CONDA = {
    "torch": "pytorch",
    "lazy-loader": "lazy-loader",
    "matplotlib": "matplotlib-base",
    "opencv-python-headless": "py-opencv",
}


def text(path: Path | str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def steps(path: Path) -> list[tuple[str, str]]:
    """Instructions and arguments of a Dockerfile, in order."""
    lines = [line for line in text(path).splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]  # type: ignore[misc]


def ran(command: str, folder: Path, **variables: str) -> list[list[str]]:
    """What a shell step calls, in place of which stubs write their words down."""
    for name in ("pip", "apt-get", "rm", "useradd", "mkdir", "chown"):
        (folder / name).write_text(
            f'#!/bin/sh\nfor w in {name} "$@" ";"; do echo "$w"; done >> "$LOG"\n'
        )
        (folder / name).chmod(0o755)
    log = folder / "log"
    log.write_text("")
    known = {"PATH": str(folder), "LOG": str(log), **variables}
    subprocess.run(["/bin/sh", "-ec", command], env=known, check=True)
    calls = log.read_text().split("\n;\n")[:-1]
    return [call.split("\n") for call in calls]


def extras_of(words: list[str]) -> set[str]:
    return {e for word in words for e in re.findall(r"\[(.*)\]", word)[0:1] for e in e.split(",")}


@pytest.mark.skipif(sys.platform == "win32", reason="the steps of an image are for a Unix shell")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_dockerfile_installs_what_the_device_needs(device, tmp_path):
    every = steps(DEPLOY / "Dockerfile")
    calls = [c for word, line in every if word == "RUN" for c in ran(line, tmp_path, DEVICE=device)]
    pips = [call for call in calls if call[0] == "pip"]
    assert "/src[app,demo" in pips[-1][-1] and extras_of(pips[-1]) <= set(
        PROJECT["optional-dependencies"]
    )
    assert ("gpu" in extras_of(pips[-1])) == (device == "cuda")
    cpu = any("https://download.pytorch.org/whl/cpu" in call for call in pips)
    assert cpu == (device == "cpu") and any("gcc" in c for c in calls) == (device == "cuda")


def test_the_dockerfile_starts_from_a_python_that_we_support_and_ends_in_a_command_of_ours():
    every = steps(DEPLOY / "Dockerfile")
    words = dict(every)
    arguments = dict(line.split("=") for word, line in every if word == "ARG")
    assert arguments == {"PYTHON": arguments["PYTHON"], "DEVICE": "cpu"}
    assert arguments["PYTHON"] in SpecifierSet(PROJECT["requires-python"])
    assert words["FROM"] == "python:${PYTHON}-slim" and words["USER"] == "xattn"
    names = [word for word, _ in every]
    assert names.index("USER") > max(i for i, word in enumerate(names) if word == "RUN")
    assert json.loads(words["ENTRYPOINT"])[0] in PROJECT["scripts"]


def test_the_image_gets_all_files_that_the_wheel_is_made_of():
    lines = text(DEPLOY / "Dockerfile.dockerignore").split()
    kept = {line[1:] for line in lines if line.startswith("!")}
    whole = tomllib.loads(text("pyproject.toml"))
    folders = set(whole["tool"]["setuptools"]["package-dir"].values())
    assert kept == folders | {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert all((ROOT / name).exists() for name in kept)


def test_the_space_starts_the_viewer_on_the_port_that_its_card_names(monkeypatch):
    monkeypatch.setenv("SPACE_HOST", "acme-xattn.hf.space")
    scope: dict = {"__name__": "space"}
    exec(compile(text(SPACE / "app.py"), "app.py", "exec"), scope)
    command = choose(COMMANDS, scope["LINE"], "xattn", "")
    assert command.no_token and command.allow_host == ("acme-xattn.hf.space",)
    assert command.allow_frame == ("https://huggingface.co",)
    card = yaml.safe_load(text(SPACE / "README.md").split("---\n")[1])
    words = dict(steps(SPACE / "Dockerfile"))
    assert card["app_port"] == command.port == int(words["EXPOSE"])
    assert ("RUN", "python app.py pack") in steps(SPACE / "Dockerfile")
    made = choose(COMMANDS, scope["pack_job"].arguments(Path("runs/demo"), Path()), "xattn", "")
    assert made.output.parent == command.root
    assert card["sdk"] == "docker" and len(card["short_description"]) <= 60 and card["emoji"]
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colours


def test_the_space_installs_extras_that_exist_and_copies_files_that_exist():
    for word, line in steps(SPACE / "Dockerfile"):
        if word == "COPY":
            assert (SPACE / line.split()[0]).is_file()
    (ours,) = [
        line
        for line in text(SPACE / "requirements.txt").split()
        if line[0] != "-" and "xattn" in line
    ]
    wanted = Requirement(ours)
    assert wanted.extras <= set(PROJECT["optional-dependencies"])
    python = dict(steps(SPACE / "Dockerfile"))["FROM"].removeprefix("python:").removesuffix("-slim")
    assert python in SpecifierSet(">=3.11")  # of the viewer


def test_the_recipe_asks_for_what_pyproject_asks_for():
    recipe = yaml.safe_load(text(DEPLOY / "conda" / "recipe.yaml"))
    python, *run = recipe["requirements"]["run"]
    assert python == "python >=${{ python_min }}"
    assert f">={recipe['context']['python_min']}" == PROJECT["requires-python"]
    ours = {}
    for need in map(Requirement, PROJECT["dependencies"]):
        name = need.name.lower()
        assert not need.marker and not need.extras
        ours[CONDA.get(name.replace("_", "-"), name)] = str(need.specifier)
    assert dict(line.split() for line in run) == ours
    assert recipe["build"]["python"]["entry_points"] == [
        f"{name} = {place}" for name, place in PROJECT["scripts"].items()
    ]
    host = [line for line in recipe["requirements"]["host"] if line.startswith("setuptools")]
    build = tomllib.loads(text("pyproject.toml"))["build-system"]["requires"]
    assert [line.replace(" ", "") for line in host] == build
    assert recipe["about"]["summary"] == PROJECT["description"]
    assert recipe["about"]["license"] == PROJECT["license"]
    assert recipe["about"]["license_file"] in PROJECT["license-files"]


def test_citation_and_zenodo_say_what_pyproject_says():
    cited, record = yaml.safe_load(text("CITATION.cff")), json.loads(text(".zenodo.json"))
    assert cited["title"] == record["title"] and cited["license"] == PROJECT["license"]
    assert record["license"] == PROJECT["license"] and record["upload_type"] == "software"
    names = [author["name"] for author in PROJECT["authors"]]
    assert [a["name"] for a in cited["authors"]] == [a["name"] for a in record["creators"]] == names
    address = PROJECT["urls"]["Repository"]
    assert cited["repository-code"] == record["related_identifiers"][0]["identifier"] == address


def test_every_address_of_the_repository_has_the_same_owner():
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    kinds = (".md", ".toml", ".yaml", ".yml", ".cff", ".json", ".rst", ".ipynb")
    pages = [n for n in names if n.endswith(kinds) and (ROOT / n).is_file()]
    found = {a for n in pages for a in re.findall(r"github\.com/[\w-]+/xattn\b", text(n))}
    assert found == {PROJECT["urls"]["Repository"].removeprefix("https://")}


def test_workflows_call_what_exists_and_cover_every_python_that_we_name():
    flows = {
        p.name: yaml.safe_load(text(p)) for p in sorted((ROOT / ".github/workflows").glob("*.yml"))
    }
    made = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.M))
    for name, flow in flows.items():
        for job in flow["jobs"].values():
            assert set(job.get("needs", []) if isinstance(job.get("needs"), list) else [job.get("needs")]) <= {
                None, *flow["jobs"]
            }  # fmt: skip
            if "uses" in job:
                assert (ROOT / job["uses"]).is_file(), name
            for line in (step.get("run", "") for step in job.get("steps", [])):
                assert all((ROOT / p).is_file() for p in re.findall(r"deploy/\w+\.py", line)), name
                assert {t for t in re.findall(r"^make ([a-z-]+)", line, re.M)} <= made, name
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    for flow, job in (("tests.yml", "tests"), ("wheel.yml", "install")):
        matrix = flows[flow]["jobs"][job]["strategy"]["matrix"]
        assert named == {*matrix["python"], *(row["python"] for row in matrix["include"])}, flow


def test_the_release_workflow_publishes_only_what_was_built_and_tried():
    jobs = yaml.safe_load(text(".github/workflows/release.yml"))["jobs"]
    assert set(jobs["publish"]["needs"]) == {"wheel", "version"}
    assert {jobs[name]["needs"] for name in ("github", "hub")} == {"publish"}
    check = jobs["version"]["steps"][-1]["run"]
    place = check.split()[-1]
    assert re.search(r'^__version__ = "', text(place), re.M)


def test_scripts_of_deploy_need_no_more_than_they_say():
    """release.py runs on a bare Python, push.py with huggingface_hub."""
    allowed = {"release.py": set(), "push.py": {"huggingface_hub", "release"}}
    for name, more in allowed.items():
        tree = ast.parse(text(DEPLOY / name))
        tops = {
            n.split(".")[0]
            for node in ast.walk(tree)
            for n in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert tops - set(sys.stdlib_module_names) == more, name
