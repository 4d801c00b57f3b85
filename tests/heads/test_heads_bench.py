"""The benchmark of heads: what it compares gives the same numbers, and its tables are complete."""

from __future__ import annotations

import pytest
import torch
from attentive_fakes import HEADS, random_tokens, vit

from xattn.eval.bench import heads as heads_bench
from xattn.eval.bench.heads import MultiHeadProbe
from xattn.eval.bench.operation_counts import macs
from xattn.heads import create_head


@pytest.mark.parametrize("fused", [True, False])
def test_the_baseline_is_clip_pool_with_keys_and_values_of_all_tokens(fused):
    head = create_head("clip_pool", vit(), heads=4, norm=False)
    tokens = random_tokens(head)
    baseline = MultiHeadProbe(32, 4, fused)
    names = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "proj": "attention.proj"}
    state = dict(head.named_parameters())
    weights = {f"{ours}.weight": state[f"{theirs}.weight"] for ours, theirs in names.items()}
    baseline.load_state_dict({**weights, "query": state["query"]})
    expected = head.pooled(head.attend(tokens))
    torch.testing.assert_close(baseline(tokens.patches[-1]), expected, rtol=1e-4, atol=1e-6)


def test_multiplications_are_those_of_the_formula():
    ep = create_head("efficient_probe", vit(), queries=8)
    assert macs(ep, random_tokens(ep, batch=1)) == 2 * 15 * 8 * 32 + 32 * 32
    mil = create_head("abmilp", vit())
    expected = 4 * 15 * 32 * 32 + 2 * 15 * 15 * 32 + 15 * 32 * 32 + 15 * 32 + 15 * 32
    assert macs(mil, random_tokens(mil, batch=1)) == expected


def test_both_tables_are_whole(monkeypatch):
    monkeypatch.setattr(heads_bench, "CLASSES", 10)
    lines = list(heads_bench.bench(widths=(64,), sides=(3,), batch=2, rounds=1))
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert set(HEADS) <= set(rows)
    assert sum(row == "64" for row in rows) == 4
    with pytest.raises(ValueError, match="rounds, batch: got 0"):
        next(heads_bench.bench(rounds=0))
