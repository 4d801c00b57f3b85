"""Maps from one backward pass: the gradient g = d logit_c / d x, and x * g.

Saliency: Simonyan et al., arXiv 1312.6034; input x gradient: Shrikumar et al., arXiv 1605.01713. x are the
raw pixels in [0, 1]; the backbone normalises them inside. Both use Captum. Saliency takes the largest
absolute value over the channels, as in Simonyan et al.; x * g is a signed attribution and is summed over
the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.explainers.base import Explainer, register_explainer


@register_explainer("saliency", title="Saliency")
class Saliency(Explainer):
    """Maps (B, 1, H, W): the largest ``|g|`` over the three channels.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("saliency", net)
        >>> maps = method.attribute(torch.rand(1, 3, 64, 64), target=3)
        >>> bool((maps >= 0).all())  # the magnitude of the gradient
        True
    """

    clips = True

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return pixel_gradient(self.backbone, images, target).abs().amax(1, keepdim=True)


@register_explainer("input_x_gradient", title="Input × gradient")
class InputXGradient(Explainer):
    """Signed maps (B, 1, H, W): the sum of x * g over the three channels. Black pixels get 0.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("input_x_gradient", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    clips = True

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        # Imported late: captum takes longer to load than the maps take to compute.
        from captum.attr import InputXGradient as Captum

        maps = Captum(self.backbone.logits).attribute(images.detach().requires_grad_(), target)
        return maps.detach().sum(1, keepdim=True)


def pixel_gradient(backbone: Backbone, images: Tensor, target: Tensor) -> Tensor:
    """d logit / d pixel, (B, 3, H, W), computed with Captum."""
    from captum.attr import Saliency as Captum

    # A separate leaf, because Captum warns about inputs that do not require a gradient.
    leaf = images.detach().requires_grad_()
    return Captum(backbone.logits).attribute(leaf, target, abs=False).detach()


def class_gradients(
    logits: Tensor, x: Tensor | Sequence[Tensor], classes: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """d logit / d x for each column of ``classes`` (B, M), one gradient for each ``x``.

    All of them use the same graph, which is freed after the last column.
    """
    columns = classes.unbind(1)
    for number, column in enumerate(columns, 1):
        score = logits.gather(1, column[:, None]).sum()
        yield torch.autograd.grad(score, x, retain_graph=number < len(columns))


def probe_image(backbone: Backbone) -> Tensor:
    """An image of noise, of the backbone's default size, for trying out rules: (1, 3, H, W) or (1, 3, T,
    H, W)."""
    size = (1, backbone.mean.shape[1], *backbone.preprocessing.places)
    return torch.rand(size, generator=torch.Generator().manual_seed(0), device="cpu")
