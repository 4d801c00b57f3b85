"""Finds the order of a photo's cells that restores a ViT's prediction soonest, by ridge regression.

    z in {-1, 1}^n, a random half kept;    w = argmin sum_z ((y(z) - y(-z)) / 2 - w . z)^2 + ridge |w|^2

y is p of the predicted class, or its logit minus the mean logit; cells are ordered by falling w.
The tokens of dropped cells are left out, see :mod:`~xattn.eval.studies.dropped_tokens`. In the
difference between a half and its complement, interactions of two cells cancel; they would be noise
here. Balanced halves are random rows and columns of a Hadamard matrix (Paley 1933): any two cells
are kept together as often as apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.eval.studies.dropped_tokens import DroppedTokens
from xattn.eval.studies.run_files import kept_values
from xattn.photos.images import load_image
from xattn.photos.view import prepare

TARGETS = ("p", "logit")
DESIGNS = ("balanced", "random")


class Taught(NamedTuple):
    """What was found for photos, in order: predicted ``classes`` (n,), their ``p`` (n,) with all
    tokens, ``weights`` of the cells (n, cells^2) by target, and mean CPU ``seconds``."""

    classes: Tensor
    p: Tensor
    weights: dict[str, Tensor]
    seconds: float


@dataclass(frozen=True)
class Teacher:
    """Runs ``passes`` per photo with cells left out, each half and its complement; ``design`` draws
    the halves, and ``ridge`` is the regression's penalty."""

    dropped: DroppedTokens
    passes: int = 120
    ridge: float = 10.0
    design: str = "balanced"

    def __post_init__(self) -> None:
        pairs, cells = self.passes // 2, self.dropped.cells**2
        if self.design == "balanced" and (pairs < cells or not has_paley(pairs)):
            raise ValueError(
                f"passes: got {self.passes}; balanced halves of {cells} cells need 2 (q + 1) with q a "
                f"prime of the form 4 k + 3, such as {_fitting_passes(cells)}, or design='random'"
            )

    def halves(self, seed: int) -> Tensor:
        """z (passes / 2, cells^2), 1 where a cell is kept, else -1."""
        cells, pairs = self.dropped.cells**2, self.passes // 2
        generator = torch.Generator().manual_seed(seed)
        if self.design == "balanced":
            rows, columns = (torch.randperm(pairs, generator=generator) for _ in range(2))
            z = paley(pairs)[rows][:, columns[:cells]]
            for shape in ((pairs, 1), (1, cells)):
                z = z * (2 * torch.randint(0, 2, shape, generator=generator) - 1)
            return z
        drawn = torch.rand(pairs, cells, generator=generator, device="cpu").argsort(1)
        z = -torch.ones(pairs, cells, dtype=torch.int64, device="cpu")
        return z.scatter(1, drawn[:, : (cells + 1) // 2], 1)

    def weights(self, tokens: Tensor, label: int, seed: int) -> dict[str, Tensor]:
        """Weights (cells^2,) in float64 of one photo's cells, from its embedded tokens (1, P + N, C)."""
        z = self.halves(seed)
        kept = torch.cat([z, -z]) > 0
        y = torch.empty(len(kept), len(TARGETS), dtype=torch.float64, device="cpu")
        counts = kept.sum(1)
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            cells = kept[rows].nonzero()[:, 1].view(len(rows), count).to(tokens.device)
            logits = self.dropped.logits(tokens.expand(len(rows), -1, -1), cells).double().cpu()
            y[rows, 0] = logits.softmax(1)[:, label]
            y[rows, 1] = logits[:, label] - logits.mean(1)
        ours, others = y.chunk(2)
        found = ridge_weights(z.double(), (ours - others) / 2, self.ridge)
        return dict(zip(TARGETS, found.unbind(1), strict=True))


def has_paley(order: int) -> bool:
    """Whether :func:`paley` makes a matrix of this order."""
    q = order - 1
    return q % 4 == 3 and all(q % d for d in range(2, int(q**0.5) + 1))


def paley(order: int) -> Tensor:
    """A Hadamard matrix of 1 and -1 by Paley's first construction: H H^T = order I."""
    q = order - 1
    squares = torch.arange(1, q, device="cpu").square() % q
    symbol = -torch.ones(q, dtype=torch.int64, device="cpu")
    symbol[squares] = 1
    symbol[0] = 0
    i = torch.arange(q, device="cpu")
    skew = torch.zeros(order, order, dtype=torch.int64, device="cpu")
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = symbol[(i[:, None] - i) % q]
    return skew + torch.eye(order, dtype=torch.int64, device="cpu")


def _fitting_passes(cells: int) -> int:
    return 2 * next(order for order in range(max(4, cells), 4 * cells + 8) if has_paley(order))


def ridge_weights(z: Tensor, y: Tensor, ridge: float) -> Tensor:
    """argmin_w |y - z w|^2 + ridge |w|^2."""
    gram = z.mT @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return torch.linalg.solve(gram, z.mT @ y)


def teach(
    teacher: Teacher, paths: Sequence[Path], folder: Path, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """What ``teacher`` finds for each photo; each is kept in a file in ``folder``."""

    def find(path: Path, number: int) -> dict[str, Any]:
        start = time.process_time()
        tokens, logits = teacher.dropped.embedded(image_of(path, teacher.dropped.backbone)[None])
        p, label = logits[0].double().softmax(0).max(0)
        weights = teacher.weights(tokens, int(label), 1_000_003 * seed + number)
        found = {key: value.tolist() for key, value in weights.items()}
        seconds = time.process_time() - start
        return {"class": int(label), "p": float(p), "weights": found, "seconds": seconds}

    for i, path in enumerate(paths):
        yield kept_values(folder / f"{i:05d}.json", partial(find, path, i))


def taught(teacher: Teacher, paths: Sequence[Path], folder: Path, seed: int = 0) -> Taught:
    """The findings of :func:`teach`, joined over the photos."""
    found = list(teach(teacher, paths, folder, seed))
    return Taught(
        torch.tensor([one["class"] for one in found], device="cpu"),
        torch.tensor([one["p"] for one in found], dtype=torch.float64, device="cpu"),
        {
            key: torch.tensor(
                [one["weights"][key] for one in found], dtype=torch.float64, device="cpu"
            )
            for key in TARGETS
        },
        sum(one["seconds"] for one in found) / max(len(found), 1),
    )


def image_of(path: Path, backbone: Backbone) -> Tensor:
    """The photo as (3, H, W) in [0, 1], on the backbone's device."""
    pixels = prepare(load_image(path), backbone.preprocessing, "crop")[0]
    return pixels.to(backbone.device, backbone.mean.dtype)
