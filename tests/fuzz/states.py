"""What runs leave and go on from: run records, logs, checkpoints, features."""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from synthetic_packs import picture

from fuzz.engine import target
from fuzz.heads import network
from fuzz.labels import nasty_json
from xattn.config import TrainConfig
from xattn.eval.probing import check_results
from xattn.heads import create_head
from xattn.parts import cut_parts
from xattn.training import fit
from xattn.training.features import cache_features
from xattn.training.run_folder import claim

QUICK = TrainConfig(recipe="small", epochs=2, batch_size=2, workers=0, checkpoint_every=1)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def put(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def photos(folder: Path, count: int = 2) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        picture(i, (40, 24)).save(path)
    return paths


def edited(data: bytes, change: Callable[[Any], object]) -> bytes:
    record = json.loads(data)
    change(record)
    return json.dumps(record).encode()


# ---------------------------------------------------------------------- training


def _fit(folder: Path, resume: bool, steps: int | None = None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = create_head("ttame", network(), fusion="per_class")

    def stop(step: int, _: Any) -> None:
        if step == steps:
            raise InterruptedError

    fit(
        head,
        network(),
        folder / "photos",
        QUICK,
        output=folder / "run",
        resume=resume,
        progress=False,
        on_checkpoint=stop,
    )


@functools.cache
def run_files() -> dict[str, bytes]:
    """A run that was stopped after its first step, and its photos."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos(folder / "photos")
        try:
            _fit(folder, False, 1)
        except InterruptedError:
            pass
        return files_of(folder)


def _run(folder: Path) -> None:
    put(run_files(), folder)


def _resume(folder: Path) -> None:
    _fit(folder, True)


def state_name() -> str:
    return max(name for name in run_files() if name.endswith("state.pt"))


def _nasty_runs() -> list[bytes]:
    whole = run_files()["run/run.json"]
    return [
        edited(whole, lambda r: r.update(train=[])), edited(whole, lambda r: r.update(head=None)), edited(whole, lambda r: r.pop("train")),
        edited(whole, lambda r: r["train"].update(workers="x")), edited(whole, lambda r: r["train"].update(workers=-5)), edited(whole, lambda r: r.update(images=5)),
        *nasty_json(),
    ]  # fmt: skip


target(
    "run record",
    "run/run.json",
    lambda: [run_files()["run/run.json"]],
    _nasty_runs,
    template=_run,
    says="resume: ",
    share=0.6,
)(_resume)


def _claim(folder: Path) -> None:
    """What :func:`_resume` does with the log, without training."""
    record = json.loads(run_files()["run/run.json"])
    with claim(folder / "run", record, True, True) as (log, _):
        assert log is not None


target(
    "log",
    "run/log.jsonl",
    lambda: [run_files()["run/log.jsonl"]],
    lambda: [b"5\n", b"null\n", b"[]\n", b'"step"\n', b'{"step": "x"}\n', b'{"step": null}\n', b'{"step": [1]}\n', b'{"step": NaN}\n', b'{"step": 1e999}\n',
             b'{"step": true}\n', b"\xff\xfe\n", b"\n" * 1000, "\u2028\u0085".encode(), b'{"step": ' + b"9" * 5000 + b"}\n",
             *(data + b"\n" for data in nasty_json())],
    template=_run,
    share=1,
)(_claim)  # fmt: skip


target("newest checkpoint", "run/checkpoints/latest", lambda: [run_files()["run/checkpoints/latest"]],
        lambda: [b"", b"\n", b"..", b"../..", b"/", b"step-", b"step-00000000", b"step-" + b"9" * 5000, b"\xff", b"\0", b"step-1\nstep-2", "step-²".encode(),
                 "step-١".encode(), b"x" * 5000, b"checkpoints"],
        kind="text", template=_run, says="resume: |output: ", share=0.5)(_resume)  # fmt: skip


@target(
    "checkpoint",
    "state.pt",
    lambda: [run_files()[state_name()]],
    lambda: [b"", b"PK\3\4", b"\x80\x02."],
    template=_run,
    says="resume: ",
    share=0.4,
)
def checkpoint(folder: Path) -> None:
    (folder / "state.pt").replace(folder / state_name())
    _resume(folder)


# ---------------------------------------------------------------------- cached features


@functools.cache
def feature_files() -> dict[str, bytes]:
    """Features of two photos."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache_features(network(), photos(folder / "photos"), folder / "features", progress=False)
        return files_of(folder / "features")


def _features(folder: Path) -> None:
    put(feature_files(), folder / "features")


def _open(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is damaged is named, and computed again
        found = cache_features(
            network(), photos(folder / "photos"), folder / "features", progress=False
        )
    found.taps(range(len(found)))
    list(found.skipped)


target(
    "features shard",
    "features/rows-00000000-00000002.safetensors",
    lambda: [feature_files()["rows-00000000-00000002.safetensors"]],
    lambda: [],
    template=_features,
    says="features: ",
    share=1.5,
)(_open)


def _nasty_keys() -> list[bytes]:
    whole = feature_files()["key.json"]
    return [
        edited(whole, lambda r, c=change: r.update(c))
        for change in (
            {"dtype": "x"},
            {"dtype": 5},
            {"dtype": "O"},
            {"crops": 0},
            {"crops": "x"},
            {"crops": 10**9},
            {"format": 99},
        )
    ] + nasty_json()


target(
    "features key",
    "features/key.json",
    lambda: [feature_files()["key.json"]],
    _nasty_keys,
    template=_features,
    says="features: ",
    share=0.7,
)(_open)


# ---------------------------------------------------------------------- records of other commands


@target(
    "probe results",
    "results.json",
    lambda: [b'{"folds": [0], "seeds": [0], "split_seed": 0, "heads": []}'],
    nasty_json,
    says="output: ",
    share=0.3,
)
def probe_results(folder: Path) -> None:
    check_results(folder)


def _parts(folder: Path) -> None:
    cut_parts(folder / "photos", folder / "boxes.json", folder / "cut")


@functools.cache
def part_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos(folder / "photos")
        (folder / "boxes.json").write_text(
            json.dumps({"0.png": [[5, 5, 12, 12]], "1.png": [[1, 1, 5, 5]]})
        )
        _parts(folder)
        return files_of(folder)


def _nasty_parts() -> list[bytes]:
    whole = part_files()["cut/parts.json"]

    def change(**values: Any) -> bytes:
        return edited(whole, lambda r: r["parts"][0].update(values))

    return [
        *(change(index=value) for value in (-1, 99, "x", None, 1e999, 10**400, 1.5, [])), *(change(file=value) for value in (5, None, "../../x", "\0", "x" * 5000, [])),
        *(change(outcome=value) for value in (5, None, [], "nothing", "skipped")), edited(whole, lambda r: r.update(parts=5)), edited(whole, lambda r: r.update(parts=[5])),
        edited(whole, lambda r: r["parts"][0].pop("outcome")), edited(whole, lambda r: r.pop("settings")), *nasty_json(),
    ]  # fmt: skip


@target(
    "parts record",
    "cut/parts.json",
    lambda: [part_files()["cut/parts.json"]],
    _nasty_parts,
    template=lambda folder: put(part_files(), folder),
    says="output: ",
    share=0.6,
)
def parts_record(folder: Path) -> None:
    _parts(folder)
