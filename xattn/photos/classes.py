"""The meaning of a classifier's outputs: its task and the names of its classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xattn.runtime.names import did_you_mean, near_names

Task = Literal["multiclass", "multilabel", "binary", "regression"]


def resolve_task(task: Task | None, logits: Tensor, name: str) -> Task:
    """``task``, checked against the logits (B, K), or the default for that number of outputs."""
    outputs = 1 if logits.ndim == 1 else logits.shape[1]
    if task is None:
        return "binary" if outputs == 1 else "multiclass"
    if task not in get_args(Task):
        raise ValueError(f"task: got {task!r}; choose one of {', '.join(get_args(Task))}")
    if (task == "binary") != (outputs == 1) and task not in ("multilabel", "regression"):
        hint = "binary" if outputs == 1 else "multiclass, multilabel or regression"
        raise ValueError(f"task={task!r}: {name} has {outputs} outputs; choose {hint}")
    return task


def as_classes(logits: Tensor, task: Task) -> Tensor:
    """A binary model's (B,) or (B, 1) logits as (B, 2); other logits unchanged."""
    logits = logits[:, None] if logits.ndim == 1 else logits
    return torch.cat([-logits / 2, logits / 2], 1) if task == "binary" else logits


def class_probabilities(logits: Tensor, task: Task) -> Tensor:
    """The definition of p: a softmax, one sigmoid per class (multilabel), or the number itself
    (regression)."""
    if task == "regression":
        return logits
    return logits.sigmoid() if task == "multilabel" else logits.softmax(1)


def read_classes(class_names: str | Path | Sequence[str] | None) -> list[str] | None:
    """Class names from a list, or from a text file with one name per line.

    Example:
        >>> from xattn.backbone import read_classes
        >>> read_classes(["cat", "dog"])
        ['cat', 'dog']
    """
    if class_names is None:
        return None
    if isinstance(class_names, str | Path):
        path = Path(class_names)
        if not path.is_file():
            raise FileNotFoundError(
                f"class_names: no file {path}; give a list of names, or a text file with one per line"
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"class_names: {path} is not UTF-8 text; save it as UTF-8") from None
        class_names = [line.strip() for line in lines if line.strip()]
    names = list(class_names)
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(f"class_names: got {wrong!r} among them; give each name as a str")
    return names


def class_names_of(
    model: nn.Module, count: int, given: Sequence[str] | None, task: Task
) -> list[str]:
    """``given``, whose length must be ``count``, or the names in the model's config or in ImageNet's
    lists."""
    if given is not None:
        if len(given) != count:
            raise ValueError(
                f"class_names: got {len(given)} names, but the model has {count} classes; "
                f"give one name per class"
            )
        return list(given)
    if task == "binary":
        return ["negative", "positive"]
    own = getattr(model, "class_names", None)
    if isinstance(own, list | tuple) and len(own) == count:
        return list(own)
    if task == "regression":
        return ["value"] if count == 1 else [f"value {i}" for i in range(count)]
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if getattr(model, "num_classes", None) == 0:  # an encoder: its "logits" are pooled features
        return [f"feature {i}" for i in range(count)]
    if not hasattr(model, "pretrained_cfg"):
        return [f"class {i}" for i in range(count)]
    config: Any = model.pretrained_cfg
    own = config.get("label_names") if config else None
    if own and len(own) == count:
        return list(own)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f"class {i}" for i in range(count)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i, detailed=False) for i in range(count)]


def find_classes(
    names: Sequence[str | int], class_names: Sequence[str], model_name: str
) -> list[int]:
    """The indices of several classes, each found as in :func:`find_class`, without duplicates; "281,282"
    means two classes."""
    found: list[int] = []
    for name in names:
        parts = [name]
        if isinstance(name, str) and re.fullmatch(r"\s*[\dn]\d*(\s*,\s*[\dn]\d*)+\s*,?\s*", name):
            parts = [part.strip() for part in name.split(",") if part.strip()]
        found += [find_class(part, class_names, model_name) for part in parts]
    return list(dict.fromkeys(found))


def wordnet_ids(class_names: Sequence[str]) -> dict[str, int]:
    """The classes of an ImageNet-1k classifier by WordNet id; {} for any other classifier.

    A classifier is recognised as one for ImageNet-1k if it has 1000 classes and, for more than 90 % of
    them, the name up to its first comma is the same as in timm.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if infer_imagenet_subset({"num_classes": len(class_names)}) != "imagenet-1k":
        return {}
    info = ImageNetInfo("imagenet-1k")
    pairs = zip(class_names, info.label_descriptions(), strict=True)
    alike = sum(name.split(",")[0].lower() == own.split(",")[0].lower() for name, own in pairs)
    ids: list[str] = info.label_names()
    return {identity: i for i, identity in enumerate(ids)} if alike > 0.9 * len(ids) else {}


def find_class(name: str | int, class_names: Sequence[str], model_name: str) -> int:
    """The index of a class given by index, name or a unique part of its name.

    The classes of an ImageNet-1k classifier also have WordNet ids, such as n02123045.

    Raises:
        ValueError: there is no such class, or there are several; the message lists near matches.
    """
    text = str(name).strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        if 0 <= int(text) < len(class_names):
            return int(text)
        raise ValueError(
            f"class {text} is out of range: {model_name} has 0..{len(class_names) - 1}"
        )
    if re.fullmatch(r"n[0-9]{8}", text):
        ids = wordnet_ids(class_names)
        if text in ids:
            return ids[text]
        what = did_you_mean(text, ids, f"{model_name} has no such ImageNet-1k class, give names")
        raise ValueError(f"class {name!r} is not a WordNet id of {model_name}; {what}")
    lowered = [n.lower() for n in class_names]
    wanted = text.lower()
    exact = [i for i, n in enumerate(lowered) if wanted == n]
    exact = exact or [
        i for i, n in enumerate(lowered) if wanted in (part.strip() for part in n.split(","))
    ]
    if exact:
        return exact[0]
    part = [i for i, n in enumerate(lowered) if wanted and wanted in n]
    words = [i for i in part if wanted in re.findall(r"[\w'-]+", lowered[i])]
    if len(part) == 1:
        return part[0]
    if part:
        shown = ", ".join(f"{i} {class_names[i]!r}" for i in (words or part)[:8])
        more = ", ..." if len(words or part) > 8 else ""
        raise ValueError(
            f"class {name!r} is not the whole name of a class of {model_name}; near matches: {shown}"
            f"{more}; give the number or the name of one"
        )
    short = {piece.strip(): n for n in lowered for piece in n.split(",")}
    near = list(dict.fromkeys(short[m] for m in near_names(wanted, short, 5)))
    hint = f"near matches: {', '.join(map(repr, near))}" if near else "give a number or a name"
    raise ValueError(f"class {name!r} is not a class of {model_name}; {hint}")
