"""Heads with a choice of form: each form's maps are exact, and configs older than the choice load unchanged."""

from __future__ import annotations

import json

import pytest
import torch
from attentive_fakes import CLASSES, GRID, make, map_patches, random_tokens, vit
from test_every_attentive_head import gradient_shares

from xattn.heads import create_head, head_class, list_heads, load_head, read_config, save_head

N = GRID[0] * GRID[1]
EARLIER = [
    ("simpool", {"project": False}),
    ("simpool", {"project": True}),
    ("dino_block", {}),
    ("cbam", {}),
    ("abmilp", {}),
    ("abmilp", {"self_attention": "map"}),
    ("siglip_map", {}),
    ("v_jepa", {}),
    ("cae", {}),
]
FORMS = [(name, {**options, **head_class(name).earlier}) for name, options in EARLIER]
FORMS += [
    ("simpool", {"project": False}),
    ("simpool", {"project": False, "heads": 4, "gamma": 1.25}),
    ("simpool", {"heads": 4}),
    ("abmilp", {"self_attention": "map"}),
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


def without_later_options(folder, name):
    """A config as versions without the choice wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for option in (*head_class(name).earlier, *(["heads"] if name == "simpool" else [])):
        del config["options"][option]
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "options"), EARLIER, ids=str)
def test_a_head_that_was_saved_before_the_choice_computes_what_it_computed(name, options, tmp_path):
    earlier = head_class(name).earlier
    head = make(name, **options, **earlier)
    folder = without_later_options(save_head(head, tmp_path / "h"), name)
    loaded = load_head(folder, vit())
    tokens = random_tokens(head)
    with torch.no_grad():
        assert torch.equal(head.logits(tokens), loaded.logits(tokens))
        assert all(map(torch.equal, head.class_maps(tokens), loaded.class_maps(tokens)))
    assert {key: loaded.options[key] for key in earlier} == earlier
    assert read_config(folder)["options"].items() >= earlier.items()
    again = load_head(save_head(loaded, tmp_path / "again"), vit())
    assert again.options == loaded.options, "which is named from now on"


@pytest.mark.parametrize("name", [n for n in list_heads() if head_class(n).earlier])
def test_the_earlier_form_is_not_the_default(name):
    head = create_head(name, vit(), **({"project": False} if name == "simpool" else {}))
    for option, value in head_class(name).earlier.items():
        assert head.options[option] != value


def test_a_run_from_before_the_choice_goes_on_in_its_form(tmp_path):
    from xattn.training.run_folder import claim

    def run(**options):
        head = create_head("abmilp", vit(), **options).config()
        return {"train": {"workers": 0}, "head": head}

    old = run(projection_bias=False)
    del old["head"]["options"]["projection_bias"]
    (tmp_path / "run.json").write_text(json.dumps(old))
    with claim(tmp_path, run(projection_bias=False), resume=True, main=True, needed=()):
        pass
    with (
        pytest.raises(ValueError, match=r"\(projection_bias: False then, True now\)"),
        claim(tmp_path, run(), resume=True, main=True, needed=()),
    ):
        pass


def test_the_refusal_of_other_settings_names_them_shortly(tmp_path):
    from xattn.training.run_folder import claim

    def run(**train):
        return {"train": train, "head": create_head("gap", vit()).config(), "data": "a" * 99}

    (tmp_path / "run.json").write_text(json.dumps(run(lr=0.1, seed=1, epochs=2, warmup=1)))
    new = {**run(lr=0.2, seed=2, epochs=3, warmup=1), "data": None}
    with (
        pytest.raises(ValueError) as error,
        claim(tmp_path, new, resume=True, main=True, needed=()),
    ):
        pass
    named = "(lr: 0.1 then, 0.2 now; seed: 1 then, 2 now; epochs: 2 then, 3 now and 1 more)"
    assert named in str(error.value)
