"""What attentive heads cost: efficient probing beside multi-head cross-attention, and every head's step.

    xattn bench heads

The baseline is multi-head attention probing as it is usually written (arXiv 2506.10178's MHCA):
one learned query, W_q, W_k, W_v and W_o (4 D^2), keys and values of all tokens formed, with as many
heads as efficient probing has queries, so that both make 32 maps and one vector of D channels. A step
is that vector, its product with a fixed cotangent, and the gradients of all parameters; classifier and
feature norm are left out on both sides and tokens need no gradient, as on a frozen backbone. Random
tokens; in each round every job runs once, in turn, and ratios are taken within the round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from xattn.backbone import load_backbone
from xattn.eval.bench.operation_counts import macs
from xattn.eval.bench.timing import Job, median_ratio, times
from xattn.heads import AttentiveHead, Tokens, create_head, list_heads
from xattn.runtime.allocator import keep_memory

QUERIES, CLASSES = 32, 1000
WANTED = {384: 7.0, 768: 12.0}  # times faster, by width
FEWER = 3.5  # times fewer parameters
BASE = "multi-head"


class MultiHeadProbe(nn.Module):
    """softmax(W_q q (W_k X)^T / sqrt(d)) W_v X W_o of one learned query: tokens (B, N, D) -> (B, D).

    Args:
        fused: by ``F.scaled_dot_product_attention``, or by two products and a softmax.
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
    """Random tokens for ``head``, of one layer or of all that it reads."""
    generator = torch.Generator().manual_seed(0)
    patches = [
        torch.randn(batch, side * side, width, generator=generator) for _ in range(head.num_taps)
    ]
    prefix = torch.randn(batch, 1, width, generator=generator)
    device = head.classifier.weight.device
    return Tokens(tuple(x.to(device) for x in patches), prefix.to(device), (side, side))


def pooling_jobs(width: int, side: int, batch: int) -> tuple[dict[str, Job], dict[str, int]]:
    """Steps without classifier by name, and the parameters that they train."""
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


def bench(
    widths: Sequence[int] = (384, 768),
    sides: Sequence[int] = (14, 32),
    batch: int = 16,
    rounds: int = 15,
) -> Iterator[str]:
    """The lines of both tables, as they are measured.

    Args:
        widths: D.
        sides: of the square token grids.
        batch: images a step.
    """
    if rounds < 1 or batch < 2:
        raise ValueError(f"rounds, batch: got {rounds} and {batch}; give at least 1 and 2")
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
    yield f"\ntraining steps with a classifier of {CLASSES}, N = 196, D = 384\n"
    yield "| head | ms | of efficient_probe | parameters | with classifier | M MACs an image |"
    yield "| :-- | --: | --: | --: | --: | --: |"
    yield from _head_rows(384, 14, batch, rounds)


def _pooling_rows(width: int, side: int, batch: int, rounds: int) -> Iterator[str]:
    jobs, counts = pooling_jobs(width, side, batch)
    took = times(jobs, rounds, warmup=2)
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
    labels = torch.arange(batch, device=backbone.device) % CLASSES
    heads: dict[str, AttentiveHead] = {}
    for name in list_heads():
        head = create_head(name, backbone)
        if isinstance(head, AttentiveHead):
            heads[name] = head.train()

    def step(head: AttentiveHead) -> Job:
        tokens = tokens_of(head, batch, width, side)

        def job() -> None:
            head.zero_grad(set_to_none=True)
            F.cross_entropy(head.logits(tokens), labels).backward()

        return job

    took = times({name: step(head) for name, head in heads.items()}, rounds)
    for name in sorted(heads, key=lambda name: statistics.median(took[name])):
        head = heads[name]
        own = _parameters(head)
        cells = [name, f"{1e3 * statistics.median(took[name]):.1f}"]
        cells += [f"{median_ratio(took[name], took['efficient_probe']):.2f}x", f"{own:,}"]
        cells += [f"{own + sum(p.numel() for p in head.classifier.parameters()):,}"]
        yield f"| {' | '.join(cells)} | {macs(head, tokens_of(head, 1, width, side)) / 1e6:.2f} |"


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if not n.startswith("classifier."))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
