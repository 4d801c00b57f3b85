"""Makes xattn's own board: many methods on a network, on photos that no head was trained on.

    python -m xattn.eval.studies board PHOTOS -b tf_efficientnet_lite0 --weights package

Photos at even positions of the sorted list train a head by the recipe ``outcomes``; photos at odd
positions are scored, in an order that ``xattn board make --limit`` draws. The shipped heads were
trained on every photo of this project, so a board of these photos cannot include them. A
:class:`~xattn.eval.evaluation.split.Split` refuses a photo that was used for both. Run the study
once per network with the same ``--output``; a study that was stopped resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.eval.board.make import NewRow, make_board
from xattn.eval.board.page import table_lines
from xattn.eval.board.ranks import board_ranks
from xattn.eval.evaluation.split import Split
from xattn.eval.leaderboard import Comparison
from xattn.eval.metrics.registry import BOARD
from xattn.eval.studies.options import Network, OutputAt, PhotosAt, Quick
from xattn.heads import Head, load_head
from xattn.heads.base import seeded_head
from xattn.photos.images import list_images
from xattn.photos.sources import Files
from xattn.runtime.tables import markdown
from xattn.training import fit
from xattn.training.run_folder import RUN_FILE

Row = tuple[str, Mapping[str, Any]]
TOKENS = {"at": "tokens"}
COARSE = {"size": 32, "stride": 32}
COMMON: Mapping[str, Row] = {
    "gradcam": ("gradcam", {}),
    "cam": ("cam", {}),
    "layercam": ("layercam", {}),
    "eigencam": ("eigencam", {}),
    "saliency": ("saliency", {}),
    "input_x_gradient": ("input_x_gradient", {}),
    "integrated_gradients": ("integrated_gradients", {}),
    "occlusion_32": ("occlusion", COARSE),
}
ROWS: Mapping[str, Mapping[str, Row]] = {
    "cnn": {
        **COMMON,
        "gradcam_plusplus": ("gradcam_plusplus", {}),
        "fullgrad": ("fullgrad", {}),
        "guided_backprop": ("guided_backprop", {}),
        "lrp_zero": ("libragrad", {"base": "input_x_gradient", "at": "pixels"}),
        "lrp_gamma": ("lrp", {}),
        "lrp_gamma_box": ("lrp", {"composite": "gamma_box"}),
        "lrp_plus": ("lrp", {"composite": "plus"}),
        "lrp_alpha_beta": ("lrp", {"composite": "alpha_beta"}),
    },
    "vit": {
        **COMMON,
        "rollout": ("rollout", {}),
        "generic_relevance": ("generic_relevance", {}),
        "legrad": ("legrad", {}),
        "attn_lrp": ("attn_lrp", {}),
        "res_lrp": ("attn_lrp", {"residual": 1.0}),
        "lrp_gamma": ("lrp", {**TOKENS, "gamma": 0.25, "linear_gamma": 0.05}),
        "libragrad": ("libragrad", {}),
        "libragrad_shares": ("libragrad", {"base": "input_x_gradient"}),
    },
}
"""The rows of each kind of network: an explainer and its options."""


@dataclass(frozen=True)
class BoardStudy:
    """The size of the board."""

    photos: int = 100  # Photos to score.
    card_photos: int = 60  # How many of these the report card uses.
    maps: int = 0  # Photos whose maps are stored unchanged.
    rows: tuple[str, ...] = ()  # Labels of the rows; by default, all that fit the network.
    metrics: tuple[str, ...] = BOARD  # Groups of columns.
    batch: int = 8  # Images per pass.
    head: bool = True  # Train a head on the other photos and measure it.


DEFAULTS = BoardStudy()


def parts(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The photos to train heads on, and the photos to score."""
    return paths[::2], paths[1::2]


def trained_head(backbone: Backbone, photos: list[Path], split: Split, folder: Path) -> Head:
    """A head ``evidence`` trained on ``photos``, or loaded from ``folder`` if it is there."""
    fitted = split.fit(photos)
    if not (folder / "head" / "config.json").is_file():
        head, config = (
            seeded_head("evidence", backbone, 0),
            TrainConfig(recipe="outcomes", workers=0),
        )
        resume = (folder / RUN_FILE).is_file()
        fit(head, backbone, fitted, config, output=folder, resume=resume)
    return load_head(str(folder / "head"), backbone)


def study(
    backbone: Network,
    data: PhotosAt,
    output: OutputAt = "runs/study-board",
    quick: Quick = False,
    config: BoardStudy = DEFAULTS,
) -> Iterator[str]:
    """Measure the missing rows on this network, and yield the table of the board so far.

    Args:
        backbone: a ViT or a CNN; it is not changed.
        data: photos; labels are not read.
        output: the folder for heads and the board, shared by all networks.
        quick: four photos, two methods, and no report card.
    """
    output, kind = Path(output), "vit" if backbone.is_vit else "cnn"
    if quick:
        config = BoardStudy(4, 0, rows=("cam", "eigencam"), metrics=("squares",), head=False)
    rows = {row: ROWS[kind][row] for row in config.rows or ROWS[kind]}
    fitted, scored = parts([*list_images(data)])
    split, heads = Split("board"), {}
    if config.head:
        head = trained_head(backbone, fitted, split, output / "heads" / backbone.name)
        heads = {"evidence_even": head}
    if kind == "cnn":
        backbone.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    photos = Files(split.score(scored), ids=[f"{path.parent.name}/{path.name}" for path in scored])
    job = Comparison(
        backbone=backbone,
        heads=heads,
        explainers={row: name for row, (name, _) in rows.items()},
        options=[
            f"{r}.{key}={value}" for r, (_, own) in rows.items() for key, value in own.items()
        ],
        max_forward_batch=config.batch,
        maps=config.maps,
    )
    board = make_board(
        output / backbone.name,
        job,
        photos,
        limit=config.photos,
        name=f"xattn's own board: {backbone.name}",
        card_photos=config.card_photos,
        groups=config.metrics,
        about=NewRow(author="xattn"),
        say=print,
    )
    split.write(output / f"split-{backbone.name}.json")
    lines = table_lines(board, board_ranks(board))
    yield from markdown(lines[0], lines[1:], 3)
