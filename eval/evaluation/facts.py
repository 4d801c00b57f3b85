"""Describes an evaluation: what it runs, and everything on which its stored results depend."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xattn.backbone import sha256
from xattn.eval.annotations import Annotations
from xattn.eval.evaluation.map_maker import Randomized
from xattn.eval.interfaces import Classifier, Explainer
from xattn.eval.metrics.base import PerturbationMetric
from xattn.eval.protocol import Protocol
from xattn.explainers.adapters import FunctionExplainer, OwnExplainer
from xattn.runtime.version import __version__

WHOLE_SIDE = 56  # maps are reduced to at most this height and width


class BoardState(NamedTuple):
    """Tells a run to keep everything that a board needs: the table of outcomes and all maps, including maps
    of other classes, of other networks and of mosaics.

    Maps of the first ``whole`` images are kept in full. Maps of later images are reduced to at most 56 x 56
    values, which are means over areas of the map.
    """

    whole: int

    def thinned(self, values: Tensor, position: int) -> Tensor:
        """Maps (n, h, w) of the image at ``position``, converted to float32 and reduced for storage."""
        values = values.detach().float().cpu()
        size = min(values.shape[-2], WHOLE_SIDE), min(values.shape[-1], WHOLE_SIDE)
        if position < self.whole or size == tuple(values.shape[-2:]):
            return values
        return torch.nn.functional.adaptive_avg_pool2d(values, size)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is evaluated, how, and by which metrics; see :func:`~xattn.eval.evaluate`.

    ``kept_maps`` is the number of images, counted from the first, whose maps the state keeps, or a
    :class:`BoardState`.
    """

    backbone: Classifier
    explainers: Mapping[str, Explainer]
    protocol: Protocol
    metrics: Sequence[PerturbationMetric]
    annotations: Annotations | None
    randomized: Randomized
    again_limit: int | None
    kept_maps: int | BoardState


def run_facts(evaluation: Evaluation, max_forward_batch: int) -> dict[str, Any]:
    """Everything on which the results of a run depend, except the explained classes, as values for JSON.

    Each method has its own key, so that methods can be added to a run later. ``max_forward_batch`` is the
    actual batch size of the passes (:func:`~xattn.eval.metrics.scorer.micro_batch`).
    """
    backbone, protocol = evaluation.backbone, evaluation.protocol
    annotations = evaluation.annotations
    return {
        "protocol": {**protocol.to_dict(), "id": protocol.id},
        "backbone": [backbone.fingerprint, backbone.task, repr(backbone.preprocessing)],
        "metrics": [[type(p).__name__, p.options()] for p in evaluation.metrics],
        "xattn": __version__,
        "max_forward_batch": max_forward_batch,
        "again_limit": evaluation.again_limit,
        **{f"method {name}": describe(method) for name, method in evaluation.explainers.items()},
        "annotations": None if annotations is None else annotations.fingerprint,
        **{f"randomized {name}": name in evaluation.randomized for name in evaluation.explainers},
    }


def describe(explainer: Explainer) -> dict[str, Any]:
    """Describe an explainer by its class, its options, and the hashes of its head and network.

    Options are listed in the order in which the explainer declares them.
    """
    if isinstance(explainer, OwnExplainer):
        return _describe_own(explainer)
    hidden = (
        "head",
        "backbone",
        "reader",
    )  # the layer that a reader uses is already among the options
    values = getattr(explainer, "__dict__", {})
    declared = [field.name for field in fields(explainer)] if is_dataclass(explainer) else []
    options = {
        key: _fact(values[key])
        for key in dict.fromkeys([*declared, *values])
        if key in values and not key.startswith("_") and key not in hidden
    }
    record: dict[str, Any] = {"class": type(explainer).__qualname__, "options": options}
    if isinstance(explainer, FunctionExplainer):
        record["code"] = _code(type(explainer).function)
    head = getattr(explainer, "head", None)
    if head is not None:
        record["head"] = [sha256(head), getattr(head, "explain_with", None)]
    network = getattr(getattr(explainer, "backbone", None), "fingerprint", None)
    if network is not None:
        record["backbone"] = network
    return record


def _describe_own(explainer: OwnExplainer) -> dict[str, Any]:
    """Describe a method from outside the package, and the options of its wrapper.

    A function is described by its compiled code.
    """
    method = explainer.method
    record = describe(method)
    if hasattr(method, "__code__"):
        record |= {"class": _fact(method), "code": _code(method)}
    for option, usual in (("channels", "signed"), ("pixels", "raw")):
        if getattr(explainer, option) != usual:
            record["options"][option] = getattr(explainer, option)
    return record


def _code(function: Any) -> str | None:
    """A hash of a function's compiled code, so that a state is not resumed after the function changed."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    plain = [c for c in code.co_consts if isinstance(c, int | float | str | None)]
    return hashlib.sha256(code.co_code + repr((code.co_names, plain)).encode()).hexdigest()


def _fact(value: Any) -> Any:
    """An option as a value for JSON: a hash for a tensor or module, a name for any other object."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return [list(value.shape), hashlib.sha256(data.numpy().tobytes()).hexdigest()]
    if isinstance(value, torch.nn.Module):
        return [type(value).__qualname__, sha256(value)]
    if isinstance(value, list | tuple):
        return [_fact(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _fact(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _fact(torch.from_numpy(value))
    where = value if hasattr(value, "__qualname__") else type(value)
    return f"{where.__module__}.{where.__qualname__}"
