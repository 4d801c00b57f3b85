"""Load a vision-language model, and check that it can be explained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from xattn.backbone.families.transformers_models import PREFIX, read_saved, resolve_source
from xattn.vlm.layout import check_table
from xattn.vlm.model import VLM, entrance_of

PROMPT = "Describe the image."
TOLERANCE = 1e-3  # for logits of generation and teacher-forced pass, relative to their range


def load_vlm(
    model: Any,
    processor: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> VLM:
    """Load a transformers vision-language model, ready to be explained::

        model = LlavaForConditionalGeneration.from_pretrained(NAME)
        vlm = load_vlm(model, AutoProcessor.from_pretrained(NAME))
        vlm = load_vlm("transformers:llava-hf/llava-1.5-7b-hf")  # the same, from the hub
        vlm = load_vlm("my-folder")  # written by save_pretrained

    The model is used unchanged, with its attention and weights. On loading, three tokens are generated from
    a small picture as a check that generation agrees with the pass used for explanations.

    Args:
        model: a module in evaluation mode, ``"transformers:NAME"`` from the hub or a folder, or a folder.
        processor: required with a module; for a name it is loaded along with the model.
        device, dtype: where the model runs, and in which precision; by default unchanged, or as saved.

    Raises:
        ValueError: ``model`` is not a vision-language model, has no processor, or is in training mode, or
            its passes over prompt and answer differ from its generation.
        OSError: the folder or the name cannot be read.
    """
    if isinstance(dtype, str) and dtype != "auto":
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"dtype: got {dtype!r}; give a type of torch, such as 'bfloat16'")
        dtype = kind
    if isinstance(model, str | Path):
        model, processor = _read(str(model).removeprefix(PREFIX), processor, dtype)
    elif not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; give a name or a torch.nn.Module")
    elif model.training:
        raise ValueError("model: in training mode; call model.eval() first")
    entrance = entrance_of(model)
    if processor is None:
        raise ValueError(
            "processor: missing; give processor=AutoProcessor.from_pretrained(...) of the same model"
        )
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"processor: a {type(processor).__name__} does not take images; give the model's AutoProcessor"
        )
    if device is not None or isinstance(dtype, torch.dtype):
        model = model.to(device=device, dtype=dtype if isinstance(dtype, torch.dtype) else None)
    encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    cross = entrance.method == "forward"
    vlm = VLM(model, processor, entrance, "cross" if cross else "encoder" if encoder else "decoder")
    _check(vlm)
    return vlm


def _read(name: str, processor: Any, dtype: Any) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"vlm: {PREFIX}{name} needs transformers, which is not installed; run: pip install "
            f'"xattn[vlm]"'
        ) from None
    source, auto = resolve_source(name, "vlm"), transformers.AutoModelForImageTextToText
    if processor is None:
        load = transformers.AutoProcessor.from_pretrained
        processor = read_saved(name, "processor", load, source, "vlm")
    given = {"dtype": dtype} if dtype else {}
    model = read_saved(name, "model", partial(auto.from_pretrained, **given), source, "vlm")
    return model.eval(), processor


def _check(vlm: VLM) -> None:
    """Raise a ``ValueError`` if the teacher-forced pass differs from generation, or image tokens are not
    where the table of layouts expects them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (96, 144, 3), generator=generator, dtype=torch.uint8)
    photos = [Image.fromarray(pixels.numpy())]
    inputs = vlm.inputs(photos, PROMPT)
    made = vlm.generate(inputs, 3, logits=True)
    forced = vlm.forced(inputs, made.ids)
    assert made.logits is not None
    with torch.no_grad():
        entered = made.entered or vlm.entered(inputs)
        found = vlm.logits(forced, entered)[0]
    wanted = made.logits.to(found.device)
    known = wanted.isfinite() & found.isfinite()
    wanted, found = wanted[known], found[known]
    error = float((found - wanted).abs().max() / (wanted.max() - wanted.min()).clamp_min(1e-12))
    most = max(TOLERANCE, 8 * torch.finfo(vlm.model.dtype).eps)
    if not error <= most:
        raise ValueError(
            f"model: a {type(vlm.model).__name__} gives different logits in one pass over prompt and "
            f"answer than when it generates: off by {error:.2g} of their range; at most "
            f"{most:.2g} is accepted"
        )
    check_table(vlm, photos, PROMPT, inputs, len(entered.features))
