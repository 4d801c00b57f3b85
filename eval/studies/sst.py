"""Sentences of the Stanford Sentiment Treebank with the words that carry their sentiment.

A line is a tree such as ``(3 (2 It) (4 (2 's) (4 lovely)))``: each phrase has a label from 0, very
negative, to 4, very positive. A sentence whose own label is 2 is dropped; below it is negative (0),
above it positive (1). The evidence of a word is

    e_t = mean of y (label - 2) / 2 over the phrases of at most 5 words that contain t,   y = -1 or 1

and the rationale of a sentence is the words with e_t >= 1/2: those whose short phrases were
labelled positive or stronger in a positive sentence, negative or stronger in a negative one.
Training does not read rationales.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PHRASE = 5
EVIDENCE = 0.5

_TOKEN = re.compile(r"\(|\)|[^\s()]+")


class Sentence(NamedTuple):
    """``words`` (T), ``label`` 0 or 1, ``evidence`` (T,) from -1 to 1, and its file and line."""

    words: tuple[str, ...]
    label: int
    evidence: NDArray[np.float64]
    place: str = ""

    @property
    def rationale(self) -> NDArray[np.bool_]:
        """(T,): the words that carry the sentence's sentiment."""
        return self.evidence >= EVIDENCE


class Phrase(NamedTuple):
    """The words ``first`` to ``last`` - 1 of a sentence, and their label from 0 to 4."""

    first: int
    last: int
    label: int


def parse(line: str) -> tuple[tuple[str, ...], list[Phrase]]:
    """The words and phrases of a tree, with the whole sentence last."""
    words: list[str] = []
    phrases: list[Phrase] = []
    open_phrases: list[tuple[int, int]] = []
    tokens = _TOKEN.findall(line)
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token == "(":
            label = tokens[position + 1] if position + 1 < len(tokens) else ""
            if label not in {"0", "1", "2", "3", "4"}:
                raise ValueError(f"tree: label {label!r} in {line[:60]!r}; labels are 0 to 4")
            open_phrases.append((len(words), int(label)))
            position += 2
            continue
        if not open_phrases:
            raise ValueError(f"tree: {token!r} outside brackets in {line[:60]!r}")
        if token == ")":
            first, value = open_phrases.pop()
            phrases.append(Phrase(first, len(words), value))
        else:
            words.append(token)
        position += 1
    if open_phrases or not words:
        raise ValueError(f"tree: brackets do not match in {line[:60]!r}")
    return tuple(words), phrases


def read(path: str | Path) -> list[Sentence]:
    """The sentences in a file of trees, without the neutral ones."""
    found = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"data: {path} is not UTF-8 text; save it as UTF-8") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            words, phrases = parse(line)
        except ValueError as error:
            raise ValueError(f"data: line {number} of {path}: {error}") from None
        label = phrases[-1].label
        if label != 2:
            sign = 1 if label > 2 else -1
            evidence = _evidence(len(words), phrases, sign)
            found.append(Sentence(words, int(label > 2), evidence, f"{Path(path).name}:{number}"))
    return found


def _evidence(count: int, phrases: list[Phrase], sign: int) -> NDArray[np.float64]:
    total, seen = np.zeros(count), np.zeros(count)
    for first, last, label in phrases:
        if last - first <= PHRASE:
            total[first:last] += sign * (label - 2) / 2
            seen[first:last] += 1
    return total / np.maximum(seen, 1)
