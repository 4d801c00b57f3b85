"""Files and folders that appear whole or not at all: kills, siblings of like names, permissions."""

import multiprocessing
import os
import shutil
import signal
import stat
import time

import pytest
from synthetic_packs import small_pack

from xattn.runtime import files
from xattn.runtime.files import atomic_file, atomic_folder, write_json

NAMES = ["exp", "exp.v2", "run[1]"]
MOMENTS = ["in the block", "before the first rename", "between the renames", "after the second"]


def write(folder, text):
    with atomic_folder(folder, ("a.txt",)) as temporary:
        (temporary / "a.txt").write_text(text)


def text_of(folder):
    return (folder / "a.txt").read_text()


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(folder, moment):
    """Write "new" to ``folder`` in a process that is killed at a moment."""
    renames, real = [], os.replace

    def replace(source, target):
        if moment == MOMENTS[1 + len(renames)]:
            die()
        real(source, target)
        renames.append(target)
        if moment == MOMENTS[3] and len(renames) == 2:
            die()

    def killed():
        os.replace = replace
        with atomic_folder(folder, ("a.txt",)) as temporary:
            (temporary / "a.txt").write_text("new")
            if moment == MOMENTS[0]:
                die()

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_loses_nothing_and_the_next_write_leaves_nothing_behind(tmp_path, moment, name):
    for other in NAMES:
        write(tmp_path / other, f"old {other}")
    mine = tmp_path / ".exp.settings"  # hidden, and the user's
    mine.mkdir()
    folder = tmp_path / name
    write_and_die(folder, moment)
    assert len(hidden(tmp_path)) >= 2, "the kill left something"
    for other in {*NAMES} - {name}:
        write(tmp_path / other, f"new {other}")
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(folder, ("a.txt",)):
        raise RuntimeError("stop")
    assert text_of(folder) == ("new" if moment == MOMENTS[3] else f"old {name}")
    assert hidden(tmp_path) == [".exp.settings"]
    write(folder, "newest")
    assert text_of(folder) == "newest" and hidden(tmp_path) == [".exp.settings"]
    assert [text_of(tmp_path / n) for n in NAMES if n != name] == [
        f"new {n}" for n in NAMES if n != name
    ]


@pytest.mark.parametrize("name, sibling", [("exp", "exp.v2"), ("run[1]", "run1"), ("run1", "run")])
def test_the_backup_of_a_sibling_is_not_taken(tmp_path, name, sibling):
    write(tmp_path / "kept", "the sibling's")
    os.replace(tmp_path / "kept", tmp_path / f".{sibling}.abcd.old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / name, ()):
        raise RuntimeError
    assert not (tmp_path / name).exists()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / sibling, ()):
        raise RuntimeError
    assert text_of(tmp_path / sibling) == "the sibling's"


def wait_for_a_later_change(path, clock):
    """Until the file system gives a change a later time than the last one of ``path``."""
    for _ in range(10_000):
        clock.touch()
        if clock.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return
        time.sleep(0.001)
    pytest.fail("the file system's clock stands still")


def test_of_two_backups_the_one_made_last_is_restored(tmp_path):
    for token, text in (("f0000000", "older"), ("00000000", "newer")):
        write(tmp_path / "run[1]", text)
        backup = tmp_path / f".run[1].{token}.old"
        os.replace(tmp_path / "run[1]", backup)
        wait_for_a_later_change(backup, tmp_path / "clock")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "run[1]", ()):
        raise RuntimeError
    assert text_of(tmp_path / "run[1]") == "newer" and hidden(tmp_path) == []


def test_what_another_writer_is_just_writing_is_not_swept(tmp_path):
    folder = tmp_path / "exp"
    write(folder, "old")
    with atomic_folder(folder, ("a.txt",)) as first:
        (first / "a.txt").write_text("first")
        write(folder, "second")
        assert text_of(folder) == "second" and text_of(first) == "first"
    assert text_of(folder) == "first" and hidden(tmp_path) == []


def test_a_folder_that_is_being_replaced_is_not_restored_by_another_writer(tmp_path, monkeypatch):
    folder, real = tmp_path / "exp", os.replace
    write(folder, "old")

    def replace(source, target):
        real(source, target)
        if str(target).endswith(".old"):
            files._restore(folder)
            assert not folder.exists()

    monkeypatch.setattr(os, "replace", replace)
    write(folder, "new")
    assert text_of(folder) == "new" and hidden(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_permissions_are_those_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        small_pack(tmp_path / "pack", 1)
        small_pack(tmp_path / "pack", 2)
        write_json(tmp_path / "new/facts.json", {})
        with atomic_file(tmp_path / "text.txt") as temporary:
            temporary.write_text("text")
        write_json(tmp_path / "secret.json", {}, mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secret.json").stat().st_mode) == 0o600
    (tmp_path / "secret.json").unlink()
    found = {p: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert len(found) == 9
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_folder_left_by_a_kill_is_swept_whatever_lies_in_it(tmp_path):
    leftover = tmp_path / ".exp.01234567.tmp"
    shutil.copytree(small_pack(tmp_path / "other", 1), leftover)
    write(tmp_path / "exp", "new")
    assert hidden(tmp_path) == []
