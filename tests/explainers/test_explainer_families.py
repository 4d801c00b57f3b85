"""The page of explainers by family says what was found."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from xattn.detection import load_detector
from xattn.eval.studies import explainer_families
from xattn.explainers.base import EXPLAINERS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_of_its_raw_values():
    page = DOCS / f"{explainer_families.PAGE}.md"
    with page.with_suffix(".csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["kind"] for row in rows} == set(explainer_families.KINDS)
    assert page.read_text(encoding="utf-8") == "\n".join(explainer_families.page_of(rows)) + "\n"


def test_a_family_that_cannot_be_loaded_has_the_reason_in_every_row():
    def refused():
        raise ValueError("its features\nare no map")

    rows = list(explainer_families.try_family(refused, ["cam", "rise"]))
    assert [(r["size"], r["result"], r["reason"]) for r in rows] == [
        ("", "no", "its features are no map")
    ] * 2


def test_methods_of_many_passes_are_run_and_not_only_made():
    names = ("d_rise", "integrated_gradients", "odam", "saliency", "cam")

    def corner(images):
        return [([[4.0, 4.0, 40.0, 40.0]], [0], [float(x.mean())]) for x in images]

    detector = load_detector(corner, input_size=64, class_names=["a"])
    view = detector.of(detector.best_candidates(torch.ones(3, 64, 64)))
    found = {row["explainer"]: row for row in explainer_families.try_family(lambda: view, names)}
    assert [name for name in names if found[name]["result"] == "runs"] == ["d_rise"]
    assert "answers without a gradient" in found["integrated_gradients"]["reason"]


def test_what_was_tried_is_not_tried_again(tmp_path, monkeypatch):
    names = ("saliency", "centre")
    entries = [EXPLAINERS.entry(name) for name in names]
    monkeypatch.setattr(EXPLAINERS, "entries", lambda: entries)
    kind, loads = explainer_families.KINDS["clips"], []

    def families(tests):
        module = explainer_families.module_of(Path(__file__).parents[1] / "clip_networks.py")
        yield "r3d", "", lambda: loads.append("r3d") or module.backbone("r3d")

    monkeypatch.setitem(
        explainer_families.KINDS, "clips", type(kind)(**{**vars(kind), "families": families})
    )
    page = tmp_path / "page.md"
    lines = list(explainer_families.study(page, only=["clips"]))
    assert lines == ["r3d: 2 of 2 run", f"page: {page}"] and loads == ["r3d"]
    assert list(explainer_families.study(page, only=["clips"])) == [f"page: {page}"]
    assert loads == ["r3d"] and "## Networks for clips" in page.read_text(encoding="utf-8")


def test_kinds_and_networks_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"^only: got \['gpt'\]; give some of timm, clips"):
        next(explainer_families.study(only=["gpt"]))
    with pytest.raises(ValueError, match="^tests: no file nowhere/clip_networks.py; run it from a"):
        next(explainer_families.study(only=["clips"], tests=Path("nowhere")))
