"""Tiny random CLIP and SigLIP models of transformers, with a tokenizer made here: no files, no network."""

import torch

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"a photo of the cat dog sky grass on small".split()]
VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
TEXT = {
    "vocab_size": len(WORDS), "max_position_embeddings": 12, "hidden_size": 24, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def tokenizer():
    """One token a word, with the tokens of begin and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def pair(kind="clip"):
    """A model with weights that make its maps vary, and its tokenizer; ``kind`` is "clip" or "siglip"."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    if kind == "clip":
        config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
        model = CLIPModel(config)
    else:
        text = {**TEXT, "hidden_size": 32, "projection_size": 32}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), tokenizer()
