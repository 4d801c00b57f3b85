"""What a job is asked to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["train", "probe", "demo"]


class JobError(ValueError):
    """Why a job cannot be started, stopped or shown; the text is for a person."""


@dataclass(frozen=True)
class Spec:
    """What a job does, in names: nothing here is a path of the machine."""

    kind: Kind
    data: str = ""
    """Folder of photos below the data folder, "." for that one itself."""
    model: str = ""
    """A timm model; "" is the model that the viewer was started with."""
    heads: tuple[str, ...] = ()
    labels: str = ""
    """Of "probe", a file of labels in the folder of photos; "" takes folders as classes."""
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    recipe: str = "small"


def spec_of(record: dict[str, Any]) -> Spec:
    """The spec in a job's record.

    Raises:
        ValueError, TypeError: it is damaged.
    """
    known = {field.name for field in dataclasses.fields(Spec)}
    values: dict[str, Any] = {k: v for k, v in record.items() if k in known}
    spec = Spec(**{**values, "heads": tuple(values.get("heads", ()))})
    texts = (spec.data, spec.model, spec.labels, spec.recipe, *spec.heads)
    numbers = (spec.epochs, spec.batch_size, spec.seed)
    if spec.kind not in ("train", "probe", "demo") or not all(isinstance(t, str) for t in texts):
        raise ValueError("job")
    if not all(n is None or isinstance(n, int) for n in numbers):
        raise ValueError("job")
    return spec
