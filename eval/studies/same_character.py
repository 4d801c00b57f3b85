"""Imagine Yourself on drawn characters: does it draw the same character again, as a new prompt
asks?

    python -m xattn.eval.studies same-character

A flow-matching model (:mod:`xattn.eval.studies.models.character_flow`) learns from pairs of
pictures of one character: a reference, and the picture that a prompt asks for; the two share no
word of their prompts. It is tested on characters that it has not seen. Rows of a seed have the same
batches, noise and times.

    kept      by a recogniser's embedding, the generated picture is nearest to its own character
              among all test characters, each drawn by a third prompt
    followed  a classifier finds all three words of the prompt in the picture
    both      the picture is kept and followed

The recogniser and the classifier are trained once for the study, on drawn pictures of other
characters. Coarse to fine: for the first half of the steps, the target pictures are blurred to 8 x
8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from xattn.eval.bootstrap import t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.characters import (
    CHOICES,
    SIDE,
    draw,
    draw_prompts,
    looks_of,
    other_prompts,
)
from xattn.eval.studies.models.character_flow import CharacterFlow
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize

JUDGES, TESTS = 1_000_000, 2_000_000  # the judges' first character, and the test's
SHOWN = 8  # columns of the picture of samples
PIXEL_NOISE = 0.02  # in the pictures that judges learn from


@dataclass(frozen=True)
class CharacterConfig:
    """Settings of the drawn characters, the model and its training."""

    characters: int = 2000  # Training characters.
    tests: int = 32  # Test characters, different ones for each seed.
    prompts: int = 4  # Prompts for each test character.
    steps: int = 450  # Training steps.
    batch_size: int = 24  # Pairs per step.
    lr: float = 8e-3  # Peak learning rate of AdamW.
    width: int = 64  # Width of the tokens.
    depth: int = 2  # Number of blocks.
    sampling: int = 16  # Steps from noise to a picture.
    judging: int = 150  # Training steps of the recogniser and of the classifier.
    seeds: int = 5  # Models of each kind: seeds 0, 1, ...

    def quick(self) -> CharacterConfig:
        """A short training of each model to check that all works; its figures mean nothing."""
        small = {"characters": 32, "tests": 8, "prompts": 2, "steps": 6, "batch_size": 8}
        return replace(self, **small, sampling=2, judging=4, seeds=2)


DEFAULTS = CharacterConfig()


class Row(NamedTuple):
    """How words and reference are read, whether pictures are blurred in the first half of training,
    and the factor on the learning rate."""

    reading: str
    coarse: bool = True
    rate: float = 1.0


ROWS = {
    "parallel": Row("parallel"),
    "concatenated": Row("concatenated"),
    "concatenated, half the rate": Row("concatenated", rate=0.5),
    "parallel, fine only": Row("parallel", coarse=False),
    "vision only": Row("vision"),
    "text only": Row("text"),
}
DRAWN = {"drawn": "target", "reference, copied": "reference"}
PAIRS = (
    ("parallel", "concatenated"),
    ("parallel", "concatenated, half the rate"),
    ("parallel", "vision only"),
    ("parallel", "text only"),
    ("parallel", "parallel, fine only"),
)
FIGURES = ("kept", "followed", "both")
TITLES = ("identity kept", "prompt followed", "both")


class Tests(NamedTuple):
    """The ``numbers`` of the characters, their prompts, and their pictures: the reference, the one
    that the prompt asks for, and the gallery (characters, 3, 16, 16)."""

    numbers: range
    owners: Tensor
    prompts: Tensor
    references: Tensor
    targets: Tensor
    gallery: Tensor


def study(
    output: OutputAt = "runs/study-same-character",
    config: CharacterConfig = DEFAULTS,
    rows: tuple[str, ...] = tuple(ROWS),
    quick: Quick = False,
) -> Iterator[str]:
    """Train and test those of ``rows`` not finished yet, write report.md, and yield its lines."""
    if unknown := set(rows) - set(ROWS):
        raise ValueError(f"rows: no {sorted(unknown)[0]!r}; choose from {', '.join(ROWS)}")
    config = config.quick() if quick else config
    output = Path(output)
    runs: dict[str, Callable[[Split, int], dict[str, Any]]] = {
        name: partial(measure, name, ROWS[name], config, output) for name in rows
    }
    runs |= {name: partial(measure_drawn, kind, config) for name, kind in DRAWN.items()}
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(output, settings, runs, config.seeds)
    picture = draw_samples(output, config, rows)
    lines = [*_report(found, config)]
    yield from reported(output, lines, {"values": raw_rows(found)}, picture)


def measure(
    name: str, row: Row, config: CharacterConfig, output: Path, split: Split, seed: int
) -> dict[str, Any]:
    """Train a model and judge what it draws; the first seed's pictures are saved in ``output``."""
    model = CharacterFlow(CHOICES, row.reading, SIDE, config.width, config.depth)
    seconds = train(model, row, config, split.fit(range(config.characters)), seed)
    tests = tested(config, split, seed)
    noise = torch.randn(tests.targets.shape, generator=torch.Generator().manual_seed(seed))
    pictures = model.sample(tests.prompts, tests.references, noise, config.sampling)
    if seed == 0:
        np.save(output / f"{name}.npy", pictures[:: config.prompts][:SHOWN].numpy())
    parameters = sum(value.numel() for value in model.parameters())
    return {"seconds": seconds, "parameters": parameters, **judged(pictures, tests, config, split)}


def measure_drawn(kind: str, config: CharacterConfig, split: Split, seed: int) -> dict[str, Any]:
    """Judge drawn pictures as a control: what the prompt asks for, or the reference again."""
    tests = tested(config, split, seed)
    pictures = tests.targets if kind == "target" else tests.references
    return judged(pictures, tests, config, split)


def tested(config: CharacterConfig, split: Split, seed: int) -> Tests:
    """The test characters of ``seed``, and their prompts."""
    first = TESTS + seed * config.tests
    numbers = split.score(range(first, first + config.tests))
    generator = torch.Generator().manual_seed(TESTS + seed)
    looks = looks_of(numbers)
    owners = torch.arange(config.tests).repeat_interleave(config.prompts)
    prompts = draw_prompts(len(owners), generator)
    references = draw(looks[owners], other_prompts(prompts, generator))
    gallery = draw(looks, draw_prompts(config.tests, generator))
    targets = draw(looks[owners], prompts)
    return Tests(numbers, owners, prompts, references, targets, gallery)


def train(
    model: CharacterFlow, row: Row, config: CharacterConfig, numbers: range, seed: int
) -> float:
    """Train ``model`` on pairs of the characters ``numbers`` and return the CPU seconds."""
    generator = torch.Generator().manual_seed(seed)
    looks = looks_of(numbers)

    def losses() -> Iterator[Tensor]:
        for step in range(config.steps):
            own = looks[torch.randint(len(looks), (config.batch_size,), generator=generator)]
            prompts = draw_prompts(len(own), generator)
            references = draw(own, other_prompts(prompts, generator))
            pictures = draw(own, prompts)
            noise = torch.randn(pictures.shape, generator=generator)
            t = torch.rand(len(own), generator=generator)
            if row.coarse and step < config.steps // 2:
                pictures = coarse(pictures)
            yield model.loss(pictures, prompts, references, noise, t)

    return minimize(model, losses(), config.steps, row.rate * config.lr, 0.01, max_norm=1.0)


def coarse(pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) blurred to half the pixels a side."""
    return F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")


# ---------------------------------------------------------------------- judges


class Judge(nn.Module):
    """Pictures (n, 3, 16, 16) -> (n, outputs), by three convolutions."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, width in ((3, 24), (24, 32), (32, 48)):
            conv = nn.Conv2d(inputs, width, 3, 2 if inputs > 3 else 1, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, outputs))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


@cache
def judges(config: CharacterConfig) -> tuple[Judge, Judge]:
    """A recogniser, with embeddings (n, 32) that are near each other for one character, and a
    classifier of the words in a prompt, (n, sum of choices)."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        looks = looks_of(judging(config))
        recogniser, classifier = Judge(32), Judge(sum(CHOICES))
        generator = torch.Generator().manual_seed(JUDGES)

        def noisy(pictures: Tensor) -> Tensor:
            return pictures + PIXEL_NOISE * torch.randn(pictures.shape, generator=generator)

        def drawn() -> tuple[Tensor, Tensor, Tensor]:
            own = looks[torch.randperm(len(looks), generator=generator)[: config.batch_size]]
            prompts = draw_prompts(len(own), generator)
            pair = draw(own, prompts), draw(own, other_prompts(prompts, generator))
            return prompts, noisy(pair[0]), noisy(pair[1])

        def of_pairs() -> Iterator[Tensor]:
            for _ in range(config.judging):
                _, one, other = drawn()
                a, b = F.normalize(recogniser(one), dim=1), F.normalize(recogniser(other), dim=1)
                scores = 10 * a @ b.t()
                own = torch.arange(len(a))
                yield F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)

        def of_words() -> Iterator[Tensor]:
            for _ in range(config.judging):
                prompts, one, _ = drawn()
                parts = classifier(one).split(CHOICES, 1)
                yield torch.stack(
                    [F.cross_entropy(part, prompts[:, i]) for i, part in enumerate(parts)]
                ).sum()

        minimize(recogniser, of_pairs(), config.judging, 3e-3, 0.01)
        minimize(classifier, of_words(), config.judging, 3e-3, 0.01)
    return recogniser, classifier


def judging(config: CharacterConfig) -> range:
    """The characters that the judges learn from."""
    return range(JUDGES, JUDGES + config.characters)


@torch.no_grad()
def judged(pictures: Tensor, tests: Tests, config: CharacterConfig, split: Split) -> dict[str, Any]:
    """Whether each picture keeps its character, follows its prompt, and shows each word, 0 or 1."""
    split.fold().fit(judging(config))
    recogniser, classifier = judges(config)
    found = F.normalize(recogniser(pictures), dim=1)
    gallery = F.normalize(recogniser(tests.gallery), dim=1)
    kept = (found @ gallery.t()).argmax(1) == tests.owners
    parts = classifier(pictures).split(CHOICES, 1)
    words = torch.stack([part.argmax(1) for part in parts], 1) == tests.prompts
    return {
        "kept": kept.int().tolist(),
        "followed": words.all(1).int().tolist(),
        "words": words.double().mean(0).tolist(),
        "error": float((pictures - tests.targets).square().mean().sqrt()),
    }


# ---------------------------------------------------------------------- report


def draw_samples(output: Path, config: CharacterConfig, names: Sequence[str]) -> Path:
    """Draw samples.jpg: for the first prompt of some characters, the reference, the picture asked
    for, and a row with the pictures of each model of seed 0."""
    tests = tested(config, Split("samples"), 0)
    rows = [tests.references, tests.targets]
    shown = [row[:: config.prompts][:SHOWN] for row in rows]
    shown += [torch.from_numpy(np.load(output / f"{name}.npy")) for name in names]
    side = SIDE + 2
    sheet = torch.ones(3, len(shown) * side, len(shown[0]) * side)
    for i, pictures in enumerate(shown):
        for j, picture in enumerate(pictures):
            sheet[:, i * side : i * side + SIDE, j * side : j * side + SIDE] = picture
    pixels = (sheet.permute(1, 2, 0) * 255).round().byte().numpy()
    size = (pixels.shape[1] * 4, pixels.shape[0] * 4)
    file = output / "samples.jpg"
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(file, quality=90)
    return file


def shares(run: Mapping[str, Any]) -> dict[str, float]:
    """The shares of kept, followed and both in one run, in percent."""
    kept, followed = np.array(run["kept"]), np.array(run["followed"])
    values = {"kept": kept, "followed": followed, "both": kept * followed}
    return {name: 100 * float(value.mean()) for name, value in values.items()}


def _report(found: Found, config: CharacterConfig) -> Iterator[str]:
    yield (
        f"{config.characters} characters to learn from, {config.steps} steps of {config.batch_size} pairs; "
        f"{config.tests} others to test with, {config.prompts} prompts each; {config.seeds} seeds; "
        "percent, 95 % t intervals over the seeds"
    )
    of_row = {name: [shares(run) for run in runs] for name, runs in found.items()}
    yield f"\n| row | {' | '.join(TITLES)} | ground | thing | place | error | parameters | CPU seconds |"
    yield "| :-- |" + " --: |" * (len(TITLES) + 6)
    for name, runs in found.items():
        cells = [t_interval([run[key] for run in of_row[name]]).text(1) for key in FIGURES]
        cells += [f"{100 * np.mean([run['words'][i] for run in runs]):.1f}" for i in range(3)]
        cells.append(f"{np.mean([run['error'] for run in runs]):.3f}")
        size, seconds = "", ""
        if "seconds" in runs[0]:
            size = f"{runs[0]['parameters']:,}"
            seconds = f"{np.mean([run['seconds'] for run in runs]):.1f}"
        yield f"| {name} | {' | '.join(cells)} | {size} | {seconds} |"
    yield f"\n| row | minus | {' | '.join(TITLES)} |"
    yield "| :-- | :-- |" + " --: |" * len(TITLES)
    for name, control in PAIRS:
        if name not in found or control not in found:
            continue
        gaps = [
            t_interval([a[k] - b[k] for a, b in zip(of_row[name], of_row[control], strict=True)])
            for k in FIGURES
        ]
        cells = [f"{gap.mean:+.1f} [{gap.lo:+.1f}, {gap.hi:+.1f}]" for gap in gaps]
        yield f"| {name} | {control} | {' | '.join(cells)} |"
