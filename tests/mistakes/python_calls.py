"""Mistakes in calls of the public functions that stand in no other file."""

import xattn
from mistakes.table import Mistake

MISTAKES = [
    Mistake(
        "explainer misspelt",
        lambda b: xattn.explain(b.photo, b.cnn, explainer="gradcm"),
        ("explainer: ", "did you mean gradcam"),
    ),
    Mistake(
        "target out of range",
        lambda b: xattn.create_explainer("gradcam", b.cnn).attribute(b.images, 5),
        ("target: ", "0..4"),
    ),
]
