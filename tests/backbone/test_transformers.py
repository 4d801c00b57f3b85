"""Classifiers of Hugging Face transformers: the same maps as timm's networks, all families, labels, photos."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xattn import TrainConfig, create_explainer, create_head, explain, fit, load_backbone
from xattn.attention import record
from xattn.backbone.families.transformers_models import is_transformers, preprocessing_of_processor
from xattn.cli import main
from xattn.eval.sanity import qk_randomized_backbone
from xattn.explainers import base as explainers
from xattn.explainers import list_explainers
from xattn.heads import list_heads
from xattn.photos.view import prepare

transformers = pytest.importorskip("transformers")
from hugging_face_models import (  # noqa: E402
    CLASSES,
    KINDS,
    SIDE,
    TOKENS,
    network,
    processor,
    timm_twin,
)

TARGET = torch.tensor([1, 3])
LOADED: dict = {}


def images(side=SIDE):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def loaded(kind):
    """The family's backbone; each is made once."""
    if kind not in LOADED:
        LOADED[kind] = load_backbone(network(kind), processor=processor(kind))
    return LOADED[kind]


# ---------------------------------------------------------------------- equal to timm


@pytest.fixture(scope="module")
def pair():
    """A ViT of transformers and timm's with the same weights."""
    theirs = network("vit")
    return load_backbone(theirs, processor=processor("vit")), load_backbone(timm_twin(theirs))


def equal_maps(name, backbones, heads=(None, None), photos=None, target=TARGET):
    photos = images() if photos is None else photos
    options = explainers.EXPLAINERS.entry(name).cases[0]
    ours, timms = (
        create_explainer(name, b, head, **options).attribute(photos, target)
        for b, head in zip(backbones, heads, strict=True)
    )
    assert ours.shape == timms.shape
    scale = (timms.max() - timms.min()).clamp_min(1e-12)
    assert float((ours - timms).abs().max() / scale) < 1e-4


EXPLAINERS = [
    name for name in list_explainers() if "vit" in explainers.EXPLAINERS.entry(name).networks
]


# FullGrad scales each layer's part to [0, 1]: queries, keys and values are one layer in timm, three here.
# token_path follows the class token through timm's own blocks alone.
@pytest.mark.parametrize(
    "name", [name for name in EXPLAINERS if name not in ("head", "fullgrad", "token_path")]
)
def test_maps_equal_those_of_timm_with_the_same_weights(name, pair):
    equal_maps(name, pair)


# tokens follows the class token through timm's own blocks alone; copies have the names of their blocks.
@pytest.mark.parametrize("name", [name for name in list_heads() if name not in ("tokens", "copy")])
def test_a_heads_maps_equal_those_of_timm(name, pair):
    torch.manual_seed(0)
    heads = [create_head(name, backbone) for backbone in pair]
    heads[0].load_state_dict(heads[1].state_dict())
    equal_maps("head", pair, heads)


def test_logits_taps_and_prefix_tokens_equal_those_of_timm(pair):
    ours, timms = (backbone(images()) for backbone in pair)
    assert pair[0].taps == pair[1].taps == ("norm1.1", "norm1.2", "norm1.3")
    found, expected = ([t.logits, *t.maps, t.prefix, *t.prefixes] for t in (ours, timms))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_randomised_queries_and_keys_are_those_of_timm(pair):
    randomised = [qk_randomized_backbone(backbone) for backbone in pair]
    equal_maps("raw_attention", randomised)
    assert not torch.allclose(randomised[0].logits(images()), pair[0].logits(images()))


# ---------------------------------------------------------------------- every family


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_networks_own(kind):
    backbone = loaded(kind)
    x = backbone.normalize(images())
    with torch.no_grad():
        own = backbone.model.network(x).logits
    assert torch.equal(backbone.logits_normalized(x), own)
    assert torch.equal(backbone.forward_normalized(x).logits, own)
    assert not backbone.adapter and backbone.num_classes == CLASSES


@pytest.mark.parametrize("kind", KINDS)
def test_taps_are_norms_before_attention_or_stages_of_falling_resolution(kind):
    backbone = loaded(kind)
    if kind in TOKENS:
        names = ("layernorm_before", "norm1", "layer_norm1")
        layers = dict(backbone.model.blocks[3].layer.named_children())
        (norm,) = (layers[name] for name in names if name in layers)
        read = []
        hook = norm.register_forward_hook(lambda m, a, out: read.append(out))
        taps = backbone(images())
        hook.remove()
        prefix = backbone.prefix_tokens
        assert backbone.is_vit and backbone.taps[-1] == "norm1.3"
        assert torch.allclose(
            taps.maps[-1].flatten(2).transpose(1, 2), read[0][:, prefix:], atol=1e-5
        )
    else:
        areas = [h * w for h, w in backbone.tap_sizes]
        assert not backbone.is_vit and backbone.taps[-1] == "head"
        assert areas == sorted(set(areas), reverse=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gradcam", "saliency"])
def test_every_family_has_maps(kind, name):
    maps = create_explainer(name, loaded(kind)).attribute(images(), TARGET)
    assert maps.isfinite().all() and maps.max() > maps.min()


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("vit", "vit.layers.2.layernorm_before"), ("resnet", "resnet.encoder.stages.2")],
)
def test_a_layer_is_found_by_its_own_name(kind, layer):
    backbone = loaded(kind)
    module = backbone.model.network.get_submodule(layer)
    maps = [
        create_explainer("gradcam", backbone, layer=named).attribute(images(), TARGET)
        for named in (layer, module)
    ]
    assert maps[0].shape == (2, 1, 4, 4) and torch.equal(*maps)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("name", ["rollout", "generic_relevance", "attn_lrp"])
def test_where_attention_is_global_it_is_read(kind, name):
    maps = create_explainer(name, loaded(kind)).attribute(images(), TARGET)
    assert maps.shape == (2, 1, 4, 4) and maps.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_trains(kind, tmp_path):
    write_photo(tmp_path / "photos" / "0.png")
    backbone = loaded(kind)
    head = create_head("ttame", backbone, fusion="per_class")
    before = {name: value.clone() for name, value in head.state_dict().items()}
    config = TrainConfig("small", epochs=1, batch_size=1, workers=0)
    fit(head, backbone, tmp_path / "photos", config, progress=False)
    assert any(not torch.equal(before[name], value) for name, value in head.state_dict().items())


def write_photo(path, size=(71, 54)):
    """A photo of smooth noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(path)
    return path


@pytest.mark.parametrize("kind", ["vit", "deit", "beit", "dinov2", "siglip", "resnet"])
@pytest.mark.parametrize("size", [(71, 54), (53, 80), (90, 65)])
def test_the_crop_is_the_image_processors(kind, size, tmp_path):
    photo = Image.open(write_photo(tmp_path / "photo.png", size))
    for backend, levels in (("", 2.01), ("Pil", 0.01)):  # torchvision rounds otherwise than Pillow
        theirs = processor(kind, backend=backend)
        preprocessing = preprocessing_of_processor(theirs)
        expected = theirs(photo, return_tensors="pt").pixel_values
        pixels = prepare(photo, preprocessing)[0]
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std)
        )
        found = ((pixels - mean) / std)[None]
        assert found.shape == expected.shape
        assert float((255 * std * (found - expected)).abs().max()) < levels


def test_another_size_interpolates_the_positions():
    theirs = network("vit")
    backbone = load_backbone(theirs, processor=processor("vit"), input_size=96)
    x = backbone.normalize(images(96))
    with torch.no_grad():
        own = theirs(x, interpolate_pos_encoding=True).logits
    assert torch.allclose(backbone.logits_normalized(x), own, atol=1e-5)
    assert create_explainer("rollout", backbone).attribute(images(96), 1).shape == (2, 1, 6, 6)


def test_dinov2s_rollout_starts_at_the_class_token_and_the_mean_patch():
    backbone = loaded("dinov2")
    rows = [
        create_explainer("raw_attention", backbone, start=start).attribute(images(), TARGET)
        for start in ("auto", "class", "patches")
    ]
    assert torch.allclose(rows[0], (rows[1] + rows[2]) / 2, atol=1e-6)


# ---------------------------------------------------------------------- recording


@pytest.mark.parametrize("kind", TOKENS)
def test_eager_attention_is_recorded(kind):
    theirs = network(kind)
    theirs.set_attn_implementation("eager")
    x = images()
    with torch.no_grad():
        written_out = theirs(x, output_attentions=True).attentions
        with record(theirs) as calls:
            logits = theirs(x).logits
    *calls, pooled = calls if kind == "siglip" else (*calls, None)  # its pooling head attends, too
    assert pooled is None or pooled.operator.shape[2] == 1
    for call, expected in zip(calls, written_out, strict=True):
        assert torch.allclose(call.operator.tile(slice(None), slice(None)), expected, atol=1e-5)
    config = getattr(theirs.config, "vision_config", theirs.config)
    assert config._attn_implementation == "eager", "put back"
    assert torch.allclose(logits, theirs(x).logits, atol=1e-5)


def test_explainers_read_eager_attention_as_they_read_sdpa(pair):
    eager = network("vit")
    eager.set_attn_implementation("eager")
    backbone = load_backbone(eager, processor=processor("vit"))
    for name in ("rollout", "attn_lrp"):
        equal_maps(name, (backbone, pair[1]))


# ---------------------------------------------------------------------- labels and tasks


def test_labels_are_those_of_the_config():
    named = network("vit", id2label={0: "cat", 1: "dog", 2: "bird"}, num_labels=3)
    assert load_backbone(named, processor=processor("vit")).class_names == ["cat", "dog", "bird"]
    given = load_backbone(named, processor=processor("vit"), class_names=["a", "b", "c"])
    assert given.class_names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "task", "names"),
    [
        ({}, "multiclass", ["LABEL_0", "LABEL_1"]),
        ({"problem_type": "multi_label_classification"}, "multilabel", ["LABEL_0", "LABEL_1"]),
        ({"num_labels": 1}, "binary", ["negative", "positive"]),
        ({"num_labels": 1, "id2label": {0: "tumour"}}, "binary", ["not tumour", "tumour"]),
    ],
)
def test_the_task_is_that_of_the_config(options, task, names):
    theirs = network("vit", **{"num_labels": 2, **options})
    backbone = load_backbone(theirs, processor=processor("vit"))
    assert (backbone.task, backbone.class_names) == (task, names)


def test_an_encoder_has_features_and_no_classes():
    backbone = load_backbone(network("vit", num_labels=0), processor=processor("vit"))
    assert not backbone.has_classes and backbone.class_names[0] == "feature 0"


def test_a_crop_that_is_larger_than_the_photo_is_padded_as_the_processor_does(tmp_path):
    photo = Image.open(write_photo(tmp_path / "photo.png", (71, 54)))
    theirs = transformers.BitImageProcessorPil(
        size={"shortest_edge": 58}, crop_size=64, do_normalize=False
    )
    pixels = prepare(photo, preprocessing_of_processor(theirs))[0]
    assert torch.allclose(pixels[None], theirs(photo, return_tensors="pt").pixel_values, atol=1e-4)


@pytest.mark.parametrize("without", ["do_normalize", "do_rescale"])
def test_pixels_are_normalised_as_the_processor_does(without):
    made = transformers.ViTImageProcessor(**{without: False})
    found = preprocessing_of_processor(made)
    photo = Image.new("RGB", (300, 200), (255, 51, 0))
    expected = made(photo, return_tensors="pt").pixel_values[0, :, 0, 0]
    pixels = torch.tensor([1.0, 0.2, 0.0])
    values = (pixels - torch.tensor(found.mean)) / torch.tensor(found.std)
    assert torch.allclose(values, expected, atol=1e-3)


# ---------------------------------------------------------------------- by name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fine-tuned ViT as save_pretrained writes it."""
    place = tmp_path_factory.mktemp("mine")
    network("vit", id2label=dict(enumerate("abcde"))).save_pretrained(place)
    processor("vit").save_pretrained(place)
    return place


def test_a_folder_is_loaded_by_name(folder):
    backbone = load_backbone(f"transformers:{folder}")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder)
    again = load_backbone(theirs, processor=processor("vit"))
    assert backbone.name == again.name == f"transformers:{folder}"
    assert backbone.fingerprint == again.fingerprint
    assert backbone.preprocessing == again.preprocessing
    assert backbone.class_names == ["a", "b", "c", "d", "e"]
    assert load_backbone(f"transformers:{folder}", None).fingerprint != backbone.fingerprint


def test_commands_take_the_folder(folder, tmp_path, capsys):
    photo = write_photo(tmp_path / "photo.png")
    words = ["explain", str(photo), "-b", f"transformers:{folder}", "--explainers", "rollout"]
    assert main([*words, "--classes", "c", "--output", str(tmp_path / "out")]) == 0
    assert "photo.png: c (" in capsys.readouterr().out


def test_explain_names_the_classes(folder, tmp_path):
    backbone = load_backbone(f"transformers:{folder}")
    found = explain(write_photo(tmp_path / "photo.png"), backbone, explainer="gradcam", top=2)
    assert {one.target_name for one in found} <= set("abcde")


def test_a_missing_extra_is_named_by_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'run: pip install "xattn\[transformers\]"$'):
        load_backbone("transformers:google/vit-base-patch16-224")


def test_transformers_is_imported_only_when_asked_for():
    code = "import sys, xattn.backbone, xattn.explainers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_modules_of_timm_are_none_of_transformers(pair):
    assert is_transformers(pair[0].model.network) and not is_transformers(pair[1].model)


# ---------------------------------------------------------------------- the page

SHOWN = {
    "`gradcam`, `saliency`, head `ttame`": ("gradcam", "saliency", "head ttame"),
    "`cam`, heads `evidence`, `pointer`": ("cam", "head evidence", "head pointer"),
    "head `csa`": ("head csa",),
    "`rollout`, `generic_relevance`, `legrad`": ("rollout", "generic_relevance", "legrad"),
    "`attn_lrp`, `libragrad`": ("attn_lrp", "libragrad"),
    "`lrp`": ("lrp",),
}


def explains(method, kind):
    """ "yes", "`head`" where the final tokens have to be tapped, or "no"."""
    backbone = loaded(kind)
    for answer, taps in (("yes", backbone.taps), ("`head`", (*backbone.taps[1:], "head"))):
        try:
            own = backbone.with_taps(taps)
            if method.startswith("head "):
                create_head(method.removeprefix("head "), own)
            else:
                create_explainer(method, own)
            return answer
        except ValueError:
            continue
    return "no"


def row(kind):
    cells = [{explains(method, kind) for method in methods} for methods in SHOWN.values()]
    name = type(loaded(kind).model.network).__name__
    return f"| `{kind}` | `{name}` | {' | '.join(' or '.join(sorted(cell)) for cell in cells)} |"


def test_the_pages_table_says_what_explains_what():
    """The lines of ``docs/transformers.md`` are printed where they are not these."""
    heading = f"| `model_type` | class | {' | '.join(SHOWN)} |\n|{' :-- |' * (2 + len(SHOWN))}"
    table = "\n".join([heading, *map(row, KINDS)])
    page = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"
    assert table in page.read_text(encoding="utf-8"), table
