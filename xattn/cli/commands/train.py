"""``xattn train``: train an explanation head on photos."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from xattn.cli.detections import check_detector, load
from xattn.cli.model import BackboneArgs
from xattn.cli.shared import PhotoArgs, registered_names
from xattn.config import ON_PHOTOS, TrainConfig
from xattn.runtime.files import RUN_FILE, check_run_folder
from xattn.runtime.names import normalise_name
from xattn.runtime.option_checks import AnyExcept, AppliesIf

Recipe = Literal["published", "small", "outcomes"]
# Options that a detector does not read.
NOT_DETECTOR = (
    *("taps", "frames", "tile_positions", "mean", "std", "crop_pct", "interpolation", "task"),
    *("probe", "mechanism", "layers", "backbone", "sample"),
)
ON_TABLES = ("copy", "decoder", "evidence", "side", "tokens")  # heads whose recipe is outcomes


@dataclass(frozen=True)
class TrainSettings(TrainConfig):
    """The settings that were typed; if no recipe was given, the head's recipe later supplies the settings
    that are missing."""

    recipe: Recipe | None = None  # type: ignore[assignment]
    """Recipe for all settings that are not given; by default published with --preset, small for the
    objective mask and for the heads ttame, lcam, csa, pointer and words, and otherwise outcomes."""

    def __post_init__(self) -> None:
        if self.recipe is not None:
            super().__post_init__()

    def filled_in(self, recipe: Recipe) -> TrainConfig:
        """Return the settings with ``recipe`` as their recipe, if none was given."""
        given = {one.name: getattr(self, one.name) for one in fields(TrainConfig)}
        return TrainConfig(**{**given, "recipe": self.recipe or recipe})


@dataclass(frozen=True, kw_only=True)
class Train(PhotoArgs):
    """Train an explanation head on a folder of images or, if the network reads them, of clips; no labels
    are used."""

    folders_of_clips: ClassVar = True

    option_rules: ClassVar = (
        AppliesIf("table", objective_name=AnyExcept(*ON_PHOTOS)),
        AppliesIf("backbone", "taps", "head", "fusion", "options", "detector", preset=None),
        AppliesIf(*NOT_DETECTOR, detector=None),
    )

    model: BackboneArgs = field(default_factory=BackboneArgs)
    detector: str | None = None
    """Train the head evidence for single detections of this detector, given as for xattn explain; it learns
    from the detections with scores above 0.5, at most ten in each photo."""
    train: TrainSettings
    preset: str | None = None
    """Name of published settings, see xattn list; they replace --backbone, --taps, --head, --fusion and
    --options."""
    head: str | None = None
    """Name of the head, see xattn list; by default evidence or, if masks are learned (recipes published
    and small), ttame."""
    fusion: Literal["classifier", "per_class"] = "classifier"
    """Where the fusion gets the row of a class from: the classifier's weights, or a free row per class."""
    options: tuple[str, ...] = ()
    """Further options of the head as name=value, for example branch_rank=null num_taps=2."""
    output: Path = Path("runs/head")
    """Folder for the log, the checkpoints and the trained head."""
    table: Path | None = None
    """Folder for the table of outcomes, which several heads and runs may share; by default it is next to
    the output folder and has the suffix -outcomes."""
    resume: bool = False
    """Continue from the last checkpoint in the output folder."""
    half: bool = False
    """Also save the head in half precision, in head-half."""
    sample: int = 0
    """Explain this many photos of the data at each checkpoint; the pack sample holds the maps from before
    training and those from the last checkpoint."""

    def __post_init__(self) -> None:
        objective = self.train.objective_name
        masks = self.train.recipe in ("published", "small") or objective == "mask"
        head = self.head or ("ttame" if masks and objective in ("", "mask") else "evidence")
        outcomes = normalise_name(head) in ON_TABLES or objective not in ("", "mask")
        own: Recipe = "outcomes" if outcomes and not masks else "small"
        config = self.train.filled_in("published" if self.preset else own)
        vars(self).update(head=head, train=config)

    @property
    def after_interrupt(self) -> str:
        """Return a hint on how to continue an interrupted command, which depends on whether the table of
        outcomes is finished."""
        begun = (self.output / RUN_FILE).is_file()
        return "; continue with --resume" if begun else "; run the same command to continue"

    def check(self) -> None:
        super().check()
        self.model.check()
        check_run_folder(self.output, self.resume)
        if self.detector is not None:
            check_detector(self.detector)

    def _detections(self) -> Any:
        """The view whose classes are the detector's detections in the photos."""
        assert self.detector is not None
        detector = load(self.detector, self.model)
        return detector.of(detector.detect_all(self.photos, max_pixels=self.train.max_pixels))

    def run(self) -> None:
        from xattn.heads import head_options, parse_options, save_head
        from xattn.heads.base import HEADS, seeded_head
        from xattn.photos.sources import open_photos
        from xattn.training import fit
        from xattn.training.objectives.base import objective_for

        (name,), options = (
            registered_names("head", [str(self.head)], HEADS),
            parse_options(self.options),
        )
        HEADS.check_options(name, options)
        objective_for(self.train)  # an unknown one is refused before the network is loaded
        if self.fusion != "classifier" or "fusion" in head_options(name):
            options = {"fusion": self.fusion, **options}
        if self.preset is not None:
            from xattn.config import preset

            chosen = preset(self.preset)
            name, options = chosen.head, chosen.options
            model = replace(self.model, backbone=chosen.backbone, taps=chosen.taps)
        else:
            model = self.model
        backbone = model.load() if self.detector is None else self._detections()
        photos, shown = open_photos(self.photos, backbone.reads_clips), None
        head = seeded_head(name, backbone, self.train.seed, **options)
        if self.sample:
            from xattn.training.sample import SAMPLE_FOLDER, Sample

            shown = Sample(
                backbone,
                photos,
                self.output / SAMPLE_FOLDER,
                self.sample,
                self.train.max_pixels,
            )
        result = fit(
            head,
            backbone,
            photos,
            self.train,
            output=self.output,
            resume=self.resume,
            on_checkpoint=shown,
            table=self.table,
            say=print,
        )
        if not result.main:
            return
        if self.half:
            save_head(head, self.output / "head-half", dtype="float16")
        for path, reason in result.skipped:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        losses = ", ".join(f"{k} {v:.4f}" for k, v in result.losses.items())
        print(f"{result.steps} steps, {len(result.skipped)} images skipped; {losses}")
        print(f"head: {self.output / 'head'}")
