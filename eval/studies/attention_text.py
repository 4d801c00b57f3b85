"""Attention training on text, as published: a BiLSTM with attention on SST (arXiv 2009.12064).

    python -m xattn.eval.studies at FOLDER

FOLDER contains ``train.txt`` and ``dev.txt``, trees in the format of :mod:`~xattn.eval.studies.sst`. Every
tenth sentence of ``train.txt`` is held out to choose the epoch of each run, and the epsilon and weight
of each method, by AUC or F1. Only the chosen settings are reported on ``dev.txt``. Each finished run is
a line of ``runs.jsonl`` in the output folder; the same command with the same files resumes from there.

A BiLSTM with additive or dot-product attention for sentences (arXiv 2009.12064, section 3).

    h_t = BiLSTM(e(x))_t,   s_t = v . tanh(W h_t + b)   or   s_t = w . h_t / sqrt(2u)
    logits = O sum_t softmax(s)_t h_t + c

u is the width of one direction. The encoder is separate from the attention, so a regulariser that
perturbs the scores s only repeats :meth:`TextClassifier.classify`, not the BiLSTM.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from xattn.config import AttentionTraining
from xattn.correlation import pearson
from xattn.eval.evaluation.split import Split
from xattn.eval.studies import sst
from xattn.eval.studies.run_files import kept_record
from xattn.runtime import strict_json
from xattn.runtime.files import atomic_file, check_folder, file_sha256
from xattn.training.attention_training import create_perturbation, masked_softmax
from xattn.training.run_folder import lock_folder

PAD, UNKNOWN = 0, 1
SPREAD = 0.3  # spread of random word vectors; with 0.1, attention stays nearly uniform for epochs


class Encoded(NamedTuple):
    """``scores`` (B, T) before the softmax, ``hidden`` (B, T, 2u), ``mask`` (B, T) true at words,
    ``embedded`` (B, T, E)."""

    scores: Tensor
    hidden: Tensor
    mask: Tensor
    embedded: Tensor


class TextClassifier(nn.Module):
    """``model(words) -> logits`` for padded sentences; ``encode`` and ``classify`` are its two halves.

    Args:
        vocabulary: the number of word indices; 0 is padding, and 1 stands for unknown words.
        attention: ``"additive"`` or ``"dot"``.
        width: u; embeddings are ``embedding`` wide and trained.
        vectors: initial embeddings (vocabulary, embedding); by default drawn from N(0, 0.3^2).
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int = 2,
        attention: str = "additive",
        embedding: int = 300,
        width: int = 128,
        vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
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
        """Scores and hidden states of sentences (B, T), padded with 0 on the right."""
        mask = words != PAD
        lengths = mask.sum(1, keepdim=True)
        embedded = self.embedding(words)
        # Reversed by hand, because a packed sequence takes nearly twice as long on a CPU.
        positions = torch.arange(words.shape[1], device=words.device)
        order = (lengths - 1 - positions).clamp_min(0)
        ahead, back = self.ahead(embedded)[0], self.back(_reordered(embedded, order))[0]
        hidden = torch.cat([ahead, _reordered(back, order)], -1)
        return Encoded(self.scale * self.attention(hidden)[..., 0], hidden, mask, embedded)

    def classify(self, encoded: Encoded, scores: Tensor | None = None) -> Tensor:
        """The logits (B, K); ``scores`` (B, T) replace the encoder's own."""
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
        sentences: the sentences to learn from.
        minimum: words that occur fewer times count as unknown.
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
        """The word indices (T,) of a sentence."""
        return torch.tensor([self.index.get(word.lower(), UNKNOWN) for word in sentence])

    def vectors(self, path: str | Path, generator: torch.Generator) -> Tensor:
        """(len, E) from a text file with a word and E numbers per line, as fastText writes it; words that
        are not in the file are drawn from N(0, 0.3^2).
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
    """``x`` (B, T, E) at the positions ``order`` (B, T)."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def pad(sentences: Sequence[Tensor]) -> Tensor:
    """Sentences (T_i,) -> (B, T), padded on the right."""
    return pad_sequence(list(sentences), batch_first=True, padding_value=PAD)


Attention = Literal["additive", "dot"]


@dataclass(frozen=True)
class TextStudyConfig:
    """Which models are trained, and how often."""

    methods: tuple[AttentionTraining, ...] = ("none", "random", "at", "iat", "iat_released")
    """Training methods; the others are compared with none, which is the vanilla model."""
    attention: tuple[Attention, ...] = ("additive",)
    """Scores v . tanh(W h + b), or w . h / sqrt(width of h)."""
    seeds: int = 10  # Runs of each method with its chosen epsilon and weight: seeds 0, 1, ...
    epsilons: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)  # Norms of the perturbation to choose from.
    weights: tuple[float, ...] = (0.5, 1.0)
    """Weights to choose from, of the loss at the perturbed scores relative to the clean loss."""
    grid_seeds: int = 2  # Runs of each epsilon and weight for the choice.
    monitor: Literal["auc", "f1"] = "auc"
    """The held-out score by which the epoch, epsilon and weight are chosen."""
    epochs: int = 8
    """The largest number of passes over the training sentences; the held-out tenth chooses the best."""
    patience: int = 2  # Stop after this many epochs without improvement; 0 trains all epochs.
    batch_size: int = 32  # Sentences per step.
    lr: float = 1e-3  # Learning rate of Adam with AMSGrad.
    embedding: int = 100  # Width of the word vectors, which are trained.
    width: int = 64  # Hidden units of the BiLSTM in each direction.
    vectors: Path | None = None
    """Initial word vectors: a text file in the format of fastText or GloVe; random ones by default."""


RUNS, SETTINGS = "runs.jsonl", "settings.json"
TRAIN, DEV = "train.txt", "dev.txt"
HELD_OUT = 10
AMOUNTS = ("correlation", "product", "auprc", "precision", "entropy")  # one value per sentence


class Setting(NamedTuple):
    """The norm of the perturbation of the scores, and the weight of the loss at the perturbed scores."""

    epsilon: float
    weight: float


CLEAN = Setting(0.0, 0.0)  # the setting of ``none``


class Run(NamedTuple):
    """One training run; ``epsilon`` and ``weight`` are 0 for ``none``."""

    attention: str
    method: str
    epsilon: float
    weight: float
    seed: int

    @property
    def setting(self) -> Setting:
        return Setting(self.epsilon, self.weight)


class Texts(NamedTuple):
    """The three parts of the data, and the words of the training part."""

    train: list[sst.Sentence]
    held: list[sst.Sentence]
    dev: list[sst.Sentence]
    vocabulary: Vocabulary
    vectors: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """A model's scores on some sentences: ``f1``, ``accuracy`` and ``auc``.

    Per sentence (n,) there are ``correct``, ``correlation`` and ``product`` of attention with two kinds of
    importance (see :func:`measure`), ``auprc`` and ``precision`` of attention against the rationale (NaN if
    there is none), and the ``entropy`` of attention divided by log T."""

    f1: float
    accuracy: float
    auc: float
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def load(folder: Path, config: TextStudyConfig) -> Texts:
    """Read the trees in ``folder``."""
    missing = [name for name in (TRAIN, DEV) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"data: {folder} lacks {' and '.join(missing)}; give a folder with the sentiment trees "
            f"{TRAIN} and {DEV}"
        )
    every = sst.read(folder / TRAIN)
    train = [s for i, s in enumerate(every) if i % HELD_OUT]
    vocabulary = Vocabulary(s.words for s in train)
    vectors = None
    if config.vectors is not None:
        vectors = vocabulary.vectors(config.vectors, torch.Generator().manual_seed(0))
    return Texts(train, every[::HELD_OUT], sst.read(folder / DEV), vocabulary, vectors)


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Batches of sentences of similar length, in an order that is a function of (seed, epoch)."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + epoch) % 2**64)
    keys = torch.tensor(lengths) + 2 * torch.rand(len(lengths), generator=generator)
    parts = keys.argsort().split(size)
    for part in torch.randperm(len(parts), generator=generator).tolist():
        yield parts[part].tolist()


def train(
    run: Run, texts: Texts, config: TextStudyConfig, device: str = "cpu"
) -> tuple[TextClassifier, list[float]]:
    """The model from the epoch with the best ``config.monitor`` on the held-out sentences, and that score
    by epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        width = config.embedding if texts.vectors is None else texts.vectors.shape[1]
        model = TextClassifier(
            len(texts.vocabulary), 2, run.attention, width, config.width, texts.vectors
        ).to(device)
    options = {} if run.method == "none" else run.setting._asdict()
    perturbation = create_perturbation(run.method, seed=run.seed, **options)
    attention = list(model.attention.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("attention.")]
    groups: list[dict[str, Any]] = [
        {"params": rest, "weight_decay": 1e-5},
        {"params": attention, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.Adam(groups, config.lr, amsgrad=True, fused=True)
    words = [texts.vocabulary.encode(s.words) for s in texts.train]
    labels = torch.tensor([s.label for s in texts.train])
    history: list[float] = []
    best, best_epoch = model.state_dict(), 0
    for epoch in range(config.epochs):
        lengths = [len(w) for w in words]
        for index in batches(lengths, config.batch_size, run.seed, epoch):
            encoded = model.encode(pad([words[i] for i in index]).to(device))

            def predict(scores: Tensor, encoded: Any = encoded) -> Tensor:
                return model.classify(encoded, scores)

            target = labels[index].to(device)
            loss = perturbation.loss(encoded.scores, predict, target, encoded.mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(_monitored(model, texts, config, device))
        if epoch == 0 or history[-1] > history[best_epoch]:
            best, best_epoch = copy.deepcopy(model.state_dict()), epoch
        elif config.patience and epoch - best_epoch >= config.patience:
            break
    model.load_state_dict(best)
    return model, history


def measure(
    model: TextClassifier,
    sentences: Sequence[sst.Sentence],
    vocabulary: Vocabulary,
    device: str = "cpu",
) -> Scores:
    """Scores of ``model``. Attention is correlated with two kinds of word importance, where L is the
    cross-entropy of the label and e_t the vector of the word:

        correlation   |dL/de_t|, the norm, of the whole model
        product       |dL/de_t . e_t|, of the model with attention held fixed
    """
    values = {name: np.full(len(sentences), np.nan) for name in ("correct", *AMOUNTS)}
    margins = np.zeros(len(sentences))
    labels = np.array([s.label for s in sentences])
    for index, words in _padded(sentences, vocabulary, device):
        encoded = model.encode(words)
        logits = model.classify(encoded)
        target = torch.from_numpy(labels[index]).to(device)
        fixed = model.classify(encoded, encoded.scores.detach())
        whole, through = (
            torch.autograd.grad(
                F.cross_entropy(outputs, target, reduction="sum"),
                encoded.embedded,
                retain_graph=True,
            )[0]
            for outputs in (logits, fixed)
        )
        importance = {
            "correlation": whole.norm(dim=-1).double(),
            "product": (through * encoded.embedded.detach()).sum(-1).abs().double(),
        }
        attention = model.weights(encoded).detach().double()
        weights = attention.cpu().numpy()
        margins[index] = (logits[:, 1] - logits[:, 0]).detach().cpu().numpy()
        for row, i in enumerate(index):
            count = len(sentences[i].words)
            a, rationale = weights[row, :count], sentences[i].rationale
            for name, amount in importance.items():
                found = pearson(attention[row : row + 1, :count], amount[row : row + 1, :count])
                values[name][i] = float(found)
            values["auprc"][i] = average_precision(a, rationale)
            values["precision"][i] = top_precision(a, rationale)
            if count > 1:
                values["entropy"][i] = -(a * np.log(a.clip(1e-300))).sum() / np.log(count)
    predicted = margins > 0
    values["correct"] = (predicted == labels).astype(float)
    return Scores(
        f1(predicted, labels), float(values["correct"].mean()), auc(margins, labels), values
    )


@torch.no_grad()
def _monitored(model: TextClassifier, texts: Texts, config: TextStudyConfig, device: str) -> float:
    margins = np.zeros(len(texts.held))
    for index, words in _padded(texts.held, texts.vocabulary, device):
        logits = model(words)
        margins[index] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
    labels = np.array([s.label for s in texts.held])
    return auc(margins, labels) if config.monitor == "auc" else f1(margins > 0, labels)


def _padded(
    sentences: Sequence[sst.Sentence], vocabulary: Vocabulary, device: str, size: int = 64
) -> Iterator[tuple[list[int], Tensor]]:
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].words))
    for start in range(0, len(order), size):
        index = order[start : start + size]
        yield index, pad([vocabulary.encode(sentences[i].words) for i in index]).to(device)


def f1(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """The F1 score of class 1; 0 if no sentence is, or is predicted as, class 1."""
    hits = float(((predicted == 1) & (labels == 1)).sum())
    return 2 * hits / max(float((predicted == 1).sum() + (labels == 1).sum()), 1.0)


def auc(margins: NDArray[np.float64], labels: NDArray[Any]) -> float:
    """The share of pairs of class 1 and class 0 in which class 1 has the larger margin; ties count half.

    1/2 if a class is missing."""
    ones, zeros = margins[labels == 1], np.sort(margins[labels == 0])
    if not len(ones) or not len(zeros):
        return 0.5
    below = np.searchsorted(zeros, ones, "left") + np.searchsorted(zeros, ones, "right")
    return float(below.mean() / (2 * len(zeros)))


def average_precision(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The mean precision at the positives, by descending score; NaN if all or none are positive."""
    if positive.all() or not positive.any():
        return float("nan")
    hits = positive[np.argsort(-scores, kind="stable")]
    return float((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())


def top_precision(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The share of positives among as many top scores as there are positives; NaN if all or none are."""
    if positive.all() or not positive.any():
        return float("nan")
    return float(positive[np.argsort(-scores, kind="stable")[: positive.sum()]].mean())


class Progress:
    """The finished runs of an output folder in ``runs.jsonl``; ``settings.json`` holds what they share."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / RUNS
        kept_record(folder / SETTINGS, settings)
        self.rows: dict[Run, dict[str, Any]] = {}
        if self.path.exists():
            for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
                try:
                    row = strict_json.parse(line, nan=True)
                    self.rows[Run(*row["run"])] = row
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"output: line {number} of {self.path} is damaged ({error}); delete the line"
                    ) from None

    def add(self, run: Run, row: dict[str, Any]) -> None:
        self.rows[run] = {"run": list(run), **row}
        with atomic_file(self.path) as temporary:
            lines = [json.dumps(value) + "\n" for value in self.rows.values()]
            temporary.write_text("".join(lines), encoding="utf-8")


def grid(method: str, config: TextStudyConfig) -> list[Setting]:
    """The settings to try for a method, by increasing epsilon, then weight."""
    if method == "none":
        return [CLEAN]
    return [Setting(e, w) for e in sorted(config.epsilons) for w in sorted(config.weights)]


def choose(
    rows: dict[Run, dict[str, Any]], attention: str, method: str, config: TextStudyConfig
) -> Setting:
    """The setting with the best mean over the grid's seeds on the held-out sentences; ties go to the
    smallest epsilon."""

    def mean(setting: Setting) -> float:
        runs = (Run(attention, method, *setting, seed) for seed in range(config.grid_seeds))
        return float(np.mean([rows[run]["held"][config.monitor] for run in runs]))

    settings = grid(method, config)
    return settings[0] if len(settings) == 1 else max(settings, key=mean)


def work(config: TextStudyConfig, rows: dict[Run, dict[str, Any]]) -> Iterator[Run]:
    """All runs of the study, one kind of attention after the other. The runs after the grid depend on
    the rows of the grid."""
    for attention in config.attention:
        for seed in range(config.seeds):
            for method in config.methods:
                settings = grid(method, config)
                if seed >= config.grid_seeds:
                    settings = [choose(rows, attention, method, config)]
                for setting in settings:
                    yield Run(attention, method, *setting, seed)


def study(
    config: TextStudyConfig,
    data: Path,
    output: Path,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Progress:
    """Carry out all runs that are not yet in ``output``."""
    texts = load(data, config)
    shared = ("epochs", "patience", "batch_size", "lr", "embedding", "width", "monitor")
    settings = {k: v for k, v in asdict(config).items() if k in shared}
    settings |= {name: file_sha256(data / name) for name in (TRAIN, DEV)}
    settings["vectors"] = None if config.vectors is None else file_sha256(config.vectors)
    check_folder(output)
    with lock_folder(output):
        done = Progress(output, settings)
        _go_on(done, texts, config, device, say)
    return done


def _go_on(
    done: Progress, texts: Texts, config: TextStudyConfig, device: str, say: Callable[[str], None]
) -> None:
    split = Split("text")
    train_part, held, dev = split.fit(texts.train), split.choose(texts.held), split.score(texts.dev)
    split.write(done.path.with_name("split.json"))
    for run in work(config, done.rows):
        if run in done.rows:
            continue
        started = time.perf_counter()
        model, history = train(run, texts._replace(train=train_part, held=held), config, device)
        row = {
            part: _row(measure(model, sentences, texts.vocabulary, device))
            for part, sentences in (("held", held), ("dev", dev))
        }
        seconds = round(time.perf_counter() - started, 1)
        done.add(run, {**row, "history": history, "seconds": seconds})
        say(
            f"{run.attention} {run.method} epsilon {run.epsilon:g} weight {run.weight:g} seed "
            f"{run.seed}: held-out AUC {row['held']['auc']:.4f}, {seconds:.0f} s"
        )


def _row(scores: Scores) -> dict[str, Any]:
    values = {
        k: [None if np.isnan(x) else round(float(x), 5) for x in v]
        for k, v in scores.values.items()
    }
    return {"f1": scores.f1, "accuracy": scores.accuracy, "auc": scores.auc, **values}
