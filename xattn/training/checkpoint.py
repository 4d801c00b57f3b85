"""Checkpoints that survive a kill: each is a new folder, and ``latest`` is switched to it by rename."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import torch

from xattn.files import atomic_file, atomic_folder

POINTER, STATE = "latest", "state.pt"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``folder/step-<step>/state.pt``, point ``folder/latest`` at it, drop older ones."""
    name = f"step-{step:08d}"
    buffer = io.BytesIO()
    torch.save(state, buffer)  # in memory first: a full disk is then an OSError of the write
    with atomic_folder(folder / name, (STATE,)) as temporary:
        (temporary / STATE).write_bytes(buffer.getbuffer())
    with atomic_file(folder / POINTER) as temporary:
        temporary.write_text(name + "\n", encoding="utf-8")
    for old in sorted(folder.glob("step-*"))[:-2]:
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def last_step(folder: Path) -> int:
    """The step of the checkpoint that ``folder/latest`` points at; 0 where there is none."""
    pointer = folder / POINTER
    name = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdigit() else 0


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state that ``folder/latest`` points at, or None where no checkpoint was finished."""
    pointer = folder / POINTER
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    path = folder / name / STATE
    if Path(name).name != name or not path.is_file():
        raise ValueError(
            f"resume: {pointer} points at {name!r}, which is not there; start a new output"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"resume: checkpoint {path} cannot be read ({type(error).__name__}); delete {folder} "
            f"and train again"
        ) from error
