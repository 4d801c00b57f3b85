"""Centroids of routing attention for a trained network, without training: k-means on what it meets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from xattn.attention.inputs import Inputs
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.record import answering_by
from xattn.attention.routing import Routing


class _Collects:
    """Answers for mechanisms by softmax attention, and keeps the tokens that routing would cluster."""

    def __init__(self, most: int) -> None:
        self.most, self.tokens = most, {}  # type: ignore[var-annotated]

    def attend(self, mechanism: Any, inputs: Inputs) -> Tensor:
        inputs = mechanism.accepted(inputs)
        if not isinstance(mechanism, Routing):
            local = mechanism.local(inputs)
            y = mechanism.operator(inputs).matvec(inputs.v)
            return y if local is None else y + local  # type: ignore[no-any-return]
        q, k = (
            x[:, :, inputs.prefix :].transpose(0, 1).flatten(1, 2) for x in (inputs.q, inputs.k)
        )
        x = q if mechanism.shared else torch.cat([q, k], 1)
        step = -(-x.shape[1] // self.most)
        self.tokens.setdefault(mechanism, []).append(x[:, ::step])
        return SoftmaxOperator(inputs.q, inputs.k, inputs.scale, causal=inputs.causal).matvec(
            inputs.v
        )

    def mix(self, name: str, operator: Operator, value: Tensor) -> Tensor:
        return operator.matvec(value)


@torch.no_grad()
def fit_centroids(
    model: nn.Module, batches: Iterable[Tensor], rounds: int = 10, most: int = 2048, seed: int = 0
) -> None:
    """Set the centroids of all routing layers of ``model`` to what its own softmax attention meets.

    Args:
        model: with routing in some of its layers, for example by ``convert``; a backbone too.
        batches: of the model's inputs.
        rounds: of k-means; ``most``: tokens kept of a batch; ``seed``: of the first centroids.

    Raises:
        ValueError: no layer of routing was reached, or fewer tokens than clusters.
    """
    forward = getattr(model, "logits", model)
    collects = _Collects(most)
    with answering_by(collects):
        for batch in batches:
            forward(batch)
    if not collects.tokens:
        raise ValueError("model: no layer has routing attention; convert it first")
    for mechanism, found in collects.tokens.items():
        mechanism.fit(torch.cat(found, 1), rounds, seed)
