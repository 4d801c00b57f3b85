"""Starts and manages the viewer's jobs: ``xattn train``, ``xattn probe`` or the demo, in separate
processes.

The folder of a job, ``ROOT/jobs/NAME``, contains its settings (``job.json``), a record of its process
(``process.json``), its output and, once it has ended, its exit code (``exit.json``). Its results are in
``ROOT/NAME``, just as if the command had been run in a terminal. Nothing is kept in memory. Jobs are
therefore not affected when a page is reloaded or the server ends, and another server with the same root
finds them again. The start time of a process distinguishes it from a later process with the same process
id.

A page requests a job with a :class:`Spec`, which contains only names. The command line is always built from
it in this module, so that a changed ``job.json`` cannot run any other command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from xattn.app.demo import pack_job
from xattn.app.jobs.job_files import (
    ARGUMENTS,
    EXIT,
    JOB,
    PROCESS,
    STDERR,
    STDOUT,
    STOP,
    JobError,
    JobFiles,
    Spec,
    spec_of,
)
from xattn.app.library import JOBS
from xattn.config import PROBE_RECIPES, RECIPES
from xattn.runtime.files import output_error, write_json

HEAD = re.compile(r"[a-z0-9_]{1,64}")
SAMPLE = 4  # number of photos to explain before training and at each checkpoint


@dataclass(frozen=True)
class CommandLines:
    """Builds the command lines of jobs.

    Attributes:
        root: the folder that contains the results.
        data: the folder that contains the folders of photos.
        model: the ``BackboneArgs`` for jobs that name no model.
        imports: the modules and files to import with ``--import``.
    """

    root: Path
    data: Path
    model: Any
    imports: tuple[str, ...] = ()

    def _data(self, spec: Spec) -> Path:
        parts = Path(spec.data).parts
        if Path(spec.data).is_absolute() or ".." in parts:
            raise JobError(
                f"data: {spec.data!r} is not inside the data folder; choose another folder"
            )
        return self.data / spec.data

    def check_data(self, spec: Spec) -> None:
        """Raise a :class:`JobError` if photos or labels are missing or are outside the data folder."""
        if spec.kind == "demo":
            return
        folder = self._data(spec)
        if not folder.is_dir():
            raise JobError(
                f"data: the folder {spec.data} no longer exists; put it back, or choose another"
            )
        if not folder.resolve().is_relative_to(self.data.resolve()):
            raise JobError(
                f"data: {spec.data} is a link to a place outside the data folder; choose another folder"
            )
        if spec.labels and not (folder / spec.labels).is_file():
            raise JobError(
                f"labels: {spec.labels} no longer exists; put it back, or choose another file"
            )
        if not (folder / spec.labels).resolve().is_relative_to(self.data.resolve()):
            raise JobError(
                f"labels: {spec.labels} is a link to a place outside the data folder; choose another file"
            )

    def arguments(self, spec: Spec, name: str, resume: bool) -> list[str]:
        """The command-line arguments of the job ``name``, excluding the program.

        Raises:
            JobError: a field of the spec is not valid.
        """
        output = str(self.root / name)
        if spec.kind == "demo":
            return pack_job.arguments(Path(output), self.root / JOBS / name)
        if not all(HEAD.fullmatch(head) for head in spec.heads) or not spec.heads:
            raise JobError("heads: choose at least one head")
        if spec.kind == "train" and len(spec.heads) != 1:
            raise JobError(
                f"heads: got {len(spec.heads)}; choose one, since only one explanation head can be trained "
                f"at a time"
            )
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
                    raise JobError(
                        f"labels: got {spec.labels!r}; give the name of a file in the folder of photos"
                    )
                line += ["--labels", str(self._data(spec) / spec.labels)]
        for option in ("epochs", "batch_size"):
            value = getattr(spec, option)
            if value is not None:
                if not 1 <= value <= 100_000:
                    raise JobError(f"{option}: got {value}; give a number from 1 to 100,000")
                line += [f"--{option.replace('_', '-')}", str(value)]
        if spec.seed:
            line += ["--seed", str(spec.seed)]
        line += ["--output", output]
        return [*line, "--resume"] if resume else line

    def import_options(self) -> list[str]:
        """The ``--import`` options with which the viewer was started."""
        return [word for source in self.imports for word in ("--import", source)]

    def model_options(self, spec: Spec) -> list[str]:
        """The command-line options that select the network."""
        if not spec.model:
            return [] if self.model is None else model_arguments(self.model)
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", spec.model):
            raise JobError(f"model: got {spec.model!r}; give the name of a timm model")
        device = getattr(self.model, "device", "auto")
        return ["--backbone", spec.model, *(["--device", device] if device != "auto" else [])]


def model_arguments(model: Any) -> list[str]:
    """The command-line options for ``model``, a ``BackboneArgs``, omitting those left at their defaults."""
    line: list[str] = []
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if value != field.default:
            values = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
            line += [f"--{field.name.replace('_', '-')}", *values]
    return line


RUNNER = (sys.executable, "-m", "xattn.app.jobs.child")  # followed by the folder of a job
_children: dict[int, subprocess.Popen[bytes]] = {}


def start_process(folder: Path, arguments: list[str]) -> None:
    """Start the process of the job in ``folder``, and record it in this folder."""
    write_json(folder / ARGUMENTS, arguments, "job")
    environment = {**os.environ, "TQDM_MININTERVAL": "1", "PYTHONUNBUFFERED": "1"}
    try:
        with _new(folder / STDOUT) as out, _new(folder / STDERR) as err:
            process = subprocess.Popen(
                [*RUNNER, str(folder.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # so that Ctrl-C in the server's terminal does not stop the job
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
    """The start time of a process in Unix seconds; None if the process has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError):
        return None


def is_alive(process: dict[str, Any], folder: Path) -> bool:
    """Whether the process in the record ``process`` still runs and belongs to the job in ``folder``."""
    pid, born = process.get("pid"), process.get("born")
    if type(pid) is not int or not isinstance(born, int | float) or not 1 < pid < 1 << 31:
        return False
    child = _children.get(pid)
    if child is not None and child.poll() is not None:  # poll also removes the zombie process
        del _children[pid]
    now = _born(pid)
    return now is not None and abs(now - born) < 2 and _runs(pid, folder)


def _runs(pid: int, folder: Path) -> bool:
    """Whether a process was started for the job in ``folder``; a damaged record could name any process."""
    import psutil

    try:
        line = psutil.Process(pid).cmdline()
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False
    return bool(line) and Path(line[-1]).name == folder.name


def _new(path: Path) -> IO[bytes]:
    """Open a new, empty file, which replaces an existing one; the target of a link is left unchanged."""
    path.unlink(missing_ok=True)
    return path.open("xb")


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED = {JOBS, "pack", "packs", "live"}
MAX_TIME = 1e11  # largest Unix time that can be converted to a date

State = Literal["running", "stopping", "finished", "stopped", "failed", "killed"]


@dataclass(frozen=True)
class Job:
    """The current state of a job."""

    id: str
    spec: Spec
    state: State
    folder: Path
    output: Path
    created: float
    started: float
    ended: float | None
    code: int | None
    message: str

    @property
    def alive(self) -> bool:
        return self.state in ("running", "stopping")

    @property
    def resumable(self) -> bool:
        return self.state in ("stopped", "failed", "killed")


class Jobs:
    """The jobs in one root folder.

    Args:
        root: the folder of packs and jobs; it is created when the first job starts.
        data: the folder that contains the folders of photos; by default, the root.
        model: the ``BackboneArgs`` from the command line, for jobs that use the viewer's model.
        imports: the modules and files that jobs import with ``--import``.
    """

    def __init__(
        self,
        root: Path,
        data: Path | None = None,
        model: Any = None,
        imports: tuple[str, ...] = (),
    ) -> None:
        self.root, self.data = Path(root), Path(data or root)
        self._files = JobFiles(self.root)
        self._commands = CommandLines(self.root, self.data, model, imports)

    @classmethod
    def of(cls, settings: Any) -> Jobs:
        """The jobs of a viewer with the given ``state.Settings``."""
        return cls(settings.local_root, settings.data, settings.model, settings.imports)

    def all(self) -> list[Job]:
        """All jobs, newest first; folders that are not jobs are left out."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.root / JOBS):
                if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(JobError):
                        found.append(self.get(entry.name))
        return sorted(found, key=lambda job: (-job.created, job.id))

    def get(self, job_id: str) -> Job:
        """The job with this id.

        Raises:
            JobError: there is no such job, or its record is damaged.
        """
        folder = self._folder(job_id)
        if not folder.is_dir():
            raise JobError("There is no such job; choose one from the list")
        try:
            record = self._files.read(folder / JOB)
            spec = spec_of(record["spec"])
            created = _time(record["created"])
            process, end = self._files.read(folder / PROCESS), self._files.read(folder / EXIT)
            started = _time(process.get("started", created))
            ended = _time(end["time"]) if "time" in end else None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise JobError(f"The record of job {job_id} is damaged; start another job") from None
        state: State
        code = end.get("code") if isinstance(end.get("code"), int) else None
        if code is None and is_alive(process, folder):
            state = "stopping" if (folder / STOP).exists() else "running"
        elif code is None:
            state = "killed"
        else:
            state = {0: "finished", 130: "stopped", 143: "stopped"}.get(code, "failed")  # type: ignore[assignment]
        return Job(
            id=job_id,
            spec=spec,
            state=state,
            folder=folder,
            output=self.root / job_id,
            created=created,
            started=started,
            ended=ended,
            code=code,
            message=self._files.message(folder) if state in ("failed", "killed") else "",
        )

    def preview(self, spec: Spec, name: str) -> str:
        """The command line of a job, which the user can copy; the job need not exist."""
        return shlex.join(["xattn", *self._commands.arguments(spec, name, False)])

    def explain_line(self, spec: Spec, head: Path) -> str:
        """The command line that explains photos with the head of a job."""
        line = [
            "xattn",
            "explain",
            "PHOTOS",
            "--heads",
            str(head),
            *self._commands.model_options(spec),
            *self._commands.import_options(),
        ]
        return shlex.join(line)

    def mistakes_line(self, job: Job, head: Path) -> str:
        """The command line that explains labelled photos with a head and adds a pack to the results."""
        labels = f"PHOTOS/{job.spec.labels}" if job.spec.labels else "folders"
        more = ["--labels", labels, "--classes", "predicted,label"]
        return f"{self.explain_line(job.spec, head)} {shlex.join(more)} --output " + shlex.quote(
            str(job.output / "mistakes")
        )

    def free_name(self, wanted: str) -> str:
        """A name based on ``wanted`` that is not used by any job or folder in the root."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", wanted).strip("-")[:56] or "head"
        name, count = slug, 1
        while not self._is_free(name):
            count += 1
            name = f"{slug}-{count}"
        return name

    def start(self, spec: Spec, name: str) -> Job:
        """Start a job.

        Only one job can run at a time, and names are unique, even if several pages start jobs at the same
        moment.

        Raises:
            JobError: the name is taken or not valid, another job is running, a field of the spec is not
                valid, or a folder is missing.
            OSError: the root cannot be written.
        """
        _check_name(name)
        arguments = self._commands.arguments(spec, name, False)
        self._commands.check_data(spec)
        with self._turn():
            self._check_idle()
            if not self._is_free(name):
                raise JobError(f"name: {name} is taken already; give another one")
            folder = self.root / JOBS / name
            try:
                folder.mkdir()
            except OSError as error:
                raise output_error("job", folder, error) from error
            try:
                record = {"xattn": "job", "spec": dataclasses.asdict(spec), "created": time.time()}
                write_json(folder / JOB, record, "job")
                if spec.kind == "demo":
                    pack_job.prepare(folder)
                start_process(folder, arguments)
            except BaseException:
                with contextlib.suppress(OSError):
                    for file in folder.iterdir():
                        file.unlink()
                    folder.rmdir()
                raise
        return self.get(name)

    def resume(self, job_id: str) -> Job:
        """Resume a job that failed or was stopped or killed, from its last checkpoint.

        Raises:
            JobError: the job cannot be resumed, another job is running, or a folder is missing.
        """
        with self._turn():
            job = self.get(job_id)
            if not job.resumable:
                raise JobError(f"{job_id} is {job.state}; it cannot be resumed")
            self._check_idle()
            self._commands.check_data(job.spec)
            if job.output.is_symlink():
                raise JobError(f"{job_id} is a link; move the folder itself into the root")
            begun = job.spec.kind != "train" or (job.output / "run.json").is_file()
            arguments = self._commands.arguments(job.spec, job_id, begun)
            for name in (EXIT, STOP):
                (job.folder / name).unlink(missing_ok=True)
            start_process(job.folder, arguments)
        return self.get(job_id)

    def stop(self, job_id: str, at_once: bool = False) -> Job:
        """Ask a job to write a checkpoint and stop after the current step; with ``at_once``, kill it."""
        job = self.get(job_id)
        if not job.alive:
            return job
        process = self._files.read(job.folder / PROCESS)
        with contextlib.suppress(ProcessLookupError):
            if at_once:
                os.killpg(int(process["pid"]), signal.SIGKILL)  # a job leads its own process group
            else:
                with contextlib.suppress(
                    OSError
                ):  # the job must be stopped even if the disk is full
                    write_json(job.folder / STOP, {"time": time.time()}, "job")
                os.kill(int(process["pid"]), signal.SIGINT)
        return self.get(job_id)

    def rename(self, job_id: str, name: str) -> Job:
        """Rename a job that is not running, and the folder of its results.

        Raises:
            JobError: the name is taken or not valid, the job is running, or its results are a link.
            OSError: a folder cannot be moved; in this case, nothing is renamed.
        """
        _check_name(name)
        with self._turn():
            job = self._idle(job_id, "renamed")
            if not self._is_free(name):
                raise JobError(f"name: {name} is taken already; give another one")
            there = job.output.exists()
            if there:
                job.output.rename(self.root / name)
            try:
                job.folder.rename(self.root / JOBS / name)
            except OSError:
                if there:
                    (self.root / name).rename(job.output)
                raise
        return self.get(name)

    def delete(self, job_id: str) -> None:
        """Delete the record and the results of a job that is not running.

        Both are moved to another place first, so that other processes never see only one of them.

        Raises:
            JobError: the job is running, or its results are a link.
            OSError: a folder cannot be moved.
        """
        with self._turn():
            job = self._idle(job_id, "deleted")
            aside = Path(tempfile.mkdtemp(prefix=".deleted-", dir=self.root / JOBS))
            job.folder.rename(aside / "record")
            try:
                if job.output.exists():
                    job.output.rename(aside / "results")
            except OSError:
                (aside / "record").rename(job.folder)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def _idle(self, job_id: str, done: str) -> Job:
        """The job with this id; raises a JobError if it is running or its results are a link.

        ``done`` is the word for the action in the error message.
        """
        job = self.get(job_id)
        if job.alive:
            raise JobError(f"{job_id} is {job.state}; it can only be {done} after you stop it")
        if job.output.is_symlink():
            raise JobError(f"{job_id} is a link; move the folder itself into the root")
        return job

    def losses(self, job_id: str) -> dict[str, list[dict[str, float]]]:
        """The log of each head that the job trains, by head.

        A log has one record per step, with ``step``, ``epoch`` and the losses.
        """
        job = self.get(job_id)
        heads = ("",) if job.spec.kind == "train" else job.spec.heads
        places = {head: job.output / head for head in heads}
        return {name: self._files.records(folder / "log.jsonl") for name, folder in places.items()}

    def settings(self, job_id: str) -> dict[str, Any]:
        """The settings that the run has written to ``run.json``; empty before it starts."""
        return self._files.read(self.get(job_id).output / "run.json")

    def tail(self, job_id: str, lines: int = 20) -> str:
        """The last lines of standard error, without progress bars."""
        return "\n".join(self._files.lines(self._folder(job_id) / STDERR)[-lines:])

    def progress(self, job_id: str) -> tuple[int, int, str] | None:
        """The last progress bar on standard error as (done, total, rest of the line); None if there is
        none."""
        for line in reversed(re.split(r"[\r\n]+", self._files.tail(self._folder(job_id) / STDERR))):
            match = re.search(r"(\d+)/(\d+) \[([^\]]*)", line)
            if match and int(match[2]):
                return int(match[1]), int(match[2]), match[3]
        return None

    def _folder(self, job_id: str) -> Path:
        folder = self.root / JOBS / job_id
        if not NAME.fullmatch(job_id) or folder.is_symlink() or (self.root / JOBS).is_symlink():
            raise JobError("There is no such job; choose one from the list")
        return folder

    def _is_free(self, name: str) -> bool:
        taken = (self.root / name, self.root / JOBS / name)
        return name not in RESERVED and not any(os.path.lexists(path) for path in taken)

    def _check_idle(self) -> None:
        for job in self.all():
            if job.alive:
                raise JobError(f"{job.id} is {job.state}; wait until it has ended, or stop it")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """A lock for changing jobs, which only one page of any server with this root can hold at a time."""
        folder = self.root / JOBS
        with _starting:
            if folder.is_symlink():
                raise JobError(f"{JOBS} is a link; replace it by a folder with this name")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # If there is a link with this name, its target is not opened.
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                lock = os.fdopen(os.open(folder / ".lock", flags, 0o644), "r+")
            except OSError as error:
                raise output_error("job", folder, error) from error
            with lock:
                with contextlib.suppress(ImportError):  # fcntl exists only on POSIX systems
                    import fcntl

                    fcntl.flock(lock, fcntl.LOCK_EX)
                yield


def time_left(progress: tuple[int, int, str]) -> str:
    """A phrase with the remaining time of a progress bar; "" if the bar does not show it."""
    left = re.search(r"<([0-9:]+)", progress[2])
    return f", about {left[1]} left" if left else ""


_starting = threading.Lock()


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise JobError(
            f"name: got {name!r}; give a name of up to 64 letters, digits, - and _ that starts with a "
            f"letter or digit"
        )


def _time(value: Any) -> float:
    """Check a Unix time from a record, and return it as a float."""
    if type(value) not in (int, float) or not 0 <= value <= MAX_TIME:
        raise ValueError("time")
    return float(value)
