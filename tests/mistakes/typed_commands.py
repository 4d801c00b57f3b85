"""Mistakes at the command line that stand in no other file."""

from mistakes.table import Typed

MISTAKES = [
    Typed("explain {folder}/nope.jpg", ("images: ", "nope.jpg")),
]
