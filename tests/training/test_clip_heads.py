"""The head evidence on clips: one frame is a photo, its masks, training, its files, and what is refused."""

import math

import numpy as np
import pytest
import torch
from clip_networks import Tiny, backbone, clips, flat

import xattn
from xattn import create_explainer, create_head, load_backbone, load_head, save_head
from xattn.backbone.taps import resized
from xattn.cli import main
from xattn.packs.reader import load_pack
from xattn.training.outcome_rows import KINDS, log_odds, mask_pairs, replacement_pixels
from xattn.training.outcomes import cache_outcomes
from xattn.training.sample import Sample


def tiny():
    torch.manual_seed(0)
    net = Tiny()
    net.fc.weight.data *= 30  # so that logits react to masks
    return load_backbone(net, input_size=(20, 16), frames=6, mean=0.4, std=0.3)


def write_clips(folder, count=3, frames=6):
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (frames, 20, 16, 3), dtype=np.uint8)
        np.save(folder / f"{i}.npy", pixels)
    return folder


@pytest.mark.parametrize("passes", [1, 4])
def test_one_frame_has_the_map_of_a_photo(passes):
    two, three = flat()
    photo = load_backbone(two, input_size=24, mean=0.5, std=0.5)
    clip = load_backbone(three, input_size=24, frames=1, mean=0.5, std=0.5)
    head, other = (create_head("evidence", net, hidden=4, components=3) for net in (photo, clip))
    draw = torch.Generator().manual_seed(3)
    state = {k: torch.randn(v.shape, generator=draw) for k, v in head.state_dict().items()}
    head.load_state_dict(state)
    for name, value in other.state_dict().items():
        wide = torch.zeros_like(value)
        if value.ndim == 5:  # there is one frame, so the kernel needs only its middle
            wide[:, :, value.shape[2] // 2] = state[name]
        state[name] = wide if value.ndim == 5 else state[name]
    other.load_state_dict(state)
    x, index = torch.rand(2, 3, 24, 24), torch.tensor([2, 0])
    expected = create_explainer("head", photo, head.eval(), passes=passes).attribute(x, index)
    found = create_explainer("head", clip, other.eval(), passes=passes)
    found = found.attribute(x[:, :, None], index)
    torch.testing.assert_close(found[:, :, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 6, 20, 40])
@pytest.mark.parametrize("kind", [*KINDS, "superpixels", "cells"])
def test_masks_of_clips_hide_in_time_and_space(kind, frames):
    coarse = torch.rand(1, 3, min(frames, 4), 4, 4, generator=torch.Generator().manual_seed(0))
    clip, grid = resized(coarse, (frames, 12, 10))[0], (min(frames, 28), 28, 28)
    guess = torch.rand(max(frames // 2, 1), 4, 4)
    found = mask_pairs(clip, guess, 6, "a", [kind], ["mean"], grid=grid)
    assert found.cells.shape == (6, *grid) and found.images.shape == (12, *clip.shape)
    share = found.cells.float().flatten(1).mean(1) / 255
    assert bool((share > 0.02).all()) and bool((share < 0.98).all())
    if frames > 1:
        assert float(found.cells.float().std(1).max()) > 0  # some cell is not alike in all frames
    if frames == 6 and kind not in ("superpixels", "evidence"):
        kept = torch.nn.functional.interpolate(
            found.cells[:, None].float() / 255, clip.shape[1:], mode="nearest-exact"
        )
        behind = clip.mean((1, 2, 3), keepdim=True)
        torch.testing.assert_close(found.images[:6], kept * clip + (1 - kept) * behind)


def test_a_blurred_clip_is_blurred_frame_by_frame():
    clip = torch.rand(3, 5, 30, 30)
    found = replacement_pixels(clip, "blur")
    for i in range(5):
        torch.testing.assert_close(found[:, i], replacement_pixels(clip[:, i], "blur"))


def test_a_row_holds_the_networks_outputs_and_training_moves_the_map(tmp_path):
    net, folder = tiny(), write_clips(tmp_path / "clips")
    with pytest.warns(UserWarning, match="only 3 photos"):
        table = cache_outcomes(
            net, folder, tmp_path / "table", masks=8, fills=["mean"], progress=False
        )
    row, (pixels,) = table.row(1), [torch.from_numpy(np.load(folder / "1.npy"))]
    assert row.masks.shape == (1, 8, 6, 28, 28) and row.logits.shape == (1, 9, 5)
    whole = (pixels.permute(3, 0, 1, 2).float() / 255)[None]
    torch.testing.assert_close(row.logits[:, 0], net.logits(whole), rtol=1e-2, atol=1e-2)
    odds = log_odds(net.logits(whole), torch.tensor([[2]]), "multiclass")
    assert math.isfinite(float(odds)) and float(row.log_odds(torch.tensor([[2]])).std()) > 0
    head = create_head("evidence", net, hidden=4, components=3)
    before = create_explainer("head", net, head).attribute(whole, 2)
    config = xattn.TrainConfig("outcomes", epochs=2, batch_size=2, crops=2, masks=4, workers=0)
    with pytest.warns(UserWarning, match="photos"):
        result = xattn.fit(head, net, folder, config, output=tmp_path / "run", progress=False)
    assert result.steps == 6 and not result.skipped
    loaded = load_head(tmp_path / "run" / "head", net)
    after = create_explainer("head", net, loaded).attribute(whole, 2)
    assert after.shape == before.shape == (1, 1, 6, 20, 16)
    assert not torch.allclose(after, before, atol=1e-4)
    (shown,) = xattn.explain_clip(folder / "1.npy", net, head, classes=2)
    np.testing.assert_allclose(shown.map, after[0, 0], atol=1e-4)


@pytest.mark.parametrize("family", ["r3d", "swin3d", "VideoMAE"])
def test_families_whose_logits_are_linear_in_the_last_map_have_a_head(family):
    net = backbone(family)
    head = create_head("evidence", net, parts=[])  # CAM, standardised
    x = clips(net)
    taps = net(x)
    found = head(taps, torch.tensor([1, 3]))
    sizes = [maps.shape[2:] for maps in taps.maps]
    assert found.shape == (2, 1, *(min(28, max(n)) for n in zip(*sizes, strict=True)))
    own = head.reading.own(taps, torch.tensor([[1], [3]]))
    # Up to the norm's divisor and constants, the mean over cells is the class's logit.
    both = [own.flatten(2).mean(2)[:, 0], taps.logits[[0, 1], [1, 3]]]
    if family == "VideoMAE":
        mean = taps.maps[-1].flatten(2).mean(2)
        norm = net.model.net.network.fc_norm
        both[0] = both[0] / (mean.var(1, correction=0) + norm.eps).sqrt()
        both[1] = both[1] - (net.classifier_weight @ norm.bias)[[1, 3]]
    torch.testing.assert_close(both[0] + net.classifier_bias[[1, 3]], both[1], rtol=1e-3, atol=1e-4)


def test_what_heads_cannot_do_with_clips_is_refused_in_one_line(tmp_path):
    net = tiny()
    head, folder = create_head("evidence", net), write_clips(tmp_path / "clips", 1)
    photo = load_backbone("test_resnet", weights=None, input_size=64)
    saved = save_head(create_head("ttame", photo), tmp_path / "of-photos")

    def config(objective):
        return xattn.TrainConfig("outcomes", objective=objective, masks=4, workers=0)

    calls = [
        (lambda: create_head("ttame", net), r"reads clips, but the head 'ttame' reads maps of photos"),
        (lambda: load_head(saved, net), r"^head: of-photos was trained with the model"),
        (lambda: create_head("evidence", backbone("mvit")), "MViT .*; use 'gradcam' or 'occlusion'"),
        (lambda: xattn.fit(head, net, folder, config("rank")), r"^objective: 'rank' trains on photos"),
        (lambda: xattn.fit(head, net, folder, config("shapley")), r"^objective: games .* reads clips"),
        (lambda: Sample(net, folder, tmp_path / "sample"), "^sample: .* reads clips"),
    ]  # fmt: skip
    for call, words in calls:
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_commands_train_explain_and_compare(tmp_path, capsys):
    import cv2
    from torchvision.models.video import mc3_18

    folder = write_clips(tmp_path / "clips", 2)
    film = cv2.VideoWriter(str(folder / "c.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for i in range(6):
        film.write(np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    film.release()
    torch.manual_seed(0)
    torch.save(mc3_18().state_dict(), tmp_path / "w.pt")
    size = f"--weights {tmp_path / 'w.pt'} --input-size 32 --frames 4"
    net = f"--backbone torchvision/mc3_18 {size} --device cpu"
    run, pack = tmp_path / "run", tmp_path / "pack"
    train = f"train {folder} {net} --head evidence --output {run} --epochs 1 --masks 4 --workers 0"
    assert main(train.split()) == 0
    assert "head: " in capsys.readouterr().out
    explain = f"explain {folder / 'c.mp4'} {net} --heads {run / 'head'} --output {pack}"
    assert main(explain.split()) == 0
    found = load_pack(pack)
    assert [one.method for one in found] == ["head"] * 4 and all(one.is_mask for one in found)
    few = ["--metrics", "masking", "--limit", "2"]
    compare = f"compare {folder} {net} --heads {run / 'head'} --explainers cam --view whole"
    assert main([*compare.split(), "--output", str(tmp_path / "board"), "--maps", "0", *few]) == 0
    assert "| run |" in (tmp_path / "board" / "leaderboard.md").read_text()
