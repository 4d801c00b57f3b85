"""Jobs: started once, followed, stopped, resumed and found again, whatever happens to their process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake_jobs import fake_job
from PIL import Image

from xattn.app.jobs import jobs as jobs_module
from xattn.app.jobs.job_files import JobError, Spec
from xattn.app.jobs.jobs import Job, Jobs
from xattn.app.pages.train.page import photo_folders
from xattn.cli.model import BackboneArgs
from xattn.packs.reader import load_pack

SPEC = Spec("train", "photos", "tf_efficientnet_lite0", ("ttame",))
# Stands in for the command line: writes a log like that of xattn train, and stops as it does.
RUNNER = """
import json, signal, sys, time
from pathlib import Path
from xattn.app.jobs.job_files import EXIT
folder = Path(sys.argv[1])
line = json.loads((folder / "arguments.json").read_text())
output = Path(line[line.index("--output") + 1])
epochs = int(line[line.index("--epochs") + 1]) if "--epochs" in line else 1000
def end(code):
    (folder / EXIT).write_text(json.dumps({"code": code, "time": time.time()}))
    sys.exit(code)
signal.signal(signal.SIGINT, lambda *_: end(130))
output.mkdir(exist_ok=True)
log = output / "log.jsonl"
first = len(log.read_text().splitlines()) if "--resume" in line else 0
(output / "run.json").write_text("{}")
if epochs == 13:
    print("xattn: error: lr: the loss is not finite", file=sys.stderr)
    end(2)
# After some steps it waits to be stopped: without --epochs always, with many epochs until it is resumed.
waits = first + 3 if "--epochs" not in line else 3 if epochs > 13 and not first else epochs
for step in range(first, waits):
    with log.open("a") as stream:
        stream.write(json.dumps({"step": step + 1, "epoch": step, "loss": 1 / (step + 1)}) + "\\n")
    print(f"{step:3}%|#| {step + 1}/{epochs} [00:01<00:09, 1step/s]", end="\\r", file=sys.stderr)
    sys.stderr.flush()
while waits < epochs:
    time.sleep(60)
end(0)
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    stand_in(tmp_path, monkeypatch)
    photos(tmp_path / "data" / "photos")
    found = Jobs(tmp_path / "root", tmp_path / "data")
    yield found
    end_all(found)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run ``RUNNER``, which is written into ``folder``."""
    (folder / "runner.py").write_text(RUNNER)
    monkeypatch.setattr(jobs_module, "RUNNER", (sys.executable, str(folder / "runner.py")))


def end_all(jobs: Jobs) -> None:
    for job in jobs.all():
        jobs.stop(job.id, at_once=True)
        ended(jobs, job.id)


def photos(folder: Path, count: int = 4) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")


def until(ready: Callable[[], bool], what: Callable[[], str]) -> None:
    """Wait for a state; what does not come in ten minutes hangs."""
    end = time.monotonic() + 600
    while not ready():
        assert time.monotonic() < end, what()
        time.sleep(0.02)


def ended(jobs: Jobs, job_id: str) -> Job:
    until(lambda: not jobs.get(job_id).alive, lambda: jobs.tail(job_id))
    return jobs.get(job_id)


def finished(jobs: Jobs, spec: Spec, name: str) -> Job:
    """A job that has run to its end."""
    fake_job(jobs.root, name, spec, tuple(1 / (i + 1) for i in range(spec.epochs or 0)))
    return jobs.get(name)


def begun(jobs: Jobs, job_id: str, steps: int = 2) -> None:
    until(lambda: len(jobs.losses(job_id)[""]) >= steps, lambda: jobs.tail(job_id))


def pid(jobs: Jobs, job_id: str) -> int:
    return json.loads((jobs.root / "jobs" / job_id / "process.json").read_text())["pid"]


# ---------------------------------------------------------------------- running


def test_a_job_runs_to_its_end(jobs: Jobs) -> None:
    jobs.start(Spec("train", "photos", heads=("ttame",), epochs=5), "mine")
    assert [j.id for j in jobs.all()] == ["mine"]
    job = ended(jobs, "mine")
    assert job.state == "finished" and job.code == 0 and not job.resumable and job.ended
    assert [r["step"] for r in jobs.losses("mine")[""]] == [1, 2, 3, 4, 5]
    assert jobs.progress("mine") == (5, 5, "00:01<00:09, 1step/s")
    assert jobs.tail("mine") == ""  # progress bars are not what was said


def test_stopping_and_resuming_goes_on_from_where_it_was(jobs: Jobs) -> None:
    jobs.start(Spec("train", "photos", heads=("ttame",), epochs=60), "mine")
    begun(jobs, "mine")
    assert jobs.get("mine").state == "running"
    jobs.stop("mine")
    job = ended(jobs, "mine")
    assert job.state == "stopped" and job.resumable
    before = len(jobs.losses("mine")[""])
    assert 2 <= before < 60
    jobs.resume("mine")
    assert ended(jobs, "mine").state == "finished"
    assert [r["step"] for r in jobs.losses("mine")[""]] == list(range(1, 61))


def test_a_failed_job_says_why(jobs: Jobs) -> None:
    jobs.start(Spec("train", "photos", heads=("ttame",), epochs=13), "mine")
    job = ended(jobs, "mine")
    assert job.state == "failed" and job.message == "lr: the loss is not finite"


def test_a_killed_job_is_shown_as_such_and_resumes(jobs: Jobs) -> None:
    jobs.start(Spec("train", "photos", heads=("ttame",), epochs=60), "mine")
    begun(jobs, "mine")
    os.kill(pid(jobs, "mine"), signal.SIGKILL)
    job = ended(jobs, "mine")
    assert job.state == "killed" and job.code is None and job.resumable
    jobs.resume("mine")
    assert ended(jobs, "mine").state == "finished"


def test_a_job_that_does_not_stop_can_be_ended(jobs: Jobs) -> None:
    jobs.start(SPEC, "mine")
    begun(jobs, "mine")
    jobs.stop("mine", at_once=True)
    assert ended(jobs, "mine").state == "killed"


def test_another_server_finds_a_running_job_and_stops_it(jobs: Jobs) -> None:
    """As after a restart: only the files are known."""
    code = (
        "import sys; from pathlib import Path; from xattn.app.jobs import jobs\n"
        f"jobs.RUNNER = {jobs_module.RUNNER!r}\n"
        f"jobs.Jobs(Path({str(jobs.root)!r}), Path({str(jobs.data)!r}))"
        ".start(jobs.Spec('train', 'photos', heads=('ttame',)), 'mine')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert jobs.get("mine").state == "running"
    begun(jobs, "mine")
    jobs.stop("mine")
    assert ended(jobs, "mine").state == "stopped"


def test_another_process_of_the_same_number_is_not_the_job(jobs: Jobs) -> None:
    finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), "mine")
    folder = jobs.root / "jobs" / "mine"
    (folder / "exit.json").unlink()
    record = {"pid": os.getpid(), "born": time.time() - 10**6, "started": 0.0}
    (folder / "process.json").write_text(json.dumps(record))
    assert jobs.get("mine").state == "killed"
    jobs.stop("mine", at_once=True)  # and this test goes on


def test_ctrl_c_of_the_server_does_not_reach_a_job(jobs: Jobs) -> None:
    jobs.start(SPEC, "mine")
    assert os.getpgid(pid(jobs, "mine")) != os.getpgid(0)


# ---------------------------------------------------------------------- starting


def test_two_pages_start_a_job_once(jobs: Jobs) -> None:
    outcomes: list[str] = []

    def start() -> None:
        try:
            outcomes.append(jobs.start(SPEC, "mine").id)
        except JobError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("mine") == 1 and len(jobs.all()) == 1
    assert all("running" in outcome or outcome == "mine" for outcome in outcomes)


def test_one_job_runs_at_a_time(jobs: Jobs) -> None:
    jobs.start(SPEC, "one")
    with pytest.raises(JobError, match="one is running"):
        jobs.start(SPEC, "two")
    begun(jobs, "one")
    jobs.stop("one")
    ended(jobs, "one")
    jobs.start(SPEC, "two")
    with pytest.raises(JobError, match="two is running"):
        jobs.resume("one")


def test_a_name_is_never_used_twice(jobs: Jobs) -> None:
    (jobs.root / "results").mkdir(parents=True)
    assert jobs.free_name("results") == "results-2"
    assert jobs.free_name("Photos of '09 / <b>") == "Photos-of-09-b"
    assert jobs.free_name("") == "head" and jobs.free_name("jobs") == "jobs-2"
    with pytest.raises(JobError, match="taken"):
        jobs.start(SPEC, "results")


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", ".hidden", "-x", "a" * 65, "ä", "a\n"])
def test_names_are_never_paths(jobs: Jobs, name: str) -> None:
    with pytest.raises(JobError):
        jobs.start(SPEC, name)
    with pytest.raises(JobError):
        jobs.get(name)
    assert not jobs.all()


@pytest.mark.parametrize("data", ["..", "../root", "/etc", "photos/../..", "link", "gone"])
def test_photos_are_below_the_data_folder(jobs: Jobs, data: str) -> None:
    (jobs.data / "link").symlink_to("/etc")
    with pytest.raises(JobError, match="data"):
        jobs.start(Spec("train", data, heads=("ttame",)), "mine")
    assert not (jobs.root / "mine").exists() and not jobs.all()


@pytest.mark.parametrize(
    "spec",
    [
        Spec("train", "photos", "--weights", ("ttame",)),
        Spec("train", "photos", "/model.pt", ("ttame",)),
        Spec("train", "photos", "", ()),
        Spec("train", "photos", "", ("ttame", "lcam")),
        Spec("train", "photos", "", ("--output",)),
        Spec("train", "photos", "", ("ttame",), epochs=0),
        Spec("probe", "photos", "", ("gap",), labels="../x.csv"),
    ],
)
def test_nothing_of_a_request_becomes_another_option(jobs: Jobs, spec: Spec) -> None:
    with pytest.raises(JobError):
        jobs.start(spec, "mine")


def test_a_changed_record_runs_nothing_else(jobs: Jobs) -> None:
    finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), "mine")
    folder = jobs.root / "jobs" / "mine"
    record = json.loads((folder / "job.json").read_text())
    record["spec"]["data"] = "../.."
    (folder / "job.json").write_text(json.dumps(record))
    (folder / "exit.json").write_text('{"code": 2}')
    (folder / "arguments.json").write_text('["export", "/tmp/x.pt2"]')
    with pytest.raises(JobError, match="data"):
        jobs.resume("mine")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"spec": {"kind": "rm"}, "created": 0}', '{"spec": "train"}', "\x00"]
)
def test_a_damaged_record_hides_no_other_job(jobs: Jobs, text: str) -> None:
    finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), "good")
    (jobs.root / "jobs" / "bad").mkdir()
    (jobs.root / "jobs" / "bad" / "job.json").write_text(text)
    assert [job.id for job in jobs.all()] == ["good"]
    with pytest.raises(JobError, match="damaged"):
        jobs.get("bad")


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"time": "x"}', '{"code": 0, "time": null}'])
@pytest.mark.parametrize("name", ["job.json", "exit.json", "process.json", "log.jsonl"])
def test_damaged_files_of_a_job_hide_no_other(jobs: Jobs, name: str, deep: str) -> None:
    for job_id in ("good", "bad"):
        finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), job_id)
    folder = jobs.root / "bad" if name == "log.jsonl" else jobs.root / "jobs" / "bad"
    (folder / name).write_text(deep)
    assert "good" in [job.id for job in jobs.all()]
    with contextlib.suppress(JobError):
        jobs.losses("bad")


@pytest.mark.parametrize("created", [float("nan"), float("inf"), 1e300, -1, "1", None])
def test_a_time_that_no_calendar_has_is_a_damaged_record(jobs: Jobs, created: object) -> None:
    folder = jobs.root / "jobs" / "bad"
    folder.mkdir(parents=True)
    record = {"spec": {"kind": "train"}, "created": created}
    (folder / "job.json").write_text(json.dumps(record))
    with pytest.raises(JobError, match="damaged"):
        jobs.get("bad")


def test_only_numbers_of_a_log_are_losses(jobs: Jobs) -> None:
    finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), "mine")
    lines = '{"step": 1, "epoch": "x", "loss": "y"}', '{"step": 2, "loss": NaN}', '{"step": 1e400}'
    (jobs.root / "mine" / "log.jsonl").write_text("\n".join(lines))
    first, second = jobs.losses("mine")[""]
    assert first == {"step": 1} and second["step"] == 2 and second["loss"] != second["loss"]


def test_links_of_a_job_lead_nowhere(jobs: Jobs, tmp_path: Path) -> None:
    """Neither is what they lead to shown, nor is it written over."""
    jobs.start(Spec("train", "photos", heads=("ttame",), epochs=13), "mine")
    ended(jobs, "mine")
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("run.json", "log.jsonl", "key.txt"):
        (secret / name).write_text('{"step": 7, "secret": 1}\n')
    folder = jobs.root / "jobs" / "mine"
    for name in ("stderr.log", "stdout.log"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret / "key.txt")
    (jobs.root / "jobs" / ".lock").unlink()
    (jobs.root / "jobs" / ".lock").symlink_to(secret / "key.txt")
    assert jobs.tail("mine") == jobs.get("mine").message == ""
    with pytest.raises(OSError, match="cannot write"):
        jobs.resume("mine")
    (jobs.root / "jobs" / ".lock").unlink()
    jobs.resume("mine")
    ended(jobs, "mine")
    shutil.rmtree(jobs.root / "mine")
    (jobs.root / "mine").symlink_to(secret)
    assert jobs.losses("mine") == {"": []} and jobs.settings("mine") == {}
    with pytest.raises(JobError, match="link"):
        jobs.resume("mine")
    assert {path.read_text() for path in secret.iterdir()} == {'{"step": 7, "secret": 1}\n'}


def test_jobs_behind_a_link_are_not_started(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    jobs.root.mkdir()
    (jobs.root / "jobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JobError, match="link"):
        jobs.start(SPEC, "mine")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_labels_are_below_the_data_folder(jobs: Jobs) -> None:
    (jobs.data / "photos" / "labels.csv").symlink_to("/etc/passwd")
    with pytest.raises(JobError, match="link to a place outside"):
        jobs.start(Spec("probe", "photos", heads=("gap",), labels="labels.csv"), "mine")


def test_a_record_cannot_name_another_process_to_be_ended(jobs: Jobs) -> None:
    finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), "mine")
    folder = jobs.root / "jobs" / "mine"
    (folder / "exit.json").unlink()
    sleeper = [sys.executable, "-c", "import time; time.sleep(3600)"]
    other = subprocess.Popen(sleeper, start_new_session=True)
    try:
        record = {"pid": other.pid, "born": psutil.Process(other.pid).create_time(), "started": 0}
        (folder / "process.json").write_text(json.dumps(record))
        assert jobs.stop("mine", at_once=True).state == "killed"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    photos(tmp_path / "data" / "photos")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        Jobs(tmp_path / "file", tmp_path / "data").start(SPEC, "mine")


def test_the_command_line_is_the_one_to_copy(jobs: Jobs) -> None:
    model = BackboneArgs(backbone="resnet18", weights="random", taps=("stage.2", "head"))
    line = Jobs(jobs.root, jobs.data, model).preview(Spec("train", "photos", heads=("ttame",)), "x")
    for part in ("xattn train ", "--backbone resnet18", "--weights random", "--taps stage.2 head"):
        assert part in line
    probe = jobs.preview(Spec("probe", "photos", heads=("gap", "abmilp"), batch_size=8), "x")
    assert "xattn probe" in probe and "--heads gap abmilp" in probe and "--batch-size 8" in probe


# ---------------------------------------------------------------------- the real command


def test_a_real_training_leaves_head_log_and_maps(tmp_path: Path) -> None:
    photos(tmp_path / "data" / "photos")
    model = BackboneArgs(backbone="test_efficientnet", weights="random", device="cpu")
    jobs = Jobs(tmp_path / "root", tmp_path / "data", model)
    jobs.start(Spec("train", "photos", heads=("ttame",), epochs=2, batch_size=2), "mine")
    job = ended(jobs, "mine")
    assert job.state == "finished", jobs.tail("mine")
    assert (job.output / "head" / "model.safetensors").is_file()
    assert [r["step"] for r in jobs.losses("mine")[""]] == [1, 2, 3, 4]
    assert {e.method for e in load_pack(job.output / "sample")} == {"step 0", "step 4"}


def test_a_real_probe_leaves_maps_of_each_head(tmp_path: Path) -> None:
    for name in ("wren", "tit"):
        photos(tmp_path / "data" / "photos" / name, 10)
    model = BackboneArgs(backbone="test_efficientnet", weights="random", device="cpu")
    jobs = Jobs(tmp_path / "root", tmp_path / "data", model)
    spec = Spec("probe", "photos", heads=("gap", "abmilp"), epochs=3, batch_size=4)
    jobs.start(spec, "mine")
    job = ended(jobs, "mine")
    assert job.state == "finished", jobs.tail("mine")
    for head in spec.heads:
        names = [e.target_name for e in load_pack(job.output / head / "sample")]
        assert len(names) == 8 and set(names) <= {"wren", "tit"}


# ---------------------------------------------------------------------- folders of photos


def test_folders_of_photos_come_with_their_classes(tmp_path: Path) -> None:
    for name in ("birds/wren", "birds/tit", "cars", ".hidden", "few"):
        photos(tmp_path / name, 2 if name == "few" else 5)
    (tmp_path / "birds" / "labels.csv").write_text("photo,label\n")
    (tmp_path / "out").symlink_to("/")
    photos(tmp_path / "pack" / "overlays")
    (tmp_path / "pack" / "manifest.json").write_text("{}")
    found, whole = photo_folders(tmp_path)
    assert whole and {f.name: f.photos for f in found} == {
        ".": 17,
        "birds": 10,
        "birds/tit": 5,
        "birds/wren": 5,
        "cars": 5,
    }
    birds = next(f for f in found if f.name == "birds")
    assert birds.classes == ("tit", "wren") and birds.labels == ("labels.csv",)


def test_a_missing_data_folder_has_no_photos(tmp_path: Path) -> None:
    assert photo_folders(tmp_path / "none") == ([], True)


# ---------------------------------------------------------------------- renaming and deleting


def test_a_renamed_job_keeps_its_results_and_can_be_resumed(jobs: Jobs) -> None:
    jobs.start(Spec("train", "photos", heads=("ttame",), epochs=300), "mine")
    begun(jobs, "mine")
    jobs.stop("mine")
    steps = ended(jobs, "mine") and len(jobs.losses("mine")[""])
    renamed = jobs.rename("mine", "better")
    assert renamed.state == "stopped" and [job.id for job in jobs.all()] == ["better"]
    assert len(jobs.losses("better")[""]) == steps
    assert not (jobs.root / "mine").exists() and jobs.free_name("mine") == "mine"
    jobs.resume("better")
    begun(jobs, "better", steps + 1)


def test_a_name_that_is_taken_or_malformed_renames_nothing(jobs: Jobs) -> None:
    finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), "mine")
    (jobs.root / "taken").mkdir()
    for name in ("taken", "jobs", "mine", "../up", "a b", "", "-x", "a" * 65):
        with pytest.raises(JobError, match="name: "):
            jobs.rename("mine", name)
    assert jobs.get("mine").output.is_dir()


def test_a_deleted_job_takes_its_record_and_results_and_nothing_else(jobs: Jobs) -> None:
    for name in ("mine", "other"):
        finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), name)
    outside = jobs.root.parent / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    (jobs.root / "mine" / "link").symlink_to(outside)
    jobs.delete("mine")
    assert [job.id for job in jobs.all()] == ["other"]
    assert not (jobs.root / "mine").exists() and (jobs.root / "other").is_dir()
    assert (outside / "kept.txt").read_text() == "kept"
    assert {p.name for p in (jobs.root / "jobs").iterdir()} == {"other", ".lock"}


def test_a_running_job_is_neither_renamed_nor_deleted(jobs: Jobs) -> None:
    jobs.start(SPEC, "mine")
    begun(jobs, "mine")
    for change in (lambda: jobs.rename("mine", "better"), lambda: jobs.delete("mine")):
        with pytest.raises(JobError, match="mine is running; it can only be"):
            change()
    assert jobs.get("mine").alive


def test_results_behind_a_link_are_not_deleted(jobs: Jobs) -> None:
    job = finished(jobs, Spec("train", "photos", heads=("ttame",), epochs=2), "mine")
    outside = jobs.root.parent / "outside"
    job.output.rename(outside)
    job.output.symlink_to(outside)
    with pytest.raises(JobError, match="link"):
        jobs.delete("mine")
    assert (outside / "log.jsonl").is_file() and jobs.get("mine").state == "finished"


@pytest.mark.parametrize("name", ["..", "../data", "gone", "a/b", ""])
def test_what_is_no_job_is_not_deleted(jobs: Jobs, name: str) -> None:
    before = sorted(jobs.data.rglob("*"))
    with pytest.raises(JobError):
        jobs.delete(name)
    assert sorted(jobs.data.rglob("*")) == before
