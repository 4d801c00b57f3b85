"""Run a classifier in an ONNX file with onnxruntime or, if its graph can be converted, with PyTorch.

    backbone = load_backbone("model.onnx", mean=0.5, std=0.5)

A graph with one image input and one output of logits is run as a black box. This is enough for methods and
metrics that hide parts of the image. If all operators can be converted
(:mod:`xattn.backbone.families.onnx_networks`) and the logits of two random images agree with those of
onnxruntime to 1e-4, the PyTorch network is used instead, so that gradients and CAMs also work. A softmax or
sigmoid at the end is removed, because p is computed from logits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone.families.hooked import from_hooks
from xattn.backbone.families.onnx_networks import MOST, OnnxNetwork, TooLarge, UnknownOperator
from xattn.photos.preprocessing import Preprocessing

SUFFIX = ".onnx"
TOLERANCE = 1e-4
CHANNELS = (1, 3, 4)  # channel counts that identify a layout
GRID = 14  # side of the pixel grid that a black box returns as its map
_ENDS = ("Softmax", "Sigmoid")
_MOVES = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")  # may follow these
_TYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64}


@dataclass(frozen=True)
class InputSpec:
    """The input of a file: its name and dtype, its batch size and its size (H, W), each None if not fixed,
    its number of channels, and whether the channels come last."""

    name: str
    dtype: torch.dtype
    batch: int | None
    channels: int
    size: tuple[int, int] | None
    last: bool


class _NoLogits(ValueError):
    """The shape of the output is not (B, K)."""


class OnnxSession:
    """A graph in onnxruntime: ``session(x) -> logits``; it can be copied and pickled."""

    def __init__(self, content: bytes, form: InputSpec) -> None:
        self.content, self.form = content, form
        self._open()

    def _open(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised anyway
        options.intra_op_num_threads = torch.get_num_threads()
        self._run = onnxruntime.InferenceSession(
            self.content, options, providers=["CPUExecutionProvider"]
        ).run

    def __getstate__(self) -> dict[str, Any]:
        return {"content": self.content, "form": self.form}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __call__(self, x: Tensor) -> Tensor:
        """Compute logits (B, K) from images (B, C, H, W), in x's dtype and on its device.

        They are computed in batches of the size that the file requires."""
        given = x.detach().to("cpu", self.form.dtype)
        given = given.movedim(1, 3) if self.form.last else given
        found = []
        for part in given.split(self.form.batch or len(given)):
            short = (self.form.batch or len(part)) - len(part)
            whole = torch.cat([part, part[:1].expand(short, *part.shape[1:])]) if short else part
            answer = self._run(None, {self.form.name: whole.contiguous().numpy()})[0]
            sides = answer.shape[1:]
            if answer.ndim < 2 or len(answer) != len(whole) or math.prod(sides) != max(sides):
                raise _NoLogits(f"{answer.shape} for {len(whole)} images")
            found.append(torch.from_numpy(answer).flatten(1)[: len(part)])
        return torch.cat(found).to(x)


class _WithoutGradients(torch.autograd.Function):
    """A session's output; its backward pass raises an error that explains why there is no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, session: OnnxSession, reason: str) -> Tensor:
        ctx.reason = reason
        return session(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ValueError(ctx.reason)


class OnnxClassifier(nn.Module):
    """A :class:`~xattn.backbone.TapModule` without feature maps; its tap is the pixels, on a small grid.

    Args:
        net: the converted network; if it is None, ``reason`` explains why there are no gradients.
    """

    gradcam_layers = ()  # CAM methods have nothing to read

    def __init__(
        self, session: OnnxSession, net: nn.Module | None, preprocessing: Preprocessing, reason: str
    ) -> None:
        super().__init__()
        self.session, self.net, self.reason = session, net, reason
        self.tap_names = ["pixels"]
        self.preprocessing = preprocessing
        self.input_channels = session.form.channels
        digest = hashlib.sha256(session.content).digest()
        # A backbone reads device and dtype from tensors.
        self.register_buffer("sha256", torch.tensor(list(digest), dtype=torch.uint8, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        if self.net is not None:
            return self.net(x)  # type: ignore[no-any-return]
        if x.requires_grad and torch.is_grad_enabled():
            return _WithoutGradients.apply(x, self.session, self.reason)  # type: ignore[no-any-return]
        return self.session(x)

    def forward_taps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.forward(x), [F.adaptive_avg_pool2d(x, GRID)]


def load_onnx(
    path: str | Path,
    taps: tuple[str, ...] | None = None,
    input_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Load the classifier in a file, for ``load_backbone``.

    Args:
        path: a graph with one image input (N, C, H, W) or (N, H, W, C) and one output (N, K).
        taps: for a converted graph, names of nodes that return maps.
        input_size: (H, W) in pixels; by default the size fixed in the file.

    Raises:
        ValueError: if onnx or onnxruntime is missing, or the file is damaged or holds something else.
        FileNotFoundError: if there is no such file.
    """
    name = str(path)
    missing = [one for one in ("onnx", "onnxruntime") if importlib.util.find_spec(one) is None]
    if missing:
        raise ValueError(
            f'backbone: {name} needs {" and ".join(missing)}; run: pip install "xattn[onnx]"'
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"backbone: there is no file {name}; give an .onnx file")
    model = _read(name)
    form = _form_of(model.graph, name)
    size = _size_of(form, input_size, name)
    ends = _end_of(model.graph, name)
    net, reason = _converted(model, form, name)
    preprocessing = Preprocessing(input_size=size, interpolation="bilinear")
    try:
        session = OnnxSession(model.SerializeToString(), form)
        images = torch.rand(2, form.channels, *size, generator=torch.Generator().manual_seed(0))
        expected = session(images)
    except _NoLogits as error:
        raise ValueError(
            f"backbone: {name} returns {error}; give a classifier, whose output is logits (N, K)"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"backbone: onnxruntime cannot run {name} on {size[0]} x {size[1]} pixels ({reason}); give "
            f"another input_size (--input-size), or export the network again"
        ) from None
    if len(expected[0]) > 1 and (expected >= 0).all() and (expected.sum(1) - 1).abs().max() < 1e-3:
        raise ValueError(
            f"backbone: {name} returns probabilities that are not from a Softmax at its end; export it "
            f"without the operations that compute them from logits"
        )
    reason = reason if net is None else _difference(net, images, expected)
    net = None if reason else net
    made: Any = _with_maps(net, taps, preprocessing, name) if net is not None else None
    if made is None:
        if net is None:
            warnings.warn(
                f"{name} is run by onnxruntime, without gradients: {reason}", stacklevel=4
            )
        if taps:
            raise ValueError(f"taps: got {taps}, but {name} provides no maps; leave them out")
        refusal = (
            f"explainer: {name} has no gradients ({reason}); use a method that hides parts of the "
            f"image, such as 'rise' or 'occlusion'"
        )
        made = OnnxClassifier(session, net, preprocessing, refusal)
    made.assumes_preprocessing = True
    made.input_channels = form.channels
    made.default_task = "multilabel" if ends == "Sigmoid" and expected.shape[1] > 1 else None
    return made


def _read(name: str) -> Any:
    """Read the ``ModelProto`` of a file, checked by onnx."""
    import onnx

    try:
        model = onnx.load(name)
        onnx.checker.check_model(model)
        return model
    except Exception as error:  # from protobuf, from onnx, or about external files
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"backbone: {name} is not a complete ONNX file ({reason}); export it again, with its weight "
            f"files beside it"
        ) from None


def _form_of(graph: Any, name: str) -> InputSpec:
    weights = {one.name for one in graph.initializer}
    inputs = [one for one in graph.input if one.name not in weights]
    kinds = [one.type.tensor_type for one in inputs]
    shapes = [[d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim] for kind in kinds]
    if len(inputs) != 1 or len(shapes[0]) != 4:
        got = ", ".join(f"{i.name} {tuple(s)}" for i, s in zip(inputs, shapes, strict=True))
        raise ValueError(
            f"backbone: {name} takes {got or 'no input'}; give a model with a single input of images "
            f"(N, C, H, W) or (N, H, W, C)"
        )
    if kinds[0].elem_type not in _TYPES:
        raise ValueError(
            f"backbone: {name} takes images that are not floats (type {kinds[0].elem_type} of ONNX); "
            f"export it with float inputs"
        )
    batch, one, two, three = shapes[0]
    last = three in CHANNELS and one not in CHANNELS
    channels = three if last else one
    if channels is None:
        raise ValueError(
            f"backbone: {name} takes {tuple(shapes[0])}, in which the channels cannot be identified; "
            f"export it with a fixed number of channels, (N, C, H, W) or (N, H, W, C)"
        )
    height, width = (one, two) if last else (two, three)
    size = None if height is None or width is None else (height, width)
    return InputSpec(inputs[0].name, _TYPES[kinds[0].elem_type], batch, channels, size, last)


def _size_of(form: InputSpec, asked: tuple[int, int] | None, name: str) -> tuple[int, int]:
    if form.size is None and asked is None:
        raise ValueError(
            f"input_size: {name} takes any; give the size it was trained on, input_size= (--input-size)"
        )
    if None not in (form.size, asked) and form.size != asked:
        raise ValueError(f"input_size: got {asked}, but {name} takes {form.size}; leave it out")
    size: tuple[int, int] = form.size or asked  # type: ignore[assignment]
    if (form.batch or 2) * form.channels * math.prod(size) > MOST:
        raise ValueError(
            f"backbone: {name} takes {form.batch or 2} images of {form.channels} x {size[0]} x {size[1]}, "
            f"more than {MOST} numbers; export it for fewer or smaller images"
        )
    return size


def _end_of(graph: Any, name: str) -> str:
    """Remove a final softmax or sigmoid, and everything that does not lead to it, in place; return the
    operator's name."""
    found = [o for o in graph.output if o.type.tensor_type.elem_type in _TYPES]
    found = [o for o in found if len(o.type.tensor_type.shape.dim) in (0, 2, 4)]
    if len(found) != 1:
        got = ", ".join(one.name for one in graph.output)
        raise ValueError(
            f"backbone: {name} returns {got or 'nothing'}; give a model with one output of logits (N, K)"
        )
    output = found[0]
    makers = {one: node for node in graph.node for one in node.output}
    made = makers.get(output.name)
    while made is not None and made.op_type in _MOVES:
        made = makers.get(made.input[0])
    kind = "" if made is None else str(made.op_type)
    if made is not None and kind in _ENDS:
        made.op_type = "Identity"
        del made.attribute[:]
    del graph.output[:]
    graph.output.append(output)
    needed = {output.name}
    for i in reversed(range(len(graph.node))):
        if needed & set(graph.node[i].output):
            needed |= set(_names(graph.node[i]))
        else:
            del graph.node[i]
    return kind


def _names(node: Any) -> Iterator[str]:
    """Iterate over the names that a node reads, including those read by its subgraphs."""
    yield from node.input
    for graph in (graph for one in node.attribute for graph in (one.g, *one.graphs)):
        yield from (one.name for one in graph.output)
        for inner in graph.node:
            yield from _names(inner)


def _converted(model: Any, form: InputSpec, name: str) -> tuple[nn.Module | None, str]:
    """Return the network in PyTorch, or None and the reason."""
    try:
        net = OnnxNetwork(model, form.batch == 1, form.last)
        return net.float().eval().requires_grad_(False), ""
    except TooLarge as error:
        raise ValueError(f"backbone: {name} is rejected: {error}; export it again") from None
    except UnknownOperator as error:
        return None, f"these operators cannot be converted to PyTorch: {error}"
    except Exception as error:  # a valid graph may still be unsupported here
        return None, _failed(error)


def _failed(error: Exception) -> str:
    return f"its conversion fails: {' '.join(str(error).split())[:120]}"


@torch.no_grad()
def _difference(net: nn.Module, images: Tensor, expected: Tensor) -> str:
    """Return why the logits (2, K) differ from the ``expected`` ones; empty if they do not."""
    try:
        off = float((net(images) - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    except UnknownOperator as error:
        return f"these operators cannot be converted to PyTorch: {error}"
    except Exception as error:
        return _failed(error)
    return "" if off <= TOLERANCE else f"the logits of its conversion differ by {off:.1g}"


def _with_maps(
    net: nn.Module, taps: tuple[str, ...] | None, preprocessing: Preprocessing, name: str
) -> nn.Module | None:
    """Return the network with its maps as taps; None if it has no maps."""
    net.preprocessing = preprocessing  # type: ignore[assignment]
    taps = taps and tuple(f"layers.{one.removeprefix('layers.')}" for one in taps)
    try:
        return from_hooks(net, taps, kind=name)
    except ValueError:
        if taps:
            raise
        return None
