"""Explaining photos into a pack of format 2, in one process and in two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import in_two_processes

import xattn
from xattn.cli.commands import main
from xattn.explaining.shards import explain_to_shards
from xattn.packs.reader import Pack, load_pack

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine photos of different sizes; number 2, and both of the fourth shard of two, cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 255, (40 + i, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    for i in (2, 6, 7):
        (folder / f"{i}.png").write_bytes(b"no photo")
    return folder


def backbone():
    torch.manual_seed(0)
    return xattn.load_backbone("test_resnet", weights=None, num_classes=3, input_size=96)


def write(photos: Path, output: Path, **options):
    return explain_to_shards(
        photos,
        backbone(),
        explainer=["gradcam", "random"],
        output=output,
        shard_photos=2,
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def written(photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "pack"
    with pytest.warns(UserWarning, match="skipped 3 of 9 images"):
        return write(photos, output), output


def test_shards_hold_what_explain_returns(photos, written):
    about, folder = written
    with pytest.warns(UserWarning, match="skipped 3 of 9 images"):
        expected = xattn.explain(photos, backbone(), explainer=["gradcam", "random"], batch_size=2)
    found = load_pack(folder)
    assert [e.id for e in found] == [e.id for e in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.map, b.map, atol=1e-6)
        assert (a.view, a.protocol, a.target_name) == (b.view, b.protocol, b.target_name)
    assert (about.photos, about.maps, [name for name, _ in about.skipped]) == (
        6, 12, ["2.png", "6.png", "7.png"],
    )  # fmt: skip
    assert [e.id for e in about.first] == [e.id for e in expected]
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [shard["maps"]["file"] for shard in manifest["shards"]]
    assert names == [f"maps-0000{n}.safetensors" for n in (0, 1, 2, 4)]
    assert [item["file_name"] for item in manifest["skipped"]] == ["2.png", "6.png", "7.png"]


def test_two_processes_write_the_bytes_of_one(photos, written, tmp_path):
    code = f"""
import sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from test_explain_to_shards import write
from xattn.runtime.distributed import leave, processes
import torch
assert processes(torch.device("cpu"))[0] == 2
found = write(Path({str(photos)!r}), Path({str(tmp_path / "two")!r}))
assert (found.photos, found.maps) == (6, 12), found
leave()
"""
    codes, errors = in_two_processes([sys.executable, "-c", code], {})
    assert codes == [0, 0], errors
    assert contents(tmp_path / "two") == contents(written[1])
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


def test_what_was_explained_before_ctrl_c_is_kept_beside_an_earlier_pack(photos, written, tmp_path):
    before = contents(written[1])
    network = backbone()
    explainer = xattn.create_explainer("gradcam", network)
    real, calls = explainer.attribute_classes, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    explainer.attribute_classes = stopped
    options = {"output": written[1], "shard_photos": 2}
    kept = written[1].with_name("pack-interrupted")
    with (
        pytest.warns(RuntimeWarning, match="pack-interrupted holds what was explained"),
        pytest.raises(KeyboardInterrupt),
    ):
        explain_to_shards(photos, network, explainer=explainer, **options)
    pack = Pack(kept)
    assert [pack.key(id)[0] for id in pack.entry_ids] == ["0.png", "1.png", "3.png"]
    assert contents(written[1]) == before
    skipped = json.loads((kept / "manifest.json").read_text())["skipped"]
    assert skipped[-1]["reason"] == "stopped by KeyboardInterrupt"


def test_photos_that_cannot_be_read_at_all_leave_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no photo")
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        write(tmp_path / "photos", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_the_command_chooses_the_format(photos, tmp_path, monkeypatch, capsys):
    from xattn.cli import explain

    words = ["explain", str(photos / "0.png"), str(photos / "1.png"), "--explainers", "centre",
             "--backbone", "test_resnet", "--weights", "random"]  # fmt: skip

    def version(name: str, *more: str) -> int:
        assert main([*words, "--output", str(tmp_path / name), *more]) == 0, capsys.readouterr()
        return json.loads((tmp_path / name / "manifest.json").read_text())["version"]

    assert version("small") == 1
    assert version("asked", "--pack-format", "2") == 2
    assert f"pack: {tmp_path / 'asked'}" in capsys.readouterr().out
    monkeypatch.setattr(explain, "MOST_PHOTOS", 1)
    assert version("many") == 2
    assert version("many-in-1", "--pack-format", "1") == 1
