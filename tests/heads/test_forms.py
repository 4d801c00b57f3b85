"""Heads with a choice of form: each form's maps are exact, and a saved head keeps its form."""

from __future__ import annotations

import json

import pytest
import torch
from attentive_fakes import CLASSES, GRID, make, map_patches, random_tokens, vit
from test_every_attentive_head import gradient_shares

from xattn.heads import create_head, load_head, save_head

N = GRID[0] * GRID[1]
FORMS = [
    ("simpool", {"project": False, "form": "layer_norm"}),
    ("simpool", {"project": True, "form": "layer_norm"}),
    ("simpool", {"project": False}),
    ("simpool", {"project": False, "heads": 4, "gamma": 1.25}),
    ("simpool", {"heads": 4}),
    ("dino_block", {"form": "class_token"}),
    ("cbam", {"form": "gates"}),
    ("abmilp", {"projection_bias": False}),
    ("abmilp", {"self_attention": "map", "projection_bias": False}),
    ("abmilp", {"self_attention": "map"}),
    ("siglip_map", {"form": "siglip"}),
    ("v_jepa", {"eps": 1e-6}),
    ("cae", {"eps": 1e-6}),
]


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
@pytest.mark.parametrize("prefix", ["1 prefix token", "2 registers alone"])
def test_shares_of_every_form_are_exact(name, options, prefix):
    backbone = vit(prefix)
    head = make(name, backbone, **options)
    tokens = random_tokens(head, prefix=backbone.prefix_tokens)
    with torch.no_grad():
        logits, (maps, rest) = head.logits(tokens), head.class_maps(tokens)
        assert maps.shape == (3, CLASSES, *GRID)
        scale = float(logits.abs().max())
        assert (maps.sum((2, 3)) + rest - logits).abs().max() <= 1e-5 * scale
        one = head.class_maps(tokens, 2)
        torch.testing.assert_close(one.maps, maps[:, 2:3], rtol=1e-4, atol=1e-5 * scale)
    expected = gradient_shares(head, tokens)[..., -N:]
    torch.testing.assert_close(maps.flatten(2), expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_maps_of_every_form_move_with_the_patches(name, options):
    head = make(name, **options)
    tokens = random_tokens(head)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    moved = map_patches(tokens, lambda x: x[:, order])
    with torch.no_grad():
        for maps in (lambda t: head.class_maps(t).maps, head.query_maps):
            found, expected = maps(moved).flatten(2), maps(tokens).flatten(2)[..., order]
            scale = float(expected.abs().max())
            same = torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)
            assert same == head.permutes


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_every_form_is_saved_and_loaded(name, options, tmp_path):
    head = make(name, **options)
    loaded = load_head(save_head(head, tmp_path / "h"), vit())
    tokens = random_tokens(head)
    assert loaded.options == head.options
    with torch.no_grad():
        assert torch.equal(head.logits(tokens), loaded.logits(tokens))


def test_the_refusal_of_other_settings_names_them_shortly(tmp_path):
    from xattn.training.run_folder import claim

    def run(**train):
        return {"train": train, "head": create_head("gap", vit()).config(), "data": "a" * 99}

    (tmp_path / "run.json").write_text(json.dumps(run(lr=0.1, seed=1, epochs=2, warmup=1)))
    new = {**run(lr=0.2, seed=2, epochs=3, warmup=1), "data": None}
    with (
        pytest.raises(ValueError) as error,
        claim(tmp_path, new, resume=True, main=True),
    ):
        pass
    named = "(lr: 0.1 then, 0.2 now; seed: 1 then, 2 now; epochs: 2 then, 3 now and 1 more)"
    assert named in str(error.value)
