"""The study of depths: what it trains and measures is kept, folds share no photo, and settings are checked."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small_networks import made

from xattn.backbone import load_conversion
from xattn.eval.studies.conversion_depths import DepthStudyConfig, study

SMALL = DepthStudyConfig(
    last=(1, 2), photos=6, epochs=1, student_epochs=1, finetune_epochs=1, heads=2
)


@pytest.fixture(scope="module")
def vit():
    return made("vit")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory, photos):
    file = tmp_path_factory.mktemp("labels") / "labels.json"
    file.write_text(json.dumps({path.name: 0 for path in photos.iterdir()}))
    return file


@pytest.fixture(scope="module")
def done(vit, photos, labels, tmp_path_factory):
    output = tmp_path_factory.mktemp("depths")
    return output, list(study(vit, photos, labels, output, SMALL, progress=False))


def test_each_depth_is_measured_alone_and_with_updates(done):
    output, lines = done
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    assert [row[:2] for row in rows] == [
        [blocks, stage]
        for blocks in ("1", "0-1")
        for stage in ("the mechanism alone", "low-rank updates as well")
    ]
    assert all(len(row) == 10 for row in rows)
    assert rows[0][7:9] == rows[1][7:9]  # controls learn nothing
    assert (output / "report.md").read_text().splitlines() == lines[:-1]
    text = (output / "heads.csv").read_text()
    assert text.count("elu + 1") == text.count("Taylor") == text.count("hedgehog")


def test_folds_share_no_photo_and_updates_go_on_from_the_mechanism(done, vit):
    output, _ = done
    for last in (1, 2):
        for fold in (0, 1):
            folder = output / f"last-{last}" / f"fold-{fold}"
            found = {
                s: json.loads((folder / s / "result.json").read_text()) for s in ("alone", "lora")
            }
            assert all(len(one["right"]) == 3 for one in found.values())
            assert found["alone"]["dense"] == found["lora"]["dense"]
            start = json.loads((folder / "lora/run/run.json").read_text())["head"]["start"]
            config = json.loads((folder / "alone/run/conversion/config.json").read_text())
            assert start == config["sha256"]
            load_conversion(folder / "lora/run/conversion", vit)


def test_the_same_command_goes_on_and_other_settings_are_refused(done, vit, photos, labels):
    output, lines = done
    file = output / "last-2/fold-1/lora/result.json"
    before = json.loads(file.read_text())
    file.unlink()
    assert list(study(vit, photos, labels, output, SMALL, progress=False)) == lines
    assert json.loads(file.read_text()) == before
    other = replace(SMALL, epochs=2)
    with pytest.raises(ValueError, match="output: .* has other settings or photos"):
        list(study(vit, photos, labels, output, other, progress=False))


def test_what_does_not_fit_is_named(vit, photos, labels, tmp_path):
    def run(config):
        return list(study(vit, photos, labels, tmp_path / "out", config, progress=False))

    with pytest.raises(ValueError, match="last: got .* has 2 blocks"):
        run(replace(SMALL, last=(3,)))
    with pytest.raises(ValueError, match="folds: got 7 for 6 photos"):
        run(replace(SMALL, folds=7))
    assert not (tmp_path / "out").exists()
