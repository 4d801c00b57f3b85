"""What all ops share: a record of arguments, its registration with ``torch.library``, the choice of path.

The arguments of an op are a ``NamedTuple``, its problem. The fields, tensors first, are also the
arguments of ``torch.ops.xattn.<name>_forward``, whose schema is read from their types.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from xattn.kernels.backend import own_precision

P = TypeVar("P", bound=NamedTuple)

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
    gradients: Sequence[str] = (),
    check: Callable[[P], None] | None = None,
) -> Callable[[P], Any]:
    """Make ``xattn::<name>_forward`` and, with gradients, ``xattn::<name>_backward``.

    The modules ``reference``, ``cpu`` and ``triton`` of ``xattn.kernels.<name>`` each have

        forward(problem) -> outputs
        backward(problem, outputs, grads, wanted) -> gradients by field, for at least those in ``wanted``

    and ``problem.backend`` names the one that runs. ``grads`` has None for an output that has no
    gradient; the first output's is then zeros.

    Args:
        problem: the record, with its tensors first, a ``backend`` among the others.
        outputs: their names.
        empty: new tensors of their shapes and dtypes, also for tensors without memory.
        gradients: the fields that have one.
        check: raises a ``ValueError`` for values that do not fit; reads the tensors' elements.

    Returns:
        the op as a function of a problem: one tensor, or a tuple of several.
    """
    hints = get_type_hints(problem)
    fields = [(field, _TYPES[hints[field]]) for field in problem._fields]
    arguments = ", ".join(f"{kind} {field}" for field, kind in fields)
    single = len(outputs) == 1

    def run(*values: Any) -> Any:
        p = problem(*values)
        if check is not None:
            check(p)
        with own_precision(p[0]):
            found = tuple(x.contiguous() for x in _path(name, p).forward(p))
        return found[0] if single else found

    def fake(*values: Any) -> Any:
        found = tuple(empty(problem(*values)))
        return found[0] if single else found

    forward = f"xattn::{name}_forward"
    kinds = "Tensor" if single else f"({', '.join(['Tensor'] * len(outputs))})"
    define(forward, f"({arguments}) -> {kinds}", run, fake)
    if gradients:
        _register_backward(name, problem, arguments, outputs, gradients)
    op = getattr(torch.ops.xattn, f"{name}_forward")
    return lambda p: op(*p)


def _register_backward(
    name: str,
    problem: type[Any],
    arguments: str,
    outputs: Sequence[str],
    gradients: Sequence[str],
) -> None:
    n, at = len(outputs), [problem._fields.index(field) for field in gradients]

    def run(*values: Any) -> list[Tensor]:
        grads, found, wanted = values[:n], values[n : 2 * n], values[-1]
        p = problem(*values[2 * n : -1])
        names = {field for field, wants in zip(gradients, wanted, strict=True) if wants}
        with own_precision(p[0]):
            by_field = _path(name, p).backward(p, found, grads, names)
        return [
            by_field[field].contiguous() if field in names else p[0].new_empty(0)
            for field in gradients
        ]

    def fake(*values: Any) -> list[Tensor]:
        p, wanted = problem(*values[2 * n : -1]), values[-1]
        return [
            torch.empty_like(p[i], memory_format=torch.contiguous_format)
            if wants
            else p[0].new_empty(0)
            for i, wants in zip(at, wanted, strict=True)
        ]

    upstream = ", ".join(f"Tensor? grad_{x}" for x in outputs)
    results = ", ".join(f"Tensor {x}" for x in outputs)
    schema = f"({upstream}, {results}, {arguments}, bool[] wanted) -> Tensor[]"
    define(f"xattn::{name}_backward", schema, run, fake)
    op = getattr(torch.ops.xattn, f"{name}_backward")
    tensors = sum(kind in (Tensor, Tensor | None) for kind in get_type_hints(problem).values())

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        found = (output,) if n == 1 else output
        ctx.save_for_backward(*inputs[:tensors], *found)
        ctx.rest = inputs[tensors:]
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Tensor | None) -> Any:
        result: list[Tensor | None] = [None] * len(problem._fields)
        if any(grad is not None for grad in grads):
            inputs, found = ctx.saved_tensors[:tensors], ctx.saved_tensors[tensors:]
            first = torch.zeros_like(found[0]) if grads[0] is None else grads[0]
            wanted = [ctx.needs_input_grad[i] for i in at]
            flat = op(first, *grads[1:], *found, *inputs, *ctx.rest, wanted)
            for i, grad, wants in zip(at, flat, wanted, strict=True):
                result[i] = grad if wants else None
        return tuple(result)

    torch.library.register_autograd(f"xattn::{name}_forward", differentiate, setup_context=save)


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """As ``torch.library.custom_op``, at a third of its cost per call."""
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default")(run)
    torch.library.register_fake(name, fake)


def _path(name: str, problem: Any) -> Any:
    return _module(f"xattn.kernels.{name}.{problem.backend}")


@cache
def _module(name: str) -> Any:
    return importlib.import_module(name)
