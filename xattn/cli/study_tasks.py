"""Commands of ``xattn study`` for systems on tasks of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from xattn.cli.model import BackboneArgs
from xattn.cli.options import Also
from xattn.cli.shared import Images, PhotoStudy, StudyCommand
from xattn.eval.studies.actions.config import ActionStudyConfig
from xattn.eval.studies.face_config import FaceStudyConfig
from xattn.eval.studies.lesion_configs import LesionConfig
from xattn.eval.studies.pointer_configs import OrderStudyConfig, PointStudyConfig
from xattn.eval.studies.word_configs import WordStudyConfig
from xattn.runtime.option_checks import Belongs, Not


@dataclass(frozen=True, kw_only=True)
class StudyActions(StudyCommand):
    """Class-semantic attention over time: detectors of actions in generated sequences."""

    study: tyro.conf.OmitArgPrefixes[ActionStudyConfig] = field(default_factory=ActionStudyConfig)
    quick: bool = False
    """A few steps on short sequences, to see that all runs."""
    output: Path = Path("runs/study-actions")
    """Folder of what is finished, of report.md and the raw values behind it, CSV."""

    def run(self) -> None:
        from xattn.eval.studies import action_detection

        config = self.study.quick() if self.quick else self.study
        for line in action_detection.study(self.output, config):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyFaces(StudyCommand):
    """ARBEx on generated faces: two streams against each alone, with reliability balancing and without."""

    study: tyro.conf.OmitArgPrefixes[FaceStudyConfig] = field(default_factory=FaceStudyConfig)
    quick: bool = False
    """A short training of each, to see that all runs."""
    output: Path = Path("runs/study-faces")
    """Folder of what is finished, of report.md and the raw values behind it, CSV."""

    def run(self) -> None:
        from xattn.eval.studies import faces

        config = self.study.quick() if self.quick else self.study
        for line in faces.study(self.output, config):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyWords(PhotoStudy):
    """A head of words on frozen tokens, learned from captions: does a word match, does its map find it?"""

    labels: Path | None = None
    """The words of the photos, as for probe; by default the names of their folders."""
    annotations: Annotated[Path, Also("--objects")]
    """A folder with images/ and masks/ of COCO objects."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[WordStudyConfig] = field(default_factory=WordStudyConfig)
    quick: bool = False
    """A few steps, to see that all runs."""
    output: Path = Path("runs/study-words")
    """Folder of features, the trained heads, what is measured, and report.md."""

    def run(self) -> None:
        from xattn.eval.studies import words

        config = self.study.quick() if self.quick else self.study
        lines = words.study(
            self.model.load(), self.data, self.labels, self.annotations, self.output, config
        )
        for line in lines:
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyPointer(PhotoStudy):
    """Pointer networks on hulls, tours and triangles; with photos, orders of a photo's cells."""

    belongs: ClassVar = (Belongs("study", images=()), Belongs("model", "order", images=Not(())))

    images: Images = ()
    """Photos, as for explain; files. Heads learn in which order a ViT's cells matter; the networks that
    point to points are not trained then."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[PointStudyConfig] = field(default_factory=PointStudyConfig)
    order: OrderStudyConfig = field(default_factory=OrderStudyConfig)
    """Settings of the study with photos."""
    quick: bool = False
    """Few samples or photos, to see that all runs."""
    output: Path = Path("runs/study-pointer")
    """Folder of what is finished, of report.md and values.csv; one for points, another for photos."""

    def check(self) -> None:
        if self.images:
            super().check()

    def run(self) -> None:
        from xattn.eval.studies import cell_orders, pointers

        if not self.images:
            lines = pointers.study(self.output, self.study.quick() if self.quick else self.study)
        else:
            config = self.order.quick() if self.quick else self.order
            lines = cell_orders.study(self.model.load(), self.data, self.output, config)
        for line in lines:
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyLesions(StudyCommand):
    """Attention-gated U-Nets beside a plain one on generated lesions, and where their gates point."""

    study: tyro.conf.OmitArgPrefixes[LesionConfig] = field(default_factory=LesionConfig)
    quick: bool = False
    """A few samples and steps, to see that all runs."""
    output: Path = Path("runs/study-lesions")
    """Folder of what is finished, of the trained networks, of report.md and values.csv."""

    def run(self) -> None:
        from xattn.eval.studies import lesions

        config = self.study.quick() if self.quick else self.study
        for line in lesions.study(self.output, config):
            print(line, flush=True)
