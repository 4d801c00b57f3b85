"""Explaining photos into a pack of several shards, in one process and in two."""

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
from xattn.cli.entry import main
from xattn.packs.reader import Pack, load_pack


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
    options = {"shard_photos": 2, "overlays": False} | options
    return xattn.explain(
        photos, backbone(), explainer=["gradcam", "random"], output=output, **options
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
    assert [e.id for e in about] == [e.id for e in expected]
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [shard["maps"]["file"] for shard in manifest["shards"]]
    assert names == [f"maps-00{n}00.safetensors" for n in (0, 1, 2, 4)]
    assert [item["file_name"] for item in manifest["skipped"]] == ["2.png", "6.png", "7.png"]


def test_two_processes_write_the_bytes_of_one(photos, written, tmp_path):
    code = f"""
import sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from test_written_packs import write
from xattn.runtime.distributed import leave_group, processes
import torch
assert processes(torch.device("cpu"))[0] == 2
found = write(Path({str(photos)!r}), Path({str(tmp_path / "two")!r}))
assert (found.photos, found.maps) == (6, 12), found
leave_group()
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
    options = {"output": written[1], "shard_photos": 2, "overlays": False}
    kept = written[1].with_name("pack-interrupted")
    with (
        pytest.warns(RuntimeWarning, match="pack-interrupted contains what was explained so far"),
        pytest.raises(KeyboardInterrupt),
    ):
        xattn.explain(photos, network, explainer=explainer, **options)
    pack = Pack(kept)
    assert [pack.key(id)[0] for id in pack.entry_ids] == ["0.png", "1.png", "3.png"]
    assert contents(written[1]) == before
    skipped = json.loads((kept / "manifest.json").read_text())["skipped"]
    assert skipped[-1]["reason"] == "stopped after 3.png by KeyboardInterrupt"


def test_photos_that_cannot_be_read_at_all_leave_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.png").write_bytes(b"no photo")
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        write(tmp_path / "photos", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_what_is_returned_can_be_limited(photos, tmp_path):
    with pytest.warns(UserWarning, match="skipped 3 of 9 images"):
        found = write(photos, tmp_path / "pack", keep=3)
    assert [e.image_id for e in found] == ["0.png", "0.png", "1.png"]
    assert (found.photos, found.maps) == (6, 12) and Pack(tmp_path / "pack").counts == (12, 6)


def test_a_photo_is_decoded_once(photos, tmp_path, monkeypatch):
    from xattn.explaining import photos as module

    real, loaded = module.load_image, []
    monkeypatch.setattr(
        module, "load_image", lambda s, *rest: loaded.append(s.name) or real(s, *rest)
    )
    monkeypatch.setattr(
        "xattn.packs.explanation.load_image", lambda *_: pytest.fail("it is read again")
    )
    with pytest.warns(UserWarning, match="skipped"):
        found = write(photos, tmp_path / "pack", overlays=True)
    assert sorted(loaded) == [f"{i}.png" for i in range(9)]
    assert len(list((tmp_path / "pack" / "overlays").iterdir())) == found.maps


def test_thumbnails_and_overlays_are_those_of_the_explanations(photos, tmp_path):
    with pytest.warns(UserWarning, match="skipped"):
        found = write(photos, tmp_path / "a", overlays=True)
    xattn.save_pack(tmp_path / "b", found)
    for name in ("overlays/0.png@0.gradcam.jpg", "overlays/3.png@1.random.jpg"):
        files = [tmp_path / folder / name for folder in "ab"]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            assert files[0].read_bytes() == files[1].read_bytes()
    for image_id in Pack(tmp_path / "a").image_ids:
        one, two = (Pack(tmp_path / folder).photo_bytes(image_id) for folder in "ab")
        assert one == two


def test_the_command_draws_overlays_of_few_photos(photos, tmp_path, capsys):
    words = ["explain", str(photos / "0.png"), str(photos / "1.png"), "--explainers", "centre",
             "--backbone", "test_resnet", "--weights", "random"]  # fmt: skip

    def drawn(name: str, *more: str) -> bool:
        assert main([*words, "--output", str(tmp_path / name), *more]) == 0, capsys.readouterr()
        return (tmp_path / name / "overlays").exists()

    assert drawn("few")
    assert f"pack: {tmp_path / 'few'}" in capsys.readouterr().out
    assert not drawn("none", "--overlays", "0") and not drawn("many", "--overlays", "1")
