"""The table of outcomes: a network's outputs for a photo under masks that do not depend on any map.

    s_k(x) = z_k - log sum_{j != k} exp z_j        (log-odds; for a multilabel network, z_k)

Rows are computed when a metric first needs them and are then shared by all methods, metrics and classes.
The scorer, which finds equal images by their hashes, cannot do this job, because it keeps the score of only
one class. It would also have to create and hash every masked photo again for every method; with 212 masks
and two methods, this already takes longer than the forward passes. In addition, it needs images, and there
are none if patches are dropped.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from xattn.backbone.dropped import apply_by_set_size, logits_of_patches
from xattn.eval.fills import fill
from xattn.eval.interfaces import ScoredModel
from xattn.eval.metrics.board.masks import MaskList, cell_sums
from xattn.training.outcome_rows import DROP, KEPT, MANY, log_odds

SCORES = ("log-odds", "logit")


class LogitSource(Protocol):
    """The part of a scorer that a table needs."""

    backbone: ScoredModel
    max_forward_batch: int
    score: str

    def score_logits(self, inputs: Tensor, function: Any = None) -> Tensor: ...


def log_odds_of(scores: Tensor, kind: str) -> Tensor:
    """Return the log-odds of a scorer's ``scores`` if they are probabilities, else the scores, in
    float64."""
    if kind in ("probability", "sigmoid", "binary"):
        return scores.double().logit(eps=1e-15)
    return scores.double()


class Replacement(NamedTuple):
    """What replaces a removed part: a fill (:data:`xattn.eval.fills.KINDS`), with the data set's mean
    colour if it needs one, or ``"drop"``, which leaves patches out of a ViT's sequence."""

    kind: str
    mean: tuple[float, ...] | None = None


def drops_key(masks: MaskList, behind: Replacement, score: str, target: int | str) -> str:
    """Return the key under which the drops of one class are stored."""
    return f"{masks!r} {behind.kind} {score} {target}"


class OutcomeTable:
    """The logits of one photo, for each list of masks and each fill.

    With more than 2,000 classes, it keeps the 256 classes that are most probable for the whole photo, and
    the sum of the others.

    Args:
        scorer: runs the forward passes.
        image: (3, H, W) in [0, 1].
        seed: the seed of the masks.
        clean: (K,) logits of the whole photo; computed if they are not given.
        wanted: classes to keep in any case.
        kept: a dict of float32 drops from an earlier run, keyed by :func:`drops_key`. New drops are added
            to it.
    """

    def __init__(
        self,
        scorer: LogitSource,
        image: Tensor,
        seed: int,
        clean: Tensor | None = None,
        wanted: Sequence[int] = (),
        kept: MutableMapping[str, Tensor] | None = None,
    ) -> None:
        self.scorer, self.image, self.seed, self.wanted = scorer, image, seed, tuple(wanted)
        self._clean, self.kept = clean, kept
        self._rows: dict[tuple[MaskList, Replacement], Tensor] = {}
        self._areas: dict[tuple[MaskList, Replacement], Tensor] = {}
        self._drops: dict[tuple[MaskList, Replacement, int, str], Tensor] = {}

    @property
    def clean(self) -> Tensor:
        """The logits of the whole photo, (K,) float64."""
        if self._clean is None:
            self._clean = self.scorer.score_logits(self.image[None])[0]
        return self._clean

    def second(self, target: int) -> int:
        """Return the most probable class other than ``target``."""
        first, *others = self.clean.argsort(descending=True, stable=True)[:2].tolist()
        return first if first != target or not others else others[0]

    def sums_and_drops(
        self,
        masks: MaskList,
        behind: Replacement,
        raw: Tensor,
        target: int,
        score: str = "log-odds",
    ) -> tuple[Tensor, Tensor]:
        """Compute the sum of the map ``raw`` (H, W) over what each mask removes, and s(x) - s(x without
        it).

        Both are (count,) float64. If the masks of a list differ in area, both are divided by the number of
        removed pixels.

        Args:
            score: ``"log-odds"``, or ``"logit"`` for z_k.
        """
        drops = self.drops(masks, behind, target, score)
        if (masks, behind) not in self._areas:
            area = self._sums(masks, behind, torch.ones_like(raw, device="cpu"))
            one = not masks.by_area or bool((area == area[0]).all())
            self._areas[masks, behind] = torch.ones_like(area) if one else area
        area = self._areas[masks, behind]
        return self._sums(masks, behind, raw.cpu()) / area, drops / area

    def _sums(self, masks: MaskList, behind: Replacement, values: Tensor) -> Tensor:
        grid = self._grid(masks, behind)
        return masks.sums(
            values if grid == tuple(values.shape) else cell_sums(values, grid), self.seed
        )

    def drops(
        self, masks: MaskList, behind: Replacement, target: int, score: str = "log-odds"
    ) -> Tensor:
        """Return s(x) - s(x without the part) of class ``target`` for each mask, (count,) float64."""
        key = masks, behind, target, score
        if key not in self._drops:
            name = drops_key(masks, behind, score, target)
            if self.kept is None:
                self._drops[key] = self._computed(*key)
            else:
                if name not in self.kept:
                    self.kept[name] = self._computed(*key).float()
                self._drops[key] = self.kept[name].double()
        return self._drops[key]

    def _computed(self, masks: MaskList, behind: Replacement, target: int, score: str) -> Tensor:
        """Compute :meth:`drops` with the network."""
        if (masks, behind) not in self._rows:
            self._rows[masks, behind] = self._kept(self._answers(masks, behind))
        logits = torch.cat([self._kept(self.clean[None]), self._rows[masks, behind]])
        column = self._classes.index(target) if self._classes else target
        scores = self._scores(logits, column, score)
        return scores[0] - scores[1:]

    def _scores(self, logits: Tensor, column: int, score: str) -> Tensor:
        task = getattr(self.scorer.backbone, "task", "multiclass")
        if score == "logit" or task not in ("multiclass", "binary") or logits.shape[1] == 1:
            return logits[:, column]
        index = torch.full((len(logits), 1), column, device="cpu")
        return log_odds(logits, index, task)[:, 0]

    @property
    def _classes(self) -> list[int]:
        """The classes that are kept; [] means that all are."""
        if len(self.clean) <= MANY:
            return []
        likeliest = self.clean.argsort(descending=True, stable=True)[:KEPT].tolist()
        return [*likeliest, *(k for k in dict.fromkeys(self.wanted) if k not in likeliest)]

    def _kept(self, logits: Tensor) -> Tensor:
        """Reduce logits (n, K) to the kept classes and the log-sum-exp of all others, if not all are
        kept."""
        classes = self._classes
        if not classes:
            return logits
        others = torch.ones(logits.shape[1], dtype=torch.bool, device="cpu")
        others[classes] = False
        rest = logits[:, others].logsumexp(1, keepdim=True)
        return torch.cat([logits[:, classes], rest], 1)

    def _grid(self, masks: MaskList, behind: Replacement) -> tuple[int, int]:
        """Return the number of rows and columns of pixels, or of patches if patches are dropped.

        Raises:
            ValueError: if a side of the masks' grid has more cells than there are patches.
        """
        height, width = self.image.shape[-2:]
        if behind.kind != DROP:
            return height, width
        backbone: Any = self.scorer.backbone
        rows, columns = (int(n) for n in backbone.grid(height, width))
        cells = getattr(masks, "cells", 1)
        if cells > min(rows, columns):
            raise ValueError(
                f"cells: got {cells}; the photo has {rows} x {columns} patches; "
                f"give cells={min(rows, columns)} or fill='mean'"
            )
        return rows, columns

    def _answers(self, masks: MaskList, behind: Replacement) -> Tensor:
        """Compute the logits for all masks, (count, K) float64."""
        removed = masks.removed(self._grid(masks, behind), self.seed)
        if behind.kind == DROP:
            return self._dropped(~removed.flatten(1))
        image = self.image
        shown = fill(
            image, torch.ones_like(image[:1], dtype=torch.bool), *behind[:1], mean=behind.mean
        )
        parts = removed[:, None].split(self.scorer.max_forward_batch)
        return torch.cat(
            [self.scorer.score_logits(torch.where(p.to(image.device), shown, image)) for p in parts]
        )

    def _dropped(self, kept: Tensor) -> Tensor:
        """Do the same as :meth:`_answers` with only the patches ``kept`` (count, N). All masks of a pass
        keep the same number of patches."""
        backbone: Any = self.scorer.backbone

        def answers(index: Tensor) -> Tensor:
            parts = index.to(self.image.device).split(self.scorer.max_forward_batch)
            return torch.cat([self.scorer.score_logits(part, passed) for part in parts])

        def passed(rows: Tensor) -> Tensor:
            return logits_of_patches(backbone, self.image[None], rows)

        return apply_by_set_size([row.nonzero()[:, 0] for row in kept], answers)
