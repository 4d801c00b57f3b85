"""Tiny vision-language models of transformers with random weights, one a family; their processors, which
need no download; and what these make of a question about photos.

    model, processor = network("llava"), processor("llava")
    inputs = ask("llava", "what is on the table ?", photos=2)     # input_ids, pixel_values, ...
    folder = save("llava", tmp_path)                              # for AutoModelForImageTextToText, AutoProcessor
"""

import importlib
from functools import cache

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

SIDE = 32  # pixels that a tower sees
WORDS = """a and are at bird black blue bottle cat chair cup describe dog fork forks green grey how image in is it
left many of on one plate red right small table that the there two under what where which white with yellow
. , ? ! :""".split()
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAVA = {"image_token": "<image>", "video_token": "<video>"}
QWEN = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
}  # fmt: skip
IDEFICS = {
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "video_token": "<video>",
    "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
    **{f"tile_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)},
}  # fmt: skip
INTERNVL = {
    "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
    "video_token": "<video>",
}  # fmt: skip
GEMMA = {
    "boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>",
}  # fmt: skip
MISTRAL = {"image_token": "[IMG]", "break_token": "[IMG_BREAK]", "end_token": "[IMG_END]"}
MLLAMA = {"image_token": "<|image|>", "python_token": "<|python_tag|>"}
IMAGE = {"image_token": "<image>"}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
TILES = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [32, 32]]}
CUT = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE["size"]}
PIXELS = {"patch_size": 8, "size": {"shortest_edge": 1024, "longest_edge": 4096}}
# Family: class of its models and (if it has another name) its processor, tokens that its tokenizer knows by
# name, image processor and its options, options of the processor.
KINDS = {
    "llava": ("Llava", LLAVA, "Llava", CUT,
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
    "llava_next": ("LlavaNext", LLAVA, "LlavaNext", {**CUT, **TILES},
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
    "llava_onevision": ("LlavaOnevision", LLAVA, "LlavaOnevision", {**SQUARE, **TILES},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
    "qwen2_vl": ("Qwen2VL", QWEN, "Qwen2VL", PIXELS, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", QWEN, "Qwen2VL", PIXELS, {}),
    "qwen3_vl": ("Qwen3VL", QWEN, "Qwen2VL", PIXELS, {}),
    "internvl": ("InternVL", INTERNVL, "GotOcr2", {**SQUARE, "crop_to_patches": True, "max_patches": 2},
        {"image_seq_length": 4}),
    "idefics3": ("Idefics3", IDEFICS, "Idefics3",
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": SIDE}}, {"image_seq_len": 4}),
    "smolvlm": ("SmolVLM", IDEFICS, "SmolVLM",
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": SIDE}}, {"image_seq_len": 4}),
    "paligemma": ("PaliGemma", IMAGE, "Siglip", {**SQUARE, "image_seq_length": 16}, {}),
    "gemma3": ("Gemma3", GEMMA, "Gemma3", SQUARE, {"image_seq_length": 4}),
    "mistral3": ("Mistral3", MISTRAL, "Pixtral",
        {"size": {"longest_edge": SIDE}, "patch_size": {"height": 4, "width": 4}},
        {"patch_size": 4, "spatial_merge_size": 2}),
    "florence2": ("Florence2", IMAGE, "CLIP", {**SQUARE, "do_center_crop": False, "image_seq_length": 17}, {}),
    "blip": ("Blip", {}, "Blip", SQUARE, {}),
    "blip_2": ("Blip2", {"query_token": "<image>"}, "Blip", SQUARE, {"num_query_tokens": 5}),
    "mllama": ("Mllama", MLLAMA, "Mllama", {**SQUARE, "max_image_tiles": 2}, {}),
}  # fmt: skip
FAMILIES = tuple(KINDS)
PUT_BY_PROCESSOR = ("florence2", "blip", "blip_2")  # their prompts have no place for an image
SEVERAL_IMAGES = tuple(kind for kind in KINDS if kind not in PUT_BY_PROCESSOR)
EAGER_ONLY = ("blip",)  # writes out its softmax
AROUND = {QWEN["image_token"]: "<|vision_start|>{}<|vision_end|>"}
TEMPLATE = (
    "{%% for message in messages %%}{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}"
    "%s{%% elif part['type'] == 'video' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endfor %%}"
)


@cache
def tokenizer(kind):
    """A token a word or mark."""
    named = KINDS[kind][1]
    vocabulary = [*SPECIAL.values(), *dict.fromkeys(named.values()), *WORDS]
    made = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, SPECIAL["unk_token"])
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="left", extra_special_tokens=dict(named), **SPECIAL
    )


def place(kind, medium="image"):
    """What stands for an image, or a clip, in a prompt of this family: ``""`` where its processor puts it."""
    if kind in PUT_BY_PROCESSOR:
        return ""
    named = KINDS[kind][1]
    around = AROUND.get(named.get("image_token"), "{}")
    return around.format(
        next(iter(named.values())) if medium == "image" else named.get("video_token", "")
    )


@cache
def processor(kind):
    """The family's own, of the tokenizer above and images of ``SIDE`` pixels."""
    name, _, images, sizes, options = KINDS[kind]
    classes = {"internvl": "InternVL", "mistral3": "Pixtral", "blip_2": "Blip2"}
    parts = {
        "image_processor": getattr(transformers, f"{images}ImageProcessor")(**sizes),
        "tokenizer": tokenizer(kind),
    }
    made = getattr(transformers, f"{classes.get(kind, name)}Processor")
    video = importlib.import_module(made.__module__)
    if getattr(video, "num2words", "") is None:
        video.num2words = str  # SmolVLM wants it for clips
    films = {"Qwen2_5_VL": "Qwen2VL"}.get(name, name)
    if kind in ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"):
        size = sizes if "qwen" in kind else SQUARE if kind == "llava_onevision" else {}
        parts["video_processor"] = getattr(transformers, f"{films}VideoProcessor")(**size)
    if kind not in ("paligemma", *PUT_BY_PROCESSOR):
        parts["chat_template"] = TEMPLATE % (place(kind), place(kind, "video"))
    return made(**parts, **options)


def photo(seed=0, height=24, width=40):
    """Noise over a gradient of colours."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slope = np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1)
    return Image.fromarray((slope / 2 + generator.integers(0, 128, slope.shape)).astype(np.uint8))


def ask(kind, question="what is on the table ?", photos=1, seed=0):
    """Inputs of a model for one question, or several as a list (padded on the left), each about ``photos``
    photos of its own."""
    questions = [question] if isinstance(question, str) else list(question)
    images = [[photo(seed + 10 * i + j) for j in range(photos)] for i in range(len(questions))]
    texts = [place(kind) * photos + q for q in questions]
    if kind in PUT_BY_PROCESSOR or kind in ("internvl",):
        images = [image for group in images for image in group]
    options = {"padding": True, "return_tensors": "pt"}
    return dict(processor(kind)(images=images, text=texts, **options))


TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
CLIP = {"model_type": "clip_vision_model", **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
QWEN_TOWER = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 8,
    "hidden_size": 24,
    "intermediate_size": 32,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
GEMMA3_TEXT = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 9,
    "query_pre_attn_scalar": 8,
}  # fmt: skip
MLLAMA_TEXT = {
    "cross_attention_layers": [1],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
BART = {
    "model_type": "bart", "d_model": 32, "max_position_embeddings": 128, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "dropout": 0.0,
    **{f"{part}_{name}": size for part in ("encoder", "decoder")
       for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))},
}  # fmt: skip
OPT = {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
DAVIT = {
    "depths": [1, 1], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
    "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4,
    "projection_dim": 32, "drop_path_rate": 0.0,
}  # fmt: skip
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "encoder_hidden_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
MLLAMA_TOWER = {
    "hidden_size": 24, "attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_global_layers": 1, "image_size": SIDE, "patch_size": 8, "max_num_tiles": 2,
    "intermediate_layers_indices": [0], "vision_output_dim": 48,
    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
}  # fmt: skip
# Tokens whose ids a configuration holds.
PLACES = {
    name: name for name in ("image_token", "video_token", "vision_start_token", "vision_end_token")
}
PLACES |= {"context_image_token": "image_token", "query_token": "image_token"}
# Family: vision part, text part, the rest.
CONFIGS = {
    "llava": (CLIP, {"model_type": "llama"}, {"vision_feature_layer": -2}),
    "llava_next": (CLIP, {"model_type": "mistral"}, {"vision_feature_layer": -2, **TILES}),
    "llava_onevision": (SIGLIP, {"model_type": "qwen2"},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", **TILES}),
    "qwen2_vl": ({**QWEN_TOWER, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}, {"rope_parameters": MROPE}, {}),
    "qwen2_5_vl": ({**QWEN_TOWER, "window_size": 32, "fullatt_block_indexes": [1]}, {"rope_parameters": MROPE}, {}),
    "qwen3_vl": ({**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}}, {}),
    "internvl": ({**TOWER, "image_size": [SIDE] * 2, "patch_size": [8, 8]}, {"model_type": "qwen2"},
        {"image_seq_length": 4}),
    "idefics3": (TOWER, {"model_type": "llama"}, {"scale_factor": 2}),
    "smolvlm": (TOWER, {"model_type": "llama"}, {"scale_factor": 2}),
    "paligemma": (SIGLIP, {"model_type": "gemma"}, {"projection_dim": 32}),
    "gemma3": (SIGLIP, GEMMA3_TEXT, {"mm_tokens_per_image": 4}),
    "mistral3": ({"model_type": "pixtral", **TOWER, "patch_size": 4, "head_dim": 12}, {"model_type": "mistral"},
        {"spatial_merge_size": 2}),
    "florence2": (DAVIT, BART, {}),
    "blip": (TOWER, {"encoder_hidden_size": 24, "sep_token_id": 2}, {"projection_dim": 16, "image_text_hidden_size": 16}),
    "blip_2": (TOWER, OPT, {"num_query_tokens": 5, "qformer_config": QFORMER}),
    "mllama": (MLLAMA_TOWER, MLLAMA_TEXT, {}),
}  # fmt: skip


def config(kind, vision=None, **text):
    """Its configuration; ``vision`` and ``text`` are changes of those parts."""
    words = processor(kind).tokenizer
    number = words.convert_tokens_to_ids
    ids = {f"{name}_id": number(token) for name, token in SPECIAL.items() if name != "unk_token"}
    own_vision, own_text, rest = CONFIGS[kind]
    sizes = {} if kind == "florence2" else TEXT
    places = {
        f"{PLACES[name]}_id": number(token)
        for name, token in KINDS[kind][1].items()
        if name in PLACES
    }
    return getattr(transformers, f"{KINDS[kind][0]}Config")(
        vision_config={**own_vision, **(vision or {})},
        text_config={**sizes, **ids, "vocab_size": len(words), **own_text, **text},
        **rest, **places,
    )  # fmt: skip


def network(kind, seed=0, vision=None, **text):
    """A model in float32 whose attention is far from uniform, ready to run."""
    torch.manual_seed(seed)
    made = config(kind, vision, **text)
    model = getattr(transformers, f"{KINDS[kind][0]}ForConditionalGeneration")(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
            if name.endswith(("attn_gate", "mlp_gate", "gate_attn", "gate_ffn")):
                parameter.fill_(0.7)
    words = processor(kind).tokenizer
    model.generation_config.suppress_tokens = sorted(
        {*words.all_special_ids} - {words.eos_token_id}
    )
    return model


def save(kind, folder, **changes):
    """Model and processor as transformers keeps them; returns the folder."""
    network(kind, **changes).save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return folder
