"""Jobs of the viewer: ``xattn train``, ``xattn probe`` or the demo in a process of their own.

A job is a folder ``ROOT/jobs/NAME`` with what was asked for (``job.json``), its process (``process.json``),
what it printed and, once it has ended, its exit code (``exit.json``); its results lie in ``ROOT/NAME``,
where the command line would put them. Nothing of it is kept in memory, so jobs survive a reload and the
end of the server, and another server on the same root finds them again. A process is told from a later one
of the same number by the time it started.

What a page asks for is a :class:`Spec` of names; command lines are made from it here, each time anew, so
that a changed ``job.json`` cannot run anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from xattn.app.demo import pack_job
from xattn.packs.contained_files import PackError, open_inside, read_inside
from xattn.runtime import strict_json
from xattn.runtime.files import output_error, write_json

JOBS = "jobs"
JOB, PROCESS, EXIT, STOP = "job.json", "process.json", "exit.json", "stop.json"
ARGUMENTS = "arguments.json"
STDOUT, STDERR = "stdout.log", "stderr.log"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
HEAD = re.compile(r"[a-z0-9_]{1,64}")
RESERVED = {JOBS, "pack", "packs", "live"}
TAIL = 64 << 10  # bytes of a log that are looked at
MAX_RECORD, MAX_LOG = 1 << 20, 256 << 20  # bytes of a JSON file, and of the log of losses
MAX_TIME = 1e11  # Unix seconds; a calendar has them, too
SAMPLE = 4
RUNNER = (sys.executable, "-m", "xattn.app.jobs.child")  # before the folder of a job

State = Literal["running", "stopping", "finished", "stopped", "failed", "killed"]
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


@dataclass(frozen=True)
class Job:
    """A job as it is now."""

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
    """The jobs of a root.

    Args:
        root: folder of packs and jobs; made with the first job.
        data: folder that folders of photos are below; the root by default.
        model: ``BackboneArgs`` of the command line, for jobs with the viewer's own model.
    """

    def __init__(self, root: Path, data: Path | None = None, model: Any = None) -> None:
        self.root, self.data, self.model = Path(root), Path(data or root), model

    # ---------------------------------------------------------------------- looking

    def all(self) -> list[Job]:
        """All jobs, the latest first; folders that are no jobs are left out."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.root / JOBS):
                if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(JobError):
                        found.append(self.get(entry.name))
        return sorted(found, key=lambda job: (-job.created, job.id))

    def get(self, job_id: str) -> Job:
        """A job by its id."""
        folder = self._folder(job_id)
        if not folder.is_dir():
            raise JobError("There is no such job; choose one of the list")
        try:
            record = self._read(folder / JOB)
            spec = _spec(record["spec"])
            created = _time(record["created"])
            process, end = self._read(folder / PROCESS), self._read(folder / EXIT)
            started = _time(process.get("started", created))
            ended = _time(end["time"]) if "time" in end else None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise JobError(f"The record of job {job_id} is damaged; start another job") from None
        state: State
        code = end.get("code") if isinstance(end.get("code"), int) else None
        if code is None and _alive(process, folder):
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
            message=self._message(folder) if state in ("failed", "killed") else "",
        )

    def preview(self, spec: Spec, name: str) -> str:
        """The command line of a job, which need not exist yet, to be copied."""
        return shlex.join(["xattn", *self._arguments(spec, name, False)])

    def explain_line(self, spec: Spec, head: Path) -> str:
        """The command line that explains with the head of a job."""
        line = ["xattn", "explain", "PHOTOS", "--head", str(head), *self._model(spec)]
        return shlex.join(line)

    def free_name(self, wanted: str) -> str:
        """``wanted`` as a name that no job or folder of the root has."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", wanted).strip("-")[:56] or "head"
        name, count = slug, 1
        while not self._is_free(name):
            count += 1
            name = f"{slug}-{count}"
        return name

    # ---------------------------------------------------------------------- doing

    def start(self, spec: Spec, name: str) -> Job:
        """Start a job; one at a time, and each name once, however many pages ask at once.

        Raises:
            JobError: a taken or malformed name, another job that runs, a folder that is not there.
            OSError: the root cannot be written.
        """
        if not NAME.fullmatch(name):
            raise JobError(
                f"name: got {name!r}; give up to 64 letters, digits, - and _, and begin with no sign"
            )
        arguments = self._arguments(spec, name, False)
        self._check_data(spec)
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
                self._spawn(folder, arguments)
            except BaseException:
                with contextlib.suppress(OSError):
                    for file in folder.iterdir():
                        file.unlink()
                    folder.rmdir()
                raise
        return self.get(name)

    def resume(self, job_id: str) -> Job:
        """Go on with a job that was stopped, failed or was killed, from its last checkpoint."""
        with self._turn():
            job = self.get(job_id)
            if not job.resumable:
                raise JobError(f"{job_id} is {job.state}; there is nothing to go on with")
            self._check_idle()
            self._check_data(job.spec)
            if job.output.is_symlink():
                raise JobError(f"{job_id} is a link; put the folder itself below the root")
            begun = job.spec.kind != "train" or (job.output / "run.json").is_file()
            arguments = self._arguments(job.spec, job_id, begun)
            for name in (EXIT, STOP):
                (job.folder / name).unlink(missing_ok=True)
            self._spawn(job.folder, arguments)
        return self.get(job_id)

    def stop(self, job_id: str, at_once: bool = False) -> Job:
        """Ask a job to stop after its step, with a checkpoint; ``at_once`` ends it as it is."""
        job = self.get(job_id)
        if not job.alive:
            return job
        process = self._read(job.folder / PROCESS)
        with contextlib.suppress(ProcessLookupError):
            if at_once:
                os.killpg(int(process["pid"]), signal.SIGKILL)  # the leader of its own group
            else:
                with contextlib.suppress(OSError):  # a full disk must not keep a job running
                    write_json(job.folder / STOP, {"time": time.time()}, "job")
                os.kill(int(process["pid"]), signal.SIGINT)
        return self.get(job_id)

    # ---------------------------------------------------------------------- what it printed

    def losses(self, job_id: str) -> dict[str, list[dict[str, float]]]:
        """The log of each head that is trained, a record a step: ``step``, ``epoch`` and the losses."""
        job = self.get(job_id)
        heads = ("",) if job.spec.kind == "train" else job.spec.heads
        places = {head: job.output / head for head in heads}
        return {name: self._records(folder / "log.jsonl") for name, folder in places.items()}

    def settings(self, job_id: str) -> dict[str, Any]:
        """What the run has written of itself (``run.json``); empty before it begins."""
        return self._read(self.get(job_id).output / "run.json")

    def tail(self, job_id: str, lines: int = 20) -> str:
        """The last lines on standard error, without progress bars."""
        return "\n".join(self._lines(self._folder(job_id) / STDERR)[-lines:])

    def progress(self, job_id: str) -> tuple[int, int, str] | None:
        """(done, all, rest of the line) of the last progress bar on standard error."""
        for line in reversed(re.split(r"[\r\n]+", self._tail(self._folder(job_id) / STDERR))):
            match = re.search(r"(\d+)/(\d+) \[([^\]]*)", line)
            if match and int(match[2]):
                return int(match[1]), int(match[2]), match[3]
        return None

    def time_left(self, job_id: str) -> str:
        """How long the last progress bar says that it will take, in words, "" where it does not."""
        found = self.progress(job_id)
        left = re.search(r"<([0-9:]+)", found[2] if found else "")
        return f"about {left[1]} left" if left else ""

    # ---------------------------------------------------------------------- inside

    def _folder(self, job_id: str) -> Path:
        folder = self.root / JOBS / job_id
        if not NAME.fullmatch(job_id) or folder.is_symlink() or (self.root / JOBS).is_symlink():
            raise JobError("There is no such job; choose one of the list")
        return folder

    def _is_free(self, name: str) -> bool:
        taken = (self.root / name, self.root / JOBS / name)
        return name not in RESERVED and not any(os.path.lexists(path) for path in taken)

    def _check_idle(self) -> None:
        for job in self.all():
            if job.alive:
                raise JobError(
                    f"{job.id} is {job.state}; wait until it has ended, or stop it first"
                )

    def _data(self, spec: Spec) -> Path:
        parts = Path(spec.data).parts
        if Path(spec.data).is_absolute() or ".." in parts:
            raise JobError(f"data: {spec.data!r} is not below the data folder")
        return self.data / spec.data

    def _check_data(self, spec: Spec) -> None:
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

    def _arguments(self, spec: Spec, name: str, resume: bool) -> list[str]:
        """The command line without its program."""
        output = str(self.root / name)
        if spec.kind == "demo":
            return pack_job.arguments(Path(output), self.root / JOBS / name)
        if not all(HEAD.fullmatch(head) for head in spec.heads) or not spec.heads:
            raise JobError("heads: choose at least one head")
        if spec.kind == "train" and len(spec.heads) != 1:
            raise JobError(f"heads: got {len(spec.heads)}; an explanation head is trained alone")
        line = [spec.kind, "--data", str(self._data(spec)), *self._model(spec), "--recipe", "small"]
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

    def _model(self, spec: Spec) -> list[str]:
        if not spec.model:
            return [] if self.model is None else model_arguments(self.model)
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", spec.model):
            raise JobError(f"model: got {spec.model!r}; give the name of a timm model")
        device = getattr(self.model, "device", "auto")
        return ["--backbone", spec.model, *(["--device", device] if device != "auto" else [])]

    def _spawn(self, folder: Path, arguments: list[str]) -> None:
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

    # Files that somebody else may have put there: opened inside the root, or taken as missing.

    def _inside(self, path: Path) -> tuple[Path, str]:
        return self.root.resolve(), str(path.relative_to(self.root))

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = strict_json.parse(read_inside(*self._inside(path), MAX_RECORD), nan=True)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _records(self, path: Path) -> list[dict[str, float]]:
        """The lines of a log that are tables of numbers."""
        found = []
        with contextlib.suppress(PackError):
            for line in read_inside(*self._inside(path), MAX_LOG).splitlines():
                with contextlib.suppress(ValueError):  # one that is being written
                    record = strict_json.parse(line, nan=True)
                    if isinstance(record, dict) and _is_count(record.get("step")):
                        if not _is_count(record.get("epoch", 0)):
                            del record["epoch"]
                        found.append({k: v for k, v in record.items() if _is_number(v)})
        return found

    def _tail(self, path: Path) -> str:
        try:
            with open_inside(*self._inside(path)) as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
                return stream.read(TAIL).decode("utf-8", "replace")
        except (OSError, PackError):
            return ""

    def _lines(self, path: Path) -> list[str]:
        lines = re.split(r"[\r\n]+", self._tail(path))
        return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]

    def _message(self, folder: Path) -> str:
        """Why a job ended: its error line, or the last lines it printed."""
        lines = self._lines(folder / STDERR)
        for line in reversed(lines):
            if line.startswith("xattn: error: "):
                return line.removeprefix("xattn: error: ")
        return "\n".join(lines[-5:])

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One page, and one server on this root, at a time."""
        folder = self.root / JOBS
        with _starting:
            if folder.is_symlink():
                raise JobError(f"{JOBS} is a link; put a folder of this name below the root")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # Not what a link of this name leads to.
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                lock = os.fdopen(os.open(folder / ".lock", flags, 0o644), "r+")
            except OSError as error:
                raise output_error("job", folder, error) from error
            with lock:
                with contextlib.suppress(ImportError):  # not POSIX
                    import fcntl

                    fcntl.flock(lock, fcntl.LOCK_EX)
                yield


_children: dict[int, subprocess.Popen[bytes]] = {}
_starting = threading.Lock()


def model_arguments(model: Any) -> list[str]:
    """The command line's options of ``model``, a ``BackboneArgs``, as far as they are not the defaults."""
    line: list[str] = []
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if value != field.default:
            values = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
            line += [f"--{field.name.replace('_', '-')}", *values]
    return line


def _spec(record: dict[str, Any]) -> Spec:
    known = {field.name for field in dataclasses.fields(Spec)}
    values: dict[str, Any] = {k: v for k, v in record.items() if k in known}
    spec = Spec(**{**values, "heads": tuple(values.get("heads", ()))})
    texts = (spec.data, spec.model, spec.labels, *spec.heads)
    numbers = (spec.epochs, spec.batch_size, spec.seed)
    if spec.kind not in ("train", "probe", "demo") or not all(isinstance(t, str) for t in texts):
        raise ValueError("job")
    if not all(n is None or isinstance(n, int) for n in numbers):
        raise ValueError("job")
    return spec


def _born(pid: int) -> float | None:
    """When a process started, in Unix seconds; None if it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError):
        return None


def _alive(process: dict[str, Any], folder: Path) -> bool:
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


def _time(value: Any) -> float:
    """Unix seconds of a record."""
    if type(value) not in (int, float) or not 0 <= value <= MAX_TIME:
        raise ValueError("time")
    return float(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_number(value: Any) -> bool:
    """Also NaN, which a loss may be."""
    return type(value) in (int, float) and not abs(value) > 1e300
