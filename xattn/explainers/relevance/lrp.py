"""LRP, and the base class of explainers that run a network with the rules of a composite.

R = x c, where c is the gradient df/dx under the rules of :mod:`xattn.explainers.relevance.rules`. For
any network, this takes one forward and one backward pass, to the pixels or to the output of any layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xattn.attention.record import fused_layers, replace_products
from xattn.backbone.scored import class_of, is_score
from xattn.explainers.base import Choose, Explainer, check_inputs, check_target, register_explainer
from xattn.explainers.cams.layers import LayerReader
from xattn.explainers.gradients import class_gradients, probe_image
from xattn.explainers.relevance.engine import Balance, Engine, refuse_scripted
from xattn.explainers.relevance.linear import INPUT_RULES, gamma_rule
from xattn.explainers.relevance.rules import COMPOSITES, Composite
from xattn.runtime.option_checks import NotNegative

PIXELS, TOKENS = "pixels", "tokens"
LOST = 0.05
"""If a conserving composite loses a larger share of the score than this, there is a warning."""


@dataclass(kw_only=True, eq=False, repr=False)
class RelevanceExplainer(Explainer):
    """Base class of explainers that follow a composite.

    Args:
        at: where relevance is read: "pixels", at the normalised image, (H, W); "tokens", at the output of
            the patch embedding; or the dotted name of a module, at the resolution of its output.
            Relevance is summed over channels, with its sign.

    Raises:
        ValueError: the network calls a function without a rule; the message names the function and its
            module.
    """

    at: str = PIXELS

    def __post_init__(self) -> None:
        super().__post_init__()
        backbone = self.backbone
        self._check_backbone()
        with self._guard(), torch.enable_grad():
            image = self._move(probe_image(backbone))
            with torch.no_grad():
                plain = backbone.logits(image)
            engine = self._engine()
            logits, _ = self._pass(image, engine, [self.at])
            engine.check(self.name, backbone.name, logits)
            if not torch.allclose(logits, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
                raise ValueError(
                    f"backbone: with the rules of {self.name}, {backbone.name} gives different logits; use "
                    f"'saliency' or 'gradcam'"
                )
            self._check(engine)
        for note in engine.notes:
            self._note(note)
        if engine.taught:  # a user's rules may be wrong
            _ = self.measured

    @cached_property
    def measured(self) -> Balance:
        """How the largest logit of a picture of noise is distributed. The first use takes an additional
        pass and warns if relevance is lost."""
        backbone = self.backbone
        with self._guard(), torch.enable_grad():
            engine = self._engine(weigh=True)
            logits, ends = self._pass(self._move(probe_image(backbone)), engine, [self.at])
            score = logits[0, logits[0].abs().argmax()]
            found = self._balance(score, ends[self.at], engine)
        if self._composite.conserves and found.error > LOST:
            warnings.warn(
                f"{self.name}: {found.error:.0%} of a score of {backbone.name} reaches neither "
                f"{self.at} nor constants; most is lost in {found.fault}",
                stacklevel=4,
            )
        return found

    @property
    def _composite(self) -> Composite:
        raise NotImplementedError

    def _engine(self, **options: Any) -> Engine:
        return Engine(self._composite, **options)

    def _check_backbone(self) -> None:
        """Raise a ``ValueError``, before any pass is run, if the network cannot be read."""
        refuse_scripted(self.backbone, self.name)

    def _check(self, engine: Engine) -> None:
        """Raise a ``ValueError``, or note it, if the rules did not apply to anything in the network."""

    @property
    def facts(self) -> dict[str, Any]:
        """Relevance of the output and of the input, measured on a picture of noise, for the
        provenance."""
        found = self.measured
        return {
            "relevance": {
                "in": found.score,
                self.at: found.reached,
                "constants": found.constants,
                "absorbed": found.absorbed,
            }
        }

    def balance(self, inputs: Tensor, target: Any) -> list[Balance]:
        """How each image's score is distributed: the part of the input, the part of constants, and the part
        that is lost.

        Args:
            inputs: as in :meth:`attribute`.
            target: as in :meth:`attribute`.
        """
        return [balance for _, balance in self._each(inputs, target, [self.at], weigh=True)]

    def relevance(self, inputs: Tensor, target: Any, at: Sequence[str]) -> dict[str, Tensor]:
        """Relevance at several places from one pass, not summed over channels.

        Args:
            inputs: as in :meth:`attribute`.
            target: as in :meth:`attribute`.
            at: places, as in the option ``at``.

        Returns:
            x c for each place, in the shape of the pixels (B, C, H, W) or of the module's output.

        >>> import xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=32)
        >>> method = xattn.create_explainer("lrp", net)
        >>> found = method.relevance(torch.rand(2, 3, 32, 32), 3, ["pixels", "layer1", "layer3"])
        >>> [tuple(r.shape) for r in found.values()]
        [(2, 3, 32, 32), (2, 32, 8, 8), (2, 192, 2, 2)]
        """
        parts = [found for found, _ in self._each(inputs, target, list(at), weigh=False)]
        return {place: torch.cat([part[place] for part in parts]).to(inputs.device) for place in at}

    def _each(
        self, inputs: Tensor, target: Any, at: list[str], weigh: bool
    ) -> list[tuple[dict[str, Tensor], Any]]:
        if is_score(self.backbone, target):
            aimed: Any = self.with_target(target)
            return aimed._each(inputs, 0, at, weigh)  # type: ignore[no-any-return]
        inputs, targets = self._checked(inputs, target)

        def explained(images: Tensor, classes: Tensor) -> tuple[dict[str, Tensor], Any]:
            engine = self._engine(weigh=weigh)
            with torch.enable_grad():
                logits, ends = self._pass(self._move(images), engine, at)
                score = logits.gather(1, classes.to(logits.device)[:, None]).sum()
                if weigh:
                    return {}, self._balance(score, ends[at[0]], engine)
                grads = torch.autograd.grad(score, [ends[place] for place in at])
            found = ((x * grad).detach() for x, grad in zip(ends.values(), grads, strict=True))
            return dict(zip(at, found, strict=True)), None

        with self._guard():
            if not weigh:
                return self._batches.run(explained, inputs, targets)  # type: ignore[return-value]
            pairs = zip(inputs.split(1), targets.split(1), strict=True)
            return [explained(image, one) for image, one in pairs]

    def _checked(self, inputs: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Images, and the class (B,) of each."""
        inputs, target = check_inputs(inputs, self.backbone), class_of(self.backbone, target)
        return inputs, check_target(target, inputs.shape[0], self.backbone.num_classes)

    @staticmethod
    def _balance(score: Tensor, end: Tensor, engine: Engine) -> Balance:
        (grad,) = torch.autograd.grad(score, end)
        return engine.balance(float(score.detach()), float((end.detach() * grad).double().sum()))

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._attribute_classes(images, lambda _: target[:, None])[2]

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            logits, ends = self._pass(images, self._engine(), [self.at])
            classes, x = self._chosen(choose, logits.detach()), ends[self.at]
            gradients = class_gradients(logits, x, classes)
            maps = [self._map(x.detach() * gradient, images) for (gradient,) in gradients]
        return logits.detach(), classes, torch.stack(maps, 1)

    def _pass(
        self, images: Tensor, engine: Engine, at: list[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and for each place the tensor whose gradient is c. If there is only one place, no
        rules apply before it."""
        backbone, ends = self.backbone, dict[str, Tensor]()
        backbone.requires_grad_(False)  # weights are not activations; the guard restores this
        alone = len(at) == 1 and PIXELS not in at
        x = backbone.normalize(images).detach()
        if not alone:
            first = engine.composite.first is not None
            ends[PIXELS] = (torch.where(x == 0, 1e-20, x) if first else x).requires_grad_()
            x = ends[PIXELS].clone()  # a network may change it in place
            if first:
                bounds = (torch.full_like(images, value) for value in (0, 1))
                x.relevance_bounds = [backbone.normalize(b) for b in bounds]  # type: ignore[attr-defined]
        with ExitStack() as stack:
            for place in at:
                if place != PIXELS:
                    stack.enter_context(self._kept(place, ends, engine, alone))
            stack.enter_context(self._running(engine))
            return engine.whole(backbone.logits_normalized(x)), ends

    @contextmanager
    def _running(self, engine: Engine) -> Iterator[None]:
        with fused_layers(self.backbone.model), replace_products(engine), engine:
            yield

    @contextmanager
    def _kept(
        self, place: str, ends: dict[str, Tensor], engine: Engine, alone: bool
    ) -> Iterator[None]:
        """Context manager that stores a module's output in ``ends``; ``alone`` detaches it from its
        history."""
        reader = self._reader(place)

        def keep(module: nn.Module, args: Any, output: Any) -> Tensor:
            if place in ends:
                raise ValueError(
                    f"at: {place} is called several times in a pass; give another module"
                )
            output = reader.one_tensor(output)
            ends[place] = output.detach().requires_grad_() if alone else engine.whole(output)
            return ends[place].clone()

        with reader.layer.register_forward_hook(keep):
            yield
        if place not in ends:
            raise ValueError(f"at: {place} is not called in a pass of {self.backbone.name}")

    def _reader(self, place: str) -> LayerReader:
        if place != TOKENS:
            return LayerReader(self.backbone, place, self.name)
        if not hasattr(self.backbone.model, "patch_embed"):
            raise ValueError(
                f"at='tokens': {self.backbone.name} has no patch_embed; give at='pixels'"
            )
        embedding: Any = self.backbone.model.patch_embed
        return LayerReader(self.backbone, embedding, self.name)

    def _map(self, relevance: Tensor, images: Tensor) -> Tensor:
        """Summed over channels: (B, C, H, W), (B, N, C) or (B, h, w, C) -> (B, h, w)."""
        if self.at != PIXELS:
            relevance = self._reader(self.at).as_map(relevance, images)
        return relevance.sum(1)


@register_explainer(
    "lrp",
    title="LRP",
    networks=("cnn", "vit"),
    cases=({}, {"composite": "alpha_beta_flat"}, {"composite": "gamma_box"}, {"residual": 1.0}),
)
@dataclass(kw_only=True, eq=False, repr=False)
class Lrp(RelevanceExplainer):
    """LRP of any network: relevance of the normalised image, summed over channels, (B, 1, H, W), signed.

    Relevance is conserved: the map, the relevance of the biases (each a neuron with activation 1) and
    the part that eps absorbs sum to the logit, see :meth:`balance`. Biases can absorb nearly all of it:
    on EfficientNet-Lite0 the map of the gamma rule sums to about 1 % of the logit. A convolution and
    the BatchNorm that follows it count as one layer.

    Args:
        gamma: how strongly convolutions prefer contributions with the sign of their output; 0 is the
            epsilon rule, which on a ReLU network is close to input x gradient and just as noisy.
        linear_gamma: the same for other linear layers.
        epsilon: added to the denominators with their sign, so that they move away from 0. By default a
            millionth of the root mean square of the layer's output on the image; a fixed number absorbs
            nearly all relevance if a network's activations are small.
        input_rule: for layers that read the image: "flat", "wsquare" or "box"; None treats them like
            other layers.
        attention: "constant" attention weights, or "shared" if they share relevance with the values.
        residual: how strongly sums of two activations prefer the one with the sum's sign (ResLRP); with
            0, the gradient of the sum is used.
        composite: a name in :data:`xattn.explainers.relevance.rules.COMPOSITES`, in place of the six
            options above.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("lrp", net, gamma=0.25)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    clips = True

    gamma: NotNegative = 0.25
    linear_gamma: NotNegative = 0.0
    epsilon: NotNegative | None = None
    input_rule: Literal["flat", "wsquare", "box"] | None = None
    attention: Literal["constant", "shared"] = "constant"
    residual: NotNegative = 0.0
    composite: str | None = None

    @property
    def _composite(self) -> Composite:
        if self.composite is None:
            convolution, dense = (
                gamma_rule(gamma, self.epsilon) for gamma in (self.gamma, self.linear_gamma)
            )
            first = INPUT_RULES[self.input_rule] if self.input_rule else None
            return Composite(convolution, dense, first, self.attention, self.residual)
        if self.composite not in COMPOSITES:
            raise ValueError(
                f"composite: got {self.composite!r}; give one of {', '.join(COMPOSITES)}"
            )
        return COMPOSITES[self.composite]
