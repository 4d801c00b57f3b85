"""What a pack stores about a vision-language model's answer, in addition to the maps of its words.

A photo's row contains the question, the answer and its words. The map of word number i is the entry
whose ``target`` is i. Photos that were shown together, and frames of a clip, share an answer, linked by
their ids:

    photo                  alone
    photo#1, photo#2       shown together, in this order
    clip#frame-000012      a frame of a clip, by its number in the clip, from 0

In maps of frames, ``protocol["video"]`` contains ``fps``, the frame rate of the clip; ``frames``, the
numbers of all frames that have maps, in order; and ``frames_per_map``, the number of shown frames that
share a map. This number is 2 for Qwen-VL, whose image tokens cover two frames; the frame number and the
picture are then those of the first frame.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xattn.runtime.names import encodable

MOST = 1 << 18  # limit for the words, or text tokens, of an answer
SHARES = 3  # image, prompt and answer


def frame_id(clip: str, number: int) -> str:
    """Return the id of a frame of a clip.

    >>> frame_id("walk", 12)
    'walk#frame-000012'
    """
    return f"{clip}#frame-{number:06d}"


@dataclass(frozen=True)
class AnswerWord:
    """A word of an answer.

    Args:
        text: the word as it appears in the answer, at the characters ``span`` (start, end).
        log_prob: joint log probability of its tokens, each given everything before it.
        probability: exp of the mean log probability of its tokens.
        lost: the decrease of ``log_prob`` when the image is removed.
        shares: for each method, the shares of its scores that are on the image, the prompt and the answer
            so far; they add up to 1.
        sources: for each method, its scores of the text tokens (:attr:`AnswerFacts.tokens`).
    """

    text: str
    span: tuple[int, int]
    log_prob: float
    lost: float
    probability: float
    shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    sources: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerFacts:
    """An answer: the ``prompt``, the ``text`` of the model's answer, its ``words``, and the text of each
    of the ``tokens`` that are not image tokens; the first ``asked`` of these are the prompt's, the others
    the answer's."""

    prompt: str
    text: str
    words: tuple[AnswerWord, ...]
    tokens: tuple[str, ...] = ()
    asked: int = 0

    @property
    def size(self) -> int:
        """Return the approximate size in memory, in bytes."""
        numbers = sum(len(v) for word in self.words for v in word.sources.values())
        return 2000 * (1 + len(self.words)) + 100 * len(self.tokens) + 32 * numbers

    def to_json(self) -> str:
        """Return JSON that :meth:`from_json` can read; numbers have four digits and token scores three,
        and trailing zeros are left out."""
        words = [
            {
                "text": word.text, "span": word.span,
                "log_prob": _short(word.log_prob), "lost": _short(word.lost),
                "probability": _short(word.probability),
                "shares": {m: [*map(_short, v)] for m, v in word.shares.items()},
                "sources": {m: _without_end(v) for m, v in word.sources.items()},
            }
            for word in self.words
        ]  # fmt: skip
        record = {
            "prompt": self.prompt, "text": self.text, "words": words, "tokens": self.tokens,
            "asked": self.asked,
        }  # fmt: skip
        return json.dumps(record, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, record: Any, shown: Callable[[str], str] = str) -> AnswerFacts:
        """Read an answer from parsed JSON, the inverse of :meth:`to_json`; ``shown`` is applied to every
        string to make it safe to display.

        Raises:
            ValueError: the JSON is not an answer.
        """
        prompt, text, words, tokens, asked = _fields(
            record, "prompt", "text", "words", "tokens", "asked"
        )
        prompt, text = _text(prompt, shown), _text(text, shown)
        tokens = tuple(_text(t, shown) for t in _list(tokens))
        if type(asked) is not int or not 0 <= asked <= len(tokens):
            raise ValueError("the number of a prompt's tokens is not valid")
        found = []
        for word in _list(words):
            name, span, *values, shares, sources = _fields(
                word, "text", "span", "log_prob", "lost", "probability", "shares", "sources"
            )
            start, end = _numbers(span, 2)
            log_prob, lost, probability = _numbers(values, 3)
            if not 0 <= start <= end <= len(text):
                raise ValueError("a word is not in its answer")
            found.append(
                AnswerWord(
                    _text(name, shown), (int(start), int(end)), log_prob, lost, probability,
                    _by_method(shares, SHARES), _by_method(sources, len(tokens), short=True),
                )
            )  # fmt: skip
        return cls(prompt, text, tuple(found), tokens, asked)

    def _without_methods(self) -> tuple[Any, ...]:
        values = [(w.span, _short(w.log_prob), _short(w.lost)) for w in self.words]
        return self.prompt, self.text, self.tokens, self.asked, values

    def combine(self, other: AnswerFacts) -> AnswerFacts:
        """Combine this answer with the results of further methods in ``other``.

        Raises:
            ValueError: ``other`` has a different prompt or answer.
        """
        if self._without_methods() != other._without_methods():
            raise ValueError(f"{self.text[:60]!r} and {other.text[:60]!r} are different answers")
        words = [
            replace(a, shares={**b.shares, **a.shares}, sources={**b.sources, **a.sources})
            for a, b in zip(self.words, other.words, strict=True)
        ]
        return replace(self, words=tuple(words))


def _without_end(values: Sequence[float]) -> list[float]:
    count = next((i for i in range(len(values), 0, -1) if values[i - 1]), 0)
    return [float(f"{value:.3g}") for value in values[:count]]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _fields(record: Any, *names: str) -> list[Any]:
    if type(record) is not dict or set(record) != set(names):
        raise ValueError("a part of an answer has the wrong fields")
    return [record[name] for name in names]


def _text(value: Any, shown: Callable[[str], str]) -> str:
    if type(value) is not str:
        raise ValueError("a text of an answer is not a string")
    return shown(encodable(value))


def _list(value: Any) -> list[Any]:
    if type(value) is not list or len(value) > MOST:
        raise ValueError(f"a part of an answer is not a list of at most {MOST:,}")
    return value


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    if type(value) is not list or len(value) != count:
        raise ValueError("an answer has the wrong number of values")
    if not all(type(v) in (int, float) and abs(v) < 1e30 for v in value):
        raise ValueError("a value of an answer is not a number")
    return tuple(float(v) for v in value)


def _by_method(value: Any, count: int, short: bool = False) -> dict[str, tuple[float, ...]]:
    if type(value) is not dict:
        raise ValueError("the values of an answer are not listed by method")
    found = {}
    for name, given in value.items():
        own = min(len(given), count) if short and type(given) is list else count
        found[encodable(name)] = _numbers(given, own) + (0.0,) * (count - own)
    return found
