"""Boards of some groups of columns, and a board whose report card was interrupted."""

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.backbone import load_backbone
from xattn.eval.board import make
from xattn.eval.board.check import check_board
from xattn.eval.board.folder import Board
from xattn.eval.board.make import make_board
from xattn.eval.leaderboard import Comparison

GROUPS = ("squares", "class-contrast")


@pytest.fixture(scope="module")
def job():
    torch.manual_seed(0)
    net = load_backbone("test_resnet", weights=None, input_size=64, num_classes=3)
    return Comparison(backbone=net, explainers=["gradcam"], max_forward_batch=4, maps=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{i}.png")
    return folder


def test_only_the_given_groups_are_measured(job, photos, tmp_path):
    folder = tmp_path / "board"
    settings = {"card_photos": 0, "progress": False}
    board = make_board(folder, job, str(photos), groups=GROUPS[::-1], **settings)
    measured = {line["column"] for line in board.lines("gradcam")}
    assert measured == set(GROUPS) and board.groups == [*GROUPS]
    assert any("no row lacks a value" in line for line in check_board(board))
    assert "Not measured: subsets, monotonicity" in (folder / "index.html").read_text()
    with pytest.raises(ValueError, match="groups: got .* but .* has .*give the same"):
        make_board(folder, job, str(photos), **settings)
    with pytest.raises(ValueError, match="groups: got 'deletion'; choose among squares"):
        make_board(tmp_path / "other", job, str(photos), groups=["deletion"], **settings)


def test_a_missing_column_of_a_measured_group_is_found(job, photos, tmp_path):
    folder = tmp_path / "board"
    board = make_board(folder, job, str(photos), groups=["squares"], card_photos=0, progress=False)
    board.facts["groups"] = [*GROUPS]
    board.save()
    with pytest.raises(ValueError, match="class-contrast: values.csv has no value"):
        check_board(Board.open(folder))


def test_rows_are_a_board_if_the_card_is_interrupted(job, photos, tmp_path, monkeypatch):
    folder = tmp_path / "board"
    settings = {"card_photos": 4, "groups": GROUPS, "progress": False}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make, "_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_board(folder, job, str(photos), **settings)
    assert check_board(Board.open(folder)) and not Board.open(folder).card()
    done = make_board(folder, job, str(photos), **settings)
    assert done.card() and check_board(done)
