"""A leaderboard of clips: files of several kinds, sanity rows, what is left out and what is refused."""

import json

import numpy as np
import pytest
import torch
from clip_networks import Tiny

from xattn import evaluate, explain_clip, load_backbone
from xattn.cli import main
from xattn.eval import Comparison, compare


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return load_backbone(Tiny(), input_size=16, frames=8, mean=0.5, std=0.5)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    draw = np.random.default_rng(0)
    for i in range(3):
        frames = draw.integers(0, 256, (8 + i, 16, 16, 3), dtype=np.uint8)
        np.save(folder / f"{i}.npy", frames)
    np.save(folder / "tensor.npy", draw.random((3, 8, 16, 16), dtype=np.float32))
    (folder / "broken.npy").write_bytes(b"no array")
    return folder


def test_a_folder_of_clips_is_compared_in_space_and_time(network, clips, tmp_path):
    said = []
    job = Comparison(
        backbone=network,
        explainers=["gradcam"],
        metrics=["direct"],
        view="whole",
        max_forward_batch=32,
    )
    results, _ = compare(job, clips, tmp_path / "out", progress=False, say=said.append)
    rows = {"gradcam", "random", "centre", "ones", "randomized_gradcam"}
    assert set(results.methods) == rows
    assert {c.metric for c in results.columns} == {"AD", "IC", "ADD", "AG", "deletion", "insertion"}
    assert any(line.startswith("left out ") and "reads clips" in line for line in said)
    assert [i.id for i in results.images] == ["0.npy", "1.npy", "2.npy", "tensor.npy"]
    assert [s.id for s in results.skipped] == ["broken.npy"]
    assert "random" in (tmp_path / "out" / "leaderboard.md").read_text()
    assert not (tmp_path / "out" / "pack").exists()
    again, _ = compare(job, clips, tmp_path / "out", progress=False)
    assert again.rows() == results.rows()


def test_values_are_those_of_the_same_clips_as_tensors(network, clips):
    files = [clips / f"{i}.npy" for i in range(2)]
    frames = [
        np.load(path)[np.linspace(0, 7 + i, 8).round().astype(int)] for i, path in enumerate(files)
    ]
    tensors = torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3) / 255
    rows = {"gradcam": "gradcam"}
    found = [evaluate(network, rows, x, view=v, progress=False).methods["gradcam"].values
             for x, v in ((files, "whole"), (tensors, None))]  # fmt: skip
    for column, values in found[0].items():
        np.testing.assert_allclose(values, found[1][column], rtol=1e-4, atol=1e-3)


def test_a_saved_array_is_explained_like_the_array(network, clips):
    for name in ("1.npy", "tensor.npy"):
        array = np.load(clips / name)
        given = torch.from_numpy(array) if name == "tensor.npy" else array
        maps = [explain_clip(x, network, "gradcam")[0].map for x in (clips / name, given)]
        np.testing.assert_array_equal(*maps)
    with pytest.raises(ValueError, match=r"clip: .*broken.npy is not an array"):
        explain_clip(clips / "broken.npy", network)


def test_the_command_compares_clips(clips, tmp_path, capsys):
    line = f"compare {clips} -b torchvision/mc3_18 --weights random --input-size 16 --frames 2"
    more = "--explainers hirescam --metrics masking --limit 1 --view whole --batch-size 2"
    assert main([*line.split(), *more.split(), "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "# Leaderboard" in out and "| centre" in out and "plan: at most" in err
    data = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert len(data["images"]) + len(data["skipped"]) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda n, c: Comparison(backbone=n, card_photos=4), "card_photos: .* reads clips"),
        (lambda n, c: Comparison(backbone=n, labels="folders"), "labels: .*leave it out"),
        (lambda n, c: evaluate(n, {"random": "random"}, c), "images: no clip in folder"),
        (lambda n, c: evaluate(n, {"random": "random"}, "s3://bucket/c.mp4"), "in a store; copy them"),
        (lambda n, c: evaluate(n, {"random": "random"}, [np.zeros((8, 16, 16, 3))]),
         "the network reads clips; give a folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(network, tmp_path, call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(network, tmp_path)
    assert "\n" not in str(error.value)
