"""Measures the gain of skipping half of the heads per token in mixture-of-head attention (moh).

    python -m xattn.eval.studies bench-skipped-heads

There is one image, and there are 6 heads of width 64: one is shared, and each token uses two or all
five of the others. Tokens choose the routed heads evenly, or most tokens choose the same ones
(skewed). "attention" is the product with the values, including gates; "module" adds the projections
and the router. Both sides have the same weights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xattn.attention import Attention, Inputs, SoftmaxOperator, create_attention
from xattn.attention.mechanisms.moh import MoH
from xattn.attention.operators.algebra import GatedOperator
from xattn.eval.bench.attention import HEADS, WIDTH, check_arguments
from xattn.runtime.measuring import PASSES, Job, forward_and_both, median_ratio, times
from xattn.runtime.process import keep_memory

DIM, SHARED = HEADS * WIDTH, 1
HALF, ALL = HEADS // 2 - SHARED, HEADS - SHARED  # routed heads that a token uses
SKEWS = {"even": 0.0, "skewed": 3.0}


def study(tokens: Sequence[int] = (1024,), rounds: int = 15) -> Iterator[str]:
    """Yield the lines of the table as they are measured."""
    check_arguments((), tokens, rounds)
    kept = keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield (
        f"{device}, {torch.get_num_threads()} threads, {dtype}, {HEADS} heads of {WIDTH}, of which a "
        f"token uses {HEADS // 2}, {SHARED} of them shared; raised allocator thresholds: {kept}"
    )
    yield (
        "\n| tokens | routing | share of tokens by head, % | | forward ms, all | half | gain | forward + "
        "backward ms, all | half | gain |"
    )
    yield "| --: | :-- | :-- | :-- | --: | --: | --: | --: | --: | --: |"
    for n in tokens:
        for routing, skew in SKEWS.items():
            x, layers = made(n, skew)
            x, layers = x.to(device, dtype), {k: v.to(device, dtype) for k, v in layers.items()}
            with torch.no_grad():
                used = _moh(layers["half"]).gates(x)[0] != 0
            said = " ".join(f"{100 * s:.0f}" for s in used.float().mean((0, 2)).tolist())
            for level, pairs in jobs(x, layers).items():
                cells = [str(n), routing, said, level]
                for turn in range(2):
                    of = f"{n} tokens, {routing}, {level}, {PASSES[turn]}"
                    took = times({name: pair[turn] for name, pair in pairs.items()}, rounds, of=of)
                    cells += [f"{1e3 * statistics.median(took[name]):.2f}" for name in pairs]
                    cells.append(f"{median_ratio(took['all'], took['half']):.2f}x")
                yield f"| {' | '.join(cells)} |"


def made(n: int, skew: float) -> tuple[Tensor, dict[str, Attention]]:
    """Tokens (1, N, C), and two layers with the same weights, whose tokens use all heads or half.

    The preference for routed heads varies by ``skew`` standard deviations from the first to the last.
    """
    torch.manual_seed(0)
    x = torch.randn(1, n, DIM)
    x[..., 0] = 1.0  # what the heads' preference is multiplied by
    layers = {
        name: create_attention("moh", DIM, HEADS, shared=SHARED, active=active)
        for name, active in (("all", ALL), ("half", HALF))
    }
    router = _moh(layers["all"]).router["routed"].data
    router.normal_(std=DIM**-0.5)[:, 0] = torch.linspace(skew, 0, ALL)
    layers["half"].load_state_dict(layers["all"].state_dict())
    return x, layers


def _moh(layer: Attention) -> MoH:
    assert isinstance(layer.mechanism, MoH)
    return layer.mechanism


def jobs(x: Tensor, layers: dict[str, Attention]) -> dict[str, dict[str, tuple[Job, Job]]]:
    """(forward, forward and backward) jobs of the attention and the whole module, with all heads and
    with half of them."""
    n = x.shape[1]
    side = math.isqrt(n)
    q, k, v = (torch.randn(1, HEADS, n, WIDTH).to(x) for _ in range(3))
    found: dict[str, dict[str, tuple[Job, Job]]] = {"attention": {}, "module": {}}
    for name, layer in layers.items():
        operator = layer.mechanism.operator(Inputs(q, k, v, x, (side, side)))
        assert isinstance(operator, GatedOperator)
        gates, sparse = operator.factor.detach(), operator.sparse

        def attend(
            q: Tensor, k: Tensor, v: Tensor, gates: Tensor = gates, sparse: bool = sparse
        ) -> Tensor:
            gated = GatedOperator(SoftmaxOperator(q, k), gates, signed=False, sparse=sparse)
            return gated.matvec(v)

        def module(x: Tensor, *weights: Tensor, layer: Attention = layer) -> Tensor:
            return layer(x, (side, side))

        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        found["attention"][name] = forward_and_both(attend, leaves, torch.ones_like(q))
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        found["module"][name] = forward_and_both(module, inputs, torch.ones_like(x))
    return found
