"""The relevance engine: runs a network's own code with the gradients of a composite's rules.

    with apply_rules(module, "cp_lrp"):
        score = module(x)[0, 281]                        # x requires a gradient
    relevance = x * torch.autograd.grad(score, x)[0]

A :class:`torch.overrides.TorchFunctionMode` sees every call of a PyTorch function, including ``x * gate``
and ``F.gelu`` in a ``forward``, in any model; :mod:`xattn.explainers.relevance.rules` defines the
gradient that each passes on. If a function on activations has no rule, an error names it. Layers of
:mod:`xattn.attention` follow the rules of their operators
(:mod:`xattn.explainers.relevance.operators`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from xattn.attention.base import Mechanism
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator
from xattn.attention.record import replace_products
from xattn.explainers.relevance.attention import layers_text
from xattn.explainers.relevance.linear import (
    KeptTensor,
    Layer,
    LinearRule,
    SharedRelevance,
    epsilon_rule,
    quotient_of,
)
from xattn.explainers.relevance.operators import Held, NoRule, multiply, receives_relevance
from xattn.explainers.relevance.rules import (
    AFFINE,
    ATTENTION,
    COMPOSITES,
    FEATURES,
    LAYOUT,
    TAUGHT,
    WRITING,
    WRITTEN_OUT,
    Composite,
    added_bias,
    depends_on_input,
    map_nested,
    nested_tensors,
    own_gradient,
    relu,
    rules_of,
)


@dataclass
class Step:
    """The record of a function call: the relevance R of its output, of its inputs, and of the constants
    that it added."""

    function: str
    module: str
    sums: dict[str, float] = field(default_factory=lambda: {"out": 0.0, "in": 0.0, "kept": 0.0})

    @property
    def absorbed(self) -> float:
        """Relevance that was lost, because the function's rule does not conserve it."""
        return self.sums["out"] - self.sums["in"] - self.sums["kept"]

    def weigh(self, kind: str, x: Tensor, value: Tensor | None = None) -> None:
        """In a backward pass, add the relevance of ``value`` to the sum of this ``kind``; ``value`` is x by
        default, or a summand of x."""
        value = x.detach().clone() if value is None else value.detach()

        def add(c: Tensor | None) -> None:
            if c is None:  # the score does not depend on it
                return
            # Hidden keys have a bias of -inf.
            self.sums[kind] += float(torch.where(c == 0, 0, value * c).double().sum())

        x.register_hook(add)


class Balance(NamedTuple):
    """The distribution of one image's score: score = reached + constants + absorbed."""

    score: float
    reached: float
    """Relevance of the pixels, or of the layer that is explained."""
    constants: float
    """Relevance of biases, position embeddings and other constants."""
    fault: str
    """The function that absorbed the most, and its module."""

    @property
    def absorbed(self) -> float:
        return self.score - self.reached - self.constants

    @property
    def error(self) -> float:
        """The absorbed relevance, as a share of the score."""
        return abs(self.absorbed) / max(abs(self.score), 1e-30)


FACTS = frozenset(
    "get size dim ndimension numel nelement stride len is_contiguous is_floating_point".split()
)
"""Names of tensor attributes and methods that do not read the tensor's values."""


class _Mark(NamedTuple):
    """The rule that still has to be applied to the output of a linear layer; a BatchNorm that follows is
    treated as part of the layer."""

    layer: Layer
    x: Tensor
    rule: LinearRule
    step: Step | None


class Engine(TorchFunctionMode):
    """Replaces PyTorch's functions with the functions of a composite. Weights must not require a gradient.

    Args:
        composite: a :class:`~xattn.explainers.relevance.rules.Composite`, or its name in ``COMPOSITES``.
        keep: collect in ``added`` each constant that was added to an output, with the output's edge in
            the graph. The edge is stored because later calls may work in place.
        weigh: collect ``steps`` for :meth:`balance`; this stores every activation twice.

    Attributes: ``refused``, functions without a rule; ``attended``, the number of attention calls;
    ``taught``, whether any rule comes from the user; ``notes``, where attention was held constant for lack
    of a rule.
    """

    def __init__(
        self, composite: Composite | str = "attn_lrp", keep: bool = False, weigh: bool = False
    ) -> None:
        super().__init__()
        self.composite = COMPOSITES[composite] if isinstance(composite, str) else composite
        self.rules = rules_of(self.composite)
        self.keep, self.weigh = keep or weigh, weigh
        self.added: list[tuple[Any, Tensor]] = []
        self.steps: list[Step] = []
        self.refused: dict[str, None] = {}
        self.attended, self.taught = 0, bool(self.composite.rules)
        self._constant: Tensor | None = None  # added by the rule that is running
        self._held: dict[str, list[int]] = {}  # what was held constant -> numbers of its calls
        self._of_mechanism = self._paused = False

    def __enter__(self) -> Engine:
        super().__enter__()
        return self

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        written = getattr(function, "__name__", "")
        name = written.strip("_")
        ruled = not self._paused and (name in self.rules or not self.composite.plain)
        moving = ruled and [x for x in nested_tensors((args, kwargs)) if depends_on_input(x)]
        if not moving:
            return function(*args, **kwargs)
        if name in FACTS:
            fact = function(*args, **kwargs)
            if not isinstance(fact, Tensor):
                return fact
        if "dropout" in name and not kwargs.get("training", True):
            return args[0]
        if name in ATTENTION and not self._of_mechanism:
            self.attended += 1
        given = args[0] if args else None
        if name != "batch_norm" or not isinstance(getattr(given, "relevance_mark", None), _Mark):
            if any("relevance_mark" in vars(x) for x in moving):
                args, kwargs = self.finished(args), self.finished(kwargs)
        in_place = written != f"__{name}__" and written.endswith("_") and name != "requires_grad"
        in_place |= bool(kwargs.get("inplace"))
        target = args[0] if args else None
        rule = self.rules.get(name)
        writes = (
            in_place
            and (rule is own_gradient or rule is relu)
            and not self.keep
            and not KeptTensor.has(target)
        )
        known = depends_on_input(target) and (target.is_leaf or "relevance_alone" in vars(target))
        if writes or name in WRITING:
            KeptTensor.before_writing(target)
        elif in_place:
            kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
            function = _out_of_place(function, name)
        result = self._ruled(name, function, args, kwargs)
        _tell_alone(result, (args, kwargs))
        if not in_place or not isinstance(result, Tensor):
            return result
        # Later readers of this tensor get the new values, with the rule's history.
        if result is target:
            vars(given).pop("relevance_bounds", None)
        elif known or (name in WRITING and not target._is_view()):
            vars(given)["relevance_mark"] = vars(target)["relevance_mark"] = result
        else:  # other tensors share this memory
            result = self.finished(result)
            KeptTensor.before_writing(target)
            vars(target).clear()
            return target.copy_(result)
        return result

    def _ruled(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        rule = self.rules.get(name)
        self.taught |= name in TAUGHT
        if self._of_mechanism and (
            name in FEATURES or (rule is None and name.endswith("_forward"))
        ):
            rule = own_gradient  # for functions that create features, and for kernel ops that do
        if rule is None:
            result = function(*args, **kwargs)
            if any(map(depends_on_input, nested_tensors(result))):
                self.refuse(name)
            return result
        step = None
        if self.weigh and name not in WRITTEN_OUT:
            step = Step(name, _caller())
            args, kwargs = (self._entering(step, x) for x in (args, kwargs))
        outer, self._constant = self._constant, None
        result = rule(self, function, *args, **kwargs)
        constant, self._constant = self._constant, outer
        if self.composite.first is not None and name in LAYOUT:
            _carry_bounds(function, args, kwargs, result)
        if self.keep and name not in WRITTEN_OUT and not hasattr(result, "relevance_mark"):
            if constant is None:
                constant = _added(name, function, args, kwargs)
            self._leaving(step, result, constant)
        elif step is not None and hasattr(result, "relevance_mark"):
            mark = result.relevance_mark
            result.relevance_mark = mark if mark.step else mark._replace(step=step)
        return result

    def refuse(self, what: str) -> None:
        if self._of_mechanism:
            raise NoRule(what)
        self.refused[f"{what} in {_caller()}"] = None

    def check(self, method: str, model: str, score: Tensor | None = None) -> None:
        """Raise a ``ValueError`` that names functions without a rule, and parts of ``score`` that no
        function mode can see into."""
        if score is not None and not depends_on_input(score):
            raise ValueError(
                f"backbone: the output of {model} does not depend on the input that {method} explains"
            )
        unseen = {} if score is None else _unseen(score)
        if self.refused or unseen:
            raise ValueError(
                f"backbone: {method} has no rule for {', '.join(sorted({*self.refused, *unseen}))}, "
                f"called by {model}; give it a rule with register_rule(name, rule), or use 'gradcam'"
            )

    def balance(self, score: float, reached: float) -> Balance:
        """Return the distribution of a score after its backward pass; requires ``weigh``."""
        worst: dict[str, float] = {}
        for step in self.steps:
            key = f"{step.function} in {step.module}"
            worst[key] = worst.get(key, 0.0) + abs(step.absorbed)
        constants = sum(step.sums["kept"] for step in self.steps)
        seen = sum(step.absorbed for step in self.steps)
        worst["a part whose calls no function mode sees"] = abs(score - reached - constants - seen)
        fault = max(worst, key=worst.__getitem__, default="")
        return Balance(score, reached, constants, fault)

    # ------------------------------------------------------------------ counting

    def _entering(self, step: Step, value: Any) -> Any:
        """``value`` with its live tensors replaced by aliases; the relevance of an alias is what this call
        passed to it."""

        def alias_of(x: Any) -> Any:
            if not depends_on_input(x):
                return x
            alias = x.view_as(x)
            vars(alias).update(vars(x))
            step.weigh("in", alias)
            return alias

        return map_nested(value, alias_of)

    def _leaving(self, step: Step | None, result: Any, constant: Tensor | None) -> None:
        outputs = [x for x in nested_tensors(result) if depends_on_input(x)]
        if step is not None and outputs:
            self.steps.append(step)
            for x in outputs:
                step.weigh("out", x)
        if constant is not None and outputs:
            self.added.append((get_gradient_edge(outputs[0]), constant.detach()))
            if step is not None:
                step.weigh("kept", outputs[0], constant)

    def add_constant(self, result: Tensor, constant: Tensor) -> Tensor:
        """Record that a rule added ``constant`` to ``result``, and return ``result``."""
        self._constant = constant
        return result

    # ------------------------------------------------------------------ linear layers

    def linear(self, z: Tensor, layer: Layer, x: Tensor, convolution: bool = False) -> Tensor:
        """z = layer(x), marked with the rule that it follows."""
        composite = self.composite
        rule = composite.convolution if convolution else composite.dense
        if composite.first is not None and hasattr(x, "relevance_bounds"):
            rule = composite.first
        if rule is not None:
            z.relevance_mark = _Mark(layer, x, rule, None)  # type: ignore[attr-defined]
        return z

    def apply_batch_norm(self, z: Tensor, x: Tensor, scale: Tensor, constant: Tensor) -> Tensor:
        """BatchNorm, z = x scale + constant per channel; it forms one layer with the layer that produced
        x."""
        mark = vars(x).get("relevance_mark")
        if mark is not None:
            layer, wide = mark.layer, _trailing_ones(mark.layer)
            scale = scale.to(layer.weight.dtype)
            bias = constant if layer.bias is None else layer.bias * scale.view(-1, *wide) + constant
            weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
            z.relevance_mark = mark._replace(layer=layer._replace(weight=weight, bias=bias))  # type: ignore[attr-defined]
            return z
        if self.composite.dense is None:
            return self.add_constant(z, constant)
        alone = Layer(lambda x, w: x * w, scale.view(-1, *[1] * (z.ndim - 2)), constant)
        rule = epsilon_rule(self.composite.dense.epsilon)
        z.relevance_mark = _Mark(alone, x, rule, None)  # type: ignore[attr-defined]
        return z

    def finished(self, value: Any) -> Any:
        """``value`` after the rule has been applied to those linear layers that no BatchNorm follows."""

        def applied(x: Any) -> Any:
            while (mark := getattr(x, "relevance_mark", None)) is not None:
                if isinstance(mark, _Mark):  # several readers share the finished tensor
                    alone = "relevance_alone" in vars(x)
                    x.relevance_mark = mark = self._shared(x, mark)
                    if alone:
                        mark.relevance_alone = True  # type: ignore[attr-defined]
                x = mark
            return x

        return map_nested(value, applied)

    def _shared(self, z: Tensor, mark: _Mark) -> Tensor:
        layer, x, rule, step = mark
        if rule.terms is None and not self.keep:
            return SharedRelevance.apply(z, None, rule.epsilon)  # type: ignore[no-any-return]
        plain = z.detach()
        terms = [(1.0, z)] if rule.terms is None else list(rule.terms(layer, x, z, plain))
        parts = [SharedRelevance.apply(p, plain, rule.epsilon) for _, p in terms]
        y = parts[0]
        if len(terms) > 1:
            y = sum(factor * part for (factor, _), part in zip(terms, parts, strict=True))
        if self.keep:
            with torch.no_grad():
                zero = torch.zeros_like(x)
                vars(zero).update(vars(x))
                start = torch.zeros_like(z) if layer.bias is None else layer.bias.expand_as(z)
                fixed = [(1.0, start)]
                if rule.terms is not None:
                    fixed = list(rule.terms(layer, zero, start, plain))
                kept = torch.zeros_like(z)
                for (part, p), (_, still) in zip(terms, fixed, strict=True):
                    kept += part * quotient_of(plain, p, rule.epsilon, still)
            self._leaving(step, y, kept)
        return y

    def whole(self, output: Tensor) -> Tensor:
        """A module's output, after the rule of the layer that produced it has been applied."""
        with self._while("_paused"):
            return self.finished(output)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ layers of xattn.attention

    @property
    def notes(self) -> list[str]:
        return [f"{layers_text(calls)}: {what}" for what, calls in self._held.items()]

    def attend(self, mechanism: Mechanism, inputs: Inputs) -> Tensor:
        """The mechanism's output, computed with the rules for its operator."""
        constant, held = self.composite.attention == "constant", Held()
        with self._while("_of_mechanism"):
            try:
                operator = mechanism.operator(_constant_inputs(inputs) if constant else inputs)
            except NoRule as error:
                held[error.what] = None
                operator = mechanism.operator(_constant_inputs(inputs))
            local = mechanism.local(inputs)
        output = self._times(mechanism.entry.name, operator, inputs.v, held)
        return output if local is None else output + local

    def mix(self, name: str, operator: Operator, value: Tensor) -> Tensor:
        """The product ``A V`` in a block, computed with the rules for the block's operator."""
        return self._times(name, operator, value, Held())

    def _times(self, name: str, operator: Operator, value: Tensor, held: Held) -> Tensor:
        self.attended += 1
        step = Step(f"attention {name}", _caller()) if self.weigh else None
        with self._while("_paused"):
            if self.composite.plain:
                return operator.matvec(value)
            constant = self.composite.attention == "constant"
            if step is not None:
                operator = operator.apply(lambda x: self._entering(step, x))
                value = self._entering(step, value)
            if constant:
                output = operator.detach().matvec(value)
            else:
                output = multiply(operator, value, held)
            if step is not None:
                self._leaving(step, output, None)
        if not constant and (held or not receives_relevance(operator)):
            some = " in part" if receives_relevance(operator) else ""
            why = f"no rule for {', '.join(held)}" if held else "it is made of constants"
            what = f"A of {name} is held constant{some} ({why})"
            self._held.setdefault(what, []).append(self.attended - 1)
        return output

    @contextmanager
    def _while(self, name: str) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, True)
        try:
            yield
        finally:
            setattr(self, name, before)


@contextmanager
def apply_rules(module: nn.Module, composite: Composite | str) -> Iterator[Engine]:
    """Context manager in which ``module`` runs with the rules of a composite; its weights need no gradient.

    Args:
        module: any module in eval mode. Any tensor that requires a gradient can be explained: an input of
            the module, such as ``inputs_embeds`` of a language model, or a tensor that a hook inserts.
        composite: as in :class:`Engine`.

    Raises:
        ValueError: a function on activations has no rule; raised at the end of the context.

    >>> net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.GELU(), nn.Linear(5, 2, bias=False))
    >>> x = torch.rand(1, 3, requires_grad=True)
    >>> with apply_rules(net, "cp_lrp"):
    ...     score = net(x)[0, 1]
    >>> (x * torch.autograd.grad(score, x)[0]).sum().allclose(score)
    True
    """
    engine = Engine(composite)
    refuse_scripted(module, "following")
    weights = [p for p in module.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        with replace_products(engine), engine:
            yield engine
        engine.check("following", type(module).__name__)
    finally:
        for weight in weights:
            weight.requires_grad_()


def refuse_scripted(module: nn.Module, method: str) -> None:
    """Raise a ``ValueError`` if a part of ``module`` makes calls that neither a function mode nor the graph
    can see."""
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"backbone: {method} cannot see into scripted {part.original_name}; give the module as it "
                f"was before torch.jit.script, or use 'gradcam'"
            )


def _trailing_ones(layer: Layer) -> list[int]:
    return [1] * max(0, layer.weight.ndim - 2)


def _constant_inputs(inputs: Inputs) -> Inputs:
    x = None if inputs.x is None else inputs.x.detach()
    return inputs.replace(q=inputs.q.detach(), k=inputs.k.detach(), v=inputs.v.detach(), x=x)


def _out_of_place(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The out-of-place version of a function; the function itself if there is none, as for ``copy_``."""
    if not function.__name__.endswith("_"):
        return function  # inplace=True has been removed
    for home in (Tensor, torch, F):
        if hasattr(home, name):
            return getattr(home, name)  # type: ignore[no-any-return]
    return function


def _added(name: str, function: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The constant that a call added: a layer's bias, or the output for activations that are all 0."""
    bias = added_bias(function, args, kwargs)
    if bias is not None or name not in AFFINE:
        return bias

    def still(x: Any) -> Any:
        return torch.zeros_like(x) if depends_on_input(x) else x

    with torch.no_grad():
        found = function(*map_nested(args, still), **map_nested(kwargs, still))
    return found if isinstance(found, Tensor) else None


def _tell_alone(result: Any, given: Any) -> None:
    """Mark a function's new outputs, and note which tensors share memory with another."""
    found, before = (
        nested_tensors(result),
        [x for x in nested_tensors(given) if depends_on_input(x)],
    )
    memory = {x.untyped_storage().data_ptr() for x in found}
    sharing = [x for x in before if x.untyped_storage().data_ptr() in memory]
    sharing = [x for x in sharing if all(x is not y for y in found)]
    several = bool(sharing) or len(memory) < len(found)
    for x in (*sharing, *found):
        if several:
            vars(x).pop("relevance_alone", None)
        elif depends_on_input(x) and all(x is not y for y in before):
            x.relevance_alone = True  # type: ignore[attr-defined]


def _carry_bounds(function: Any, args: Any, kwargs: Any, result: Any) -> None:
    """If a function only moves the positions of an image, apply it to the image's smallest and largest
    values, too."""
    bounds = getattr(args[0], "relevance_bounds", None)
    if bounds is None:
        return
    found = [nested_tensors(function(bound, *args[1:], **kwargs)) for bound in bounds]
    for x, *pair in zip(nested_tensors(result), *found, strict=True):
        x.relevance_bounds = pair  # type: ignore[attr-defined]


def _caller() -> str:
    """The type of the innermost module that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return type(module).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return "a function"


def _unseen(score: Tensor) -> dict[str, None]:
    """Nodes of the graph whose calls no mode sees: autograd functions and compiled parts."""
    found: dict[str, None] = {}
    seen, todo = set(), [score.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
        foreign = isinstance(node, BackwardCFunction) and not _known(type(node))
        if foreign or "CompiledFunction" in node.name():
            found[node.name().removesuffix("Backward")] = None
    return found


def _known(kind: type) -> bool:
    made = getattr(kind, "_forward_cls", kind)
    return made.__module__.startswith("xattn.") or kind.__name__.startswith("GeneratedBackwardFor")
