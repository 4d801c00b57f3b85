"""What record() sees of PyTorch's own attention layers, which have several ways to compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xattn.attention import record

CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 7}, {"add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("mask", [{}, {"attn_mask": CAUSAL}, {"key_padding_mask": PADDED}], ids=str)
@pytest.mark.parametrize("averaged", [True, False])
def test_the_rows_of_a_multihead_attention_are_the_weights_that_it_returns(options, mask, averaged):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()
    query = torch.rand(3, 5, 8)
    key, value = (torch.rand(3, 5, options.get(name, 8)) for name in ("kdim", "vdim"))
    mask = {**mask, "average_attn_weights": averaged}
    with torch.no_grad():
        output, weights = layer(query, key, value, **mask)
        with record() as calls:
            seen = layer(query, key, value, **mask)
    (call,) = calls
    rows = call.operator.rows(torch.arange(5))
    torch.testing.assert_close(rows.mean(1) if averaged else rows, weights)
    torch.testing.assert_close(seen[0], output)
    torch.testing.assert_close(seen[1], weights)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("padding", [None, PADDED])
def test_every_layer_of_an_encoder_is_seen_beside_its_fast_path(mode, padding):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    tokens = torch.rand(3, 5, 8)
    with mode():
        expected = encoder(tokens, src_key_padding_mask=padding)
        with record() as calls:
            found = encoder(tokens, src_key_padding_mask=padding)
    assert len(calls) == 3
    kept = slice(None) if padding is None else ~padding
    torch.testing.assert_close(found[kept], expected[kept])


def test_gradients_reach_the_output_and_the_weights():
    layer = nn.MultiheadAttention(8, 2).eval()
    tokens = torch.rand(5, 1, 8)
    with record() as calls:
        output, weights = layer(tokens, tokens, tokens)
    (gradient,) = torch.autograd.grad(output.sum(), calls[0].output, retain_graph=True)
    assert gradient.shape == (1, 2, 5, 4) and gradient.any()
    assert torch.autograd.grad(weights[0, 0, 0], layer.in_proj_weight)[0].any()


def test_calls_with_one_boolean_mask_share_what_it_adds():
    x, mask = torch.randn(1, 2, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    with record() as calls:
        for _ in range(2):
            F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        mask[:, 1] = True
        F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    biases = [call.operator.bias for call in calls]
    assert biases[0].data_ptr() == biases[1].data_ptr()
    wanted = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    torch.testing.assert_close(calls[2].output, wanted)
    assert not torch.equal(calls[2].output, calls[1].output)
