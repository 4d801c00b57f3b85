"""Reads the files of jobs. They may come from somebody else, so files outside the root are not opened."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xattn.packs.contained_files import LocalFolder, PackError
from xattn.runtime import strict_json

Kind = Literal["train", "probe", "demo"]


class JobError(ValueError):
    """Raised if a job cannot be started, stopped or shown; the message is shown to the user."""


@dataclass(frozen=True)
class Spec:
    """A description of a job that contains only names, and no paths of this machine."""

    kind: Kind
    data: str = ""
    """The folder of photos, relative to the data folder; "." is the data folder itself."""
    model: str = ""
    """The name of a timm model; "" means the model with which the viewer was started."""
    heads: tuple[str, ...] = ()
    labels: str = ""
    """For "probe", the name of a label file in the folder of photos; if it is "", the names of the
    folders are the classes."""
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    recipe: str = "small"


def spec_of(record: dict[str, Any]) -> Spec:
    """Create a spec from a job's record.

    Raises:
        ValueError, TypeError: the record is damaged.
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


JOB, PROCESS, EXIT, STOP = "job.json", "process.json", "exit.json", "stop.json"
ARGUMENTS = "arguments.json"
STDOUT, STDERR = "stdout.log", "stderr.log"
TAIL = 64 << 10  # number of bytes to read from the end of a log
MAX_RECORD, MAX_LOG = 1 << 20, 256 << 20  # largest size of a JSON file and of a loss log, in bytes


@dataclass(frozen=True)
class JobFiles:
    """Reads files inside the folder ``root``."""

    root: Path

    def _inside(self, path: Path) -> tuple[LocalFolder, str]:
        return LocalFolder(self.root), str(path.relative_to(self.root))

    def read(self, path: Path) -> dict[str, Any]:
        """The JSON object in a file; {} if the file does not exist or does not contain one."""
        folder, name = self._inside(path)
        try:
            found = strict_json.parse(folder.read(name, MAX_RECORD), nan=True)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def records(self, path: Path) -> list[dict[str, float]]:
        """The records of a JSON-lines log. Lines without a step number are left out, and so are values that
        are not numbers."""
        found = []
        folder, name = self._inside(path)
        with contextlib.suppress(PackError):
            for line in folder.read(name, MAX_LOG).splitlines():
                with contextlib.suppress(ValueError):  # the last line may be incomplete
                    record = strict_json.parse(line, nan=True)
                    if isinstance(record, dict) and _is_count(record.get("step")):
                        if not _is_count(record.get("epoch", 0)):
                            del record["epoch"]
                        found.append({k: v for k, v in record.items() if _is_number(v)})
        return found

    def tail(self, path: Path) -> str:
        """The last ``TAIL`` bytes of a log as text; "" if it cannot be read."""
        folder, name = self._inside(path)
        try:
            size = folder.size(name)
            return folder.part(name, max(0, size - TAIL), size).decode("utf-8", "replace")
        except (OSError, PackError):
            return ""

    def lines(self, path: Path) -> list[str]:
        """The last lines of a log, without progress bars."""
        lines = re.split(r"[\r\n]+", self.tail(path))
        return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]

    def message(self, folder: Path) -> str:
        """The reason why a job ended: its error message, or else the last lines of its output."""
        lines = self.lines(folder / STDERR)
        for line in reversed(lines):
            if line.startswith("xattn: error: "):
                return line.removeprefix("xattn: error: ")
        return "\n".join(lines[-5:])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_number(value: Any) -> bool:
    """Whether a value is a number; NaN is allowed, since a loss can be NaN."""
    return type(value) in (int, float) and not abs(value) > 1e300
