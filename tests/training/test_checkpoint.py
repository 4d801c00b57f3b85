"""Checkpoints on a bad disk: damage is noticed, the one before it is taken, and said in one line."""

from __future__ import annotations

import json

import pytest
import torch
from training_runs import write_photos

import xattn
from xattn.config import ProbeConfig, TrainConfig
from xattn.heads import create_head
from xattn.training import fit
from xattn.training import fitting as fit_module
from xattn.training import probe as probe_module
from xattn.training.features import cache_features
from xattn.training.probe import probe
from xattn.training.run_folder import cut_log, load_checkpoint, save_checkpoint


def state_of(step):
    return {"step": step, "head": {"weight": torch.arange(40.0) + step}}


def saved(folder, *steps):
    for step in steps:
        save_checkpoint(folder, step, state_of(step))
    return folder


def flip(path, place=0.5):
    """One bit of the byte at ``place`` of the file."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.glob("step-*"))


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("file", ["state.pt", "state.pt.sha256"])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_taken(tmp_path, file, place):
    saved(tmp_path, 1, 2, 3)
    digits = 0.8 if file == "state.pt.sha256" else 1.0  # behind them the name of the file follows
    flip(tmp_path / "step-00000003" / file, digits * place)
    with pytest.warns(UserWarning, match="step-00000003.*damaged.*from step-00000002") as told:
        state = load_checkpoint(tmp_path)
    assert len(told) == 1
    assert torch.equal(state["head"]["weight"], state_of(2)["head"]["weight"])


def test_without_a_whole_checkpoint_one_line_names_them_and_the_remedy(tmp_path):
    saved(tmp_path, 1, 2)
    for name in names(tmp_path):
        flip(tmp_path / name / "state.pt")
    with pytest.raises(ValueError, match="step-00000002.*step-00000001.*new output") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["state.pt", "state.pt.sha256"])
def test_a_checkpoint_without_its_state_or_checksum_is_passed_over(tmp_path, file):
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / file).unlink()
    with pytest.warns(UserWarning, match="step-00000002.*damaged.*from step-00000001"):
        assert load_checkpoint(tmp_path)["step"] == 1


@pytest.mark.parametrize("text", ["../..\n", None])
def test_a_damaged_pointer_changes_nothing(tmp_path, text):
    saved(tmp_path, 1, 2)
    (tmp_path / "latest").write_text(text) if text is not None else (tmp_path / "latest").unlink()
    assert load_checkpoint(tmp_path)["step"] == 2


def test_a_pointer_without_checkpoints_is_an_error_and_an_empty_folder_is_not(tmp_path):
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "latest").write_text("step-00000002\n")
    with pytest.raises(ValueError, match="no longer contains a checkpoint.*new output"):
        load_checkpoint(tmp_path)


def test_two_checkpoints_are_kept_and_a_damaged_one_does_not_push_out_a_whole_one(tmp_path):
    saved(tmp_path, 2, 4, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]
    flip(tmp_path / "step-00000006/state.pt")
    saved(tmp_path, 5)  # the run went on from 4
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), 8)


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """kind -> (where its steps are taken, the function's name there, function that trains into a folder)."""
    torch.manual_seed(0)
    cnn = xattn.load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)
    cached = tmp_path_factory.mktemp("features") / "f"
    with_head = cnn.with_taps(["head"])
    features = cache_features(with_head, photos, cached, progress=False)

    def fitting(folder, resume=False):
        torch.manual_seed(1)
        config = TrainConfig(epochs=2, batch_size=2, workers=0, lr=0.01, checkpoint_every=2)
        head = create_head("ttame", cnn)
        return fit(head, cnn, photos, config, output=folder, resume=resume, progress=False).head

    def probing(folder, resume=False):
        torch.manual_seed(1)
        config = ProbeConfig("small", epochs=4, batch_size=3, checkpoint_every=2)
        head = create_head("efficient_probe", with_head, classes=2, queries=2)
        labels = torch.arange(8) % 2
        return probe(
            head, features, labels, config, train=range(6), validation=range(6, 8), output=folder,
            resume=resume, progress=False,
        ).head  # fmt: skip

    return {
        "fit": (fit_module.PhotosJob, "step", fitting),
        "probe": (probe_module, "_step", probing),
    }


def killed(owner, name, train, folder, step, monkeypatch):
    """Train until ``step`` steps are done."""
    real, calls = getattr(owner, name), []

    def dying(*args):
        calls.append(1)
        if len(calls) > step:
            raise SystemError("killed")
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(owner, name, dying)
        train(folder)


@pytest.mark.parametrize("kind", ["fit", "probe"])
def test_a_run_goes_on_bit_for_bit_from_the_checkpoint_before_the_damaged_one(
    runs, tmp_path, monkeypatch, kind
):
    *where, train = runs[kind]
    whole = train(tmp_path / "whole")
    killed(*where, train, tmp_path / "run", 5, monkeypatch)
    folder = tmp_path / "run/checkpoints"
    assert names(folder) == ["step-00000002", "step-00000004"]
    flip(folder / "step-00000004/state.pt")
    log = tmp_path / "run/log.jsonl"
    log.write_text('[1]\n3\n"step"\n{"step": "x"}\n{"epoch": 1}\n' + log.read_text() + '{"st')
    with pytest.warns(UserWarning) as told:
        resumed = train(tmp_path / "run", resume=True)
    texts = [str(w.message) for w in told if str(w.message).startswith("resume:")]
    assert len(texts) == 1, texts
    assert "step-00000004" in texts[0] and "step-00000002" in texts[0]
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_what_is_no_record_leaves_the_log(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n\xff mine\n{"step": 2}\n[1]\n{"step": 3}\n{"st')
    cut_log(tmp_path, 2)
    assert log.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
