"""A frozen image classifier whose logits and feature maps come out of one hook-free pass.

``Backbone(images) -> Taps(logits, maps)`` wraps any timm model. ``forward_intermediates`` returns the
inner maps and ``forward_head`` returns the logits, so nothing is hooked, reshaped by hand or run twice.
Images are raw, in [0, 1]. They are normalised inside, according to the model's own config, so that a
mask multiplies raw pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.model.convert import conversion
from xattn.attention.model.spec import Conversion, describe
from xattn.backbone.fingerprint import Hashed, hash_inputs, is_unchanged, network_sha256
from xattn.backbone.norm_gradients import correct_norm_gradients
from xattn.backbone.pooled_features import linear_classifier, record_features
from xattn.backbone.taps import (
    Taps,
    default_map_taps,
    default_vit_taps,
    name_taps,
    parse_tap,
    read_prefixes,
    reads_prefix,
    vit_blocks,
    wanted_intermediates,
)
from xattn.photos.arrays import layout_remedy
from xattn.photos.classes import (
    Task,
    as_classes,
    class_names_of,
    class_probabilities,
    find_class,
    resolve_task,
)
from xattn.photos.preprocessing import Preprocessing, preprocessing_record
from xattn.runtime.copies import remember_copies
from xattn.runtime.devices import Movable
from xattn.runtime.locking import alone, lock_of
from xattn.runtime.memory import is_out_of_memory

# Attributes fixed at construction, and how to get a backbone that differs in them.
_SETTLED = {
    "preprocessing": "mean=, std=, crop=, interpolation= or input_size= of load_backbone, or "
    "backbone.with_preprocessing(...)",
    "taps": "backbone.with_taps(...)",
    "task": "task= of load_backbone",
    "num_classes": "num_classes= of load_backbone",
}


class Backbone(Movable):
    """A frozen classifier in eval mode: ``backbone(images) -> Taps``.

    Images are (B, 3, H, W) in [0, 1]. Clips and volumes are (B, C, T, H, W), and their maps are
    (B, C, t, h, w).

    ``taps`` names the maps: ``"stage.i"`` (i-th output of timm's ``forward_intermediates``; for a
    ViT ``"block.i"``, the output of block i), ``"norm1.i"`` (the normalised input of ViT block i, which
    T-TAME taps), ``"stage.i.pool"`` (max-pooled by 2, as VGG's tensors are after its pooling layers) and
    ``"head"`` (the tensor that the classifier pools). ``"norm1"`` and ``"block"`` mean the last three
    blocks; None uses the default for the architecture.

    ``task`` defines what a logit means: ``"multiclass"`` (a softmax over the classes), ``"multilabel"``
    (one sigmoid per class), ``"regression"`` (the predicted number itself) or ``"binary"``. A binary model
    has a single logit z (B, 1); the backbone returns -z/2 and z/2 as the logits of the classes "negative"
    and "positive", whose softmax is sigmoid(z). By default a model with one output is binary, and every
    other model is multiclass.

    Threads may share a backbone: several passes can run at the same time, but an explanation runs
    exclusively. Code that calls the model directly is not synchronised: see :meth:`alone`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> taps = net(torch.rand(2, 3, 64, 64))
        >>> taps.logits.shape, [tuple(m.shape) for m in taps.maps]
        (torch.Size([2, 1000]), [(2, 48, 8, 8), (2, 192, 4, 4), (2, 96, 2, 2)])
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
            ones = [1] * len(preprocessing.places)
            self.register_buffer(key, values.view(1, -1, *ones), persistent=False)
        reference = next(model.parameters(), torch.zeros((), device="cpu"))
        self.to(device=reference.device)
        self.adapter = not hasattr(model, "forward_intermediates")
        self.prefix_tokens = int(getattr(model, "num_prefix_tokens", 0) or 0)
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._reads_prefix = False
        self._fingerprint: str | None = None
        self._hashed: Hashed | None = None  # state of the model when the fingerprint was computed
        super().train(False)
        self.task: Task = task or "multiclass"
        with self._passing():
            self._resolve_taps(taps, task)
        self.class_names = class_names_of(model, self.num_classes, class_names, self.task)
        self._settled = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTLED and self.__dict__.get("_settled"):
            raise AttributeError(
                f"{name}: cannot be changed because {self.name} was set up with it; use {_SETTLED[name]}"
            )
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: a frozen backbone never updates BatchNorm or drops units."""
        return self

    # ------------------------------------------------------------------ threads

    def alone(self) -> AbstractContextManager[None]:
        """Return a context manager: inside it, no other thread explains or runs this network.

        Use it to run or change ``backbone.model`` itself, including its hooks, while other threads
        explain. The thread that has entered it may also explain.
        """
        return alone(self.model)

    def _passing(self, x: Tensor | None = None) -> AbstractContextManager[None]:
        """Wrap every pass, for images ``x``; compilers cannot trace locks and exceptions."""
        return nullcontext() if torch.compiler.is_compiling() else self._pass_of(x)

    @contextmanager
    def _pass_of(self, x: Tensor | None) -> Iterator[None]:
        try:
            with lock_of(self.model).shared(), correct_norm_gradients(torch.is_grad_enabled()):
                yield
        except (AssertionError, RuntimeError) as error:
            own = tuple(self.preprocessing.places)
            size = own if x is None else tuple(x.shape[2:])
            if x is None or size == own or is_out_of_memory(error) or not self._takes_own_size(x):
                raise
            reason = " ".join(str(error).split())[:200]
            options = f"input_size={size[-2:]} (--input-size)"
            if len(size) == 3:
                options += f" and frames={size[0]} (--frames)"
            raise ValueError(
                f"images: {self.name} takes {' x '.join(map(str, own))} pixels and fails on "
                f"{' x '.join(map(str, size))} ({reason}); resize them, or load it with {options}"
            ) from error

    def _takes_own_size(self, x: Tensor) -> bool:
        """Return whether a black image of the backbone's own size passes, with the device and dtype of
        ``x``. If it does not, the size of ``x`` was not the reason for the failure."""
        image = x.new_zeros(1, x.shape[1], *self.preprocessing.places)
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
        remember_copies(memo)
        return twin

    # ------------------------------------------------------------------ taps

    @torch.no_grad()
    def _resolve_taps(self, taps: str | Sequence[str] | None, task: Task | None) -> None:
        image = torch.zeros(
            1, len(self.preprocessing.mean), *self.preprocessing.places, device="cpu"
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
            final, inner, _ = self._features(image, None)
            if not isinstance(final, Tensor):
                raise ValueError(
                    f"name_or_module: the features of {self.name} are several token sequences rather than "
                    f"one map; wrap the model in a module with forward_taps(x) -> (logits, maps)"
                )
            logits = self.model.forward_head(final)  # type: ignore[operator]
            depth = self._depth = len(inner)
            blocks = vit_blocks(self.model)
            self.is_vit = blocks is not None and len({m.shape[-2:] for m in inner}) == 1
            if taps is not None:
                self.taps = name_taps(taps, depth, self.name, blocks, self.is_vit)
            elif blocks is not None and self.is_vit:
                self.taps = default_vit_taps(blocks, depth)
            else:
                pooled = self._as_map(final, inner) if final.ndim == 4 else None
                self.taps = default_map_taps(pooled, inner)
            maps = self._select(self.taps, final, inner)
        for name, value in zip(self.taps, maps, strict=True):
            if value.ndim != self.mean.ndim:
                form = "(B, C, t, h, w)" if self.reads_clips else "(B, C, h, w)"
                raise ValueError(
                    f"taps: {name!r} of {self.name} has shape {tuple(value.shape)}, not {form}; "
                    f"choose other taps"
                )
        self._wanted = [] if self.adapter else wanted_intermediates(self.taps, self._depth)
        self._reads_prefix = not self.adapter and reads_prefix(
            self.model, self.taps, self.prefix_tokens
        )
        self.task = resolve_task(task, logits, self.name)
        self.num_classes = int(self._as_classes(logits).shape[1])
        self.channels = tuple(m.shape[1] for m in maps)
        self.tap_sizes: tuple[Any, ...] = tuple(tuple(m.shape[2:]) for m in maps)
        self.pools_linearly = self._pools_linearly(maps[-1])

    def _features(
        self, x: Tensor, indices: list[int] | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """Return the final features, and the intermediates as maps and, for a ViT's taps, prefix tokens."""
        prefix = {"return_prefix_tokens": True} if indices and self._reads_prefix else {}
        final, inner = self.model.forward_intermediates(  # type: ignore[operator]
            x, indices=indices, output_fmt="NCHW", **prefix
        )
        maps = [m if isinstance(m, Tensor) else m[0] for m in inner]
        return final, maps, [None if isinstance(m, Tensor) else m[1] for m in inner]

    def _select(
        self, taps: Sequence[str], final: Tensor, inner: Sequence[Tensor] | dict[int, Tensor]
    ) -> tuple[Tensor, ...]:
        maps = []
        for tap in taps:
            kind, index, pooled = parse_tap(tap)
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
        """Return the final features as (B, C, h, w): permute NHWC and remove prefix tokens."""
        if final.ndim == 4:
            return final.permute(0, 3, 1, 2) if self.channels_last else final
        if final.ndim == 3:
            sizes = inner.values() if isinstance(inner, dict) else inner
            last = list(sizes)[-1]
            return self.tokens_to_map(final, (last.shape[-2], last.shape[-1]))
        return final

    @property
    def reads_clips(self) -> bool:
        """Whether its inputs are clips or volumes (B, C, T, H, W)."""
        return self.mean.ndim == 5

    @property
    def boxes(self) -> Tensor | None:
        """If the classes are detections: their boxes (K, 4), x0 y0 x1 y1 as shares of the input's sides."""
        return None

    @staticmethod
    def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convert (B, prefix + h*w, C) tokens to a (B, C, h, w) map, without the prefix tokens."""
        tokens = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
        return tokens.transpose(1, 2).unflatten(2, grid)

    @property
    def has_grid(self) -> bool:
        """Whether the model reports its patch grid for any image size, see :meth:`grid`."""
        return hasattr(getattr(self.model, "patch_embed", None), "dynamic_feat_size")

    @property
    def cam_layer(self) -> nn.Module | None:
        """The layer that CAM methods should read; if None, each method chooses one."""
        return None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the patch grid (h, w) of a ViT for an image of ``height`` x ``width`` pixels."""
        return self.model.patch_embed.dynamic_feat_size((height, width))  # type: ignore[union-attr,operator]

    # ------------------------------------------------------------------ passes

    def forward(self, images: Tensor) -> Taps:
        return self.forward_normalized(self.normalize(images))

    def forward_normalized(self, x: Tensor) -> Taps:
        """Run one pass on normalised images, (B, 3, H, W)."""
        with self._passing(x):
            if self.adapter:
                logits, maps = self.model.forward_taps(x)  # type: ignore[operator]
                record_features(self.model, maps[-1])
                return Taps(self._as_classes(logits), tuple(maps))
            final, inner, tokens = self._features(x, self._wanted)
            final = self._through_head_point(final)
            logits = self._classify(final)
            maps = self._select(self.taps, final, dict(zip(self._wanted, inner, strict=True)))
            read = read_prefixes(
                self.model, self.taps, dict(zip(self._wanted, tokens, strict=True))
            )
        prefix = final[:, : self.prefix_tokens] if final.ndim == 3 else None
        return Taps(logits, maps, prefix, read)

    def _classify(self, final: Tensor) -> Tensor:
        """Compute the logits (B, K) from the final features."""
        record_features(self.model, final)
        return self._as_classes(self.model.forward_head(final))  # type: ignore[operator]

    def _as_classes(self, logits: Tensor) -> Tensor:
        return as_classes(logits, self.task)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Convert logits (B, K) to the task's probabilities p, (B, K) in float64: see docs/design.md."""
        return class_probabilities(logits.double(), self.task)

    def _through_head_point(self, final: Tensor) -> Tensor:
        if final.ndim == 4 and self.channels_last:
            return self.head_point(final.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.head_point(final)

    def logits(self, images: Tensor) -> Tensor:
        """Compute the logits (B, K) of images (B, 3, H, W) in [0, 1]; cheaper than a pass with maps."""
        return self.logits_normalized(self.normalize(images))

    def logits_normalized(self, x: Tensor) -> Tensor:
        """Compute the logits (B, K) of normalised images (B, 3, H, W)."""
        with self._passing(x):
            if self.adapter:
                return self.forward_normalized(x).logits
            final = self._through_head_point(self.model.forward_features(x))  # type: ignore[operator]
            return self._classify(final)

    def head_logits(self, final: Tensor) -> Tensor:
        """Apply the classifier to a (possibly masked) ``"head"`` map (B, C, h, w); return (B, K) logits."""
        self.require_pooled_tap()
        if self.channels_last:
            final = final.permute(0, 2, 3, 1)
        with self._passing():
            return self._classify(final)

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
        """Normalise images (B, 3, H, W) from [0, 1] to the input range of the model.

        Raises:
            ValueError: if the images have another number of channels.
        """
        self.check_channels(images)
        return (images - self.mean.to(images)) / self.std.to(images)

    def check_channels(self, images: Tensor, argument: str = "images") -> None:
        """Raise a ``ValueError`` unless ``images`` have the right number of channels.

        Photos are (3, H, W) or (B, 3, H, W); clips are (3, T, H, W) or (B, 3, T, H, W).
        """
        channels = self.mean.shape[1]
        remedy = layout_remedy(images, channels, argument, self.mean.ndim - 2)
        if remedy:
            sides = "T, H, W" if self.reads_clips else "H, W"
            raise ValueError(
                f"{argument}: got shape {tuple(images.shape)}, {self.name} takes (B, {channels}, {sides}); "
                f"{remedy}"
            )

    def denormalize(self, x: Tensor) -> Tensor:
        """Invert :meth:`normalize`."""
        return x * self.std.to(x) + self.mean.to(x)

    # ------------------------------------------------------------------ facts

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def classifier_weight(self) -> Tensor | None:
        """The classifier's weight (K, C), one row per class; None without a single linear classifier."""
        return self._classifier()[0]

    @property
    def classifier_bias(self) -> Tensor | None:
        return self._classifier()[1]

    def _classifier(self) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = linear_classifier(self.model)
        if weight is not None and self.task == "binary":
            weight = torch.cat([-weight, weight]) / 2
            bias = None if bias is None else torch.cat([-bias, bias]) / 2
        return weight, bias

    @torch.no_grad()
    def _pools_linearly(self, last: Tensor) -> bool:
        """Return whether logits = W mean(head map) + b, so that w_k . map is the exact CAM."""
        weight, bias = self._classifier()
        if weight is None or weight.shape[1] != last.shape[1]:
            return False
        generator = torch.Generator().manual_seed(0)
        if self.adapter:
            size = self.preprocessing.places
            image = torch.rand(1, self.mean.shape[1], *size, generator=generator, device="cpu").to(
                last
            )
            taps = self.forward_normalized(image)
            logits, final = taps.logits, taps.maps[-1]
        elif self.taps[-1] != "head" or self.is_vit:
            return False
        else:
            final = torch.rand(last.shape, generator=generator, device="cpu").to(last) - 0.3
            logits = self.head_logits(final)
        expected = final.flatten(2).mean(2) @ weight.t() + (0 if bias is None else bias)
        return bool(logits.any()) and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights before any cast; see :func:`sha256`.

        It is recomputed if training has changed the weights. It also covers the model's conversion, if any,
        and the mean and std if they differ from those of the model itself."""
        with lock_of(self.model).shared():  # another thread may be converting the model
            if self._fingerprint is None or not is_unchanged(self.model, self._hashed):
                self._fingerprint = network_sha256(self.model, self.preprocessing)
                self._hashed = hash_inputs(self.model)
            return self._fingerprint

    def _share_fingerprint(self, other: Backbone) -> Backbone:
        """Give this hash to ``other``, a backbone over the same model, if it normalises in the same way;
        return ``other``."""
        one, two = self.preprocessing, other.preprocessing
        if (one.mean, one.std) == (two.mean, two.std):
            other._fingerprint, other._hashed = self._fingerprint, self._hashed
        return other

    @property
    def depth(self) -> int:
        """The number of intermediates that can be tapped: blocks of a ViT, stages of a CNN."""
        return self._depth

    def with_taps(self, taps: str | Sequence[str]) -> Backbone:
        """Create a backbone over the same model with other taps."""
        return self._share_fingerprint(
            Backbone(self.model, self.name, self.preprocessing, taps, self.class_names, self.task)
        )

    def with_preprocessing(self, preprocessing: Preprocessing) -> Backbone:
        """Create a backbone over the same model that crops, resizes and normalises by ``preprocessing``."""
        taps = None if self.adapter else self.taps
        return self._share_fingerprint(
            Backbone(self.model, self.name, preprocessing, taps, self.class_names, self.task)
        )

    # ------------------------------------------------------------------ conversions

    @property
    def conversion(self) -> list[Conversion] | None:
        """The conversions that :func:`~xattn.attention.convert` has made in the model; None without any."""
        return conversion(self.model)

    def conversion_record(self) -> dict[str, Any]:
        """Return ``{"conversion": [...]}``, as files store it, or an empty dict if nothing was converted.

        For a trained conversion the dict also has ``"conversion_sha256"``, as in its config."""
        made = self.conversion
        if made is None:
            return {}
        hashes = {vars(module).get("trained_sha256") for module in self.model.modules()} - {None}
        trained = {"conversion_sha256": hashes.pop()} if len(hashes) == 1 else {}
        return {"conversion": [one.record() for one in made], **trained}

    def preprocessing_record(self) -> dict[str, Any]:
        """Return ``{"preprocessing": {...}}``, as files store it, or an empty dict if nothing differs.

        The inner dict holds those of mean, std, crop and interpolation that differ from the model's
        config."""
        return preprocessing_record(self.model, self.preprocessing)

    def with_converted(self, model: nn.Module) -> Backbone:
        """Create a backbone like this one over ``model``, a converted copy of this backbone's model; see
        :func:`~xattn.backbone.conversion.converted`."""
        made, earlier = conversion(model), self.conversion
        name = self.name.removesuffix(f" ({describe(earlier or [])})")
        name = name if made is None else f"{name} ({describe(made)})"
        taps = None if self.adapter else self.taps
        return Backbone(model, name, self.preprocessing, taps, self.class_names, self.task)

    @property
    def has_classes(self) -> bool:
        """Whether its outputs are class logits; an encoder's outputs are features."""
        return getattr(self.model, "num_classes", None) != 0

    def require_classes(self) -> None:
        """Raise a ``ValueError`` unless there are classes to explain."""
        if not self.has_classes:
            raise ValueError(
                f"backbone: {self.name} has no classes (num_classes=0); its {self.num_classes} "
                f"outputs are features; leave out num_classes, or train a classifier with xattn "
                f"probe and explain that: --probe FOLDER, xattn.heads.probed.probed(backbone, head)"
            )

    def about(self, target: int) -> dict[str, Any]:
        """Return what provenance stores about a class besides its name; only some views store anything."""
        return {}

    def class_index(self, name: str | int) -> int:
        """Return the index of a class given by its index, its name or a unique part of its name."""
        return find_class(name, self.class_names, self.name)
