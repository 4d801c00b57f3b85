"""Image-text models: the image tower is a backbone, with prompts as classes or a text as the target.

clip = load_clip(CLIPModel.from_pretrained(...), AutoTokenizer.from_pretrained(...))
explain("photo.jpg", clip, explainer="gradcam", target="a photo of a cat")
explain("photo.jpg", clip.with_prompts(["a photo of a cat", "a photo of a dog"]), explainer="gradcam")

text target    cos(e(x), t)                           e(x) and t (D,) of unit length
CLIP           softmax over prompts of s cos + b      Radford et al., arXiv 2103.00020
SigLIP         sigmoid(s cos + b) of each prompt      Zhai et al., arXiv 2303.15343

The image towers of CLIP and SigLIP in ``transformers`` are rebuilt as timm's ViT, with the same weights.

CLIP     class token, a norm before the blocks, post_layernorm, visual_projection -> head
SigLIP   no class token, post_layernorm, attention pooling by a learned query -> attn_pool
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone.backbone import Backbone
from xattn.backbone.loading import load_backbone
from xattn.backbone.scored import BackboneView
from xattn.backbone.targets import Target
from xattn.backbone.weights import load_into
from xattn.photos.classes import Task
from xattn.photos.preprocessing import Preprocessing

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_NAMES = (  # in transformers, then in timm
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("pre_layrnorm", "norm_pre"),
    ("post_layernorm", "norm"),
    ("encoder.layers", "blocks"),
    ("layer_norm", "norm"),
    ("self_attn.out_proj", "attn.proj"),
    ("head.probe", "attn_pool.latent"),
    ("head.attention.out_proj", "attn_pool.proj"),
    ("head.layernorm", "attn_pool.norm"),
    ("head.mlp", "attn_pool.mlp"),
)


def image_tower(vision: nn.Module, projection: nn.Linear | None) -> Any:
    """Build the timm VisionTransformer that computes the same as ``vision`` followed by ``projection``.

    Args:
        vision: a ``CLIPVisionModel`` or ``SiglipVisionModel``.
        projection: a linear layer on the pooled output of ``vision``; None if that output is the embedding.

    Raises:
        ValueError: if timm does not have the activation, or the weights do not fit.
    """
    from timm.layers import get_act_layer
    from timm.models.vision_transformer import VisionTransformer

    config: Any = vision.config
    vision = getattr(vision, "vision_model", vision)  # in transformers 4
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"model: its activation {config.hidden_act!r} is not one of {', '.join(_ACTIVATIONS)}; combine "
            f"the towers with xattn.backbone.families.clip.Clip(image_backbone, encode_text)"
        )
    pooled = hasattr(vision, "head")
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and then replaced
        tower = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0 if projection is None else projection.weight.shape[0],
            global_pool="map" if pooled else "token",
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            class_token=not pooled,
            pre_norm=not pooled,
            norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
            act_layer=get_act_layer(_ACTIVATIONS[config.hidden_act]),
        )
    weights = _under_timms_names(vision.state_dict())
    if projection is not None:
        weight = projection.weight
        weights |= {"head.weight": weight, "head.bias": weight.new_zeros(weight.shape[0])}
    load_into(
        tower,
        weights,
        "model: the weights of its image tower do not fit ({reason}); combine the towers with "
        "xattn.backbone.families.clip.Clip(image_backbone, encode_text)",
    )
    return tower.to(weights["norm.weight"])


def _under_timms_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert an image tower's weights to timm's layout.

    One matrix holds the queries, keys and values of a block; in SigLIP's head, two matrices do."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for theirs, own in _NAMES:
            name = name.replace(theirs, own)
        found[name] = value
    found["pos_embed"] = found["pos_embed"][None]
    if "cls_token" in found:
        found["cls_token"] = found["cls_token"].view(1, 1, -1)
    for name in [name for name in found if ".self_attn.q_proj." in name]:
        three = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        found[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(three)
    for part in ("weight", "bias"):
        if (joint := found.pop(f"head.attention.in_proj_{part}", None)) is not None:
            query, *others = joint.chunk(3)
            found |= {f"attn_pool.q.{part}": query, f"attn_pool.kv.{part}": torch.cat(others)}
    return found


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


class Clip(BackboneView):
    """An image tower with its text tower; the logits (B, D) are image embeddings of unit length.

    Explain it with a text as target, or through :meth:`with_prompts`. Use this class for towers that
    :func:`load_clip` does not handle, such as timm's image tower with the text tower of open_clip:

        Clip(load_backbone("vit_base_patch16_clip_224.openai", num_classes=512),
             lambda texts: model.encode_text(tokenizer(texts)), scale=100.0)

    Args:
        base: a backbone whose outputs (B, D) are image embeddings, of any length.
        encode_text: maps texts to embeddings (T, D), of any length.
        scale, bias: s and b in the logits of prompts.
        task: ``"multiclass"`` for a softmax over the prompts (CLIP), or ``"multilabel"`` for a sigmoid per
            prompt (SigLIP).
    """

    encode_text: Callable[[list[str]], Tensor]
    scale: float
    bias: float
    prompt_task: Task

    def __init__(
        self,
        base: Backbone,
        encode_text: Callable[[list[str]], Tensor],
        scale: float = 100.0,
        bias: float = 0.0,
        task: Task = "multiclass",
    ) -> None:
        super().__init__(base, [f"feature {i}" for i in range(base.num_classes)], "regression")
        vars(self).update(encode_text=encode_text, scale=scale, bias=bias, prompt_task=task)

    def answer(self, outputs: Tensor) -> Tensor:
        return F.normalize(outputs, dim=1)

    def again(self, base: Backbone) -> Clip:
        return Clip(base, self.encode_text, self.scale, self.bias, self.prompt_task)

    @property
    def has_classes(self) -> bool:
        return False

    def require_classes(self) -> None:
        raise ValueError(
            f"backbone: {self.name} has no classes because it compares images with texts; give target='a "
            f"photo of a cat', or backbone.with_prompts([...])"
        )

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Compute text embeddings (T, D) of unit length, on the backbone's device.

        Raises:
            ValueError: if there is no text, a text is empty or too long, or the embeddings have the wrong
                width.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        if not given or not all(isinstance(t, str) and t.strip() for t in given):
            raise ValueError(
                f"prompts: got {given!r:.80}; give one or more texts, such as 'a photo of a cat'"
            )
        found = self.encode_text(given)
        if not isinstance(found, Tensor) or found.shape != (len(given), self.num_classes):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"encode_text: returned {got}; return ({len(given)}, {self.num_classes}), the width of the "
                f"image embeddings of {self.name}"
            )
        return F.normalize(found.detach().to(self.mean.device, torch.float32), dim=1)

    def text_target(self, text: str) -> Target:
        """Create a target: the cosine similarity of images with a text."""
        embedding = self.embed([text])[0]
        return Target(lambda images: images @ embedding.to(images), name=text, p="value")

    def with_prompts(self, prompts: Sequence[str]) -> Prompted:
        """Create a classifier whose classes are ``prompts``; a softmax needs at least two.

        Raises:
            ValueError: if there are too few prompts, or a prompt is repeated or cannot be read.
        """
        return Prompted(self, [prompts] if isinstance(prompts, str) else list(prompts))


class Prompted(BackboneView):
    """A zero-shot classifier; created by :meth:`Clip.with_prompts`."""

    base: Clip
    embeddings: Tensor  # (T, D)

    def __init__(self, base: Clip, prompts: list[str]) -> None:
        embeddings = base.embed(prompts)
        if len(set(prompts)) < len(prompts):
            raise ValueError(f"prompts: got {prompts!r:.80}; give each prompt once")
        if len(prompts) == 1 and base.prompt_task == "multiclass":
            raise ValueError(
                "prompts: got one, but a softmax over one prompt is always 1; give two or more, or give "
                "the text as target"
            )
        super().__init__(base, prompts, base.prompt_task)
        vars(self)["embeddings"] = embeddings

    def answer(self, outputs: Tensor) -> Tensor:
        return self.base.scale * outputs @ self.embeddings.to(outputs).T + self.base.bias

    def again(self, base: Backbone) -> Prompted:
        assert isinstance(base, Clip)
        return Prompted(base, self.class_names)


def load_clip(
    model: Any,
    tokenizer: Any,
    *,
    preprocessing: Preprocessing | None = None,
    device: str | torch.device | None = None,
) -> Clip:
    """Load an image-text model of ``transformers`` for explanation.

    The image tower is rebuilt as timm's ViT with the same weights, so that every explainer for ViTs works.

    Args:
        model: a ``CLIPModel`` or ``SiglipModel``; it is not changed, and its text tower is used.
        tokenizer: its tokenizer.
        preprocessing: by default bicubic resizing to the model's input size, with the mean and standard
            deviation of its family.

    Raises:
        ValueError: if the model is of another kind, or there is no tokenizer.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if kind not in ("clip", "siglip") or not hasattr(model, "get_text_features"):
        raise ValueError(
            f"model: got {kind}; give transformers' CLIPModel or SiglipModel, or combine other towers with "
            f"xattn.backbone.families.clip.Clip(image_backbone, encode_text)"
        )
    if not callable(tokenizer):
        raise ValueError(
            f"tokenizer: got {tokenizer!r:.60}; give the model's own, AutoTokenizer.from_pretrained(...)"
        )
    siglip = kind == "siglip"
    size = int(model.config.vision_config.image_size)
    mean, std = ((0.5,) * 3, (0.5,) * 3) if siglip else (MEAN, STD)
    tower = image_tower(model.vision_model, getattr(model, "visual_projection", None))
    tower.preprocessing = preprocessing or Preprocessing((size, size), mean, std, crop_pct=1.0)
    base = load_backbone(tower, device=device)
    vars(base)["name"] = str(getattr(model.config, "_name_or_path", "") or kind)
    bias = float(model.logit_bias.detach()) if siglip else 0.0
    task: Task = "multilabel" if siglip else "multiclass"
    return Clip(
        base, _text_tower(model, tokenizer), float(model.logit_scale.detach().exp()), bias, task
    )


def _text_tower(model: Any, tokenizer: Any) -> Callable[[list[str]], Tensor]:
    longest = int(model.config.text_config.max_position_embeddings)
    # SigLIP was trained on texts of one length.
    fixed = {"max_length": longest} if model.config.model_type == "siglip" else {}
    padding = "max_length" if fixed else True

    def encode(texts: list[str]) -> Tensor:
        for text in texts:
            count = len(tokenizer(text)["input_ids"])
            if count > longest:
                raise ValueError(
                    f"prompts: {text[:40]!r}... has {count} tokens, but the text tower reads {longest}; "
                    f"shorten it"
                )
        tokens = tokenizer(texts, padding=padding, return_tensors="pt", **fixed)
        named = {k: tokens[k] for k in ("input_ids", "attention_mask") if k in tokens}
        found = model.get_text_features(**{k: v.to(model.device) for k, v in named.items()})
        return getattr(found, "pooler_output", found)

    return encode
