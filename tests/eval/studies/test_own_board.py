"""xattn's own board: photos that train a head are not scored, and the quick run makes a board."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.backbone import load_backbone
from xattn.eval.board.folder import Board
from xattn.eval.evaluation.split import LeakError, Split
from xattn.eval.studies import own_board
from xattn.eval.studies.own_board import ROWS, BoardStudy, parts, study


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        (folder / f"class-{i}").mkdir()
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"class-{i}" / "photo.png")
    return folder


def test_every_row_names_an_explainer_with_its_options():
    networks = {"cnn": "test_resnet", "vit": "test_vit"}
    from xattn.explainers import create_explainer

    for kind, name in networks.items():
        net = load_backbone(name, weights=None, input_size=64, num_classes=5)
        for method, options in ROWS[kind].values():
            if method not in ("fullgrad",):
                assert create_explainer(method, net, **options).name == method


def test_a_quick_board_is_of_photos_at_odd_positions(photos, tmp_path):
    net = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    lines = [*study(net, photos, tmp_path, quick=True)]
    board = Board.open(tmp_path / "test_resnet")
    assert sorted(p["id"] for p in board.photos) == [f"class-{i}/photo.png" for i in (1, 3, 5, 7)]
    assert board.groups == ["squares"] and any("| cam |" in line for line in lines)
    weights = [p for p in net.model.parameters() if p.ndim == 4]  # a CPU is faster in this layout
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_a_photo_that_trained_the_head_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(own_board, "parts", lambda paths: (paths, paths))
    monkeypatch.setattr(
        own_board, "trained_head", lambda net, photos, split, folder: split.fit(photos) and None
    )
    net = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    with pytest.raises(LeakError, match="scores 9 of the items that it was fitted on"):
        [*islice(study(net, photos, tmp_path, config=BoardStudy(photos=4)), 1)]
    fitted, scored = parts([1, 2, 3])
    split = Split("board")
    assert split.fit(fitted) == [1, 3] and split.score(scored) == [2]
