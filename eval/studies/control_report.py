"""The rows of the study of controls, the bound that each was expected to keep, and its report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from xattn.eval.bootstrap import mean_interval
from xattn.eval.studies.kept import spread

ROUNDING = 1e-9
Blocks = Literal["all", "last four", "every second"]


@dataclass(frozen=True)
class Bound:
    """From ``least`` to ``most``."""

    least: float = -np.inf
    most: float = np.inf

    def __str__(self) -> str:
        if self.least == -np.inf:
            return "" if self.most == np.inf else f"at most {self.most:g}"
        return (
            f"at least {self.least:g}"
            if self.most == np.inf
            else f"{self.least:g} to {self.most:g}"
        )

    def verdict(self, value: float) -> str:
        """Such as "at most 0.02: kept"; empty without a bound."""
        if not str(self):
            return ""
        kept = self.least - ROUNDING <= value <= self.most + ROUNDING
        return f"{self}: {'kept' if kept else 'missed'}"


NO_BOUND = Bound()


@dataclass(frozen=True)
class Free:
    """A control in blocks of a trained network; no mechanism is the network as it was trained."""

    mechanism: str | None
    blocks: Blocks = "all"
    source: str = ""
    bound: Bound = NO_BOUND
    norm: bool = True

    @property
    def name(self) -> str:
        if self.mechanism is None:
            return "as trained"
        where = {"all": "", "last four": ", last four blocks"}.get(
            self.blocks, ", every second block"
        )
        source = f", {self.source}" if self.source else ""
        return self.mechanism + source + ("" if self.norm else ", no norm") + where

    @property
    def key(self) -> str:
        return key_of(self.name)

    @property
    def of_photos(self) -> bool:
        """Whether its maps are made from photos, so that it is measured on others."""
        return self.source in ("mean", "photo")

    def layers(self, depth: int) -> Sequence[int]:
        """The numbers of the blocks, of ``depth``, that get it; of every two the second."""
        if self.blocks == "last four":
            return range(max(0, depth - 4), depth)
        return range(depth) if self.blocks == "all" else range(1, depth, 2)


@dataclass(frozen=True)
class Trained:
    """A control in all blocks of a network that is trained with it."""

    mechanism: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bound: Bound = NO_BOUND

    @property
    def key(self) -> str:
        return key_of(" ".join([self.mechanism, *map(str, self.options.values())]))


def key_of(name: str) -> str:
    """``name`` as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


FEW, NEARLY = Bound(most=0.02), Bound(least=0.99)
FREE = (
    Free(None),
    Free("uniform", bound=FEW),
    Free("static", source="noise", bound=FEW),
    Free("non_approximate", bound=FEW),
    Free("taylor", bound=FEW),
    Free("static_embedding", bound=FEW),
    Free("static_embedding", bound=FEW, norm=False),
    Free("none"),
    Free("static", source="photo", bound=Bound(most=0.08)),
    Free("static", source="mean", bound=Bound(most=0.12)),
    Free("uniform", "last four", bound=Bound(0.20, 0.38)),
    Free("static", "last four", "mean", Bound(0.42, 0.60)),
    Free("static", "every second", "mean", Bound(0.40, 0.60)),
)
DRAWN, LEARNED = {"source": "drawn"}, {"source": "learned"}
DIGITS = {
    "standard": Trained("softmax", bound=Bound(least=0.93)),
    "static, drawn": Trained("static", DRAWN),
    "static, learned": Trained("static", LEARNED),
    "static_embedding": Trained("static_embedding"),
    "non_approximate": Trained("non_approximate"),
    "taylor": Trained("taylor"),
    "none": Trained("none", bound=Bound(0.90, 0.95)),
    "uniform": Trained("uniform", bound=Bound(most=0.90)),
}
COUNTED = Bound(most=0.42)
RECALL = {
    "standard": Trained("softmax", bound=NEARLY),
    "taylor": Trained("taylor", bound=NEARLY),
    "static_embedding": Trained("static_embedding", bound=NEARLY),
    "non_approximate": Trained("non_approximate", bound=NEARLY),
    "static, drawn": Trained("static", DRAWN, COUNTED),
    "static, learned": Trained("static", LEARNED, COUNTED),
    "uniform": Trained("uniform", bound=COUNTED),
    "none": Trained("none", bound=Bound(most=0.16)),
}


def report(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables of what was measured, see :func:`xattn.eval.studies.content_controls.study`."""
    yield from _free(found)
    yield from _indicators(found["described"])
    yield from _rollout(found)
    yield from _queries_and_keys(found)
    yield from _digits(found)
    yield from _recall(found["recall"])


def _table(*titles: str) -> Iterator[str]:
    yield f"\n| {' | '.join(titles)} |"
    yield f"| :-- |{' --: |' * (len(titles) - 2)} :-- |"


def _free(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n## A trained network, {found['photos']} photos, without training"
    yield from _table("attention", "photos", "right, share", "95 % interval", "expected")
    for row in FREE:
        at = mean_interval(np.array(found["free"][row.name]))
        cells = [f"{at.n}", f"{at.mean:.3f}", f"{at.lo:.3f} to {at.hi:.3f}"]
        cells.append(row.bound.verdict(at.mean))
        yield f"| {row.name} | {' | '.join(cells)} |"


def _indicators(described: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    titles = list(next(iter(described.values())))
    yield "\n## How the layers attend: mean over layers, heads and photos\n"
    yield f"| attention | {' | '.join(titles)} |"
    yield f"| :-- |{' --: |' * len(titles)}"
    for name, values in described.items():
        yield f"| {name} | {' | '.join(f'{values[title]:.3g}' for title in titles)} |"


def _rollout(found: Mapping[str, Any]) -> Iterator[str]:
    one = found["rollout"]
    alike, right = float(np.mean(one["values"])), float(np.mean(found["free"][one["row"]]))
    yield "\n## Rollout with the last four blocks uniform"
    yield from _table("what", "value", "expected")
    yield (
        f"| rank correlation with the map as trained, {found['compared']} photos | {alike:.3f} | "
        f"{Bound(least=0.95).verdict(alike)} |"
    )
    yield f"| right, share | {right:.3f} | {Bound(most=0.40).verdict(right)} |"


def _queries_and_keys(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"\n## Weights of queries and keys permuted, {found['compared']} photos, {found['permutations']} "
        f"permutations: rank correlations"
    )
    titles = ("mean abs(rho)", "another photo", "abs(mean rho)", "another photo")
    yield from _table("explainer", *titles, "expected of mean abs(rho)")
    for name, values in found["qk"].items():
        both = [np.array(values[key]) for key in ("permuted", "another")]
        sizes = [float(np.abs(x).mean()) for x in both]
        cells = [f"{x:.3f}" for x in [*sizes, *(abs(x.mean()) for x in both)]]
        yield f"| `{name}` | {' | '.join(cells)} | {Bound(most=0.15).verdict(sizes[0])} |"


def _digits(found: Mapping[str, Any]) -> Iterator[str]:
    for rate, rows in found["digits"].items():
        yield f"\n## Trained with a control: digits, 2 blocks of width 64, learning rate {rate:g}"
        yield from _table("attention", "right, share", "CPU s", "expected")
        yield f"| logistic regression on pixels | {found['pixels']:.3f} | | |"
        for name, seeds in rows.items():
            bound = DIGITS[name].bound
            if name == "static, drawn":
                bound = Bound(least=round(_mean(rows["standard"]) - 0.01, 3))
            yield _trained_row(name, seeds, bound)


def _recall(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    yield "\n## Trained with a control: recall of 8 values by 8 keys, chance 0.125"
    yield from _table("attention", "right, share", "CPU s", "expected")
    for name, seeds in rows.items():
        yield _trained_row(name, seeds, RECALL[name].bound)


def _trained_row(name: str, seeds: Sequence[Mapping[str, float]], bound: Bound) -> str:
    right = spread([one["right"] for one in seeds])
    seconds = spread([one["seconds"] for one in seeds], 1)
    return f"| {name} | {right} | {seconds} | {bound.verdict(_mean(seeds))} |"


def _mean(seeds: Sequence[Mapping[str, float]]) -> float:
    return float(np.mean([one["right"] for one in seeds]))
