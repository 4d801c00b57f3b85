"""The study of larger clips: its clips and counts, the branches and their limit cases, the command."""

import dataclasses

import pytest
import torch
from PIL import Image

from xattn.eval.studies.__main__ import main
from xattn.eval.studies.larger_clips import (
    SHAPES,
    Branch,
    ClipConfig,
    Generator,
    branches,
    count_objects,
    draw_clips,
    sample,
    shape_of,
)

SMALL = ClipConfig().quick()
GRID = (SMALL.frames, SMALL.side // 2, SMALL.side // 2)
TEXT = torch.tensor([[0, 1], [2, 0]])


@pytest.mark.parametrize("times", [1, 2])
def test_every_drawn_clip_has_one_object_of_its_text(times):
    clips = draw_clips(60, SMALL, 0, times)
    assert clips.pixels.shape == (60, 3, 3, 10 * times, 10 * times)
    assert clips.pixels.min() >= -1 and clips.pixels.max() <= 1
    found = count_objects(clips.pixels, clips.text)
    assert found.objects == [1.0] * 60 and found.asked == [1] * 60
    assert torch.equal(draw_clips(60, SMALL, 0, times).pixels, clips.pixels)
    wrong = count_objects(clips.pixels, (clips.text + torch.tensor([1, 0])) % 3)
    assert wrong.one == [1] * 60 and wrong.coloured == wrong.asked == [0] * 60


def test_copies_and_empty_clips_are_counted():
    clips = draw_clips(20, SMALL, 1)
    twice = count_objects(torch.cat([clips.pixels, clips.pixels.new_full((20, 3, 3, 10, 3), -1),
                                     clips.pixels], 4), clips.text)  # fmt: skip
    assert twice.objects == [2.0] * 20 and twice.one == [0] * 20
    empty = count_objects(-torch.ones(1, 3, 3, 10, 10), TEXT[:1])
    assert empty.objects == [0.0] and empty.asked == [0]
    speck = -torch.ones(1, 3, 3, 10, 10)
    speck[..., 4, 4] = 1.0
    assert count_objects(speck, TEXT[:1]).objects == [0.0]


def test_shapes_are_told_at_any_size():
    for k, (height, width) in enumerate(SHAPES.values()):
        for scale in (2, 5):
            mask = torch.ones(round(scale * height), round(scale * width)).bool().numpy()
            assert shape_of(mask) == k


def test_a_window_holds_the_places_of_a_training_clip():
    large = branches((3, 10, 10), SMALL)
    assert (large["window"].visible.sum(1) == 3 * 5 * 5).all()
    corner = large["window"].visible[0].view(3, 10, 10)
    assert corner[:, :5, :5].all()  # shifted inwards, all frames
    assert large["full"].visible is None
    assert large["full"].factor == pytest.approx(
        (torch.tensor(300.0).log() / torch.tensor(75.0).log()).sqrt()
    )
    trained = branches(GRID, SMALL)
    assert trained["window"] == trained["full"] == Branch(None, 1.0)


def test_on_the_training_grid_all_rows_are_the_dense_network():
    net = Generator(SMALL).eval()
    dense = sample(net, TEXT, SMALL, 0, "full", 1)
    torch.testing.assert_close(sample(net, TEXT, SMALL, 0, "window", 1), dense)
    torch.testing.assert_close(sample(net, TEXT, SMALL, 0, "freeswim", 1), dense)


def test_the_override_takes_what_the_full_branch_reads_of_the_text():
    net = Generator(dataclasses.replace(SMALL, blocks=2)).eval()
    found = branches((3, 10, 10), SMALL)
    x, t = torch.randn(2, 3, 3, 20, 20), torch.full((2,), 0.5)
    clip, own = net(x, t, TEXT, found["window"])
    assert clip.shape == x.shape and len(own) == 2
    with torch.no_grad():
        again, kept = net(x, t, TEXT, found["window"], own)
        torch.testing.assert_close(again, clip)
        full = net(x, t, TEXT, found["full"])[1]
        over, kept = net(x, t, TEXT, found["window"], full)
    assert all(torch.equal(a, b) for a, b in zip(kept, full, strict=True))
    assert not torch.allclose(over, clip)
    # With nothing read by the window, another text changes nothing.
    torch.testing.assert_close(net(x, t, TEXT.flip(0), found["window"], full)[0], over)


def test_a_cache_of_one_step_is_none_and_longer_ones_differ():
    config = dataclasses.replace(SMALL, flow_steps=4)
    net = Generator(config).eval()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    every = sample(net, TEXT, config, 0, "freeswim", 2)
    assert len(calls) == 8
    cached = sample(net, TEXT, config, 0, "freeswim", 2, cache=2)
    assert len(calls) == 8 + 6 and not torch.equal(cached, every)


def test_the_command_prints_all_rows_and_draws(tmp_path, capsys):
    assert main(["larger-clips", "--quick", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| window alone | 20 x 20 |" in printed and "| FreeSwim, cached 2 steps |" in printed
    assert "\n| FreeSwim, cached 2 steps | FreeSwim | " in printed
    assert "| true clips | 20 x 20 | 100.0 | 100.0 | 100.0 | 1.00 |" in printed
    assert Image.open(tmp_path / "out" / "larger-clips.jpg").width > 100
    assert (tmp_path / "out" / "values.csv").is_file()
