"""Export backbone and head as one graph in one file, for ``torch.export`` (.pt2) or ONNX (.onnx).

    (images (B, 3, H, W), class_index (B,)) -> (logits (B, K), map (B, 1, H, W))

The file needs neither xattn nor timm. With onnxruntime, Pillow and NumPy alone::

    session = onnxruntime.InferenceSession("explained.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map["xattn.json"])
    height, width = about["preprocessing"]["input_size"]
    photo = PIL.Image.open("photo.jpg").convert("RGB").resize((width, height))
    images = numpy.asarray(photo, "float32").transpose(2, 0, 1)[None] / 255
    predicted = numpy.array([-1])  # or the index of a class
    logits, maps = session.run(None, {"images": images, "class_index": predicted})
    name, shown = about["class_names"][logits[0].argmax()], maps[0, 0]

and with torch alone::

    extra = {"xattn.json": ""}
    model = torch.export.load("explained.pt2", extra_files=extra).module()
    logits, maps = model(torch.from_numpy(images), torch.from_numpy(predicted))
    about = json.loads(extra["xattn.json"])
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, sha256
from xattn.explainers.base import check_head, preserve_state, probe_of
from xattn.heads import Head
from xattn.runtime.files import atomic_file, check_folder

SUFFIXES = (".onnx", ".pt2")
METADATA = "xattn.json"
OPSET = 18
TOLERANCE = 1e-4
# A range below this fraction of the largest magnitude is float32 rounding, not a map.
CONSTANT_RANGE = 1e-6
ONNX_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GiB; the graph itself needs some room

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ExplainedClassifier(nn.Module):
    """A backbone and its head as one module: ``model(images, class_index) -> (logits, map)``.

    Args:
        head: a head that is itself a classifier, such as those of ``xattn probe``, must also be the
            classifier of ``backbone``; :func:`xattn.heads.probed.probed` creates such a backbone.
        normalize: min-max each map, as ``xattn explain`` shows it; a constant map becomes 0. If False,
            the map is the head's own output: scores, or the mask with ``explain_with="mask"``.

    ``images`` (B, 3, H, W) are pixels in [0, 1], float32, of the backbone's input size;
    ``class_index`` (B,), int64, names one class per image; -1 means the predicted class. ``logits`` are
    (B, K). ``map`` is (B, 1, H, W), up-sampled bilinearly after any min-max scaling.
    """

    def __init__(self, backbone: Backbone, head: Head, normalize: bool = True) -> None:
        super().__init__()
        check_head(head, backbone)
        own = probe_of(backbone)
        if head.is_classifier and (own is None or sha256(own) != sha256(head)):
            raise ValueError(
                f"head: the maps of {head.name!r} share out its own logits, but {backbone.name} gives "
                f"others; give xattn.heads.probed.probed(backbone, head) as the backbone"
            )
        self.backbone = head.tapped(backbone)
        self.head = head
        self.normalize = normalize

    def forward(self, images: Tensor, class_index: Tensor) -> tuple[Tensor, Tensor]:
        logits, maps = self.raw(images, class_index)
        return logits, self.shown(maps)

    def raw(self, images: Tensor, class_index: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the head's own maps (B, 1, h, w)."""
        taps = self.backbone(images)
        classes = torch.where(class_index < 0, taps.logits.argmax(1), class_index)
        return taps.logits, self.head.explanation(taps, classes)

    def shown(self, maps: Tensor) -> Tensor:
        """Maps (B, 1, h, w) -> (B, 1, H, W)."""
        size = self.backbone.preprocessing.input_size
        if not self.normalize:
            return F.interpolate(maps, size, mode="bilinear", align_corners=False)
        low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
        span = high - low
        varies = span > CONSTANT_RANGE * torch.maximum(low.abs(), high.abs())
        grey = torch.where(varies, (maps - low) / torch.where(varies, span, 1.0), 0.0)
        return F.interpolate(grey, size, mode="bilinear", align_corners=False).clamp(0, 1)


def export(backbone: Backbone, head: Head, path: str | Path, normalize: bool = True) -> Path:
    """Write ``backbone`` and ``head`` as one graph; the suffix of ``path`` decides the format.

    The graph is float32, accepts any batch size, and includes the normalisation of the pixels. A JSON text
    is stored with it (``xattn.json`` in ONNX's ``metadata_props`` or in the archive's extra files): the
    head's ``config.json`` with the SHA-256 of backbone and head, ``preprocessing``, ``class_names``,
    ``task``, and ``map``, a description of the map's values.

    The file is first written under a temporary name and read back. It is renamed only if its outputs
    agree with PyTorch's to within 1e-4 (relative to the largest logit; for maps, on the scale [0, 1]).
    The tolerance is wider for maps so flat that min-max magnifies rounding errors. If onnxruntime is
    missing, an ``.onnx`` file is not checked, and a warning is issued.

    Args:
        path: the file, ``.onnx`` (opset 18) or ``.pt2``.
        normalize: see :class:`ExplainedClassifier`.

    Raises:
        ValueError: the suffix is unknown, the head belongs to another backbone or has other logits, an
            optional package is missing, the model cannot be traced or is too large for ONNX, or the
            exported graph does not compute the same values.
        OSError: ``path`` cannot be written. An existing file is left as it was.

    Example:
        >>> import tempfile, xattn
        >>> from xattn import export
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = xattn.create_head("ttame", net)
        >>> path = export(net, head, f"{tempfile.mkdtemp()}/head.pt2")
        >>> path.name
        'head.pt2'
    """
    path = Path(path)
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ValueError(f"path: got {path}; name a file that ends in .onnx or .pt2")
    model = ExplainedClassifier(backbone, head, normalize)
    onnx = path.suffix == ".onnx"
    if onnx:
        _check_onnx(model)
    check_folder(path.parent, "path")
    about = json.dumps(_about(model), ensure_ascii=False)
    with preserve_state(), torch.inference_mode(False), torch.no_grad():
        model = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
        try:
            program = _trace(model)
            proto = _to_onnx(program) if onnx else None
        except Exception as error:  # the tracers have no common exception
            raise _failed("cannot be traced to", model, path, error) from error
        with atomic_file(path, "path") as temporary:
            if proto is not None:
                proto.metadata_props.add(key=METADATA, value=about)
                temporary.write_bytes(proto.SerializeToString())
            else:
                archive = io.BytesIO()  # torch would abort the process on a full disk
                torch.export.save(program, archive, extra_files={METADATA: about})
                temporary.write_bytes(archive.getbuffer())
            try:
                run = _onnx_runner(temporary) if onnx else torch.export.load(temporary).module()
                if run is not None:
                    _verify(model, run, path)
            except ValueError:
                raise
            except Exception as error:  # the runtimes have no common exception either
                raise _failed("does not run as", model, path, error) from error
    return path


def _failed(what: str, model: ExplainedClassifier, path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"path: {model.backbone.name} with head {model.head.name} {what} {path.suffix} "
        f"({type(error).__name__}: {reason}); nothing was written, try the other format"
    )


def _check_onnx(model: ExplainedClassifier) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'path: .onnx needs {" and ".join(missing)}; run: pip install "xattn[export]"'
        )
    size = 4 * sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if size > ONNX_BYTES:
        raise ValueError(
            f"path: an .onnx file holds 2 GB, but the weights are {size / 1e9:.1f} GB; export to .pt2"
        )


def _about(model: ExplainedClassifier) -> dict[str, Any]:
    backbone, head = model.backbone, model.head
    return {
        **head.config(),
        "head_sha256": sha256(head),
        "preprocessing": asdict(backbone.preprocessing),
        "class_names": backbone.class_names,
        "task": backbone.task,
        "map": "min-max" if model.normalize else head.explain_with,
    }


def _shapes() -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch", min=1)
    return {0: batch}, {0: batch}


def _example(model: ExplainedClassifier, count: int) -> tuple[Tensor, Tensor]:
    """Images, half noise and half smooth, and one class per image: predicted, first, ..., last."""
    height, width = model.backbone.preprocessing.input_size
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(
        count, model.backbone.mean.shape[1], height, width, generator=generator, device="cpu"
    )
    smooth = F.interpolate(noise[..., :4, :4], (height, width), mode="bilinear")
    last = model.backbone.num_classes - 1
    return (noise + smooth) / 2, torch.linspace(-1, last, count, device="cpu").round().long()


def _trace(model: ExplainedClassifier) -> torch.export.ExportedProgram:
    program = torch.export.export(model, _example(model, 2), dynamic_shapes=_shapes(), strict=False)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:  # they hold file names of this machine
                node.meta.pop("stack_trace", None)
    return program


def _to_onnx(program: torch.export.ExportedProgram) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own deprecations
        proto = torch.onnx.export(
            program,
            (),
            dynamo=True,
            dynamic_shapes=_shapes(),
            input_names=["images", "class_index"],
            output_names=["logits", "map"],
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        ).model_proto  # type: ignore[union-attr]
    for item in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        item.ClearField("metadata_props")  # the tracer's notes, as large as the graph itself
    return proto


def _onnx_runner(path: Path) -> Run | None:
    if importlib.util.find_spec("onnxruntime") is None:
        warnings.warn(
            'export: the graph was not compared with PyTorch; pip install "xattn[export]" brings '
            "onnxruntime",
            stacklevel=3,
        )
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor, class_index: Tensor) -> tuple[Tensor, Tensor]:
        inputs = {"images": images.numpy(), "class_index": class_index.numpy()}
        logits, maps = session.run(None, inputs)
        return torch.from_numpy(logits), torch.from_numpy(maps)

    return run


def _verify(model: ExplainedClassifier, run: Run, path: Path) -> None:
    """Raise a ``ValueError`` unless ``run`` agrees with ``model``, also for other batch sizes."""
    for count in (1, 3):
        images, index = _example(model, count)
        logits, maps = run(images, index)
        # A tie between two classes may be broken either way.
        classes = torch.where(index < 0, logits.argmax(1), index)
        expected, raw = model.raw(images, classes)
        if not (expected.isfinite().all() and raw.isfinite().all()):
            raise ValueError(
                f"path: {model.backbone.name} with head {model.head.name} gives NaN or infinite "
                f"values; check the weights, nothing was written"
            )
        apart = (logits - expected).abs().max() / expected.abs().max().clamp(min=1)
        largest = raw.abs().amax((1, 2, 3))
        slack = largest.clamp(min=1)
        if model.normalize:
            span = raw.amax((1, 2, 3)) - raw.amin((1, 2, 3))
            slack = (0.01 * largest / span.clamp(min=1e-30)).clamp(min=1)
        error = (maps - model.shown(raw)).abs().amax((1, 2, 3)) / slack
        worst = float(torch.maximum(apart, error.max()))
        if not worst <= TOLERANCE:  # NaN too
            raise ValueError(
                f"path: the {path.suffix} graph of {model.backbone.name} differs from PyTorch by "
                f"{worst:.2g} (allowed {TOLERANCE:g}); nothing was written, try the other format"
            )
