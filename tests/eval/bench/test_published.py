"""The papers' settings: both sides do the same task, and other libraries stand beside them."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import create_mechanism
from xattn.eval.bench.published import DENSE, OTHERS, OURS, SETTINGS, layer_of, other_libraries

CPU, FLEX = torch.device("cpu"), "torch.nn.attention.flex_attention"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.mechanism)
def test_the_options_are_those_of_the_mechanism(setting):
    create_mechanism(setting.mechanism, setting.heads * 8, setting.heads, **setting.options)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.mechanism)
def test_both_sides_of_a_ratio_do_the_same_task(setting):
    layer = layer_of(setting.shrunk(), CPU, torch.float32)
    dense, ours = (layer.jobs(what)[0]() for what in (DENSE, OURS))
    assert dense.shape == ours.shape == (1, 4, 64, 8)
    if setting.causal:  # the first token sees itself alone, so dense attention gives its value
        groups = 4 // setting.shrunk().kv_heads
        assert torch.allclose(dense[:, :, 0], layer.v[:, :, 0].repeat_interleave(groups, 1))
    layer.jobs(OURS)[1]()


def heads_last(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(
        1, 2
    )


def test_another_library_gets_the_settings_own_tensors(monkeypatch):
    """Stand-ins with the libraries' layouts, (batch, tokens or grid, heads, width), give dense attention."""

    def natten(q, k, v, kernel_size, stride):
        grid = q.shape[1:3]
        assert (grid, kernel_size, stride) == ((8, 8), (4, 4), (2, 2))
        return heads_last(*(x.flatten(1, 2) for x in (q, k, v)), False).unflatten(1, grid)

    def fla(q, k, v, *gates, block_counts, block_size, window_size):
        assert [x.shape for x in gates] == [q.shape[:3]] * 3
        assert (block_counts, block_size, window_size) == (3, 8, 4)
        return heads_last(q, k, v, True)

    modules = {
        "flash_attn": SimpleNamespace(flash_attn_func=heads_last),
        "natten": SimpleNamespace(na2d=natten),
        "fla.ops.nsa": SimpleNamespace(parallel_nsa=fla),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    asked = set()
    for setting in SETTINGS:
        layer = layer_of(setting.shrunk(), CPU, torch.float32)
        for what in set(other_libraries(setting)) - {FLEX}:
            found = layer.jobs(what)[0]()
            asked.add(what)
            assert torch.allclose(found, layer.jobs(DENSE)[0](), atol=1e-5), (setting, what)
    assert asked == set(OTHERS) - {FLEX}
