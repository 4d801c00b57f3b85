"""Training with the locality dial: a small language model on a grammar whose rules are known.

    python -m xattn.eval.studies rules

A rule owns a block of words and a mark. Its mark is followed by the answer: the rule applied to the
last word of its block. A sequence has one topic, which is half of the rules. The dial is a group
penalty on attention, at the rows of marks, over all blocks but the rule's anchor b(n):

    L = L_next word + lambda mean over layers, heads, marks n of  sum_(b != b(n)) |A_(n, G_b)|_2

Blocks are those of the grammar, random ones of the same sizes, or recruited by
:func:`~xattn.attention.mechanisms.localist.recruit`: words are clustered by which marks read them,
and the information criterion chooses the number of clusters; a mark's anchor is then the block that
it reads most. One level up, sequences are recruited into modules, each with its own heads. The
plain group lasso, the mean over layers and heads of sum_b |A_(:, G_b)|_F / sqrt(T), knows blocks
but no anchors.

Theory: where every score in a block of n of N keys exceeds all others by m, the mass outside is at most

    e = (N - n) / (N - n + n exp m),   and the entropy   h(e) + (1 - e) ln n + e ln(N - n)   nats

Localist LLMs: arXiv 2510.17358, 2510.09338 (abstracts; the formulas are ours).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.mechanisms.localist import recruited_regions
from xattn.eval.bootstrap import t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize

RULES, TOPICS, WORDS = 6, 2, 4  # WORDS is per block
COUNT = RULES * WORDS  # tokens are numbered: words, then a mark for each rule, then the start
START = COUNT + RULES
FROM = 8  # first tokens, which identify the topic; marks are measured after these
FIRST_TEST = 10**6  # first seed of the test sequences


@dataclass(frozen=True)
class RulesConfig:
    """Settings of the language model and its training."""

    seeds: int = 5
    length: int = 32
    dim: int = 32
    heads: int = 4
    layers: int = 2
    before: int = 400  # Steps without the dial, the same for all rows.
    steps: int = 300  # Steps with the dial.
    batch_size: int = 64
    lr: float = 4e-3
    dials: tuple[float, ...] = (0.1, 1.0)  # lambda; the last one is "localist".
    variance: float = 0.2  # Variance of a recruited block, as a share of that of all words.
    module_variance: float = 0.7  # The same for a module.
    margin: float = 4.0  # m in the bound.
    tests: int = 512  # Test sequences.

    def quick(self) -> RulesConfig:
        """A few steps of each, to check that everything runs; its figures mean nothing."""
        return replace(self, seeds=2, before=4, steps=4, tests=32)


DEFAULTS = RulesConfig()


class Sentences(NamedTuple):
    """``tokens`` (B, T); ``rule`` (B, T), the rule of the mark at each position, -1 where there is
    none; ``source`` (B, T), the position of the word that the mark asks about; and ``topic``
    (B,)."""

    tokens: Tensor
    rule: Tensor
    source: Tensor
    topic: Tensor


@cache
def rules() -> Tensor:
    """For each word, the word to which its rule maps it, (COUNT,): no word is mapped to itself."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for r in range(RULES):
        order = torch.randperm(WORDS, generator=generator)
        after = torch.empty(WORDS, dtype=torch.long)
        after[order] = order.roll(-1)  # one cycle through the block
        found.append(after + r * WORDS)
    return torch.cat(found)


@lru_cache(maxsize=4_096)  # all rows learn from the same sequences
def draw(count: int, length: int, seed: int) -> Sentences:
    """Draw ``count`` sequences, a pure function of ``seed``.

    Each has the start, a word of each of the topic's blocks, then words and, equally often, marks
    with their answers.
    """
    generator = torch.Generator().manual_seed(seed)
    of_topic = RULES // TOPICS
    topic = torch.randint(TOPICS, (count,), generator=generator)
    last = torch.zeros(count, RULES, dtype=torch.long)  # position of each block's last word
    tokens = torch.full((count, length), START)
    rule, source = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    each, asked = torch.arange(count), torch.zeros(count, dtype=torch.bool)
    first = torch.rand(count, of_topic, generator=generator).argsort(1)
    for place in range(1, length):
        r = torch.randint(of_topic, (count,), generator=generator)
        begins = place <= of_topic
        r = topic * of_topic + (first[:, place - 1] if begins else r)
        r = torch.where(asked, rule[:, place - 1], r)
        word = r * WORDS + torch.randint(WORDS, (count,), generator=generator)
        word = torch.where(asked, rules()[tokens[each, last[each, r]].clamp_max(COUNT - 1)], word)
        marks = (torch.rand(count, generator=generator) < 0.5) & ~asked & (not begins)
        tokens[:, place] = torch.where(marks, COUNT + r, word)
        rule[:, place] = torch.where(marks, r, -1)
        source[:, place] = torch.where(marks, last[each, r], -1)
        last[each[~marks], r[~marks]] = place
        asked = marks
    return Sentences(tokens, rule, source, topic)


class RuleModel(nn.Module):
    """A causal transformer that returns logits of the next token, and its attention by layer."""

    def __init__(self, config: RulesConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.embedding = nn.Embedding(START + 1, dim)
        self.positions = nn.Parameter(0.1 * torch.randn(config.length, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * config.layers))
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(config.layers))
        self.proj = nn.ModuleList(nn.Linear(dim, dim) for _ in range(config.layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(config.layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, START + 1))

    def run(
        self, tokens: Tensor, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (B, T, V), attention (B, L, H, T, T), queries and keys (B, L, H, T, D); ``gate`` (B, H)
        multiplies the outputs of heads."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        attention, queries, keys = [], [], []
        for i, (qkv, proj, mlp) in enumerate(zip(self.qkv, self.proj, self.mlp, strict=True)):
            parts = qkv(self.norms[2 * i](x)).unflatten(-1, (3, self.heads, -1))
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
            attention.append(scores.softmax(-1))
            queries.append(q)
            keys.append(k)
            mixed = attention[-1] @ v
            if gate is not None:
                mixed = mixed * gate[:, :, None, None]
            x = x + proj(mixed.transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * i + 1](x))
        stacked = (torch.stack(parts, 1) for parts in (attention, queries, keys))
        return self.out(x), *stacked


class Blocks(NamedTuple):
    """``of`` (V,), the block of each token; ``anchors`` (RULES,), what each mark should read."""

    of: Tensor
    anchors: Tensor


class Modules(NamedTuple):
    """``anchors`` (M, blocks): the shares of ``blocks`` at the start of each module's sequences."""

    blocks: Blocks
    anchors: Tensor

    def of(self, tokens: Tensor) -> Tensor:
        """(B,): the module of each sequence."""
        return torch.cdist(shares(tokens, self.blocks), self.anchors).argmin(1)

    def gate(self, tokens: Tensor, heads: int) -> Tensor:
        """(B, H): 1 for the heads of the sequence's own module; modules take heads in turn."""
        owner = torch.arange(heads) % len(self.anchors)
        return (self.of(tokens)[:, None] == owner).float()


# ---------------------------------------------------------------------- the dial


def rule_blocks() -> Blocks:
    """The blocks of the grammar; marks and the start form one more block."""
    of = torch.arange(START + 1) // WORDS
    of[COUNT:] = RULES
    return Blocks(of, torch.arange(RULES))


def random_blocks(seed: int) -> Blocks:
    """Blocks of random words, as large as those of the grammar."""
    known = rule_blocks()
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed))
    return Blocks(torch.cat([known.of[:COUNT][order], known.of[COUNT:]]), known.anchors)


def group_norms(attention: Tensor, tokens: Tensor, blocks: Blocks) -> Tensor:
    """|A_(n, G_b)|^2 (B, L, H, T, blocks) for attention (B, L, H, T, T)."""
    members = F.one_hot(blocks.of, int(blocks.of.max()) + 1)[tokens].to(attention)
    return attention.square() @ members[:, None, None]


def dial_penalty(attention: Tensor, sentences: Sentences, blocks: Blocks) -> Tensor:
    """The group penalty at marks, over all blocks but the anchor; 0 if they attend only to it."""
    squares = group_norms(attention, sentences.tokens, blocks)
    marks = sentences.rule >= 0
    anchor = blocks.anchors[sentences.rule.clamp_min(0)]
    others = 1 - F.one_hot(anchor, squares.shape[-1]).to(squares)
    norms = (squares + 1e-12).sqrt() * others[:, None, None]
    return norms.sum(-1).mean((1, 2))[marks].mean()


def group_lasso(attention: Tensor, sentences: Sentences, blocks: Blocks) -> Tensor:
    """sum_b |A_(:, G_b)|_F / sqrt(T), mean over layers and heads."""
    squares = group_norms(attention, sentences.tokens, blocks)
    return (squares.sum(-2) + 1e-12).sqrt().sum(-1).mean() / math.sqrt(attention.shape[-1])


@torch.no_grad()
def recruited_blocks(model: RuleModel, sentences: Sentences, variance: float) -> Blocks:
    """Cluster words by which marks read them: each mark's share of the attention that the word
    gets.

    The anchor of a mark is the block that it reads most.
    """
    attention = model.run(sentences.tokens)[1].mean((1, 2))
    words = F.one_hot(sentences.tokens, START + 1).to(attention)[..., :COUNT]
    read = []
    for r in range(RULES):
        rows = sentences.rule == r
        seen = words[rows.nonzero()[:, 0]]  # (n, T, COUNT)
        paid = torch.einsum("nt,ntv->v", attention[rows], seen)
        read.append(paid / seen.sum((0, 1)).clamp_min(1))
    paid = torch.stack(read, 1)  # (COUNT, RULES)
    of = recruited_regions(paid / paid.sum(1, keepdim=True), variance)
    others = torch.full((START + 1 - COUNT,), int(of.max()) + 1)
    return Blocks(torch.cat([of, others]), (F.one_hot(of).to(paid).T @ paid).argmax(0))


def shares(tokens: Tensor, blocks: Blocks) -> Tensor:
    """The share of each block among the first tokens of sequences, (B, blocks)."""
    return F.one_hot(blocks.of, int(blocks.of.max()) + 1)[tokens[:, 1:FROM]].float().mean(1)


def recruited_modules(tokens: Tensor, blocks: Blocks, variance: float) -> Modules:
    """Cluster sequences by the blocks that they begin with."""
    points = shares(tokens, blocks)
    of = recruited_regions(points, variance)
    return Modules(blocks, torch.stack([points[of == m].mean(0) for m in range(int(of.max()) + 1)]))


# ---------------------------------------------------------------------- training

Penalty = Callable[[Tensor, Sentences], Tensor]
"""A penalty on attention (B, L, H, T, T), given its sequences."""


def train(
    model: RuleModel,
    config: RulesConfig,
    seeds: Sequence[int],
    penalty: Penalty | None = None,
    dial: float = 0.0,
    modules: Modules | None = None,
) -> float:
    """Train a step per seed, with ``dial`` times the penalty; return the CPU seconds."""

    def losses() -> Iterator[Tensor]:
        for seed in seeds:
            found = draw(config.batch_size, config.length, seed)
            gate = None if modules is None else modules.gate(found.tokens, model.heads)
            logits, attention = model.run(found.tokens, gate)[:2]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), found.tokens[:, 1:].flatten())
            yield loss if penalty is None else loss + dial * penalty(attention, found)

    return minimize(model, losses(), len(seeds), config.lr, 0.01)


def seeds_of(config: RulesConfig, seed: int) -> list[int]:
    """The seeds of the batches, one for each step."""
    count = config.before + config.steps
    return list(range(seed * count, (seed + 1) * count))


@cache
def before(config: RulesConfig, seed: int) -> RuleModel:
    """The model trained without the dial, from which all rows continue."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RuleModel(config)
        train(model, config, seeds_of(config, seed)[: config.before])
    return model


# ---------------------------------------------------------------------- what is measured


def bound(inside: Tensor, keys: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Largest mass outside blocks with ``inside`` of ``keys`` keys, and largest entropy in nats."""
    outside = (keys - inside).double()
    e = outside / (outside + inside * math.exp(margin))
    own = -torch.special.xlogy(e, e) - torch.special.xlogy(1 - e, 1 - e)
    return e, own + (1 - e) * inside.double().log() + torch.special.xlogy(e, outside)


@torch.no_grad()
def mark_figures(
    model: RuleModel, sentences: Sentences, margin: float, modules: Modules | None = None
) -> dict[str, float]:
    """Figures at the marks: correct answers; mass and entropy of all heads, with the bound; and
    what attention reveals of the rules."""
    gate = None if modules is None else modules.gate(sentences.tokens, model.heads)
    logits, attention = model.run(sentences.tokens, gate)[:2]
    marks = sentences.rule >= 0
    marks[:, :FROM], marks[:, -1] = False, False
    row, place = marks.nonzero(as_tuple=True)
    rule, tokens = sentences.rule[marks], sentences.tokens
    answers = tokens[row, place + 1]
    A = attention.permute(0, 3, 1, 2, 4)[marks].flatten(1, 2).double()  # (marks, heads, T)
    own = torch.ones_like(A[..., 0])  # whether the head is of the sequence's module
    if gate is not None:
        own = gate.repeat(1, len(model.qkv))[row].double()
    own = own / own.sum(1, keepdim=True)
    blocks = rule_blocks().of[tokens[row]] == rule[:, None]
    blocks = blocks & (torch.arange(tokens.shape[1]) <= place[:, None])
    mass = (A * blocks[:, None]).sum(-1)
    entropy = -torch.special.xlogy(A, A).sum(-1)
    inside, keys = blocks.sum(-1), place + 1
    outside, most = bound(inside, keys, margin)
    within = (1 - mass <= outside[:, None]) & (entropy <= most[:, None])
    by_word = torch.zeros(len(A), START + 1, dtype=A.dtype)
    whole = (A * own[..., None]).sum(1)
    by_word.scatter_add_(1, tokens[row], whole)
    told, table = probe(by_word, answers)
    return {
        "right": float((logits[marks].argmax(-1) == answers).double().mean()),
        "mass": float((mass * own).sum(1).mean()),
        "entropy": float((entropy * own).sum(1).mean()),
        "inside": float(inside.double().log().mean()),
        "bound": float(most.mean()),
        "within": float((within * own).sum(1).mean()),
        "points": float((whole.argmax(-1) == sentences.source[marks]).double().mean()),
        "told": told,
        "rules": float((table[:COUNT] == rules()).double().mean()),
    }


def probe(attention: Tensor, answers: Tensor) -> tuple[float, Tensor]:
    """Fit answers linearly to attention by word (n, V), by ridge regression on the first half of
    the marks.

    Returns the share of the other marks that the fit predicts, and its answer to each word alone
    (V,).
    """
    half = len(answers) // 2
    x, y = attention[:half], F.one_hot(answers[:half], START + 1).to(attention)
    weight = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(START + 1, dtype=x.dtype), x.T @ y)
    told = (attention[half:] @ weight).argmax(1) == answers[half:]
    return float(told.double().mean()), weight.argmax(1)


def same_pairs(found: Tensor, truth: Tensor) -> float:
    """The adjusted Rand index of two partitions (n,): 1 if equal, 0 on average by chance."""
    table = F.one_hot(found).T.double() @ F.one_hot(truth).double()

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = rows * columns / (len(found) * (len(found) - 1) / 2)
    most = (rows + columns) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


Kind = Literal["off", "lasso", "dial", "random", "recruited", "modules"]


def measure(
    config: RulesConfig, kind: Kind, dial: float, split: Split, seed: int
) -> dict[str, Any]:
    """Continue training from :func:`before` with the dial on, and measure."""
    seeds = split.fit(seeds_of(config, seed))
    model = copy.deepcopy(before(config, seed))
    found: dict[str, Any] = {}
    blocks, modules = rule_blocks(), None
    if kind == "random":
        blocks = random_blocks(seed)
    elif kind in ("recruited", "modules"):
        (fresh,) = split.fit([2 * FIRST_TEST + seed])
        sentences = draw(config.tests, config.length, fresh)
        blocks = recruited_blocks(model, sentences, config.variance)
        found["blocks"] = int(blocks.of[:COUNT].max()) + 1
        found["same_blocks"] = same_pairs(blocks.of[:COUNT], rule_blocks().of[:COUNT])
        found["anchors"] = _anchored(blocks)
    if kind == "modules":
        modules = recruited_modules(sentences.tokens, blocks, config.module_variance)
        found["modules"] = len(modules.anchors)
        found["same_modules"] = same_pairs(modules.of(sentences.tokens), sentences.topic)
    used = group_lasso if kind == "lasso" else dial_penalty
    penalty = None if kind == "off" else partial(used, blocks=blocks)
    seeds = seeds[config.before :]
    found["seconds"] = train(model, config, seeds, penalty, dial, modules)
    (test,) = split.score([FIRST_TEST + seed])
    return {
        **mark_figures(model, draw(config.tests, config.length, test), config.margin, modules),
        **found,
    }


def _anchored(blocks: Blocks) -> float:
    """The share of rules whose anchor is the block that holds most of their words."""
    of = F.one_hot(blocks.of[:COUNT]).unflatten(0, (RULES, WORDS)).sum(1)
    return float((of.argmax(1) == blocks.anchors).double().mean())


# ---------------------------------------------------------------------- the study


def study(
    output: OutputAt = "runs/study-rules", config: RulesConfig = DEFAULTS, quick: Quick = False
) -> Iterator[str]:
    """Train and test the rows that are not finished yet, write report.md and values.csv, and yield
    the report's lines."""
    config = config.quick() if quick else config
    output, localist = Path(output), max(config.dials)
    rows = {"off": partial(measure, config, "off", 0.0)}
    rows |= {f"dial-{dial:g}": partial(measure, config, "dial", dial) for dial in config.dials}
    for kind in ("random", "lasso", "recruited", "modules"):
        rows[kind] = partial(measure, config, kind, localist)
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(output, settings, rows, config.seeds)
    yield from reported(output, [*report(found, config)], {"values": raw_rows(found)})


TITLES = {
    "off": "off",
    "random": "localist, random blocks",
    "lasso": "localist, group lasso without anchors",
    "recruited": "localist, recruited blocks",
    "modules": "localist, recruited blocks and modules",
}
COLUMNS = {
    "right": ("correct answers, %", 100.0, 1),
    "mass": ("mass in the block", 1.0, 3),
    "entropy": ("entropy, nats", 1.0, 2),
    "within": ("rows within the bound, %", 100.0, 1),
    "points": ("points at the source, %", 100.0, 1),
    "told": ("probe, %", 100.0, 1),
    "rules": ("rules read, %", 100.0, 1),
}
COMPARED = ("right", "mass", "entropy", "within")
"""The columns that are compared with the row whose dial is off, seed by seed."""
RECRUITED = {
    "blocks": ("blocks", f"{RULES}"),
    "same_blocks": ("adjusted Rand index of blocks and rules", "1"),
    "anchors": ("rules whose mark is anchored to their words", "1"),
    "modules": ("modules", f"{TOPICS}"),
    "same_modules": ("adjusted Rand index of modules and topics", "1"),
}


def report(found: Found, config: RulesConfig) -> Iterator[str]:
    """Lines of the tables: the effect of the dial, and what was recruited."""
    yield (
        f"{RULES} rules of {WORDS} words in {TOPICS} topics, sequences of {config.length}; {config.before} "
        f"steps without the dial, {config.steps} with it; {config.seeds} seeds; 95 % t intervals"
    )
    yield "\n| dial | " + " | ".join(title for title, _, _ in COLUMNS.values()) + " |"
    yield "| :-- |" + " --: |" * len(COLUMNS)
    for name, runs in found.items():
        title = TITLES.get(name, f"lambda {name.removeprefix('dial-')}")
        cells = [
            t_interval([scale * run[key] for run in runs]).text(digits)
            for key, (_, scale, digits) in COLUMNS.items()
        ]
        yield f"| {title} | {' | '.join(cells)} |"
    off = found["off"]
    most, inside = (t_interval([run[key] for run in off]).text(2) for key in ("bound", "inside"))
    yield f"\nEntropy of the bound, m = {config.margin:g}: {most}; ln n of the block's keys: {inside}."
    yield "\n| minus off | " + " | ".join(COLUMNS[key][0] for key in COMPARED) + " |"
    yield "| :-- |" + " --: |" * len(COMPARED)
    for name, runs in list(found.items())[1:]:
        cells = []
        for key in COMPARED:
            _, scale, digits = COLUMNS[key]
            less = t_interval([scale * (a[key] - b[key]) for a, b in zip(runs, off, strict=True)])
            bounds = (f"{value:+.{digits}f}" for value in (less.lo, less.hi))
            cells.append(f"{less.mean:+.{digits}f} [{', '.join(bounds)}]")
        yield f"| {TITLES.get(name, f'lambda {name[5:]}')} | {' | '.join(cells)} |"
    yield "\n| recruited | found | there |"
    yield "| :-- | --: | --: |"
    for key, (title, truth) in RECRUITED.items():
        yield f"| {title} | {t_interval([run[key] for run in found['modules']]).text(2)} | {truth} |"
    seconds = sum(run["seconds"] for runs in found.values() for run in runs)
    yield f"\n{seconds:.0f} CPU seconds of training with the dial."
