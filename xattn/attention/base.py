"""Base of all mechanisms, queries, keys and values in, an operator out, and their registry.

A mechanism decides which A stands in Y = A V; checks, prefix tokens and recording are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator
from xattn.attention.positions import (
    Rotation,
    check_grid,
    create_rotation,
    mean_tokens,
    prior_map,
    rotated,
)
from xattn.attention.recall import Choice, Recall, recall
from xattn.attention.record import Call, answered_by, keep, own_layer, recording
from xattn.kernels.backend import choose
from xattn.registry import Registry, options_of, with_entry


@dataclass(frozen=True)
class Entry:
    """What the registry knows about a mechanism."""

    name: str
    paper: str
    complexity: str
    """Time for N tokens of width D."""
    grid: tuple[int, ...] = (0,)
    """Numbers of grid dimensions that it works on; 0 stands for any tokens, without a grid."""
    causal: bool = False
    """Whether it has a causal form."""
    cross: bool = False
    """Whether keys may be others than the queries' own tokens, of any number."""
    grouped: bool = False
    """Whether it handles fewer key heads itself; the others get one for each query head."""
    control: bool = False
    """Whether it is there for others to be compared with, not to be used."""
    training_free: bool = False
    """Whether it can replace the softmax layers of a trained classifier, those of
    :meth:`Mechanism.default_blocks`, without training and keep most of the accuracy, as
    :mod:`xattn.eval.studies.swapped_attention` measures."""
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Options with which the tests run it, on a grid of 5 x 6 tokens, 32 wide, with 2 heads."""
    bench: tuple[Mapping[str, Any], ...] = ({},)
    """Options with which ``xattn bench attention`` times it."""
    size: Size | None = None
    """The option that the viewer's attention page offers, where it converts a model."""
    studies: Mapping[str, Any] = field(default_factory=dict)
    """What studies of ``xattn.eval.studies`` are to show, by their names, if not the defaults; each says
    which form that has."""


@dataclass(frozen=True)
class Size:
    """A whole-number option that sets how much a mechanism reads.

    Attributes: ``option``, its name; ``what``, the mechanism in a word; ``title``, of the control in
    the viewer; ``values``, offered if they fit the grid; ``usual``, the one chosen first; ``unit``, what
    it counts: "patches", "patches a side", or "steps" of a strength, which fit every grid and get a
    slider; ``options``, the others that the viewer sets; ``regions``, names of the regions 0, 1, ... of
    the photo that an option ``target`` chooses from, if the mechanism has one.
    """

    option: str
    what: str
    title: str
    values: tuple[int, ...]
    usual: int
    unit: Literal["patches", "patches a side", "steps"] = "patches"
    options: Mapping[str, Any] = field(default_factory=dict)
    regions: tuple[str, ...] = ()


class Mechanism(nn.Module, ABC):
    """A(q, k, v) of Y = A V + (optionally) a local term.

    Args:
        dim: C, width of the tokens; ``num_heads``: H, which divides it.
        layer: a mechanism with this option is given the number of its layer in the network, from 0 on, by
            :func:`~xattn.attention.convert` and the mixers of heads.
        backend: of the kernels, see :func:`xattn.kernels.backend.choose`.
    """

    entry: ClassVar[Entry]
    reads: tuple[str, ...] = ()
    """What it reads beside queries and keys: "values", which then have to be as wide as the keys; "tokens",
    the layer's x, for gates or routers; and what a pass of a converted model keeps for it in
    ``inputs.carried``: "photo", the model's input, or "embedding", tokens that enter the first block."""

    def __init__(self, dim: int, num_heads: int, *, backend: str = "auto") -> None:
        super().__init__()
        if whole("dim", dim) % whole("num_heads", num_heads):
            raise ValueError(f"dim, num_heads: got {dim}, {num_heads}; num_heads has to divide dim")
        choose("auto" if backend == "triton" else backend, torch.device("cpu"))  # checks the name
        self.dim, self.num_heads, self.backend = dim, num_heads, backend
        self.rotate: Rotation | None = None  # see create_mechanism

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in {"operator", "choice"} & vars(cls).keys():
            setattr(cls, name, _ready(vars(cls)[name]))

    @abstractmethod
    def operator(self, inputs: Inputs) -> Operator:
        """A for one call, whose queries and keys are rotated first if the mechanism does that. Losses for
        training go into its ``aux``, and whatever :meth:`maps` needs beside it into its ``context``."""

    def local(self, inputs: Inputs) -> Tensor | None:
        """What is added to A V, (B, H, N, Dv); None adds nothing."""
        return None

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """The mechanism's own maps for an operator that it made: (B, K, h, w) by name."""
        return {}

    def choice(self, inputs: Inputs) -> Choice | None:
        """Which blocks each block of queries would read, chosen anew; None where the layer is dense.

        Raises:
            ValueError: a mechanism that does not tell.
        """
        raise ValueError(
            f"mechanism: {self.entry.name} tells no choice of blocks; give one that does, such as hip"
        )

    @torch.no_grad()
    def recall(
        self,
        q: Tensor,
        k: Tensor,
        grid: tuple[int, ...] | None = None,
        prefix: int = 0,
        *,
        v: Tensor | None = None,
        x: Tensor | None = None,
        causal: bool = False,
        forced: bool = True,
    ) -> Recall:
        """How near :meth:`choice` comes to the blocks that get most of dense attention; all 1 where the
        layer is dense. Arguments as in :class:`~xattn.attention.inputs.Inputs`; ``forced`` and what it
        gives, see :func:`xattn.attention.recall.recall`.

        Raises:
            ValueError: no ``v`` for a mechanism that chooses by values.
        """
        if v is None and "values" in self.reads:
            raise ValueError(f"v: {self.entry.name} chooses keys by their values; give them")
        inputs = self.accepted(Inputs(q, k, k if v is None else v, x, grid, prefix, causal=causal))
        choice = self.choice(inputs)
        if choice is None:
            return Recall(*inputs.q.new_ones(2, *inputs.k.shape[:2]))
        return recall(inputs, choice, forced=forced)

    @classmethod
    def prepare(cls, model: nn.Module, made: Mapping[int, Mechanism]) -> None:
        """Take from a model what is kept for later calls; :func:`~xattn.attention.convert` calls it once.

        Args:
            model: with the mechanisms in place.
            made: the mechanisms, by the number of the block.

        Raises:
            ValueError: a model that does not give it; it is left unconverted.
        """

    @classmethod
    def default_blocks(cls, count: int) -> range:
        """The blocks, of ``count``, that :func:`~xattn.attention.convert` takes where none are named."""
        return range(count)

    def enter(self, x: Tensor, prefix: int, carried: dict[Any, Any], whole: bool) -> Tensor:
        """The tokens that the block of a converted model computes on.

        A mechanism that has this method, and :meth:`leave`, of its own stands around the whole block.

        Args:
            x: (B, N, C), those that it gets; ``prefix`` of them are no patches.
            carried: what the layers of this pass leave for later ones.
            whole: whether somebody looks into the block, so that all tokens have to stay in it; the
                output of :meth:`leave` must be the same.
        """
        return x

    def leave(self, x: Tensor, carried: dict[Any, Any]) -> Tensor:
        """The tokens (B, N, C) that the block gives on, for its output ``x``."""
        return x

    def forget(self) -> None:
        """Drop what was kept from the inputs of earlier calls; most mechanisms keep nothing."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Sequence[int] | None = None,
        prefix: int = 0,
        scale: float | None = None,
        *,
        x: Tensor | None = None,
        causal: bool = False,
        carried: dict[Any, Any] | None = None,
    ) -> Tensor:
        """Y (B, H, N, Dv); arguments as in :class:`~xattn.attention.inputs.Inputs`.

        Raises:
            ValueError: an argument that does not fit the others or this mechanism.
        """
        if isinstance(grid, int):
            raise ValueError(f"grid: got {grid}; give its lengths, for example (14, 14)")
        sides = None if grid is None else tuple(grid)
        return self.attend(Inputs(q, k, v, x, sides, prefix, scale, causal, carried))

    def attend(self, inputs: Inputs) -> Tensor:
        """:meth:`forward` of a record."""
        given, inputs = inputs, self.accepted(inputs)
        answer = answered_by()
        with own_layer():
            if answer is not None:
                return answer.attend(self, inputs)
            operator = self.operator(inputs)
            if recording():
                output = operator.matvec_and_keep(inputs.v)
                keep(self._call(operator, given, inputs, output))
            else:
                output = operator.matvec(inputs.v)
            local = self.local(inputs)
        return output if local is None else output + local

    def _call(self, operator: Operator, given: Inputs, inputs: Inputs, output: Tensor) -> Call:
        # What is recorded is not part of the graph.
        seen, inputs = operator.detach(), inputs.detach()
        means = None if self.rotate is None else mean_tokens(given)
        maps = partial(_maps, self, seen, inputs, means)
        return Call(seen, inputs.v, output, dict(operator.aux), maps)

    def accepted(self, inputs: Inputs) -> Inputs:
        """``inputs``, checked and rotated, as :meth:`operator` takes them."""
        self.check(inputs)
        return self.ready(inputs)

    def ready(self, inputs: Inputs) -> Inputs:
        """``inputs``, rotated if they are not yet, and with a key head for each query head if it takes no
        fewer."""
        if self.rotate is not None:
            inputs = rotated(self.rotate, inputs)
        inputs = inputs.autocast()
        return inputs if self.entry.grouped else inputs.ungrouped()

    def check(self, inputs: Inputs) -> None:
        """Raise a ``ValueError`` that names what does not fit."""
        q, k, v, entry = inputs.q, inputs.k, inputs.v, self.entry
        name = entry.name
        self._check_shapes(q, k, v)
        if q.shape[1] * q.shape[3] != self.dim or q.shape[1] != self.num_heads:
            raise ValueError(
                f"q: got {q.shape[1]} heads of {q.shape[3]}; {name} was made for {self.num_heads} "
                f"heads of {self.dim // self.num_heads}"
            )
        if "tokens" in self.reads and inputs.x is None:
            raise ValueError(f"x: {name} reads the layer's tokens; give x (B, N, {self.dim})")
        if inputs.x is not None:
            shape = tuple(inputs.x.shape)
            width = self.dim if "tokens" in self.reads or len(shape) != 3 else shape[2]
            if shape != (q.shape[0], q.shape[2], width):
                raise ValueError(
                    f"x: got shape {shape}; give ({q.shape[0]}, {q.shape[2]}, {self.dim})"
                )
        if inputs.causal and not entry.causal:
            raise ValueError(f"causal: {name} has no causal form; leave it False")
        if inputs.causal and k.shape[2] != q.shape[2]:
            raise ValueError(
                f"causal: got {k.shape[2]} keys for {q.shape[2]} queries; a causal call needs as many"
            )
        check_grid(name, entry.grid, inputs.grid, inputs.prefix, q.shape[2])

    def _check_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        name = self.entry.name
        fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
        if not fits or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise ValueError(
                f"q, k, v: got {shapes}; {name} needs (B, H, N, D), (B, Hk, S, D), (B, Hk, S, Dv)"
            )
        if not k.shape[1] or q.shape[1] % k.shape[1]:
            raise ValueError(
                f"k: got {k.shape[1]} heads for {q.shape[1]} of the queries; give a number that "
                f"divides it"
            )
        if "values" in self.reads and v.shape[3] != k.shape[3]:
            raise ValueError(
                f"v: got width {v.shape[3]}; {name} needs {k.shape[3]}, that of the keys"
            )
        if q.shape[2] != k.shape[2] and not self.entry.cross:
            raise ValueError(
                f"k: got {k.shape[2]} keys for {q.shape[2]} queries; {name} needs as many, use a "
                f"mechanism with cross-attention, such as softmax"
            )


def _ready(method: Callable[[Any, Inputs], Any]) -> Callable[[Any, Inputs], Any]:
    """The method, given inputs that are ready."""

    @wraps(method)
    def call(self: Any, inputs: Inputs) -> Any:
        return method(self, self.ready(inputs))

    return call


@torch.no_grad()
def _maps(
    mechanism: Mechanism,
    operator: Operator,
    inputs: Inputs,
    means: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """The mechanism's own, and its rotation's, see :func:`~xattn.attention.positions.prior_map`."""
    with own_layer():
        found = mechanism.maps(operator, inputs)
        if means is None or inputs.grid is None or len(inputs.grid) != 2 or inputs.causal:
            return found
        assert mechanism.rotate is not None
        return {**found, "prior": prior_map(mechanism.rotate, means, inputs)}


MECHANISMS: Registry[Mechanism, Entry] = Registry(
    "xattn.attention",
    base=Mechanism,
    homes=("xattn.attention.mechanisms",),
    argument="name",
    noun="attention",
    options_argument="options",
    given=("dim", "num_heads"),
    mark=with_entry,
)
Made = TypeVar("Made", bound=Mechanism)


def whole(name: str, value: Any) -> int:
    """``value`` if it is a whole number of at least 1; else a ``ValueError`` that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}; give a whole number of at least 1")
    return value


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H D) -> (B, H, N, D)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def register_attention(
    name: str, *, paper: str = "none", complexity: str = "not stated", **properties: Any
) -> Callable[[type[Made]], type[Made]]:
    """Class decorator: make a mechanism known under ``name``; ``properties`` as in :class:`Entry`.

    Options are checked against the annotations of its constructor, see
    :mod:`xattn.runtime.option_checks`.

    Raises:
        ValueError: another mechanism has that name.
    """
    return MECHANISMS.register(Entry(name, paper, complexity, **properties))


list_attention = MECHANISMS.names


def mechanism_class(name: str | type[Mechanism]) -> type[Mechanism]:
    """The registered class, or the class that is given; a ``ValueError`` with near matches for an unknown
    name."""
    return MECHANISMS.get(name) if isinstance(name, str) else name


def with_layer(
    name: str | type[Mechanism], options: Mapping[str, Any], layer: int
) -> dict[str, Any]:
    """``options``, with the number of the layer if the mechanism takes it and they do not name it."""
    takes_layer = "layer" in (options_of(mechanism_class(name)) or ())
    return {"layer": layer, **options} if takes_layer else dict(options)


def create_mechanism(
    name: str | type[Mechanism],
    dim: int,
    num_heads: int,
    *,
    rotate: str | Rotation | None = None,
    **options: Any,
) -> Mechanism:
    """A mechanism alone, for q, k, v of ``num_heads`` heads; ``options`` are its own. A class need not be
    registered.

    Args:
        rotate: rotates queries and keys by their places before the mechanism gets them; a name with
            options such as ``"comrope:form=ap"``, see :func:`~xattn.attention.create_rotation`. Every
            mechanism takes it; its parameters lie under ``rotate``.

    Raises:
        ValueError: unknown name (with near matches), unknown option, or values that do not fit.
    """
    if not isinstance(name, str):
        made = name(dim, num_heads, **options)
    else:
        made = MECHANISMS.create(name, dim, num_heads, **options)
    if isinstance(rotate, str):
        rotate = create_rotation(rotate, dim // num_heads, num_heads)
    if rotate is not None and not isinstance(rotate, Rotation):
        raise ValueError(f"rotate: got {rotate!r}; give a name, such as 'axial', or a Rotation")
    made.rotate = rotate
    return made
