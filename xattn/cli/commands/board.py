"""``xattn board``: a leaderboard as a folder that others can check, audit and add rows to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from xattn.cli.checks import check_images
from xattn.cli.heads import choose_heads, row_name
from xattn.cli.imports import imported_sources
from xattn.cli.model import BackboneArgs
from xattn.cli.printing import note
from xattn.cli.shared import MethodArgs, registered_names
from xattn.runtime.arguments import Argument
from xattn.runtime.option_checks import AppliesIf, Count, Whole, check_fields

WORKS = ["make", "join", "audit"]
MEASURES = ["make", "join"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """The action, and the folder of the board."""

    action: Annotated[Literal["make", "join", "check", "audit", "show"], Argument(positional=True)]
    """make: measure methods on photos, or another network on the photos of an existing board. join: add a
    row. check: report maps, values and hashes that changed. audit: score the board's maps with other
    masks. show: print the board."""
    folder: Annotated[Path, Argument(positional=True)]
    """The folder of the board."""


@dataclass(frozen=True, kw_only=True)
class Board(MethodArgs, Place):
    """Make a leaderboard as a folder, add rows to it, check it, audit it or show it."""

    after_interrupt: ClassVar[str] = "; run the same command to continue"
    option_rules: ClassVar = (
        AppliesIf("images", "model", "max_pixels", action=WORKS),
        AppliesIf("heads", "options", "explainers", "author", action=MEASURES),
        AppliesIf("seed", action=["make", "audit"]),
        AppliesIf("limit", "batch_size", "maps", "card_photos", "name", "metrics", action="make"),
        AppliesIf("row", "maps_of", action="join"),
        AppliesIf("cells", action="check"),
    )

    model: BackboneArgs = field(default_factory=BackboneArgs)
    explainers: tuple[str, ...] = ()
    """Methods from xattn list, including those added by --import; for make by default gradcam, layercam
    and integrated_gradients; "all" stands for every method that suits the network."""
    row: str | None = None
    """The name of the new row; by default the name of its method."""
    maps_of: Path | None = None
    """A .npz file of maps made elsewhere: one array (h, w) per photo, under the photo's name; NAME@class
    may hold the map of the second class."""
    author: str = ""
    """Author of the new rows."""
    name: str = ""
    """Title of the board; by default the name of its folder."""
    batch_size: Count = 32
    """Number of images per pass."""
    maps: int = 60
    """Store the maps of this many photos unchanged, and all other maps reduced to at most 56 x 56
    cells."""
    card_photos: Whole = 60
    """Number of photos for the report card, which tests whether each column ranks deliberately degraded
    maps correctly."""
    metrics: tuple[str, ...] = ()
    """Groups of columns to measure, chosen from those of xattn compare --metrics board; by default all. If
    a board has only squares, subsets, monotonicity, photo-gain, class-contrast and network-contrast, its
    maps need no forward passes except those that explain."""
    cells: Count = 20
    """Number of values to recompute."""

    def check(self) -> None:
        check_fields(self)
        if self.action in WORKS:
            super().check()
            self.model.check()
        elif self.images:
            check_images(self.images)
            raise ValueError(f"images: xattn board {self.action} reads no images; leave them out")
        if self.action != "make" and not (self.folder / "board.json").is_file():
            raise ValueError(
                f"folder: {self.folder} is not a board; give a folder that xattn board make wrote"
            )
        if self.action == "join" and not (self.explainers or self.heads or self.maps_of):
            raise ValueError(
                "explainers: got none; give the new methods with --explainers, --heads or --maps-of"
            )
        if self.maps_of is not None and not self.row:
            raise ValueError("row: got none; name the row of the maps with --row")

    def run(self) -> None:
        getattr(self, f"_{self.action}")()

    def _make(self) -> None:
        from xattn.eval.board.make import NewRow, make_board
        from xattn.eval.metrics.registry import BOARD

        job = self._job(self.explainers or ("gradcam", "layercam", "integrated_gradients"))
        board = make_board(
            self.folder,
            job,
            self.photos,
            limit=self.limit,
            name=self.name,
            card_photos=self.card_photos,
            groups=self.metrics or BOARD,
            about=NewRow(author=self.author, sources=_sources()),
            say=note,
        )
        _print(board)

    def _join(self) -> None:
        from xattn.eval.board.folder import Board as Folder
        from xattn.eval.board.make import NewRow, join_board
        from xattn.eval.board.maps import maps_explainer

        explainers: Any = self.explainers
        if self.row and explainers:
            if len(explainers) > 1:
                raise ValueError(
                    f"row: got {self.row} for {len(explainers)} methods; add one at a time"
                )
            explainers = {self.row: explainers[0]}
        job, methods, kind = self._job(explainers), None, "code"
        if self.maps_of is not None:
            assert self.row is not None
            made = maps_explainer(Folder.open(self.folder), job.backbone, self.maps_of)
            methods, kind = {self.row: made}, "maps"
        board = join_board(
            self.folder,
            job,
            self.photos,
            methods,
            about=NewRow(author=self.author, sources=_sources(), kind=kind),
            say=note,
        )
        _print(board)

    def _check(self) -> None:
        from xattn.eval.board.check import check_board
        from xattn.eval.board.folder import Board as Folder

        for line in check_board(Folder.open(self.folder), self.cells):
            print(line)
        print(f"{self.folder}: nothing was changed")

    def _audit(self) -> None:
        from xattn.eval.board.check import audit_board
        from xattn.eval.board.folder import Board as Folder
        from xattn.runtime.tables import markdown

        board = Folder.open(self.folder)
        lines = audit_board(board, self._backbone(), self.photos, self.seed, note)
        print(*markdown(lines[0], lines[1:], 3), sep="\n")

    def _show(self) -> None:
        from xattn.eval.board.folder import Board as Folder

        _print(Folder.open(self.folder))

    def _backbone(self) -> Any:
        import torch

        backbone = self.model.load()
        if not backbone.is_vit:
            backbone.model.to(memory_format=torch.channels_last)
        return backbone

    def _job(self, explainers: Any) -> Any:
        """What to measure, in the form used by ``xattn compare``."""
        from xattn.eval.leaderboard import Comparison
        from xattn.explainers import list_explainers
        from xattn.explainers.base import EXPLAINERS

        names = list(explainers.values()) if isinstance(explainers, dict) else explainers
        found = registered_names("explainers", names, EXPLAINERS, "all")
        chosen = (
            dict(zip(explainers, found, strict=True)) if isinstance(explainers, dict) else found
        )
        backbone = self._backbone()
        heads: dict[str, Any] = {}
        if self.heads:
            for source, head in zip(*choose_heads(self.heads, backbone), strict=True):
                name = self.row or row_name(source, head.name, {*heads, *list_explainers()})
                heads[name] = head
        return Comparison(
            backbone=backbone,
            heads=heads,
            explainers=chosen,
            options=self.options,
            max_forward_batch=self.batch_size,
            max_pixels=self.max_pixels,
            seed=self.seed,
            maps=self.maps,
        )


def _sources() -> dict[str, str]:
    """sha256 of the sources imported by ``--import``, by name."""
    from xattn.runtime.files import file_sha256

    files = [Path(source) for source in imported_sources()]
    return {path.name: file_sha256(path) for path in files if path.is_file()}


def _print(board: Any) -> None:
    """Print the board's rows, and where its page is."""
    from xattn.eval.board.page import table_lines
    from xattn.eval.board.ranks import board_ranks
    from xattn.runtime.tables import markdown

    lines = table_lines(board, board_ranks(board))
    print(*markdown(lines[0], lines[1:], 3), sep="\n")
    ranked = ", ".join(board.admitted) or "none"
    print(f"\ncolumns that passed their report card: {ranked}")
    print(f"page: {board.folder / 'index.html'}")
