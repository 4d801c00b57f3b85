"""Accuracy on labelled photos: against counting by hand, Wilson's formula, and the network's own answers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xattn import load_backbone
from xattn.cli.entry import main
from xattn.eval.accuracy import measure_accuracy

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Colours(nn.Module):
    """The logits of red, green and blue are the photo's mean colours; then seven that are never first."""

    class_names = (*COLOURS, *(f"other {i}" for i in range(7)))

    def forward_taps(self, x):
        mean = x.mean((2, 3))
        return torch.cat([mean, mean.new_full((len(x), 7), -9.0)], 1), [x]


@pytest.fixture
def backbone():
    return load_backbone(Colours(), input_size=16, mean=0.5, std=0.5)


@pytest.fixture
def photos(tmp_path):
    """Three photos of each colour; the last of red is blue, and a folder has another label."""
    for folder, colour in [*COLOURS.items(), ("dogs", (9, 9, 9))]:
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in range(3):
            shown = COLOURS["blue"] if (folder, i) == ("red", 2) else colour
            Image.new("RGB", (20, 20), shown).save(tmp_path / "photos" / folder / f"{i}.png")
    return tmp_path / "photos"


def wilson(right, n, z=1.959964):
    middle = (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(right / n * (1 - right / n) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def test_shares_are_counted_by_hand_with_wilsons_interval(backbone, photos):
    (photos / "green" / "damaged.png").write_bytes(b"no photo")
    found = measure_accuracy([backbone], photos, batch_size=4)
    assert found.ranks.shape == (1, 9) and found.unlabelled == 3
    assert [s.id.rpartition("/")[2] for s in found.skipped] == ["damaged.png"]
    first, five = found.top_accuracy(0), found.top_accuracy(0, 5)
    assert first.mean == 8 / 9 and five.mean == 1
    assert (first.lo, first.hi) == pytest.approx(wilson(8, 9), abs=1e-6)
    assert (five.lo, five.hi) == pytest.approx(wilson(9, 9), abs=1e-6)


def test_labels_may_be_a_file(backbone, photos, tmp_path):
    rows = [f"{folder}/{i}.png,{folder}" for folder in COLOURS for i in range(3)]
    rows += [f"dogs/{i}.png," for i in range(3)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    assert (
        measure_accuracy([backbone], photos, str(tmp_path / "labels.csv")).top_accuracy(0).mean
        == 8 / 9
    )


def test_what_has_no_accuracy_is_refused(backbone, photos, tmp_path):
    several = load_backbone(Colours(), input_size=16, mean=0.5, std=0.5, task="multilabel")
    with pytest.raises(
        ValueError, match="the task of Colours is multilabel, but accuracy needs one class"
    ):
        measure_accuracy([several], photos)
    with pytest.raises(
        ValueError, match="labels: none of 3 photos is labelled with a class of Colours"
    ):
        measure_accuracy([backbone], photos / "dogs")


def test_the_command_compares_a_conversion_with_the_network_as_trained(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        pixels = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    torch.manual_seed(0)
    network = ["-b", "test_vit", "--weights", str(tmp_path / "w.pth"), "--device", "cpu"]
    backbone = load_backbone("test_vit", None, num_classes=6)
    torch.save(backbone.model.state_dict(), tmp_path / "w.pth")
    names = [str(i) for i in range(6)]
    (tmp_path / "names.txt").write_text("\n".join(f"class {n}" for n in names))
    network += ["--class-names", str(tmp_path / "names.txt")]
    photos = sorted((tmp_path / "photos").iterdir())
    from xattn.photos.images import load_image
    from xattn.photos.view import prepare

    images = torch.stack([prepare(load_image(p), backbone.preprocessing)[0] for p in photos])
    own = backbone.logits(images).argmax(1).tolist()
    (tmp_path / "own.csv").write_text(
        "\n".join(f"{p.name},{c}" for p, c in zip(photos, own, strict=True))
    )
    words = ["accuracy", str(tmp_path / "photos"), *network, "--labels", str(tmp_path / "own.csv")]
    assert main([*words, "--mechanism", "gna:kernel=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    trained, made = (line.split("|")[1:-1] for line in lines[2:4])
    assert trained[0].strip() == "test_vit" and trained[1].strip() == "100.0 [75.8, 100.0]"
    assert made[0].strip().startswith("test_vit (gna")
    line = lines[-1].partition(": ")[2]
    lost, gained = int(line.split()[0]), int(line.partition(", and ")[2].split()[0])
    assert made[1].split()[0] == f"{100 * (12 - lost) / 12:.1f}" and gained == 0
