"""Compares the speed of published settings with dense attention and with other installed libraries.

Each setting consists of the queries, keys and values of one layer, with the number of tokens for which the
paper reports its speed. The published figures were measured on other GPUs, with other kernels for dense
attention and with different surrounding layers, which are described in ``against``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention import create_mechanism, mechanism_class
from xattn.eval.bench.attention import DENSE
from xattn.kernels.block_sparse.box import causal, neighbourhood
from xattn.runtime.measuring import Job, forward_and_both

OURS = "xattn"


@dataclass(frozen=True)
class Setting:
    """The setting of one paper, and the speed-ups over dense attention that the paper reports.

    Attributes:
        grid: the grid of tokens, or one number for a sequence.
        heads, kv_heads: the number of query heads, and of key and value heads.
        width: the width of all heads.
        against: how the paper measured its figures.
        options: the options of the mechanism.
        small: the options for 64 tokens.
        masked: whether dense attention gets a mask of all query-key pairs, as in the paper.
        forward, backward, both: the published speed-ups; None if there are none.
    """

    mechanism: str
    grid: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int
    against: str
    options: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = True
    masked: bool = False
    forward: float | None = None
    backward: float | None = None
    both: float | None = None

    def shrunk(self) -> Setting:
        """The same setting with 64 tokens and 4 heads of width 8."""
        grid = (8, 8) if len(self.grid) == 2 else (64,)
        kv = 4 if self.kv_heads == self.heads else 2
        return replace(self, grid=grid, heads=4, kv_heads=kv, width=8, options=self.small)


SETTINGS = (
    Setting(
        "nsa", (65536,), 64, 4, 128,
        "A100; Triton's FlashAttention-2; keys 192 and values 128 wide (here both 128)",
        {"block": 32, "stride": 16, "select_block": 64, "selected": 16, "window": 512},
        {"block": 8, "stride": 4, "select_block": 8, "selected": 3, "window": 4},
        forward=9.0, backward=6.0,
    ),
    Setting(
        "infllm_v2", (65536,), 32, 2, 128, "H100; FlashAttention; 64 blocks of 64 read in all",
        {"block": 64, "stride": 16, "kernel": 32, "local": 32, "selected": 64},
        {"block": 8, "stride": 4, "kernel": 8, "local": 1, "selected": 4}, both=2.8,
    ),
    Setting(
        "llsa", (256, 256), 6, 6, 64,
        "GPU not stated; 28.3x is inference of attention, 6.1x training of a whole DiT",
        {"levels": 2, "selected": 8, "block": 4}, {"selected": 4, "block": 2},
        causal=False, forward=28.3, backward=6.1,
    ),
    Setting(
        "dma", (32768,), 2, 1, 64,
        "A100; attention with a stored mask and bias of all pairs, as here",
        {"window": 1024}, {"window": 8}, masked=True, forward=49.8,
    ),
    Setting(
        "gna", (256, 256), 24, 24, 128,
        "B200; the paper gives whole generative models, 28 to 46 % faster from end to end",
        {"kernel": (80, 80), "stride": (16, 16)}, {"kernel": (4, 4), "stride": (2, 2)}, causal=False,
    ),
    Setting(
        "agent", (64, 64), 8, 8, 64, "the paper gives whole networks",
        {"agents": 49, "training_free": True}, {"agents": 4, "training_free": True}, causal=False,
    ),
    Setting(
        "hip", (32768,), 32, 8, 128, "the paper gives latencies of whole language models",
        {"keep": 512}, {"keep": 16, "block": 4},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """The tensors of a setting on a device.

    ``q`` is (1, H, N, D), ``k`` and ``v`` are (1, Hk, N, D), ``grad`` is the gradient of the output, and
    ``x`` are the layer's input tokens (None if the mechanism does not need them).
    """

    setting: Setting
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    x: Tensor | None

    def jobs(self, what: str) -> tuple[Job, Job]:
        """Two jobs for ``DENSE``, ``OURS`` or one of ``OTHERS``: the forward pass alone, and the forward
        and backward pass."""
        make = {DENSE: _dense, OURS: _ours}.get(what) or OTHERS[what][0]
        leaves = [t.clone().requires_grad_() for t in (self.q, self.k, self.v)]
        return forward_and_both(make(self), leaves, self.grad)


def layer_of(setting: Setting, device: torch.device, dtype: torch.dtype) -> Layer:
    n, dim = math.prod(setting.grid), setting.heads * setting.width
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    q, grad = (random(1, setting.heads, n, setting.width) for _ in range(2))
    k, v = (random(1, setting.kv_heads, n, setting.width) for _ in range(2))
    reads = "tokens" in mechanism_class(setting.mechanism).reads
    return Layer(setting, q, k, v, grad, random(1, n, dim) if reads else None)


def other_libraries(setting: Setting) -> list[str]:
    """The installed libraries that can compute this setting or the dense attention for it."""
    return [
        name for name, (_, of) in OTHERS.items() if setting.mechanism in of and _installed(name)
    ]


def _installed(name: str) -> bool:
    try:
        import_module(name)
    except Exception:  # a library that was built for another version can raise any error
        return False
    return True


Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(layer: Layer) -> Run:
    s, q = layer.setting, layer.q
    torch.manual_seed(0)
    made = create_mechanism(s.mechanism, s.heads * s.width, s.heads, **s.options)
    made = made.to(q.device, q.dtype)
    grid = s.grid if not s.causal or 0 not in made.entry.grid else None
    return lambda q, k, v: made(q, k, v, grid, x=layer.x, causal=s.causal)


def _dense(layer: Layer) -> Run:
    s, q, mask = layer.setting, layer.q, None
    if s.masked:
        n = q.shape[2]
        mask = q.new_zeros(1, 1, n, n)
        mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu_(1), -torch.inf)
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=s.causal and mask is None, enable_gqa=s.kv_heads < s.heads
    )


def _flash(layer: Layer) -> Run:
    run = import_module("flash_attn").flash_attn_func
    causal = layer.setting.causal
    return lambda q, k, v: _heads_last(lambda *x: run(*x, causal=causal), q, k, v)


def _flex(layer: Layer) -> Run:
    """Causal attention, or attention in windows on a grid, by flex attention with a block mask."""
    flex = import_module("torch.nn.attention.flex_attention")
    s, device, n = layer.setting, layer.q.device, layer.q.shape[2]
    if s.causal:
        box = causal(n).to(device)
    else:
        box = neighbourhood(s.grid, s.options["kernel"], s.options["stride"]).to(device)

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        at = box.position[j]
        return ((box.low[i] <= at) & (at <= box.high[i])).all(-1)

    mask = torch.compile(flex.create_block_mask)(seen, None, None, n, n, device=device)
    run = torch.compile(flex.flex_attention)
    return lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=s.kv_heads < s.heads)


def _natten(layer: Layer) -> Run:
    s = layer.setting
    run = getattr(import_module("natten"), f"na{len(s.grid)}d")

    def tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, s.grid) for x in (q, k, v))
        o = run(q, k, v, kernel_size=s.options["kernel"], stride=s.options["stride"])
        return o.flatten(1, len(s.grid))

    return lambda q, k, v: _heads_last(tokens, q, k, v)


def _fla(layer: Layer) -> Run:
    run, s = import_module("fla.ops.nsa").parallel_nsa, layer.setting
    gates = layer.q.new_ones(3, 1, layer.q.shape[2], s.heads).unbind(0)
    options = s.options
    sizes = {"block_size": options["select_block"], "window_size": options["window"]}
    return lambda q, k, v: _heads_last(
        lambda *x: run(*x, *gates, block_counts=options["selected"], **sizes), q, k, v
    )


def _heads_last(run: Run, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call ``run`` with tensors of shape (B, N, H, D), and return its result as (B, H, N, D)."""
    return run(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


EVERY = tuple(setting.mechanism for setting in SETTINGS)
# For each module, the function that makes a run, and the mechanisms with which it is compared.
OTHERS: dict[str, tuple[Callable[[Layer], Run], tuple[str, ...]]] = {
    "flash_attn": (_flash, EVERY),
    "torch.nn.attention.flex_attention": (_flex, ("dma", "gna")),
    "natten": (_natten, ("gna",)),
    "fla.ops.nsa": (_fla, ("nsa",)),
}
