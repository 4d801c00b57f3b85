"""Dynamic mask attention with blocks kept whole: against its definition, and in its limits."""

import pytest
import torch

from xattn.attention import Inputs, create_mechanism

HEADS, WIDTH = 2, 8


def layer(**options):
    torch.manual_seed(0)
    made = create_mechanism("dma", HEADS * WIDTH, HEADS, **options).double()
    torch.nn.init.normal_(made.a)
    return made


def inputs(n, prefix=0):
    generator = torch.Generator().manual_seed(n)
    q, k, v = torch.randn(3, 2, HEADS, prefix + n, WIDTH, generator=generator).double()
    return Inputs(q, k, v, prefix=prefix)


def defined(made, asked, size):
    """Row by row: blocks of which more than half is among the best keys, or that with the most."""
    b, p = made.key_bias(asked.v[:, :, asked.prefix :]), asked.prefix
    logits = asked.scale * asked.q @ asked.k.transpose(-2, -1)
    logits[..., p:] += b[:, :, None]
    for i in range(b.shape[0]):
        for h in range(HEADS):
            best = set(b[i, h].argsort(descending=True)[: made.window].tolist())
            blocks = torch.arange(b.shape[2]).split(size)
            counts = [len(best & set(block.tolist())) for block in blocks]
            kept = [2 * count > len(block) for count, block in zip(counts, blocks, strict=True)]
            if not any(kept):
                kept[counts.index(max(counts))] = True
            for block, stays in zip(blocks, kept, strict=True):
                if not stays:
                    logits[i, h, :, p + block] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "n, window, size", [(13, 6, 3), (29, 12, 4), (16, 7, 2), (17, 9, 16), (11, 10, 5)]
)
def test_blocks_are_kept_whole_or_not_at_all(n, window, size, prefix):
    made, asked = layer(window=window, block_smooth=size), inputs(n, prefix)
    expected = defined(made, asked, size)
    torch.testing.assert_close(made.attend(asked), expected @ asked.v)
    rows = made.operator(asked).rows(torch.arange(prefix + n))
    torch.testing.assert_close(rows, expected)


def test_blocks_of_one_key_are_dma():
    asked = inputs(19, 1)
    a, b = (layer(window=6, block_smooth=size) for size in (1, None))
    torch.testing.assert_close(a.attend(asked), b.attend(asked))


def test_a_window_of_all_keys_is_attention_with_a_bias():
    asked = inputs(19)
    a, b = (layer(window=19, block_smooth=size) for size in (4, None))
    torch.testing.assert_close(a.attend(asked), b.attend(asked))


def test_the_bias_has_a_gradient_and_the_choice_has_none():
    made, asked = layer(window=6, block_smooth=2), inputs(12)
    made.attend(asked).square().sum().backward()
    assert made.a.grad.abs().min() > 0 < made.score.weight.grad.abs().sum()


def test_the_map_of_kept_patches_shows_whole_blocks():
    made, asked = layer(window=6, block_smooth=4), inputs(16)
    asked = asked.replace(grid=(4, 4))
    kept = made.maps(made.operator(asked), asked)["kept"]
    assert set(kept.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(kept, kept[..., :1].expand(kept.shape))  # a block is a row of this grid


def test_a_block_may_not_look_ahead():
    with pytest.raises(ValueError, match=r"^block_smooth: got 2 with causal attention"):
        layer(window=4, causal=True, block_smooth=2)
    with pytest.raises(ValueError, match=r"^block_smooth: got 2 with causal attention"):
        layer(window=4, block_smooth=2).attend(inputs(9).replace(causal=True))
