"""Measures the cost of reading rows of attention while a language model uses its own kernels.

    python -m xattn.eval.studies bench-rows

The model is a Llama with random weights, 4 layers and 4 heads of width 64 that share one key head. The
tables show the peak memory of a pass over the prompt and the time of generation, as medians of ratios
within a round, and for comparison the size of the attention matrices that eager attention stores.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from xattn.attention.record import record
from xattn.eval.studies.small_training import single_thread
from xattn.runtime.measuring import median_ratio, peak_memory, times
from xattn.vlm.reading import QueryRows, read_rows

HEADS, WIDTH, LAYERS = 4, 64, 4


class _ImageRows:
    """Keeps each row averaged over heads, as an attention map does: one vector per call."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def __call__(self, rows: QueryRows) -> None:
        self.total = rows.weights.mean((0, 1, 2))


def language_model(tokens: int, seed: int = 0) -> Any:
    """A Llama for contexts of ``tokens`` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=HEADS * WIDTH, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=1, max_position_embeddings=tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def study(tokens: int = 4103, new_tokens: int = 32, rounds: int = 5) -> Iterator[str]:
    """Yield the lines of two tables: the memory of a pass, and the time of an answer."""
    model = language_model(tokens + new_tokens + 1)
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "plain": nullcontext,
        "rows read": lambda: read_rows(model.model, _ImageRows()),
        "record": lambda: record(model),
    }
    stored = LAYERS * HEADS * tokens**2 * 4
    yield f"{tokens:,} tokens, {LAYERS} layers, {HEADS} heads, float32, one thread"
    yield f"eager attention stores {stored / 1e6:,.0f} MB, a twentieth of which is {stored / 2e7:,.0f}\n"
    yield "| pass over the prompt | peak MB | above plain |"
    yield "| :-- | --: | --: |"
    with single_thread(), torch.no_grad():
        for padded in (0, 1):
            mask = torch.ones_like(ids)
            mask[:, :padded] = 0
            peaks: dict[str, int] = {}
            for name, way in ways.items():

                def prefill(way: Any = way, mask: Tensor = mask) -> None:
                    with way():
                        model(ids, attention_mask=mask, logits_to_keep=1)

                prefill()
                peaks[name] = peak_memory(prefill)
                above = (peaks[name] - peaks["plain"]) / 1e6
                label = f"{name}, {'one token padded' if padded else 'no padding'}"
                yield f"| {label} | {peaks[name] / 1e6:,.0f} | {above:,.1f} |"

        def answer(way: Any, count: int = new_tokens) -> None:
            with way():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                    min_new_tokens=count, do_sample=False, pad_token_id=0,
                )  # fmt: skip

        jobs = {name: lambda way=way: answer(way) for name, way in ways.items()}
        took = times(jobs, rounds, of=f"{new_tokens} tokens")
    yield f"\n| {new_tokens} tokens generated | seconds | of plain |"
    yield "| :-- | --: | --: |"
    for name in ways:
        ratio = median_ratio(took[name], took["plain"])
        yield f"| {name} | {statistics.median(took[name]):.2f} | {ratio:.2f}x |"
