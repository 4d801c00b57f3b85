"""Shared code of all ops: records of arguments, registration with ``torch.library``, choice of the path.

The arguments of an op form a ``NamedTuple``, called its problem. The fields, tensors first, are also
the arguments of ``torch.ops.xattn.<name>_forward``, whose schema is read from their types.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from xattn.kernels.backend import interpreted, on_device, without_autocast

P = TypeVar("P", bound=NamedTuple)
A = ParamSpec("A")
R = TypeVar("R")
P_co = TypeVar("P_co", covariant=True)
R_co = TypeVar("R_co", covariant=True)

Derivative = Callable[[P, Sequence[Tensor | None], Collection[str]], dict[str, Tensor]]
"""(problem, gradients of the outputs, wanted fields) to gradients by field."""

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    list[int]: "int[]",
}


def register(
    name: str,
    problem: type[P],
    *,
    outputs: Sequence[str],
    empty: Callable[[P], Sequence[Tensor]],
    kept: Sequence[str] = (),
    gradients: Sequence[str] = (),
    backward: Derivative[P] | None = None,
    second: Derivative[P] | None = None,
    batched: bool = False,
    check: Callable[[P], None] | None = None,
) -> Callable[[P], Any]:
    """Register ``xattn::<name>_forward`` and, with gradients, ``xattn::<name>_backward``.

    The modules ``reference``, ``cpu`` and ``triton`` of ``xattn.kernels.<name>`` each define

        forward(problem) -> outputs, then what is kept
        backward(problem, outputs, grads, wanted) -> gradients by field, for at least those in ``wanted``

    and ``problem.backend`` names the module that is used. ``backward`` gets everything that ``forward``
    returned. For an output that has no gradient, ``grads`` contains None; for the first output, it contains
    zeros instead.

    Args:
        problem: the record type, with tensors first and a ``backend`` among the other fields.
        outputs: the names of the outputs.
        empty: makes new tensors like those that ``forward`` returns; also works for meta tensors.
        kept: the names of results that are only for the backward pass and have no gradient.
        gradients: the fields that have gradients.
        backward: computes gradients by ops that are themselves differentiable, instead of a ``backward``
            in each module; in this case there is no ``xattn::<name>_backward``.
        second: the gradients in plain PyTorch, which is differentiated for second derivatives.
        batched: whether the first axis of every tensor is the batch, or 1 if the whole batch shares the
            tensor; ``torch.vmap`` then makes the batch longer.
        check: raises a ``ValueError`` if values are invalid; it reads the tensors' elements.

    Returns:
        The op as a function of a problem. It returns one tensor or a tuple, without the ``kept`` results.
    """
    op = _Op(name, problem, tuple(outputs), tuple(kept), tuple(gradients))
    LAYOUTS[name] = op.tensors, [problem._fields.index(field) for field in op.gradients]
    _define_forward(op, empty, check)
    if gradients:
        if backward is None:
            _define_backward(op)
        _register_autograd(op, backward)
    if second is not None:
        _register_second(op, second)
    if batched:
        _register_vmap(op)
    call, n = op.forward, len(outputs)
    if not kept:
        return lambda p: call(*p)
    chosen = 0 if n == 1 else slice(n)
    return lambda p: call(*p)[chosen]


class OpCall(Protocol[A, P_co, R_co]):
    """An op as a function. Its attribute ``problem`` takes the same arguments, checks them, and returns
    them as a record."""

    @property
    def problem(self) -> Callable[A, P_co]: ...

    def __call__(self, *args: A.args, **options: A.kwargs) -> R_co: ...


def calls_op(
    op: Callable[[P], Any], returns: type[R]
) -> Callable[[Callable[A, P]], OpCall[A, P, R]]:
    """Decorator for a function that checks its arguments and returns a problem; a call of the decorated
    function runs the op on this problem.

    Args:
        returns: the op's return type, which replaces the problem in the function's signature.
    """

    def made(problem: Callable[A, P]) -> OpCall[A, P, R]:
        @wraps(problem)
        def call(*args: A.args, **options: A.kwargs) -> Any:
            return op(problem(*args, **options))

        function: Any = call
        function.__annotations__ = {**problem.__annotations__, "return": returns}
        function.__signature__ = signature(problem).replace(return_annotation=returns)
        function.problem = problem
        return cast("OpCall[A, P, R]", function)

    return made


LAYOUTS: dict[str, tuple[int, list[int]]] = {}
"""For the name of each op, the number of leading fields of its problem that are tensors, and the
indices of the fields with gradients."""


@dataclass(frozen=True)
class _Op:
    """The names among the arguments of :func:`register`."""

    name: str
    problem: type[Any]
    outputs: tuple[str, ...]
    kept: tuple[str, ...]
    gradients: tuple[str, ...]

    @cached_property
    def arguments(self) -> str:
        hints = get_type_hints(self.problem)
        return ", ".join(f"{_TYPES[hints[field]]} {field}" for field in self.problem._fields)

    @cached_property
    def tensors(self) -> int:
        """The number of leading fields that are tensors."""
        hints = get_type_hints(self.problem)
        return sum(hints[field] in (Tensor, Tensor | None) for field in self.problem._fields)

    @property
    def returned(self) -> tuple[str, ...]:
        return self.outputs + self.kept

    @property
    def forward(self) -> Any:
        return getattr(torch.ops.xattn, f"{self.name}_forward")

    @property
    def backward(self) -> Any:
        return getattr(torch.ops.xattn, f"{self.name}_backward")


def _define_forward(
    op: _Op, empty: Callable[[Any], Sequence[Tensor]], check: Callable[[Any], None] | None
) -> None:
    name, problem, single = op.name, op.problem, len(op.returned) == 1

    def run(*values: Any) -> Any:
        p = problem(*values)
        if check is not None:
            check(p)
        with without_autocast(_given(p)), on_device(_given(p)):
            found = _path(name, p).forward(_single(p))
            if _lacks_bfloat16(p):
                found = [x.to(y.dtype) for x, y in zip(found, empty(p), strict=True)]
            found = tuple(x.contiguous() for x in found)
        return found[0] if single else found

    def fake(*values: Any) -> Any:
        found = tuple(empty(problem(*values)))
        return found[0] if single else found

    kinds = "Tensor" if single else f"({', '.join(['Tensor'] * len(op.returned))})"
    define(f"xattn::{name}_forward", f"({op.arguments}) -> {kinds}", run, fake)


def _define_backward(op: _Op) -> None:
    """Define the backward op; its arguments are the outputs' gradients, all results of ``forward``, the
    problem's fields, and flags for the wanted gradients."""
    name, problem, gradients, n = op.name, op.problem, op.gradients, len(op.outputs)
    first = n + len(op.returned)

    def run(*values: Any) -> list[Tensor]:
        grads, found, wanted = values[:n], values[n:first], values[-1]
        p = problem(*values[first:-1])
        names = _names(gradients, wanted)
        with without_autocast(_given(p)), on_device(_given(p)):
            by_field = _path(name, p).backward(_single(p), found, _single(p, grads), names)
        return [
            by_field[field].to(getattr(p, field).dtype).contiguous()
            if field in names
            else _given(p).new_empty(0)
            for field in gradients
        ]

    def fake(*values: Any) -> list[Tensor]:
        p, wanted = problem(*values[first:-1]), values[-1]
        return [
            torch.empty_like(getattr(p, field), memory_format=torch.contiguous_format)
            if wants
            else _given(p).new_empty(0)
            for field, wants in zip(gradients, wanted, strict=True)
        ]

    upstream = ", ".join(f"Tensor? grad_{x}" for x in op.outputs)
    results = ", ".join(f"Tensor {x}" for x in op.returned)
    schema = f"({upstream}, {results}, {op.arguments}, bool[] wanted) -> Tensor[]"
    define(f"xattn::{name}_backward", schema, run, fake)


def _register_autograd(op: _Op, derivative: Derivative[Any] | None) -> None:
    """Register gradients by ``xattn::<name>_backward``, or by ``derivative``, which stores no output."""
    problem, gradients, n, tensors = op.problem, op.gradients, len(op.outputs), op.tensors
    at = [problem._fields.index(field) for field in gradients]
    backward: Any = op.backward if derivative is None else None

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        found = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*inputs[:tensors], *(found if derivative is None else ()))
        ctx.mark_non_differentiable(*found[n:])
        ctx.rest = inputs[tensors:]
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Tensor | None) -> Any:
        result: list[Tensor | None] = [None] * len(problem._fields)
        grads = grads[:n]
        if any(grad is not None for grad in grads):
            saved = ctx.saved_tensors  # read once, since every access unpacks them again
            inputs, found = saved[:tensors], saved[tensors:]
            wanted = [ctx.needs_input_grad[i] for i in at]
            if derivative is None:
                first = torch.zeros_like(found[0]) if grads[0] is None else grads[0]
                flat = backward(first, *grads[1:], *found, *inputs, *ctx.rest, wanted)
            else:
                names = _names(gradients, wanted)
                by_field = derivative(problem(*inputs, *ctx.rest), grads, names)
                flat = [by_field.get(field) for field in gradients]
            for i, grad, wants in zip(at, flat, wanted, strict=True):
                result[i] = grad if wants else None
        return tuple(result)

    name = f"xattn::{op.name}_forward"
    torch.library.register_autograd(name, differentiate, setup_context=save)


def _register_second(op: _Op, derivative: Derivative[Any]) -> None:
    """Register derivatives of the gradients with respect to their inputs; outputs get none."""
    n, first = len(op.outputs), len(op.outputs) + len(op.returned)
    end = first + op.tensors
    at = [*range(n), *range(first, end)]

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in at))
        ctx.rest, ctx.names = inputs[end:-1], _names(op.gradients, inputs[-1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
        needed = [ctx.needs_input_grad[i] for i in at]
        saved = ctx.saved_tensors
        with torch.enable_grad(), without_autocast(_given(saved)):
            leaves = [
                None if x is None else x.detach().requires_grad_(need)
                for x, need in zip(saved, needed, strict=True)
            ]
            by_field = derivative(op.problem(*leaves[n:], *ctx.rest), leaves[:n], ctx.names)
            slopes = {
                field: grad
                for field, grad in zip(op.gradients, grads, strict=True)
                if field in ctx.names and grad is not None
            }
            found = torch.autograd.grad(
                [by_field[field] for field in slopes],
                [x for x in leaves if x is not None and x.requires_grad],
                list(slopes.values()),
                allow_unused=True,
            )
        result: list[Tensor | None] = [None] * (end + len(ctx.rest) + 1)
        by_leaf = iter(found)
        for i, x in zip(at, leaves, strict=True):
            if x is not None and x.requires_grad:
                result[i] = next(by_leaf)
        return tuple(result)

    name = f"xattn::{op.name}_backward"
    torch.library.register_autograd(name, differentiate, setup_context=save)


def _register_vmap(op: _Op) -> None:
    """Register ``torch.vmap`` as a longer batch; a tensor that all examples share is not copied."""
    forward, tensors, single = op.forward, op.tensors, len(op.returned) == 1

    def run(info: Any, in_dims: Any, *values: Any) -> Any:
        many = info.batch_size
        whole = [
            None if x is None else x.expand(many, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(values[:tensors], in_dims[:tensors], strict=True)
        ]
        batch = max(x.shape[1] for x in whole if x is not None)
        folded = [
            None if x is None else x.expand(many, batch, *x.shape[2:]).flatten(0, 1) for x in whole
        ]
        found = forward(*folded, *values[tensors:])
        if single:
            return found.unflatten(0, (many, batch)), 0
        return tuple(x.unflatten(0, (many, batch)) for x in found), (0,) * len(found)

    torch.library.register_vmap(f"xattn::{op.name}_forward", run)


def _lacks_bfloat16(p: Any) -> bool:
    """Whether ``p`` runs in Triton's interpreter, which multiplies the bits of bfloat16 as integers."""
    return p.backend == "triton" and interpreted() and _given(p).dtype == torch.bfloat16


def _single(p: Any, values: Any = None) -> Any:
    """``values`` (by default ``p``), with bfloat16 converted to float32 if ``p`` lacks bfloat16."""
    values = p if values is None else values
    if not _lacks_bfloat16(p):
        return values
    changed = [x.float() if _is_bfloat16(x) else x for x in values]
    return type(p)(*changed) if values is p else tuple(changed)


def _is_bfloat16(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bfloat16


def _names(gradients: Sequence[str], wanted: Sequence[bool]) -> set[str]:
    return {field for field, wants in zip(gradients, wanted, strict=True) if wants}


def _given(values: Sequence[Any]) -> Tensor:
    """The first tensor of a problem that is not None; all others have the same dtype and device."""
    return next(x for x in values if isinstance(x, Tensor))


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op like ``torch.library.custom_op``, but with a third of its cost per call."""
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default")(run)
    torch.library.register_fake(name, fake)


def _path(name: str, problem: Any) -> Any:
    return _module(f"xattn.kernels.{name}.{problem.backend}")


@cache
def _module(name: str) -> Any:
    return importlib.import_module(name)
