"""Mistakes at the command line with models of Hugging Face transformers."""

import importlib.util

from mistakes.table import Typed

MISTAKES = [
    Typed(
        "explain {photo} -b transformers:{folder}/mine",
        ("backbone: no folder ", "transformers:"),
    ),
    Typed(
        "explain {photo} -b transformers:{folder}",
        ("backbone: transformers:", "no config.json", "save_pretrained"),
    ),
    Typed(
        "explain {photo} -b google/vit-base-patch16-224",
        ("backbone: ", "transformers:google/vit-base-patch16-224"),
    ),
    Typed(
        "explain {photo} -b transformers:{folder} --weights mine.safetensors",
        ("weights: ", "mine.safetensors"),
    ),
]
if importlib.util.find_spec("transformers") is None:
    MISTAKES = []
