"""The passkey task: landmark attention, trained on 512 tokens, finds a word among up to 32,768.

    python -m xattn.eval.studies passkey

    ... x x MARK key x x ... x x ASK        at ASK: the symbol that came after MARK

All other tokens are random words x, which are never keys. Networks of two layers are trained on
sequences of one length and tested on longer ones. The row "landmark" has a landmark after every 50
tokens and is trained with grouped softmax (Mohtashami and Jaggi, arXiv 2305.16300). Longer
sequences are read in chunks: each layer stores the keys and values of all blocks, and a chunk reads
the k blocks with the largest weight,

    weight of block c = max_i softmax(s_ij of the chunk's own tokens, s_im of all landmarks m)_c.

Positions never exceed those of training: the k blocks that a chunk reads are placed, in their
order, right before it. While blocks are chosen, the last k landmarks keep their places, and all
older ones share the place before these. Rows for comparison: the same network with k random blocks,
or with none, and two networks without landmarks: softmax over a window or over the whole context,
and Transformer-XL (arXiv 1901.02860), in which a segment also sees the previous one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention import create_mechanism, create_rotation
from xattn.attention.inputs import Inputs
from xattn.eval.bootstrap import t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.length.network import TAPS, ShortConvolution
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize, single_thread


@dataclass(frozen=True)
class PasskeyConfig:
    """Settings of the sequences, the networks and their training."""

    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    """Lengths of the test sequences in tokens, without landmarks."""
    dense: int = 8192  # The longest test of softmax over the whole context.
    train_length: int = 512  # Tokens of a training sequence.
    block: int = 50  # Tokens before each landmark.
    selected: int = 4  # Blocks that a chunk reads from the memory.
    chunk: int = 5  # Blocks per chunk.
    symbols: int = 32  # Words that serve as keys, and as many others that serve as filler.
    width: int = 64  # Channels.
    heads: int = 2  # Attention heads.
    asks: int = 4  # Questions in a training sequence, all about the same key.
    steps: int = 160  # Training steps.
    stages: tuple[float, float] = (0.5, 0.7)
    """Up to these shares of the steps, sequences have a quarter, then half, of the full length."""
    batch_size: int = 8  # Sequences of the full training length per step.
    lr: float = 5e-3  # Peak learning rate of AdamW.
    probes: int = 16  # Sequences per test.
    seeds: int = 5  # Networks of each kind: seeds 0, 1, ...

    def quick(self) -> PasskeyConfig:
        """A few steps on short sequences to check that all works; its figures mean nothing."""
        return replace(
            self, lengths=(60, 130), dense=60, train_length=64, block=6, selected=2, chunk=3, symbols=8,
            width=16, asks=2, steps=3, batch_size=2, probes=2, seeds=2,
        )  # fmt: skip


LAYERS = 2
AT_ONCE = 8  # probes in one pass
TEST_SEED = 1_000_000


class Sequences(NamedTuple):
    """``tokens`` (B, N); positions ``asked`` about (B, Q); ``keys`` (B,), as integers from 0."""

    tokens: Tensor
    asked: Tensor
    keys: Tensor


def draw(count: int, length: int, config: PasskeyConfig, seed: int, asks: int = 1) -> Sequences:
    """Draw ``count`` sequences, a pure function of the arguments.

    One of the ``asks`` questions is the last token; the others are at random positions after the
    key, and may coincide. The key of sequence i is in the i-th of ``count`` equal parts, so all
    depths are tested.
    """
    random = torch.Generator().manual_seed(seed)
    mark = 2 * config.symbols
    tokens = torch.randint(config.symbols, mark, (count, length), generator=random)
    keys = torch.randint(config.symbols, (count,), generator=random)
    depth = (torch.arange(count) + torch.rand(count, generator=random)) / count
    place = (depth * (length - 2)).long()[:, None]
    behind = torch.rand(count, asks, generator=random) * (length - 2 - place)
    asked = (place + 2 + behind.long()).clamp(max=length - 1)
    asked[:, -1] = length - 1
    tokens.scatter_(1, asked, mark + 1).scatter_(1, place, mark)
    return Sequences(tokens.scatter_(1, place + 1, keys[:, None]), asked, keys)


def with_landmarks(tokens: Tensor, block: int, landmark: int) -> Tensor:
    """(B, N) -> (B, N + N // block): ``landmark`` after every ``block`` tokens."""
    count = tokens.shape[1] // block
    whole = F.pad(tokens[:, : count * block].unflatten(1, (count, block)), (0, 1), value=landmark)
    return torch.cat([whole.flatten(1), tokens[:, count * block :]], 1)


class Layer(nn.Module):
    """Queries, keys and values by head; each key is mixed with those of the two tokens before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = ShortConvolution(heads, width // heads)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def project(
        self, x: Tensor, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D) of x (B, N, C), and the last keys as the next chunk's ``before``."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        raw = k if before is None else torch.cat([before, k], 2)
        return q, self.mix(raw)[:, :, raw.shape[2] - k.shape[2] :], v, raw[:, :, 1 - TAPS :]

    def add(self, x: Tensor, heads: Tensor) -> Tensor:
        """x (B, N, C) plus the projected outputs of the heads (B, H, N, D)."""
        y: Tensor = x + self.out(heads.transpose(1, 2).flatten(2))
        return y


def grouped_weights(scores: Tensor, query: Tensor, block: int) -> Tensor:
    """Grouped softmax, (..., n, N), of scores for N tokens, of which each ``block``-th is a
    landmark.

    Args:
        query: (..., n), the positions of the queries.
    """
    total = scores.shape[-1]
    places, query = torch.arange(total + -total % block), query[..., None]
    marks = places % block == block - 1
    own = (places // block == query // block) & (places <= query) & ~marks
    past = places // block < query // block
    scores = F.pad(scores, (0, len(places) - total), value=-torch.inf)
    gate = scores.masked_fill(~(own | (past & marks)), -torch.inf).softmax(-1)
    cells = scores.unflatten(-1, (-1, block))[..., :-1]
    inside = cells.masked_fill(~past.unflatten(-1, (-1, block))[..., :-1], -1e30).softmax(-1)
    read = F.pad(gate.unflatten(-1, (-1, block))[..., -1:] * inside, (0, 1)).flatten(-2)
    return torch.where(own, gate, read)[..., :total]


class Reader(nn.Module):
    """Two layers of causal attention with rotary positions between an embedding and a linear map."""

    def __init__(self, config: PasskeyConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.config = config
        self.landmark = 2 * config.symbols + 2  # the token
        self.embed = nn.Embedding(2 * config.symbols + 3, width)
        self.layers: Any = nn.ModuleList(Layer(width, heads) for _ in range(LAYERS))
        self.read = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, config.symbols))
        self.rotation = create_rotation("axial:base=10000", width // heads, axes=1)
        self.grouped = create_mechanism(
            "landmark", width, heads, block=config.block + 1, landmark="last"
        )

    def rotate(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, H, N, D), rotated for the positions ``places`` (N,)."""
        turned: Tensor = self.rotation(x, x, places[:, None].to(x.dtype))[0]
        return turned

    def attended(self, q: Tensor, k: Tensor, v: Tensor, query: Tensor, grouped: bool) -> Tensor:
        """Causal attention of rotated queries at the positions ``query`` (..., n)."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if grouped:
            return grouped_weights(scores, query, self.config.block + 1) @ v
        seen = torch.arange(k.shape[2]) <= query[..., None]
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    # ------------------------------------------------------------------ in training

    def whole(self, tokens: Tensor, asked: Tensor, grouped: bool) -> Tensor:
        """Logits (B, Q, symbols) at the positions ``asked`` (B, Q), from one pass over all tokens.

        Tokens with landmarks are read by ``grouped`` softmax, others by causal softmax.
        """
        x, places = self.embed(tokens), torch.arange(tokens.shape[1])
        for layer in self.layers:
            q, k, v, _ = layer.project(x)
            q, k = self.rotate(q, places), self.rotate(k, places)
            if layer is self.layers[-1]:  # only the asked positions are needed
                rows = asked[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
                heads = self.attended(q.gather(2, rows), k, v, asked[:, None], grouped)
                x = layer.add(x.gather(1, asked[..., None].expand(-1, -1, x.shape[2])), heads)
            elif grouped:
                x = layer.add(x, self.grouped.operator(Inputs(q, k, v, causal=True)).matvec(v))
            else:
                x = layer.add(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.read(x)  # type: ignore[no-any-return]

    def recurrent(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """The same logits by Transformer-XL: a segment of half a training length also sees the
        previous one, without a gradient."""
        memory: list[Tensor] = []
        found = []
        for part in tokens.split(self.config.train_length // 2, 1):
            x, kept = self.embed(part), []
            for number, layer in enumerate(self.layers):
                kept.append(x.detach())
                seen = torch.cat([memory[number], x], 1) if memory else x
                n, places = x.shape[1], torch.arange(seen.shape[1])
                q, k, v, _ = layer.project(seen)
                q, k = self.rotate(q, places)[:, :, -n:], self.rotate(k, places)
                visible = places <= places[-n:, None]
                x = layer.add(x, F.scaled_dot_product_attention(q, k, v, visible))
            memory = kept
            found.append(x)
        x = torch.cat(found, 1)
        return self.read(x.gather(1, asked[..., None].expand(-1, -1, x.shape[2])))  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ beyond training

    @torch.no_grad()
    def retrieving(self, tokens: Tensor, choose: Choose) -> Tensor:
        """Logits (B, symbols) at the last of ``tokens``, which have landmarks, read in chunks."""
        config, block = self.config, self.config.block + 1
        count = -(-tokens.shape[1] // block)
        first = (count - 1) % config.chunk + 1  # blocks, so that the last chunk is whole
        size = len(tokens), config.heads, count, block, config.width // config.heads
        memory = [Memory(torch.empty(size), torch.empty(size), 0, None) for _ in self.layers]
        parts = [tokens[:, : first * block]]
        parts += tokens[:, first * block :].split(config.chunk * block, 1)
        for number, part in enumerate(parts):
            x, last = self.embed(part), number == len(parts) - 1
            for kept, layer in zip(memory, self.layers, strict=True):
                q, k, v, kept.before = layer.project(x, kept.before)
                if layer is not self.layers[-1] or last:
                    x = layer.add(x, self._with_memory(q, k, v, kept, choose))
                if not last:
                    new = slice(kept.count, kept.count + k.shape[2] // block)
                    kept.keys[:, :, new] = k.unflatten(2, (-1, block))
                    kept.values[:, :, new] = v.unflatten(2, (-1, block))
                    kept.count = new.stop
        return self.read(x[:, -1])  # type: ignore[no-any-return]

    def _with_memory(self, q: Tensor, k: Tensor, v: Tensor, kept: Memory, choose: Choose) -> Tensor:
        """Attention of a chunk (B, H, n, D) to itself and to the blocks that it chooses."""
        block, n = self.config.block + 1, q.shape[2]
        read = min(self.config.selected, kept.count)
        start = block * (self.config.selected + 1)  # the chunk's first position
        places = start + torch.arange(n)
        q, k = self.rotate(q, places), self.rotate(k, places)
        if choose is no_blocks or not read:
            return self.attended(q, k, v, torch.arange(n), grouped=True)
        keys, values = kept.keys[:, :, : kept.count], kept.values[:, :, : kept.count]
        blocks = (self.config.selected + 1 - torch.arange(kept.count, 0, -1)).clamp(min=0)
        marks = self.rotate(keys[:, :, :, -1], blocks * block + block - 1)
        index = choose(q, k, marks, read, block).sort(-1).values  # (B, H, read)
        at = index[..., None, None].expand(-1, -1, -1, *keys.shape[3:])
        before = start - read * block + torch.arange(read * block)
        keys = self.rotate(keys.gather(2, at).flatten(2, 3), before)
        k, v = torch.cat([keys, k], 2), torch.cat([values.gather(2, at).flatten(2, 3), v], 2)
        return self.attended(q, k, v, read * block + torch.arange(n), grouped=True)


@dataclass
class Memory:
    """What a layer stores of earlier chunks.

    ``keys``, not yet rotated, and ``values``, (B, H, blocks, tokens per block, D), of which
    ``count`` blocks are filled; ``before``, the last keys before they are mixed.
    """

    keys: Tensor
    values: Tensor
    count: int
    before: Tensor | None


Choose = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
"""Chooses the blocks (B, H, count) that a chunk reads, by rotated queries, keys and landmarks."""


def best_blocks(q: Tensor, k: Tensor, marks: Tensor, count: int, block: int) -> Tensor:
    """The blocks whose landmarks get the largest weight from any query.

    Weights are a softmax over the chunk's own tokens and all landmarks ``marks`` (B, H, M, D).
    """
    scale = q.shape[-1] ** -0.5
    n = q.shape[2]
    at = torch.arange(n)
    own = (at <= at[:, None]) & (at // block == at[:, None] // block) & (at % block != block - 1)
    own |= (at % block == block - 1) & (at // block < at[:, None] // block)
    near = (q @ k.mT * scale).masked_fill(~own, -torch.inf)
    weights = torch.cat([q @ marks.mT * scale, near], -1).softmax(-1)[..., : marks.shape[2]]
    return weights.amax(2).topk(count, -1).indices


def random_blocks(q: Tensor, k: Tensor, marks: Tensor, count: int, block: int) -> Tensor:
    """``count`` random blocks per head, drawn with torch's global generator."""
    return torch.rand(marks.shape[:3]).topk(count, -1).indices


def no_blocks(q: Tensor, k: Tensor, marks: Tensor, count: int, block: int) -> Tensor:
    """No blocks: a marker for reading the chunk alone."""
    return torch.empty(*marks.shape[:2], 0, dtype=torch.long)


# ---------------------------------------------------------------------- the study

DEFAULTS = PasskeyConfig()
CHOICES: dict[str, Choose] = {"landmark": best_blocks, "random blocks": random_blocks}
ROWS = {
    "landmark": "landmarks, the best blocks",
    "random blocks": "landmarks, random blocks",
    "window": "softmax, the last tokens",
    "whole context": "softmax, the whole context",
    "transformer-xl": "Transformer-XL",
}
TRAINED = {
    "grouped": tuple(CHOICES),
    "dense": ("window", "whole context"),
    "recurrent": ("transformer-xl",),
}
"""Kinds of networks, and the rows that each is tested for."""


def answers(net: Reader, kind: str, tokens: Tensor, asked: Tensor) -> Tensor:
    """Training logits (B, Q, symbols) of a network of ``kind``."""
    if kind == "recurrent":
        return net.recurrent(tokens, asked)
    if kind == "dense":
        return net.whole(tokens, asked, grouped=False)
    block = net.config.block
    tokens = with_landmarks(tokens, block, net.landmark)
    return net.whole(tokens, asked + asked // block, grouped=True)


def stages(config: PasskeyConfig) -> list[int]:
    """The sequence length at each step: a quarter of the full length, then half, then all of it."""
    ends = [int(share * config.steps) for share in config.stages]
    return [
        config.train_length // (4 if step < ends[0] else 2 if step < ends[1] else 1)
        for step in range(config.steps)
    ]


def train(net: Reader, kind: str, config: PasskeyConfig, split: Split, seed: int) -> float:
    """Train by cross-entropy at all questions and return the CPU seconds; a step takes more
    sequences while they are shorter."""
    seeds = split.fit([seed * config.steps + step for step in range(config.steps)])

    def losses() -> Iterator[Tensor]:
        for each, length in zip(seeds, stages(config), strict=True):
            count = config.batch_size * config.train_length // length
            tokens, asked, keys = draw(count, length, config, each, config.asks)
            found = answers(net, kind, tokens, asked)
            yield F.cross_entropy(found.flatten(0, 1), keys.repeat_interleave(config.asks))

    return minimize(net, losses(), config.steps, config.lr, 0.01, max_norm=1.0)


@torch.no_grad()
def predictions(net: Reader, row: str, tokens: Tensor) -> Tensor:
    """The symbols (B,) that a trained network predicts at the last of ``tokens`` (B, N)."""
    if row in CHOICES:
        marked = with_landmarks(tokens, net.config.block, net.landmark)
        return net.retrieving(marked, CHOICES[row]).argmax(1)
    if row == "window":
        tokens = tokens[:, -net.config.train_length :]
    asked = torch.full((len(tokens), 1), tokens.shape[1] - 1)
    kind = "recurrent" if row == "transformer-xl" else "dense"
    return answers(net, kind, tokens, asked)[:, 0].argmax(1)


def measure(kind: str, config: PasskeyConfig, split: Split, seed: int) -> dict[str, Any]:
    """Train a network and return, by row and length, whether it answers each sequence correctly."""
    net = Reader(config)
    seconds = train(net, kind, config, split, seed)
    found: dict[str, Any] = {}
    start = time.process_time()
    for length in config.lengths:
        (own,) = split.score([TEST_SEED * (1 + seed) + length])
        tokens, _, keys = draw(config.probes, length, config, own)
        for row in TRAINED[kind]:
            if row == "whole context" and length > config.dense:
                continue
            with single_thread():
                at_once = 1 if row == "whole context" else AT_ONCE
                told = torch.cat([predictions(net, row, part) for part in tokens.split(at_once)])
            found.setdefault(row, {})[str(length)] = (told == keys).int().tolist()
    parameters = sum(value.numel() for value in net.parameters())
    tested = time.process_time() - start
    return {"seconds": seconds, "test_seconds": tested, "parameters": parameters, "right": found}


def study(
    output: OutputAt = "runs/study-passkey",
    config: PasskeyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and test the networks not finished yet, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    rows = {kind: partial(measure, kind, config) for kind in TRAINED}
    found = measure_rows(output, settings, rows, config.seeds)
    yield from reported(output, [*_report(found, config)], {"values": raw_rows(found)})


def _report(found: Found, config: PasskeyConfig) -> Iterator[str]:
    yield (
        f"{config.steps} steps of {config.batch_size * config.train_length:,} tokens, at most "
        f"{config.train_length} in a sequence; {config.probes} sequences a test, {config.seeds} seeds\n"
    )
    yield (
        "| correct answers, %, at a length of | "
        + " | ".join(f"{n:,}" for n in config.lengths)
        + " |"
    )
    yield "| :-- |" + " --: |" * len(config.lengths)
    for kind, rows in TRAINED.items():
        for row in rows:
            cells = [
                _cell([run["right"][row].get(str(n)) for run in found[kind]])
                for n in config.lengths
            ]
            yield f"| {ROWS[row]} | " + " | ".join(cells) + " |"
    reach = [100 * min(1, config.train_length / n) for n in config.lengths]
    yield "| keys within the window | " + " | ".join(f"{x:.1f}" for x in reach) + " |"
    chance = f"{100 / config.symbols:.1f}"
    yield "| chance | " + " | ".join([chance] * len(config.lengths)) + " |"
    yield "\n| network | parameters | CPU seconds of training | of its tests |"
    yield "| :-- | --: | --: | --: |"
    for kind, runs in found.items():
        trained, tested = (_mean(run[key] for run in runs) for key in ("seconds", "test_seconds"))
        yield f"| {kind} | {runs[0]['parameters']:,} | {trained:.1f} | {tested:.1f} |"


def _mean(values: Any) -> float:
    values = list(values)
    return float(sum(values) / len(values))


def _cell(runs: list[list[int] | None]) -> str:
    """The share of correct answers in %, as a mean over the seeds with a 95 % t interval."""
    if None in runs:
        return "-"
    mean, low, high, _ = t_interval([100 * _mean(run) for run in runs])
    return f"{mean:.1f}" if low == high else f"{mean:.1f} [{max(low, 0):.1f}, {min(high, 100):.1f}]"
