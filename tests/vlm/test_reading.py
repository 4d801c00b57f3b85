"""Rows that are read beside the model's own kernels: those of eager attention, and nothing changes."""

import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vlm_models import FAMILIES, SEVERAL_IMAGES, ask, network, photo, processor

from xattn.attention.record import record
from xattn.vlm.loading import load_vlm
from xattn.vlm.reading import read_rows

QUESTIONS = {
    "one": {},
    "padded": {"question": ["what is on the table ?", "a cat"]},
    "two": {"photos": 2},
}
CASES = [(k, q) for k in FAMILIES for q in QUESTIONS if q != "two" or k in SEVERAL_IMAGES]


def generate(model, inputs, tokens=4):
    inputs = {k: v.clone() for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip


def tables(model, run):
    """What each module of attention of an eager model returns as its weights, in the order of calls."""
    found, names = [], {}

    def keep(module, args, result):
        if isinstance(result, tuple) and isinstance(result[1], torch.Tensor):
            found.append((names[module], result[1]))

    modules = [(n, m) for n, m in model.named_modules() if "Attention" in type(m).__name__]
    inner = [(n, m) for n, m in modules if not any(o.startswith(f"{n}.") for o, _ in modules)]
    names = {m: n for n, m in inner}
    handles = [m.register_forward_hook(keep) for _, m in inner]
    try:
        return run(), found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("kind", "question"), CASES)
def test_rows_are_those_of_eager_attention_and_nothing_changes(kind, question):
    """Prefill and each step of decoding, of the whole language model."""
    model, inputs = network(kind), ask(kind, **QUESTIONS[question])
    plain, rows = generate(model, inputs), []
    part = model.get_decoder()
    with read_rows(part, rows.append):
        read = generate(model, inputs)
    assert torch.equal(plain.sequences, read.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, read.logits, strict=True))
    model.set_attn_implementation("eager")
    eager, expected = tables(part, lambda: generate(model, inputs))
    assert torch.equal(plain.sequences, eager.sequences)
    assert [r.name for r in rows] == [name for name, _ in expected] and rows
    for got, (_, table) in zip(rows, expected, strict=True):
        torch.testing.assert_close(got.weights, table[:, :, -1:], atol=1e-6, rtol=2e-6)
        torch.testing.assert_close(got.weights.sum(-1), torch.ones(*table.shape[:2], 1))
        assert got.cross or got.offset + table.shape[-1] == got.queries[0] + 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_any_rows_of_a_pass_may_be_asked_for(kind):
    model, inputs = network(kind), ask(kind)
    asked, rows = [5, 0, 3, 1000], []
    if kind == "florence2":
        inputs["decoder_input_ids"] = torch.arange(5, 12)[None]
    with read_rows(model.get_decoder(), rows.append, asked), torch.no_grad():
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        _, expected = tables(model.get_decoder(), lambda: model(**inputs))
    assert [r.queries for r in rows] == [(0, 3, 5)] * len(expected) and rows
    for got, (_, table) in zip(rows, expected, strict=True):
        torch.testing.assert_close(got.weights, table[:, :, [0, 3, 5]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_of_generation_are_those_of_one_pass_over_prompt_and_answer(kind):
    vlm, steps, passed = load_vlm(network(kind), processor(kind)), [], []
    inputs = vlm.inputs([photo()], "what is on the table ?")
    with read_rows(vlm.decoder, steps.append):
        ids = vlm.generate(inputs, 4, {"min_new_tokens": 4}).ids
    forced = vlm.forced(inputs, ids)
    with read_rows(vlm.decoder, passed.append, forced.rows.tolist()):
        vlm.logits(forced, vlm.entered(inputs))
    length = int(forced.rows[-1]) + 1
    assert len(steps) == len(ids) * len(passed) > 0
    for rows in passed:
        own = [r for r in steps if r.name == rows.name]
        assert [r.queries[0] for r in own] == list(rows.queries) == forced.rows.tolist()
        if rows.cross:
            one_by_one, together = torch.cat([r.weights for r in own], 2), rows.weights
        else:
            one_by_one = torch.cat([r.over(length) for r in own], 2)
            together = rows.over(length)
        torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("blip_2", "qformer"), ("florence2", "language_model"), ("gemma3", "vision_tower"),
        ("llava", "vision_tower"), ("mllama", "vision_model"), ("mistral3", "vision_tower"),
    ],
)  # fmt: skip
def test_other_parts_are_read_likewise(kind, part):
    """A tower, the encoder of text, a Q-Former, whose queries' batch SDPA may broadcast."""
    model, inputs, rows = network(kind), ask(kind, photos=1 + (kind == "llava")), []
    part = getattr(model, part, None) or getattr(model.model, part)
    with read_rows(part, rows.append, range(3)):
        generate(model, inputs, 1)
    model.set_attn_implementation("eager")
    _, expected = tables(part, lambda: generate(model, inputs, 1))
    assert [r.name for r in rows] == [name for name, _ in expected]
    for got, (_, table) in zip(rows, expected, strict=True):
        torch.testing.assert_close(got.weights, table[:, :, :3], atol=1e-6, rtol=0)
    assert any(r.cross for r in rows) == (kind in ("blip_2", "florence2"))


def test_windows_of_a_tower_follow_each_other():
    """Qwen2.5-VL attends once for each window; the layer that sees the whole photo, once for each photo."""
    model, rows = network("qwen2_5_vl", vision={"window_size": 16}), []
    with read_rows(model.model.visual, rows.append, range(10_000)):
        generate(model, ask("qwen2_5_vl", photos=2), 1)
    for layer, count in ((0, 8), (1, 2)):
        own = [r for r in rows if r.layer == layer]
        places = [place for r in own for place in r.queries]
        assert len(own) == count and places == list(range(len(places)))
        assert [r.offset for r in own] == [r.queries[0] for r in own]


class OneAttention(nn.Module):
    """Attends from x to itself, once; ``options`` are those of PyTorch's function."""

    def __init__(self, key=None, **options):
        super().__init__()
        self.key, self.options = key, options

    def forward(self, hidden_states):
        x = hidden_states
        return F.scaled_dot_product_attention(x, self.key, self.key, **self.options)


def masks(n, s, seed=0):
    g = torch.Generator().manual_seed(seed)
    seen = torch.rand(2, 1, n, s, generator=g) > 0.4
    seen[..., 0] = True
    return {
        "none": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3},
        "bool": {"attn_mask": seen}, "of all rows": {"attn_mask": seen[:, :, :1]},
        "float, each head": {"attn_mask": torch.randn(2, 4, n, s, generator=g)},
        "two axes": {"attn_mask": seen[0, 0]},
    }  # fmt: skip


@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("mask", masks(1, 1))
def test_rows_are_the_products_with_unit_vectors(mask, keys):
    """A e_j, by PyTorch's own function, for a value that is the identity."""
    torch.manual_seed(1)
    n = s = 7
    q, k = torch.randn(2, 4, n, 6) * 2, torch.randn(2, keys, s, 6)
    options = {**masks(n, s)[mask], "enable_gqa": keys < 4}
    value, rows = torch.eye(s).expand(2, keys, s, s), []
    expected = F.scaled_dot_product_attention(q, k, value, **options)
    module = OneAttention(k, **options)
    with read_rows(module, rows.append, [1, 6]):
        module(q)
    torch.testing.assert_close(rows[0].weights, expected[:, :, [1, 6]], atol=1e-6, rtol=0)


def test_a_query_that_sees_nothing_has_a_row_of_zeros():
    q, rows = torch.randn(1, 2, 3, 4), []
    module = OneAttention(q, attn_mask=torch.tensor([[False] * 3, [True] * 3, [True] * 3]))
    with read_rows(module, rows.append, [0, 1]):
        module(q)
    assert (rows[0].weights[:, :, 0] == 0).all()
    torch.testing.assert_close(rows[0].weights[:, :, 1].sum(-1), torch.ones(1, 2))


def test_a_softcap_is_read_from_the_layer_s_own_table():
    """The text model of PaliGemma 2 has no other kernel than its own."""
    softcap = {
        "model_type": "gemma2",
        "attn_logit_softcapping": 1.5,
        "sliding_window": 9,
        "query_pre_attn_scalar": 8,
    }
    model, rows, inputs = network("paligemma", **softcap), [], ask("paligemma")
    part = model.get_decoder()
    assert model.config.text_config._attn_implementation == "eager"
    with read_rows(part, rows.append):
        _, expected = tables(part, lambda: generate(model, inputs))
    assert len(rows) == len(expected) > 0
    for got, (_, table) in zip(rows, expected, strict=True):
        assert torch.equal(got.weights, table[:, :, -1:])
        assert got.weights.untyped_storage().nbytes() == got.weights.numel() * 4


def test_keys_outside_of_a_window_count_nothing():
    """After 12 tokens of prompt, a layer with a window of 9 holds 9 keys."""
    model, rows = network("gemma3"), []
    with read_rows(model.get_decoder(), rows.append):
        generate(model, ask("gemma3"), 3)
    last = rows[-3:]
    length = last[0].queries[0] + 1
    assert [r.offset for r in last] == [length - 9, length - 9, 0] and length > 12
    over = last[0].over(length + 2)
    assert over.shape[-1] == length + 2
    assert (over[..., : length - 9] == 0).all() and (over[..., length:] == 0).all()
    torch.testing.assert_close(over.sum(), last[0].weights.sum())


def test_half_precision_is_read_in_float32():
    model, rows = network("llava").bfloat16(), []
    inputs = ask("llava")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with read_rows(model.get_decoder(), rows.append):
        generate(model, inputs, 2)
    assert {r.weights.dtype for r in rows} == {torch.float32}
    assert max((r.weights.sum(-1) - 1).abs().max() for r in rows) < 1e-6


def test_nothing_is_kept():
    model, seen = network("qwen2_vl"), []

    def read(rows):
        assert all(old() is None for old in seen)
        seen.append(weakref.ref(rows.weights))
        assert not rows.weights.requires_grad

    with read_rows(model.get_decoder(), read):
        model(**ask("qwen2_vl")).logits.sum().backward()
    assert len(seen) == 3 and all(old() is None for old in seen)


def test_gradients_are_those_of_the_model():
    model, inputs, found = network("idefics3"), ask("idefics3"), []
    for read in (False, True):
        model.zero_grad()
        with read_rows(model, lambda rows: None) if read else nullcontext():
            model(**inputs).logits.sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_error_leaves_nothing_behind():
    model, inputs, rows = network("llava"), ask("llava"), []
    model(**inputs)  # transformers adds hooks of its own
    before = F.scaled_dot_product_attention, hooks(model)

    def refuse(_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), read_rows(model, refuse):
        model(**inputs)
    assert (F.scaled_dot_product_attention, hooks(model)) == before
    part = model.get_decoder()
    with read_rows(part, rows.append):  # a pass that fails inside may be tried again
        with pytest.raises(ValueError):
            model(inputs["input_ids"], pixel_values=inputs["pixel_values"][:, :, :8])
        with pytest.raises(RuntimeError):
            part(inputs_embeds=torch.zeros(1, 4, 31))
        model(**inputs)
    assert [r.name for r in rows] == [f"layers.{i}.self_attn" for i in range(3)]


def test_a_model_that_cannot_be_read_says_so():
    inputs, model = ask("llava"), network("llava", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"model: it drops some attention .* model.eval\(\)"):
        with read_rows(model.train().get_decoder(), print):
            model(**inputs)

    class LinearAttention(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    with pytest.raises(ValueError, match=r"model: 0 \(LinearAttention\) neither calls"):
        module = nn.Sequential(LinearAttention())
        with read_rows(module, print):
            module(torch.zeros(1, 2, 3))


def test_each_thread_reads_its_own_passes():
    """Two threads that run one model at the same time, and one that does not read."""
    model, inputs, barrier = network("llava"), ask("llava"), threading.Barrier(3, timeout=60)
    model(**inputs)
    found, before = {}, hooks(model)

    def run(name):
        rows = []
        with read_rows(model.get_decoder(), rows.append) if name != "plain" else nullcontext():
            barrier.wait()
            with torch.no_grad():
                logits = model(**inputs).logits
            barrier.wait()
        found[name] = rows, logits

    threads = [threading.Thread(target=run, args=[name]) for name in ("a", "b", "plain")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(found[name][0]) for name in ("a", "b", "plain")] == [3, 3, 0]
    assert torch.equal(found["a"][1], found["plain"][1])
    for one, other in zip(found["a"][0], found["b"][0], strict=True):
        assert torch.equal(one.weights, other.weights)
    assert hooks(model) == before


def test_readers_stand_in_each_other_and_in_a_record():
    model, inputs, outer, inner = network("llava"), ask("llava"), [], []
    with read_rows(model.get_decoder(), outer.append), read_rows(model.get_decoder(), inner.append):
        with record(model.get_decoder()) as calls, torch.no_grad():
            model(**inputs)
    assert len(outer) == len(inner) == 3
    for one, other, call in zip(outer, inner, calls[-3:], strict=True):
        assert torch.equal(one.weights, other.weights)
        last = call.operator.rows(torch.tensor([inputs["input_ids"].shape[1] - 1]))
        torch.testing.assert_close(last, one.weights, atol=1e-6, rtol=0)
