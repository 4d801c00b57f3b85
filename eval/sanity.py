"""Sanity rows: what a table has to show beside a method before its numbers mean anything.

Random, centre-Gaussian and all-ones maps look at no network; the randomised-weights row is the
method itself on a copy of the network with random weights (Adebayo et al., arXiv 1810.03292),
scored by the real network. A method that does not beat them explains the metric, not the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def randomized_backbone(backbone: Any, seed: int = 0) -> Any:
    """A deep copy of a frozen backbone with random weights; a pure function of ``seed``.

    Matrices and kernels are drawn from He's normal distribution, whose ReLU networks keep the size
    of their activations: with PyTorch's default bounds the maps of a 50-layer CNN underflow to a
    constant. Norms become the identity (statistics 0 and 1), biases 0, tokens and position
    embeddings N(0, 0.02^2). The global RNG is left as it was.
    """
    twin = copy.deepcopy(backbone)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in twin.modules():
            for name, value in module.named_parameters(recurse=False):
                value.copy_(_initial(module, name, value, generator).to(value))
            for name, value in module.named_buffers(recurse=False):
                if name == "running_mean":
                    value.zero_()
                elif name == "running_var":
                    value.fill_(1.0)
    if hasattr(twin, "_fingerprint"):
        twin._fingerprint = None  # cached for the trained weights
    return twin


def _initial(module: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if value.ndim < 2:
        return torch.zeros(value.shape) if "bias" in name else torch.ones(value.shape)
    std = 0.02
    if name == "weight" and not isinstance(module, nn.Embedding):
        std = (2.0 / value[0].numel()) ** 0.5
    return torch.randn(value.shape, generator=generator) * std


def randomized_explainer(
    name: str, backbone: Any, *, head: Any = None, seed: int = 0, **options: Any
) -> Any:
    """The explainer ``name`` (see ``xattn.list_explainers``) on :func:`randomized_backbone`.

    A trained ``head`` is kept as it is and reads the random network's maps.
    """
    from xattn.explainers import create_explainer

    twin = randomized_backbone(backbone, seed)
    if head is not None:
        head = copy.deepcopy(head)
        head.backbone_fingerprint = twin.fingerprint  # the mismatch is what this row is about
    return create_explainer(name, twin, head=head, seed=seed, **options)


def sanity_rows(
    backbone: Any, method: str = "gradcam", *, head: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Explainers by row name: random, centre, ones and randomized_<method>."""
    from xattn.explainers import create_explainer

    rows = {
        name: create_explainer(name, backbone, seed=seed) for name in ("random", "centre", "ones")
    }
    rows[f"randomized_{method}"] = randomized_explainer(method, backbone, head=head, seed=seed)
    return rows
