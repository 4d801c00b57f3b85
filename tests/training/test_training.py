"""Training on photos: pure augmentation, an untouched backbone, resume after a kill."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing import active_children
from multiprocessing.connection import wait

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import check_killed_and_resumed, write_photos, write_weights

import xattn
from xattn.config import TrainConfig
from xattn.heads import create_head, load_head
from xattn.photos.sources import Files, open_photos
from xattn.training import data as photo_batches
from xattn.training import fit
from xattn.training.data import TrainImages, epoch_batches
from xattn.training.objectives.mask import Mask
from xattn.training.optimizers import head_optimizer, one_cycle


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- data


def test_augmentation_is_a_pure_function(tmp_path, backbone):
    folder = write_photos(tmp_path / "p", 3)
    paths = sorted(folder.iterdir())
    first = TrainImages(paths, backbone.preprocessing, seed=4)
    torch.rand(5), np.random.rand(5)
    again = TrainImages(paths, backbone.preprocessing, seed=4)
    assert torch.equal(first[2, 1][1], again[2, 1][1])
    views = [first[epoch, 1][1] for epoch in range(6)]
    assert len({v.numpy().tobytes() for v in views}) > 3
    other = TrainImages(paths, backbone.preprocessing, seed=5)
    assert not torch.equal(first[2, 1][1], other[2, 1][1])
    plain = TrainImages(paths, backbone.preprocessing, seed=4, augment=False)
    assert torch.equal(plain[0, 1][1], plain[7, 1][1])


@pytest.mark.parametrize("size", [(1, 1), (8000, 20), (20, 900)])
def test_extreme_photos_are_augmented_to_the_input_size(tmp_path, backbone, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "x.png")
    image = TrainImages([tmp_path / "x.png"], backbone.preprocessing, seed=0)[0, 0][1]
    assert image.shape == (3, 64, 64) and image.isfinite().all()
    assert image[1].mean().item() == pytest.approx(200 / 255, abs=0.01)


def test_epochs_visit_every_image_once_and_processes_share_them():
    ten, nine = (open_photos([f"{i}.png" for i in range(n)]) for n in (10, 9))
    for epoch in (0, 1):
        keys = [k for batch in epoch_batches(ten, 4, 0, epoch) for k in batch]
        assert sorted(keys) == [(epoch, i) for i in range(10)]
    whole = epoch_batches(ten, 4, 0, 0)
    assert epoch_batches(ten, 4, 0, 0, first=2) == whole[2:]
    halves = [epoch_batches(nine, 2, 0, 0, rank=r, ranks=2) for r in (0, 1)]
    assert [[len(b) for b in h] for h in halves] == [[2, 2, 1], [2, 2, 0]]
    assert sorted(i for h in halves for b in h for _, i in b) == list(range(9))


@pytest.mark.parametrize(
    ("started", "workers", "opened"),
    [(2, 2, 1), (0, 0, 1), (1, 2, 1), (4, 2, 4), (4, 3, 8), (4, 0, 8)],
)
def test_a_worker_opens_two_shards_of_each_of_several_streams(
    tmp_path, backbone, monkeypatch, started, workers, opened
):
    photos = open_photos(write_photos(tmp_path / "p", 4))
    monkeypatch.setattr(photos, "streamed", True)
    monkeypatch.setattr(photo_batches, "first_workers", lambda resumed, now: started)
    config = TrainConfig(workers=workers, batch_size=4)
    batches = photo_batches.PhotoBatches(photos, backbone.preprocessing, config, 0, 1, None)
    assert batches.photos.open_shards == opened


# ---------------------------------------------------------------- fit


def test_training_moves_the_head_and_leaves_the_backbone(tmp_path, backbone):
    folder = write_photos(tmp_path / "p", 6)
    head = create_head("ttame", backbone)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    rng = torch.get_rng_state()
    config = TrainConfig(epochs=2, batch_size=4, workers=0, lr=0.01)
    result = fit(head, backbone, folder, config, output=tmp_path / "run", progress=False)
    assert result.steps == 4 and not head.training
    assert torch.equal(rng, torch.get_rng_state())
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert any(not torch.equal(v, before[k]) for k, v in head.state_dict().items())
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    loaded = load_head(tmp_path / "run/head", backbone)
    taps = backbone(rand(1, 3, 64, 64))
    assert torch.equal(loaded(taps), head(taps))
    assert loaded.summary["steps"] == 4


def test_dropout_differs_by_step_and_by_seed_and_is_alike_in_every_run(tmp_path, backbone):
    folder = write_photos(tmp_path / "p", 6)

    def draws(seed):
        found = []
        head = create_head("ttame", backbone)
        head.register_forward_hook(lambda *_: found.append(torch.rand(1).item()))
        torch.rand(1)  # of the caller's generator, which is no part of it
        config = TrainConfig(epochs=2, batch_size=3, workers=0, seed=seed)
        fit(head, backbone, folder, config, progress=False)
        return found

    first = draws(0)
    assert len(set(first)) == len(first) == 4
    assert draws(0) == first and not set(draws(1)) & set(first)


def test_unreadable_images_are_skipped_counted_and_listed(tmp_path, backbone):
    folder = write_photos(tmp_path / "p", 5)
    (folder / "broken.jpg").write_bytes(b"not a picture")
    head = create_head("ttame", backbone)
    config = TrainConfig(epochs=2, batch_size=2, workers=0)
    result = fit(head, backbone, folder, config, output=tmp_path / "run", progress=False)
    assert [p.endswith("broken.jpg") for p, _ in result.skipped] == [True]
    assert len(json.loads((tmp_path / "run/skipped.json").read_text())) == 1
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.jpg").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the 1 images"):
        fit(head, backbone, tmp_path / "bad", config, progress=False)


def test_a_folder_that_is_taken_is_refused(tmp_path, backbone):
    folder = write_photos(tmp_path / "p", 2)
    head = create_head("ttame", backbone)
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.txt").write_text("x")
    with pytest.raises(ValueError, match="output.*holds no run"):
        fit(head, backbone, folder, config, output=tmp_path / "mine", progress=False)
    with pytest.raises(ValueError, match="resume.*no run"):
        fit(head, backbone, folder, config, output=tmp_path / "new", resume=True, progress=False)
    fit(head, backbone, folder, config, output=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="holds a run already"):
        fit(head, backbone, folder, config, output=tmp_path / "run", progress=False)
    other = TrainConfig(epochs=2, batch_size=2, workers=0)
    with pytest.raises(ValueError, match="other settings"):
        fit(head, backbone, folder, other, output=tmp_path / "run", resume=True, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output"):
        fit(head, backbone, folder, config, output=tmp_path / "file/run", progress=False)


def test_two_runs_into_one_folder_are_refused(tmp_path, backbone, held_elsewhere):
    folder = write_photos(tmp_path / "p", 2)
    head = create_head("ttame", backbone)
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    fit(head, backbone, folder, config, output=tmp_path / "run", progress=False)
    with held_elsewhere(tmp_path / "run"), pytest.raises(ValueError, match="another run"):
        fit(head, backbone, folder, config, output=tmp_path / "run", resume=True, progress=False)
    fit(head, backbone, folder, config, output=tmp_path / "run", resume=True, progress=False)


def test_ctrl_c_in_the_middle_of_a_step_resumes_to_bit_identical_weights(
    tmp_path, backbone, monkeypatch
):
    folder = write_photos(tmp_path / "p", 8)
    config = TrainConfig(epochs=2, batch_size=2, workers=0, lr=0.01)

    def fresh(seed=3):
        return fresh_head(backbone, seed)

    whole = fit(fresh(), backbone, folder, config, output=tmp_path / "whole", progress=False).head
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return on_photos(*args, **kwargs)

    monkeypatch.setattr(Mask, "on_photos", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(fresh(), backbone, folder, config, output=tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGINT) == handler
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000003\n"
    # The head that resumes may start anywhere: its state comes from the checkpoint.
    resumed = fit(
        fresh(9), backbone, folder, config, output=tmp_path / "run", resume=True, progress=False
    )
    assert_equal_heads(whole, resumed.head)
    again = fit(
        fresh(), backbone, folder, config, output=tmp_path / "run", resume=True, progress=False
    )
    assert again.losses == resumed.losses != {}


def assert_equal_heads(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def at_call(monkeypatch, actions):
    """``actions[n]`` happens in the middle of training step n."""
    calls = []

    def disturbed(*args, **kwargs):
        calls.append(1)
        actions.get(len(calls), list)()
        return on_photos(*args, **kwargs)

    monkeypatch.setattr(Mask, "on_photos", disturbed)


on_photos = Mask.on_photos


@pytest.fixture
def impatient(monkeypatch):
    """torch looks every 5 s whether its loader processes are alive; for tests that is long."""
    poll = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(poll, "__defaults__", (0.2,), raising=False)


def fresh_head(backbone, seed=3):
    torch.manual_seed(seed)
    return create_head("ttame", backbone)


def kill_a_worker():
    """As the out-of-memory killer does, while the main process is in a step."""
    pid = active_children()[0].pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # SIGCHLD arrives; the process stays a zombie


def test_a_killed_loader_process_is_replaced_and_nothing_changes(
    tmp_path, backbone, monkeypatch, impatient
):
    folder = write_photos(tmp_path / "p", 24)
    config = TrainConfig(epochs=1, batch_size=2, workers=2, lr=0.01)
    whole = fit(fresh_head(backbone), backbone, folder, config, progress=False)
    handler = signal.getsignal(signal.SIGCHLD)
    running = []
    actions = {3: kill_a_worker, 8: lambda: running.extend(active_children())}
    at_call(monkeypatch, actions)
    with pytest.warns(UserWarning, match="workers: a loader process died .*nothing is lost"):
        run = fit(fresh_head(backbone), backbone, folder, config, output=tmp_path / "run",
                  progress=False)  # fmt: skip
    assert_equal_heads(whole.head, run.head)
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert len(running) == 2 and not active_children()


class Deadly(Files):
    """Photos one of which ends or fails the process that reads it, as long as ``marker`` is there."""

    def __init__(self, paths, marker, how):
        super().__init__(paths)
        self.marker, self.how = marker, how

    def load(self, index, max_pixels=None):
        if index == 7 and self.marker.exists():
            if self.how == "exception":
                raise RuntimeError("a bug in the decoder")
            os._exit(9)
        return super().load(index, max_pixels)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("exception", "a bug in the decoder"),
        ("exit", "(exited unexpectedly|Connection reset by peer)"),  # whichever torch meets first
    ],
)
def test_loader_processes_that_always_die_end_the_run_with_a_checkpoint(
    tmp_path, backbone, impatient, how, reason
):
    paths = sorted(write_photos(tmp_path / "p", 10).iterdir())
    marker = tmp_path / "marker"
    marker.touch()
    photos = Deadly(paths, marker, how)
    place = photos.order(0, 0).index(7)
    config = TrainConfig(epochs=1, batch_size=1, workers=1, lr=0.01)
    shared = {"config": config, "output": tmp_path / "run", "progress": False}
    gc.disable()  # old loaders end by themselves
    with (
        pytest.warns(UserWarning) as warned,
        pytest.raises(
            ChildProcessError, match=f"^workers: .*died 4 times.*{reason}.*use fewer workers than"
        ),
    ):
        fit(fresh_head(backbone), backbone, photos, **shared)
    running = active_children()
    gc.enable()
    assert not running
    # One more where the first death took the batch before with it.
    assert sum("a loader process died" in str(w.message) for w in warned) in (3, 4)
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{place:08d}\n"
    marker.unlink()
    resumed = fit(fresh_head(backbone, 9), backbone, photos, resume=True, **shared)
    whole = fit(fresh_head(backbone), backbone, paths, config, progress=False)
    assert_equal_heads(whole.head, resumed.head)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_to_the_whole_process_group_ends_with_a_checkpoint(
    tmp_path, backbone, monkeypatch, impatient, number, error
):
    folder = write_photos(tmp_path / "p", 12)
    config = TrainConfig(epochs=2, batch_size=2, workers=2, lr=0.01)
    whole = fit(fresh_head(backbone), backbone, folder, config, progress=False)

    def to_all():
        children = active_children()
        for _ in range(2):  # once from the terminal, once from a launcher
            for child in children:
                os.kill(child.pid, number)
        os.kill(os.getpid(), number)
        if number == signal.SIGINT:  # batches under way are still to come
            assert not wait([child.sentinel for child in children], timeout=0.2)
        else:
            for child in children:
                child.join(600)
        assert [child.is_alive() for child in children] == [number == signal.SIGINT] * 2

    with monkeypatch.context() as patch, warnings.catch_warnings(), pytest.raises(error):
        warnings.simplefilter("error")
        at_call(patch, {5: to_all})
        fit(fresh_head(backbone), backbone, folder, config, output=tmp_path / "run", progress=False)
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000005\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = fit(fresh_head(backbone, 9), backbone, folder, config, output=tmp_path / "run",
                  resume=True, progress=False)  # fmt: skip
    assert_equal_heads(whole.head, resumed.head)


def test_an_accelerator_of_the_caller_is_left_as_it_was(tmp_path, backbone):
    from accelerate import Accelerator

    folder = write_photos(tmp_path / "p", 2)
    own = Accelerator(cpu=True, gradient_accumulation_steps=3)
    try:
        for precision in ("bf16", "no"):
            config = TrainConfig(epochs=1, batch_size=2, workers=0, precision=precision)
            fit(fresh_head(backbone), backbone, folder, config, progress=False)
        assert own.device.type == "cpu" and own.mixed_precision == "no"
        assert own.gradient_accumulation_steps == 3
    finally:
        own.state._reset_state(reset_partial_state=True)
        own.gradient_state._reset_state()


@pytest.mark.parametrize("workers", [2])
def test_a_disk_that_goes_away_ends_the_run_and_its_return_resumes_it(
    tmp_path, backbone, monkeypatch, workers
):
    paths = sorted(write_photos(tmp_path / "p", 10).iterdir())
    paths[3].write_bytes(b"no")
    config = TrainConfig(epochs=3, batch_size=2, workers=workers, lr=0.01)
    whole = fit(fresh_head(backbone), backbone, paths, config, progress=False)
    with monkeypatch.context() as patch:
        at_call(patch, {10: lambda: (tmp_path / "p").rename(tmp_path / "away")})
        with pytest.raises(OSError, match="^data: .*no longer be read .image: no file .*resume"):
            fit(fresh_head(backbone), backbone, paths, config, output=tmp_path / "run",
                progress=False)  # fmt: skip
    (tmp_path / "away").rename(tmp_path / "p")
    resumed = fit(fresh_head(backbone, 9), backbone, paths, config, output=tmp_path / "run",
                  resume=True, progress=False)  # fmt: skip
    assert resumed.steps == 15 and [name for name, _ in resumed.skipped] == [str(paths[3])]
    assert_equal_heads(whole.head, resumed.head)


def test_single_photos_that_vanish_are_skipped(tmp_path, backbone, monkeypatch):
    paths = sorted(write_photos(tmp_path / "p", 6).iterdir())
    config = TrainConfig(epochs=2, batch_size=1, workers=0, lr=0.01)
    at_call(monkeypatch, {6: paths[2].unlink})
    run = fit(fresh_head(backbone), backbone, paths, config, progress=False)
    assert run.steps == 12 and [name for name, _ in run.skipped] == [str(paths[2])]


def test_a_head_may_ask_for_other_learning_rates(backbone):
    head = create_head("ttame", backbone)
    names = dict(head.named_parameters())
    own = next(name for name in names if name.endswith("weight"))
    head.learning_rates = {own: 10.0}
    optimizer = head_optimizer(head, TrainConfig("small", lr=0.02, weight_decay=0.1))
    one_cycle(optimizer, 100)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(names)
    for name, parameter in names.items():
        group = group_of[id(parameter)]
        assert group["max_lr"] == pytest.approx(0.2 if name == own else 0.02)
        assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.1)


def test_an_unreadable_first_batch_warns_of_nothing(tmp_path, backbone):
    paths = sorted(write_photos(tmp_path / "p", 3).iterdir())
    paths[open_photos(paths).order(0, 0)[0]].write_bytes(b"no")
    config = TrainConfig(epochs=1, batch_size=1, workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(create_head("ttame", backbone), backbone, paths, config, progress=False)
    assert len(result.skipped) == 1 and result.steps == 3


def test_resume_refuses_other_images(tmp_path, backbone):
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    head = create_head("ttame", backbone)
    one, two = write_photos(tmp_path / "one", 3), write_photos(tmp_path / "two", 3, (40, 40))
    fit(head, backbone, one, config, output=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="resume"):
        fit(head, backbone, two, config, output=tmp_path / "run", resume=True, progress=False)


def test_a_diverging_run_stops_and_names_the_learning_rate(tmp_path, backbone):
    config = TrainConfig(epochs=20, batch_size=2, workers=0, lr=1e30)
    with pytest.raises(ValueError, match="lr"):
        fit(
            create_head("ttame", backbone),
            backbone,
            write_photos(tmp_path / "p", 4),
            config,
            progress=False,
        )


def test_tensorboard_events_are_written_where_it_is_installed(tmp_path, backbone):
    pytest.importorskip("tensorboard")
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    fit(create_head("ttame", backbone), backbone, write_photos(tmp_path / "p", 2), config,
        output=tmp_path / "run", progress=False)  # fmt: skip
    assert list((tmp_path / "run/tensorboard").glob("events.*"))


FULL_DISK = """
import resource, sys, torch, xattn
from xattn.heads import create_head
from xattn.config import TrainConfig
torch.manual_seed(0)
backbone = xattn.load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)
head = create_head("ttame", backbone)
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    xattn.fit(head, backbone, sys.argv[1], config, output=sys.argv[2], progress=False)
except OSError as error:
    assert "output: cannot write" in str(error), error
    print("refused")
"""


def test_a_full_disk_is_one_clear_error(tmp_path):
    """Every write beyond 20 kB fails in the child, as on a full disk."""
    folder = write_photos(tmp_path / "p", 2)
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder), str(tmp_path / "out")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.strip().endswith("refused"), run.stdout + run.stderr


TWO_PROCESSES = """
import os, signal, sys, torch, xattn
from pathlib import Path
from accelerate import PartialState
from xattn.config import TrainConfig
from xattn.heads import create_head
from xattn.photos.sources import open_photos
from xattn.training.data import epoch_batches
from xattn.training.objectives.mask import Mask

weights, data, out = sys.argv[1:]
backbone = xattn.load_backbone("test_efficientnet", weights=weights, input_size=64)
config = TrainConfig(epochs=2, batch_size=1, workers=0, lr=0.01)
on_photos, calls = Mask.on_photos, []

def fit(name, seed=0, at=0, head="ttame", **kwargs):
    def counted(*args):
        calls.append(1)
        if len(calls) == at and PartialState().process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return on_photos(*args)

    calls.clear()
    Mask.on_photos = counted
    torch.manual_seed(seed)
    head = create_head(head, backbone)
    return xattn.fit(head, backbone, data, kwargs.pop("config", config), output=f"{out}/{name}",
                     progress=False, **kwargs)

def same(tensor):
    both = [torch.zeros_like(tensor) for _ in range(2)]
    torch.distributed.all_gather(both, tensor)
    return torch.equal(*both)

whole = fit("whole")
steps = len(calls)  # of six, one may have had nothing but the broken photo
assert PartialState().num_processes == 2
assert [p.split("/")[-1] for p, _ in whole.skipped] == ["broken.png"], whole.skipped
assert all(same(v.detach()) for v in whole.head.state_dict().values())
assert same(torch.tensor(list(whole.losses.values())))
# BatchNorm counts the steps in which any process had a photo; the broken one is number 4.
keys = [[k for rank in (0, 1) for k in epoch_batches(open_photos(data), 1, 0, epoch, first, rank, 2)[0]]
        for epoch in (0, 1) for first in range(3)]
seen = sum(any(index != 4 for _, index in batch) for batch in keys)
assert {int(v) for k, v in whole.head.state_dict().items() if k.endswith("tracked")} == {seen}
try:
    fit("run", at=4)
    raise SystemExit("was not interrupted")
except KeyboardInterrupt:  # Ctrl-C in one process ends both after the same step
    assert len(calls) == 4, calls
torch.distributed.barrier()
last = (Path(out) / "run/checkpoints/latest").read_text()
assert int(last[5:]) == len((Path(out) / "run/log.jsonl").read_text().splitlines()) in (4, 5)
resumed = fit("run", seed=9, resume=True)
assert len(calls) == steps - 4 and resumed.skipped == whole.skipped
for a, b in zip(whole.head.state_dict().values(), resumed.head.state_dict().values()):
    assert torch.equal(a, b)
try:
    fit("run", resume=True, config=TrainConfig(epochs=3, batch_size=1, workers=0, lr=0.01))
    raise SystemExit("was not refused")
except ValueError as error:
    assert "other settings" in str(error)
fit("bf16", config=TrainConfig(epochs=1, batch_size=4, workers=0, precision="bf16"))
print("agreed")
"""


def launch(script, *arguments):
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(script), *map(str, arguments),
    ]  # fmt: skip


CPU = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def test_two_processes_train_one_head_stop_together_and_resume(tmp_path, backbone):
    weights = write_weights(tmp_path / "w.safetensors", backbone)
    folder = write_photos(tmp_path / "p", 4)
    (folder / "broken.png").write_bytes(b"no")
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    run = subprocess.run(
        launch(tmp_path / "job.py", weights, folder, tmp_path),
        env=CPU, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.stdout.count("agreed") == 2, run.stdout + run.stderr
    for name in ("whole", "run"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        state = tmp_path / name / "checkpoints"
        assert (state / "latest").read_text() == "step-00000006\n"
        assert {p.name for p in state.iterdir()} <= {"latest", *(f"step-{s:08d}" for s in range(7))}
    head = create_head("ttame", backbone)
    config = TrainConfig(epochs=2, batch_size=1, workers=0, lr=0.01)
    with pytest.raises(ValueError, match="other settings"):  # one process goes on with two's run
        fit(head, backbone, folder, config, output=tmp_path / "run", resume=True, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_ends_all_processes_at_one_step(tmp_path, backbone, number):
    from safetensors.torch import load_file

    weights = write_weights(tmp_path / "w.safetensors", backbone)
    command = [
        "train", write_photos(tmp_path / "p", 24), "--backbone", "test_efficientnet",
        "--input-size", "64", "--weights", weights, "--epochs", "3", "--batch-size", "2", "--lr",
        "0.01", "--recipe", "published", "--workers", "2", "--device", "cpu", "--output",
    ]  # fmt: skip
    job = launch("-m", "xattn", *command)
    whole = subprocess.run([*job, str(tmp_path / "whole")], env=CPU, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    log = tmp_path / "run/log.jsonl"
    process = subprocess.Popen(
        [*job, str(tmp_path / "run")],
        env=CPU,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) > 3:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    seen = len(log.read_text().splitlines())
    assert process.returncode != 0 and 3 < seen < 18, errors
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{seen:08d}\n", errors
    again = subprocess.run(
        [*job, str(tmp_path / "run"), "--resume"], env=CPU, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    a, b = (load_file(str(tmp_path / n / "head/model.safetensors")) for n in ("whole", "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "field", ["epochs", "batch_size", "lr", "workers", "optimizer", "precision"]
)
def test_bad_settings_name_the_argument(field):
    bad = {"optimizer": "lamb", "precision": "fp8", "workers": -1}.get(field, 0)
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: bad})


def test_a_head_of_another_backbone_is_refused(tmp_path, backbone):
    torch.manual_seed(9)
    other = xattn.load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)
    with pytest.raises(ValueError, match="sha256"):
        fit(create_head("ttame", other), backbone, write_photos(tmp_path / "p", 2), progress=False)


def test_a_killed_run_resumes_to_bit_identical_weights(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = xattn.load_backbone("test_efficientnet", weights=None, num_classes=7).model
    save_file(model.state_dict(), str(tmp_path / "w.safetensors"))
    data = write_photos(tmp_path / "p", 24)
    command = [
        str(data), "--backbone", "test_efficientnet", "--input-size", "64",
        "--weights", str(tmp_path / "w.safetensors"), "--head", "ttame", "--epochs", "4",
        "--batch-size", "4", "--checkpoint-every", "2", "--lr", "0.01",
    ]  # fmt: skip
    check_killed_and_resumed(command, tmp_path, 24, {"OMP_NUM_THREADS": "1"})
