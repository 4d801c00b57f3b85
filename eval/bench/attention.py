"""Compares the time, memory and operations of attention mechanisms with those of dense attention.

    xattn bench attention --tokens 256 1024 4096 16384
    xattn bench attention --only nsa llsa --tokens 16384

Dense attention is ``F.scaled_dot_product_attention``. The inputs are the queries, keys and values of one
layer (one image, 6 heads of width 64) on a square grid; the projections, which are the same for all
mechanisms, are not timed. In each round, every job runs once, one after the other. The gain of a job is the
time of dense attention divided by the job's time in the same round. The table shows the median gain, the
gain to be expected from the number of operations, and the ratio of the two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from xattn.attention import (
    Blocks,
    Inputs,
    Segment,
    create_mechanism,
    list_attention,
    mechanism_class,
)
from xattn.attention.operators.lowering import attend_output
from xattn.kernels.causal_product import causal_product
from xattn.runtime.measuring import PASSES, Job, forward_and_both, median_ratio, peak_memory
from xattn.runtime.measuring import times as measure
from xattn.runtime.process import keep_memory

HEADS, WIDTH, BLOCK = 6, 64, 64
LISTS = (4, 8, 16)
DENSE = "dense (SDPA)"
LOW_RANK, CAUSAL = "low rank", "causal low rank"  # in both, the rank is the width of a head


def bench(
    names: Sequence[str] = (),
    tokens: Sequence[int] = (),
    rounds: int = 5,
    plot: Path | None = None,
) -> Iterator[str]:
    """Yield the lines of the table as they are measured.

    Args:
        names: the mechanisms to measure, besides dense attention and lists of blocks; by default, all
            mechanisms except controls, and low-rank products.
        tokens: numbers of tokens; by default, up to 16,384 on a CPU and up to 131,044 on a GPU.
        rounds: the number of rounds of timing.
        plot: the path of a file for a plot of the times.

    Raises:
        ValueError: a name is unknown, a number of tokens is not a square or is below 64, or ``rounds`` is
            below 1.
    """
    chosen, names = bool(names), tuple(names) or default_mechanisms()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    far = (65536, 131044) if device == "cuda" else ()
    tokens = tuple(tokens) or (256, 1024, 4096, 16384, *far)
    check_arguments(names, tokens, rounds)
    kept = keep_memory()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield (
        f"{device}, {torch.get_num_threads()} threads, {dtype}, {HEADS} heads of {WIDTH}, "
        f"raised allocator thresholds: {kept}"
    )
    yield (
        "\n| attention | tokens | forward ms | gain | operations | share | forward + backward ms | gain "
        "| share | peak MB | dense MB |"
    )
    yield "| :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |"
    times: dict[str, list[tuple[int, float]]] = {}
    compared: list[str] = []
    for n in tokens:
        made, visited = jobs(names, n, device, dtype, low_rank=not chosen)
        forward = measure(
            {name: job[0] for name, job in made.items()}, rounds, of=f"{n} tokens, {PASSES[0]}"
        )
        both = measure(
            {name: job[1] for name, job in made.items()}, rounds, of=f"{n} tokens, {PASSES[1]}"
        )
        memory = {name: peak_memory(job[1]) for name, job in made.items()}
        for name in made:
            times.setdefault(name, []).append((n, statistics.median(forward[name])))
            promised = n * n / visited[name]
            cells = [name, str(n), f"{1e3 * statistics.median(forward[name]):.1f}"]
            gains = [median_ratio(took[DENSE], took[name]) for took in (forward, both)]
            cells += [f"{gains[0]:.2f}x", f"{promised:.1f}x", f"{gains[0] / promised:.2f}"]
            cells += [f"{1e3 * statistics.median(both[name]):.1f}"]
            cells += [f"{gains[1]:.2f}x", f"{gains[1] / promised:.2f}"]
            cells += [f"{memory[name] / 1e6:.1f}", f"{memory[DENSE] / 1e6:.1f}"]
            yield f"| {' | '.join(cells)} |"
        if chosen:
            continue
        slower = [median_ratio(took[CAUSAL], took[LOW_RANK]) for took in (forward, both)]
        compared.append(f"{slower[0]:.2f}x, {slower[1]:.2f}x at {n} tokens")
    if compared:
        yield f"\n{CAUSAL} to {LOW_RANK}, forward, forward + backward: {'; '.join(compared)}"
    if plot is not None:
        draw(times, plot)
        yield f"\nplot: {plot}"


def default_mechanisms() -> tuple[str, ...]:
    """The names of all mechanisms except controls, whose speed does not matter."""
    return tuple(name for name in list_attention() if not mechanism_class(name).entry.control)


def check_arguments(names: Sequence[str], tokens: Sequence[int], rounds: int) -> None:
    """Raise a ``ValueError`` if the arguments of :func:`bench` are not valid."""
    for name in names:
        mechanism_class(name)
    wrong = [n for n in tokens if n < 64 or math.isqrt(n) ** 2 != n]
    if wrong:
        raise ValueError(f"tokens: got {wrong}; give square numbers of at least 64")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}; give at least 1")


def jobs(
    names: Sequence[str],
    n: int,
    device: str,
    dtype: torch.dtype,
    *,
    low_rank: bool = True,
    lists: bool = True,
    options: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[dict[str, tuple[Job, Job]], dict[str, float]]:
    """The jobs of the benchmark for ``n`` tokens.

    The tokens form the largest square grid that fits, and the remaining ones are prefix tokens.
    ``low_rank`` and ``lists`` add rows for low-rank products and for lists of blocks, which are not
    registered mechanisms. ``options`` replace the options with which each mechanism is measured by default.

    Returns:
        For each row, a job for the forward pass and a job for the forward and backward pass; and the number
        of query-key pairs that each row computes.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, HEADS, n, WIDTH)
    q, k, v = torch.randn(shape, generator=generator).to(device, dtype).unbind(0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    g = torch.randn_like(q)
    side = math.isqrt(n)
    prefix = n - side * side

    def pair(run: Any) -> tuple[Job, Job]:
        return forward_and_both(run, leaves, g)

    made = {DENSE: pair(F.scaled_dot_product_attention)}
    visited: dict[str, float] = {DENSE: float(n * n)}
    if low_rank:
        made[LOW_RANK] = pair(lambda q, k, v: q @ (k.transpose(-2, -1) @ v))
        made[CAUSAL] = pair(causal_product)
        visited[LOW_RANK] = visited[CAUSAL] = float(n * WIDTH)
    x = torch.randn(1, n, HEADS * WIDTH, generator=generator).to(device, dtype)
    every = {name: options or mechanism_class(name).entry.bench for name in names}
    for name, given in ((key, one) for key in names for one in every[key]):
        torch.manual_seed(0)
        layer = create_mechanism(name, HEADS * WIDTH, HEADS, **given).to(device, dtype)
        said = [f"{key}={value}" for key, value in given.items() if key != "training_free"]
        label = " ".join([name, *said])
        made[label] = pair(lambda *qkv, layer=layer: layer(*qkv, (side, side), prefix, x=x))
        operator = layer.operator(Inputs(q, k, v, x, (side, side), prefix))
        visited[label] = operator.pairs + operator.selection
    for s in LISTS:
        if s * BLOCK > n or not lists:
            continue
        count = -(-n // BLOCK)
        order = torch.rand(1, HEADS, count, count, generator=generator).argsort(dim=-1)
        blocks = Blocks(order[..., :s].int().contiguous().to(device), BLOCK, BLOCK)
        made[f"block lists S={s}"] = pair(
            lambda q, k, v, blocks=blocks: attend_output(q, [Segment(k, v, blocks)])
        )
        visited[f"block lists S={s}"] = float(n * s * BLOCK)
    return made, visited


def draw(times: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Plot the time of the forward pass over the number of tokens, on logarithmic axes.

    The suffix of ``path`` selects the format, such as PNG or SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for i, (name, points) in enumerate(times.items()):
        tokens, seconds = zip(*points, strict=True)
        dense = name.startswith("dense")
        axes.plot(
            tokens, [1e3 * s for s in seconds], marker="o", label=name,
            color="black" if dense else f"C{i % 10}", linewidth=2 if dense else 1.2,
            linestyle=("-", "--", ":", "-.")[i // 10 % 4], markersize=4,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward, ms")
    ticks = sorted({n for points in times.values() for n, _ in points})
    axes.set_xticks(ticks, [str(n) for n in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
