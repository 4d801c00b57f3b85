"""The papers' headline settings: measured here on a GPU, beside what they publish.

    python -m xattn.eval.studies bench-published

One layer's queries, keys and values at the number of tokens for which a paper reports its speed, in
bfloat16. A gain is the time of dense attention (``F.scaled_dot_product_attention``, causal where the
mechanism is) over that of the mechanism within a round, the median of the rounds; the backward pass's is
that of forward and backward together less forward. Figures are of other GPUs, other kernels of dense
attention and layers around them, as the last column says.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from xattn.attention import create_mechanism, list_attention, mechanism_class
from xattn.runtime.measuring import PASSES, Job, forward_and_both, median_ratio
from xattn.runtime.measuring import times as measure

NOT_MEASURED = "not measured on a GPU"


@dataclass(frozen=True)
class Setting:
    """One paper's setting and its speed-ups over dense attention; None where it gives none.

    Attributes: ``grid``, of the tokens, in a row if it has one length; ``heads`` of queries, ``kv_heads``
    of keys and values, all ``width`` wide; ``masked``, whether dense attention is given a mask of all
    query-key pairs, as the paper's is; ``against``, what the paper compares with.
    """

    mechanism: str
    grid: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    against: str
    options: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = True
    masked: bool = False
    forward: float | None = None
    backward: float | None = None
    both: float | None = None


SETTINGS = (
    Setting(
        "nsa", (65536,), 64, 4, 128,
        "A100; Triton's FlashAttention-2; keys 192 and values 128 wide (here both 128)",
        {"block": 32, "stride": 16, "select_block": 64, "selected": 16, "window": 512},
        forward=9.0, backward=6.0,
    ),
    Setting(
        "infllm_v2", (65536,), 32, 2, 128, "H100; FlashAttention; 64 blocks of 64 read in all",
        {"block": 64, "stride": 16, "kernel": 32, "local": 32, "selected": 64}, both=2.8,
    ),
    Setting(
        "llsa", (256, 256), 6, 6, 64,
        "GPU not stated; 28.3x is inference of attention, 6.1x training of a whole DiT",
        {"levels": 2, "selected": 8, "block": 4}, causal=False, forward=28.3, backward=6.1,
    ),
    Setting(
        "dma", (32768,), 2, 1, 64,
        "A100; attention with a stored mask and bias of all pairs, as here",
        {"window": 1024}, masked=True, forward=49.8,
    ),
)  # fmt: skip


def study(
    rounds: int = 5, settings: tyro.conf.Suppress[tyro.conf.Fixed[Sequence[Setting]]] = SETTINGS
) -> Iterator[str]:
    """The lines of the table, as they are measured."""
    gpu = torch.cuda.is_available()
    yield f"{torch.cuda.get_device_name()}, bfloat16" if gpu else f"no GPU here: {NOT_MEASURED}"
    yield (
        "\n| attention | tokens | heads | forward | published | backward | published | both "
        "| published | published figures are of |"
    )
    yield "| :-- | --: | :-- | --: | --: | --: | --: | --: | --: | :-- |"
    known = set(list_attention())
    for setting in settings:
        if setting.mechanism not in known:
            yield f"| {setting.mechanism} | skipped: no such mechanism is registered" + " |" * 9
            continue
        wanted = (setting.forward, setting.backward, setting.both)
        gains: tuple[float | None, ...] = (None, None, None)
        if gpu:
            gains = gains_of(setting, rounds, "cuda", torch.bfloat16)
        yield _row(setting, gains, wanted)


def _row(setting: Setting, gains: Sequence[float | None], wanted: Sequence[float | None]) -> str:
    pairs = ", ".join(f"{key}={value}" for key, value in setting.options.items())
    heads = f"{setting.heads} of {setting.width}, {setting.kv_heads} of keys"
    tokens = " x ".join(str(n) for n in setting.grid)
    cells = [f"{setting.mechanism} ({pairs})", tokens, heads]
    for gain, published in zip(gains, wanted, strict=True):
        missing = NOT_MEASURED if published is not None else ""
        cells.append(f"{gain:.2f}x" if gain is not None else missing)
        cells.append(f"{published:.1f}x" if published is not None else "-")
    return f"| {' | '.join([*cells, setting.against])} |"


def gains_of(
    setting: Setting, rounds: int, device: str, dtype: torch.dtype
) -> tuple[float, float, float]:
    """Gains of the forward pass, of the backward pass, and of both together."""
    forward, both = {}, {}
    for name, (first, second) in jobs(setting, device, dtype).items():
        forward[name], both[name] = first, second
    took = measure(forward, rounds, of=f"{setting.mechanism}, {PASSES[0]}")
    whole = measure(both, rounds, of=f"{setting.mechanism}, {PASSES[1]}")
    back = {
        name: [max(b - statistics.median(took[name]), 1e-9) for b in whole[name]] for name in whole
    }
    ahead, behind, together = (median_ratio(t["dense"], t["sparse"]) for t in (took, back, whole))
    return ahead, behind, together


def jobs(setting: Setting, device: str, dtype: torch.dtype) -> dict[str, tuple[Job, Job]]:
    """(forward, forward and backward) of dense attention and of the mechanism."""
    generator = torch.Generator().manual_seed(0)
    n = 1
    for length in setting.grid:
        n *= length
    dim = setting.heads * setting.width

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, x = random(1, setting.heads, n, setting.width), None
    k, v = (random(1, setting.kv_heads, n, setting.width) for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    g = random(1, setting.heads, n, setting.width)
    if "tokens" in mechanism_class(setting.mechanism).reads:
        x = random(1, n, dim)
    torch.manual_seed(0)
    layer = create_mechanism(setting.mechanism, dim, setting.heads, **setting.options)
    layer = layer.to(device, dtype)
    grid = setting.grid if not setting.causal or 0 not in layer.entry.grid else None
    mask = None
    if setting.masked:
        mask = torch.zeros(1, 1, n, n, device=device, dtype=dtype)
        mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu_(1), -torch.inf)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=setting.causal and mask is None,
            enable_gqa=setting.kv_heads < setting.heads,
        )  # fmt: skip

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(q, k, v, grid, x=x, causal=setting.causal)

    runs = {"dense": dense, "sparse": sparse}
    return {name: forward_and_both(run, leaves, g) for name, run in runs.items()}
