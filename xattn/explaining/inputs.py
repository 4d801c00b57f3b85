"""Networks with several inputs: a map for each image input, and numbers for every other input.

    found = explain_inputs(net, {"rgb": rgb, "depth": depth, "table": table}, "occlusion")
    found["depth"].maps["occlusion"].overlay()
    found["table"].numbers["feature_ablation"], found["depth"].drop

One input is explained at a time while the others are held fixed: for input k, the explained function is
x -> f(a_1, ..., x, ..., a_n). The view of the network that computes this function (:func:`input_view`) is a
backbone like any other, so explainers and metrics need no special case. The channels of an image can be
treated as inputs in the same way (:func:`band_maps`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from xattn.backbone import Backbone, Preprocessing
from xattn.backbone.families.hooked import from_hooks
from xattn.explainers.base import create_explainer
from xattn.explainers.cams.layers import LayerExplainer
from xattn.explaining.photos import explain
from xattn.packs.explanation import Explanation
from xattn.packs.writer import save_pack
from xattn.photos.arrays import array_images
from xattn.photos.classes import Task, as_classes, find_class
from xattn.photos.image_names import file_stem
from xattn.photos.preprocessing import preprocessing_with_options
from xattn.runtime.copies import frozen_copy, without_wrappers
from xattn.runtime.files import write_rows
from xattn.runtime.names import did_you_mean

NUMBERS = ("integrated_gradients", "feature_ablation")
Inputs = Mapping[str, Tensor] | Sequence[Tensor]
PerInput = float | Sequence[float] | Mapping[str, Any] | None


@dataclass(frozen=True, eq=False)
class InputExplanation:
    """What one input contributes.

    Attributes:
        name: name of the input.
        drop: the decrease of p when the whole input is replaced by its baseline.
        maps: for an image, one explanation per method.
        numbers: for an input that is not an image, the contribution of each of its elements to the logit
            according to each method, in the shape of the input without its batch axis.
    """

    name: str
    drop: float
    maps: Mapping[str, Explanation]
    numbers: Mapping[str, NDArray[np.float32]]


class OneInput(nn.Module):
    """Maps a batch of one input (B, ...) to the network's logits (B, K); the other inputs are ``given``."""

    gradcam_layers = ()  # if there is no feature map

    def __init__(self, net: nn.Module, given: Mapping[str, Tensor], name: str, call: str) -> None:
        super().__init__()
        self.net, self.names, self.name, self.call = net, list(given), name, call
        self.input_channels = given[name].shape[1]
        for i, value in enumerate(given.values()):
            self.register_buffer(
                f"input_{i}", value
            )  # they are part of the function and therefore of its fingerprint

    def forward(self, x: Tensor) -> Tensor:
        values = {}
        for i, name in enumerate(self.names):
            value = self.get_buffer(f"input_{i}")
            values[name] = x if name == self.name else value.expand(len(x), *value.shape[1:])
        if self.call == "tuple":
            return self.net(*values.values())  # type: ignore[no-any-return]
        return self.net(**values) if self.call == "names" else self.net(values)  # type: ignore[no-any-return]


class _WithoutMaps(OneInput):
    """The same for a network that returns no feature maps; its tap is the pixels, on a small grid."""

    preprocessing: Preprocessing
    tap_names = ("pixels",)

    def forward_taps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.forward(x), [F.adaptive_avg_pool2d(x, 14)]


class InputView(Backbone):
    """A backbone for one image input; created by :func:`input_view`."""

    def __init__(self, *args: Any, about: Mapping[str, Any]) -> None:
        super().__init__(*args)
        self._about = dict(about)

    def about(self, target: int) -> dict[str, Any]:
        return self._about


class _Sample:
    """The inputs of one sample, checked; images are normalised for the network."""

    def __init__(self, net: nn.Module, inputs: Inputs, mean: PerInput, std: PerInput) -> None:
        if not isinstance(inputs, Mapping | tuple | list):
            raise ValueError(
                f"inputs: got a {type(inputs).__name__}; give a dict of tensors by name, or a tuple"
            )
        named = isinstance(inputs, Mapping)
        self.raw = dict(inputs) if isinstance(inputs, Mapping) else _numbered(inputs)
        for name, value in self.raw.items():
            if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"inputs: {name!r} is {got}; give each as a tensor with a batch of one, images "
                    f"(1, C, H, W), a table's row (1, F)"
                )
        self.net = frozen_copy(without_wrappers(net))
        self.call = _call_of(self.net, self.raw) if named else "tuple"
        self.images = [name for name, value in self.raw.items() if value.ndim == 4]
        self.raw = {name: self.taken(name, value) for name, value in self.raw.items()}
        self.photos = {name: self._photos(name, mean, std) for name in self.images}
        self.given = {name: self.normalised(name, value) for name, value in self.raw.items()}

    def taken(self, name: str, value: Tensor) -> Tensor:
        """A copy of an input; an image is scaled to [0, 1] as in ``explain``, and floats get the network's
        own dtype."""
        if name in self.images:
            at = name.removeprefix("input ") if self.call == "tuple" else repr(name)
            image = array_images(value, value.shape[1], f"inputs[{at}]")[0]
            value = image.input()[None].to(value.device)
        weight = next((p for p in self.net.parameters() if p.is_floating_point()), value)
        return value.detach().to(weight if value.is_floating_point() else value, copy=True)

    def _photos(self, name: str, mean: PerInput, std: PerInput) -> Preprocessing:
        channels, height, width = self.raw[name].shape[1:]
        own = Preprocessing((height, width), (0.0,) * channels, (1.0,) * channels, crop_pct=1.0)
        mean, std = (v.get(name) if isinstance(v, Mapping) else v for v in (mean, std))
        return preprocessing_with_options(own, channels, mean, std, None, None)

    def normalised(self, name: str, value: Tensor) -> Tensor:
        photos = self.photos.get(name)
        if photos is None:
            return value
        mean, std = (torch.tensor(v).view(-1, 1, 1).to(value) for v in (photos.mean, photos.std))
        return (value - mean) / std

    def view(
        self,
        name: str,
        class_names: Sequence[str] | None = None,
        task: Task | None = None,
        taps: Sequence[str] | None = None,
        **about: Any,
    ) -> InputView:
        if name not in self.images:
            hint = did_you_mean(name, self.images, f"images are {', '.join(self.images) or 'none'}")
            raise ValueError(
                f"name: {name!r} is not an image (1, C, H, W) among the inputs; {hint}"
            )
        parts = (self.net, self.given, name, self.call)
        bound, kind = OneInput(*parts).eval(), f"{type(self.net).__name__} of {name}"
        bound.preprocessing = self.photos[name]  # type: ignore[assignment]
        try:
            made: nn.Module = from_hooks(bound, taps, kind=kind)
        except ValueError as error:
            if taps is not None or "taps: no module" not in str(error):
                raise
            made = _WithoutMaps(*parts).eval()
            made.preprocessing = self.photos[name]  # type: ignore[assignment]
        about = {"input": name, **about}
        return InputView(made, kind, self.photos[name], None, class_names, task, about=about)


def _numbered(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"input {i}": value for i, value in enumerate(inputs)}


def _call_of(net: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Whether ``forward`` takes inputs by name, or a single dictionary."""
    signature = inspect.signature(net.forward)
    with suppress(TypeError):
        signature.bind(**inputs)
        return "names"
    return "names" if set(inputs) <= set(signature.parameters) else "dict"


def input_view(
    net: nn.Module,
    inputs: Inputs,
    name: str,
    *,
    mean: PerInput = None,
    std: PerInput = None,
    class_names: Sequence[str] | None = None,
    task: Task | None = None,
    taps: Sequence[str] | None = None,
) -> Backbone:
    """A backbone for one image input of ``net``, with the other inputs fixed at those of one sample.

    Args:
        net: returns logits (1, K) from ``net(**inputs)``, from ``net(inputs)`` for a dict, or from
            ``net(*inputs)`` for a tuple.
        inputs: a dict of tensors by name, or a tuple, whose names are ``"input 0"``, ``"input 1"``, ...
            Each has a batch of one; images are (1, C, H, W), floats in [0, 1] or uint8.
        name: the image input that the backbone takes.
        mean, std: normalisation of images, as in :func:`~xattn.load_backbone`; a dict sets them per
            input. By default images are not normalised.
        class_names, task, taps: as in :func:`~xattn.load_backbone`.

    Raises:
        ValueError: the inputs have an unknown form, there is no image of that name, or the network fails
            on them.

    Example:
        >>> net = torch.nn.Bilinear(4, 2, 3)
        >>> class Two(torch.nn.Module):
        ...     def forward(self, image, table):
        ...         return image.flatten(1)[:, :3] * table.sum(1, keepdim=True)
        >>> view = input_view(Two(), {"image": torch.rand(1, 1, 8, 8), "table": torch.ones(1, 2)}, "image")
        >>> view.logits(torch.ones(5, 1, 8, 8)).shape
        torch.Size([5, 3])
    """
    return _Sample(net, inputs, mean, std).view(name, class_names, task, taps)


def explain_inputs(
    net: nn.Module,
    inputs: Inputs,
    explainer: str | Sequence[str] = "occlusion",
    *,
    target: int | str | None = None,
    numbers: Sequence[str] = NUMBERS,
    baselines: Mapping[str, Tensor] | None = None,
    mean: PerInput = None,
    std: PerInput = None,
    class_names: Sequence[str] | None = None,
    task: Task | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, InputExplanation]:
    """Explain every input of one sample with the others held fixed: images by maps, others by numbers.

    Args:
        net, inputs, mean, std, class_names, task: as in :func:`input_view`; at least one input is an image.
        explainer: one or more names from :func:`~xattn.list_explainers`, for the images.
        target: a class by number or name; by default the predicted class.
        numbers: methods for other inputs: ``"integrated_gradients"`` (arXiv 1703.01365, 50 steps) and
            ``"feature_ablation"``, by Captum; inputs that are not floats get only the latter.
        baselines: by input name, a tensor of the input's shape that stands for its absence; default: zeros.
        options: options of explainers by name, such as ``{"occlusion": {"size": 8}}``.
        output: the folder of a pack, in which each image input is a photo of that name. The numbers of the
            other inputs are in the provenance of these photos, and in ``numbers-NAME.csv``.

    Returns:
        Explanations by input name.

    Raises:
        ValueError: as in :func:`input_view`; or a class, method or baseline's shape does not fit.

    Example:
        >>> import torch
        >>> from xattn import explain_inputs
        >>> class Net(torch.nn.Module):
        ...     def forward(self, photo, age):
        ...         return torch.cat([photo.mean((1, 2, 3))[:, None], age], 1)
        >>> inputs = {"photo": torch.rand(1, 3, 32, 32), "age": torch.tensor([[0.4]])}
        >>> found = explain_inputs(Net(), inputs, "saliency", target=1)
        >>> sorted(found)
        ['age', 'photo']
    """
    sample = _Sample(net, inputs, mean, std)
    if not sample.images:
        raise ValueError("inputs: none is an image (1, C, H, W); use Captum for tables alone")
    unknown = next((one for one in numbers if one not in NUMBERS), None)
    if unknown is not None:
        raise ValueError(f"numbers: got {unknown!r}; {did_you_mean(unknown, NUMBERS)}")
    first = sample.view(sample.images[0], class_names, task)
    logits = first.logits(sample.raw[sample.images[0]])
    chosen = (
        int(logits.argmax())
        if target is None
        else find_class(target, first.class_names, first.name)
    )
    absent, p = _baselines(sample, baselines or {}), first.probabilities(logits)[0, chosen]
    drops: dict[str, float] = {}
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name in sample.raw:
        function = _function(sample, name, first.task)
        with torch.no_grad():
            drops[name] = float(p - first.probabilities(function(absent[name]))[0, chosen])
        if name not in sample.images:
            found[name] = {
                one: _numbers(one, function, sample.given[name], absent[name], chosen)
                for one in (numbers if sample.given[name].is_floating_point() else NUMBERS[1:])
            }
    about: dict[str, Any] = {
        "drops": {name: float(f"{drop:.6g}") for name, drop in drops.items()},
        "numbers": {k: {m: v.round(6).tolist() for m, v in by.items()} for k, by in found.items()},
    }
    maps: dict[str, dict[str, Explanation]] = {name: {} for name in sample.raw}
    methods = [explainer] if isinstance(explainer, str) else list(explainer)
    made: dict[str, Any] = {"seed": seed, "max_forward_batch": batch_size}
    for name in sample.images:
        view = sample.view(name, first.class_names, first.task, **about)
        given = [create_explainer(m, view, **made, **(options or {}).get(m, {})) for m in methods]
        for one in explain(sample.raw[name], view, explainer=given, classes=chosen, seed=seed):
            maps[name][one.method] = replace(one, image_id=name)
    if output is not None:
        save_pack(output, [one for by in maps.values() for one in by.values()])
        _write_numbers(Path(output), found)
    return {
        name: InputExplanation(name, drops[name], maps[name], found.get(name, {}))
        for name in sample.raw
    }


def _write_numbers(folder: Path, found: Mapping[str, Mapping[str, NDArray[np.float32]]]) -> None:
    """A CSV file beside the pack's own for each input that is not an image: a row for each element."""
    taken: set[str] = set()
    for name, by in found.items():
        shape = next((values.shape for values in by.values()), ())
        rows = [
            {"element": " ".join(map(str, at)), **{m: float(v[at]) for m, v in by.items()}}
            for at in np.ndindex(shape)
        ]
        if by and rows:
            write_rows(folder / f"numbers-{file_stem(name, taken)}.csv", rows)


def band_maps(
    backbone: Backbone, image: Tensor, explainer: str = "occlusion", target: int = 0, **options: Any
) -> Tensor:
    """A map for each channel of an image while the other channels are held fixed: (C, h, w).

    Args:
        image: (C, H, W) or (1, C, H, W) in [0, 1].
        explainer: a method that reads pixels, by gradients or by hiding them; methods that read a layer
            have a single map for all channels. For ``"input_x_gradient"`` the maps sum to the image's map.
        target: a class.
        options: options of the explainer.

    Raises:
        ValueError: the method reads a layer, or the image has another number of channels.
    """
    image = image if image.ndim == 4 else image[None]
    backbone.check_channels(image, "image")
    bands = image.split(1, 1)
    names, photos = _numbered(bands), backbone.preprocessing
    mean, std = (dict(zip(names, v, strict=True)) for v in (photos.mean, photos.std))
    sample = _Sample(_Bands(backbone), bands, mean, std)
    task = None if backbone.task == "binary" else backbone.task  # two logits represent one
    maps = []
    for name in sample.images:
        view = sample.view(name, backbone.class_names, task)
        method = create_explainer(explainer, view, **options)
        if isinstance(method, LayerExplainer):
            raise ValueError(
                f"explainer: {explainer!r} reads a layer, which all channels share; use "
                f"'input_x_gradient', 'occlusion' or another that reads pixels"
            )
        maps.append(method.attribute(sample.raw[name], target)[0, 0])
    return torch.stack(maps)


class _Bands(nn.Module):
    """A backbone whose channels are separate inputs (B, 1, H, W), each normalised."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *bands: Tensor) -> Tensor:
        return self.backbone.logits_normalized(torch.cat(bands, 1))


def _baselines(sample: _Sample, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The value of each input when it is absent, as the network receives it."""
    unknown = next((name for name in given if name not in sample.raw), None)
    if unknown is not None:
        raise ValueError(
            f"baselines: {unknown!r} is not an input; {did_you_mean(unknown, sample.raw)}"
        )
    found = {}
    for name, value in sample.raw.items():
        own = given.get(name, torch.zeros_like(value))
        if own.shape not in (value.shape, value.shape[1:]):
            raise ValueError(
                f"baselines: {name!r} is {tuple(own.shape)}, but the input is "
                f"{tuple(value.shape)}; give its shape"
            )
        found[name] = sample.normalised(
            name, sample.taken(name, own.reshape(value.shape)).to(value)
        )
    return found


def _function(sample: _Sample, name: str, task: Task) -> Callable[[Tensor], Tensor]:
    """Logits (B, K) as a function of one input, as the network receives it."""
    bound = OneInput(sample.net, sample.given, name, sample.call).eval().requires_grad_(False)

    def function(x: Tensor) -> Tensor:
        return as_classes(bound(x), task)

    return function


def _numbers(
    method: str, function: Callable[[Tensor], Tensor], x: Tensor, absent: Tensor, target: int
) -> NDArray[np.float32]:
    from captum.attr import FeatureAblation, IntegratedGradients

    kind = IntegratedGradients if method == "integrated_gradients" else FeatureAblation
    values = kind(function).attribute(x, baselines=absent, target=target)
    return values[0].detach().float().cpu().numpy()  # type: ignore[no-any-return]
