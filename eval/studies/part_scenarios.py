"""The training sets that the study of Visual Part Utilization compares."""

from __future__ import annotations

from dataclasses import dataclass

from xattn.eval.studies.study_configs import PartStudyConfig


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
