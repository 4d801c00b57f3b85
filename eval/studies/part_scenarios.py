"""The training sets that the study of Visual Part Utilization compares."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PartStudyConfig:
    """What heads are trained on: each share of web photos with each share of text on them."""

    backbone: str = "vit_small_patch14_dinov2"
    """A timm model."""
    input_size: int = 224
    """Side of the model's input in pixels."""
    head: str = "memetector"
    """An attentive head that learns its scores."""
    hidden: tuple[int, ...] = (256, 128)
    """Widths of memetector's MLP; published, for 10,000 memes: 2048 1024."""
    p_conc: tuple[float, ...] = (1 / 3, 1.0)
    """Shares of web photos in the regular class, the rest are crops of the macros; 1 is without crops."""
    p_txt: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Shares of the web photos that carry text."""
    worn: bool = True
    """Macros were made smaller and compressed more, web photos were not."""
    folds: int = 5
    """Parts of the photos; each is tested once, by heads of a seed of its own."""
    seed: int = 0
    """Of macros, folds, training and the photos of a limit."""
    limit: int | None = None
    """Use only so many photos, spread over their folders."""

    @property
    def images(self) -> str:
        """Folder of the macros, the photos with text and the crops."""
        return "worn" if self.worn else "same"

    @property
    def features(self) -> str:
        """Folder of the features, in which each choice of taps has a folder of its own."""
        return f"features-{self.backbone}-{self.input_size}-{self.images}"

    @property
    def name(self) -> str:
        """Of the results."""
        return f"{self.backbone}-{self.input_size}-{self.head}-{self.images}"


@dataclass(frozen=True)
class Scenario:
    """What the regular class of a training set is made of."""

    p_conc: float
    p_txt: float

    def __post_init__(self) -> None:
        if not (0 <= self.p_conc <= 1 and 0 <= self.p_txt <= 1):
            raise ValueError(
                f"p_conc, p_txt: got {self.p_conc}, {self.p_txt}; give shares in [0, 1]"
            )

    @property
    def label(self) -> str:
        """Both shares with all their digits: a third is not 0.33."""
        return f"{float(self.p_conc)!r}-{float(self.p_txt)!r}"


def scenarios(study: PartStudyConfig) -> list[Scenario]:
    return [Scenario(c, t) for t in study.p_txt for c in study.p_conc]
