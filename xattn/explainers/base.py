"""Base class of all explainers: they have Captum's signature, check inputs and leave the model unchanged.

``explainer.attribute(inputs, target) -> (B, 1, h, w)``: a raw map of one class per image, at the
explainer's own resolution and without min-max. The models are always left as they were, even after an
error (:func:`preserve_state`). Several threads may explain the same backbone; they take turns.

Test-time augmentation (``aug_smooth``): the mean over the maps of six copies of a photo, each mapped back.

    S(x) = 1/6 sum over k in (1, .9, 1.1) of  s(x_k) + mirror(s(mirror(x_k))),    x_k = m + k (x - m)

m is the network's mean colour, so that k scales the normalised photo. pytorch-grad-cam uses the same copies
under this name, but scales each map to [0, 1] before the mean. Every explainer accepts this option.

Captum accepts xattn's explainers unchanged (:class:`CaptumMethod`).

    NoiseTunnel(explainer).attribute(images, nt_samples=8, stdevs=0.1, target=281)
    sensitivity_max(explainer.attribute, images, target=281)
    infidelity(backbone.logits, noise, images, explainer.attribute_inputs(images, 281), target=281)

``NoiseTunnel`` calls ``attribute.__wrapped__``, and Captum's metrics pass a tuple and expect one back.
Both add noise to images, so pixels outside [0, 1] are accepted from them, and only from them.
"""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xattn.backbone import Backbone, sha256
from xattn.backbone.norm_gradients import correct_norm_gradients
from xattn.backbone.pooled_features import keep_logits
from xattn.backbone.scored import BackboneView, Scored, class_of, is_score, scored
from xattn.backbone.taps import resized
from xattn.heads import AttentiveHead, Head, parse_options
from xattn.heads.base import Frozen
from xattn.heads.probed import Probed
from xattn.photos.arrays import input_batch
from xattn.registry import Registry, make_adopter, with_name
from xattn.runtime.locking import alone
from xattn.runtime.memory import ForwardBatches
from xattn.runtime.names import matching_name
from xattn.runtime.option_checks import check, check_fields


def options_by_name(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options for each of ``names``; values are parsed as in :func:`xattn.heads.parse_options`.

    >>> options_by_name(["rise.masks=1000", "head.passes=4"], ["rise", "head"])
    {'rise': {'masks': 1000}, 'head': {'passes': 4}}

    Raises:
        ValueError: a text is not ``name.option=value`` with one of the names.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in given:
        key, equals, value = text.partition("=")
        name, dot, option = key.rpartition(".")  # a head's row name may contain dots
        row = matching_name(name, names)
        if not dot or row is None:
            raise ValueError(
                f"options: got {text!r}; write name.option=value, where name is one of "
                f"{', '.join(names)}"
            )
        options.setdefault(row, {}).update(parse_options([option + equals + value]))
    return options


Attribute = Callable[..., Tensor]


class CaptumMethod:
    """Mixin that gives explainers the attributes of ``captum.attr.Attribution``."""

    backbone: Any
    multiplies_by_inputs = False
    is_delta_supported = False

    @property
    def forward_func(self) -> Callable[[Tensor], Tensor]:
        """Logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.backbone.logits  # type: ignore[no-any-return]

    def has_convergence_delta(self) -> bool:
        """False, as no explainer reports the difference between its map's sum and the score."""
        return False

    def attribute_inputs(self, inputs: Tensor, target: Tensor | int) -> Tensor:
        """Maps in the shape of the inputs (B, C, H, W), as ``captum.metrics.infidelity`` expects them:
        resized bilinearly, with 1/C of the value in each channel."""
        maps = self.attribute(inputs, target)  # type: ignore[attr-defined]
        maps = resized(maps, inputs.shape[2:])
        return (maps / inputs.shape[1]).expand(inputs.shape)


def captum_call(noisy: Attribute) -> Callable[[Attribute], Attribute]:
    """Decorator that also lets Captum call ``attribute(self, inputs, target)``; ``noisy`` is the same
    method, but accepts pixels outside [0, 1]."""

    def decorated(attribute: Attribute) -> Attribute:
        @functools.wraps(attribute)
        def call(self: Any, inputs: Any, target: Any = None) -> Any:
            if isinstance(inputs, tuple) and len(inputs) == 1:
                return (noisy(self, inputs[0], target),)
            return attribute(self, inputs, target)

        call.__wrapped__ = noisy  # type: ignore[attr-defined]
        return call

    return decorated


class Copy(NamedTuple):
    """A photo with its contrast scaled by ``contrast`` k, then mirrored if ``mirrored``."""

    mirrored: bool
    contrast: float

    def of(self, images: Tensor, mean: Tensor) -> Tensor:
        """The copies of ``images`` (B, C, H, W); contrast is scaled around the colour ``mean`` (1,
        C, 1, 1)."""
        images = mean + self.contrast * (images - mean)
        return images.flip(-1) if self.mirrored else images

    def back(self, maps: Tensor) -> Tensor:
        """Maps (B, M, h, w) of the copies, mapped back onto the photos."""
        return maps.flip(-1) if self.mirrored else maps


# The copies other than the photo itself.
OTHERS = (
    Copy(True, 1.0),
    *(Copy(mirrored, contrast) for contrast in (0.9, 1.1) for mirrored in (False, True)),
)


Choose = Callable[[Tensor], Tensor]  # logits (B, K) -> classes to explain, LongTensor (B, M)


class _MicroBatchSize:
    """Descriptor for the field ``max_forward_batch``, whose value is stored in ``_batches``."""

    def __get__(self, explainer: Explainer | None, cls: type[Explainer]) -> int:
        return 32 if explainer is None else explainer._batches.size

    def __set__(self, explainer: Explainer, size: int) -> None:
        explainer._batches = ForwardBatches(size)


@dataclass(eq=False, repr=False)
class Explainer(CaptumMethod, ABC):
    """A method that explains why a classifier predicts a class.

    A subclass with its own options is also a dataclass: it declares each option as a field
    (``@dataclass(kw_only=True, eq=False, repr=False)``) whose annotation gives the allowed values (see
    :mod:`xattn.runtime.option_checks`), and checks anything else in ``__post_init__``.

    Args:
        backbone: the classifier.
        head: a trained head of that backbone, for explainers that read one.
        seed: for explainers that draw random numbers; results depend only on (seed, image).
        max_forward_batch: largest number of images in one pass; halved permanently when memory runs out.
        aug_smooth: average the maps of six copies that differ in contrast and mirroring; see
            :mod:`xattn.explainers.base`. It takes six times as many passes.

    Class attributes: ``name``; ``forwards``, the largest number of forward passes per image and copy;
    ``perturbs``, whether these passes run many perturbed images without gradients; ``one_by_one``,
    whether each image has its own micro-batches, so that a batch of images needs no fixed size;
    ``needs_head``; ``per_class``, whether it explains only classes and no other targets;
    ``is_mask``, whether the map is already a mask, to be shown without min-max; ``clips``, whether
    it also explains clips and volumes (B, C, T, H, W), with maps (B, 1, t, h, w).

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("gradcam", net)
        >>> targets = torch.tensor([0, 3])
        >>> method.attribute(torch.rand(2, 3, 64, 64), target=targets).shape
        torch.Size([2, 1, 2, 2])
    """

    name: ClassVar[str]
    forwards = 1
    perturbs = False
    one_by_one = False
    needs_head: ClassVar[bool] = False
    per_class: ClassVar[bool] = False
    is_mask: ClassVar[bool] = False
    clips: ClassVar[bool] = False

    backbone: Backbone
    head: Head | None = None
    seed: int = 0
    max_forward_batch: int = _MicroBatchSize()  # type: ignore[assignment]
    aug_smooth: bool = field(default=False, kw_only=True)
    _batches: ForwardBatches = field(init=False)
    _notes: tuple[str, ...] = field(default=(), init=False)
    _aimed: tuple[Any, Explainer] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check(
            "aug_smooth", self.aug_smooth, bool
        )  # also where a subclass's annotations cannot be read
        check_fields(self, but=EXPLAINERS.given)
        if self.aug_smooth:
            self._note(f"mean over {1 + len(OTHERS)} copies of the photo (aug_smooth)")
        if getattr(self.backbone, "reads_clips", False) and not self.clips:
            raise ValueError(
                f"explainer: {self.name!r} explains photos, but {self.backbone.name} reads clips; use "
                f"'gradcam', 'occlusion' or 'rise'"
            )
        if self.per_class and isinstance(self.backbone, Scored):
            raise ValueError(
                f"target: explainer {self.name!r} explains only classes, not "
                f"{self.backbone.class_names[0]!r}; give a class, or use 'gradcam' or "
                f"'occlusion'"
            )
        if self.needs_head and self.head is None:
            raise ValueError(
                f"head: explainer {self.name!r} needs a head; give head=load_head(...), "
                f"or a folder with --heads or --probe"
            )
        if self.head is not None:
            check_head(self.head, self.backbone)

    @property
    def notes(self) -> tuple[str, ...]:
        """How the explainer's maps of this backbone deviate from the method's definition; recorded in the
        provenance.
        """
        return self._notes

    @property
    def facts(self) -> dict[str, Any]:
        """Other facts about the explainer that the provenance records."""
        return {}

    @property
    def total_forwards(self) -> int | None:
        """The number of forward passes per image, summed over all copies; None if ``forwards`` is
        unknown."""
        copies = 1 + len(OTHERS) if self.aug_smooth else 1
        return None if self.forwards is None else copies * self.forwards

    def _note(self, text: str) -> None:
        self._notes = *self._notes, text

    def _attribute_noisy(self, inputs: Tensor, target: Any) -> Tensor:
        """:meth:`attribute` for a tensor (B, 3, H, W) whose pixels may lie outside [0, 1]."""
        if is_score(self.backbone, target):
            return self.with_target(target)._attribute_noisy(inputs, 0)
        target = class_of(self.backbone, target)
        targets = check_target(target, inputs.shape[0], self.backbone.num_classes)

        def maps_of(images: Tensor, classes: Tensor) -> Tensor:
            images, classes = self._move(images), classes.to(self.backbone.device)
            maps = self._attribute(images, classes)
            return self._smoothed(maps, images, lambda copies: self._attribute(copies, classes))

        with self._guard():
            if targets.is_inference():  # such tensors cannot be saved for a backward pass
                targets = targets.clone()
            maps = self._batches.run(maps_of, inputs, targets)
        return torch.cat(maps).detach().to(inputs.device)

    @captum_call(_attribute_noisy)
    def attribute(self, inputs: Tensor | NDArray[Any], target: Any) -> Tensor:
        """Raw maps of one class, or of another target, per image.

        Args:
            inputs: float (B, 3, H, W), raw pixels in [0, 1]; the backbone normalises them. Single
                images and arrays are also accepted; see :mod:`xattn.photos.arrays`.
            target: one class for all images, by number or name; a LongTensor (B,) with one class per image;
                or any other number computed from the network's output (see
                :mod:`xattn.backbone.targets`): a function ``logits (B, K) -> (B,)`` or, for an
                image-text model, a text.

        Returns:
            (B, 1, h, w), detached, on the device of ``inputs``.

        Raises:
            ValueError: inputs that have the wrong shape, are not finite or are outside [0, 1]; a target
                that is neither one class nor one per image, or is out of range.
        """
        return self._attribute_noisy(check_inputs(inputs, self.backbone), target)

    def with_target(self, target: Any) -> Explainer:
        """Return the same method with the same options for ``target``, which replaces the classes
        and becomes class 0.

        Args:
            target: as in :func:`xattn.backbone.scored.scored`.
        """
        if self._aimed is None or self._aimed[0] is not target:
            options = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
            options["backbone"] = scored(self.backbone, target)
            made = type(self)(**options)
            vars(made).update({k: v for k, v in vars(self).items() if k == "name"})  # set per row
            self._aimed = target, made
        return self._aimed[1]

    def attribute_classes(
        self, inputs: Tensor | NDArray[Any], choose: Choose
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of several classes per image, chosen from the logits of the same pass.

        Args:
            inputs: as in :meth:`attribute`.
            choose: receives logits (B, K) and returns the classes to explain as a LongTensor (B, M).

        Returns:
            logits (B, K), the chosen classes (B, M), and raw maps (B, M, h, w). Explainers that
            read class maps from features (``head``, ``cam``) need only one backbone pass.
        """
        inputs = check_inputs(inputs, self.backbone)

        def explained(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            images = self._move(images)
            logits, classes, maps = self._attribute_classes(images, choose)

            def again(copies: Tensor) -> Tensor:
                return self._attribute_classes(copies, lambda _: classes)[2]

            return logits, classes, self._smoothed(maps, images, again)

        with self._guard():
            parts = self._batches.run(explained, inputs)
        logits, classes, maps = (torch.cat(p).detach() for p in zip(*parts, strict=True))
        return logits.to(inputs.device), classes.to(inputs.device), maps.to(inputs.device)

    def _smoothed(
        self, maps: Tensor, images: Tensor, explain: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``maps`` of ``images``; with ``aug_smooth`` averaged with the maps of the copies."""
        if not self.aug_smooth:
            return maps
        mean = self.backbone.mean.to(images)
        for copy in OTHERS:
            maps = maps + copy.back(explain(copy.of(images, mean)))
        return maps / (1 + len(OTHERS))

    @abstractmethod
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        """Maps (b, 1, h, w) for checked images (b, 3, H, W) and classes (b,) on the device."""

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            logits = self.backbone.logits(images)
        classes = self._chosen(choose, logits)
        return logits, classes, self._class_maps(images, classes)

    def _class_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        """Maps (b, M, h, w) of the classes (b, M) for images (b, 3, H, W)."""
        return torch.cat([self._attribute(images, column) for column in classes.unbind(1)], 1)

    def _chosen(self, choose: Choose, logits: Tensor) -> Tensor:
        keep_logits(logits)
        classes = choose(logits)
        if classes.ndim != 2 or classes.shape[0] != logits.shape[0] or classes.shape[1] < 1:
            raise ValueError(
                f"choose: got shape {tuple(classes.shape)} for {logits.shape[0]} images; "
                f"return a LongTensor (B, M)"
            )
        check_target(classes.flatten(), classes.numel(), logits.shape[1])
        return classes.to(logits.device)

    def _move(self, images: Tensor) -> Tensor:
        """Move inputs to the backbone's device and dtype, detached from the caller's graph."""
        dtype = next((p.dtype for p in self.backbone.parameters()), images.dtype)
        images = images.detach()
        if images.is_inference():  # such tensors cannot be saved for a backward pass
            images = images.clone()
        return images.to(self.backbone.device, dtype)

    def _others(self) -> list[nn.Module]:
        """The networks, other than backbone and head, that the explainer runs."""
        return []

    @contextmanager
    def _guard(self) -> Iterator[None]:
        others = self._others()
        modules = [m for m in (self.backbone, self.head, *others) if m is not None]
        own = [self.backbone.model, probe_of(self.backbone), self.head, *others]
        held = alone(*(m for m in own if m is not None))
        # Here and not only in passes: relevance rules must see a norm before it is rewritten.
        state = preserve_state(*modules)
        with held, state, torch.inference_mode(False), correct_norm_gradients():
            # Backbone.eval does not touch a model that a user has set to train mode.
            for part in {part for module in modules for part in module.modules()}:
                if part.training:
                    part.training = False
            yield


class ImageByImage(Explainer):
    """Base class of explainers that process one image at a time and use the same passes for all of its
    classes."""

    one_by_one = True

    @abstractmethod
    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        """Maps (M, h, w) float64 of the classes (M,) for one image (3, H, W)."""

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._class_maps(images, target[:, None])

    @torch.no_grad()
    def _class_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        # A half-precision map would round small differences away.
        dtype = torch.promote_types(images.dtype, torch.float32)
        maps = [self._explain(x, c).to(dtype) for x, c in zip(images, classes, strict=True)]
        return torch.stack(maps)


def check_inputs(inputs: Tensor | NDArray[Any], backbone: Backbone) -> Tensor:
    """Return ``inputs`` as a float tensor (B, 3, H, W) with B >= 1; raise a ``ValueError`` unless
    its values are finite and in [0, 1]."""
    return input_batch(inputs, backbone.mean.shape[1], axes=backbone.mean.ndim - 2)


def check_target(target: Tensor | int, batch: int, num_classes: int) -> Tensor:
    """Return ``target`` as a LongTensor (B,); raise a ``ValueError`` unless it is one class or one
    per image."""
    if isinstance(target, Integral) and not isinstance(target, bool):
        target = torch.full((batch,), int(target), device="cpu")
    whole = isinstance(target, Tensor) and target.dtype in (torch.int64, torch.int32)
    if not whole or target.ndim != 1 or target.shape[0] != batch:  # type: ignore[union-attr]
        got = (
            f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else repr(target)
        )
        raise ValueError(
            f"target: got {got} for {batch} images; give one int or a LongTensor ({batch},)"
        )
    low, high = (int(v) for v in target.aminmax())  # type: ignore[union-attr]
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        raise ValueError(f"target: class {bad} is out of range 0..{num_classes - 1}")
    return target.long()  # type: ignore[union-attr]


def probe_of(backbone: Backbone) -> AttentiveHead | None:
    """The head that computes the logits of a probed backbone; None if the network's own classifier computes
    them."""
    while isinstance(backbone, BackboneView):
        backbone = backbone.base
    return backbone.probe if isinstance(backbone, Probed) else None


def check_head(head: Head, backbone: Backbone) -> None:
    """Raise a ``ValueError`` unless ``head`` was trained for the classes and feature maps of
    ``backbone``."""
    own_probe = probe_of(backbone)  # it reads the maps of the same pass
    if own_probe is not None and sha256(head) == sha256(own_probe):
        return
    if own_probe is None and isinstance(head, AttentiveHead):
        names = head.class_names
        others = names is not None and names != list(backbone.class_names)
        if others or head.num_classes != backbone.num_classes:
            shown = f"{', '.join(names[:3])}, ..." if names else f"{head.num_classes} without names"
            raise ValueError(
                f"head: {head.name!r} has its own classes ({shown}), not those of "
                f"{backbone.name}; explain xattn.heads.probed.probed(backbone, head), or "
                f"give --probe FOLDER"
            )
    if head.backbone_fingerprint != backbone.fingerprint:
        raise ValueError(
            f"head: trained on {head.backbone_name} with weights sha256 "
            f"{head.backbone_fingerprint[:12]}, but the backbone {backbone.name} has "
            f"{backbone.fingerprint[:12]}; load a matching pair"
        )


# ---------------------------------------------------------------------- state

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_HOOKED = "_output_capturing_hooks_installed"  # set by transformers on modules where it adds hooks


@contextmanager
def preserve_state(*modules: nn.Module) -> Iterator[None]:
    """Leave modules and random number generators as they were, even after an exception.

    It restores training modes, ``requires_grad``, ``.grad``, buffers, hooks, and the generators of
    Python, NumPy and torch (CPU, and CUDA once it is in use). No other thread may change the modules
    meanwhile, see :meth:`xattn.Backbone.alone`. The generators are shared by all threads, so numbers
    that another thread draws meanwhile will be drawn again.

    Example:
        >>> import torch
        >>> from xattn.explainers import preserve_state
        >>> net = torch.nn.Linear(2, 2).train()
        >>> with preserve_state(net):
        ...     _ = net.eval()
        >>> net.training
        True
    """
    every = list(dict.fromkeys(m for module in modules for m in module.modules()))
    own = [(m, vars(m)) for m in every]
    parameters = list(
        dict.fromkeys(p for m in every for p in m._parameters.values() if p is not None)
    )
    modes = [m.training for m in every]
    hooks = [(state[k], dict(state[k])) for _, state in own for k in _HOOKS if k in state]
    unhooked = [state for m, state in own if _HOOKED not in state and not hasattr(type(m), _HOOKED)]
    grads = [
        (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in parameters
    ]
    buffers = [
        (m, key, value, value.clone())
        for m in every
        if not isinstance(m, Frozen)
        for key, value in m._buffers.items()
        if value is not None
    ]
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    rng = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        for m, training in zip(every, modes, strict=True):
            if m.training != training:
                m.training = training
        for current, before in hooks:
            if current != before:
                current.clear()
                current.update(before)
        for state in unhooked:
            state.pop(_HOOKED, None)
        for p, (requires_grad, grad, copy) in zip(parameters, grads, strict=True):
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad
            if grad is not None and copy is not None:
                grad.detach().copy_(copy)
        for m, key, value, copy in buffers:
            if not torch.equal(value, copy):
                with torch.no_grad():
                    value.copy_(copy)
            m._buffers[key] = value
        random.setstate(rng[0])
        np.random.set_state(rng[1])
        torch.set_rng_state(rng[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


# ---------------------------------------------------------------------- registry


@dataclass(frozen=True)
class ExplainerEntry:
    """The registry's entry for an explainer.

    Example:
        >>> from xattn.explainers.base import EXPLAINERS
        >>> entry = EXPLAINERS.entry("gradcam")
        >>> entry.title, entry.networks
        ('Grad-CAM', ('cnn', 'vit'))
    """

    name: str
    title: str = ""
    """Its name in running text, such as "Grad-CAM++"; by default the registered name."""
    networks: tuple[str, ...] = ("cnn", "vit")
    """The kinds of network that it explains."""
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Options that are tested for every explainer; the first are cheap."""


def register_explainer(name: str, **about: Any) -> Callable[[type[Explainer]], type[Explainer]]:
    """Class decorator: register an explainer for :func:`create_explainer` under ``name``.

    Args:
        about: further fields of :class:`ExplainerEntry`.
    """
    return EXPLAINERS.register(ExplainerEntry(name, **about))


def _hint(name: str) -> str:
    """A hint about how rows such as ``randomized_head`` are made."""
    method = name.partition("randomized_")[2]
    if not method:
        return ""
    return (
        f"tables add this row by themselves: {method} on a network with random weights (of several "
        f"heads, the first); in Python, xattn.eval.randomized_explainer creates it from your explainer"
    )


EXPLAINERS: Registry[Explainer, ExplainerEntry] = Registry(
    "xattn.explainers",
    base=Explainer,
    homes=(
        *("xattn.explainers.cams", "xattn.explainers.masking", "xattn.explainers.relevance"),
        "xattn.explainers",
    ),
    argument="explainer",
    noun="explainer",
    given=("backbone", "head", "seed", "max_forward_batch"),
    adopt=make_adopter(Explainer, register_explainer),
    mark=with_name,
    hint=_hint,
)


list_explainers = EXPLAINERS.names
explainer_class = EXPLAINERS.get
# Rows of tables that a method has to beat, by name prefix.
CONTROLS = {
    "qk_randomized_": "random attention",
    "randomized_": "random weights",
    "static_": "fixed attention",
}


def method_title(name: str) -> str:
    """A method's name in running text; an unregistered name, such as a head's, is returned unchanged.

    >>> method_title("gradcam_plusplus"), method_title("randomized_gradcam"), method_title("my-head")
    ('Grad-CAM++', 'Grad-CAM, random weights', 'my-head')
    """
    for prefix, how in CONTROLS.items():
        if name.startswith(prefix):
            return f"{method_title(name.removeprefix(prefix))}, {how}"
    return (name in EXPLAINERS and EXPLAINERS.entry(name).title) or name


def create_explainer(
    name: str,
    backbone: Backbone,
    head: Head | None = None,
    seed: int = 0,
    max_forward_batch: int = 32,
    **options: Any,
) -> Explainer:
    """Create an explainer from its name; the arguments are those of :class:`Explainer`, and ``options``
    are those of the explainer's own class.

    Raises:
        ValueError: unknown name (with near matches), unknown option, a head that is missing or
            belongs to another backbone, or a backbone that the explainer cannot read.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("integrated_gradients", net, steps=8)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=7).shape
        torch.Size([1, 1, 64, 64])
    """
    cls = explainer_class(name)
    EXPLAINERS.check_options(name, options)
    return cls(backbone, head, seed=seed, max_forward_batch=max_forward_batch, **options)
