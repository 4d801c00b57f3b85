"""The settings of ``xattn probe``."""

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

    ``heads`` are names and ``options`` their options, as ``head.name=value``. ``folds`` are the numbers of
    the fifths to test on; ``seeds`` set the heads' weights and the order of the photos. The split depends
    only on ``split_seed``. ``taps`` replace the taps that each head asks for. ``sample`` is the number
    of photos explained at each checkpoint of each head; their maps form the pack ``sample`` beside the
    head.
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
        """Raise a ValueError for heads, folds and seeds that cannot be trained."""
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
                raise ValueError(f"{name}: got one twice in {', '.join(map(str, numbers))}")
        fixed = [n for n in self.heads if not getattr(head_class(n), "learns_scores", True)]
        if self.config.attention != "none" and fixed:
            raise ValueError(
                f"attention: the scores of {', '.join(fixed)} are fixed; train only heads that learn "
                f"their scores, with --heads efficient_probe abmilp for example"
            )

    def head_options(self) -> dict[str, dict[str, Any]]:
        """``options`` by head, parsed."""
        options: dict[str, dict[str, Any]] = {name: {} for name in self.heads}
        for pair in self.options:
            name, found, rest = pair.partition(".")
            if not found or name not in options:
                raise ValueError(
                    f"options: got {pair!r}; write head.name=value with a head of "
                    f"{', '.join(options)}"
                )
            options[name].update(parse_options([rest]))
        return options

    def folder(self, output: Path, head: str, fold: int, seed: int) -> Path:
        """The folder below ``output`` for the run of one head, fold and seed."""
        several = len(self.folds) * len(self.seeds) > 1
        return output / head / f"fold-{fold}-seed-{seed}" if several else output / head

    def check_output(self, output: Path, resume: bool) -> None:
        """Raise a ValueError if ``output`` already holds a run, unless it is to be resumed."""
        runs = itertools.product(self.heads, self.folds, self.seeds)
        begun = [f for run in runs if ((f := self.folder(output, *run)) / RUN_FILE).is_file()]
        if begun and not resume:
            raise ValueError(
                f"output: {begun[0]} already holds a run; resume it with --resume, or give another "
                "--output"
            )
