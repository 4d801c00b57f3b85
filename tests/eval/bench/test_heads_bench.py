"""The benchmark of heads: what it compares gives the same numbers, and its tables are complete."""

from __future__ import annotations

import pytest
import torch
from attentive_fakes import HEADS, random_tokens, vit

from xattn.eval.probing.probe_table import macs
from xattn.eval.studies.benches import heads as heads_bench
from xattn.eval.studies.benches import pooling
from xattn.eval.studies.benches.heads import MultiHeadProbe
from xattn.heads import create_head


@pytest.mark.parametrize("fused", [True, False])
def test_the_baseline_is_clip_pool_with_keys_and_values_of_all_tokens(fused):
    head = create_head("clip_pool", vit(), heads=4, norm=False)
    head.query.data.mul_(50)  # at the start attention is nearly even
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


def test_all_tables_are_whole(monkeypatch):
    monkeypatch.setattr(heads_bench, "CLASSES", 10)
    lines = list(heads_bench.study(widths=(64,), sides=(3,), batch=2, rounds=1, steps=((7, 2),)))
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert set(HEADS) <= set(rows)
    assert sum(row == "64" for row in rows) == 4
    assert sum(row == "49" for row in rows) == 2  # pooling beside two products
    assert {f"efficient_probe, {name}" for name in ("softmax", "agent", "gna")} <= set(rows)


def test_pooling_written_out_gives_the_loss_and_gradients_of_the_op():
    head = create_head("efficient_probe", vit(), queries=8)
    head.eval()
    job = heads_bench.training_step(head, 3, 32, 5)
    found = []
    for run in (job, heads_bench.written_out(job)):
        run()
        found.append([p.grad for p in head.parameters()])
    for by_op, plain in zip(*found, strict=True):
        torch.testing.assert_close(by_op, plain, rtol=1e-4, atol=1e-6)


def test_the_two_sides_of_the_pooling_table_differ_by_the_softmax_alone():
    q, k, v = (torch.randn(2, n, 5, dtype=torch.float64) for n in (3, 7, 7))
    torch.testing.assert_close(pooling.pooled(q, k, v), pooling.plain(q, k, v))
    torch.testing.assert_close(pooling.products(q, k, v), q @ (k.transpose(1, 2) @ v))
