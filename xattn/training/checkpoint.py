"""Checkpoints that survive a kill and a bad disk: each is a new folder with a checksum beside its state.

The newest two are kept, and the newest intact one is read. The file ``latest`` names the newest one, for
people who look into the folder.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from xattn.runtime.files import atomic_folder, write_text

POINTER, STATE, CHECKSUM = "latest", "state.pt", "state.pt.sha256"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``folder/step-<step>``, point ``folder/latest`` at it, and drop all but the one before it."""
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
    for leftover in folder.glob(".*"):  # of a run that was killed while writing
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def load_checkpoint(folder: Path, needed: Collection[str]) -> dict[str, Any] | None:
    """The state of the newest intact checkpoint, or None if none was ever finished.

    A damaged checkpoint is passed over for the one before it, with a warning.

    Args:
        needed: the keys that a state must have, ``step`` among them.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damages = []
    for step, path in _steps(folder).items():
        try:
            state = _read(path, needed)
            if type(state["step"]) is not int or state["step"] != step:
                raise ValueError(f"it is of step {state['step']!r}")
        except (ValueError, OSError) as error:
            damages.append(f"{path / STATE} is damaged ({error})")
            continue
        if damages:
            warnings.warn(
                f"resume: {'; '.join(damages)}; going on from {path.name}, the one before",
                stacklevel=2,
            )
        return state
    if damages or (folder / POINTER).exists():
        reason = "; ".join(damages) or f"{folder} holds no checkpoint any more"
        raise ValueError(
            f"resume: {reason}, and no other is whole; restore one from a backup, or train again "
            f"into a new output folder"
        )
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was ever finished in ``folder``, intact or not."""
    return bool(_steps(folder))


def _steps(folder: Path) -> dict[int, Path]:
    """The folders of the checkpoints by step, newest first."""
    found = {}
    for path in folder.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def _read(path: Path, needed: Collection[str]) -> dict[str, Any]:
    data = (path / STATE).read_bytes()
    if (path / CHECKSUM).read_bytes().split()[:1] != [hashlib.sha256(data).hexdigest().encode()]:
        raise ValueError(f"its bytes are not those of {CHECKSUM}")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"it cannot be read, {type(error).__name__}") from error
    missing = set(needed) - set(state) if isinstance(state, dict) else needed
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return state
