"""A BiLSTM with additive or dot-product attention for sentences (arXiv 2009.12064, section 3).

    h_t = BiLSTM(e(x))_t,   s_t = v . tanh(W h_t + b)   or   s_t = w . h_t / sqrt(2u)
    logits = O sum_t softmax(s)_t h_t + c

u is the width of one direction. The encoder stands apart from the attention: a regulariser that
perturbs the scores s repeats :meth:`TextClassifier.classify` and never the BiLSTM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xattn.training.attention_training import masked_softmax

PAD, UNKNOWN = 0, 1
SPREAD = 0.3  # of random word vectors; with 0.1 attention stays near uniform for epochs


class Encoded(NamedTuple):
    """``scores`` (B, T) before the softmax, ``hidden`` (B, T, 2u), ``mask`` (B, T) true at words,
    ``embedded`` (B, T, E)."""

    scores: Tensor
    hidden: Tensor
    mask: Tensor
    embedded: Tensor


class TextClassifier(nn.Module):
    """``model(words) -> logits`` of padded sentences; ``encode`` and ``classify`` are its two halves.

    Args:
        vocabulary: how many word indices there are; 0 pads, 1 stands for words never seen.
        attention: ``"additive"`` or ``"dot"``.
        width: u; embeddings are ``embedding`` wide and trained.
        vectors: (vocabulary, embedding) to start from; by default they are drawn from N(0, 0.3^2).
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int = 2,
        attention: Literal["additive", "dot"] = "additive",
        embedding: int = 300,
        width: int = 128,
        vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
        if attention not in ("additive", "dot"):
            raise ValueError(f"attention: got {attention!r}; choose 'additive' or 'dot'")
        if vectors is not None and vectors.shape != (vocabulary, embedding):
            raise ValueError(
                f"vectors: got shape {tuple(vectors.shape)}; give ({vocabulary}, {embedding})"
            )
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        if vectors is None:
            vectors = SPREAD * torch.randn(vocabulary, embedding)
        with torch.no_grad():
            self.embedding.weight.copy_(vectors)
            self.embedding.weight[PAD].zero_()
        self.ahead = nn.LSTM(embedding, width, batch_first=True)
        self.back = nn.LSTM(embedding, width, batch_first=True)
        self.attention = (
            nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
            if attention == "additive"
            else nn.Linear(2 * width, 1, bias=False)
        )
        self.scale = 1.0 if attention == "additive" else (2 * width) ** -0.5
        self.classifier = nn.Linear(2 * width, classes)

    def encode(self, words: Tensor) -> Encoded:
        """Scores and hidden states of sentences (B, T), padded with 0 on the right.

        Raises:
            ValueError: a sentence has no words.
        """
        mask = words != PAD
        lengths = mask.sum(1, keepdim=True)
        if bool((lengths == 0).any()):
            raise ValueError("words: a sentence is empty; leave it out of the batch")
        embedded = self.embedding(words)
        # Reversed by hand: a packed sequence takes nearly twice the time on a CPU.
        positions = torch.arange(words.shape[1], device=words.device)
        order = (lengths - 1 - positions).clamp_min(0)
        ahead, back = self.ahead(embedded)[0], self.back(_reordered(embedded, order))[0]
        hidden = torch.cat([ahead, _reordered(back, order)], -1)
        return Encoded(self.scale * self.attention(hidden)[..., 0], hidden, mask, embedded)

    def classify(self, encoded: Encoded, scores: Tensor | None = None) -> Tensor:
        """(B, K) logits; ``scores`` (B, T) take the place of the encoder's own."""
        weights = self.weights(encoded, scores)
        return self.classifier((weights[:, None] @ encoded.hidden)[:, 0])

    def weights(self, encoded: Encoded, scores: Tensor | None = None) -> Tensor:
        """Attention (B, T) over the words of each sentence."""
        return masked_softmax(encoded.scores if scores is None else scores, encoded.mask)

    def forward(self, words: Tensor) -> Tensor:
        return self.classify(self.encode(words))


class Vocabulary:
    """Words by index, in order of first appearance; lower case.

    Args:
        sentences: those that may be learned from.
        minimum: words seen fewer times count as unknown.
    """

    def __init__(self, sentences: Iterable[Sequence[str]], minimum: int = 2) -> None:
        counts: dict[str, int] = {}
        for sentence in sentences:
            for word in sentence:
                counts[word.lower()] = counts.get(word.lower(), 0) + 1
        self.words = ["<pad>", "<unknown>", *(w for w, n in counts.items() if n >= minimum)]
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentence: Sequence[str]) -> Tensor:
        """Indices (T,) of a sentence."""
        return torch.tensor([self.index.get(word.lower(), UNKNOWN) for word in sentence])

    def vectors(self, path: str | Path, generator: torch.Generator) -> Tensor:
        """(len, E) from a text file with a word and E numbers a line, as fastText writes it; words
        that the file lacks are drawn from N(0, 0.3^2).

        Raises:
            ValueError: the file holds no vectors, of different widths, or other things than numbers.
        """
        found: dict[int, Tensor] = {}
        width = 0
        with Path(path).open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines):
                word, *numbers = line.rstrip().split(" ")
                if number == 0 and len(numbers) == 1:  # fastText's header: words, width
                    continue
                if word not in self.index or self.index[word] in found:
                    continue
                if width and len(numbers) != width:
                    raise ValueError(
                        f"vectors: line {number + 1} of {path} has {len(numbers)} numbers, "
                        f"earlier ones {width}; give a text file with a word and E numbers a line"
                    )
                width = len(numbers)
                try:
                    vector = torch.tensor([float(n) for n in numbers])
                except ValueError:
                    vector = torch.tensor(torch.nan)
                if not vector.isfinite().all():
                    raise ValueError(
                        f"vectors: line {number + 1} of {path} holds something that is not a "
                        f"finite number; give a text file with a word and E numbers a line"
                    )
                found[self.index[word]] = vector
        if not found:
            raise ValueError(
                f"vectors: {path} has none of the {len(self)} words; give another file"
            )
        vectors = SPREAD * torch.randn(len(self), width, generator=generator)
        for index, vector in found.items():
            vectors[index] = vector
        return vectors


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """x (B, T, E) at the positions ``order`` (B, T)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def pad(sentences: Sequence[Tensor]) -> Tensor:
    """Sentences (T_i,) -> (B, T), padded on the right."""
    return pad_sequence(list(sentences), batch_first=True, padding_value=PAD)
