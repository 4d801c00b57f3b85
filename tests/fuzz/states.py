"""What runs leave and go on from: run records, logs, checkpoints, features, states in SQLite."""

from __future__ import annotations

import functools
import io
import json
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from synthetic_packs import picture

from fuzz.engine import target
from fuzz.heads import network
from fuzz.labels import nasty_json
from fuzz.packs import results
from xattn.config import TrainConfig
from xattn.eval.evaluation.database import ImageRow, ResultRow
from xattn.eval.evaluation.kept_maps import kept_images
from xattn.eval.evaluation.store import Store
from xattn.eval.probing import check_results
from xattn.eval.report.html_data import map_images
from xattn.heads import create_head
from xattn.parts import cut_parts
from xattn.training import fit
from xattn.training.features import cache_features, open_features
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
    found = open_features(folder / "features")
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


# ---------------------------------------------------------------------- evaluations


FACTS = {"protocol": {"seed": 0}, "methods": ["gradcam"]}


@functools.cache
def state_file() -> bytes:
    """A state of two images and two methods."""
    grey = io.BytesIO()
    Image.new("L", (7, 7), 9).save(grey, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.sqlite"
        store = Store(path, FACTS)
        store.add_images([ImageRow(i, f"photo {i}.jpg", 1, "dog", 0.9) for i in range(3)])
        store.add_images([ImageRow(3, "bad.jpg", None, None, None, "image: damaged")])
        for i in range(3):
            for method in ("gradcam", "saliency"):
                store.add(
                    ResultRow(
                        i,
                        method,
                        None,
                        0,
                        5,
                        0.1,
                        {"AD@50": 1.0},
                        {"deletion": [0.5, 0.1]},
                        grey.getvalue(),
                    )
                )
                store.add_map(i, method, np.ones((7, 7), np.float32))
        store.add_tops([(i, [[1, "dog", 0.9]]) for i in range(3)])
        store.close()
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode=DELETE")
        return path.read_bytes()


def _altered(*statements: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.sqlite"
        path.write_bytes(state_file())
        with closing(sqlite3.connect(path)) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()
        return path.read_bytes()


def _nasty_states_in_sqlite() -> list[bytes]:
    texts = (
        "''",
        "'['",
        "'5'",
        "'null'",
        "'[]'",
        "x'ff'",
        "NULL",
        "5",
        '\'{"AD@50": "x"}\'',
        "'{\"AD@50\": [1]}'",
        f"'{'[' * 50_000}'",
        "'{\"d\": 5}'",
        '\'{"d": ["x"]}\'',
    )
    found = [
        _altered(f"UPDATE OR REPLACE results SET {column} = {text}")
        for column in ("measured", "scores", "map", "tied", "seconds", "method", "reason")
        for text in texts
    ]
    found += [
        _altered(f"UPDATE OR REPLACE maps SET {column} = {text}")
        for column in ("height", "width", "data", "method")
        for text in ("-1", "0", "7.5", "'x'", "NULL", "x'00'", "1000000000")
    ]
    found += [
        _altered(f"UPDATE images SET {column} = {text}")
        for column in ("id", "target", "target_name", "score", "skipped", "digest")
        for text in ("-1", "7.5", "'x'", "NULL", "x'00'", "9e999")
    ]
    found += [_altered(f"UPDATE tops SET top = {text}") for text in texts]
    found += [_altered(f"UPDATE OR REPLACE meta SET value = {text}") for text in texts]
    found += [
        _altered(f"DROP TABLE {table}") for table in ("meta", "images", "results", "maps", "tops")
    ]
    found += [
        _altered(f"DROP TABLE {table}", f"CREATE TABLE {table}(a, b)")
        for table in ("meta", "images", "results", "maps", "tops")
    ]
    found += [
        _altered(f"DROP TABLE {table}", f"CREATE VIEW {table} AS SELECT 1")
        for table in ("meta", "images", "results", "maps")
    ]
    found += [
        _altered("ALTER TABLE images ADD COLUMN more"),
        _altered("ALTER TABLE results DROP COLUMN failed"),
        _altered("DELETE FROM images"),
    ]
    found += [
        _altered("CREATE TRIGGER t BEFORE INSERT ON results BEGIN SELECT RAISE(ABORT, 'no'); END")
    ]
    whole = state_file()
    return [
        *found,
        b"",
        b"SQLite format 3\0",
        whole[:100],
        whole[:4096],
        whole[:-4096],
        whole[:5000],
        whole[:18] + b"\2\2" + whole[20:],
        b"x" * 8192,
    ]


def _work(folder: Path) -> None:
    path = folder / "state.sqlite"
    store = Store(path, FACTS)
    try:
        store.finished(0, 9)
        store.image(0)
        store.worked("gradcam")
        store.without_map(0, 9)
        store.without_top(0, 9)
        store.add(ResultRow(9, "gradcam", None, 0, 5, 0.1, {}, {}, None))
        store.images()
        for method in ("gradcam", "saliency"):
            list(store.results(method))
    finally:
        store.close()
    list(kept_images(path, None, 9))
    map_images(results(), path, [(0, 0), (1, 2)])


@target(
    "state",
    "state.sqlite",
    lambda: [state_file()],
    _nasty_states_in_sqlite,
    says="state: ",
    share=2,
)
def state(folder: Path) -> None:
    _work(folder)


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
