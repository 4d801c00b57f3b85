"""Every family of transformers' image classifiers: its own logits, taps and maps, or why it is refused."""

import pytest
import torch

from xattn import create_explainer, explain, load_backbone
from xattn.attention import record

transformers = pytest.importorskip("transformers")
from hugging_face_models import CLASSES, KINDS, SIDE, SIZES, processor  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as MAPPING,
)

STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
HEADED = {**STAGES, "image_size": SIDE, "num_attention_heads": [1, 1, 2, 2]}
WINDOWS = {"image_size": SIDE, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2]}
PERCEIVER = {
    "image_size": SIDE, "num_latents": 8, "d_latents": 32, "num_blocks": 1,
    "num_self_attends_per_block": 2, "num_self_attention_heads": 2, "num_cross_attention_heads": 1,
}  # fmt: skip
SMALL = {  # of a tiny network of each family
    "bit": {**STAGES, "embedding_size": 8, "num_groups": 4},
    "clip": {"vision_config": SIZES},
    "cvt": {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "data2vec-vision": SIZES,
    "donut-swin": {**WINDOWS, "patch_size": 4, "window_size": 4},
    "efficientnet": {"image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.25,
                     "hidden_dim": 320},
    "focalnet": {
        **WINDOWS, "hidden_sizes": [8, 16, 32], "focal_levels": [1, 1, 1], "focal_windows": [3, 3, 3],
    },
    "hgnet_v2": {
        **STAGES, "embedding_size": 8, "stem_channels": [3, 4, 8], "stage_in_channels": [8, 8, 16, 24],
        "stage_mid_channels": [4, 8, 12, 16], "stage_out_channels": [8, 16, 24, 32],
        "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [2] * 4, "stage_kernel_size": [3] * 4,
        "stage_downsample": [False, True, True, True], "stage_light_block": [False] * 4,
    },
    "hiera": {**WINDOWS, "image_size": [SIDE, SIDE], "mlp_ratio": 2.0, "num_query_pool": 2,
              "masked_unit_size": [4, 4]},
    "ijepa": SIZES,
    "levit": {**HEADED, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2],
              "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
    "metaclip_2": {"vision_config": SIZES},
    "mobilenet_v1": {"image_size": SIDE, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": SIDE, "depth_multiplier": 0.25},
    "mobilevit": {**HEADED, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2,
                  "neck_hidden_sizes": [8, 8, 16, 16, 16, 32, 64]},
    "mobilevitv2": {"image_size": SIDE, "width_multiplier": 0.25},
    "perceiver": PERCEIVER,
    "poolformer": STAGES,
    "pp_lcnet": {"scale": 0.25},
    "pvt": HEADED,
    "pvt_v2": HEADED,
    "regnet": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "segformer": HEADED,
    "swiftformer": {"image_size": SIDE, "embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "textnet": {"image_size": [SIDE, SIDE], "conv_layer_strides": [[1, 2], [1, 2], [2], [1]],
                "conv_layer_kernel_sizes": [[[3, 3], [3, 1]], [[3, 3], [1, 3]], [[3, 3]], [[3, 3]]]},
}  # fmt: skip
REFUSED = {
    "imagegpt": (
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 17},
        "reads input_ids, not pixels",
    ),
    "siglip2": ({"vision_config": {**SIZES, "num_patches": 16}}, "fails on images"),
}
ELSEWHERE = {  # not built here, and why
    "dinat": "needs natten", "shieldgemma2": "a language model", "timm_wrapper": "holds a timm model",
}  # fmt: skip
NAMES = [
    (kind, name)
    for kind, names in MAPPING.items()
    if kind in SMALL
    for name in ([names] if isinstance(names, str) else names)
]
IMAGES = torch.rand(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def network(name, **options):
    """A classifier of five classes, by the name of its class, none of its weights 0."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    made = kind(kind.config_class(num_labels=CLASSES, **options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def test_no_family_is_forgotten():
    assert set(MAPPING) - set(KINDS) == {*SMALL, *REFUSED, *ELSEWHERE}


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_a_family_without_code_of_its_own_has_logits_taps_and_maps(kind, name):
    theirs = network(name, **SMALL[kind])
    backbone = load_backbone(theirs, mean=0.5, std=0.5, input_size=SIDE)
    x = backbone.normalize(IMAGES)
    with torch.no_grad():
        own = theirs(pixel_values=x)[0]
    taps = backbone(IMAGES)
    torch.testing.assert_close(taps.logits, own, rtol=1e-4, atol=1e-4)
    assert all(m.ndim == 4 and min(m.shape[2:]) > 1 and m.std() > 0 for m in taps.maps)
    for method in ("gradcam", "saliency"):
        maps = create_explainer(method, backbone).attribute(IMAGES, torch.arange(CLASSES))
        assert maps.isfinite().all() and maps.max() > maps.min(), method


@pytest.mark.parametrize(("kind", "case"), REFUSED.items(), ids=list(REFUSED))
def test_what_reads_no_pixels_is_refused_in_one_line(kind, case):
    options, reason = case
    with pytest.raises(ValueError, match=reason) as refusal:
        load_backbone(network(MAPPING[kind], **options), mean=0.5, std=0.5, input_size=SIDE)
    assert "\n" not in str(refusal.value) and MAPPING[kind] in str(refusal.value)


def test_what_config_and_processor_say_is_found(tmp_path):
    names = {0: "cat", 1: "dog", 2: "bird", 3: "fish", 4: "none"}
    network("SegformerForImageClassification", **HEADED, id2label=names).save_pretrained(tmp_path)
    processor("vit").save_pretrained(tmp_path)
    backbone = load_backbone(f"transformers:{tmp_path}")
    assert backbone.class_names == list(names.values())
    assert backbone.preprocessing.input_size == (SIDE, SIDE)
    assert backbone.taps[-1] == "network.segformer.stages.3"
    named = load_backbone(f"transformers:{tmp_path}", taps="network.segformer.stages.2")
    assert named.taps == ("network.segformer.stages.2",)
    found = explain(IMAGES[:1], backbone, explainer="gradcam")[0]
    assert found.target_name in names.values()


def test_photos_cannot_be_prepared_without_a_processor():
    with pytest.raises(
        ValueError, match="^processor: a RegNetForImageClassification does not define"
    ):
        load_backbone(network("RegNetForImageClassification", **SMALL["regnet"]))


@pytest.mark.parametrize("name", ["CLIPForImageClassification", "IJepaForImageClassification"])
def test_rows_of_attention_are_recorded(name):
    kind = next(kind for kind, found in NAMES if found == name)
    backbone = load_backbone(network(name, **SMALL[kind]), mean=0.5, std=0.5, input_size=SIDE)
    with torch.no_grad(), record(backbone.model) as calls:
        backbone.logits(IMAGES)
    assert len(calls) == SIZES["num_hidden_layers"]
    rows = calls[-1].operator.rows(torch.tensor([0]))
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows.sum(-1)))
