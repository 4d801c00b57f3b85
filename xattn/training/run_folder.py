"""The output folder of a training run, with its lock, settings, log and checkpoints.

Checkpoints survive a killed process and a faulty disk: each is a new folder with a checksum beside its
state. The two newest are kept, and the newest intact one is read. The file ``latest`` names the newest
checkpoint, for people who look into the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from xattn.runtime import strict_json
from xattn.runtime.files import (
    LOCK_FILE,
    RUN_FILE,
    atomic_file,
    atomic_folder,
    check_run_folder,
    output_error,
    write_json,
    write_text,
)

POINTER, STATE, CHECKSUM = "latest", "state.pt", "state.pt.sha256"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``folder/step-<step>``, make ``folder/latest`` name it, and delete all older checkpoints
    except the one before it."""
    name = f"step-{step:08d}"
    buffer = io.BytesIO()
    torch.save(state, buffer)  # in memory first: a full disk is then an OSError of the write
    data = buffer.getbuffer()
    with atomic_folder(folder / name, (STATE, CHECKSUM)) as temporary:
        (temporary / STATE).write_bytes(data)
        line = f"{hashlib.sha256(data).hexdigest()}  {STATE}\n"  # as sha256sum -c reads it
        (temporary / CHECKSUM).write_text(line, encoding="utf-8")
    write_text(folder / POINTER, name + "\n")
    # Later checkpoints must have been damaged, or the run would have resumed from one of them.
    earlier = [found for found in _steps(folder) if found < step]
    for found, path in _steps(folder).items():
        if found != step and found not in earlier[:1]:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".*"):  # from a run that was killed while writing
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Load the state of the newest intact checkpoint, or return None if none was ever completed.

    If a checkpoint is damaged, the previous one is used, with a warning.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
    """
    damages = []
    for path in _steps(folder).values():
        try:
            state = _read(path)
        except (ValueError, OSError) as error:
            damages.append(f"{path / STATE} is damaged ({error})")
            continue
        if damages:
            warnings.warn(
                f"resume: {'; '.join(damages)}; continuing from {path.name}, the one before",
                stacklevel=2,
            )
        return state
    if damages or (folder / POINTER).exists():
        reason = "; ".join(damages) or f"{folder} no longer contains a checkpoint"
        raise ValueError(
            f"resume: {reason}, and no other is intact; restore one from a backup, or train again "
            f"into a new output folder"
        )
    return None


def has_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint was ever completed in ``folder``, intact or not."""
    return bool(_steps(folder))


def _steps(folder: Path) -> dict[int, Path]:
    """The folders of the checkpoints by step, newest first."""
    found = {}
    for path in folder.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def _read(path: Path) -> Any:
    data = (path / STATE).read_bytes()
    if (path / CHECKSUM).read_bytes().split()[:1] != [hashlib.sha256(data).hexdigest().encode()]:
        raise ValueError(f"its bytes do not match {CHECKSUM}")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# ---------------------------------------------------------------------- the run's folder


LOG_FILE = "log.jsonl"
HEAD_FOLDER, CHECKPOINTS = "head", "checkpoints"


def first_workers(folder: Path | None, workers: int) -> int:
    """Return the number of workers with which the run in ``folder`` was started, or ``workers`` if there
    is no run."""
    try:
        old = strict_json.parse((folder / RUN_FILE).read_bytes()) if folder else {}
        return int(old["train"]["workers"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return workers  # a damaged record is refused by claim


@contextmanager
def claim(
    folder: Path | None, run: dict[str, Any], resume: bool, main: bool
) -> Iterator[tuple[TextIO | None, dict[str, Any] | None]]:
    """Lock ``folder`` for this run; raise an error if another run uses it, or if it is resumed with other
    settings.

    Yields the log and, for a resumed run, the state of its last checkpoint. Both are None if there is no
    folder, and in all processes except the ``main`` one.
    """
    if folder is None and resume:
        raise ValueError("resume: output is missing; give the folder of the run to continue")
    if folder is None or not main:
        yield None, None
        return
    check_run_folder(folder, resume)
    path = folder / RUN_FILE
    if resume:
        try:
            old = strict_json.parse(path.read_bytes())
            changed = _differences(_comparable(old), _comparable(json.loads(json.dumps(run))))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"resume: {path} is damaged; choose a new output folder") from None
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"resume: {path} was started with other settings ({'; '.join(changed[:3])}{more}); "
                f"use the same settings, or a new output folder"
            )
    with lock_folder(folder):
        if not path.is_file():
            write_json(path, run)
        state = load_checkpoint(folder / CHECKPOINTS) if resume else None
        cut_log(folder, 0 if state is None else state["step"])
        try:
            log = (folder / LOG_FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise output_error("output", folder / LOG_FILE, error) from error
        with log:
            yield log, state


def _comparable(run: dict[str, Any]) -> dict[str, Any]:
    """The settings that must match for a run to be resumed: all except settings that do not affect the
    result."""
    train = {k: v for k, v in run["train"].items() if k not in ("workers", "checkpoint_every")}
    head = {k: v for k, v in run["head"].items() if k not in ("training", "xattn")}
    return {**run, "train": train, "head": head}


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """A phrase for each value that differs, named by its innermost key."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys((*old, *new))
        return [text for k in keys for text in _differences(old.get(k), new.get(k), k)]
    return [f"{name}: {_short(old)} then, {_short(new)} now"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def lock_folder(folder: Path, argument: str = "output") -> Iterator[None]:
    """Lock ``folder``, creating it if it is missing; raise a ``ValueError`` if another process has locked
    it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise output_error(argument, folder, error) from error
    with lock:
        _lock(lock, folder, argument)
        yield


def _lock(lock: TextIO, folder: Path, argument: str) -> None:
    try:
        import fcntl
    except ImportError:  # not POSIX
        return
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by workers
    except OSError:
        raise ValueError(
            f"{argument}: another run is writing to {folder}; choose a new folder"
        ) from None


def cut_log(folder: Path, step: int) -> None:
    """Drop the log lines after ``step``, the step of the checkpoint, because the resumed run writes them
    again.

    Incomplete records, such as half a line from a killed process, are dropped, too.
    """
    path = folder / LOG_FILE
    if not path.is_file():
        return
    with atomic_file(path) as temporary:
        lines = path.read_bytes().splitlines()
        temporary.write_bytes(b"".join(line + b"\n" for line in lines if _step_of(line) <= step))


def _step_of(line: bytes) -> float:
    try:
        step = strict_json.parse(line, nan=True)["step"]
        return step if type(step) is int else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf
