"""The answer of a vision-language model, with a map for every explained word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xattn.packs.explanation import Explanation
from xattn.vlm.words import Word, word_number

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class WordMaps:
    """One method's result for a word: ``explanations``, one per photo; ``text`` (M,), the scores of the
    text tokens (None if the method does not score them); and the ``shares`` of image, prompt and
    answer, which sum to 1."""

    explanations: tuple[Explanation, ...]
    text: Array | None = None
    shares: tuple[float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer about one photo, or about several that were shown together.

        print(answer.text, answer.table())
        answer["fork"].overlay().save("fork.png")    # the first "fork"; ["fork", 2] the second, [3] word 3
        answer.sources("fork")                       # scores of the words in prompt and answer

    Args:
        image_id: id of the photo. ``prompt`` is the question, ``text`` the answer, ``token_ids`` its
            tokens.
        words: all words, including those that were not explained.
        log_probs: (W,) the sum of log p over each word's tokens; ``lost``: (W,) how much of that sum is
            lost, in nats, when every image token is replaced by the mean token. If ``lost`` is near 0, the
            word does not need the image, even if its map looks convincing.
        tokens: M pairs (text of a token with preceding white space, whether it belongs to the prompt),
            without image tokens.
        maps: the maps of each word, by the word's number and then by method; ``answer[word]`` returns the
            map of the first method.
        notes: remarks on the maps, by method.
    """

    image_id: str
    prompt: str
    text: str
    words: tuple[Word, ...]
    token_ids: tuple[int, ...]
    log_probs: Array
    lost: Array
    tokens: tuple[tuple[str, bool], ...] = ()
    maps: Mapping[int, Mapping[str, WordMaps]] = field(default_factory=dict)
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that explained the answer, in the order in which they were requested."""
        return tuple(next(iter(self.maps.values()), {}))

    @cached_property
    def probabilities(self) -> Array:
        """(W,): exp of the mean log p over each word's tokens."""
        counts = np.array([len(word.tokens) for word in self.words], np.float32)
        return np.exp(self.log_probs / np.maximum(counts, 1)).astype(np.float32)  # type: ignore[no-any-return]

    @property
    def asked(self) -> int:
        """The number of tokens that belong to the prompt."""
        return sum(of_prompt for _, of_prompt in self.tokens)

    @property
    def explanations(self) -> list[Explanation]:
        """All maps: word by word, method by method, photo by photo."""
        return [e for of in self.maps.values() for maps in of.values() for e in maps.explanations]

    @property
    def by_photo(self) -> dict[str, list[Explanation]]:
        """All maps, by the id of the photo or of the frame."""
        found: dict[str, list[Explanation]] = {}
        for one in self.explanations:
            found.setdefault(one.image_id, []).append(one)
        return found

    def of(self, word: Any, method: str | None = None) -> WordMaps:
        """The result of a method for a word; by default of the first method.

        Args:
            word: its number, its text, or (text, 2) for the second word with that text.

        Raises:
            ValueError: there is no such word or method, or the word was not explained.
        """
        number = word_number(self.words, word)
        if number not in self.maps:
            known = ", ".join(self.words[i].text for i in self.maps)
            raise ValueError(
                f"words: {self.words[number].text!r} was not explained; explained: {known or 'none'}"
            )
        name = method or self.methods[0]
        if name not in self.maps[number]:
            raise ValueError(f"method: got {method!r}; explained by: {', '.join(self.methods)}")
        return self.maps[number][name]

    def __getitem__(self, word: Any) -> Explanation:
        """The map of a word, from the first method and on the first photo; see :meth:`of`."""
        return self.of(word).explanations[0]

    def sources(self, word: Any, method: str | None = None) -> list[tuple[str, float]]:
        """(token, score) for each token of the prompt and for each token of the answer that precedes the
        word, in order.

        Raises:
            ValueError: as in :meth:`of`, and if the method scores only image tokens.
        """
        maps = self.of(word, method)
        if maps.text is None:
            raise ValueError(
                f"method: {method or self.methods[0]} scores only image tokens; 'attention' also "
                f"scores words"
            )
        answer = self.words[word_number(self.words, word)].tokens[0]
        count = self.asked + answer
        return [(self.tokens[i][0], float(maps.text[i])) for i in range(count)]

    def table(self) -> str:
        """One line per word: its probability, the nats that it loses without the image, and how the first
        method's scores are divided between image, prompt and answer."""
        lines = [f"{'word':16} {'p':>6} {'lost':>7}  {'image':>6} {'prompt':>6} {'answer':>6}"]
        for i, word in enumerate(self.words):
            maps = next(iter(self.maps.get(i, {}).values()), None)
            parts = maps.shares if maps and maps.shares else None
            shown = "".join(f" {part:6.1%}" for part in parts) if parts else ""
            lines.append(
                f"{word.text[:16]:16} {self.probabilities[i]:6.3f} {self.lost[i]:7.2f} {shown}".rstrip()
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Answer({self.image_id!r}, {self.text!r}, {len(self.words)} words)"

    def _repr_html_(self) -> str | None:
        from xattn.pictures import notebook

        return notebook.grid_html(self.explanations) if self.maps else None


class Answers(list[Answer]):
    """Answers, one per photo; ``skipped`` lists (file name, reason) of photos that were left out, and
    ``total`` is the number of answers, even if not all are kept."""

    def __init__(self, items: Iterable[Answer] = ()) -> None:
        super().__init__(items)
        self.total = len(self)
        self.skipped: list[tuple[str, str]] = []

    def add(self, answer: Answer, keep: int | None = None) -> None:
        """Count an answer, and keep it unless ``keep`` answers are already stored."""
        self.total += 1
        if keep is None or len(self) < keep:
            self.append(answer)
