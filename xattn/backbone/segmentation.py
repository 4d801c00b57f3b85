"""Use a segmentation network as a backbone: anything that returns logits (B, K, h, w), run unchanged.

    backbone = load_backbone(fcn_resnet50(weights="DEFAULT"))
    explain("photo.jpg", backbone, explainer="gradcam", target=at_mask("dog", mask))

Grad-CAM of such a target is Seg-Grad-CAM (Vinogradova et al., arXiv 2002.11434): the mean over the pixels
of a mask replaces the logit of a class, and the map is taken from the bottleneck. :func:`bottleneck`
describes how that layer is found.

When the network is used as a classifier, the logit of class k is the mean log-odds of the pixels where the
class's probability is above one half, or the largest log-odds if there is no such pixel. The logit is
above 0 if and only if there is such a pixel, as for masks of :class:`~xattn.models.masks.MaskClassifier`.
Its sigmoid is p.

Some networks predict masks and their classes (MaskFormer, Mask2Former, EoMT, DETR). With the class
probabilities p_q(c) of mask q and its mask logits m_q, the logit of class c at a pixel is
log sum_q p_q(c) sigmoid(m_q). The class with the largest logit is the class that the model's own
post-processing gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.photos.preprocessing import Preprocessing, channels_of

own_derivative = torch._C.DisableTorchFunction  # lrp and attn_lrp have rules for the network only
_FOUND: ContextVar[list[Tensor] | None] = ContextVar("found", default=None)
_Key = tuple[Any, ...]  # position of a tensor in a nested answer
GRID = 14  # side of the pixel grid that replaces missing feature maps


class Masks(NamedTuple):
    """Q masks: class logits (B, Q, K + 1), with "no class" as the last class; mask logits (B, Q, h, w)."""

    classes: Tensor
    masks: Tensor

    def by_class(self) -> Tensor:
        """Compute log sum_q p_q(c) sigmoid(m_q), (B, K, h, w)."""
        log_p = _at_least_float(self.classes).log_softmax(-1)[..., :-1]
        log_m = F.logsigmoid(_at_least_float(self.masks))
        most_p, most_m = (one.detach().amax(1, keepdim=True) for one in (log_p, log_m))
        total = torch.einsum("bqc,bqhw->bchw", (log_p - most_p).exp(), (log_m - most_m).exp())
        least = torch.finfo(total.dtype).tiny  # as small as e^-87 of the largest
        return total.clamp_min(least).log() + most_p.mT[..., None] + most_m

    def pack(self) -> Tensor:
        """Concatenate everything into one tensor, (B, Q, K + 1 + h w)."""
        return torch.cat([self.classes, self.masks.flatten(2)], 2)


class Segmenter(nn.Module):
    """A :class:`~xattn.backbone.TapModule` for a network that returns logits (B, K, h, w), or masks.

    Its tap is the map that :func:`bottleneck` finds. If no map is found, as for a function, the tap is the
    pixels.

    Args:
        net: receives normalised images (B, 3, H, W). It returns the logits, a dict with ``out``, ``logits``
            or ``pred_masks``, or a dict with ``class_queries_logits`` and ``masks_queries_logits``. A hook
            is added permanently, so pass a copy.
        preprocessing: the default is 224 x 224 pixels, into which the whole photo is fitted with borders,
            with ImageNet's mean and std.
        size: (H, W), which replaces the size in ``preprocessing``.
        sigmoids: whether each channel is a sigmoid; by default a single channel is a sigmoid, and several
            channels are a softmax.
        class_names: the class names, if known.

    Raises:
        ValueError: if the network fails, or if its output has an unknown form.
    """

    default_task = "multilabel"

    def __init__(
        self,
        net: nn.Module,
        preprocessing: Preprocessing | None = None,
        size: tuple[int, int] | None = None,
        sigmoids: bool | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.class_names = net, class_names
        # torchvision's weights were trained with ImageNet's mean and std; for others it is a guess.
        self.assumes_preprocessing = preprocessing is None and not _of_torchvision(net)
        own = preprocessing or Preprocessing(
            interpolation="bilinear", crop_pct=1.0, crop_mode="border"
        )
        self.preprocessing = own if size is None else replace(own, input_size=size)
        self.tap_names = ["features"]
        self.gradcam_layer: nn.Module | None = None
        run = _Run(net, self.preprocessing)
        self.answers_masks = run.masked
        self.sigmoids = run.logits.shape[1] == 1 if sigmoids is None else sigmoids
        found = bottleneck(run)
        if found is None:
            self.gradcam_layers = ()
            self.tap_names = ["pixels"]
            return
        self.path, self.key = found
        self.gradcam_layer = nn.Identity()
        net.get_submodule(self.path).register_forward_hook(self._lead)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[0]

    def forward_taps(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the score (B, K) of each class, and the map."""
        logits, maps = self.forward_pixels(x)
        with own_derivative():
            return class_scores(logits, self.sigmoids), maps

    def forward_pixels(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the pixel logits (B, K, h, w), and the map."""
        answer, maps = self._run(x)
        with own_derivative():
            logits = answer.by_class() if isinstance(answer, Masks) else answer
        if x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            raise ValueError(
                "explainer: the output of the network has no gradient; use a method without gradients, "
                "such as 'occlusion' or 'rise'"
            )
        return logits, maps

    def forward_masks(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the masks in the form of :meth:`Masks.pack`, and the map; see :meth:`masks`."""
        found, maps = self.masks(x)
        return found.pack(), maps

    def masks(self, x: Tensor) -> tuple[Masks, tuple[Tensor, ...]]:
        """Compute the masks with their classes, and the map.

        Raises:
            ValueError: if the network returns only logits.
        """
        answer, maps = self._run(x)
        if not isinstance(answer, Masks):
            raise ValueError(
                f"target: {_kind(self.net)} returns logits of pixels, not masks; give at_point or "
                f"at_mask, or a MaskFormer or Mask2Former"
            )
        return answer, maps

    def odds(self, logits: Tensor) -> Tensor:
        """Compute log(p / (1 - p)) of each class at each pixel, (B, K, h, w)."""
        return logits if self.sigmoids else log_odds(logits)

    def _run(self, x: Tensor) -> tuple[Tensor | Masks, tuple[Tensor, ...]]:
        token = _FOUND.set([])
        try:
            answer, kept = self.net(x), _FOUND.get() or []
        finally:
            _FOUND.reset(token)
        maps = (kept[-1],) if kept else (F.adaptive_avg_pool2d(x, GRID),)
        return _understood(answer, self.net, len(x)), maps

    def _lead(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Pass the bottleneck through ``gradcam_layer``, and keep it for this thread's pass."""
        assert self.gradcam_layer is not None
        led = self.gradcam_layer(_at(output, self.key))
        kept = _FOUND.get()
        if kept is not None:
            kept.append(led.clone())  # later layers may work in place
        return _with(output, self.key, led)


def is_segmentation(net: nn.Module) -> bool:
    """Return whether a network is a known segmentation network.

    The known networks are torchvision's, those that transformers has for this task, and any network with
    ``encoder``, ``decoder`` and ``segmentation_head`` (segmentation_models_pytorch).
    """
    smp = all(hasattr(net, part) for part in ("encoder", "decoder", "segmentation_head"))
    named = re.search(r"For\w*Segmentation$", type(net).__name__) and hasattr(net, "config")
    return smp or bool(named) or _of_torchvision(net)


def _of_torchvision(net: nn.Module) -> bool:
    return type(net).__module__.startswith("torchvision.models.segmentation")


# ---------------------------------------------------------------------- answers


def class_scores(logits: Tensor, sigmoids: bool = False) -> Tensor:
    """Compute one score per class, (B, K), from pixel logits (B, K, h, w).

    The score is the mean log-odds of the pixels where the probability of class k is above one half, or the
    largest log-odds if there is no such pixel."""
    odds = (_at_least_float(logits) if sigmoids else log_odds(logits)).flatten(2)
    inside = odds > 0
    mean = (odds * inside).sum(2) / inside.sum(2).clamp(min=1)
    return torch.where(inside.any(2), mean, odds.amax(2))


def log_odds(logits: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) of the softmax over K classes, (B, K, ...).

    If K is 1, the logits themselves are returned. The computation is in float32 or better. For the most
    probable class the result is the class's logit minus the logsumexp of the other logits, which stays
    accurate near p = 1.
    """
    logits = _at_least_float(logits)
    if logits.shape[1] == 1:
        return logits
    most, first = logits.max(1, keepdim=True)
    others = logits.scatter(1, first, -torch.inf).logsumexp(1, keepdim=True)
    log_p = logits.log_softmax(1)
    rest = log_p - torch.log1p(-log_p.exp().scatter(1, first, 0.0))
    return rest.scatter(1, first, most - others)


def _at_least_float(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _read(answer: Any) -> Tensor | Masks | None:
    """Return the logits or masks in a network's output; None if there are none."""
    found = answer
    if isinstance(answer, Mapping):
        classes = answer.get("class_queries_logits", answer.get("logits"))
        masks = answer.get("masks_queries_logits", answer.get("pred_masks"))
        if masks is not None and getattr(classes, "ndim", 0) == 3:  # queries, also of DETR
            return Masks(classes, masks)
        found = next((answer[key] for key in ("out", "logits") if key in answer), masks)
        if found is masks and getattr(masks, "ndim", 0) == 5:  # SAM, with one prompt
            found = masks[:, 0]
    elif isinstance(answer, tuple | list) and answer:
        found = answer[0]
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found)
    floating = isinstance(found, Tensor) and found.is_floating_point()
    return found if floating and found.ndim == 4 and 0 not in found.shape else None


def _understood(answer: Any, net: nn.Module, count: int) -> Tensor | Masks:
    found = _read(answer)
    if found is None or len(found[0] if isinstance(found, Masks) else found) != count:
        shape = f" {tuple(answer.shape)}" if hasattr(answer, "shape") else ""
        keys = f" with {', '.join(map(str, answer))}" if isinstance(answer, Mapping) else ""
        raise ValueError(
            f"name_or_module: the output of {_kind(net)} for {count} images has an unknown form, "
            f"{type(answer).__name__}{shape}{keys}; return logits ({count}, K, h, w) of the pixels"
        )
    return found


def _check_channels_first(net: nn.Module, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    fits = [_has_aspect(sides, size) for sides in (shape[1:3], shape[2:])]
    if fits == [True, False]:
        raise ValueError(
            f"name_or_module: {_kind(net)} returns {shape} for an image of {size[0]} x {size[1]}; return "
            f"channels first: .permute(0, 3, 1, 2)"
        )


def _has_aspect(sides: Sequence[int], size: tuple[int, int]) -> bool:
    """Return whether a map with ``sides`` has the aspect ratio of an image, to within one cell."""
    return abs(sides[0] / size[0] * size[1] - sides[1]) < 1


def _kind(net: nn.Module) -> str:
    return str(getattr(net, "kind", type(net).__name__))


def _answer(net: nn.Module, own: Preprocessing) -> Any:
    """Return the output for one random image that requires a gradient."""
    weight = next(net.parameters(), torch.zeros((), device="cpu"))
    draw = torch.Generator().manual_seed(0)
    shape = (1, channels_of(net, own), *own.input_size)
    image = torch.rand(shape, generator=draw, device="cpu").to(weight)
    with torch.inference_mode(False), torch.enable_grad():
        return net(image.requires_grad_())


# ---------------------------------------------------------------------- the bottleneck


class _Run:
    """One pass on a random image.

    Attributes:
        logits: (1, K, h, w).
        masked: whether the logits are computed from masks.
        outputs: the last output of each module by path, in the order in which the modules returned.
    """

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        self.net, self.size = net, preprocessing.input_size
        self.outputs: dict[str, Any] = {}
        handles = [m.register_forward_hook(self._keep(p)) for p, m in net.named_modules() if p]
        try:
            answer = _answer(net, preprocessing)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"name_or_module: {_kind(net)} fails on images of {self.size[0]} x {self.size[1]} "
                f"({type(error).__name__}: {reason}); give input_size=, or another network"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        found = _understood(answer, net, 1)
        self.masked = isinstance(found, Masks)
        if isinstance(found, Tensor):
            _check_channels_first(net, tuple(found.shape), self.size)
        self.logits = found.by_class() if isinstance(found, Masks) else found

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.outputs.pop(path, None)
            self.outputs[path] = output

        return hook

    def maps(self, path: str) -> dict[_Key, Tensor]:
        """Return those maps (1, C, h, w) in a module's output that affect the logits.

        Only maps with more than one cell and with the image's aspect ratio are included."""
        return {
            key: one
            for key, one in _tensors(self.outputs[path])
            if one.ndim == 4
            and min(one.shape[2:]) > 1
            and _has_aspect(one.shape[2:], self.size)
            and self._leads(one)
        }

    def _leads(self, one: Tensor) -> bool:
        if not self.logits.requires_grad:
            return True
        if not one.requires_grad or one is self.logits:
            return False
        total = self.logits.sum()
        return torch.autograd.grad(total, one, retain_graph=True, allow_unused=True)[0] is not None


def bottleneck(run: _Run) -> tuple[str, _Key] | None:
    """Find the map that Seg-Grad-CAM reads: the coarsest map that the encoder passes on.

    The result is the path of a module and the key in its output, or None if no module returns a map. The
    encoder is the outermost module that returns maps and is called ``...encoder`` or ``...backbone``.
    Without an encoder, the map is the one with the most channels on the coarsest grid or, if there are
    several, the last of them. Maps from modules that have submodules take precedence.
    """
    named = [p for p in run.outputs if p.endswith(("encoder", "backbone"))]
    for path in sorted(named, key=lambda p: p.count(".")):
        maps = run.maps(path)
        if maps:
            least = min(one.shape[2] for one in maps.values())
            return path, [key for key, one in maps.items() if one.shape[2] == least][-1]
    single = [path for path, output in run.outputs.items() if isinstance(output, Tensor)]
    found = {path: maps[()] for path in single if (maps := run.maps(path))}
    if not found:
        return None
    least = min(one.shape[2] for one in found.values())
    found = {path: one for path, one in found.items() if one.shape[2] == least}
    parts = {p: one for p, one in found.items() if any(run.net.get_submodule(p).children())}
    most = max(one.shape[1] for one in (parts or found).values())
    return [path for path, one in (parts or found).items() if one.shape[1] == most][-1], ()


def _tensors(output: Any, key: _Key = ()) -> Iterator[tuple[_Key, Tensor]]:
    """Iterate over the tensors of nested dicts, lists and tuples, with their keys."""
    if isinstance(output, Tensor):
        yield key, output
    elif isinstance(output, Mapping | list | tuple):
        items = output.items() if isinstance(output, Mapping) else enumerate(output)
        for name, one in items:
            yield from _tensors(one, (*key, name))


def _at(output: Any, key: _Key) -> Any:
    for name in key:
        output = output[name]
    return output


def _with(output: Any, key: _Key, value: Tensor) -> Any:
    """Return ``output`` with ``value`` at ``key``."""
    if not key:
        return value
    name, rest = key[0], key[1:]
    one = _with(output[name], rest, value)
    if isinstance(output, tuple):
        make = getattr(output, "_make", type(output))  # for a named tuple
        return make([*output[:name], one, *output[name + 1 :]])
    output[name] = one
    return output
