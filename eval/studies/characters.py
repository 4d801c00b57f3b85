"""Drawn characters that differ in their looks, in scenes that a prompt of three words asks for.

A character depends only on its number, which sets the colours of skin, clothes and hair, and the shape
of the head, ears and eyes. A scene has a background, an object that the character holds, and a place.
A picture (3, 16, 16) in [0, 1] depends on both.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

SIDE = 16
GROUNDS = {
    "sand": (0.88, 0.80, 0.58),
    "sky": (0.55, 0.78, 0.97),
    "grass": (0.36, 0.62, 0.34),
    "night": (0.14, 0.14, 0.30),
}
THINGS = {
    "nothing": (0.0, 0.0, 0.0),
    "ball": (0.90, 0.15, 0.15),
    "box": (0.15, 0.25, 0.85),
    "star": (1.00, 0.90, 0.10),
}
PLACES = {"left": 0.25, "middle": 0.5, "right": 0.75}  # four pixels apart
WORDS = (tuple(GROUNDS), tuple(THINGS), tuple(PLACES))
"""The lists of words for a prompt, which has one word from each."""
CHOICES = tuple(len(words) for words in WORDS)
LOOKS = 15  # numbers that define a character
EDGE = 0.6 / SIDE  # how soft an edge is, as a share of the picture


def looks_of(numbers: Iterable[int]) -> Tensor:
    """(n, 15): the looks of the characters ``numbers``, which are colours of skin, clothes and hair, half
    axes of the head, height of the hair, size and place of the ears, distance and size of the eyes."""
    return torch.tensor([_looks(int(number)) for number in numbers]).float()


def _looks(number: int) -> list[float]:
    rng = np.random.default_rng((number, 7))
    colours = [
        channel
        for low in (0.75, 0.45, 0.3)
        for channel in colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), rng.uniform(low, 1))
    ]
    head = rng.uniform(0.13, 0.23, 2)
    ears = (rng.choice([0.0, 0.07, 0.1]), rng.uniform(0.3, 1.0))
    return [*colours, *head, rng.uniform(0, 0.6), *ears, rng.uniform(0.05, 0.10)]


def draw_prompts(count: int, generator: torch.Generator) -> Tensor:
    """(n, 3): random prompts, as the number of a word in each list."""
    drawn = [torch.randint(choices, (count, 1), generator=generator) for choices in CHOICES]
    return torch.cat(drawn, 1)


def other_prompts(prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Prompts (n, 3) that share no word with ``prompts``."""
    steps = [torch.randint(1, n, (len(prompts), 1), generator=generator) for n in CHOICES]
    return (prompts + torch.cat(steps, 1)) % torch.tensor(CHOICES)


def words_of(prompt: Tensor) -> str:
    """A prompt (3,) in words.

    >>> words_of(torch.tensor([1, 2, 0]))
    'sky, box, left'
    """
    return ", ".join(words[i] for words, i in zip(WORDS, prompt.tolist(), strict=True))


def draw(looks: Tensor, prompts: Tensor) -> Tensor:
    """Pictures (n, 3, 16, 16) in [0, 1] of characters with ``looks`` (n, 15) in scenes (n, 3)."""
    middle = (torch.arange(SIDE) + 0.5) / SIDE
    y, x = middle[:, None], middle
    grounds, things, places = (
        torch.tensor(list(table.values())) for table in (GROUNDS, THINGS, PLACES)
    )
    ground, thing, place = prompts.unbind(1)
    picture = grounds[ground][:, :, None, None].expand(-1, -1, SIDE, SIDE)
    skin, clothes, hair = looks[:, :3], looks[:, 3:6], looks[:, 6:9]
    wide, high, fringe, ear, ear_at, apart = (v[:, None, None] for v in looks[:, 9:].unbind(1))
    at = places[place][:, None, None]
    top = 0.36

    def paint(over: Tensor, distance: Tensor, colour: Tensor) -> Tensor:
        inside = torch.sigmoid(-distance / (EDGE / 2))[:, None]
        return over * (1 - inside) + inside * colour[:, :, None, None]

    def ellipse(cx: Tensor, cy: Tensor | float, a: Tensor | float, b: Tensor | float) -> Tensor:
        radius = torch.sqrt(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 + 1e-9)
        return (radius - 1) * torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    picture = paint(picture, ellipse(at, 0.82, 0.17, 0.28), clothes)
    for side in (-1, 1):
        ears = ellipse(
            at + side * wide * ear_at, top - high, ear.clamp_min(0.01), ear.clamp_min(0.01)
        )
        picture = paint(picture, ears + (ear == 0), skin)
    head = ellipse(at, top, wide, high)
    picture = paint(picture, head, skin)
    picture = paint(picture, torch.maximum(head, y - (top - fringe * high)), hair)
    dark = torch.full_like(skin, 0.05)
    for side in (-1, 1):
        picture = paint(picture, ellipse(at + side * apart, top + 0.03, 0.03, 0.03), dark)
    holds = torch.where(at > 0.55, at - 0.29, at + 0.29)
    shapes = torch.stack(
        [
            torch.ones(len(looks), SIDE, SIDE),
            ellipse(holds, 0.72, 0.11, 0.11),
            torch.maximum((x - holds).abs(), (y - 0.72).abs()) - 0.1,
            (x - holds).abs() + (y - 0.72).abs() - 0.13,
        ],
        1,
    )
    return paint(picture, shapes[torch.arange(len(looks)), thing], things[thing])
