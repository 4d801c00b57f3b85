"""SHRP on sentences: a text encoder with routed heads, pruned to one head a layer.

    python -m xattn.eval.studies single-heads FOLDER

FOLDER holds ``train.txt`` and ``dev.txt``, with trees as in :mod:`~xattn.eval.studies.sst`.
Encoders of the same width and depth learn whether a phrase is positive; the sentences of
``dev.txt`` are the test. The blocks are :class:`~xattn.blocks.shrp.ShrpBlock`, in which experts are
heads and share one MLP. At first all heads are mixed; then only the router's best head runs, with a
penalty on the entropy of usage; at the end each layer keeps its most used head. Rows for
comparison: the transformer that SHRP is meant to replace; that transformer pruned by magnitude to
the same size, with and without one more epoch; other heads of the same routed encoder; the small
encoder trained alone; and an encoder without layers.

The texts of a batch have the same length, so nothing is padded.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.utils import prune

from xattn.attention.record import record
from xattn.blocks.shrp import ShrpBlock
from xattn.blocks.transformer import TransformerBlock
from xattn.eval.bootstrap import Interval, t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies import sst
from xattn.eval.studies.attention_text import Vocabulary
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize, single_thread
from xattn.runtime.files import file_sha256

LONGEST = 64  # words with a learned position
ROUNDS = 15  # of timing, each with all encoders in turn
TIMED = (64, 24)  # sentences, and words of each, in the batch that is timed
DRAWS = 5  # draws of random heads


@dataclass(frozen=True)
class SingleHeadsConfig:
    """Settings of the encoders and their training."""

    seeds: int = 5
    dim: int = 32
    depth: int = 2
    heads: int = 4
    hidden: int = 48  # Width m of SHRP's shared MLP; the transformer's has width 4 dim.
    phrases: int = 3_000  # Phrases drawn from the trees, in addition to all sentences.
    epochs: int = 5
    tokens: int = 1_024  # Most tokens in a batch.
    lr: float = 4e-3
    weight_decay: float = 0.05
    dropout: float = 0.3  # Dropout of the embeddings.
    penalty: float = 0.3  # Weight of the entropy of usage, once single heads are chosen.
    mixed: float = 0.5  # Share of training in which all heads are mixed.

    def quick(self) -> SingleHeadsConfig:
        """One short training of each, to check that everything runs; its figures mean nothing."""
        return replace(self, seeds=2, dim=16, hidden=24, phrases=200, epochs=1)


DEFAULTS = SingleHeadsConfig()


class Texts(NamedTuple):
    """``words`` (T_i,), as indices, and ``labels``; a split knows each text by its ``texts``."""

    texts: list[tuple[str, ...]]
    words: list[Tensor]
    labels: Tensor


class Corpus(NamedTuple):
    """Training sentences, training phrases, test sentences, and the number of words."""

    sentences: Texts
    phrases: Texts
    tests: Texts
    vocabulary: int


@cache
def load_corpus(data: Path) -> Corpus:
    """The sentiment trees in ``data``; phrases have 2 words or more and are no test sentences."""
    learned, tested = (sst.read(data / f"{name}.txt") for name in ("train", "dev"))
    vocabulary = Vocabulary(sentence.words for sentence in learned)
    tests = {_lower(s.words): s.label for s in tested}
    sentences = {_lower(s.words): s.label for s in learned if _lower(s.words) not in tests}
    phrases: dict[tuple[str, ...], int] = {}
    for line in (data / "train.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        words, found = sst.parse(line)
        for first, last, label in found:
            text = _lower(words[first:last])
            if label != 2 and len(text) > 1 and text not in tests and text not in sentences:
                phrases.setdefault(text, int(label > 2))
    seen, beside, tested_on = (_texts(part, vocabulary) for part in (sentences, phrases, tests))
    return Corpus(seen, beside, tested_on, len(vocabulary))


def _lower(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(word.lower() for word in words[:LONGEST])


def _texts(labels: Mapping[tuple[str, ...], int], vocabulary: Vocabulary) -> Texts:
    words = [vocabulary.encode(text) for text in labels]
    return Texts(list(labels), words, torch.tensor(list(labels.values())))


def batches(lengths: Tensor, tokens: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Batches of text numbers, in random order if there is a generator.

    The texts of a batch have the same length, and together at most ``tokens`` words unless it is
    one text.
    """
    found: list[Tensor] = []
    for length in lengths.unique().tolist():
        numbers = (lengths == length).nonzero()[:, 0]
        if generator is not None:
            numbers = numbers[torch.randperm(len(numbers), generator=generator)]
        found += numbers.split(max(1, tokens // length))
    if generator is None:
        return found
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


class TextEncoder(nn.Module):
    """Words (B, T) to logits (B, 2), read from a class token, or the mean if without blocks."""

    def __init__(
        self, vocabulary: int, dim: int, blocks: Sequence[nn.Module], dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(LONGEST, dim))
        self.first = nn.Parameter(0.02 * torch.randn(dim))
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.dropout = nn.Dropout(dropout)
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.classifier = nn.Linear(dim, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.dropout(self.embedding(words)) + self.positions[: words.shape[1]]
        if not len(self.blocks):
            return self.classifier(self.norm(x).mean(1))
        x = torch.cat([self.first.expand(len(x), 1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x[:, 0]))


def encoder(
    config: SingleHeadsConfig, vocabulary: int, kind: str, depth: int | None = None
) -> TextEncoder:
    """An encoder of ``kind`` "transformer", "routed", or "single" (with one head)."""
    made: list[nn.Module] = []
    for _ in range(config.depth if depth is None else depth):
        if kind == "transformer":
            made.append(TransformerBlock(config.dim, num_heads=config.heads))
        elif kind == "routed":
            made.append(ShrpBlock(config.dim, config.heads, hidden=config.hidden))
        else:
            head_dim = config.dim // config.heads
            made.append(ShrpBlock(config.dim, 1, head_dim, config.hidden))
    return TextEncoder(vocabulary, config.dim, made, config.dropout)


# ---------------------------------------------------------------------- training and tests


def train(
    net: TextEncoder,
    corpus: Corpus,
    config: SingleHeadsConfig,
    split: Split,
    seed: int,
    penalty: float = 0.0,
) -> float:
    """Train ``net`` on all sentences and ``config.phrases`` phrases, and return the CPU seconds."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(corpus.phrases.texts), generator=generator)[
        : config.phrases
    ].tolist()
    split.fit(corpus.sentences.texts)
    split.fit([corpus.phrases.texts[i] for i in drawn])
    words = corpus.sentences.words + [corpus.phrases.words[i] for i in drawn]
    labels = torch.cat([corpus.sentences.labels, corpus.phrases.labels[drawn]])
    lengths = torch.tensor([len(text) for text in words])
    epochs = [batches(lengths, config.tokens, generator) for _ in range(config.epochs)]
    steps = sum(map(len, epochs))
    routed = [b for b in net.blocks if isinstance(b, ShrpBlock) and b.heads > 1]

    def losses() -> Iterator[Tensor]:
        for step, numbers in enumerate(batch for epoch in epochs for batch in epoch):
            mixed = step < config.mixed * steps
            for block in routed:
                block.routing = "soft" if mixed else "top1"
            batch = torch.stack([words[i] for i in numbers.tolist()])
            if not routed or mixed or not penalty:
                yield F.cross_entropy(net(batch), labels[numbers])
                continue
            with record(alone=True) as calls:
                logits = net(batch)
            entropy = sum(call.aux["usage_entropy"] for call in calls)
            yield F.cross_entropy(logits, labels[numbers]) + penalty * entropy

    return minimize(net, losses(), steps, config.lr, config.weight_decay)


@torch.no_grad()
def accuracy(net: nn.Module, corpus: Corpus, split: Split) -> float:
    """The share of test sentences that ``net`` classifies correctly."""
    tests = corpus.tests
    split.score(tests.texts)
    count = 0
    for numbers in batches(torch.tensor([len(text) for text in tests.words]), 4_096):
        words = torch.stack([tests.words[i] for i in numbers.tolist()])
        count += int((net(words).argmax(1) == tests.labels[numbers]).sum())
    return count / len(tests.texts)


# ---------------------------------------------------------------------- pruning


def single(net: TextEncoder, kept: Sequence[int | None]) -> TextEncoder:
    """A copy of a routed encoder: layer i keeps only head ``kept[i]``, the most used if None."""
    made = copy.deepcopy(net)
    for i, head in enumerate(kept):
        made.blocks[i] = net.blocks[i].pruned(head)  # type: ignore[operator]
    return made


def largest_head(block: ShrpBlock) -> int:
    """The head with the largest norm of W_Q, W_K and W_V."""
    weight = block.qkv.weight.detach().unflatten(0, (3, block.heads, block.head_dim))
    return int(weight.square().sum((0, 2, 3)).argmax())


def prune_by_magnitude(net: TextEncoder, heads: int, units: int) -> TextEncoder:
    """A copy of a transformer pruned to ``heads`` heads and ``units`` MLP units per layer.

    It keeps those with the largest product of the norms of their input and output weights; the
    others stay 0 in further training.
    """
    made = copy.deepcopy(net)
    for block in made.blocks:
        value = block.attn.qkv.weight.detach().chunk(3)[2]
        out = block.attn.proj.weight
        count = block.attn.num_heads
        size = _norms(value.unflatten(0, (count, -1)), (1, 2)) * _norms(
            out.unflatten(1, (count, -1)), (0, 2)
        )
        _keep(block.attn.proj, size, heads, out.shape[1] // count)
        size = _norms(block.mlp.fc1.weight, (1,)) * _norms(block.mlp.fc2.weight, (0,))
        _keep(block.mlp.fc2, size, units, 1)
    return made


def _norms(weight: Tensor, over: tuple[int, ...]) -> Tensor:
    return weight.detach().square().sum(over).sqrt()


def _keep(layer: nn.Module, size: Tensor, count: int, width: int) -> None:
    """Zero all inputs of ``layer`` but the ``count`` largest groups of ``width`` inputs."""
    kept = torch.zeros(len(size)).index_fill(0, size.topk(count).indices, 1.0)
    mask = kept.repeat_interleave(width).expand_as(layer.weight)  # type: ignore[arg-type]
    prune.custom_from_mask(layer, "weight", mask)  # type: ignore[no-untyped-call]


def size_of(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in module.parameters())


def units_for(config: SingleHeadsConfig, parameters: int) -> int:
    """The most MLP units with which a one-head transformer block has at most ``parameters``."""
    return max(1, (parameters - size_with(config, 0)) // (2 * config.dim + 1))


def size_with(config: SingleHeadsConfig, units: int) -> int:
    """Parameters of a transformer block with one head (dim / heads wide) and ``units`` in its MLP."""
    dim, head = config.dim, config.dim // config.heads
    attention = 3 * (dim + 1) * head + (head + 1) * dim
    return attention + units * (2 * dim + 1) + dim + 4 * dim  # the MLP's last bias, two norms


# ---------------------------------------------------------------------- what is measured


def measure_transformer(
    config: SingleHeadsConfig, corpus: Corpus, split: Split, seed: int
) -> dict[str, Any]:
    """Test a transformer, then pruned by magnitude to SHRP's size, then after one more epoch."""
    net = encoder(config, corpus.vocabulary, "transformer")
    seconds = train(net, corpus, config, split, seed)
    budget = size_of(encoder(config, 1, "single").blocks[0])
    units = units_for(config, budget)
    small = prune_by_magnitude(net, 1, units)
    found = {"right": accuracy(net, corpus, split), "magnitude": accuracy(small, corpus, split)}
    more = replace(config, epochs=1, lr=config.lr / 4)
    again = train(small, corpus, more, split, seed + 1_000)
    found |= {"magnitude_tuned": accuracy(small, corpus, split), "seconds_tuned": again}
    found["blocks_magnitude"] = config.depth * size_with(config, units)
    return {**found, "blocks": size_of(net.blocks), "whole": size_of(net), "seconds": seconds}


def measure_routed(
    config: SingleHeadsConfig, corpus: Corpus, penalty: float, split: Split, seed: int
) -> dict[str, Any]:
    """Test SHRP before pruning, and pruned to the most used, the largest and random heads."""
    net = encoder(config, corpus.vocabulary, "routed")
    seconds = train(net, corpus, config, split, seed, penalty)
    blocks = [block for block in net.blocks if isinstance(block, ShrpBlock)]
    most = single(net, [None] * len(blocks))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(config.heads, (DRAWS, len(blocks)), generator=generator).tolist()
    random = [accuracy(single(net, heads), corpus, split) for heads in drawn]
    return {
        "right": accuracy(net, corpus, split),
        "pruned": accuracy(most, corpus, split),
        "largest": accuracy(single(net, [largest_head(b) for b in blocks]), corpus, split),
        "random": statistics.fmean(random),
        "usage": statistics.fmean(float(block.usage.max()) for block in blocks),
        "blocks": size_of(net.blocks),
        "blocks_pruned": size_of(most.blocks),
        "whole_pruned": size_of(most),
        "seconds": seconds,
    }


def measure_alone(
    config: SingleHeadsConfig, corpus: Corpus, depth: int, split: Split, seed: int
) -> dict[str, Any]:
    """Train the small encoder of ``depth`` layers alone, and test it."""
    net = encoder(config, corpus.vocabulary, "single", depth)
    seconds = train(net, corpus, config, split, seed)
    return {
        "right": accuracy(net, corpus, split),
        "blocks": size_of(net.blocks),
        "whole": size_of(net),
        "seconds": seconds,
    }


@torch.no_grad()
def measure_times(
    config: SingleHeadsConfig, corpus: Corpus, split: Split, seed: int
) -> dict[str, Any]:
    """Time one batch, in median milliseconds; every round runs all encoders in turn."""
    routed = encoder(config, corpus.vocabulary, "routed").eval()
    nets = {
        "transformer": encoder(config, corpus.vocabulary, "transformer").eval(),
        "routed": routed,
        "single": single(routed, [None] * config.depth),
        "all heads": copy.deepcopy(routed),
    }
    for block in nets["all heads"].blocks:
        block.routing = "soft"  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    words = split.score(torch.randint(corpus.vocabulary, TIMED, generator=generator))
    rounds: dict[str, list[float]] = {name: [] for name in nets}
    with single_thread():
        for number in range(ROUNDS + 2):
            for name, net in nets.items():
                start = time.process_time()
                net(words)
                if number > 1:  # after two warm-up rounds
                    rounds[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in rounds.items()}


# ---------------------------------------------------------------------- the study


def study(
    data: tyro.conf.Positional[Path],
    output: OutputAt = "runs/study-single-heads",
    config: SingleHeadsConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and test the encoders that are not finished yet, write report.md and values.csv, and
    yield the report's lines.

    Args:
        data: a folder with train.txt and dev.txt of the Stanford Sentiment Treebank.
    """
    config = config.quick() if quick else config
    output, corpus = Path(output), load_corpus(Path(data))
    rows = {
        "transformer": partial(measure_transformer, config, corpus),
        "shrp": partial(measure_routed, config, corpus, config.penalty),
        "shrp-no-penalty": partial(measure_routed, config, corpus, 0.0),
        "alone": partial(measure_alone, config, corpus, config.depth),
        "no-layers": partial(measure_alone, config, corpus, 0),
        "times": partial(measure_times, config, corpus),
    }
    settings: dict[str, Any] = {k: v for k, v in asdict(config).items() if k != "seeds"}
    settings["data"] = [file_sha256(Path(data) / f"{name}.txt") for name in ("train", "dev")]
    found = measure_rows(output, settings, rows, config.seeds)
    lines = [*report(found, config, corpus)]
    yield from reported(output, lines, {"values": raw_rows(found)})


# ---------------------------------------------------------------------- report

ACCURACIES = (
    ("transformer", "right", "transformer"),
    ("shrp", "right", "SHRP, routed"),
    ("shrp", "pruned", "SHRP, the most used heads"),
    ("shrp", "largest", "SHRP, the heads with the largest weights"),
    ("shrp", "random", "SHRP, random heads"),
    ("shrp-no-penalty", "right", "SHRP without penalty, routed"),
    ("shrp-no-penalty", "pruned", "SHRP without penalty, the most used heads"),
    ("shrp-no-penalty", "largest", "SHRP without penalty, the heads with the largest weights"),
    ("shrp-no-penalty", "random", "SHRP without penalty, random heads"),
    ("transformer", "magnitude", "transformer, pruned by magnitude"),
    ("transformer", "magnitude_tuned", "transformer, pruned by magnitude, an epoch more"),
    ("alone", "right", "one head a layer, trained alone"),
    ("no-layers", "right", "no layers"),
)
"""The row, the key of its measurement, and its title in the table."""
PAIRS = (
    ("shrp", "random", "pruned", "SHRP, random heads | the most used heads"),
    (
        "shrp-no-penalty",
        "random",
        "pruned",
        "SHRP without penalty, random heads | the most used heads",
    ),
    ("shrp-no-penalty", "pruned", "right", "SHRP without penalty, the most used heads | routed"),
)
"""The row, two measurements of the same encoder, and their titles: the first minus the second."""
TIMES = {
    "transformer": "transformer",
    "all heads": "SHRP, all heads mixed",
    "routed": "SHRP, routed",
    "single": "SHRP, one head a layer",
}


def report(found: Found, config: SingleHeadsConfig, corpus: Corpus) -> Iterator[str]:
    """Lines of the tables: accuracy with parameters, and times."""
    learned = len(corpus.sentences.texts) + min(config.phrases, len(corpus.phrases.texts))
    yield (
        f"{learned:,} sentences and phrases to train on, {len(corpus.tests.texts)} sentences to test; "
        f"{config.seeds} seeds; 95 % t intervals"
    )
    yield "\n| encoder | correct, % | minus transformer | parameters of the layers | share | of the whole |"
    yield "| :-- | --: | --: | --: | --: | --: |"
    full, whole = (found["transformer"][0][key] for key in ("blocks", "whole"))
    rest = whole - full  # embeddings, the last norm and the classifier
    for row, key, title in ACCURACIES:
        values = [run[key] for run in found[row]]
        less = t_interval(
            [100 * (a - run["right"]) for a, run in zip(values, found["transformer"], strict=True)]
        )
        blocks = _parameters(found, row, key)
        cells = [title, t_interval([100 * v for v in values]).text(1), _signed(less)]
        cells += [f"{blocks:,}", f"{blocks / full:.2f}", f"{(blocks + rest) / whole:.2f}"]
        yield f"| {' | '.join(cells)} |"
    yield "\n| heads | minus, in the same encoder | correct, points |"
    yield "| :-- | :-- | --: |"
    for row, first, second, title in PAIRS:
        less = t_interval([100 * (run[first] - run[second]) for run in found[row]])
        yield f"| {title} | {_signed(less)} |"
    yield "\nUsage of the kept head, mean over layers: " + "; ".join(
        f"{name} {t_interval([run['usage'] for run in found[name]]).text(2)}"
        for name in ("shrp", "shrp-no-penalty")
    )
    yield f"\n| {TIMED[0]} sentences of {TIMED[1]} words | CPU milliseconds | over the transformer's |"
    yield "| :-- | --: | --: |"
    for key, title in TIMES.items():
        milliseconds = t_interval([run[key] for run in found["times"]])
        ratio = t_interval([run[key] / run["transformer"] for run in found["times"]])
        yield f"| {title} | {milliseconds.text(2)} | {ratio.text(2)} |"
    ratio = t_interval([run["all heads"] / run["single"] for run in found["times"]])
    yield f"\nOne head a layer is {ratio.text(2)} times as fast as all {config.heads} mixed."
    seconds = sum(
        v for runs in found.values() for run in runs for k, v in run.items() if "seconds" in k
    )
    yield f"\n{seconds:.0f} CPU seconds of training in all."


def _parameters(found: Found, row: str, key: str) -> int:
    """The parameters of the blocks, without those that are pruned."""
    run = found[row][0]
    if key.startswith("magnitude"):
        return int(run["blocks_magnitude"])
    return int(run["blocks"] if key == "right" else run["blocks_pruned"])


def _signed(value: Interval) -> str:
    return f"{value.mean:+.1f} [{value.lo:+.1f}, {value.hi:+.1f}]"
