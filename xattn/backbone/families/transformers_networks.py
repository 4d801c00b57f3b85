"""Give classifiers of Hugging Face ``transformers`` the parts that xattn reads from timm's networks.

``network`` remains the module that is explained: its own layers are called in the order of its own
``forward``, and nothing is hooked or copied. The other attributes are references to its layers, which are
not registered a second time. When a model is loaded, a check confirms that the layers, called in this
order, still compute the network's own logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xattn.photos.classes import Task
from xattn.photos.preprocessing import Preprocessing


class Projections(NamedTuple):
    """The linear layers of softmax attention: the weights of queries, keys and values (H D, C), the bias of
    the queries (H D) or None, the weight of the output (C, H D), and the gain (C) of a layer scale or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    out: Tensor
    gain: Tensor | None
    heads: int
    scale: float


class TransformersBlock(nn.Module):
    """A transformer layer with its norm before attention, ``norm1``.

    Args:
        biased: whether its attention adds a bias to the scores.
    """

    def __init__(self, layer: Any, biased: bool) -> None:
        super().__init__()
        self.layer, self.biased = layer, biased
        self.norm1 = _first(layer, "layernorm_before", "norm1", "layer_norm1")

    def forward(self, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        out = self.layer(tokens, mask, **options)
        return out if isinstance(out, Tensor) else out[0]

    def projections(self) -> Projections | None:
        """The projections of its attention; None if that is not plain softmax attention."""
        outer = _first(self.layer, "attention", "self_attn")
        inner = getattr(outer, "attention", outer)  # a separate layer before version 5
        own = hasattr(inner, "q_proj")
        if self.biased or not (own or hasattr(inner, "query")):
            return None
        q, k, v = (getattr(inner, f"{n[0]}_proj" if own else n) for n in ("query", "key", "value"))
        out = _first(inner, "o_proj", "out_proj") if own else outer.output.dense
        heads = int(_first(inner, "num_attention_heads", "num_heads"))
        gain = getattr(self.layer, "lambda_1", None)  # BEiT's layer scale, then DINOv2's
        gain = getattr(getattr(self.layer, "layer_scale1", None), "lambda1", gain)
        gain = gain if isinstance(gain, Tensor) else None
        scale = (q.weight.shape[0] // heads) ** -0.5
        return Projections(q.weight, k.weight, v.weight, q.bias, out.weight, gain, heads, scale)


class PatchEmbedding:
    """The patch embedding ``layer``, which returns tokens (B, N, C) or a map; see ``output_fmt``."""

    def __init__(self, layer: nn.Module, patch: tuple[int, int], size: tuple[int, int]) -> None:
        self.layer, self.patch_size, self.img_size = layer, patch, size
        self.output_fmt = "NCHW" if isinstance(layer, nn.Conv2d) else "NLC"

    def dynamic_feat_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Return the grid (h, w) of patches of an image of ``size`` (H, W)."""
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def register_forward_hook(self, hook: Any) -> Any:
        return self.layer.register_forward_hook(hook)


class TransformersNetwork(nn.Module):
    """Base class that gives ``network``, a transformers classifier, the methods ``forward_intermediates``,
    ``forward_features`` and ``forward_head`` of timm's networks.

    Attributes:
        preprocessing, class_names, task: from its image processor and its config, or None.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.num_classes = int(network.config.num_labels)
        self.preprocessing: Preprocessing | None = None
        self.class_names: list[str] | None = None
        self.task: Task | None = None

    def _view(self, **parts: Any) -> None:
        """Set attributes for layers of ``network``, which has already registered them."""
        vars(self).update(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        return self._run(x, ())[0]

    def forward_head(self, final: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def _run(self, x: Tensor, wanted: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Compute the final features, and the outputs of the blocks or stages ``wanted``."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the linear layer, or the two linear layers whose logits are averaged."""
        classifier: nn.Module = self.network.classifier
        return classifier[-1] if isinstance(classifier, nn.Sequential) else classifier


class TransformersViT(TransformersNetwork):
    """ViT, DeiT, BEiT, DINOv2 and SigLIP: prefix tokens, followed by the patches, pass through identical
    layers.

    Attributes:
        global_pool: "token", "avg", or, for DINOv2, "token+avg" (the class token and the patches' mean).
        num_prefix_tokens: class, distillation and register tokens.
    """

    blocks: nn.ModuleList
    embeddings: nn.Module
    norm: nn.Module
    fc_norm: nn.Module | None
    head_dist: nn.Module | None
    shared_position_bias: nn.Module | None
    cls_token: Tensor | None
    dist_token: Tensor | None
    reg_token: Tensor | None

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        base = _base(network)
        config = getattr(network.config, "vision_config", network.config)
        embeddings = base.embeddings
        patches = _first(embeddings, "patch_embeddings", "patch_embedding")
        layers = _first(base, "layers", "encoder")
        layers = layers if isinstance(layers, nn.ModuleList) else _first(layers, "layers", "layer")
        pooler = getattr(getattr(base, "pooler", None), "layernorm", None)  # BEiT, like the biases
        shared = getattr(base, "shared_position_bias", None)
        biases = [shared or getattr(layer, "relative_position_bias", None) for layer in layers]
        self._view(
            embeddings=embeddings,
            blocks=nn.ModuleList(
                TransformersBlock(layer, bias is not None)
                for layer, bias in zip(layers, biases, strict=True)
            ),
            shared_position_bias=shared,
            norm=_first(base, "layernorm", "post_layernorm"),
            fc_norm=pooler,
            head_dist=getattr(network, "distillation_classifier", None),
            cls_token=getattr(embeddings, "cls_token", None),
            dist_token=getattr(embeddings, "distillation_token", None),
            reg_token=getattr(embeddings, "register_tokens", None),
        )
        size, patch = pair_of(config.image_size), pair_of(config.patch_size)
        self.patch_embed = PatchEmbedding(patches, patch, size)
        self.num_features = int(config.hidden_size)
        tokens = [self.cls_token, self.dist_token, self.reg_token]
        self.num_prefix_tokens = sum(t.shape[1] for t in tokens if t is not None)
        if network.config.model_type.startswith("dinov2"):
            self.global_pool = "token+avg"
        else:
            self.global_pool = "token" if pooler is None and self.num_prefix_tokens else "avg"
        self._resizes = accepts_argument(embeddings, "interpolate_pos_encoding")

    def _run(self, x: Tensor, wanted: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        own = tuple(x.shape[-2:]) == self.patch_embed.img_size
        resized = {"interpolate_pos_encoding": True} if self._resizes and not own else {}
        tokens = self.embeddings(x, **resized)
        tokens = tokens if isinstance(tokens, Tensor) else tokens[0]
        (mask, options), found = self._options(x, tokens), []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, mask, **options)
            if i in wanted:
                found.append(tokens)
        return self.norm(tokens), found

    def _options(self, x: Tensor, tokens: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the arguments for BEiT's layers: a bias that all layers share, and the image's size."""
        if not accepts_argument(self.blocks[0].layer, "resolution"):
            return None, {}
        size = tuple(x.shape[-2:])
        if self.shared_position_bias is None:
            return None, {"resolution": size}
        grid = self.patch_embed.dynamic_feat_size(size)
        return self.shared_position_bias(grid, dim_size=tokens.shape[1]), {"resolution": size}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        output_fmt: str = "NCHW",
    ) -> tuple[Tensor, list[Any]]:
        """Compute the final tokens, normalised, and the blocks' outputs as maps (B, C, h, w).

        Each map comes with its prefix tokens (B, P, C) if these are requested."""
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        wanted = range(len(self.blocks)) if indices is None else indices
        final, found = self._run(x, wanted)
        inner: list[Any] = []
        for tokens in found:
            prefix = tokens[:, : self.num_prefix_tokens]
            grown = tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
            inner.append((grown, prefix) if return_prefix_tokens else grown)
        return final, inner

    def forward_head(self, final: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits (B, K) from the final tokens (B, N, C), or return the classifier's input."""
        first, patches = final[:, 0], final[:, self.num_prefix_tokens :]
        if self.head_dist is not None:
            if pre_logits:
                return (first + final[:, 1]) / 2
            return (self.network.cls_classifier(first) + self.head_dist(final[:, 1])) / 2
        if self.global_pool == "token":
            read = first
        elif self.global_pool == "avg":
            read = patches.mean(1)
            read = read if self.fc_norm is None else self.fc_norm(read)
        else:
            read = torch.cat([first, patches.mean(1)], 1)
        return read if pre_logits else self.network.classifier(read)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        if self.head_dist is None:
            return super().get_classifier()
        return self.network.cls_classifier, self.head_dist


class TransformersMaps(TransformersNetwork):
    """ResNet, ConvNeXt and Swin: stages of decreasing resolution; the last map is averaged."""

    base: Any
    stages: Any

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        base = _base(network)
        self._view(base=base, stages=_first(base.encoder, "stages", "layers"))
        self.windows = hasattr(self.stages[0], "blocks")  # Swin: tokens, and a norm before the mean
        norm = None if self.windows else getattr(base, "layernorm", None)
        self.head = SimpleNamespace(norm=norm)

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, output_fmt: str = "NCHW"
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the last map (B, C, h, w), and the stages' outputs before downsampling."""
        return self._run(x, range(len(self.stages)) if indices is None else indices)

    def _run(self, x: Tensor, wanted: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        if self.windows:
            return self._run_windows(x, wanted)
        found = []
        x = _first(self.base, "embeddings", "embedder")(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in wanted:
                found.append(x)
        return x, found

    def _run_windows(self, x: Tensor, wanted: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        resized = {}
        embeddings = self.base.embeddings
        if getattr(embeddings, "position_embeddings", None) is not None:
            resized = {"interpolate_pos_encoding": True}
        tokens, grid = embeddings(x, **resized)
        found = []
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                tokens = block(tokens, grid)[0]
            if i in wanted:
                found.append(tokens.transpose(1, 2).unflatten(2, grid))
            if stage.downsample is not None:
                tokens = stage.downsample(tokens, grid)
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        return self.base.layernorm(tokens).transpose(1, 2).unflatten(2, grid), found

    def forward_head(self, final: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits (B, K) from the last map (B, C, h, w), or return the classifier's input."""
        read = final.mean((2, 3))
        read = read if self.head.norm is None else self.head.norm(read)
        return read if pre_logits else self.network.classifier(read)


class TransformersLogits(nn.Module):
    """The logits of ``network``, a classifier of any other family, which is run unchanged."""

    def __init__(self, network: Any, preprocessing: Preprocessing | None) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing

    def forward(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x)[0]  # type: ignore[no-any-return]


def _base(network: Any) -> Any:
    """Return the network without its classifier."""
    return _first(network, network.base_model_prefix, "vision_model")


def _first(module: Any, *names: str) -> Any:
    """Return the first attribute in ``names`` that exists; different versions use different names."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"{type(module).__name__} has no {' or '.join(names)}")


def accepts_argument(module: Any, argument: str) -> bool:
    """Return whether the ``forward`` of ``module`` accepts the argument."""
    return argument in inspect.signature(module.forward).parameters


def pair_of(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) for a size that may be given as the side of a square."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
