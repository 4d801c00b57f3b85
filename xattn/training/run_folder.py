"""The folder of a training run: who owns it, what it must agree with, its log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from xattn.files import atomic_file, follow_link, output_error, write_json
from xattn.training.checkpoint import last_step

RUN_FILE, LOG_FILE, LOCK_FILE = "run.json", "log.jsonl", "run.lock"
HEAD_FOLDER, CHECKPOINTS = "head", "checkpoints"


def first_workers(folder: Path | None, workers: int) -> int:
    """Loader workers that the run in ``folder`` was started with; ``workers`` where there is none."""
    try:
        old = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")) if folder else {}
        return int(old["train"]["workers"])
    except (OSError, ValueError, KeyError, TypeError):
        return workers  # a damaged record is refused by claim


@contextmanager
def claim(
    folder: Path | None, run: dict[str, Any], resume: bool, main: bool
) -> Iterator[TextIO | None]:
    """Own ``folder`` for this run: refuse a second run, check that a resumed one is the same."""
    if folder is None:
        if resume:
            raise ValueError("resume: needs output, the folder of the run to go on with")
        yield None
        return
    if not main:
        yield None
        return
    follow_link(folder)  # refuses one that leads nowhere
    path = folder / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; name a folder")
    if path.is_file():
        if not resume:
            raise ValueError(
                f"output: {folder} holds a run already; go on with it by --resume (resume=True), or "
                f"give another --output"
            )
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            same = _comparable(old) == _comparable(json.loads(json.dumps(run)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"resume: {path} is damaged; choose a new output folder") from None
        if not same:
            raise ValueError(
                f"resume: {path} was started with other settings; use the same, or a new output folder"
            )
    elif resume:
        raise ValueError(f"resume: {folder} holds no run; check output, or train without resume")
    elif folder.is_dir() and any(p.name != LOCK_FILE for p in folder.iterdir()):
        raise ValueError(f"output: {folder} is not empty and holds no run; choose a new folder")
    with locked(folder):
        if not path.is_file():
            write_json(path, run)
        _cut_log(folder)
        try:
            log = (folder / LOG_FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise output_error("output", folder / LOG_FILE, error) from error
        with log:
            yield log


def _comparable(run: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on: all but settings that do not change the result."""
    train = {k: v for k, v in run["train"].items() if k not in ("workers", "checkpoint_every")}
    head = {k: v for k, v in run["head"].items() if k not in ("training", "xattn")}
    return {**run, "train": train, "head": head}


@contextmanager
def locked(folder: Path, argument: str = "output") -> Iterator[None]:
    """Own ``folder``, which is made if it is missing; one that another process owns is refused."""
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


def _cut_log(folder: Path) -> None:
    """Drop log lines later than the last checkpoint: the resumed run writes them again."""
    path = folder / LOG_FILE
    if not path.is_file():
        return
    step = last_step(folder / CHECKPOINTS)
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the half line of a killed process
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def report(
    log: TextIO | None,
    writer: Any,
    bar: Any,
    step: int,
    epoch: int,
    lr: float,
    losses: dict[str, float],
) -> None:
    """One step to the log, to TensorBoard and to the progress bar, where there are such."""
    if log is not None:
        record = {"step": step, "epoch": epoch, "lr": lr, **losses, "time": round(time.time(), 3)}
        try:
            log.write(json.dumps(record) + "\n")
            log.flush()
        except OSError as error:
            raise output_error("output", log.name, error) from error
    if writer is not None:
        for key, value in losses.items():
            writer.add_scalar(f"train/{key}", value, step)
    bar.set_postfix({k[:4]: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
    bar.update()
