"""``xattn study``: rerun a study of ``docs/results/``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from xattn.cli.checks import check_device
from xattn.cli.model import BackboneArgs, device_name, weight_source
from xattn.cli.options import Also
from xattn.cli.printing import note
from xattn.cli.shared import Images, PhotoStudy, StudyCommand
from xattn.cli.study_tasks import StudyActions, StudyFaces, StudyLesions, StudyPointer, StudyWords
from xattn.eval.studies.control_configs import ControlStudyConfig
from xattn.eval.studies.digit_configs import BlockStudyConfig, ExactRolloutConfig
from xattn.eval.studies.study_configs import (
    DepthStudyConfig,
    DialStudyConfig,
    ImageStudyConfig,
    LengthStudyConfig,
    PartStudyConfig,
    PositionStudyConfig,
    SwapStudyConfig,
    TextStudyConfig,
)
from xattn.eval.studies.theory_configs import InContextConfig, RandomFeatureConfig


@dataclass(frozen=True, kw_only=True)
class StudyAt(PhotoStudy):
    """Attention training on text: vanilla, random, AT, iAT, VAT and others on sentiment trees (SST)."""

    images: Images = ()
    """A folder with train.txt and dev.txt of the Stanford Sentiment Treebank."""
    study: tyro.conf.OmitArgPrefixes[TextStudyConfig] = field(default_factory=TextStudyConfig)
    output: Path = Path("runs/study-at")
    """Folder of runs.jsonl, a line a finished run, of report.md, report.json and two plots."""
    device: str = "cpu"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""

    def check(self) -> None:
        check_device(self.device)
        if len(self.images) != 1:
            raise ValueError(
                f"images: got {' '.join(self.images) or 'none'}; give the folder of train.txt and dev.txt"
            )
        if not Path(self.data, "train.txt").is_file():
            raise ValueError(
                f"images: {self.data} lacks train.txt; give the folder of the treebank"
            )

    def run(self) -> None:
        from xattn.eval.studies import attention_text, attention_text_report

        device = device_name(self.device)
        done = attention_text.study(self.study, Path(self.data), self.output, device, note)
        files = attention_text_report.write(done.rows, self.study, self.output, Path(self.data))
        print((self.output / "report.md").read_text(encoding="utf-8"))
        print("report:", ", ".join(str(path) for path in files))


@dataclass(frozen=True, kw_only=True)
class StudyImage(PhotoStudy):
    """Attention training on images: do the maps of attentive heads agree better with what matters?"""

    labels: Path | None = None
    """A .json or .csv file of the photos' classes; by default their folders."""
    annotations: Annotated[Path, Also("--objects")]
    """A folder with images/ and masks/ of COCO objects."""
    study: tyro.conf.OmitArgPrefixes[ImageStudyConfig] = field(default_factory=ImageStudyConfig)
    output: Path = Path("runs/study-image")
    """Folder of features, the values of every head, and results.json."""

    def run(self) -> None:
        from xattn.eval.studies import attention_image

        for line in attention_image.study(
            Path(self.data), self.labels, self.annotations, self.output, self.study
        ):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyVpu(PhotoStudy):
    """Visual Part Utilization: does it move a head's attention onto the text of image macros?"""

    images: Images = ()
    """A folder or list of at least 20 photos a fold."""
    study: tyro.conf.OmitArgPrefixes[PartStudyConfig] = field(default_factory=PartStudyConfig)
    weights: str = "auto"
    """"package", "timm", "auto" (either), "random", or a file of weights."""
    output: Path = Path("runs/study-vpu")
    """Folder of images, features, the values of every head, and the report."""

    def run(self) -> None:
        from xattn.eval.studies import part_utilization

        weights = weight_source(self.weights, self.study.backbone)
        for line in part_utilization.run(Path(self.data), self.output, self.study, weights):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudySwap(PhotoStudy):
    """What swapping a trained ViT's attention costs: accuracy, maps, time and memory, row by row."""

    labels: str = "folders"
    """"folders", or a .json or .csv file of the photos' classes."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[SwapStudyConfig] = field(default_factory=SwapStudyConfig)
    distilled: tuple[Path, ...] = ()
    """Folders of conversions that xattn distill has trained, in place of those that the study trains."""
    only: tuple[str, ...] = ()
    """Measure these rows alone, by mechanism or label; the report has all that is finished."""
    only_sizes: tuple[int, ...] = ()
    """Measure at these sizes alone."""
    output: Path = Path("runs/study-swap")
    """Folder of what is finished, of report.md, figures.csv, values.csv, two plots and accuracy.json."""

    def run(self) -> None:
        from xattn.eval.studies import swapped_attention

        lines = swapped_attention.study(
            self.model.load(),
            self.data,
            self.labels,
            self.output,
            self.study,
            distilled=self.distilled,
            only=self.only,
            only_sizes=self.only_sizes,
        )
        for line in lines:
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudySinks(PhotoStudy):
    """Attention sinks of a trained ViT, which heads to calibrate (act), and the maps before and after."""

    labels: str = "folders"
    """"folders", or a .json or .csv file of the photos' classes."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    every: int = 1
    """Read every n-th photo."""
    by: str = "likelihood"
    """What the search of heads goes by: "likelihood" or "accuracy"."""
    explainer: str = "rollout"
    """Whose maps are compared."""
    picture: Path | None = None
    """A file for four photos and their maps."""

    def run(self) -> None:
        from xattn.eval.studies import attention_sinks

        backbone = self.model.load()
        for line in attention_sinks.study(
            backbone, self.data, self.labels, self.every, self.picture, self.by, self.explainer
        ):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyRecall(PhotoStudy):
    """How near mechanisms that choose blocks come to the exact choice, with a trained ViT's queries."""

    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    sizes: tuple[int, ...] = (448,)
    """Pixels a side; a ViT's positions are resized."""
    photos: int = 16
    """How many of the photos, drawn by --seed."""
    settings: tuple[str, ...] = ()
    """Mechanisms as NAME:option=value,..., or folders of conversions that xattn distill wrote; by default
    hip, infllm_v2, llsa and nsa."""
    seed: int = 0
    """Of the photos and of the random blocks."""

    def run(self) -> None:
        from xattn.eval.studies import block_recall

        lines = block_recall.study(
            self.model.load(),
            self.data,
            self.sizes,
            self.photos,
            self.settings or block_recall.SETTINGS,
            self.seed,
        )
        for line in lines:
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyAttentionMaps(PhotoStudy):
    """The own maps of each attention mechanism over one photo, a picture for each."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, Also("--photo", "--data")] = ()
    """The photo."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    only: tuple[str, ...] = ()
    """Draw these mechanisms alone, by their names in xattn list attention."""
    size: int | None = None
    """Pixels a side of the model's input; by default what suits each mechanism."""
    layer: int | None = None
    """Number of the layer, from 0; by default what suits each mechanism."""
    distilled: tuple[Path, ...] = ()
    """Folders of conversions that xattn distill has trained, in place of untrained ones."""
    output: Path = Path("runs/attention-maps")
    """Folder of the pictures, NAME.jpg each."""

    def run(self) -> None:
        from xattn.eval.studies import attention_maps

        for line in attention_maps.study(
            self.model.load(),
            Path(self.data),
            self.output,
            only=self.only,
            size=self.size,
            layer=self.layer,
            distilled=self.distilled,
        ):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyPositions(PhotoStudy):
    """Encodings of positions in a ViT, trained for minutes at one size and tested at others."""

    labels: str = "folders"
    """"folders", or a .json or .csv file of the photos' classes."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[PositionStudyConfig] = field(
        default_factory=PositionStudyConfig
    )
    quick: bool = False
    """A few photos and steps, to see that all runs."""
    output: Path = Path("runs/study-positions")
    """Folder of the trained networks, what is measured, report.md, figures.csv and a plot."""

    def run(self) -> None:
        from xattn.eval.studies import position_transfer

        config = self.study.quick() if self.quick else self.study
        lines = position_transfer.study(
            self.model.load(), self.data, self.labels, self.output, config
        )
        for line in lines:
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyDepths(PhotoStudy):
    """How many of a ViT's last blocks can be converted: the mechanism alone, then low-rank updates, too."""

    labels: str = "folders"
    """"folders", or a .json or .csv file of the photos' classes."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[DepthStudyConfig] = field(default_factory=DepthStudyConfig)
    output: Path = Path("runs/study-depths")
    """Folder of the trained conversions, what was measured, report.md, heads.csv and values.csv."""

    def run(self) -> None:
        from xattn.eval.studies import conversion_depths

        backbone = self.model.load()
        for line in conversion_depths.study(
            backbone, self.data, self.labels, self.output, self.study
        ):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyLength(StudyCommand):
    """Small networks trained on short sequences: what their attention keeps as sequences grow."""

    study: tyro.conf.OmitArgPrefixes[LengthStudyConfig] = field(default_factory=LengthStudyConfig)
    quick: bool = False
    """A few steps on short sequences, to see that all runs."""
    output: Path = Path("runs/study-length")
    """Folder of the trained networks, what is measured, report.md, figures.csv and a plot."""

    def run(self) -> None:
        from xattn.eval.studies import context_length

        config = self.study.quick() if self.quick else self.study
        for line in context_length.study(self.output, config):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyExactRollout(StudyCommand):
    """Networks on digits whose rollout is exact: contributions, and the deletion of tokens."""

    study: tyro.conf.OmitArgPrefixes[ExactRolloutConfig] = field(default_factory=ExactRolloutConfig)
    quick: bool = False
    """One short training of each, to see that all runs."""
    output: Path = Path("runs/study-exact-rollout")
    """Folder of what is finished, of report.md and the raw values behind it, CSV."""

    def run(self) -> None:
        from xattn.eval.studies import exact_rollout

        config = self.study.quick() if self.quick else self.study
        for line in exact_rollout.study(self.output, config):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyBlocks(StudyCommand):
    """NiNformer, HyperZZW and SHRP on digits, each beside what it has to beat."""

    study: tyro.conf.OmitArgPrefixes[BlockStudyConfig] = field(default_factory=BlockStudyConfig)
    quick: bool = False
    """One short training of each, to see that all runs."""
    output: Path = Path("runs/study-blocks")
    """Folder of what is finished, of report.md and the raw values behind it, CSV."""

    def run(self) -> None:
        from xattn.eval.studies import block_digits

        config = self.study.quick() if self.quick else self.study
        for line in block_digits.study(self.output, config):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyDial(PhotoStudy):
    """The localist dial in a trained ViT: mass, agreement, steering, and regions that are recruited."""

    labels: str = "folders"
    """"folders", or a .json or .csv file of the photos' classes."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[DialStudyConfig] = field(default_factory=DialStudyConfig)
    quick: bool = False
    """A few photos, to see that all runs."""
    output: Path = Path("runs/study-dial")
    """Folder of what is measured, and of report.md."""

    def run(self) -> None:
        from xattn.eval.studies import localist_dial

        config = self.study.quick() if self.quick else self.study
        lines = localist_dial.study(self.model.load(), self.data, self.labels, self.output, config)
        for line in lines:
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyRandomFeatures(PhotoStudy):
    """Random-feature attention on photos: accuracy, exact maps, and what the class token does alone."""

    labels: Path | None = None
    """As for probe; by default the class of a photo is its folder."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[RandomFeatureConfig] = field(
        default_factory=RandomFeatureConfig
    )
    quick: bool = False
    """Few heads and seeds, to see that all runs."""
    output: Path = Path("runs/study-random-features")
    """Folder of features, what was measured, report.md and scaling.csv."""

    def run(self) -> None:
        from xattn.eval.studies import random_features

        config = self.study.quick() if self.quick else self.study
        lines = random_features.study(
            self.model.load(), self.data, self.labels, self.output, config
        )
        for line in lines:
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyIcl(StudyCommand):
    """In-context linear regression: the circuit that softmax heads learn, beside that of theory."""

    study: tyro.conf.OmitArgPrefixes[InContextConfig] = field(default_factory=InContextConfig)
    quick: bool = False
    """6,000 steps, with thresholds that are three times as wide."""
    output: Path = Path("runs/study-icl")
    """Folder of checkpoints, report.md, errors.csv, weights.csv, circuit.json and circuit.png."""

    def run(self) -> None:
        from xattn.eval.studies import in_context_regression

        config = self.study.quick() if self.quick else self.study
        for line in in_context_regression.study(self.output, config):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyControls(PhotoStudy):
    """What is left of a ViT and its maps when attention carries no content; networks trained that way."""

    labels: str = "folders"
    """"folders", or a .json or .csv file of the photos' classes."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[ControlStudyConfig] = field(default_factory=ControlStudyConfig)
    quick: bool = False
    """A few photos and steps, to see that all runs."""
    output: Path = Path("runs/study-controls")
    """Folder of what is finished, of report.md and the raw values behind it, CSV."""

    def run(self) -> None:
        from xattn.eval.studies import content_controls

        config = self.study.quick() if self.quick else self.study
        lines = content_controls.study(
            self.model.load(), self.data, self.labels, self.output, config
        )
        for line in lines:
            print(line, flush=True)


STUDIES: dict[str, type[Any]] = {
    "at": StudyAt,
    "image": StudyImage,
    "vpu": StudyVpu,
    "swap": StudySwap,
    "sinks": StudySinks,
    "recall": StudyRecall,
    "attention-maps": StudyAttentionMaps,
    "positions": StudyPositions,
    "depths": StudyDepths,
    "length": StudyLength,
    "exact-rollout": StudyExactRollout,
    "blocks": StudyBlocks,
    "dial": StudyDial,
    "random-features": StudyRandomFeatures,
    "icl": StudyIcl,
    "controls": StudyControls,
    "actions": StudyActions,
    "faces": StudyFaces,
    "words": StudyWords,
    "lesions": StudyLesions,
    "pointer": StudyPointer,
}


@dataclass(frozen=True)
class Study:
    """Rerun a study of docs/results/; a stopped study continues in its output folder."""

    COMMANDS: ClassVar = STUDIES
