"""LibraGrad: input x gradient through a network in which every layer is replaced by an affine map.

Mehri, Baghshah and Pilehvar, CVPR 2025, arXiv 2411.16760. Attention weights, the gates of GELU and SiLU,
and the standard deviations of norms are constants in the backward pass, and each of two multiplied
activations gets half the gradient. Then the logit is the sum of the contributions of the input and of
all biases b (FullGrad-completeness):

    f(x) = sum x . df/dx + sum_b b . df/db

The rules are those of AttnLRP with constant attention: :mod:`xattn.explainers.relevance.rules`.
The ``base`` method determines what is multiplied by these gradients. With the tokens x_l (B, N, C) that
enter block l, and layer outputs y with biases b, a token's share is

    fullgrad_plus       sum_l x_l . df/dx_l + sum_b b . df/dy_b     the paper's best on average
    fullgrad            x_0 . df/dx_0 + sum_b b . df/dy_b           complete, see ``contributions``
    input_x_gradient    x . df/dx of the patch embeddings, or of pixels

x_0 are the tokens that enter the first block, including position embeddings and class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from xattn.backbone.scored import is_score
from xattn.explainers.base import Choose, register_explainer
from xattn.explainers.relevance.attention import patch_grid
from xattn.explainers.relevance.engine import Engine
from xattn.explainers.relevance.lrp import TOKENS, RelevanceExplainer
from xattn.explainers.relevance.rules import COMPOSITES, Composite
from xattn.explainers.relevance.token_blocks import block_inputs, token_blocks
from xattn.kernels.softmax.reference import widen


@register_explainer(
    "libragrad",
    title="LibraGrad",
    networks=("vit",),
    cases=({}, {"base": "fullgrad"}, {"base": "input_x_gradient", "at": "pixels"}),
)
@dataclass(kw_only=True, eq=False, repr=False)
class LibraGrad(RelevanceExplainer):
    """LibraGrad's gradients, by default in FullGrad+: signed maps from one forward and one backward pass.

    Args:
        base: "fullgrad_plus", "fullgrad" or "input_x_gradient", see the module.
        at: "tokens" gives maps (h, w) on the patch grid. "input_x_gradient" also accepts the name of a
            module, or "pixels", which gives maps (H, W) at the normalised image and also works for CNNs.

    Raises:
        ValueError: the base is unknown, the network has no blocks of tokens (unless at="pixels"), or it
            calls a function without a rule.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("libragrad", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    at: str = TOKENS
    base: Literal["fullgrad_plus", "fullgrad", "input_x_gradient"] = "fullgrad_plus"

    def __post_init__(self) -> None:
        if self.at != TOKENS and self.base != "input_x_gradient":
            raise ValueError(
                f"at={self.at!r}: base {self.base!r} adds up tokens; give base='input_x_gradient'"
            )
        super().__post_init__()

    def _check_backbone(self) -> None:
        super()._check_backbone()
        if self.base != "input_x_gradient":
            self._blocks()

    def _blocks(self) -> list[nn.Module]:
        try:
            return token_blocks(self.backbone)
        except ValueError as error:
            raise ValueError(
                f"{error}; give base='input_x_gradient' and at='pixels', or use 'gradcam' or "
                f"'occlusion'"
            ) from None

    @property
    def _composite(self) -> Composite:
        return COMPOSITES["libragrad"]

    def contributions(self, inputs: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """The contributions to the class logit of each token, (B, N), and of everything else, (B,).

        "Everything else" means biases after the pooling, such as the classifier's, and biases of layers
        that mix tokens, as in a Mixer. With ``base="fullgrad"``, the two together sum to the logit, up to
        rounding; for another target, this holds only if the target is linear in the logits.

        Args:
            inputs: as in :meth:`attribute`.
            target: as in :meth:`attribute`. N counts prefix tokens.
        """
        if self.base == "input_x_gradient":
            raise ValueError(
                "base: 'input_x_gradient' does not include biases; give base='fullgrad'"
            )
        if is_score(self.backbone, target):
            return cast(LibraGrad, self.with_target(target)).contributions(inputs, 0)
        inputs, targets = self._checked(inputs, target)
        engine = self._engine(keep=True)
        with self._guard(), torch.enable_grad():
            logits, tokens = self._tokens(self._move(inputs), engine)
            score = logits.gather(1, targets.to(logits.device)[:, None]).sum()
            return self._shares(score, tokens, engine.added)

    def _pass(
        self, images: Tensor, engine: Engine, at: list[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.base == "input_x_gradient" or at != [self.at]:
            return super()._pass(images, engine, at)
        logits, tokens = self._tokens(images, engine)
        return logits, {self.at: tokens[0]}

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        if self.base == "input_x_gradient":
            return super()._attribute_classes(images, choose)
        with torch.enable_grad():
            engine = self._engine(keep=True)
            logits, tokens = self._tokens(images, engine)
            classes = self._chosen(choose, logits.detach())
            rows: list[Tensor] = []
            for column in classes.unbind(1):
                score = logits.gather(1, column[:, None]).sum()
                more = len(rows) < classes.shape[1] - 1
                rows.append(self._shares(score, tokens, engine.added, more)[0])
        prefix = self.backbone.prefix_tokens
        grid = patch_grid(self.backbone, images, rows[0].shape[1] - prefix)
        maps = torch.stack(rows, 1)[..., prefix:].unflatten(-1, grid)
        return logits.detach(), classes, maps

    def _tokens(self, images: Tensor, engine: Engine) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the input tokens of the blocks."""
        self.backbone.requires_grad_(False)  # weights are not activations; the guard restores this
        blocks = self._blocks()
        with block_inputs(blocks) as tokens, self._running(engine):
            logits = self.backbone.logits_normalized(self.backbone.normalize(images))
        if len(tokens) != len(blocks) or tokens[0].ndim != 3:
            raise ValueError(
                f"backbone: the blocks of {self.backbone.name} do not take tokens (B, N, C); give "
                f"base='input_x_gradient' and at='pixels'"
            )
        return logits, tokens

    def _shares(
        self,
        score: Tensor,
        tokens: Sequence[Tensor],
        added: Sequence[tuple[Any, Tensor]],
        more: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The shares of the tokens, (B, N), and of other biases, (B,); ``more`` keeps the graph for another
        class."""
        taken = tokens if self.base == "fullgrad_plus" else tokens[:1]
        factors = [*taken, *(constant for _, constant in added)]
        variables = [*taken, *(edge for edge, _ in added)]
        grads = torch.autograd.grad(score, variables, retain_graph=more, allow_unused=True)
        batch, count = tokens[0].shape[:2]
        shares = widen(score.new_zeros(batch, count))
        elsewhere = shares.new_zeros(batch)
        for factor, grad in zip(factors, grads, strict=True):
            if grad is None:
                continue
            product = widen(factor.detach()) * widen(grad)
            if product.ndim == 3 and product.shape[1] == count:
                shares += product.sum(2)
            else:
                elsewhere += product.flatten(1).sum(1)
        return shares, elsewhere
