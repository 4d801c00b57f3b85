"""Clips and volumes explained whole: the frame that decides, packs, pictures, sources, bad input."""

import cv2
import numpy as np
import pytest
import torch
from clip_networks import Tiny
from PIL import Image
from torch import nn

from xattn import create_explainer, explain, explain_clip, explain_video, load_backbone, load_pack
from xattn.backbone.taps import resized
from xattn.cli.entry import main
from xattn.eval.studies.clip_cues import FRAMES, SIDE, drawn, trained


@pytest.fixture(scope="module")
def network():
    return trained()


@pytest.fixture(scope="module")
def planted():
    return drawn(range(16))


def as_array(clip):
    return (clip.permute(1, 2, 3, 0).numpy() * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [
        ("gradcam", {}, 0),  # a cell sees three frames, so its evidence may be a frame off
        ("cam", {}, 0),
        ("integrated_gradients", {"steps": 8}, 0.9),
        ("occlusion", {"size": 4, "stride": 4, "frames": 1, "fill": "mean"}, 0.9),
    ],
)
def test_the_map_points_at_the_frame_that_decides(network, planted, name, options, exact):
    clips, classes, _ = planted
    assert torch.equal(network.logits(clips) > 0, torch.eye(2)[classes] > 0)

    def away(data, name, **options):
        """By how many frames the highest value is away from the square."""
        maps = create_explainer(name, network, **options).attribute(*data[:2])
        peak = resized(maps, (FRAMES, SIDE, SIDE))[:, 0].amax((2, 3)).argmax(1)
        return (peak - data[2].any(3).any(2).int().argmax(1)).abs()

    found, chance = away(planted, name, **options), away(drawn(range(60)), "random")
    assert (found <= 1).float().mean() >= 0.9 and (
        chance <= 1
    ).float().mean() < 0.6  # by chance 0.34
    assert (found == 0).float().mean() >= exact and (chance == 0).float().mean() < 0.25  # 1/8


def test_a_pack_holds_a_map_a_frame_a_film_and_strips(network, planted, tmp_path):
    clips, classes, truth = planted
    out = tmp_path / "pack"
    found = explain_clip(as_array(clips[0]), network, "hirescam", top=2, output=out, fps=4)
    assert [e.target for e in found] == [int(classes[0]), 1 - int(classes[0])]
    first = found[0]
    assert first.map.shape == network.tap_sizes[-1] and first.by_frame.sum() == pytest.approx(1)
    assert abs(int(first.by_frame.argmax()) - int(truth[0].any(2).any(1).int().argmax())) <= 1
    pack = load_pack(out)
    assert len(pack) == 2 * FRAMES and (out / "overlay.mp4").stat().st_size > 500
    assert sorted(p.name for p in (out / "overlays").glob("strip-*")) == [
        "strip-0.png",
        "strip-1.png",
    ]
    shown = [e for e in pack if e.target == first.target]
    assert [e.image_id for e in shown] == [f"frame-{i:06d}" for i in range(FRAMES)]
    maps = np.stack([e.map for e in shown])
    np.testing.assert_array_equal(maps, first.normalized())
    assert maps.max() == pytest.approx(1, abs=1e-6) and len({float(m.max()) for m in maps}) > 1
    assert shown[0].is_mask and "min-max over the clip" in shown[0].protocol["map"]
    strip, gif = first.strip(count=4, side=32), first.film(tmp_path / "clip.gif", side=32)
    assert strip.width == 4 * 38 - 6
    with Image.open(gif) as film:
        assert film.n_frames == FRAMES and film.size == (32, 32)


def test_a_target_that_is_a_number(network, planted):
    (found,) = explain_clip(planted[0][0], network, "hirescam", target=lambda z: z[:, 0] - z[:, 1])
    z = network.logits(planted[0][:1])[0]
    assert found.probability == pytest.approx(float(z[0] - z[1]), rel=1e-4)
    assert found.strip(count=2, side=24).width == 2 * 30 - 6


def test_steps_of_the_map_are_brought_to_the_frames():
    network = load_backbone(Tiny(), input_size=16, frames=8, mean=0.5, std=0.5)
    (one,) = explain_clip(torch.rand(3, 8, 16, 16), network, "eigencam")
    assert one.map.shape == (4, 8, 8) and one.normalized().shape == (8, 8, 8)
    scaled = (one.map - one.map.min()) / np.ptp(one.map)
    np.testing.assert_allclose(one.normalized()[[0, -1]], scaled[[0, -1]], atol=1e-6)
    np.testing.assert_allclose(one.normalized()[1], 0.75 * scaled[0] + 0.25 * scaled[1], atol=1e-6)


def test_the_same_frames_give_the_same_map_however_they_are_given(network, planted, tmp_path):
    array = as_array(planted[0][0])
    tensor = torch.from_numpy(array).permute(3, 0, 1, 2)
    photos = [Image.fromarray(frame) for frame in array]
    given = (array, tensor, photos, list(array), list(tensor.movedim(1, 0)))
    first, *maps = [explain_clip(clip, network, "cam")[0].map for clip in given]
    for values in maps:
        np.testing.assert_allclose(values, first, atol=1e-5)
    longer = array.repeat(3, 0)
    (found,) = explain_clip(longer, network, "cam")
    assert found.numbers == (0, 3, 7, 10, 13, 16, 20, 23)


def test_grey_frames_are_taken_by_a_network_of_one_channel():
    network = load_backbone(Tiny(1), input_size=16, frames=8, mean=0.5, std=0.5)
    grey = np.random.default_rng(0).integers(0, 256, (8, 20, 16), dtype=np.uint8)
    given = (grey[..., None].repeat(3, -1), grey, grey[..., None], list(grey[..., None]))
    maps = [explain_clip(clip, network, "saliency")[0].map for clip in given]
    assert maps[0].any() and all(np.array_equal(one, maps[0]) for one in maps)


def test_a_clip_of_one_frame_repeated_a_short_one_and_one_frame(network, planted):
    frame = as_array(planted[0][0])[:1]
    (same,) = explain_clip(frame.repeat(FRAMES, 0), network, "saliency")
    with pytest.warns(UserWarning, match="has 1 frame and Sequential reads 8; they are repeated"):
        (short,) = explain_clip(frame, network, "saliency")
    np.testing.assert_allclose(short.map, same.map, atol=1e-6)
    assert short.numbers == (0,) * FRAMES
    ids = [e.image_id for e in short.explanations()]
    assert len(set(ids)) == FRAMES and ids[2] == "frame-000000-002"
    middle = same.by_frame[2:-2]  # away from the padding of both ends all frames are alike
    np.testing.assert_allclose(middle, middle.mean(), rtol=0.05)
    one = load_backbone(Tiny2(), input_size=16, frames=1, mean=0.5, std=0.5)
    (found,) = explain_clip(frame, one, "gradcam")
    assert found.map.shape[0] == 1 and found.by_frame.tolist() in ([1.0], [0.0])


class Tiny2(nn.Sequential):
    """A network that takes a single frame."""

    def __init__(self):
        super().__init__(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
                         nn.Flatten(), nn.Linear(4, 3))  # fmt: skip


def test_slices_of_a_volume_and_one_channel(tmp_path):
    pytest.importorskip("nibabel")
    from xattn.photos.volumes import Volume, write_volume

    values = np.random.default_rng(0).random((10, 12, 20), dtype=np.float32)
    values[:, :, :4] = 0  # slices that show nothing are left out
    path = write_volume(tmp_path / "scan.nii.gz", Volume(values, np.eye(4)))
    network = load_backbone(Tiny(1), input_size=16, frames=8, mean=0.5, std=0.5)
    (found,) = explain_clip(path, network, "saliency", output=tmp_path / "pack")
    assert found.unit == "slice" and found.numbers[0] == 4 and found.numbers[-1] == 19
    assert load_pack(tmp_path / "pack")[0].image_id == "slice-000004"


def test_the_command_explains_a_clip_whole(tmp_path, capsys):
    film = cv2.VideoWriter(str(tmp_path / "c.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for i in range(9):
        film.write(np.full((48, 64, 3), 25 * i, dtype=np.uint8))
    film.release()
    out = tmp_path / "pack"
    line = f"explain {tmp_path / 'c.mp4'} -b torchvision/mc3_18 --weights random --input-size 32 --frames 4"
    assert main([*line.split(), "--explainers", "hirescam", "--output", str(out)]) in (0, None)
    assert "c.mp4: " in capsys.readouterr().out
    ids = [e.image_id for e in load_pack(out)]
    assert ids == [f"frame-{i:06d}" for i in (0, 3, 5, 8)]
    assert len(list((out / "overlays").glob("strip-*.png"))) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda n, a: explain_clip(a[0], n), "clip: got an array"),
        (lambda n, a: explain_clip(a[:0], n), "clip: got an array"),
        (lambda n, a: explain_clip([], n), "clip: got an empty list"),
        (lambda n, a: explain_clip(7, n), "clip: got a int"),
        (lambda n, a: explain_clip(torch.rand(2, 8, 16, 16), n), r"give one clip \(3, T, H, W\)"),
        (lambda n, a: explain_clip(torch.rand(8, 3, 16, 16), n), r"clip.transpose\(0, 1\)"),
        (lambda n, a: explain_clip(a[..., :1], n), r"clip: .*clip.repeat\(3, -1\)"),
        (lambda n, a: explain_clip(a, n, fps=0), "fps: got 0; give frames per second"),
        (lambda n, a: explain_clip("s3://b/clip.mp4", n), "in a store; copy it here"),
        (lambda n, a: explain_clip(a, n, "mda"), "'mda' explains photos, but Sequential reads clips"),
        (lambda n, a: explain_clip(a, n, "libragrad"), "'libragrad' explains photos, .*'occlusion'"),
        (lambda n, a: explain_clip(a, n, "rollout"), "use 'gradcam' or 'occlusion'"),
        (lambda n, a: explain_clip(a, n, classes="green"), "green"),
        (lambda n, a: explain(Image.fromarray(a[0]), n, explainer="cam"), "use xattn.explain_clip"),
        (lambda n, a: create_explainer("cam", n).attribute([1], 0), "explain_clip"),
        (lambda n, a: explain_clip(a, load_backbone("test_resnet", None)), "xattn.explain_video"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(network, planted, call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(network, as_array(planted[0][0]))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_clip_for_a_network_of_photos(network, tmp_path):
    with pytest.raises(FileNotFoundError, match="clip: no file"):
        explain_clip(tmp_path / "none.mp4", network)
    film = cv2.VideoWriter(str(tmp_path / "c.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    film.write(np.zeros((48, 64, 3), dtype=np.uint8))
    film.release()
    with pytest.raises(ValueError, match="reads clips; use xattn.explain_clip"):
        explain_video(tmp_path / "c.mp4", network, explainer="cam")
