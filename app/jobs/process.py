"""The process of a job: started in a session of its own, and recognised again by its record."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from xattn.app.jobs.job_files import ARGUMENTS, PROCESS, STDERR, STDOUT
from xattn.runtime.files import output_error, write_json

RUNNER = (sys.executable, "-m", "xattn.app.jobs.child")  # before the folder of a job
_children: dict[int, subprocess.Popen[bytes]] = {}


def start_process(folder: Path, arguments: list[str]) -> None:
    """Start the process of the job ``folder``, and record it there."""
    write_json(folder / ARGUMENTS, arguments, "job")
    environment = {**os.environ, "TQDM_MININTERVAL": "1", "PYTHONUNBUFFERED": "1"}
    try:
        with _new(folder / STDOUT) as out, _new(folder / STDERR) as err:
            process = subprocess.Popen(
                [*RUNNER, str(folder.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C of the server is not the job's
                env=environment,
            )
    except OSError as error:
        raise output_error("job", folder, error) from error
    _children[process.pid] = process
    record = {"pid": process.pid, "born": _born(process.pid), "started": time.time()}
    try:
        write_json(folder / PROCESS, record, "job")
    except OSError:
        process.kill()
        raise


def _born(pid: int) -> float | None:
    """When a process started, in Unix seconds; None if it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError):
        return None


def is_alive(process: dict[str, Any], folder: Path) -> bool:
    """Whether the process of a record runs, and is that of the job's folder."""
    pid, born = process.get("pid"), process.get("born")
    if type(pid) is not int or not isinstance(born, int | float) or not 1 < pid < 1 << 31:
        return False
    child = _children.get(pid)
    if child is not None and child.poll() is not None:  # also takes the zombie away
        del _children[pid]
    now = _born(pid)
    return now is not None and abs(now - born) < 2 and _runs(pid, folder)


def _runs(pid: int, folder: Path) -> bool:
    """Whether a process was started for this job: a record may name any process there is."""
    import psutil

    try:
        line = psutil.Process(pid).cmdline()
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False
    return bool(line) and Path(line[-1]).name == folder.name


def _new(path: Path) -> IO[bytes]:
    """An empty file in place of what was there; where a link led stays as it is."""
    path.unlink(missing_ok=True)
    return path.open("xb")
