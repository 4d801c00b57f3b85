"""The process of a job records how its command ended."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from xattn import cli
from xattn.app.jobs import child


@pytest.fixture
def folder(tmp_path: Path):
    (tmp_path / "arguments.json").write_text('["list"]')
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def code_of(folder: Path) -> int:
    return json.loads((folder / "exit.json").read_text())["code"]


def test_a_stop_during_an_import_that_then_fails_is_a_stop(folder, monkeypatch):
    def command(arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError("a half imported module") from None

    monkeypatch.setattr(cli, "main", command)
    with pytest.raises(RecursionError):
        child.main(folder)
    assert code_of(folder) == 130


def test_an_error_without_a_stop_is_a_failure(folder, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        child.main(folder)
    assert code_of(folder) == 1


def test_a_stop_from_before_the_signal_was_heard_is_a_stop(folder, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda arguments: pytest.fail("the command ran"))
    (folder / "stop.json").write_text('{"time": 0.0}')
    assert child.main(folder) == 130
    assert code_of(folder) == 130
