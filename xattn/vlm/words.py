"""The words of an answer: groups of tokens, based on the tokenizer's output.

A word is a maximal run of tokens in which only the first may start with white space. Punctuation is
separate unless it joins letters or digits, as in "don't" and "3.5"; each CJK token is also separate.
Special tokens are not words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from xattn.runtime.names import did_you_mean


class PhotoError(ValueError):
    """An error that concerns one photo or its answer, not all of them."""


class Word(NamedTuple):
    """A word: its ``text``, its character ``span`` (start, end) in the answer, and its ``tokens``, numbered
    from 0 in the answer."""

    text: str
    span: tuple[int, int]
    tokens: tuple[int, ...]


def spans_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of token ids, and the character span of each token, with preceding white space; the spans of
    special tokens are empty.

    The span of a token is the text that it adds to the tokens before it, so this works for any
    tokenizer. Tokens that are parts of one character all get that character.
    """

    def decode(first: int, last: int) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(list(ids[first:last]), **options))

    special = set(tokenizer.all_special_ids)
    text, spans, waiting, start = decode(0, len(ids)), list[tuple[int, int]](), 0, 0
    context = settled = 0  # the tokens between them formed the last complete character
    for i, token in enumerate(ids):
        if token in special:
            spans.append((start, start))
            continue
        added = decode(context, i + 1)[len(decode(context, settled)) :]
        end = start
        while end - start < len(added) and added[end - start] == text[end : end + 1]:
            end += 1
        if end == start and added:  # the first bytes of a character
            waiting += 1
        spans.append((start, end))
        if end > start:
            for j in range(i - waiting, i):
                spans[j] = start, end
            context, settled = i - waiting, i + 1
            start, waiting = end, 0
    return text, spans


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with preceding white space; special tokens as they are written."""
    text, spans = spans_of(tokenizer, ids)
    return [text[a:b] or tokenizer.decode([i]) for i, (a, b) in zip(ids, spans, strict=True)]


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Word]]:
    """The text of token ids (T,), and its words.

    >>> from types import SimpleNamespace
    >>> pieces = ["A", " fork", "s", ".", " don", "'", "t"]
    >>> tokenizer = SimpleNamespace(
    ...     all_special_ids=[], decode=lambda ids, **options: "".join(pieces[i] for i in ids)
    ... )
    >>> [word.text for word in words_of(tokenizer, range(7))[1]]
    ['A', 'forks', '.', "don't"]
    """
    text, spans = spans_of(tokenizer, ids)
    groups: list[list[int]] = []
    alone = True  # whether the next token starts a word
    for i, (start, end) in enumerate(spans):
        own = text[start:end]
        if not own.strip():
            alone |= bool(own)
            continue
        if groups and spans[groups[-1][-1]] == (start, end):  # part of the same character
            groups[-1].append(i)
            continue
        apart = _stands_alone(text, start + len(own) - len(own.lstrip()), end)
        if alone or apart or own[0].isspace():
            groups.append([i])
        else:
            groups[-1].append(i)
        alone = apart or own[-1].isspace()
    words = []
    for tokens in groups:
        start, end = spans[tokens[0]][0], spans[tokens[-1]][1]
        inner = text[start:end]
        start += len(inner) - len(inner.lstrip())
        words.append(Word(inner.strip(), (start, start + len(inner.strip())), tuple(tokens)))
    return text, words


def _stands_alone(text: str, start: int, end: int) -> bool:
    own = text[start:end].rstrip()
    if any(unicodedata.name(c, "").startswith(("CJK", "HIRAGANA", "KATAKANA")) for c in own):
        return True
    if any(map(_in_word, own)):
        return False
    before, after = text[start - 1 : start], text[end : end + 1]
    return not (before and after and _in_word(before) and _in_word(after))


def _in_word(character: str) -> bool:
    """Whether it is a letter, a combining mark, or a digit."""
    return unicodedata.category(character)[0] in "LMN"


def word_number(words: Sequence[Word], key: Any, argument: str = "words") -> int:
    """The number of the word that ``key`` names, by its number (a negative one counts from the end), by its
    spelling (the first such word) or by a pair such as ("fork", 2), the second such word.

    Raises:
        ValueError: there is no such word.
    """
    if isinstance(key, int) and not isinstance(key, bool):
        if -len(words) <= key < len(words):
            return key % len(words)
        raise PhotoError(f"{argument}: got {key}; the answer has words 0 to {len(words) - 1}")
    name, count = key if isinstance(key, tuple) else (key, 1)
    found = [i for i, word in enumerate(words) if word.text == name]
    found = found or [i for i, word in enumerate(words) if word.text.lower() == str(name).lower()]
    if not found:
        known = list(dict.fromkeys(word.text for word in words))
        near = did_you_mean(str(name), known, f"its words: {', '.join(known) or 'none'}")
        raise PhotoError(f"{argument}: {name!r} is not in the answer; {near}")
    if not 1 <= count <= len(found):
        raise PhotoError(f"{argument}: {name!r} is {len(found)} times in the answer; got {count}")
    return found[count - 1]
