"""The head evidence on detections: its maps before training, what it learns, and how it is saved and used."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from small_detectors import SIDE, torchvision_detector

import xattn
from xattn.cli import main
from xattn.detection import load_detector
from xattn.heads.class_reading import DetectionReading, covered
from xattn.packs.reader import load_pack


def detector_and_photo(kind="fcos"):
    detector = load_detector(torchvision_detector(kind))
    return detector, torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def write_photos(folder, count=4):
    for i in range(count):
        pixels = torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(i))
        Image.fromarray((pixels * 255).byte().numpy()).save(folder / f"{i}.png")
    return folder


def test_the_share_of_a_cell_inside_a_box_is_its_overlap():
    # x from 1 to 7 of 10 pixels, y from 2.5 to 5 of 10, on a grid of 3 x 5 cells.
    found = covered(torch.tensor([[[0.1, 0.25, 0.7, 0.5]]]), (3, 5))[0, 0]
    rows, columns = torch.tensor([0.25, 0.5, 0.0]), torch.tensor([0.5, 1, 1, 0.5, 0])
    assert torch.allclose(found, rows[:, None] * columns)


@pytest.mark.parametrize("kind", ["fcos", "maskrcnn", "ssd"])
def test_before_training_the_map_is_the_likeness_to_the_mean_feature_of_the_box(kind):
    detector, photo = detector_and_photo(kind)
    view = detector.of(detector.best_candidates(photo, 3))
    taps = view(photo[None])
    head = xattn.create_head("evidence", view)
    found = head(taps, torch.tensor([[2, 0]]))[0]
    assert torch.allclose(found, head(taps)[0, [2, 0]], atol=1e-5)
    reading = DetectionReading(view.boxes)
    read = reading(taps, torch.tensor([[1]]), "multilabel")
    x0, y0, x1, y1 = (v / SIDE for v in view.detections[1].place)
    expected = 0
    for f in taps.maps:
        f = f[0] - f[0].mean((1, 2), keepdim=True)
        inside = covered(torch.tensor([[[x0, y0, x1, y1]]]), f.shape[1:])[0, 0]
        row = (f * inside).sum((1, 2)) / inside.sum()
        map_ = (row[:, None, None] * f).sum(0)
        map_ = map_ / map_.std(correction=0)
        size = read.own.shape[2:]
        expected = expected + torch.nn.functional.interpolate(
            map_[None, None], size, mode="bilinear"
        )
    assert torch.allclose(read.own, expected / len(taps.maps), atol=1e-4)
    assert (read.own - read.others).sum() > 0  # the box


def test_a_trained_head_explains_detections_that_it_never_saw(tmp_path):
    detector, photo = detector_and_photo()
    photos = tmp_path / "photos"
    photos.mkdir()
    write_photos(photos)
    view = detector.of(detector.detect_all(photos, 0.0, 2), "class")
    assert len(view.detections) == 8
    head = xattn.create_head("evidence", view, hidden=4, components=4)
    config = xattn.TrainConfig("outcomes", epochs=2, batch_size=2, masks=4, workers=0)
    with pytest.warns(UserWarning, match="photos"):
        result = xattn.fit(head, view, photos, config, output=tmp_path / "run", progress=False)
    assert result.steps == 4
    saved = tmp_path / "run" / "head"
    found = detector.detect(photo, 0.0, 3)
    maps, loaded = (
        torch.stack(
            [
                torch.tensor(e.map)
                for e in xattn.explain_detections(
                    photo, detector, one, detections=found, score="class"
                )
            ]
        )
        for one in (head, saved)
    )
    assert len(maps) == 3 and torch.equal(maps, loaded)
    assert not torch.equal(maps[0], maps[1])
    # The same head on a view of a single one of them.
    alone = detector.of(found[1:2], "class")
    again = xattn.load_head(saved, alone).explanation(alone(photo[None]), 0)
    assert again.shape[:2] == (1, 1)
    own = xattn.create_explainer("head", alone, xattn.load_head(saved, alone)).attribute(
        photo[None], 0
    )
    assert torch.allclose(own, again)


def test_a_table_of_other_detections_is_refused(tmp_path):
    detector, _ = detector_and_photo()
    photos = write_photos(tmp_path)
    found = detector.detect_all(photos, 0.0, 2)
    from xattn.training.outcomes import cache_outcomes

    with pytest.warns(UserWarning, match="photos"):
        table = cache_outcomes(
            detector.of(found), photos, tmp_path / "t", masks=4, workers=0, progress=False
        )
    other = detector.of(found, "class")
    head = xattn.create_head("evidence", other)
    with pytest.raises(
        ValueError, match=r"^table: its outcomes were computed for target 8 detections by"
    ):
        xattn.fit(head, other, photos, xattn.TrainConfig("outcomes", masks=4), table=table)


def test_what_a_head_of_detections_cannot_do_is_refused():
    detector, photo = detector_and_photo()
    with pytest.raises(ValueError, match=r"give detections, detector.of\("):
        xattn.create_head("evidence", detector)
    view = detector.of(detector.best_candidates(photo))
    head = xattn.create_head("evidence", view)
    with pytest.raises(ValueError, match=r"^passes: got 2, but boxes are not mirrored"):
        xattn.create_explainer("head", view, head, passes=2)
    with pytest.raises(ValueError, match=r"^threshold: no detection above 1.0 in 1 photos"):
        detector.detect_all(["tests/../docs/sheet.jpg"], 1.0)


def test_the_commands_train_a_head_and_explain_with_it(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from small_detectors import torchvision_detector\n"
        "def make():\n"
        "    net = torchvision_detector('fcos')\n"
        "    net.head.classification_head.cls_logits.bias.data.fill_(2.0)\n"
        "    return net\n"
    )
    photos = tmp_path / "photos"
    photos.mkdir()
    write_photos(photos)
    detector = ["--detector", f"{tmp_path / 'mine.py'}:make", "--device", "cpu"]
    run = ["--output", str(tmp_path / "run"), "--epochs", "1", "--masks", "4", "--workers", "0"]
    assert main(["train", str(photos), *detector, *run]) == 0
    saved = ["--heads", str(tmp_path / "run" / "head"), "--output", str(tmp_path / "pack")]
    assert main(["explain", str(photos / "0.png"), *detector, *saved]) == 0
    assert [one.method for one in load_pack(tmp_path / "pack")] == ["head"] * 10
    assert main(["train", str(photos), *detector, *run, "--taps", "norm1"]) == 2
