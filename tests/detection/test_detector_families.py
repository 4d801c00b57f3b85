"""The page of explainers by family of detectors says what was found."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from xattn.detection import load_detector
from xattn.eval.studies import clip_families, detector_families, segmenter_families
from xattn.explainers.base import EXPLAINERS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("study", "networks"),
    [
        (detector_families, "detectors"),
        (segmenter_families, "segmentation networks"),
        (clip_families, "networks for clips"),
    ],
)
def test_the_page_is_made_of_its_raw_values(study, networks):
    page = DOCS / f"{study.PAGE}.md"
    with page.with_suffix(".csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    made = detector_families.page_of(rows, networks, study.PAGE, *study.ABOUT)
    assert page.read_text(encoding="utf-8") == "\n".join(made) + "\n"


def test_methods_of_many_passes_are_run_and_not_only_made(monkeypatch):
    names = ("d_rise", "integrated_gradients", "odam", "saliency", "cam")
    entries = [EXPLAINERS.entry(name) for name in names]
    monkeypatch.setattr(EXPLAINERS, "entries", lambda: entries)

    def corner(images):
        return [([[4.0, 4.0, 40.0, 40.0]], [0], [float(x.mean())]) for x in images]

    detector = load_detector(corner, input_size=64, class_names=["a"])
    view = detector.of(detector.best_candidates(detector_families.torch.ones(3, 64, 64)))
    found = {
        row["explainer"]: row
        for row in detector_families.rows_of("a function", view, {"cnn", "detector"})
    }
    assert [name for name in names if found[name]["result"] == "runs"] == ["d_rise"]
    assert "answers without a gradient" in found["integrated_gradients"]["reason"]
    with pytest.raises(ValueError, match="^networks: no file nowhere.py; run it from a checkout"):
        next(detector_families.study(networks=Path("nowhere.py")))
