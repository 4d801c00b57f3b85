"""Detectors of Hugging Face ``transformers``: DETR and its variants, YOLOS, Grounding DINO.

Candidates are the outputs for the queries, computed by the model's own ``forward``:

    DETR, Table Transformer, YOLOS      P the softmax without its last class, "no object", O = 1 - p of it
    Conditional and Deformable DETR, RT-DETR (v2), D-FINE    P the sigmoids, O = max P
    Grounding DINO                      P of a phrase the largest sigmoid of its tokens, O = max P

The feature maps are the decoder's input, which is the encoder's output; in YOLOS, they are the patches at
the input of the last layer. A forward hook on the frozen copy passes these maps through the
identities in ``points``, which CAM methods read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from xattn.backbone.families.transformers_models import normalisation_of
from xattn.backbone.families.transformers_networks import pair_of
from xattn.detection.candidates import Candidates, Suppression, full
from xattn.detection.networks import DetectionNetwork
from xattn.photos.preprocessing import Preprocessing

SOFTMAX = ("detr", "table-transformer", "yolos")
SIGMOID = ("conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine")
TEXT = ("grounding-dino",)
KINDS = (*SOFTMAX, *SIGMOID, *TEXT)
# Trained on photos squeezed into a square, not normalised.
SQUASHED = ("rt_detr", "rt_detr_v2", "d_fine")

_MAPS: ContextVar[list[tuple[Tensor, ...]] | None] = ContextVar("maps", default=None)
Shapes = Sequence[tuple[int, int]]


class TransformersDetector(DetectionNetwork):
    """A detector of transformers.

    Args:
        net: one of :data:`KINDS`, according to its config.
        size: (H, W) of its input; by default the processor's, otherwise 640 pixels per side.
        processor: its image processor; for Grounding DINO its processor or tokenizer.
        phrases: for Grounding DINO, the classes.

    Raises:
        ValueError: an unsupported model, or Grounding DINO without phrases or tokenizer.
    """

    def __init__(
        self,
        net: nn.Module,
        size: tuple[int, int] | None = None,
        processor: Any = None,
        phrases: Sequence[str] | None = None,
    ) -> None:
        config: Any = net.config
        kind = str(config.model_type)
        if kind not in KINDS or "ObjectDetection" not in type(net).__name__:
            raise ValueError(
                f"model: a {type(net).__name__} is not understood; of transformers these detectors are "
                f"read: {', '.join(KINDS)}"
            )
        inputs: dict[str, Tensor] = {}
        spans: list[list[int]] = []
        if kind in TEXT:
            inputs, spans = _text(phrases, getattr(processor, "tokenizer", processor))
            names = list(phrases or ())
        else:
            names = [str(config.id2label[i]) for i in range(config.num_labels)]
        # One query is one object, except in models that take the best pairs of query and class.
        pairs = kind in SIGMOID
        kept = Suppression(0.05, None, 300 if kind in SQUASHED else 100, not pairs)
        photos = _photos(kind, size, getattr(processor, "image_processor", processor))
        super().__init__(net, len(names), photos, kept, 0)
        self.kind, self.class_names = kind, names
        self.spans, self.text_keys = spans, list(inputs)
        for key, value in inputs.items():
            self.register_buffer(key, value, persistent=False)
        self.grid: Any = None
        own: Any = net
        if self.kind == "yolos":
            layers = own.vit.encoder.layer
            layers[max(len(layers) - 2, 0)].register_forward_hook(self._lead, with_kwargs=True)
        else:
            own.model.encoder.register_forward_hook(self._lead, with_kwargs=True)
            projection = getattr(own.model, "input_projection", None)
            if projection is not None:
                projection.register_forward_hook(self._see_grid)
        with torch.no_grad():
            levels = len(self._run(next(net.parameters()).new_zeros(1, 3, *photos.input_size))[1])
        self.points = nn.ModuleList(nn.Identity() for _ in range(levels))
        self.tap_names = [f"level.{i}" for i in range(levels)]

    def parts(self, x: Tensor) -> tuple[list[Candidates], tuple[Tensor, ...]]:
        answer, maps = self._run(x)
        logits, own = full(answer.logits), full(answer.pred_boxes)
        if self.kind in SOFTMAX:
            p = logits.softmax(-1)
            classes, objectness = p[..., :-1], 1 - p[..., -1]
        elif self.kind in TEXT:
            p = logits.sigmoid()
            classes = torch.stack([p[..., span].amax(-1) for span in self.spans], -1)
            objectness = classes.amax(-1)
        else:
            classes = logits.sigmoid()
            objectness = classes.amax(-1)
        height, width = x.shape[-2:]
        centre, half = own[..., :2], own[..., 2:] / 2
        boxes = torch.cat([centre - half, centre + half], -1)
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        return [Candidates(boxes[:, :, None], objectness, classes)], maps

    def _run(self, x: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """The model's answer, and the maps that the hook saw."""
        net: Any = self.net
        text = {key: getattr(self, key).expand(len(x), -1) for key in self.text_keys}
        token = _MAPS.set([])
        try:
            answer = net(pixel_values=x, **text)
            found = _MAPS.get() or []
        finally:
            _MAPS.reset(token)
        return answer, found[-1]

    # ------------------------------------------------------------------ hooks

    def _see_grid(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        maps = _MAPS.get()
        if maps is not None:
            self.grid = [(output.shape[2], output.shape[3])]

    def _lead(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The encoder's output, with its maps passed through the points."""
        kept = _MAPS.get()
        if kept is None:
            return output
        if isinstance(output, Tensor):  # tokens of YOLOS: class, patches, detections
            own: Any = self.net
            inner = output[:, 1 : output.shape[1] - own.config.num_detection_tokens]
            sides = zip(self.preprocessing.input_size, pair_of(own.config.patch_size), strict=True)
            rows, columns = (side // patch for side, patch in sides)
            led = self._tokens(inner, [(rows, columns)], kept)
            return torch.cat([output[:, :1], led, output[:, 1 + inner.shape[1] :]], 1)
        key = "last_hidden_state"
        key = key if hasattr(output, key) else f"{key}_vision"
        value = output[key]
        if isinstance(value, Tensor):
            shapes = kwargs.get("spatial_shapes_list") or self.grid
            output[key] = self._tokens(value, shapes, kept)
        else:
            kept.append(self._pass(value))
            output[key] = list(kept[-1])
        return output

    def _tokens(self, tokens: Tensor, shapes: Shapes, kept: list[Any]) -> Tensor:
        """(B, N, C) passed through the points as maps of ``shapes``."""
        parts = tokens.split([h * w for h, w in shapes], 1)
        maps = [
            p.transpose(1, 2).unflatten(2, tuple(s)) for p, s in zip(parts, shapes, strict=True)
        ]
        kept.append(self._pass(maps))
        return torch.cat([m.flatten(2).transpose(1, 2) for m in kept[-1]], 1)

    def _pass(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.through(maps) if len(self.points) else tuple(maps)


def _photos(kind: str, size: tuple[int, int] | None, processor: Any) -> Preprocessing:
    """From the image processor; without one, ImageNet's mean and std, or none if the family uses none."""
    squash = kind in SQUASHED
    mode = "squash" if squash else "border"
    usual = Preprocessing()
    mean, std = ((0.0,) * 3, (1.0,) * 3) if squash else (usual.mean, usual.std)
    if hasattr(processor, "image_mean"):
        mean, std = normalisation_of(processor)
    given = dict(getattr(processor, "size", None) or {})
    side = int(given.get("shortest_edge") or given.get("height") or 640)
    return Preprocessing(
        size or (side, int(given.get("width") or side)), mean, std, "bilinear", 1.0, mode
    )


def _text(
    phrases: Sequence[str] | None, tokenizer: Any
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """The inputs for "phrase. phrase." and the positions of each phrase's tokens."""
    if not phrases or not callable(tokenizer):
        raise ValueError(
            "class_names: Grounding DINO finds what texts say; give class_names=['a cat', ...] and "
            "processor=AutoProcessor.from_pretrained(...)"
        )
    ids, spans = [tokenizer.cls_token_id], []
    stop = tokenizer.convert_tokens_to_ids(".")
    for phrase in phrases:
        own = tokenizer(phrase.lower(), add_special_tokens=False)["input_ids"]
        spans.append(list(range(len(ids), len(ids) + len(own))))
        ids += [*own, stop]
    row = torch.tensor([[*ids, tokenizer.sep_token_id]])
    zeros = torch.zeros_like(row)
    return {"input_ids": row, "token_type_ids": zeros, "attention_mask": zeros + 1}, spans
