"""The command line of a job, made anew from its spec each time."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn.app.demo import pack_job
from xattn.app.jobs.job_files import JOBS
from xattn.app.jobs.spec import JobError, Spec
from xattn.config import PROBE_RECIPES, RECIPES

HEAD = re.compile(r"[a-z0-9_]{1,64}")
SAMPLE = 4  # photos whose maps are made before training and at each checkpoint


@dataclass(frozen=True)
class CommandLines:
    """Command lines of jobs below ``root``, on photos below ``data``, with ``model`` by default; they
    import what ``imports`` names."""

    root: Path
    data: Path
    model: Any
    imports: tuple[str, ...] = ()

    def _data(self, spec: Spec) -> Path:
        parts = Path(spec.data).parts
        if Path(spec.data).is_absolute() or ".." in parts:
            raise JobError(f"data: {spec.data!r} is not below the data folder")
        return self.data / spec.data

    def check_data(self, spec: Spec) -> None:
        """Raise a :class:`JobError` for photos or labels that are not there, or lie elsewhere."""
        if spec.kind == "demo":
            return
        folder = self._data(spec)
        if not folder.is_dir():
            raise JobError(f"data: the folder {spec.data} is gone; put it back, or choose another")
        if not folder.resolve().is_relative_to(self.data.resolve()):
            raise JobError(f"data: {spec.data} is a link that leads out of the data folder")
        if spec.labels and not (folder / spec.labels).is_file():
            raise JobError(f"labels: {spec.labels} is gone; put it back, or choose another file")
        if not (folder / spec.labels).resolve().is_relative_to(self.data.resolve()):
            raise JobError(f"labels: {spec.labels} is a link that leads out of the data folder")

    def arguments(self, spec: Spec, name: str, resume: bool) -> list[str]:
        """The command line of the job ``name`` without its program."""
        output = str(self.root / name)
        if spec.kind == "demo":
            return pack_job.arguments(Path(output), self.root / JOBS / name)
        if not all(HEAD.fullmatch(head) for head in spec.heads) or not spec.heads:
            raise JobError("heads: choose at least one head")
        if spec.kind == "train" and len(spec.heads) != 1:
            raise JobError(f"heads: got {len(spec.heads)}; an explanation head is trained alone")
        if spec.recipe not in (RECIPES if spec.kind == "train" else PROBE_RECIPES):
            raise JobError(f"recipe: got {spec.recipe!r}; choose one of {', '.join(RECIPES)}")
        line = [
            spec.kind,
            str(self._data(spec)),
            *self.model_options(spec),
            "--recipe",
            spec.recipe,
            *self.import_options(),
        ]
        line += ["--sample", str(SAMPLE)]
        if spec.kind == "train":
            line += ["--head", spec.heads[0]]
        else:
            line += ["--heads", *spec.heads]
            if spec.labels:
                if Path(spec.labels).name != spec.labels:
                    raise JobError(f"labels: got {spec.labels!r}; give a file of the data folder")
                line += ["--labels", str(self._data(spec) / spec.labels)]
        for option in ("epochs", "batch_size"):
            value = getattr(spec, option)
            if value is not None:
                if not 1 <= value <= 100_000:
                    raise JobError(f"{option}: got {value}; give 1 to 100,000")
                line += [f"--{option.replace('_', '-')}", str(value)]
        if spec.seed:
            line += ["--seed", str(spec.seed)]
        line += ["--output", output]
        return [*line, "--resume"] if resume else line

    def import_options(self) -> list[str]:
        """The options that bring in what the viewer was started with."""
        return [word for source in self.imports for word in ("--import", source)]

    def model_options(self, spec: Spec) -> list[str]:
        """The options that name the network."""
        if not spec.model:
            return [] if self.model is None else model_arguments(self.model)
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", spec.model):
            raise JobError(f"model: got {spec.model!r}; give the name of a timm model")
        device = getattr(self.model, "device", "auto")
        return ["--backbone", spec.model, *(["--device", device] if device != "auto" else [])]


def model_arguments(model: Any) -> list[str]:
    """The command line's options of ``model``, a ``BackboneArgs``, as far as they are not the defaults."""
    line: list[str] = []
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if value != field.default:
            values = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
            line += [f"--{field.name.replace('_', '-')}", *values]
    return line
