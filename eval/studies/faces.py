"""Generated faces with expressions, drawn from a few numbers, so that landmarks and labels are known.

Six expressions set brows, eyes, nose and mouth. Every face has its own strength of expression, build,
pose and light. Some faces blend two expressions, and some labels are false, as in photos that people
labelled. A face depends only on (seed, number).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EXPRESSIONS = ("happy", "sad", "angry", "surprised", "afraid", "disgusted")
SHAPE = (
    "brow raise",
    "brow slant",
    "eye opening",
    "mouth curve",
    "mouth opening",
    "mouth width",
    "nose",
)
"""The features that an expression sets; 0 is neutral. A positive slant lifts the brows' inner ends."""
OF_EXPRESSION = np.array(
    [
        [0.1, 0.0, -0.3, 1.0, 0.4, 0.6, 0.0],
        [0.1, 0.8, -0.3, -0.8, 0.0, -0.2, 0.0],
        [-0.5, -1.0, 0.0, -0.4, 0.1, -0.3, 0.2],
        [1.0, 0.0, 0.9, 0.0, 1.0, -0.6, 0.0],
        [0.7, 0.7, 0.8, -0.4, 0.5, 0.2, 0.0],
        [-0.3, -0.5, -0.6, -0.5, 0.3, 0.1, 1.0],
    ]
)
PARTS = ("brows", "eyes", "nose", "mouth")
POINTS = (0,) * 6 + (1,) * 8 + (2,) * 3 + (3,) * 6
"""The part that each landmark is on: three per brow, four per eye, three on the nose, six on the
mouth."""
DRAWN = 64  # side in pixels as drawn, before averaging to fewer
BUILD_NOISE, PIXEL_NOISE, POINT_NOISE = 0.12, 0.03, 0.012


class Faces(NamedTuple):
    """Faces and what is known of them.

    ``images`` (n, 1, size, size) in [0, 1]; ``landmarks`` (n, 23, 2), x and y as shares of the image;
    ``labels`` (n,), some of them false; ``truth`` (n,), the stronger expression; ``clear`` (n,), whether
    it is the only one."""

    images: Tensor
    landmarks: Tensor
    labels: Tensor
    truth: Tensor
    clear: Tensor


def draw_faces(
    count: int,
    seed: int = 0,
    *,
    size: int = 32,
    blends: float = 0.35,
    false_labels: float = 0.1,
    truth: Sequence[int] | None = None,
) -> Faces:
    """Draw ``count`` faces.

    Args:
        truth: the stronger expression of each face; drawn at random if not given.
        size: the side in pixels, a divisor of 64.
        blends: the share of faces with two expressions; ``false_labels``, the share of wrong labels.
    """
    faces = [
        _face(
            np.random.default_rng((seed, i)),
            size,
            blends,
            false_labels,
            None if truth is None else truth[i],
        )
        for i in range(count)
    ]
    images, points, labels, shown, clear = zip(*faces, strict=True)
    return Faces(
        torch.from_numpy(np.stack(images)).float()[:, None],
        torch.from_numpy(np.stack(points)).float(),
        *(torch.tensor(column) for column in (labels, shown, clear)),
    )


def _face(
    rng: np.random.Generator, size: int, blends: float, false_labels: float, shown: int | None
) -> tuple[Any, ...]:
    first, second = rng.choice(len(EXPRESSIONS), 2, replace=False)
    if shown is not None:
        second = first if second == shown else second
        first = shown
    share = rng.uniform(0.5, 0.75) if rng.random() < blends else 1.0
    shape = share * OF_EXPRESSION[first] + (1 - share) * OF_EXPRESSION[second]
    shape = shape * rng.uniform(0.7, 1.1) + BUILD_NOISE * rng.standard_normal(len(SHAPE))
    label = first
    if rng.random() < false_labels:
        label = (first + rng.integers(1, len(EXPRESSIONS))) % len(EXPRESSIONS)
    points = landmarks_of(shape, rng.uniform(0.9, 1.1, 3))
    angle, scale = rng.normal(0, 0.12), rng.uniform(0.85, 1.05)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = 0.5 + rng.normal(0, 0.03, 2)
    image = _drawing([part @ turn.T + shift for part in points], scale, shape, rng)
    image = image.reshape(size, DRAWN // size, size, DRAWN // size).mean((1, 3))
    light = 1 + rng.normal(0, 0.2) * np.linspace(-1, 1, size)
    image = image * light + PIXEL_NOISE * rng.standard_normal(image.shape)
    known = np.concatenate(points[:4]) @ turn.T + shift
    known = known + POINT_NOISE * rng.standard_normal(known.shape)
    return image.clip(0, 1), known, int(label), int(first), share == 1.0


def landmarks_of(
    shape: NDArray[np.float64], build: Sequence[float] | NDArray[np.float64] = (1.0, 1.0, 1.0)
) -> list[NDArray[np.float64]]:
    """Points of brows, eyes, nose and mouth, then the outline, of an upright face around (0, 0).

    They are shares of the image. ``shape`` (7,) is as in :data:`SHAPE`; ``build`` has factors for the
    distance of the eyes, the height of the mouth and the width of the head."""
    raised, slant, opening, curve, mouth_open, wide, wrinkle = shape
    apart, low, width = build
    brows, eyes = [], []
    for side in (-1, 1):
        x = side * 0.15 * apart
        top = -0.20 - 0.035 * raised
        ends = (0.07, 0.035 * slant)  # the outer end goes down where the inner one goes up
        brows += [
            (x + side * ends[0], top + ends[1]),
            (x, top - 0.012),
            (x - side * ends[0], top - ends[1]),
        ]
        half = 0.035 * max(1 + 0.6 * opening, 0.15)
        eyes += [(x - 0.055, -0.09), (x, -0.09 - half), (x + 0.055, -0.09), (x, -0.09 + half)]
    up = 0.025 * wrinkle
    nose = [(-0.045, 0.06 - up), (0.0, 0.08 - up), (0.045, 0.06 - up)]
    y, half, gap = 0.22 * low, 0.13 * (1 + 0.35 * wide), 0.012 + 0.05 * max(mouth_open, 0.0)
    bend = 0.05 * curve  # the corners go up where it is positive
    mouth = [
        *((-half, y - bend), (0.0, y - gap + bend), (half, y - bend)),
        *(
            (half / 2, y + gap + 0.6 * bend),
            (0.0, y + gap + bend),
            (-half / 2, y + gap + 0.6 * bend),
        ),
    ]
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    outline = np.stack([0.36 * width * np.cos(angles), 0.44 * np.sin(angles)], 1)
    return [np.array(part, np.float64) for part in (brows, eyes, nose, mouth, outline)]


def _drawing(
    points: Sequence[NDArray[np.float64]],
    scale: float,
    shape: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """The face at 64 x 64 pixels."""
    from skimage.draw import disk, line, polygon

    brows, eyes, nose, mouth, outline = (part * DRAWN for part in points)
    image = np.full((DRAWN, DRAWN), rng.uniform(0.0, 0.4))
    skin, dark = rng.uniform(0.55, 0.9), rng.uniform(0.0, 0.25)

    def fill(corners: NDArray[np.float64], value: float) -> None:
        image[polygon(corners[:, 1], corners[:, 0], image.shape)] = value

    def stroke(ends: NDArray[np.float64], value: float) -> None:
        cells = ends.round().astype(int).clip(0, DRAWN - 2)
        for (x0, y0), (x1, y1) in itertools.pairwise(cells):
            rows, columns = line(y0, x0, y1, x1)
            image[rows, columns] = image[rows + 1, columns] = value

    fill(outline, skin)
    for brow in (brows[:3], brows[3:]):
        stroke(brow, dark)
    for eye in (eyes[:4], eyes[4:]):
        fill(eye, 0.95)
        middle = eye.mean(0)
        radius = scale * DRAWN * 0.018
        image[disk((middle[1], middle[0]), max(radius, 1.0), shape=image.shape)] = dark
        stroke(eye[[0, 1, 2]], dark)
    stroke(nose, skin - 0.25)
    if shape[6] > 0.4:  # wrinkles beside the nose
        stroke(nose[[0]] + np.array([[-3.0, -3.0], [0.0, -5.0]]), skin - 0.2)
        stroke(nose[[2]] + np.array([[0.0, -5.0], [3.0, -3.0]]), skin - 0.2)
    fill(mouth, dark)
    stroke(mouth[[0, 1, 2, 3, 4, 5, 0]], 0.5 * (dark + skin) - 0.1)
    return image
