"""The study of the localist dial: its tables, resuming, refusals, and the command; bounds with a real ViT."""

import dataclasses
import json

import numpy as np
import pytest
from small_transformers import tiny

from xattn import load_backbone
from xattn.eval.studies import localist_dial
from xattn.eval.studies.localist_dial import DialStudyConfig, study

NAMES = ["tench", "goldfish", "great white shark"]
CONFIG = DialStudyConfig(betas=(0.0, 8.0), last=1, steered=2, draws=3, batch_size=4)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny(grid=(4, 4), num_classes=3, depth=2).model, class_names=NAMES)


@pytest.fixture(scope="module")
def done(photos, backbone, tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return output, list(study(backbone, photos, output=output, config=CONFIG))


def rows(lines):
    found = [line.strip("| ").split(" | ") for line in "\n".join(lines).splitlines()]
    return {tuple(row[:2]): row for row in found if len(row) > 1}


def number(cell):
    return float(cell.split()[0])


def test_the_dial_draws_attention_together_and_0_is_as_trained(done):
    output, lines = done
    table = rows(lines)
    depth = len({key[0] for key in table if key[0] in ("1", "0-1")})
    assert depth == 2
    for blocks in ("1", "0-1"):
        plain, turned = table[blocks, "0"], table[blocks, "8"]
        assert number(plain[3]) == 100 and number(plain[2]) < number(turned[2])
    assert (output / "report.md").read_text().splitlines() == "\n".join(lines[:-1]).splitlines()


def test_steering_compares_the_quadrants_of_each_photo(done):
    output, lines = done
    files = [output / f"blocks-0-1-beta-2-target-{b}.json" for b in range(4)]
    p = np.array([json.loads(file.read_text())["p"] for file in files])
    assert p.shape == (4, 6)
    said = next(line for line in lines if "best less worst" in line)
    assert number(said.split(" | ")[1]) == pytest.approx((p.max(0) - p.min(0)).mean(), abs=6e-4)
    assert "by chance 25 %" in lines[-1] or any("by chance 25 %" in line for line in lines)


def test_recruitment_counts_the_clusters_that_were_drawn(done):
    text = "\n".join(done[1])
    assert "| three clusters, variance given | 3 | 3 of 3 |" in text
    assert "| one cluster, variance given | 1 | 3 of 3 |" in text


def test_a_stopped_study_goes_on_with_more_turns_and_gives_the_same_report(
    done, photos, backbone, monkeypatch
):
    output, lines = done
    (output / "blocks-0-1-beta-8.json").unlink()
    made = []
    before = localist_dial.converted
    monkeypatch.setattr(localist_dial, "converted", lambda *a: made.append(a[2:]) or before(*a))
    assert list(study(backbone, photos, output=output, config=CONFIG)) == lines
    assert made == [(range(2), {"beta": 8.0})]
    more = dataclasses.replace(CONFIG, betas=(0.0, 8.0, 1.0))
    assert len(list(study(backbone, photos, output=output, config=more))) == len(lines) + 2
    other = dataclasses.replace(CONFIG, seed=1)
    with pytest.raises(ValueError, match="output: .* has other settings or photos"):
        list(study(backbone, photos, output=output, config=other))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"last": 3}, "last: got 3; .* has 2 blocks"),
    ],
)
def test_what_does_not_fit_is_named(change, message, backbone, photos, tmp_path):
    with pytest.raises(ValueError, match=message):
        config = dataclasses.replace(CONFIG, **change)
        list(study(backbone, photos, output=tmp_path / "out", config=config))
    assert not (tmp_path / "out").exists()
