"""The folder of live results: whoever keeps it, it does not stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from xattn.app import scratch
from xattn.app.scratch import LOCK, PREFIX, Scratch, sweep

pytest.importorskip("fcntl")
KEEP = """
import signal, sys, time
from xattn.app.scratch import Scratch
kept = Scratch()
(kept.path / "photo.jpg").write_bytes(b"private")
print(kept.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "YOUNG", -1)
    return tmp_path


@pytest.fixture
def other(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another viewer and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()


def test_what_a_killed_viewer_left_is_deleted(other: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = other
    assert folder.name.startswith(PREFIX)
    sweep()
    assert (folder / "photo.jpg").exists(), "that of a viewer that runs stays"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.exists()
    sweep()
    assert not folder.exists()


def test_ones_own_and_what_is_no_viewers_stay(temporary: Path) -> None:
    own = Scratch()
    (temporary / f"{PREFIX}notes").mkdir()
    (temporary / "else").mkdir()
    (temporary / "else" / LOCK).touch()
    (temporary / f"{PREFIX}link").symlink_to(temporary / "else")
    sweep()
    assert own.path.is_dir() and (temporary / "else" / LOCK).exists()
    assert (temporary / f"{PREFIX}notes").is_dir()


def test_the_end_of_the_server_deletes_its_own() -> None:
    own = Scratch()
    (own.path / "photo.jpg").write_bytes(b"private")
    scratch.clean()
    assert not own.path.exists()


def test_a_folder_that_was_just_made_stays(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "YOUNG", 60)
    (temporary / f"{PREFIX}new").mkdir()
    (temporary / f"{PREFIX}new" / LOCK).touch()
    sweep()
    assert (temporary / f"{PREFIX}new").is_dir()
