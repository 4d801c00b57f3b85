"""The trainable part of a converted network in distillation, and how it becomes part of the network.

The trainable parameters are those of the mechanism and, with ``finetune``, W' = W + 2 b a for qkv and proj
("lora", Hu et al. 2021, arXiv 2106.09685), or all weights ("all").

A layer that is distilled receives the same input as in the original network, so all layers learn in
parallel in one pass, without the errors of earlier layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from xattn.attention import Call, Inputs, Mechanism, Operator, SoftmaxOperator
from xattn.attention.model.spec import Conversion, format_mechanism
from xattn.attention.record import inside_layer, record_layers
from xattn.backbone import Backbone
from xattn.backbone.conversion import (
    UPDATE_SCALE,
    converted,
    load_conversion,
    read_conversion,
)
from xattn.config import DistillConfig


class LayerPass(NamedTuple):
    """A call of an attention layer during a pass."""

    args: tuple[Any, ...]
    """The layer's arguments: its tokens (B, N, C), and anything else that the model passes to it."""
    kwargs: dict[str, Any]
    call: Call
    result: Tensor
    """The layer's result, (B, N, C)."""

    def inputs(self, grid: tuple[int, ...] | None, prefix: int) -> Inputs:
        """Return the input of a mechanism in this layer, with the queries, keys and values of the softmax
        layer."""
        operator = self.call.operator
        assert isinstance(operator, SoftmaxOperator)
        tokens = operator.shape[2]
        if operator.causal:
            grid, prefix = (tokens,), 0
        elif grid is not None and math.prod(grid) != tokens - prefix:
            grid = None
        x = self.args[0] if self.args and isinstance(self.args[0], Tensor) else None
        q, k, v = operator.q, operator.k, self.call.value
        return Inputs(q, k, v, x, grid, prefix, operator.scale, operator.causal)


class MechanismOutput(NamedTuple):
    """The result of a mechanism on one layer's inputs, in the autograd graph of its parameters."""

    operator: Operator
    output: Tensor
    """The product A V plus the mechanism's local term, (B, H, N, Dv)."""


def run_mechanism(mechanism: Mechanism, inputs: Inputs) -> MechanismOutput:
    """Run ``mechanism``, and keep its operator in the autograd graph."""
    inputs = mechanism.check_inputs(inputs)
    with inside_layer():
        operator = mechanism.operator(inputs)
        output, local = operator.matvec(inputs.v), mechanism.local(inputs)
    return MechanismOutput(operator, output if local is None else output + local)


def grid_of(backbone: Backbone, images: Tensor) -> tuple[int, ...] | None:
    """Return the patch grid of ``images`` (B, 3, H, W), if the model reports it."""
    if not backbone.has_grid:
        return None
    height, width = images.shape[-2:]
    rows, columns = backbone.grid(height, width)
    return int(rows), int(columns)


@contextmanager
def layer_passes(backbone: Backbone, layers: Iterable[int]) -> Iterator[dict[int, LayerPass]]:
    """Within this context, each pass of ``backbone`` stores its layer calls in the yielded dict, by layer
    number.

    The thread has exclusive use of the network inside the context. Each layer must be called once per
    pass.
    """
    found: dict[int, LayerPass] = {}
    blocks: Any = backbone.model.blocks

    def after(i: int, args: Any, kwargs: Any, calls: list[Call], result: Tensor) -> None:
        found[i] = LayerPass(args, kwargs, calls[0], result)

    attention = {i: blocks[i].attn for i in layers}
    with backbone.alone(), record_layers(backbone.model, attention, after):
        yield found


def sampled_rows(tokens: int, most: int, seed: int, step: int) -> Tensor:
    """Draw at most ``most`` of the tokens 0..tokens - 1, in ascending order, as a pure function of (seed,
    step)."""
    if tokens <= most:
        return torch.arange(tokens, device="cpu")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return torch.randperm(tokens, generator=generator, device="cpu")[:most].sort().values


# ---------------------------------------------------------------------- what is trained


PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "proj")


class LowRankUpdate(nn.Module):
    """Update W (out, in) to W + 2 b a, where a (r, in) is random and b (out, r) is initially zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, device="cpu").to(weight) * columns**-0.5)
        self.b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + UPDATE_SCALE * self.b @ self.a


class Student(nn.Module):
    """The trainable part of a converted copy of ``teacher``; the frozen rest of the copy is not a
    submodule.

    Attributes: ``mechanisms`` by layer number; ``network``, the converted backbone; ``started``, the
    SHA-256 of the conversion from which training continues, or None.

    Raises:
        ValueError: as in :func:`~xattn.attention.convert`, or there is nothing to train.
    """

    def __init__(
        self,
        teacher: Backbone,
        name: str,
        layers: Iterable[int] | str | None,
        options: Mapping[str, Any] | None,
        config: DistillConfig,
    ) -> None:
        super().__init__()
        whole = config.finetune == "all"
        network = converted(copy.deepcopy(teacher) if whole else teacher, name, layers, options)
        self._unregistered = [network, teacher]
        assert network.conversion is not None
        self.conversion: Conversion = network.conversion[0]
        blocks: Any = network.model.blocks
        self.mechanisms = nn.ModuleDict(
            {str(i): blocks[i].attn.mechanism for i in self.conversion.layers}
        )
        self.finetune = config.finetune
        self.started: str | None = None
        if whole:
            self.model = network.model
        self.updates = nn.ModuleDict()
        if config.finetune == "lora":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self._add_updates(config.rank)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        if not any(True for _ in self.parameters()):
            own = format_mechanism(name, self.conversion.options)
            raise ValueError(
                f"name: {name} has no parameters, so there is nothing to train; use it without "
                f"training (--mechanism {own}), or train the network around it (--finetune lora)"
            )

    def _add_updates(self, rank: int) -> None:
        for i, layer in self.layers():
            for name in PROJECTIONS:
                linear = getattr(layer, name, None)
                if isinstance(linear, nn.Linear):
                    update = LowRankUpdate(linear.weight, rank)
                    self.updates[f"{i}_{name}"] = update
                    parametrize.register_parametrization(linear, "weight", update)

    def start_from(self, folder: str | Path) -> None:
        """Load the mechanisms' tensors from the trained conversion in ``folder``.

        Raises:
            ValueError: the conversion belongs to another network, mechanism or layers, is damaged, or also
                contains trained weights of the network. FileNotFoundError: ``folder`` contains no
                conversion.
        """
        made, config = read_conversion(folder)
        if made.record() != self.conversion.record():
            raise ValueError(f"start: {folder} holds {made}, not {self.conversion}")
        trained = load_conversion(folder, self.teacher)
        own = dict(self.teacher.model.state_dict())
        state = trained.model.state_dict()
        if not all(torch.equal(state[name], value) for name, value in own.items()):
            raise ValueError(
                f"start: {folder} also contains trained weights of the network; give a conversion that was "
                f"trained without finetune"
            )
        for i in self.conversion.layers:
            path = f"blocks.{i}.attn.mechanism"
            self.mechanism(i).load_state_dict(trained.model.get_submodule(path).state_dict())
        self.started = config["sha256"]

    @property
    def network(self) -> Backbone:
        """The converted backbone that is trained."""
        return self._unregistered[0]

    @property
    def teacher(self) -> Backbone:
        """The original backbone."""
        return self._unregistered[1]

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield the number and module of each converted attention layer."""
        blocks: Any = self.network.model.blocks
        for i in self.conversion.layers:
            yield i, blocks[i].attn

    def mechanism(self, layer: int) -> Mechanism:
        """Return the mechanism of a converted layer, given its number."""
        found = self.mechanisms[str(layer)]
        assert isinstance(found, Mechanism)
        return found

    def train(self, mode: bool = True) -> Student:
        """Set the mode of the mechanisms only; the network uses no dropout and updates no statistics."""
        self.training = mode
        for module in self.mechanisms.values():
            module.train(mode)
        return self

    def config(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the original one."""
        teacher = self.teacher
        found = {
            "conversion": self.conversion.record(),
            "backbone": {"name": teacher.name, "sha256": teacher.fingerprint},
        }
        return found if self.started is None else {**found, "start": self.started}

    def trained(self) -> dict[str, Tensor]:
        """Return the trained tensors under their names in the model; low-rank updates are called
        ``NAME.lora_a`` and ``NAME.lora_b``."""
        if self.finetune == "all":
            return dict(self.network.model.state_dict())
        state = {}
        for i in self.conversion.layers:
            path = f"blocks.{i}.attn"
            for name, value in self.mechanism(i).state_dict().items():
                state[f"{path}.mechanism.{name}"] = value
            for name in PROJECTIONS:
                if f"{i}_{name}" in self.updates:
                    update: Any = self.updates[f"{i}_{name}"]
                    state[f"{path}.{name}.lora_a"] = update.a.detach()
                    state[f"{path}.{name}.lora_b"] = update.b.detach()
        return state
