"""Commands of ``xattn study`` for systems on tasks of their own, with data that are generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from xattn.eval.studies.actions.config import ActionStudyConfig


@dataclass(frozen=True, kw_only=True)
class StudyActions:
    """Class-semantic attention over time: detectors of actions in generated sequences."""

    study: tyro.conf.OmitArgPrefixes[ActionStudyConfig] = field(default_factory=ActionStudyConfig)
    quick: bool = False
    """A few steps on short sequences, to see that all runs."""
    output: Path = Path("runs/study-actions")
    """Folder of what is finished, and of report.md."""

    def run(self) -> None:
        from xattn.eval.studies import action_detection

        config = self.study.quick() if self.quick else self.study
        for line in action_detection.study(self.output, config):
            print(line, flush=True)
