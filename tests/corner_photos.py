"""Made-up photos of four classes; every second of the first class is looked at in a corner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from synthetic_packs import CLASSES, explanation, picture

COUNT = 48


def photo(number, features=True):
    """The explanation of one of them: a fifth is told wrong, and features tell the true class."""
    label = number % 4
    rng = np.random.default_rng(number)
    values = np.zeros((7, 7), np.float32)
    down, across = rng.integers(2, 5, 2)
    values[down, across] = 1
    if label == 0 and number // 4 % 2:
        values[6, 6] = 1
    own = explanation(number, target=label, source=picture(number), map=values)
    predicted = label if number % 5 else (label + 1) % 4
    top = ((predicted, CLASSES[predicted], 0.5 + number / 200),)
    row = np.float16(np.r_[np.eye(4)[label] * 4, rng.normal(size=4)]) if features else None
    facts = replace(own.facts, top=top, label=label, label_name=CLASSES[label], features=row)
    return replace(own, target=predicted, target_name=CLASSES[predicted], facts=facts)
