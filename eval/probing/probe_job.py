"""Defines and checks the settings of ``xattn probe``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xattn.backbone import Backbone
from xattn.config import ProbeConfig
from xattn.heads import head_class, parse_options
from xattn.training.run_folder import RUN_FILE


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """The settings of one ``xattn probe`` run.

    ``heads`` are names, and ``options`` are their options, written as ``head.name=value``. The photos are
    split into fifths, depending only on ``split_seed``; ``folds`` are the numbers of the fifths that are
    used for testing. ``seeds`` determine the initial weights of the heads and the order of the photos.
    ``taps`` replace the default taps of the heads. ``sample`` is the number of photos that are explained at
    each checkpoint of each head; their maps are written to the pack ``sample`` in the folder of the head.
    """

    backbone: Backbone
    data: Any
    labels: str | Path | None
    heads: Sequence[str]
    options: Sequence[str] = ()
    taps: Sequence[str] | None = None
    config: ProbeConfig = field(default_factory=ProbeConfig)
    folds: Sequence[int] = (0,)
    seeds: Sequence[int] = (0,)
    split_seed: int = 0
    views: int = 1
    dtype: Any = "float32"
    batch_size: int = 16
    workers: int = 0
    features: Path = Path("runs/probe/features")
    sample: int = 0

    def check(self) -> None:
        """Raise a ValueError if heads, folds or seeds are missing or repeated, or if a head cannot be
        trained with the chosen loss on attention."""
        if not self.heads or not self.folds or not self.seeds:
            raise ValueError(
                "heads, folds, seeds: one of these lists is empty; give at least one of each"
            )
        if len(set(self.heads)) < len(self.heads):
            raise ValueError(
                f"heads: {', '.join(self.heads)} names a head twice; give each head once"
            )
        for name, numbers in (("folds", self.folds), ("seeds", self.seeds)):
            if len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"{name}: got {', '.join(map(str, numbers))}, with a repeated number; give each once"
                )
        fixed = [n for n in self.heads if not getattr(head_class(n), "learns_scores", True)]
        if self.config.attention != "none" and fixed:
            raise ValueError(
                f"attention: the scores of {', '.join(fixed)} are fixed; train only heads that learn "
                f"their scores, with --heads efficient_probe abmilp for example"
            )

    def head_options(self) -> dict[str, dict[str, Any]]:
        """The parsed options of each head, by head.

        Raises:
            ValueError: an option is malformed, or its head is not in ``heads``.
        """
        options: dict[str, dict[str, Any]] = {name: {} for name in self.heads}
        for pair in self.options:
            name, found, rest = pair.partition(".")
            if not found or name not in options:
                raise ValueError(
                    f"options: got {pair!r}; write head.name=value, where head is one of "
                    f"{', '.join(options)}"
                )
            options[name].update(parse_options([rest]))
        return options

    def folder(self, output: Path, head: str, fold: int, seed: int) -> Path:
        """The folder inside ``output`` for the run of one head, fold and seed."""
        several = len(self.folds) * len(self.seeds) > 1
        return output / head / f"fold-{fold}-seed-{seed}" if several else output / head

    def check_output(self, output: Path, resume: bool) -> None:
        """Raise a ValueError if ``output`` already contains one of the runs and ``resume`` is False."""
        runs = itertools.product(self.heads, self.folds, self.seeds)
        begun = [f for run in runs if ((f := self.folder(output, *run)) / RUN_FILE).is_file()]
        if begun and not resume:
            raise ValueError(
                f"output: {begun[0]} already contains a run; resume it with --resume, or give another "
                "--output"
            )
