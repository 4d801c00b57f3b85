"""A user's metric, explainer, head, mechanism and block, each in a file of its own, by ``--import`` alone.

The files are the examples of docs/extend.md, written outside the project.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from own_names import forgetting
from PIL import Image

import xattn
from xattn.cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extend.md"
EXAMPLE = re.compile(r"^```python\n(# (my_\w+\.py)\n.*?)^```", re.S | re.M)
SMALL = ("--weights", "random", "--input-size", "64", "--device", "cpu")
CNN = ("-b", "test_resnet", *SMALL)
VIT = ("-b", "test_vit", *SMALL)


def run(line: list[str], *options: str) -> int:
    """The command's exit code; random weights are the same in every call."""
    torch.manual_seed(0)
    return main([*line, *options])


@pytest.fixture
def own(tmp_path_factory, monkeypatch) -> Callable[..., tuple[str, ...]]:
    """``own("metric", ...)``: the options that import these files of the page; forgotten at the end."""
    folder = tmp_path_factory.mktemp("own")
    for text, name in EXAMPLE.findall(PAGE.read_text(encoding="utf-8")):
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("xattn.cli.imports._imported", [])
    before = set(sys.modules)

    def options(*kinds: str) -> tuple[str, ...]:
        return tuple(word for kind in kinds for word in ("--import", str(folder / f"my_{kind}.py")))

    with forgetting():
        yield options
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(10):
        (folder / ("cat" if i % 2 else "dog")).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("cat" if i % 2 else "dog") / f"{i}.png")
    return str(folder)


def names(pack: Path) -> set[str]:
    return {entry.method for entry in xattn.load_pack(pack)}


def test_without_import_they_are_unknown(photos, tmp_path, capsys):
    assert (
        main(["explain", photos, *CNN, "--explainers", "edges", "--output", f"{tmp_path}/out"]) == 2
    )
    assert "unknown explainer 'edges'" in capsys.readouterr().err


def test_list_shows_them(own, capsys):
    assert (
        main(["list", *own("metric", "explainer", "explainer_class", "head", "attention", "block")])
        == 0
    )
    rows = dict(
        line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line
    )
    for title, name in (
        ("metrics", "in_middle"),
        ("groups of metrics", "in_middle"),
        ("explainers", "edges"),
        ("explainers", "blurred"),
        ("heads to train", "one_query"),
        ("attention mechanisms", "cosine"),
        ("blocks", "mean_mixer"),
    ):
        assert name in rows[title].split(", "), title


def test_evaluate_and_explain(own, photos, tmp_path):
    out = tmp_path / "evaluated"
    line = ["evaluate", photos, *CNN, "--explainers", "edges", "blurred", "--metrics", "in_middle"]
    parts = own("explainer", "explainer_class", "metric")
    assert main([*line, "--limit", "2", *parts, "--output", str(out)]) == 0
    table = (out / "results.csv").read_text()
    assert "edges,in_middle," in table and "randomized_edges,in_middle," in table
    line = ["explain", photos, *CNN, "--explainers", "edges", "blurred", "--limit", "1"]
    options = ("--options", "edges.channels=absolute", "blurred.size=3")
    assert (
        main([*line, *options, *own("explainer", "explainer_class"), "--output", f"{tmp_path}/e"])
        == 0
    )
    assert names(tmp_path / "e") == {"edges", "blurred"}
    [edges] = [e for e in xattn.load_pack(tmp_path / "e") if e.method == "edges"]
    assert edges.protocol["notes"] == ["attributions of several channels: absolute sum"]


def test_compare_and_the_viewer_that_has_not_imported_the_metric(
    own, photos, tmp_path, monkeypatch
):
    out = tmp_path / "root" / "compared"
    line = [
        "compare",
        photos,
        *CNN,
        "--explainers",
        "edges",
        "--metrics",
        "in_middle",
        "--limit",
        "3",
    ]
    with forgetting():
        assert main([*line, *own("explainer", "metric"), "--output", str(out)]) == 0
    for name in ("leaderboard.md", "leaderboard.csv", "images.csv", "report.html"):
        assert "in_middle" in (out / name).read_text(), name
    assert "edges" in names(out / "pack")
    pytest.importorskip("streamlit")
    from streamlit.testing.v1 import AppTest

    from xattn.app import state

    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path / "root"))

    def page():
        import streamlit as st

        from xattn.app import state
        from xattn.app.pages.compare import page as compare

        library = state.library()
        (info,) = library.packs()
        compare.page(state.Context(library, library.open(info.id), st.query_params.to_dict()))

    shown = AppTest.from_function(page, default_timeout=600)
    shown.query_params["metric"] = "in_middle"
    shown.run()
    assert not shown.exception, shown.exception
    assert any("share of the map in the middle" in caption.help for caption in shown.caption)


def test_probe_and_its_head_in_explain_and_evaluate(own, photos, tmp_path, capsys):
    head, quick = own("head"), ("--epochs", "1", "--batch-size", "4")
    probed, folder = f"{tmp_path}/probed", f"{tmp_path}/probed/one_query/head"
    with forgetting():
        assert (
            run(["probe", photos, *VIT, "--heads", "one_query", *quick, *head], "--output", probed)
            == 0
        )
    assert json.loads(Path(folder, "config.json").read_text())["head"] == "one_query"
    line = ["explain", photos, *VIT, "--heads", folder, "--limit", "1", "--output", f"{tmp_path}/e"]
    assert run(line) == 2
    assert "unknown head 'one_query'" in capsys.readouterr().err
    assert run(line, *head) == 0
    line = ["evaluate", photos, *VIT, "--probe", folder, "--limit", "2", "--no-sanity"]
    assert run(line, "--output", f"{tmp_path}/evaluated", *head) == 0
    assert "one_query,AD," in (tmp_path / "evaluated" / "results.csv").read_text()


def test_a_mechanism_stands_in_for_a_models_own(own, photos, tmp_path):
    line = [
        "explain",
        photos,
        *VIT,
        "--mechanism",
        "cosine",
        "--explainers",
        "rollout",
        "--limit",
        "1",
    ]
    assert main([*line, *own("attention"), "--output", f"{tmp_path}/e"]) == 0
    [found] = xattn.load_pack(tmp_path / "e")
    assert "cosine" in json.dumps(found.protocol["backbone"])


def test_the_viewers_jobs_import_what_it_was_started_with(own, photos, tmp_path, monkeypatch):
    pytest.importorskip("streamlit")
    from xattn.app.jobs.job_files import Spec
    from xattn.app.jobs.jobs import Jobs
    from xattn.app.state import Settings
    from xattn.cli.model import BackboneArgs

    started = []
    monkeypatch.setattr("xattn.app.serving.server.serve", lambda *given: started.append(given[0]))
    head = own("head")
    assert main(["app", str(tmp_path), *VIT, *head]) == 0
    [settings] = started
    assert isinstance(settings, Settings) and settings.imports == head[1::2]
    jobs = Jobs(tmp_path, Path(photos), BackboneArgs("test_vit"), settings.imports)
    spec = Spec("probe", ".", heads=("one_query",), epochs=1)
    assert f"--import {head[1]}" in jobs.preview(spec, "mine")
    assert f"--import {head[1]}" in jobs.explain_line(spec, tmp_path)
