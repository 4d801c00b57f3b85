"""The study of lesions: what it measures, resuming, refusals, its command, and its networks in others."""

import numpy as np
import pytest
import torch

from xattn import cli
from xattn.eval.studies import lesions
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.lesions import LesionConfig, inside_outside, pointing
from xattn.eval.studies.models.lesions import Kind, samples
from xattn.models.masks import load_network
from xattn.packs.reader import load_pack
from xattn.photos.volumes import Volume, write_volume

pytest.importorskip("nilearn", reason="the extra xattn[volumes] is not installed")
SHORT = LesionConfig(seeds=1, slices=16, tests=12, epochs=1, volumes=4, volume_tests=2, steps=1)
OPTIONS = (
    "--slices 16 --tests 12 --epochs 1 --volumes 4 --volume-tests 2 --steps 1 --seeds 1".split()
)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesions")
    list(lesions.study(folder, LesionConfig(**{**vars(SHORT), "parts": ("slices",)})))
    return folder


def test_dice_counts_an_empty_answer_to_a_clean_sample():
    masks, truth = torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 4, 4)
    masks[0, 0, :2], truth[0, 0, 1:3] = 1, 1
    masks[1, 0, 0, 0] = 1
    truth[2, 0, 0, 0] = 1
    assert lesions.dice(masks, truth).tolist() == [0.5, 0.0, 0.0, 1.0]


def test_the_threshold_is_the_best_one():
    truth = torch.zeros(1, 1, 4, 4)
    truth[..., 0] = 1
    probabilities = truth * 0.1 + 0.62
    assert 0.62 <= lesions.best_threshold(probabilities, truth) < 0.72


def test_components_that_meet_a_lesion_are_not_wrong():
    truth, mask = torch.zeros(1, 6, 6), torch.zeros(1, 6, 6)
    truth[0, 0, 0] = 1
    mask[0, 0, :3] = 1
    mask[0, 4, 1:3] = mask[0, 3, 5] = 1
    assert sorted(lesions.wrong_components(mask, truth)) == [1, 2]
    assert lesions.wrong_components(truth, truth) == []


def test_pointing_and_means():
    maps = torch.tensor([[0.0, 3.0], [3.0, 1.0]])[None, None]
    masks = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    assert pointing(maps, masks).tolist() == [0.5]
    assert inside_outside(maps, masks) == [2.0, 1.5]


def test_patches_of_training_volumes_are_half_on_a_lesion(monkeypatch):
    seen = samples(0, 6, lesions.VOLUMES)
    shares = []
    monkeypatch.setattr(
        lesions,
        "fit",
        lambda net, batches, *_: shares.extend(m.flatten(1).sum(1) for _, m in batches),
    )
    lesions.train_volumes(None, seen, LesionConfig(steps=4), 0)
    shares = torch.stack(shares)
    assert shares.shape == (4, 4) and (shares[:, :2] > 0).all()


def test_other_settings_are_refused(output):
    with pytest.raises(ValueError, match="^output: .*"):
        list(lesions.study(output, LesionConfig(**{**vars(SHORT), "lr": 0.5})))


def test_the_command_adds_volumes(output, capsys, monkeypatch):
    monkeypatch.setattr(lesions, "NETS", {"unet": lesions.PLAIN})
    assert main(["lesions", "--parts", "volumes", *OPTIONS, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "| plain U-Net | " in printed and "| falsely marked components per volume |" in printed
    assert load_network(output / "networks" / "volumes-unet-0").dims == 3


def test_axial_slices_of_a_volume_are_explained(output, tmp_path):
    image = samples(0, 1, Kind(size=(24, 24, 20), radius=(2.0, 4.0))).images[0, 0].numpy()
    scan = write_volume(tmp_path / "scan.nii.gz", Volume(image, np.diag([3.0, 3, 3, 1])))
    network = str(output / "networks" / "slices-agunet-0")
    command = ["explain", str(scan), "-b", network, "--explainers", "gates", "--classes", "lesion"]
    assert cli.main([*command, "--output", str(tmp_path / "pack")]) == 0
    pack = load_pack(tmp_path / "pack")
    assert pack[0].image_id == "scan-z000" and len(pack) > 10
    assert {item.map.shape for item in pack} == {(64, 64)}


def test_its_networks_explain_slices_and_are_compared_with_the_masks(output, tmp_path):
    network, photos = str(output / "networks" / "slices-agunet-0"), output / "photos-slices"
    images = sorted((photos / "images").iterdir())
    command = [
        "explain",
        str(images[0]),
        "-b",
        network,
        "--explainers",
        "gates",
        "--classes",
        "lesion",
    ]
    assert cli.main([*command, "--output", str(tmp_path / "pack")]) == 0
    pack = load_pack(tmp_path / "pack")
    assert pack[0].target_name == "lesion" and pack[0].method == "gates"
    compare = ["compare", str(images[0]), "-b", network, "--explainers", "gates"]
    compare += ["--metrics", "localization", "randomization", "--annotations", str(photos)]
    assert cli.main([*compare, "--output", str(tmp_path / "comparison")]) == 0
    assert "gates" in (tmp_path / "comparison" / "leaderboard.md").read_text()


def test_a_mask_network_brings_its_own_weights(output):
    network = str(output / "networks" / "slices-agunet-0")
    assert cli.main(["explain", "a.png", "-b", network, "--weights", "random"]) != 0
