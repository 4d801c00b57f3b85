"""Relevance of image and text tokens by the rules of LRP."""

import pytest
import torch
import torch.nn.functional as F
from conversations import conversation, explained


@pytest.mark.parametrize(
    "kind", ["llava", "idefics3", "qwen3_vl", "paligemma", "gemma3", "mistral3", "mllama"]
)
def test_without_biases_the_relevance_of_a_word_sums_to_its_logit(kind):
    context = conversation(kind, asked=[0, 2], score="logit")
    found = explained("cp_lrp", context)
    with torch.no_grad():
        logits = context.scores()[0]
    torch.testing.assert_close(found.image.sum(1) + found.text.sum(1), logits, atol=1e-5, rtol=1e-4)
    assert found.image.abs().sum(1).min() > 0.01


@pytest.fixture
def by_hand(monkeypatch):
    """Make a Llama's backward pass follow the equations of the papers."""
    from transformers.models.llama import modeling_llama as llama

    attend = F.scaled_dot_product_attention

    def part(x, share):
        return share * x + (1 - share) * x.detach()

    def norm(self, x):
        scale = (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * (x * scale.detach())

    def set_rules(method):
        attention = method == "attn_lrp"

        def fused(q, k, v, *args, **options):
            q, k = (part(x, 0.25 if attention else 0) for x in (q, k))
            return attend(q, k, part(v, 0.5 if attention else 1), *args, **options)

        def mlp(self, x):
            gate, up = self.gate_proj(x), self.up_proj(x)
            act = gate * (F.silu(gate) / gate).detach()
            product = part(act * up, 0.5) if attention else act.detach() * up
            return self.down_proj(product)

        monkeypatch.setattr(llama.LlamaRMSNorm, "forward", norm)
        monkeypatch.setattr(llama.LlamaMLP, "forward", mlp)
        monkeypatch.setattr(F, "scaled_dot_product_attention", fused)

    return set_rules


@pytest.mark.parametrize("score", ["logit", "log_prob"])
@pytest.mark.parametrize("method", ["attn_lrp", "cp_lrp"])
def test_relevance_is_gradient_times_input_under_the_papers_rules(method, score, by_hand):
    context = conversation(asked=[0, 3], score=score)
    found = explained(method, context).image
    by_hand(method)
    wanted = (context.gradients() * context.features).sum(2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["florence2", "blip_2", "blip"])
def test_other_kinds_of_models_have_relevance_of_the_image(kind):
    context = conversation(kind, asked=[1])
    found = explained("cp_lrp", context)
    assert found.image.shape == (1, len(context.features)) and found.image.abs().sum() > 0
    assert found.image.isfinite().all()
