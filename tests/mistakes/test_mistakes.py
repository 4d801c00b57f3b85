"""Every mistake in the tables ends in one line that names the argument and the remedy.

Tables are the lists ``MISTAKES`` of the modules ``python_*.py`` and ``typed_*.py`` beside this file.
"""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest

from mistakes.table import Bench, Mistake, Typed
from xattn.cli import main


def rows(prefix: str) -> list:
    names = sorted(p.stem for p in Path(__file__).parent.glob(f"{prefix}_*.py"))
    return [
        pytest.param(row, id=f"{name}: {getattr(row, 'name', None) or row.words}")
        for name in names
        for row in importlib.import_module(f"mistakes.{name}").MISTAKES
    ]


@pytest.mark.parametrize("mistake", rows("python"))
def test_a_wrong_call_is_one_line(mistake: Mistake, tmp_path, recwarn):
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        mistake.call(Bench(tmp_path))
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert message.startswith(mistake.says[0]), message
    assert all(part in message for part in mistake.says), message


@pytest.mark.parametrize("typed", rows("typed"))
def test_a_wrong_command_is_one_line(typed: Typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path)
    words = shlex.split(typed.words.format(photo=bench.photo, folder=tmp_path))
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    told = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert code == 2, told
    assert len(told) == 1, told
    assert told[0].startswith("xattn: error: ") and "Traceback" not in told[0], told
    assert all(part in told[0] for part in typed.says), told
