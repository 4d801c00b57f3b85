"""Convert an ONNX graph to a network: its nodes become PyTorch modules, called in the graph's order.

    network = OnnxNetwork(onnx.load("model.onnx"))
    logits = network(x)

Linear layers and activations become ``torch.nn`` modules; every other node becomes an :class:`Operator`.
Values that depend only on constants are computed once. A graph that was exported for a single image also
accepts several: reshapes enlarge the first axis, and constants that are concatenated with an image are
repeated. Operators: https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Attributes = dict[str, Any]
MOST = (
    2**27
)  # limits on how many numbers a batch may have, and results of constants beyond eight times the weights
_MOST_SIDES = 2**16  # limit on how many numbers a shape or a list of axes may have


class UnknownOperator(ValueError):
    """Raised for an operator that is not supported here, or not in this form."""


class TooLarge(ValueError):
    """Raised if operations on constants return more numbers than :data:`MOST`."""


class _Counted(TorchDispatchMode):
    """A mode that counts the numbers in each result before it is computed, and stops at ``most``."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, kwargs = None, kwargs or {}
        with suppress(RuntimeError, NotImplementedError):  # raised by functions that read a number
            given, named = tree_map_only(Tensor, lambda one: one.to("meta"), (args, kwargs))
            if any(one.name == "device" for one in func._schema.arguments):
                named["device"] = torch.device("meta")
            found = func(*given, **named)
        self.left -= sum(one.numel() for one in tree_leaves(found) if isinstance(one, Tensor))
        if self.left < 0:
            raise TooLarge("its constants expand to too many numbers")
        return func(*args, **kwargs)


class Operator(nn.Module):
    """An operator without weights.

    Args:
        kind: the operator's name, such as ``"Concat"``.
        attributes: the attributes of the node, and ``opset``. If the graph accepts only one image,
            ``single`` is the shape of the node's result for one image.
    """

    def __init__(self, kind: str, attributes: Attributes) -> None:
        super().__init__()
        if kind not in OPERATORS:
            raise UnknownOperator(kind)
        self.kind, self.attributes = kind, attributes
        self.is_layer = kind not in _NO_LAYERS

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, *inputs: Tensor | None) -> Any:
        place = next((x.device for x in inputs if x is not None and x.device.type != "cpu"), None)
        if place is not None and self.kind not in _READS_SHAPES:
            inputs = tuple(None if x is None else x.to(place) for x in inputs)
        return OPERATORS[self.kind](self.attributes, *inputs)


class OnnxNetwork(nn.Module):
    """The function of a graph with one input and one output, (B, C, H, W) -> (B, K).

    Args:
        model: an ``onnx.ModelProto``.
        single: whether the graph was exported for a batch of one.
        last: whether its images have channels last, (B, H, W, C).

    Raises:
        UnknownOperator: if the graph has unsupported operators; the message lists their names.
        TooLarge: if values computed from constants would fill the memory.
    """

    def __init__(self, model: Any, single: bool = False, last: bool = False) -> None:
        super().__init__()
        from onnx import numpy_helper, shape_inference

        def tensor(proto: Any) -> Tensor:
            return torch.from_numpy(numpy_helper.to_array(proto).copy())

        self.channels_last, graph = last, model.graph
        opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        inferred = shape_inference.infer_shapes(model).graph if single else None
        every = [] if inferred is None else [*inferred.value_info, *inferred.output]
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in every}
        self.whole: dict[str, Tensor] = {}  # constants that are not floats, on the CPU
        self.steps: list[tuple[str, list[str], list[str]]] = []
        constants = {one.name: tensor(one) for one in graph.initializer}
        counted = _Counted(MOST + 8 * sum(one.numel() for one in constants.values()))
        self.layers = nn.ModuleDict()  # whose names cannot clash with attributes of the network
        unknown = set()
        for number, node in enumerate(graph.node):
            attributes = {one.name: _value(one, tensor) for one in node.attribute}
            fixed = all(name in constants for name in node.input if name)
            attributes |= {"opset": opset, "single": None if fixed else shapes.get(node.output[0])}
            if node.op_type == "Constant":
                constants[node.output[0]] = _constant(attributes)
                continue
            try:
                layer, inputs = _layer(node, attributes, constants)
            except UnknownOperator as error:
                unknown.add(str(error))
                continue
            if self._adds_bias(node, constants):
                continue
            if fixed:
                with torch.no_grad(), counted:
                    found = _several(layer(*(constants.get(name) for name in inputs)))
                constants |= dict(zip(node.output, found, strict=False))
                continue
            name = re.sub(r"\W+", "_", node.name).strip("_") or f"{node.op_type}_{number}"
            name = f"{name}_{number}" if hasattr(self.layers, name) else name
            self.layers[name] = layer
            self.steps.append((name, inputs, list(node.output)))
        if unknown:
            raise UnknownOperator(", ".join(sorted(unknown)))
        self.output = graph.output[0].name
        self.input = next(one.name for one in graph.input if one.name not in constants)
        used = {name for _, inputs, _ in self.steps for name in inputs if name}
        self.floats: dict[str, str] = {}
        for name in sorted(used & set(constants)):
            if constants[name].is_floating_point():
                self.floats[name] = f"constant_{len(self.floats)}"
                self.register_buffer(self.floats[name], constants[name])
            else:
                self.whole[name] = constants[name]
        ends = {name: i for i, (_, inputs, _) in enumerate(self.steps) for name in inputs if name}
        self.done = [[n for n, at in ends.items() if at == i] for i in range(len(self.steps))]

    def _adds_bias(self, node: Any, constants: dict[str, Tensor]) -> bool:
        """Return whether ``node`` adds a bias to the linear layer before it; if so, merge it into the
        layer."""
        name, _, outputs = self.steps[-1] if self.steps else ("", [], [""])
        layer = self.layers[name] if name else None
        others = [constants.get(one) for one in node.input if one != outputs[0]]
        if node.op_type != "Add" or type(layer) is not nn.Linear or layer.bias is not None:
            return False
        if len(others) != 1 or others[0] is None or others[0].shape != (layer.out_features,):
            return False
        layer.bias = nn.Parameter(others[0], requires_grad=False)
        self.steps[-1] = (*self.steps[-1][:2], list(node.output))
        return True

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, 3) if self.channels_last else x
        values: dict[str, Any] = {**self.whole, self.input: x}
        values |= {name: self.get_buffer(own) for name, own in self.floats.items()}
        for (layer, inputs, outputs), done in zip(self.steps, self.done, strict=True):
            found = self.layers[layer](*(values[name] if name else None for name in inputs))
            values |= dict(zip(outputs, _several(found), strict=False))
            for name in done:
                if name != self.output:
                    del values[name]
        return values[self.output].flatten(1)  # type: ignore[no-any-return]


def _several(found: Any) -> Sequence[Any]:
    return found if isinstance(found, tuple | list) else (found,)


def _value(attribute: Any, tensor: Callable[[Any], Tensor]) -> Any:
    """Convert the value of an attribute."""
    from onnx import TensorProto, helper

    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return tensor(value)
    return value.decode() if isinstance(value, bytes) else value


def _constant(attributes: Attributes) -> Tensor:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in attributes:
            return torch.as_tensor(attributes[name], device="cpu")
    raise UnknownOperator("Constant of strings")


# ---------------------------------------------------------------------- layers


def _layer(
    node: Any, attributes: Attributes, constants: dict[str, Tensor]
) -> tuple[nn.Module, list[str]]:
    """Return the module of a node, and the inputs with which it is called: all except its weights."""
    inputs = list(node.input)
    kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    rest = [constants.get(name) for name in inputs[1:]]
    known = all(one is not None or not name for one, name in zip(rest, inputs[1:], strict=True))
    if kind in LAYERS and known and inputs[0] not in constants:
        made = LAYERS[kind](attributes, *rest)
        if made is not None:
            return made, inputs[:1]
    return Operator(kind, attributes), inputs


def _linear(a: Attributes, weight: Tensor, bias: Tensor | None = None) -> nn.Module | None:
    """Build the linear layer of Gemm and MatMul."""
    if a.get("transA") or weight.ndim != 2 or a.get("alpha", 1) != 1 or a.get("beta", 1) != 1:
        return None
    weight = weight if a.get("transB") else weight.T.contiguous()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        bias = bias.flatten().expand(len(weight)).contiguous()
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


# Each function builds a module from a node's attributes and its constant inputs (all but the
# first), or returns None if it cannot.
LAYERS: dict[str, Callable[..., nn.Module | None]] = {
    "Gemm": _linear,
    "MatMul": _linear,
    "Relu": lambda a: nn.ReLU(),
    "LeakyRelu": lambda a: nn.LeakyReLU(a.get("alpha", 0.01)),
    "Elu": lambda a: nn.ELU(a.get("alpha", 1.0)),
    "Sigmoid": lambda a: nn.Sigmoid(),
    "Tanh": lambda a: nn.Tanh(),
    "HardSwish": lambda a: nn.Hardswish(),
    "Softplus": lambda a: nn.Softplus(),
    "Gelu": lambda a: nn.GELU(a.get("approximate", "none")),
    "GlobalAveragePool": lambda a: nn.AdaptiveAvgPool2d(1),
    "GlobalMaxPool": lambda a: nn.AdaptiveMaxPool2d(1),
    "Dropout": lambda a, *rest: nn.Identity(),
}
# Operators whose results are not feature maps: they move numbers, or belong to attention.
_NO_LAYERS = set(
    "MatMul Einsum Softmax Reshape Transpose Flatten Squeeze Unsqueeze Expand Tile Gather Slice Split Pad "
    "Cast Identity Shape".split()
)


# Operators whose inputs, except the first, are read on the CPU.
_READS_SHAPES = set(
    "Reshape Expand Tile Slice Split Squeeze Unsqueeze Pad Resize ReduceMean ReduceSum ReduceMax ReduceMin "
    "ReduceL2".split()
)


# ---------------------------------------------------------------------- operators


def _padded(
    a: Attributes, x: Tensor, kernel: Sequence[int], fill: float = 0.0
) -> tuple[Tensor, dict[str, Any]]:
    """Return the stride and padding for the function, and ``x``; if the two ends of an axis need different
    padding, ``x`` is already padded."""
    rank, auto = len(kernel), a.get("auto_pad", "NOTSET")
    stride = a.get("strides") or [1] * rank
    pads = list(a.get("pads") or [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
    if auto.startswith("SAME"):  # the number of cells is ceil(side / stride)
        dilation = a.get("dilations") or [1] * rank
        for i, side in enumerate(x.shape[2:]):
            wide = (kernel[i] - 1) * dilation[i] + 1
            total = max((math.ceil(side / stride[i]) - 1) * stride[i] + wide - side, 0)
            less, more = total // 2, total - total // 2
            pads[i], pads[rank + i] = (more, less) if auto == "SAME_LOWER" else (less, more)
    if pads[:rank] != pads[rank:]:
        x = F.pad(
            x, [p for i in reversed(range(rank)) for p in (pads[i], pads[rank + i])], value=fill
        )
        pads = [0] * rank
    return x, {"stride": stride, "padding": pads[:rank]}


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, places = _padded(a, x, weight.shape[2:])
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    dilation = a.get("dilations") or 1
    return function(x, weight, bias, dilation=dilation, groups=a.get("group", 1), **places)  # type: ignore[no-any-return]


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    x, places = _padded(a, x, a["kernel_shape"], -math.inf)
    dilation, ceil = a.get("dilations") or 1, bool(a.get("ceil_mode"))
    return F.max_pool2d(x, a["kernel_shape"], dilation=dilation, ceil_mode=ceil, **places)


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    x, places = _padded(a, x, a["kernel_shape"])
    ceil, whole = bool(a.get("ceil_mode")), bool(a.get("count_include_pad"))
    return F.avg_pool2d(x, a["kernel_shape"], ceil_mode=ceil, count_include_pad=whole, **places)


def _gemm(a: Attributes, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
    x, y = x.T if a.get("transA") else x, y.T if a.get("transB") else y
    product = a.get("alpha", 1.0) * (x @ y)
    return product if z is None else product + a.get("beta", 1.0) * z


def _batch_norm(
    a: Attributes, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, var, w, b, eps=a.get("epsilon", 1e-5))


def _layer_norm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    shape = x.shape[a.get("axis", -1) :]
    bias = None if b is None else b.expand(shape)
    return F.layer_norm(x, shape, w.expand(shape), bias, a.get("epsilon", 1e-5))


def _clip(a: Attributes, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low, high = a.get("min", low), a.get("max", high)
    if low is None and high is None:
        return x
    return x.clamp(None if low is None else float(low), None if high is None else float(high))


def _shape_of(given: Tensor) -> list[int]:
    if given.numel() > _MOST_SIDES:
        raise TooLarge("it has a shape with too many dimensions")
    return [int(v) for v in given.flatten().tolist()]


def _axes(a: Attributes, given: Tensor | None) -> list[int] | None:
    """Return the axes, which are an attribute or, in later opsets, an input."""
    return _shape_of(given) if given is not None else a.get("axes")


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    wanted = _shape_of(shape)
    if not a.get("allowzero"):
        wanted = [x.shape[i] if side == 0 else side for i, side in enumerate(wanted)]
    if (
        a["single"] and 0 not in a["single"][1:]
    ):  # the shape for one image, whose first axis grows with the batch
        wanted = [-1, *a["single"][1:]]
    return torch.reshape(x, wanted)


def _concat(a: Attributes, *parts: Tensor) -> Tensor:
    if a["single"] and a["axis"] != 0:  # a constant may belong to one image
        most = max(len(part) for part in parts)
        parts = tuple(p.expand(most, *p.shape[1:]) if len(p) == 1 else p for p in parts)
    return torch.cat(parts, a["axis"])


def _slice(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    starts, ends = (_shape_of(v) for v in given[:2]) if given else (a["starts"], a["ends"])  # type: ignore[arg-type]
    axes = _axes(a, given[2] if len(given) > 2 else None) or list(range(len(starts)))
    steps = _shape_of(given[3]) if len(given) > 3 and given[3] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(x.shape[axis])[start:end:step]
        if step > 0:
            index = [slice(None)] * (axis % x.ndim) + [slice(places.start, places.stop, step)]
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.arange(places.start, places.stop, step, device=x.device))
    return x


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index).to(x.device)
    found = x.index_select(axis, index.flatten().long())
    return torch.reshape(found, (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = a.get("axis", 0)
    given = a.get("split") if sizes is None else _shape_of(sizes)
    if given is not None:
        return x.split(list(given), axis)
    if "num_outputs" not in a:
        raise UnknownOperator("Split without sizes")
    return x.split(math.ceil(x.shape[axis] / a["num_outputs"]), axis)


def _squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = _axes(a, axes)
    return x.squeeze() if given is None else x.squeeze(tuple(given))


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = _axes(a, axes) or []
    rank = x.ndim + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = _axes(a, axes)
        if given is None and a.get("noop_with_empty_axes"):
            return x
        dims = list(range(x.ndim)) if given is None else list(given)
        return function(x, dim=dims, keepdim=bool(a.get("keepdims", 1)))

    return reduce


def _expand(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    wanted = torch.broadcast_shapes(x.shape, tuple(_shape_of(shape)))
    return x.expand(wanted)


def _cast(a: Attributes, x: Tensor) -> Tensor:
    types = {1: None, 10: None, 11: None, 7: torch.int64, 6: torch.int32, 9: torch.bool}
    if a["to"] not in types:
        raise UnknownOperator(f"Cast to type {a['to']}")
    kind = types[a["to"]]
    if kind is not None:
        return x.to(kind)
    return x if x.is_floating_point() else x.to(torch.float32)  # the network's own precision


def _pad(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    pads = _shape_of(given[0]) if given and given[0] is not None else a["pads"]
    fill = float(given[1]) if len(given) > 1 and given[1] is not None else a.get("value", 0.0)
    if len(given) > 2:
        raise UnknownOperator("Pad of some axes")
    flat = [p for i in reversed(range(x.ndim)) for p in (pads[i], pads[x.ndim + i])]
    while len(flat) > 2 and not any(flat[-2:]):
        flat = flat[:-2]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[
        a.get("mode", "constant")
    ]
    return F.pad(x, flat, mode, fill if mode == "constant" else None)


def _resize(a: Attributes, x: Tensor, *given: Tensor | None) -> Tensor:
    mode = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}[
        a.get("mode", "nearest")
    ]
    sizes = given[2] if len(given) > 2 else None
    scales = given[1] if len(given) > 1 else given[0]
    if sizes is not None:
        size = _shape_of(sizes)[2:]
    else:
        assert scales is not None
        size = [math.floor(s * f) for s, f in zip(x.shape[2:], scales.tolist()[2:], strict=True)]
    corners = a.get("coordinate_transformation_mode") == "align_corners"
    return F.interpolate(x, size, mode=mode, align_corners=None if mode == "nearest" else corners)


def _divide(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _old_softmax(a: Attributes, x: Tensor) -> Tensor:
    if a["opset"] >= 13:
        return x.softmax(a.get("axis", -1))
    axis = a.get("axis", 1) % x.ndim  # before opset 13: over all axes from this one on
    return x.flatten(axis).softmax(-1).reshape(x.shape)


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    return (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1)


def _filled_shape(a: Attributes, shape: Tensor) -> Tensor:
    value = a.get("value", torch.zeros(1, device="cpu"))
    return value.expand(_shape_of(shape)) if shape.numel() else value[0]


def _each(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, *inputs: function(*inputs)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def fold(a: Attributes, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return fold


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _each(torch.add),
    "Sub": _each(torch.sub),
    "Mul": _each(torch.mul),
    "Div": _divide,
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": lambda a, x, w, b: F.instance_norm(
        x, weight=w, bias=b, eps=a.get("epsilon", 1e-5)
    ),
    "GroupNormalization": lambda a, x, w, b: F.group_norm(
        x, a["num_groups"], w, b, a.get("epsilon", 1e-5)
    ),
    "Clip": _clip,
    "PRelu": _each(lambda x, slope: torch.where(x > 0, x, slope * x)),
    "Mod": _each(torch.remainder),
    "Pow": _each(lambda x, y: torch.pow(x, y.to(x.dtype))),
    "MatMul": _each(torch.matmul),
    "Sqrt": _each(torch.sqrt),
    "Exp": _each(torch.exp),
    "Log": _each(torch.log),
    "Erf": _each(torch.erf),
    "Neg": _each(torch.neg),
    "Abs": _each(torch.abs),
    "Floor": _each(torch.floor),
    "Reciprocal": _each(torch.reciprocal),
    "Sum": _folded(torch.add),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Equal": _each(torch.eq),
    "Greater": _each(torch.gt),
    "Less": _each(torch.lt),
    "Not": _each(torch.logical_not),
    "And": _each(torch.logical_and),
    "Or": _each(torch.logical_or),
    "Where": _each(torch.where),
    "Relu": _each(torch.relu),
    "Sigmoid": _each(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "Softmax": _old_softmax,
    "Identity": _each(lambda x: x),
    "Cast": _cast,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")], device="cpu"),
    "ConstantOfShape": _filled_shape,
    "Range": _each(lambda low, high, step: torch.arange(low.item(), high.item(), step.item())),
    "Expand": _expand,
    "Tile": _each(lambda x, repeats: x.repeat(*_shape_of(repeats))),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda a, x: x.permute(a.get("perm") or list(range(x.ndim))[::-1]),
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Pad": _pad,
    "Resize": _resize,
    "Einsum": lambda a, *inputs: torch.einsum(a["equation"], *inputs),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin),
    "ReduceL2": _reduced(lambda x, dim, keepdim: torch.linalg.vector_norm(x, 2, dim, keepdim)),
}
