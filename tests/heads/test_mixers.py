"""Attention layers between tap and head: the identity untrained, exact shares of what they mixed, training."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from attentive_fakes import HEADS, PREFIXES, WIDTH, cnn, four_taps, make, random_tokens, vit
from torch import nn

from xattn.attention.mechanisms.agent import Agent
from xattn.config import ProbeConfig, TrainConfig
from xattn.explainers import create_explainer
from xattn.explaining.exporting import export
from xattn.explaining.provenance import provenance_of
from xattn.heads import create_head, load_head, parse_options, save_head
from xattn.heads.attentive import AttentiveHead
from xattn.heads.mixer import Mixer
from xattn.heads.probed import probed
from xattn.training.features import cache_features
from xattn.training.fitting import fit
from xattn.training.probe import probe

MIXERS = {
    "softmax": {},
    "agent": {"mixer_options": {"agents": 4}},
    "gna": {"mixer_depth": 2, "mixer_options": {"kernel": 3, "num_heads": 2}},
}
EVERY = [*HEADS, "ttame", "lcam"]


def backbone_of(name, prefix="1 prefix token"):
    return four_taps(prefix) if name == "memetector" else vit(prefix)


def taps_of(backbone, batch=2):
    size = backbone.preprocessing.input_size
    with torch.no_grad():
        return backbone(torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", EVERY)
def test_an_untrained_mixer_changes_nothing_and_leaves_the_head_its_own_tensors(name, mixer):
    backbone = backbone_of(name)
    plain = create_head(name, backbone).eval()
    head = create_head(name, backbone, mixer=mixer, **MIXERS[mixer]).eval()
    own = plain.state_dict()
    assert {k for k in head.state_dict() if not k.startswith("mixer.")} == set(own)
    head.load_state_dict({**head.state_dict(), **own})
    taps = taps_of(backbone)
    torch.testing.assert_close(head(taps), plain(taps))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["gap", "efficient_probe", "linear", "cait", "memetector"])
def test_layers_are_pre_norm_and_residual_and_see_the_prefix_where_the_head_does(name, prefix):
    options = {"prefix": True} if name == "efficient_probe" else {}
    backbone = backbone_of(name, prefix)
    head = make(name, backbone, mixer="softmax", mixer_depth=2, **options)
    count = sum(PREFIXES[prefix]) if head.reads_prefix else 0
    assert head.reads_prefix == (
        name not in ("gap", "linear") or (head.has_class_token and name == "linear")
    )
    tokens = head.tokens(taps_of(backbone))
    x = torch.cat([tokens.prefix[:, :count], tokens.patches[-1]], 1)
    for norm, layer in zip(head.mixer.norms, head.mixer.layers, strict=True):
        u = F.layer_norm(x, (WIDTH,), norm.weight, norm.bias, 1e-6)
        q, k, v = layer.qkv(u)[:, None].chunk(3, -1)  # one head of 32
        x = x + layer.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
    mixed = head.mixed_tokens(tokens)
    torch.testing.assert_close(mixed.patches[-1], x[:, count:], rtol=1e-4, atol=1e-5)
    expected = x[:, :count] if head.reads_prefix else tokens.prefix
    torch.testing.assert_close(mixed.prefix, expected, rtol=1e-4, atol=1e-5)
    for before, after in zip(tokens.patches[:-1], mixed.patches[:-1], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", HEADS)
def test_shares_of_mixed_tokens_are_those_of_the_head_on_them_and_sum_to_the_logit(name, mixer):
    head = make(name, mixer=mixer, **MIXERS[mixer]).double()
    tokens = random_tokens(head, dtype=torch.float64)
    with torch.no_grad():
        maps, rest = head.class_maps(tokens)
        logits, mixed = head.logits(tokens), head.mixed_tokens(tokens)
        plain = copy.copy(head)
        plain._modules = {**head._modules, "mixer": None}
        torch.testing.assert_close(plain.class_maps(mixed).maps, maps)
    torch.testing.assert_close(maps.sum((2, 3)) + rest, logits)
    assert not torch.allclose(plain.logits(tokens), logits)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_every_parameter_of_a_mixer(name):
    backbone = backbone_of(name)
    head = make(name, backbone, mixer="gna", mixer_options={"kernel": 3})
    head(taps_of(backbone)).square().sum().backward()
    # A bias of all keys moves all scores of a query alike.
    still = [k for k, p in head.mixer.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == [] or name == "linear"  # reads the class token: maps of zeros


@pytest.mark.parametrize("name", ["gap", "ttame", "lcam"])
def test_saved_mixers_load_bit_identical_and_config_names_them_only_where_used(name, tmp_path):
    backbone = cnn()
    options = parse_options(["mixer=gna", 'mixer_options={"kernel": [3, 1]}', "mixer_depth=2"])
    head = make(name, backbone, **options)
    save_head(head, tmp_path / "h")
    loaded = load_head(tmp_path / "h", backbone)
    taps = taps_of(backbone)
    with torch.no_grad():
        assert torch.equal(loaded(taps), head(taps))
    assert loaded.options == head.options and loaded.options["mixer_depth"] == 2
    assert not [k for k in create_head(name, backbone).options if k.startswith("mixer")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mixer": "gna", "mixer_options": {"kernel": 9}},
            "does not fit the tap .* 3 x 5 .*kernel",
        ),
        ({"mixer": "gna", "mixer_options": {"kernel": (1, 1, 1)}}, "does not fit the tap"),
        ({"mixer": "agnet"}, "mixer: 'agnet' .*did you mean agent"),
        ({"mixer": "agent", "mixer_options": {"kernel": 3}}, "agent does not take that option"),
        ({"mixer": "softmax", "mixer_options": {"num_heads": 5}}, "num_heads has to divide dim"),
        ({"mixer": "softmax", "mixer_options": {"dim": 5}}, "mixer_options: got 'dim'"),
        (
            {"mixer": "softmax", "mixer_options": {"rotate": nn.Identity()}},
            "got a module as 'rotate'.*give a name",
        ),
        (
            {"mixer": "gna", "mixer_options": {"kernel": torch.tensor(3)}},
            r"got kernel=tensor\(3\),",
        ),
        ({"mixer": "moh", "mixer_options": {"balance": torch.nan}}, "balance=nan, .*config.json"),
        ({"mixer_depth": 2}, "mixer_depth: got 2 without a mixer"),
        ({"mixer_options": {"kernel": 3}}, "mixer_options: got .* without a mixer"),
        ({"mixer": "softmax", "mixer_depth": 65}, "mixer_depth: got 65; give an int from 1 to 64"),
    ],
)
def test_a_mixer_that_does_not_fit_is_refused_at_creation(options, message):
    for name in ("gap", "ttame"):
        with pytest.raises(ValueError, match=message) as error:
            create_head(name, vit(), **options)
        assert "\n" not in str(error.value)


def test_a_head_that_replaces_attend_cannot_have_a_mixer():
    class Own(AttentiveHead):
        name = "own"

        def attend(self, tokens):
            raise NotImplementedError

    with pytest.raises(ValueError, match="mixer: .*own overrides attend.*scores_and_values"):
        Own(vit(), {}, WIDTH, mixer="softmax")


def test_provenance_says_that_shares_are_those_of_mixed_tokens():
    backbone = vit()
    for options, noted in (({}, False), ({"mixer": "softmax"}, True)):
        explainer = create_explainer("head", backbone, make("gap", **options))
        notes = provenance_of(backbone, explainer, "crop").get("notes", [])
        assert bool([n for n in notes if "shares of mixed tokens" in n]) == noted


@pytest.fixture
def balanced(monkeypatch):
    """The mechanism ``agent`` asks training to add 7 + 0 w of its operator, as routers do."""
    operator = Agent.operator

    def with_loss(self, inputs):
        made = operator(self, inputs)
        made.aux = {"balance": 7 + 0 * inputs.q.sum()}
        return made

    monkeypatch.setattr(Agent, "operator", with_loss)


def test_losses_of_a_mixers_mechanisms_are_taken_once_and_only_in_training(balanced):
    head = create_head("gap", vit(), mixer="agent", mixer_depth=2, mixer_options={"agents": 4})
    tokens = random_tokens(head)
    head.train().attend(tokens)
    loss = head.auxiliary_loss()
    assert loss == 14 and loss.requires_grad and head.auxiliary_loss() == 0
    head.eval().attend(tokens)
    assert head.auxiliary_loss() == 0
    copy.deepcopy(head)


def test_losses_of_several_passes_add_up_until_they_are_taken_in_each_thread(balanced):
    head = create_head("gap", vit(), mixer="agent", mixer_options={"agents": 4}).train()
    tokens = random_tokens(head)
    found = []

    def other():
        head.attend(tokens)
        found.append(head.auxiliary_loss().item())

    head.attend(tokens)
    head.attend(tokens)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [7] and head.auxiliary_loss() == 14


def test_copies_and_pickles_hold_no_losses_and_work_on(balanced):
    head = create_head("gap", vit(), mixer="agent", mixer_options={"agents": 4}).train()
    tokens = random_tokens(head)
    head.attend(tokens)
    for mixer in (copy.deepcopy(head).mixer, pickle.loads(pickle.dumps(head.mixer))):
        assert mixer.take_losses() == 0
        mixer(tokens.patches[-1], tokens.grid)
        assert mixer.take_losses() == 7
    assert head.auxiliary_loss() == 7


def test_losses_that_nothing_takes_are_dropped_with_a_warning(balanced, monkeypatch):
    monkeypatch.setattr("xattn.heads.mixer.UNTAKEN", 2)
    head = create_head("gap", vit(), mixer="agent", mixer_options={"agents": 4}).train()
    tokens = random_tokens(head)
    head.attend(tokens)
    head.attend(tokens)
    with pytest.warns(UserWarning, match="agent asked .* in 3 calls.*head.auxiliary_loss()"):
        head.attend(tokens)
    assert head.auxiliary_loss() == 0


@pytest.mark.parametrize(("mixer", "asks"), [("moh", True), ("softmax", False)])
def test_compiled_training_warns_once_that_it_leaves_out_the_losses(mixer, asks):
    head = create_head("gap", vit(), mixer=mixer, mixer_options={"num_heads": 4}).train()
    tokens = random_tokens(head)
    compiled = torch.compile(head.mixer, fullgraph=True, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compiled(tokens.patches[-1], tokens.grid)
    assert sum("compiled training leaves out" in str(w.message) for w in caught) == asks
    assert head.auxiliary_loss() == 0


def test_a_grid_that_the_mechanism_does_not_fit_is_refused_in_the_name_of_the_mixer():
    head = make("gap", mixer="gna", mixer_options={"kernel": 3})
    message = r"mixer: gna does not fit .* grid 2 x 6 .*kernel.*give images of the size"
    with pytest.raises(ValueError, match=message) as error:
        head.mixer(torch.zeros(1, 12, WIDTH), (2, 6))
    assert "\n" not in str(error.value)


def test_probing_and_fitting_add_them_to_their_loss(balanced, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "p").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 24), (60 * i, 90, 200 - 50 * i)).save(tmp_path / "p" / f"{i}.png")
    backbone = vit()
    features = cache_features(backbone, tmp_path / "p", tmp_path / "f", progress=False)
    config = ProbeConfig("small", epochs=1, warmup=0, batch_size=4, lr=1e-3)
    photos = {"train": [0, 1, 2], "validation": [3]}
    losses = {}
    for added in (True, False):
        if not added:
            monkeypatch.setattr(Mixer, "take_losses", lambda self: 0.0)
        options = {"mixer": "agent", "mixer_options": {"agents": 4}}
        torch.manual_seed(0)
        head = create_head("gap", backbone, **options)
        labels = torch.tensor([0, 1, 0, 1])
        done = probe(head, features, labels, config, **photos, progress=False)
        head = create_head("lcam", backbone, fusion="per_class", **options)
        nn.init.zeros_(head.fusion.conv.weight)
        nn.init.zeros_(head.fusion.conv.bias)
        fitted = fit(
            head, backbone, tmp_path / "p", TrainConfig(epochs=1, batch_size=4), progress=False
        )
        losses[added] = done.history[0]["train"], fitted.losses["loss"]
    for with_it, without in zip(losses[True], losses[False], strict=True):
        assert with_it == pytest.approx(without + 7, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_probe_with_a_mixer_is_exported(mixer, tmp_path):
    backbone = vit()
    head = make("efficient_probe", backbone, mixer=mixer, **MIXERS[mixer])
    export(probed(backbone, head), head, tmp_path / "h.pt2")


def test_the_balance_loss_of_a_router_reaches_training():
    head = create_head("gap", vit(), mixer="moh", mixer_options={"num_heads": 4}).train()
    head.attend(random_tokens(head))
    loss = head.auxiliary_loss()
    assert loss > 0 and loss.requires_grad
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in head.mixer.parameters())
