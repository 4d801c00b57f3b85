"""Outputs that are links: a link to a folder stays and its target is written; a dangling one is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_packs import small_pack

import xattn
from xattn.cli import main
from xattn.runtime.files import atomic_folder, check_folder
from xattn.training import fit

MODEL = ["--backbone", "test_efficientnet", "--weights", "random", "--device", "cpu"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


def test_a_pack_behind_a_link_is_written_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "pack"
    link.symlink_to("disk")
    for images in (2, 3):  # anew, and over a pack that is there
        small_pack(link, images)
        assert link.is_symlink() and os.readlink(link) == "disk"
        assert len(xattn.load_pack(tmp_path / "disk")) == 3 * images
        assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "pack"]


def test_a_replacement_behind_a_link_that_was_killed_is_undone(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "pack"
    link.symlink_to("disk")
    small_pack(link, 2)
    os.replace(
        tmp_path / "disk", tmp_path / ".disk.abcdefgh.old"
    )  # and the other rename never came
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(link, ()):
        raise RuntimeError("stop")
    assert len(xattn.load_pack(link)) == 6


@pytest.mark.parametrize("target", ["nowhere", "link", "no/such/folder"])
@pytest.mark.parametrize("below", ["", "run"])
def test_a_link_that_leads_nowhere_is_refused_with_the_remedy(
    tmp_path: Path, target: str, below: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    backbone = xattn.load_backbone("test_efficientnet", weights=None)
    output = link / below
    for write in (
        lambda: check_folder(output),
        lambda: small_pack(output),
        lambda: xattn.save_head(xattn.create_head("ttame", backbone), output),
        lambda: fit(xattn.create_head("ttame", backbone), backbone, ["x.png"], output=output),
    ):
        with pytest.raises(
            ValueError, match=rf"output: .* is a link to {target}, .* remove the link"
        ):
            write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link"]


def test_a_dangling_output_is_one_line_before_the_work(
    tmp_path: Path, photos: Path, capsys
) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    output = ["--output", str(tmp_path / "link")]
    data = [str(photos)]
    for line in (
        ["explain", str(photos), "--explainers", "cam", *output, *MODEL],
        ["evaluate", str(photos), "--explainers", "cam", *output, *MODEL],
        ["train", *data, "--workers", "0", *output, *MODEL],
        ["compare", *data, "--explainers", "gradcam", *output, *MODEL],
        ["probe", *data, *output, *MODEL],
        ["parts", str(photos), "--evidence", "mser", *output],
    ):
        assert main(line) == 2, line
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("xattn: error: output: ") and "is a link to nowhere" in error
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "nowhere").exists()
