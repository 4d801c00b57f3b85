"""One pass: the explanations of a batch of prepared photos or frames."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xattn.backbone import Backbone
from xattn.backbone.pooled_features import FeatureRecord, keep_logits, recording
from xattn.backbone.scored import Scored, class_of, is_score, scored
from xattn.explainers import Explainer, as_explainer, create_explainer
from xattn.explainers.base import Choose, check_target, method_title
from xattn.explaining.naming import Picture, Source, file_name_of
from xattn.explaining.provenance import provenance_of
from xattn.heads import Head
from xattn.packs.explanation import Explanation, ImageFacts, blank_note, map_name
from xattn.photos.arrays import ArrayImage
from xattn.photos.base import StoredPhoto
from xattn.photos.classes import find_classes
from xattn.photos.labels import true_classes
from xattn.photos.view import View
from xattn.runtime.option_checks import Count, check

Classes = int | str | Sequence[int | str] | None


def retarget(
    backbone: Backbone, explainers: Sequence[Any], classes: Classes, target: Any
) -> tuple[Backbone, Sequence[Any], Any]:
    """Backbone, explainers and classes that explain ``target``: a class, given by number or name, or
    another quantity computed from the network's output. For a quantity, the explainers are created again.

    Raises:
        ValueError: both ``classes`` and ``target`` are given, or the target does not fit.
    """
    if target is None:
        return backbone, explainers, classes
    if classes is not None:
        raise ValueError("target: got one, and classes as well; give one of them")
    if isinstance(target, list | tuple) and any(isinstance(one, Integral | str) for one in target):
        raise ValueError(
            f"target: got {target!r:.80}; give several classes as classes={list(target)!r:.80}"
        )
    if isinstance(target, list | tuple) or is_score(backbone, target):
        view = scored(backbone, target)
        made = [
            e if e is None or isinstance(e, str) else as_explainer(e, backbone).with_target(view)
            for e in explainers
        ]
        every = isinstance(view, Scored) or view.num_classes == 1
        return view, made, list(range(view.num_classes)) if every else None
    return backbone, explainers, class_of(backbone, target)


class ClassPerPhoto:
    """One class for each of N photos: ``classes`` is a LongTensor (N,), in the order of ``names``.

    Raises:
        ValueError: the number of classes differs from the number of photos, or a class is out of range.
    """

    def __init__(self, backbone: Backbone, classes: Tensor, names: Sequence[str]) -> None:
        whole = check_target(classes, len(names), backbone.num_classes)
        self.by_name = dict(zip(names, whole.tolist(), strict=True))

    def maps(
        self, explainer: Explainer, pixels: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), classes (B, 1) and maps (B, 1, h, w) of the photos in a batch."""
        classes = torch.tensor([self.by_name[name] for name in names], device=pixels.device)
        with torch.no_grad():
            logits = explainer.backbone.logits(pixels)
        keep_logits(logits)
        return logits, classes[:, None], explainer.attribute(pixels, classes)


class PredictedAndTrue:
    """The predicted class of each photo and, if it differs, the true class.

    Args:
        truth: the true class of each photo by name, None if it is unknown.
    """

    def __init__(self, truth: Mapping[str, int | None]) -> None:
        self.truth = truth

    @staticmethod
    def asked(classes: object) -> bool:
        """Whether ``classes`` requests both, by ("predicted", "label") or by "predicted,label"."""
        words = classes if isinstance(classes, list | tuple) else [classes]
        parts = [part.strip() for word in words for part in str(word).split(",")]
        return parts == ["predicted", "label"]

    def maps(
        self, explainer: Explainer, pixels: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), classes (B, 2) and maps (B, 2, h, w) of the photos in a batch. If a photo's
        two classes are the same, that class appears twice."""
        logits, classes, maps = explainer.attribute_classes(
            pixels, lambda z: z.argmax(1, keepdim=True)
        )
        known = [self.truth.get(name) for name in names]
        predicted = classes[:, 0].tolist()
        true = torch.tensor(
            [p if k is None else k for p, k in zip(predicted, known, strict=True)],
            device=pixels.device,
        )
        both, wrong = maps.repeat(1, 2, 1, 1), (true != classes[:, 0]).nonzero()[:, 0]
        if len(wrong):
            both[wrong, 1] = explainer.attribute(pixels[wrong], true[wrong])[:, 0]
        return logits, torch.stack([classes[:, 0], true], 1), both


# ---------------------------------------------------------------------- a pass


TrueClass = tuple[int | None, str | None]
TOP = 5  # number of classes that a pack names for every photo


class PreparedPhoto(NamedTuple):
    """A decoded photo: the model's input (3, H, W), the part of the photo that it shows, and the source of
    the pixels.

    ``thumbnail`` is the JPEG file for a pack, and ``picture`` its pixels for overlay pictures.
    """

    pixels: Tensor
    view: View
    image_id: str
    source: Picture
    thumbnail: bytes | None = None
    picture: Image.Image | None = None


def set_up(
    backbone: Backbone,
    head: Head | None,
    explainer: str | Explainer | None,
    classes: int | str | Sequence[int | str] | ClassPerPhoto | PredictedAndTrue | None,
    top: int,
    view: str,
    batch_size: int,
    seed: int,
    clips: bool = False,
) -> tuple[Explainer, Choose | ClassPerPhoto | PredictedAndTrue, dict[str, Any]]:
    """Check the arguments of :func:`explain`; return the explainer, its choice of classes and the protocol.

    ``clips``: whether clips are explained as a whole.
    """
    check("batch_size", batch_size, Count)
    if backbone.reads_clips and not clips:
        raise ValueError(f"backbone: {backbone.name} reads clips; use xattn.explain_clip")
    if clips and not backbone.reads_clips:
        raise ValueError(
            f"backbone: {backbone.name} reads single photos; use xattn.explain_video, frame by frame"
        )
    method = _explainer(backbone, head, explainer, seed, batch_size)
    backbone.require_classes()
    protocol = provenance_of(backbone, method, view)
    if isinstance(classes, ClassPerPhoto | PredictedAndTrue):
        kind = "named" if isinstance(classes, ClassPerPhoto) else "predicted, label"
        return method, classes, {**protocol, "classes": kind}
    wanted = _classes(backbone, classes, top)
    if wanted is not None:
        protocol["classes"] = "named"

    def choose(logits: Tensor) -> Tensor:
        if wanted is None:
            return logits.topk(top).indices
        return torch.tensor(wanted, device=logits.device).expand(len(logits), -1)

    return method, choose, protocol


def explain_batch(
    batch: list[PreparedPhoto],
    backbone: Backbone,
    method: Explainer,
    choose: Choose | ClassPerPhoto | PredictedAndTrue,
    protocol: dict[str, Any],
    truth: Mapping[str, TrueClass] | None = None,
    features: bool = False,
) -> Iterator[Explanation]:
    """The explanations of prepared photos, photo by photo, in the order chosen for each.

    ``truth`` maps image_id to the true class; with ``features`` the facts of each photo include the
    features that the classifier receives.
    """
    pixels = torch.stack([item.pixels for item in batch]).to(backbone.device)
    with recording() if features else nullcontext() as record:
        if isinstance(choose, ClassPerPhoto | PredictedAndTrue):
            logits, targets, maps = choose.maps(method, pixels, [item.image_id for item in batch])
        else:
            logits, targets, maps = method.attribute_classes(pixels, choose)
    read = _features(record, logits, backbone) if record else [None] * len(batch)
    every = backbone.probabilities(logits)
    probabilities = every.gather(1, targets)
    values = maps.float().cpu().numpy()
    title = method_title(method.name)
    for i, item in enumerate(batch):
        label, label_name = (truth or {}).get(item.image_id, (None, None))
        facts = ImageFacts(top_classes(every[i], backbone), label, label_name, read[i])
        tensor = {"view": "tensor"} if item.view.mode == "tensor" else {}
        for j, target in enumerate(dict.fromkeys(targets[i].tolist())):
            yield Explanation(
                map=values[i, j],
                target=target,
                target_name=backbone.class_names[target],
                probability=float(probabilities[i, j]),
                method=method.name,
                method_title=title,
                view=item.view,
                image_id=item.image_id,
                protocol={**(protocol | tensor), **backbone.about(target)},
                file_name=file_name_of(item.source),
                is_mask=method.is_mask,
                source=item.source,
                facts=facts,
            )


def _features(
    record: FeatureRecord, logits: Tensor, backbone: Backbone
) -> Sequence[NDArray[np.float16] | None]:
    """The features (d,) of each photo in a batch that the classifier read; None if they are unknown."""
    rows = record.rows(logits)
    note = record.note or ("gives none, and the pack has none" if rows is None else "")
    if note:
        warnings.warn(f"features: {backbone.name} {note}", stacklevel=3)
    if rows is None:
        return [None] * len(logits)
    most = torch.finfo(torch.float16).max
    return list(rows.clamp(-most, most).half().numpy())


def top_classes(probabilities: Tensor, backbone: Any) -> tuple[tuple[int, str, float], ...]:
    """(K,) probabilities -> (class, its name, probability) of the five most probable; empty for numbers
    that are not probabilities.

    ``backbone``: provides class names and task.
    """
    if backbone.task == "regression":
        return ()
    values, classes = probabilities.topk(min(TOP, len(probabilities)))
    pairs = zip(classes.tolist(), values.tolist(), strict=True)
    return tuple((i, backbone.class_names[i], float(f"{p:.6g}")) for i, p in pairs)


def true_classes_of(
    sources: Iterable[tuple[str, Source]], labels: str | Path, backbone: Backbone
) -> dict[str, TrueClass]:
    """The true classes of photos by image_id, see :func:`xattn.photos.labels.true_classes`."""
    names, ids = [], []
    for image_id, source in sources:
        if isinstance(source, Image.Image | ArrayImage):
            raise ValueError(f"labels: {image_id} has no file name; give photos by path")
        name = source.name if isinstance(source, StoredPhoto) else str(source)
        names.append(source.as_posix() if isinstance(source, Path) else name)
        ids.append(image_id)
    found = true_classes(names, labels, backbone.class_names)
    if all(number is None for number, _ in found):
        shown = next((name for _, name in found if name is not None), "none")
        warnings.warn(
            f"labels: no photo has a class of {backbone.name} (the first: {shown}), so no prediction "
            f"can be called right or wrong",
            stacklevel=3,
        )
    return dict(zip(ids, found, strict=True))


def _explainer(
    backbone: Backbone,
    head: Head | None,
    explainer: str | Explainer | None,
    seed: int,
    batch_size: int,
) -> Explainer:
    if explainer is not None and not isinstance(explainer, str):
        explainer = as_explainer(explainer, backbone, seed=seed, max_forward_batch=batch_size)
        if explainer.backbone is not backbone:
            raise ValueError(
                f"explainer: {explainer.name} was made for another backbone "
                f"({explainer.backbone.name}); create it with this one"
            )
        return explainer
    if explainer is None:
        if head is None:
            raise ValueError(
                "head: got none; give head=load_head(...), or explainer='gradcam' or another of "
                "list_explainers()"
            )
        explainer = "head"
    return create_explainer(explainer, backbone, head, seed=seed, max_forward_batch=batch_size)


def _classes(
    backbone: Backbone, classes: int | str | Sequence[int | str] | None, top: int
) -> list[int] | None:
    if classes is None:
        if isinstance(top, bool) or not 1 <= top <= backbone.num_classes:
            raise ValueError(
                f"top: got {top}; {backbone.name} has 1..{backbone.num_classes} classes"
            )
        return None
    names = [classes] if isinstance(classes, int | str) else list(classes)
    if not names:
        raise ValueError("classes: got an empty list; name at least one class, or pass None")
    return find_classes(names, backbone.class_names, backbone.name)


def warn_of_constant_maps(named: Iterable[tuple[Explanation, str]]) -> None:
    """Warn once about all constant maps; each is given with the name of its photo or frame."""
    warn([map_of(e, name) for e, name in named if e.is_blank])


def map_of(explanation: Explanation, photo: str) -> str:
    """A text that describes a map."""
    return map_name(explanation.method, explanation.target_name, photo)


def warn(blank: Sequence[str]) -> None:
    if blank:
        warnings.warn(f"explain: {blank_note(blank)}", stacklevel=3)
