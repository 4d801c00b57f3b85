"""Class-semantic attention: its limit cases over time and patches, the head, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attentive_fakes import CLASSES, GRID, WIDTH, make, random_tokens, vit
from torch import nn

import xattn
from xattn.heads import create_head
from xattn.heads.probing.csa import ClassSemanticAttention, evidence_rows


def attention(evidence=4, features=6, hidden=5, seed=0, **options):
    torch.manual_seed(seed)
    return ClassSemanticAttention(evidence, features, hidden, **options).double()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zero_last(module):
    for branch in (module.channels, module.places):
        nn.init.zeros_(branch[-1].weight)
        nn.init.zeros_(branch[-1].bias)


def test_it_equals_its_equations():
    module = attention(bins=3)
    r, f = draw(2, 4, 12), draw(2, 6, 12, seed=2)
    pooled = r.unflatten(2, (3, 4)).mean(3).flatten(1)
    first, last = module.channels[2], module.channels[4]
    s_c = (last.weight @ (first.weight @ pooled.T + first.bias[:, None]).relu()).T + last.bias
    s_t = torch.nn.functional.pad(r, (1, 1)).unfold(2, 3, 1)  # (B, C, T, 3)
    one, two = module.places[0], module.places[2]
    hidden = (torch.einsum("bctk,hck->bht", s_t, one.weight) + one.bias[:, None]).relu()
    hidden = torch.nn.functional.pad(hidden, (1, 1)).unfold(2, 3, 1)
    s_t = torch.einsum("bctk,hck->bht", hidden, two.weight) + two.bias[:, None]
    torch.testing.assert_close(module(r, f), f * s_c.sigmoid()[..., None] + f * s_t.sigmoid())


@pytest.mark.parametrize(("axes", "shape"), [(1, (11,)), (2, (3, 5))])
def test_last_layers_of_zero_leave_the_features(axes, shape):
    module = attention(axes=axes, bins=2)
    zero_last(module)
    f = draw(2, 6, *shape)
    assert torch.equal(module(draw(2, 4, *shape, seed=2), f), f)


@pytest.mark.parametrize("branches", ["both", "channel", "place"])
def test_weights_do_not_depend_on_the_features(branches):
    module = attention(branches=branches)
    r, f, other = draw(2, 4, 9), draw(2, 6, 9, seed=2), draw(2, 6, 9, seed=3)
    weight = module(r, f) / f
    torch.testing.assert_close(module(r, other) / other, weight)
    f.requires_grad_()
    (slope,) = torch.autograd.grad(module(r, f).sum(), f)  # only the direct part: s itself
    torch.testing.assert_close(slope, weight)


def test_one_bin_and_evidence_that_is_the_features_is_squeeze_and_excitation():
    module = attention(6, 6, 3, bins=1, branches="channel")
    f = draw(2, 6, 9)
    first, last = module.channels[2], module.channels[4]
    naive = torch.empty_like(f)
    for b in range(2):
        squeezed = torch.stack([f[b, c].sum() / 9 for c in range(6)])
        excited = last.weight @ (first.weight @ squeezed + first.bias).relu() + last.bias
        for c in range(6):
            naive[b, c] = f[b, c] / (1 + torch.exp(-excited[c]))
    torch.testing.assert_close(module(f, f), naive)


@pytest.mark.parametrize("padding", ["circular", "zeros"])
def test_the_place_branch_shifts_with_the_evidence_where_padding_is_circular(padding):
    module = attention(branches="place", padding=padding)
    r = draw(2, 4, 9)
    shifted = module.scores(r.roll(4, 2))[1].roll(-4, 2)
    assert torch.allclose(shifted, module.scores(r)[1]) == (padding == "circular")


def test_bins_see_when_classes_occur():
    early, late = torch.zeros(2, 1, 4, 16, dtype=torch.float64).unbind()
    early[0, 2, :4] = late[0, 2, -4:] = 3.0
    for bins in (1, 8):
        module = attention(bins=bins)
        same = torch.allclose(module.scores(early)[0], module.scores(late)[0])
        assert same == (bins == 1)


# ---------------------------------------------------------------------- head


def test_the_head_is_gap_where_its_last_layers_are_zero():
    head = make("csa").double()
    zero_last(head.attention)
    tokens = random_tokens(head, dtype=torch.float64)
    attended = head.attend(tokens)
    torch.testing.assert_close(head.pooled(attended), tokens.patches[-1].mean(1))
    uniform = torch.full((3, 1, *GRID), 0.5 / (GRID[0] * GRID[1]), dtype=torch.float64)
    torch.testing.assert_close(head.query_maps(tokens), uniform)


def test_the_head_is_the_module_on_classifier_rows_then_the_mean():
    head = make("csa").double()
    tokens = random_tokens(head, dtype=torch.float64)
    x = tokens.patches[-1]
    rows = vit().classifier_weight.double()
    rows = rows / rows.square().mean().sqrt() / WIDTH**0.5
    maps = torch.stack([x @ row for row in rows], 1).unflatten(2, GRID)
    assert maps.shape[1] == CLASSES
    out = head.attention(maps, x.transpose(1, 2).unflatten(2, GRID)).mean((2, 3))
    torch.testing.assert_close(head.pooled(head.attend(tokens)), out, rtol=1e-5, atol=1e-6)


def test_a_hidden_patch_is_gone_from_both_branches():
    head = make("csa").double()
    tokens = random_tokens(head, dtype=torch.float64)
    attended = head.attend(tokens)
    hidden = attended.with_scores(attended.scores.index_fill(2, torch.tensor([4]), -torch.inf))
    values = attended.values.clone()
    values[:, :, 4] = 0
    without = dataclasses.replace(attended, values=values)
    torch.testing.assert_close(head.pooled(hidden), head.pooled(without))


def test_evidence_is_that_of_the_backbone_whatever_classes_the_head_has():
    head = make("csa", classes=3)
    assert head.classifier.weight.shape[0] == 3 and head.rows.shape == (CLASSES, WIDTH)
    assert "rows" not in head.state_dict()


def test_evidence_without_a_linear_classifier_is_refused():
    bare = xattn.load_backbone("test_resnet", weights=None, input_size=96, num_classes=0)
    inner = xattn.load_backbone(
        "test_resnet", weights=None, input_size=96, num_classes=3, taps=["stage.-2"]
    )
    for backbone, reason in (
        (bare, "has no single linear"),
        (inner, "classifies .* its tap stage"),
    ):
        with pytest.raises(
            ValueError, match=f"^head: csa needs class evidence.*{reason}"
        ) as caught:
            create_head("csa", backbone, classes=3)
        assert "choose a head without it, such as 'gap'" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert evidence_rows(vit()).shape == (CLASSES, WIDTH)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"kernel": 2}, "^kernel: got 2; give an odd"), ({"bins": 0}, "^bins: got 0")],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        attention(**options)
