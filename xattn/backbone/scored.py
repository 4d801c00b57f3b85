"""A view of a network that lets methods explain a number computed from the outputs instead of a class.

    backbone = scored(backbone, lambda logits: logits[:, 281] - logits[:, 282])

A :class:`BackboneView` is a :class:`~xattn.backbone.Backbone` over the same modules, so explainers,
metrics and commands need no special case. Its logits (B, 1) are the values of the target, and the name of
its single class is the target's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xattn.backbone.backbone import Backbone
from xattn.backbone.pooled_features import record_features
from xattn.backbone.taps import Taps
from xattn.backbone.targets import Target, as_target
from xattn.photos.classes import Task
from xattn.photos.preprocessing import Preprocessing


class BackboneView(Backbone):
    """``base`` with other logits; modules, buffers and properties are shared, and nothing is copied.

    A subclass defines the logits (:meth:`answer`) and the properties that differ.
    """

    base: Backbone

    def __init__(self, base: Backbone, class_names: list[str], task: Task) -> None:
        nn.Module.__init__(self)
        shared = {k: v for k, v in vars(base).items() if k not in ("_fingerprint", "_hashed")}
        vars(self).update(shared)
        # Not through setattr, which would make the base a child of its own modules.
        own = {"num_classes": len(class_names), "class_names": class_names, "task": task}
        vars(self).update(base=base, pools_linearly=False, **own)

    def answer(self, outputs: Tensor) -> Tensor:
        """Compute the logits (B, K) of the view from the base's output, (B, ...)."""
        raise NotImplementedError

    def again(self, base: Backbone) -> BackboneView:
        """Create the same view of another backbone."""
        raise NotImplementedError

    def _answered(self, outputs: Tensor) -> Tensor:
        # The rules of lrp and attn_lrp apply to the network only; the score keeps its ordinary
        # derivative.
        with torch._C.DisableTorchFunction():
            return self.answer(outputs)

    # ------------------------------------------------------------------ passes

    def forward_normalized(self, x: Tensor) -> Taps:
        taps = self.base.forward_normalized(x)
        return taps._replace(logits=self._answered(taps.logits))

    def logits_normalized(self, x: Tensor) -> Tensor:
        return self._answered(self.base.logits_normalized(x))

    def head_logits(self, final: Tensor) -> Tensor:
        return self._answered(self.base.head_logits(final))

    # ------------------------------------------------------------------ facts

    @property
    def fingerprint(self) -> str:
        """The base's fingerprint, because the view has the same weights."""
        return self.base.fingerprint

    @property
    def _fingerprint(self) -> str | None:
        return self.base._fingerprint

    @_fingerprint.setter
    def _fingerprint(self, value: str | None) -> None:
        self.base._fingerprint = value

    @property
    def has_classes(self) -> bool:
        return True

    @property
    def has_pooled_tap(self) -> bool:
        return self.base.has_pooled_tap

    @property
    def cam_layer(self) -> nn.Module | None:
        return self.base.cam_layer

    def _classifier(self) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def with_taps(self, taps: Any) -> BackboneView:
        return self.again(self.base.with_taps(taps))

    def with_preprocessing(self, preprocessing: Preprocessing) -> BackboneView:
        return self.again(self.base.with_preprocessing(preprocessing))

    def with_converted(self, model: nn.Module) -> BackboneView:
        return self.again(self.base.with_converted(model))


def target_record(backbone: Backbone) -> dict[str, Any]:
    """What identifies the classes of a view, such as detections; nothing for other networks."""
    target = getattr(backbone, "target_id", None)
    return {} if target is None else {"target": target}


class Scored(BackboneView):
    """A view whose logits (B, M) are the values of M targets; created by :func:`scored`.

    ``score`` defines p, see :class:`~xattn.backbone.targets.Target`. ``target_id`` is the target's name
    with a hash of its values for fixed random outputs. Several targets share each pass, so they must read
    the same output and define p in the same way.
    """

    targets: tuple[Target, ...]
    score: str
    target_id: str

    def __init__(self, base: Backbone, *targets: Target) -> None:
        targets = tuple(target.of(base) for target in targets)
        first = targets[0]
        for one in targets[1:]:
            if (one.reads, one.p) != (first.reads, first.p):
                raise ValueError(
                    f"target: {first.own_name!r} reads {first.reads} with p={first.p!r}, but "
                    f"{one.own_name!r} reads {one.reads} with p={one.p!r}; explain them one by one"
                )
        super().__init__(base, [""], "multilabel" if first.p == "sigmoid" else "regression")
        vars(self).update(targets=targets, score=first.p)
        shape = self._shape_of_outputs()
        digests = [target.digest(shape, base.mean) for target in targets]
        named = [(target.own_name, d) for target, d in zip(targets, digests, strict=True)]
        vars(self).update(
            target_id="; ".join(f"{name} {digest}" if name else digest for name, digest in named),
            class_names=[name or f"function {digest}" for name, digest in named],
            num_classes=len(targets),
        )

    @property
    def target(self) -> Target:
        """The first target."""
        return self.targets[0]

    def again(self, base: Backbone) -> Scored:
        return Scored(base, *self.targets)

    def about(self, target: int) -> dict[str, Any]:
        return self.targets[target].about()

    def answer(self, outputs: Tensor) -> Tensor:
        """Compute the values (B, M) of the targets from the output (B, ...).

        Raises:
            ValueError: if a function does not return B finite numbers, or loses the gradient.
        """
        found = [target.scores(outputs) for target in self.targets]
        for name, score in zip(self.class_names, found, strict=False):
            if not torch.compiler.is_compiling() and not bool(score.isfinite().all()):
                raise ValueError(
                    f"target: {name!r} gives NaN or infinite values; return finite numbers, such as "
                    f"log_softmax where p may be 0"
                )
            if outputs.requires_grad and torch.is_grad_enabled() and not score.requires_grad:
                raise ValueError(
                    f"target: {name!r} returns a tensor without a gradient; leave out detach, numpy and "
                    f"no_grad, or use a method without gradients, such as 'rise'"
                )
        return torch.stack(found, 1)

    # ------------------------------------------------------------------ passes

    def forward_normalized(self, x: Tensor) -> Taps:
        taps = self.outputs_normalized(x)
        return taps._replace(logits=self._answered(taps.logits))

    def logits_normalized(self, x: Tensor) -> Tensor:
        if self.target.reads == "logits":
            return super().logits_normalized(x)
        if self.target.reads == "features" and not self.adapter:
            return self._answered(
                Backbone.logits_normalized(self, x)
            )  # without taps: layers run once
        return self.forward_normalized(x).logits

    def head_logits(self, final: Tensor) -> Tensor:
        if self.target.reads == "logits":
            return super().head_logits(final)
        return self._answered(Backbone.head_logits(self, final))

    def outputs_normalized(self, x: Tensor) -> Taps:
        """Run a pass whose ``logits`` are what the targets read."""
        reads = self.target.reads
        if reads == "logits":
            return self.base.forward_normalized(x)
        if reads in ("pixels", "masks"):
            with self._passing(x):
                logits, maps = self._forward(reads)(x)
            return Taps(logits, tuple(maps))
        taps = Backbone.forward_normalized(self, x)
        if not self.adapter:
            return taps
        embed = getattr(self.model, "forward_embedding", None)
        return taps._replace(logits=taps.maps[-1].flatten(2).mean(2) if embed is None else embed(x))

    def _classify(self, final: Tensor) -> Tensor:
        """Return the classifier's input, (B, C), for targets that read features.

        The passes of :class:`Backbone` therefore also work for them."""
        record_features(self.model, final)
        return self.model.forward_head(final, pre_logits=True)  # type: ignore[operator]

    def _forward(self, reads: str) -> Callable[[Tensor], tuple[Tensor, Any]]:
        found = getattr(self.model, f"forward_{reads}", None)
        if found is None:
            raise ValueError(
                f"target: reads the {'logits of pixels' if reads == 'pixels' else 'masks'}, but "
                f"{self.name} has none; give a segmentation network, xattn.load_segmenter(...), or a "
                f"function of the logits (B, K)"
            )
        return found  # type: ignore[no-any-return]

    @torch.no_grad()
    def _shape_of_outputs(self) -> tuple[int, ...]:
        """Return the shape of what the target reads for one image."""
        if self.target.reads == "logits":
            return (self.base.num_classes,)
        size = self.preprocessing.places
        image = torch.zeros(1, self.mean.shape[1], *size, device="cpu")
        image = image.to(self.device, next(self.model.parameters(), image).dtype)
        return tuple(self.outputs_normalized(image).logits.shape[1:])


def is_score(backbone: Backbone, target: Any) -> bool:
    """Return whether a target is a number computed from the output, rather than one or more classes."""
    text = isinstance(target, str) and hasattr(backbone, "text_target")
    return text or isinstance(target, Target | BackboneView) or callable(target)


def class_of(backbone: Backbone, target: Any) -> Any:
    """Return the index of a class given by its name, or any other target unchanged."""
    if not isinstance(target, str):
        return target
    try:
        return backbone.class_index(target)
    except ValueError as error:
        raise ValueError(
            f"target: {error}; a text that is not a class needs an image-text model, see xattn.load_clip"
        ) from None


def scored(backbone: Backbone, target: Any) -> BackboneView:
    """Create a view of ``backbone`` with ``target`` instead of its classes.

    Args:
        target: a function of the logits (B, K) that returns (B,), a :class:`Target`, a text for an
            image-text model (:mod:`xattn.backbone.families.clip`), or a list of functions and targets,
            whose values are classes 0, 1, ... of the view.

    Raises:
        ValueError: if a function fails on the backbone's outputs, a text is given without an image-text
            model, or the backbone already shows another target.
    """
    if isinstance(target, BackboneView):
        if target.base is not backbone:
            raise ValueError(
                f"target: a view of another backbone ({target.base.name}); create a view of this one"
            )
        return target
    if isinstance(backbone, Scored):
        raise ValueError(
            f"target: this backbone already shows {backbone.class_names[0]!r}; give the backbone that it "
            f"is a view of, backbone.base"
        )
    if isinstance(target, str):
        return Scored(backbone, _target_of_text(backbone, target))
    several = target if isinstance(target, list | tuple) else [target]
    if not several:
        raise ValueError("target: got an empty list; give one target or more")
    return Scored(backbone, *map(as_target, several))


def _target_of_text(backbone: Backbone, text: str) -> Target:
    if not text.strip():
        raise ValueError(
            "target: got an empty text; give a class, or a prompt such as 'a photo of a cat'"
        )
    make = getattr(backbone, "text_target", None)
    if make is None:
        raise ValueError(
            f"target: got the text {text[:60]!r}, but {backbone.name} reads no texts; give a function of "
            f"its logits, or load an image-text model with xattn.load_clip"
        )
    return make(text)  # type: ignore[no-any-return]
