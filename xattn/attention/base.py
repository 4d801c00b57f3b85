"""Base class and registry of all mechanisms, which turn queries, keys and values into an operator.

A mechanism defines the A of Y = A V. Argument checks, prefix tokens and recording work in the same way for
all mechanisms.
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
    rotate_inputs,
)
from xattn.attention.recall import Choice, Recall, recall
from xattn.attention.record import Call, inside_layer, product_replacement, record_call, recording
from xattn.kernels.backend import choose
from xattn.registry import Registry, options_of, with_entry


@dataclass(frozen=True)
class Entry:
    """The registry's entry for a mechanism.

    Example:
        >>> from xattn.attention import mechanism_class
        >>> entry = mechanism_class("gna").entry
        >>> entry.complexity, entry.grid
        ('N k^n D', (1, 2, 3))
    """

    name: str
    paper: str
    complexity: str
    """Time complexity for N tokens of width D."""
    grid: tuple[int, ...] = (0,)
    """Supported numbers of grid dimensions. 0 means that no grid is needed and that any grid is
    accepted."""
    causal: bool = False
    """Whether it has a causal form."""
    cross: bool = False
    """Whether it supports cross-attention: keys from tokens other than the queries, in any number."""
    grouped: bool = False
    """Whether it supports fewer key heads than query heads. If not, key heads are repeated before it is
    called."""
    control: bool = False
    """Whether it exists only as a baseline for comparisons."""
    training_free: bool = False
    """Whether it can replace the softmax layers of a trained classifier without training and keep most of
    the accuracy, as measured by :mod:`xattn.eval.studies.swapped_attention`. Only the layers in the blocks
    given by :meth:`Mechanism.default_blocks` are replaced."""
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Sets of options used in tests, which have a grid of 5 x 6 tokens of width 32 and 2 heads."""
    bench: tuple[Mapping[str, Any], ...] = ({},)
    """Sets of options that ``xattn bench attention`` measures."""
    size: Size | None = None
    """The option that the viewer's attention page offers when it converts a model."""
    studies: Mapping[str, Any] = field(default_factory=dict)
    """The maps that studies of ``xattn.eval.studies`` show, keyed by study, if they differ from the
    defaults. Each study documents the form of its value."""


@dataclass(frozen=True)
class Size:
    """A whole-number option that controls how much a mechanism reads.

    Attributes:
        option: the name of the option.
        what: a short description of the mechanism for the viewer.
        title: the title of the option's control in the viewer.
        values: the values that are offered if they fit the grid.
        usual: the initial value.
        unit: what the option counts: "patches", "patches a side" or "steps". An option that counts "steps"
            sets a strength; it fits every grid, and the viewer shows it as a slider.
        options: other options that the viewer sets.
        regions: the names of the photo's regions 0, 1, ..., if the mechanism has an option ``target`` that
            selects one of them.
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
    """Base class of the mechanisms. A mechanism defines A(q, k, v) in Y = A V, plus an optional local term.

    Args:
        dim: C, the width of the tokens.
        num_heads: H, which must divide ``dim``.
        layer: the number of the layer in the network, counted from 0. Only some mechanisms have this
            option; :func:`~xattn.attention.convert` and the mixers of heads set it for those that do.
        backend: the backend of the kernels, see :func:`xattn.kernels.backend.choose`.

    Example:
        >>> import torch
        >>> from xattn.attention import Inputs, create_mechanism
        >>> mechanism = create_mechanism("softmax", dim=32, num_heads=4)
        >>> q, k, v = torch.rand(3, 1, 4, 9, 8)  # (B, H, N, D) each
        >>> operator = mechanism.operator(Inputs(q, k, v))
        >>> operator.matvec(v).shape, operator.rows(torch.tensor([0])).shape
        (torch.Size([1, 4, 9, 8]), torch.Size([1, 4, 1, 9]))
    """

    entry: ClassVar[Entry]
    reads: tuple[str, ...] = ()
    """The inputs that it needs besides queries and keys. "values" must then be as wide as the keys, and
    "tokens" is the layer's x, for gates or routers. A pass of a converted model stores two more in
    ``inputs.carried``: "photo", the input of the model, and "embedding", the tokens that enter the first
    block."""

    def __init__(self, dim: int, num_heads: int, *, backend: str = "auto") -> None:
        super().__init__()
        if check_whole("dim", dim) % check_whole("num_heads", num_heads):
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
        """Compute A for one call. If the mechanism has a rotation, queries and keys are already rotated.

        Training losses are stored in the operator's ``aux``, and whatever else :meth:`maps` needs is stored
        in its ``context``."""

    def local(self, inputs: Inputs) -> Tensor | None:
        """Compute a term that is added to A V, (B, H, N, Dv); None adds nothing."""
        return None

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Compute the mechanism's own maps from an operator that it built. Each is (B, K, h, w)."""
        return {}

    def choice(self, inputs: Inputs) -> Choice | None:
        """Compute which key blocks each block of queries would read. Return None if the layer is dense.

        Raises:
            ValueError: if the mechanism does not choose blocks.
        """
        raise ValueError(
            f"mechanism: {self.entry.name} does not choose blocks; give one that does, such as hip"
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
        """Measure how well :meth:`choice` finds the blocks to which dense attention gives the most weight.

        All values are 1 if the layer is dense. The arguments are those of
        :class:`~xattn.attention.inputs.Inputs`; for ``forced`` and the result, see
        :func:`xattn.attention.recall.recall`.

        Raises:
            ValueError: if ``v`` is missing for a mechanism that chooses by values.
        """
        if v is None and "values" in self.reads:
            raise ValueError(f"v: {self.entry.name} chooses keys by their values; give the values")
        inputs = self.check_inputs(
            Inputs(q, k, k if v is None else v, x, grid, prefix, causal=causal)
        )
        choice = self.choice(inputs)
        if choice is None:
            return Recall(*inputs.q.new_ones(2, *inputs.k.shape[:2]))
        return recall(inputs, choice, forced=forced)

    @classmethod
    def prepare(cls, model: nn.Module, made: Mapping[int, Mechanism]) -> None:
        """Collect from ``model`` what later calls need. :func:`~xattn.attention.convert` calls this once.

        Args:
            model: the model with the mechanisms in place.
            made: the mechanisms, keyed by block number.

        Raises:
            ValueError: if the model does not provide what is needed; it is then left unconverted.
        """

    @classmethod
    def default_blocks(cls, count: int) -> range:
        """Return which of ``count`` blocks :func:`~xattn.attention.convert` converts by default."""
        return range(count)

    def enter(self, x: Tensor, prefix: int, carried: dict[Any, Any], whole: bool) -> Tensor:
        """Return the tokens that the block of a converted model will process.

        A mechanism that overrides this method and :meth:`leave` wraps the whole block.

        Args:
            x: (B, N, C), the block's input; the first ``prefix`` tokens are not patches.
            carried: the dict in which the layers of this pass store data for later layers.
            whole: whether intermediate values of the block are being read (taps, hooks), in which case no
                token may be dropped. This must not change what :meth:`leave` returns.
        """
        return x

    def leave(self, x: Tensor, carried: dict[Any, Any]) -> Tensor:
        """Return the output tokens (B, N, C) of the block; ``x`` is what the block computed."""
        return x

    def forget(self) -> None:
        """Clear everything that was cached from the inputs of earlier calls. Most mechanisms cache
        nothing."""

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
        """Compute Y (B, H, N, Dv); the arguments are those of :class:`~xattn.attention.inputs.Inputs`.

        Raises:
            ValueError: if the arguments do not fit each other or this mechanism.
        """
        if isinstance(grid, int):
            raise ValueError(f"grid: got {grid}; give its side lengths, for example (14, 14)")
        sides = None if grid is None else tuple(grid)
        return self.attend(Inputs(q, k, v, x, sides, prefix, scale, causal, carried))

    def attend(self, inputs: Inputs) -> Tensor:
        """Compute the same as :meth:`forward` from an :class:`~xattn.attention.inputs.Inputs` record."""
        given, inputs = inputs, self.check_inputs(inputs)
        answer = product_replacement()
        with inside_layer():
            if answer is not None:
                return answer.attend(self, inputs)
            operator = self.operator(inputs)
            if recording():
                output = operator.matvec_and_keep(inputs.v)
                record_call(self._call(operator, given, inputs, output))
            else:
                output = operator.matvec(inputs.v)
            local = self.local(inputs)
        return output if local is None else output + local

    def _call(self, operator: Operator, given: Inputs, inputs: Inputs, output: Tensor) -> Call:
        # The record is detached from the graph.
        seen, inputs = operator.detach(), inputs.detach()
        means = None if self.rotate is None else mean_tokens(given)
        maps = partial(_maps, self, seen, inputs, means)
        return Call(seen, inputs.v, output, dict(operator.aux), maps)

    def check_inputs(self, inputs: Inputs) -> Inputs:
        """Check ``inputs``, and prepare them for :meth:`operator` as :meth:`rotate_and_expand` does."""
        self.check(inputs)
        return self.rotate_and_expand(inputs)

    def rotate_and_expand(self, inputs: Inputs) -> Inputs:
        """Rotate ``inputs`` unless they are already rotated, apply autocast, and repeat the key heads if
        the mechanism needs one for every query head."""
        if self.rotate is not None:
            inputs = rotate_inputs(self.rotate, inputs)
        inputs = inputs.autocast()
        return inputs if self.entry.grouped else inputs.ungrouped()

    def check(self, inputs: Inputs) -> None:
        """Raise a ``ValueError`` that states what does not fit."""
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
                f"causal: got {k.shape[2]} keys for {q.shape[2]} queries; a causal call needs equal numbers"
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
                f"k: got {k.shape[1]} heads for {q.shape[1]} query heads; give a number of heads that "
                f"divides {q.shape[1]}"
            )
        if "values" in self.reads and v.shape[3] != k.shape[3]:
            raise ValueError(
                f"v: got width {v.shape[3]}; {name} needs {k.shape[3]}, the width of the keys"
            )
        if q.shape[2] != k.shape[2] and not self.entry.cross:
            raise ValueError(
                f"k: got {k.shape[2]} keys for {q.shape[2]} queries; {name} needs equal numbers; use a "
                f"mechanism with cross-attention, such as softmax"
            )


def _ready(method: Callable[[Any, Inputs], Any]) -> Callable[[Any, Inputs], Any]:
    """Wrap ``method`` so that it receives inputs prepared by :meth:`Mechanism.rotate_and_expand`."""

    @wraps(method)
    def call(self: Any, inputs: Inputs) -> Any:
        return method(self, self.rotate_and_expand(inputs))

    return call


@torch.no_grad()
def _maps(
    mechanism: Mechanism,
    operator: Operator,
    inputs: Inputs,
    means: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """Return the maps of the mechanism and, on a two-dimensional grid, the prior of its rotation, see
    :func:`~xattn.attention.positions.prior_map`."""
    with inside_layer():
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


def check_whole(name: str, value: Any) -> int:
    """Return ``value`` if it is a whole number of at least 1; otherwise raise a ``ValueError`` that
    mentions ``name``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}; give a whole number of at least 1")
    return value


def merge_heads(x: Tensor) -> Tensor:
    """Convert (B, H, N, D) to (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Convert (B, N, H D) to (B, H, N, D)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def register_attention(
    name: str, *, paper: str = "none", complexity: str = "not stated", **properties: Any
) -> Callable[[type[Made]], type[Made]]:
    """Register the decorated class as a mechanism under ``name``.

    ``properties`` are the other fields of :class:`Entry`.

    Options are checked against the annotations of the class's constructor, see
    :mod:`xattn.runtime.option_checks`.

    Raises:
        ValueError: if another mechanism has this name.

    Example:
        >>> from xattn import register_attention
        >>> from xattn.attention import list_attention
        >>> from xattn.attention.mechanisms.softmax import Softmax
        >>> @register_attention("softmax_again", complexity="N^2 D")
        ... class MySoftmax(Softmax):
        ...     pass
        >>> "softmax_again" in list_attention()
        True
    """
    return MECHANISMS.register(Entry(name, paper, complexity, **properties))


list_attention = MECHANISMS.names


def mechanism_class(name: str | type[Mechanism]) -> type[Mechanism]:
    """Return the class that is registered under a name. A class is returned unchanged.

    An unknown name raises a ``ValueError`` that lists similar names.

    Example:
        >>> from xattn.attention import mechanism_class
        >>> mechanism_class("gna").__name__
        'GNA'
    """
    return MECHANISMS.get(name) if isinstance(name, str) else name


def with_layer(
    name: str | type[Mechanism], options: Mapping[str, Any], layer: int
) -> dict[str, Any]:
    """Return ``options``, plus the layer number if the mechanism has an option for it that ``options``
    does not set.
    """
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
    """Create a mechanism without projections, for q, k, v of ``num_heads`` heads.

    ``options`` are the options of the mechanism. Instead of a name, its class may be given; it need not be
    registered.

    Args:
        rotate: a rotation of queries and keys by their positions, applied before the mechanism receives
            them. It is a ``Rotation``, or a name with options such as ``"comrope:form=ap"``, see
            :func:`~xattn.attention.create_rotation`. Every mechanism supports rotations; their parameters
            are stored under ``rotate``.

    Raises:
        ValueError: if a name is unknown (similar names are listed), an option is unknown, or a value does
            not fit.

    Example:
        >>> import torch
        >>> from xattn.attention import Inputs, create_mechanism
        >>> mechanism = create_mechanism("agent", dim=32, num_heads=4)
        >>> q, k, v = torch.rand(3, 1, 4, 9, 8)
        >>> mechanism.operator(Inputs(q, k, v, grid=(3, 3))).matvec(v).shape
        torch.Size([1, 4, 9, 8])
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
