"""Explainers from outside xattn: trained heads, Captum's objects, any object with
``attribute(inputs, target)``, and plain functions ``f(images, target) -> maps``.

    captum = IntegratedGradients(backbone.logits)
    evaluate(backbone, {"head": head, "captum": captum, "mine": lambda x, target: x.mean(1)}, photos)

A method receives images (B, 3, H, W) of **raw pixels in [0, 1]**, like every explainer, and classes (B,);
``backbone.logits`` normalises the images itself. A Captum object built on the network itself (the module
passed to ``load_backbone``, or ``backbone.model``) receives normalised images, because the network expects
them. A method returns (B, 1, h, w) or (B, h, w), as a tensor or an array; attributions of the three colour
channels are summed, signed or absolute.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from xattn.backbone import Backbone
from xattn.backbone.scored import Scored
from xattn.explainers import base
from xattn.explainers.base import Choose, Explainer, create_explainer
from xattn.heads import Head
from xattn.runtime.copies import copies_of

Method = TypeVar("Method", bound=Callable[..., Any])

_OFFERED = ("backbone", "head", "seed")  # further arguments that a function may take


class WrongShapeError(ValueError):
    """Raised if a method's return value is not a map; the method is at fault, not the image."""


@dataclass(kw_only=True, eq=False, repr=False)
class AdaptedExplainer(Explainer):
    """Base class of explainers whose maps are computed outside xattn. It checks the maps and reshapes them
    to (b, 1, h, w), or for clips to (b, 1, t, h, w).

    Args:
        channels: how attributions of several channels become one map: ``"signed"`` adds them,
            ``"absolute"`` adds their absolute values.
    """

    clips = True

    channels: Literal["signed", "absolute"] = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._note(f"attributions of several channels: {self.channels} sum")

    def with_target(self, target: Any) -> Explainer:
        """Return the explainer for another target. Only a function that takes the backbone as an
        argument supports this; it receives a backbone with that target.

        Raises:
            ValueError: the method is not such a function, so its target cannot be changed.
        """
        if "backbone" in self._asked(self._call):
            return super().with_target(target)
        raise ValueError(
            f"target: explainer {self.name!r} comes from outside xattn and explains only classes; "
            f"create it for xattn.backbone.scored.scored(backbone, target), and explain its class 0"
        )

    @property
    def _call(self) -> Any:
        """The function or object that computes the maps."""
        raise NotImplementedError

    @property
    def any_channels(self) -> bool:
        """Whether to sum channels even if there are more or fewer of them than in the image."""
        return False

    def attribute_classes(self, inputs: Any, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        """Like :meth:`Explainer.attribute_classes`; an error in the method is raised as a one-line
        message that names the method."""
        try:
            return super().attribute_classes(inputs, choose)
        except (ValueError, MemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"explainer: {self.name} failed ({reason}); correct it") from error

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            found = self._found(images, target)
        return single_channel_maps(found, images, self.name, self.channels, self.any_channels)

    def _found(self, images: Tensor, target: Tensor) -> Any:
        """The method's return value."""
        raise NotImplementedError

    def _asked(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The backbone, head and seed, each only if the function has a parameter for it."""
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # some functions written in C have no signature
            return {}
        return {name: getattr(self, name) for name in _OFFERED if name in parameters}


@dataclass(kw_only=True, eq=False, repr=False)
class OwnExplainer(AdaptedExplainer):
    """Wraps a function, or an object with ``attribute(inputs, target)``, as an explainer; see the
    module's description.

    ``forwards``, ``perturbs``, ``one_by_one`` and ``is_mask`` are taken from the object if it has them.

    Args:
        method: the function or object.
        pixels: the kind of input: ``"raw"`` pixels in [0, 1], or ``"normalised"`` pixels as
            ``backbone.model`` expects them.
    """

    method: Any
    pixels: Literal["raw", "normalised"] = "raw"

    def __post_init__(self) -> None:
        self.name = _name_of(self.method)  # type: ignore[misc]
        super().__post_init__()
        self.forwards = getattr(self.method, "forwards", None)  # type: ignore[assignment]
        for fact in ("perturbs", "one_by_one", "is_mask"):
            setattr(self, fact, bool(getattr(self.method, fact, False)))
        self._note(f"{_path_of(self.method)} on {self.pixels} pixels")
        self._callable = _on_logits(self.method)

    @property
    def _call(self) -> Any:
        return self.method

    @property
    def any_channels(self) -> bool:
        return _is_captum(self.method)

    def attribute(self, inputs: Any, target: Any = None) -> Any:
        """Like :meth:`Explainer.attribute`; also accepts a classifier that is not a
        :class:`xattn.Backbone`."""
        if isinstance(self.backbone, Backbone):
            return super().attribute(inputs, target)
        return self._attribute(inputs, target)

    def _others(self) -> list[nn.Module]:
        """The modules that a Captum object holds, such as the caller's network."""
        held = vars(self.method).values() if _is_captum(self.method) else ()
        return [network for value in held if (network := _network(value)) is not None]

    def _found(self, images: Tensor, target: Tensor) -> Any:
        if self.pixels == "normalised":
            images = self.backbone.normalize(images)
        if _is_captum(self.method):  # otherwise Captum warns that it sets requires_grad
            images = images.clone().requires_grad_()
        if hasattr(self._callable, "attribute"):
            return self._callable.attribute(images, target=target)
        return self._callable(images, target, **self._asked(self._callable))


@dataclass(kw_only=True, eq=False, repr=False)
class FunctionExplainer(AdaptedExplainer):
    """Base class of the explainers that :func:`register_explainer` creates from functions."""

    function: ClassVar[Callable[..., Any]]
    forwards = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.backbone, Scored) and "backbone" not in self._asked(self._call):
            self.with_target(self.backbone.target)

    @property
    def _call(self) -> Any:
        return type(self).function

    def _found(self, images: Tensor, target: Tensor) -> Any:
        return self._call(images, target, **self._asked(self._call))


def register_explainer(name: str, **about: Any) -> Callable[[Method], Method]:
    """Decorator: register an :class:`Explainer` or a function for ``create_explainer`` under ``name``.

    A function ``f(images, target) -> maps`` must behave as the module's description says; it may
    have further parameters ``backbone``, ``head`` and ``seed``, which are passed by name.

    Args:
        about: values of further fields of :class:`~xattn.explainers.ExplainerEntry`.

    Raises:
        ValueError: the name is taken, or the decorated object is neither an explainer nor a
            function.

    Example:
        >>> import xattn
        >>> from xattn import register_explainer
        >>> @register_explainer("map_of_brightness")
        ... def brightness(backbone, images, targets):
        ...     return images.sum(1)
        >>> "map_of_brightness" in xattn.list_explainers()
        True
    """

    def add(method: Method) -> Method:
        cls: Any = method
        if not isinstance(method, type) and callable(method):
            about_function = {
                "function": staticmethod(method),
                "__module__": method.__module__,
                "__qualname__": method.__qualname__,
                "__doc__": method.__doc__,
            }
            cls = type(method.__name__, (FunctionExplainer,), about_function)
        elif not (isinstance(method, type) and issubclass(method, Explainer)):
            raise ValueError(
                f"explainer: got {method!r}; decorate a subclass of xattn.explainers.Explainer, or a "
                f"function f(images, target) -> maps"
            )
        base.register_explainer(name, **about)(cls)
        return method

    return add


def as_explainer(
    method: Any,
    backbone: Any,
    *,
    name: str | None = None,
    channels: Literal["signed", "absolute"] = "signed",
    pixels: Literal["raw", "normalised"] | None = None,
    seed: int = 0,
    max_forward_batch: int = 32,
) -> Explainer:
    """Turn anything that explains ``backbone`` into an explainer; see the module's description.

    Args:
        method: an explainer, which is returned unchanged; a name; a trained head; or a function or object
            from outside xattn.
        name: the name in tables and packs; by default the method's own name.
        channels: how attributions of several channels become one map, for a method from outside xattn.
        pixels: what such a method receives; by default raw pixels in [0, 1], but normalised pixels for a
            Captum object built on the network itself.

    Raises:
        ValueError: ``method`` is none of these, or the head belongs to another backbone.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> def brightness(images, targets):
        ...     return images.sum(1)
        >>> method = xattn.as_explainer(brightness, net, name="brightness")
        >>> method.attribute(torch.rand(2, 3, 64, 64), target=torch.tensor([0, 3])).shape
        torch.Size([2, 1, 64, 64])
    """
    explainer: Explainer
    shared: dict[str, Any] = {"seed": seed, "max_forward_batch": max_forward_batch}
    if isinstance(method, Explainer):
        explainer = method
    elif isinstance(method, str):
        explainer = create_explainer(method, backbone, **shared)
    elif isinstance(method, Head):
        explainer = create_explainer("head", backbone, method, **shared)
    elif isinstance(method, type) or not (callable(method) or _has_attribute(method)):
        hint = "create an instance of it first" if isinstance(method, type) else "give an explainer"
        raise ValueError(
            f"explainer: got {method!r:.80}; {hint}, a trained head, an object with attribute(inputs, "
            f"target), or a function f(images, target) -> maps"
        )
    else:
        normalised = _is_captum(method) and _reads_model(method, backbone)
        explainer = OwnExplainer(
            backbone,
            method=method,
            channels=channels,
            pixels=pixels or ("normalised" if normalised else "raw"),
            **shared,
        )
    if name is not None and name != explainer.name:
        explainer = copy.copy(explainer)
        explainer.name = name  # type: ignore[misc]
    return explainer


def unwrap(explainer: Any) -> Any:
    """The object or function that an explainer wraps; an explainer that wraps nothing is returned
    unchanged."""
    return explainer.method if isinstance(explainer, OwnExplainer) else explainer


def is_foreign(explainer: Any) -> bool:
    """Whether an explainer comes from outside xattn and therefore needs a trial run."""
    made = explainer.method if isinstance(explainer, OwnExplainer) else explainer
    outside = not type(made).__module__.startswith("xattn.")
    return isinstance(made, AdaptedExplainer) or outside


def single_channel_maps(
    found: Any, images: Tensor, name: str, channels: str = "signed", any_channels: bool = False
) -> Tensor:
    """Convert a method's return value for images (B, C, H, W) to float maps (B, 1, h, w) on the
    images' device.

    Args:
        found: (B, h, w), (B, 1, h, w) or (B, C, h, w), a tensor, an array or a tuple of one tensor.
        name: the method's name, for errors.

    Raises:
        WrongShapeError: ``found`` is anything else.
    """
    if isinstance(found, tuple) and len(found) == 1:
        found = found[0]
    maps = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    if isinstance(maps, Tensor) and maps.ndim == images.ndim - 1:
        maps = maps[:, None]
    count, colours = images.shape[:2]
    grid = "h, w" if images.ndim == 4 else "t, h, w"
    wanted = f"return (B, {grid}), (B, 1, {grid}), or a map for each colour (B, {colours}, {grid})"
    if (
        not isinstance(maps, Tensor)
        or maps.ndim != images.ndim
        or len(maps) != count
        or not maps.numel()
    ):
        got = tuple(found.shape) if hasattr(found, "shape") else type(found).__name__
        raise WrongShapeError(f"explainer: {name} returned {got} for {count} images; {wanted}")
    if maps.shape[1] not in (1, colours) and not any_channels:
        raise WrongShapeError(
            f"explainer: {name} returned {tuple(found.shape)}, {maps.shape[1]} maps per image; {wanted}"
        )
    maps = maps.detach().to(images.device)
    maps = maps if maps.is_floating_point() else maps.float()
    if maps.shape[1] > 1:
        maps = (maps.abs() if channels == "absolute" else maps).sum(1, keepdim=True)
    return maps


def _has_attribute(method: Any) -> bool:
    return callable(getattr(method, "attribute", None))


def _is_captum(method: Any) -> bool:
    return _has_attribute(method) and hasattr(method, "forward_func")


def _name_of(method: Any) -> str:
    name = getattr(method, "name", None) or getattr(method, "__name__", None)
    if isinstance(name, str) and name != "<lambda>":
        return name
    return "function" if inspect.isroutine(method) else type(method).__name__


def _path_of(method: Any) -> str:
    named = method if hasattr(method, "__qualname__") else type(method)
    return f"{named.__module__}.{named.__qualname__}"


def _reads_model(method: Any, backbone: Any) -> bool:
    """Whether a Captum object was built on a network that does not normalise its input: the one
    inside a backbone, or the one that the backbone was loaded from."""
    if not isinstance(backbone, Backbone):
        return False
    owner = _network(method.forward_func)
    if owner is None or owner is backbone:
        return False
    copies = {one for part in owner.modules() for one in copies_of(part)}
    return owner is backbone.model or not copies.isdisjoint(backbone.model.modules())


def _network(value: Any) -> nn.Module | None:
    """A module, or the module of a bound method."""
    owner = value if isinstance(value, nn.Module) else getattr(value, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class _Logits(nn.Module):
    """A backbone as a module that returns its logits."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.logits(images)


def _on_logits(method: Any) -> Any:
    """A copy of a Captum object in which each backbone is replaced by a module that returns only
    its logits, without taps."""
    if not _is_captum(method):
        return method
    copied = copy.copy(method)
    for key, value in vars(method).items():
        if isinstance(value, Backbone):
            setattr(copied, key, _Logits(value))
        elif _is_captum(value):
            setattr(copied, key, _on_logits(value))
    return copied


def as_explainers(
    methods: Mapping[str, Any], backbone: Any, max_forward_batch: int = 32
) -> dict[str, Explainer]:
    """Apply :func:`as_explainer` to each method."""
    if not isinstance(methods, Mapping):
        raise ValueError(f"explainers: got a {type(methods).__name__}; give {{name: explainer}}")
    explainers = {}
    for name, method in methods.items():
        explainer = as_explainer(method, backbone, max_forward_batch=max_forward_batch)
        if isinstance(explainer, OwnExplainer):
            explainer.name = name  # type: ignore[misc]
        explainers[name] = explainer
    return explainers
