"""Measures the cost of attentive heads: efficient probing, multi-head cross-attention, and training steps.

    python -m xattn.eval.studies bench-heads

The baseline is multi-head attention probing as it is usually written (MHCA in arXiv 2506.10178): one
learned query, the matrices W_q, W_k, W_v and W_o (4 D^2), keys and values computed for all tokens, and as
many heads as efficient probing has queries, so that both make 32 maps and one vector of D channels. A step
computes this vector, its product with a fixed cotangent, and the gradients of all parameters. Both sides
omit the classifier and the feature norm, and tokens need no gradient, as on a frozen backbone. Tokens are
random. Each round runs every job once, in turn, and ratios are taken within the round.

Training steps of all heads, with N and batch size as given in their tables, include the classifier. "plain"
is the same step with softmax pooling as separate scores, softmax and product. The last table is for a head
with a mixer, which is an attention layer between tap and head. Times are processor times over all threads;
with one thread, they equal wall-clock time on an idle machine. For pooling, wall-clock time is also shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from xattn.attention.base import MECHANISMS
from xattn.backbone import load_backbone
from xattn.eval.probing.probe_table import macs
from xattn.eval.studies.benches import pooling
from xattn.heads import AttentiveHead, Tokens, create_head, head_class, list_heads
from xattn.heads.attended import AttentionTerms, pool_by, softmax
from xattn.runtime.measuring import Job, median_ratio, processor_clock, times
from xattn.runtime.process import keep_memory

QUERIES, CLASSES = 32, 1000
WANTED = {384: 7.0, 768: 12.0}  # times faster, by width
FEWER = 3.5  # times fewer parameters
BASE = "multi-head"
STEPS = ((14, 16), (32, 4), (64, 2))  # sides and batches of training steps
MIXED = "efficient_probe"
HEAD_COLUMNS = (
    "| head | ms | of efficient_probe | plain / head | parameters | with classifier "
    "| M MACs per image |"
)


class MultiHeadProbe(nn.Module):
    """softmax(W_q q (W_k X)^T / sqrt(d)) W_v X W_o with one learned query: tokens (B, N, D) -> (B, D).

    Args:
        fused: whether to use ``F.scaled_dot_product_attention`` instead of two products and a softmax.
    """

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(x.shape[0], -1, -1)
        q, k, v = (self._split(f(y)) for f, y in ((self.q, query), (self.k, x), (self.v, x)))
        if self.fused:
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
        return self.proj(o.transpose(1, 2).flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def backbone_of(width: int, side: int) -> Any:
    """A ViT of ``width`` with side x side patches and a class token, whose weights do not matter."""
    model = VisionTransformer(
        img_size=16 * side, embed_dim=width, depth=4, num_heads=width // 64, num_classes=CLASSES
    )
    return load_backbone(model, taps=["block.0", "block.1", "block.2", "block.3"])


def tokens_of(head: Any, batch: int, width: int, side: int) -> Any:
    """Random tokens for ``head``: one layer, or all layers that it reads."""
    generator = torch.Generator().manual_seed(0)
    patches = [
        torch.randn(batch, side * side, width, generator=generator) for _ in range(head.num_taps)
    ]
    prefix = torch.randn(batch, 1, width, generator=generator)
    device = head.classifier.weight.device
    return Tokens(tuple(x.to(device) for x in patches), prefix.to(device), (side, side))


def pooling_jobs(width: int, side: int, batch: int) -> tuple[dict[str, Job], dict[str, int]]:
    """Training steps without a classifier, by name, and the number of parameters that each trains."""
    backbone = backbone_of(width, side)
    ep: Any = create_head("efficient_probe", backbone, queries=QUERIES, norm=False)
    folded: Any = create_head("clip_pool", backbone, heads=QUERIES, norm=False)
    tokens = tokens_of(ep, batch, width, side)
    x = tokens.patches[-1]
    cotangent = torch.randn_like(x[:, 0])
    baselines = {
        f"{BASE}, {how}": MultiHeadProbe(width, QUERIES, how == "fused").to(x.device)
        for how in ("fused", "two products")
    }

    def step(module: nn.Module, pool: Any) -> Job:
        def job() -> None:
            module.zero_grad(set_to_none=True)
            (pool() * cotangent).sum().backward()

        return job

    jobs = {
        "efficient_probe": step(ep, lambda: ep.pooled(ep.attend(tokens))),
        "clip_pool, folded": step(folded, lambda: folded.pooled(folded.attend(tokens))),
        **{name: step(m, lambda m=m: m(x)) for name, m in baselines.items()},
    }
    counts = {"efficient_probe": _parameters(ep), "clip_pool, folded": _parameters(folded)}
    counts.update({name: _parameters(m) for name, m in baselines.items()})
    return jobs, counts


def study(
    widths: Sequence[int] = (384, 768),
    sides: Sequence[int] = (14, 32),
    batch: int = 16,
    rounds: int = 15,
    steps: Sequence[tuple[int, int]] = STEPS,
) -> Iterator[str]:
    """Yield the lines of all tables as they are measured.

    Args:
        widths: values of D.
        sides: sides of the square token grids.
        batch: images per step.
        steps: sides and batch sizes of training steps; from N = 1,024 on they use a third of the rounds.
    """
    kept = keep_memory()
    yield (
        f"{_device()}, {torch.get_num_threads()} threads, batches of {batch}, "
        f"raised allocator thresholds: {kept}"
    )
    yield f"\nsteps without classifier, {QUERIES} queries or heads; of: the faster {BASE} form\n"
    yield "| D | N | job | ms | of the base's parameters | times faster | rounds | wanted | holds |"
    yield "| --: | --: | :-- | --: | --: | --: | :-- | --: | :-- |"
    for width in widths:
        for side in sides:
            yield from _pooling_rows(width, side, batch, rounds)
    yield from pooling.rows([side * side for side, _ in steps], rounds)
    for side, images in steps:
        some = rounds if side < 32 else max(1, rounds // 3)
        where = f"N = {side * side:,}, D = 384, batch {images}"
        yield f"\ntraining steps with a classifier of {CLASSES}, {where}\n"
        yield HEAD_COLUMNS
        yield "| :-- | --: | --: | --: | --: | --: | --: |"
        yield from _head_rows(384, side, images, some)
        yield f"\ntraining steps with a mixer, {where}\n"
        yield "| head and mixer | ms | of the head alone | parameters |"
        yield "| :-- | --: | --: | --: |"
        yield from _mixer_rows(384, side, images, some)


def _pooling_rows(width: int, side: int, batch: int, rounds: int) -> Iterator[str]:
    jobs, counts = pooling_jobs(width, side, batch)
    took = times(jobs, rounds, 2, processor_clock(), of=f"width {width}, {side * side} tokens")
    base = min((n for n in took if n.startswith(BASE)), key=lambda n: statistics.median(took[n]))
    for name in jobs:
        each = [b / a for a, b in zip(took[name], took[base], strict=True)]
        faster, fewer = statistics.median(each), counts[base] / counts[name]
        cells = [str(width), str(side * side), name, f"{1e3 * statistics.median(took[name]):.1f}"]
        cells += [f"1/{fewer:.2f}", f"{faster:.1f}x", f"{min(each):.1f} to {max(each):.1f}", "", ""]
        if name == "efficient_probe" and width in WANTED:
            cells[-2] = f"{WANTED[width]:.0f}x, 1/{FEWER}"
            cells[-1] = "yes" if faster >= WANTED[width] and fewer >= FEWER else "no"
        yield f"| {' | '.join(cells)} |"


def _head_rows(width: int, side: int, batch: int, rounds: int) -> Iterator[str]:
    backbone = backbone_of(width, side)
    heads: dict[str, AttentiveHead] = {}
    for name in list_heads():
        if issubclass(head_class(name), AttentiveHead):
            heads[name] = cast(AttentiveHead, create_head(name, backbone).train())
    jobs = {name: training_step(head, batch, width, side) for name, head in heads.items()}
    pooling_by_op = [name for name, head in heads.items() if pools_by_op(head)]
    took = times(
        {**jobs, **{f"{n}, plain": written_out(jobs[n]) for n in pooling_by_op}},
        rounds,
        1,
        processor_clock(),
        of="training step",
    )
    for name in sorted(heads, key=lambda name: statistics.median(took[name])):
        head = heads[name]
        own = _parameters(head)
        cells = [name, f"{1e3 * statistics.median(took[name]):.1f}"]
        cells += [f"{median_ratio(took[name], took['efficient_probe']):.2f}x"]
        by_op = name in pooling_by_op
        cells += [f"{median_ratio(took[f'{name}, plain'], took[name]):.2f}x" if by_op else ""]
        cells += [f"{own:,}"]
        cells += [f"{own + sum(p.numel() for p in head.classifier.parameters()):,}"]
        yield f"| {' | '.join(cells)} | {macs(head, tokens_of(head, 1, width, side)) / 1e6:.2f} |"


def _mixer_rows(width: int, side: int, batch: int, rounds: int) -> Iterator[str]:
    backbone = backbone_of(width, side)
    heads: dict[str, Any] = {MIXED: create_head(MIXED, backbone).train()}
    for entry in MECHANISMS.entries():
        options = {k: v for k, v in entry.bench[0].items() if k != "training_free"}
        with suppress(ValueError):  # a window that is larger than the grid
            made = create_head(MIXED, backbone, mixer=entry.name, mixer_options=options)
            heads[f"{MIXED}, {entry.name}"] = made.train()
    jobs = {name: training_step(head, batch, width, side) for name, head in heads.items()}
    took = times(jobs, rounds, 1, processor_clock(), of="training step with a mixer")
    for name, head in heads.items():
        cells = [name, f"{1e3 * statistics.median(took[name]):.1f}"]
        cells += [f"{median_ratio(took[name], took[MIXED]):.2f}x", f"{_parameters(head):,}"]
        yield f"| {' | '.join(cells)} |"


def training_step(head: AttentiveHead, batch: int, width: int, side: int) -> Job:
    """A step: logits of random tokens, cross-entropy, and the gradients of all parameters."""
    tokens = tokens_of(head, batch, width, side)
    labels = torch.arange(batch, device=tokens.prefix.device) % CLASSES

    def job() -> None:
        head.zero_grad(set_to_none=True)
        F.cross_entropy(head.logits(tokens), labels).backward()

    return job


def pools_by_op(head: AttentiveHead) -> bool:
    """Whether the head pools with softmax weights and uses no token as the query."""
    return type(head).weights is AttentiveHead.weights


def written_out(job: Job) -> Job:
    """``job`` with softmax pooling computed as separate scores, softmax and product."""

    def pool(attended: AttentionTerms) -> Tensor:
        return pool_by(softmax(attended.scores), attended.values)

    def run() -> None:
        with patch.object(AttentionTerms, "pool", pool):
            job()

    return run


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if not n.startswith("classifier."))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
