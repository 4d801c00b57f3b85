"""Folders that packs are read from."""

from __future__ import annotations

import os

import pytest

from xattn.packs import contained_files
from xattn.packs.contained_files import LocalFolder, PackError, RemoteFolder
from xattn.runtime.stores import resolve_place


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"0123456789")
    (folder / "inner").symlink_to("a.bin")
    (folder / "outer").symlink_to("../secret")
    (folder / "below").mkdir()
    os.mkfifo(folder / "pipe")
    return folder


def test_a_local_folder_measures_and_reads_its_files(folder):
    files = LocalFolder(folder)
    assert files.path == folder and files.address == str(folder) and files.name == "pack"
    assert files.exists("a.bin") and not files.exists("b.bin") and not files.exists("below")
    assert files.size("a.bin") == 10 and files.read("a.bin", 10) == b"0123456789"
    assert files.read("inner", 10) == b"0123456789"
    assert files.part("a.bin", 4, 7) == b"456" and files.part("a.bin", 8, 99) == b"89"
    with pytest.raises(PackError, match=r"^a\.bin has 10 bytes, over the limit of 9$"):
        files.read("a.bin", 9)


@pytest.mark.parametrize("name", ["outer", "../secret", "pipe", "below", "b.bin", "a\0b"])
def test_a_local_folder_opens_nothing_else(folder, name):
    with pytest.raises(PackError) as raised:
        LocalFolder(folder).part(name, 0, 1)
    assert str(folder) not in str(raised.value)


def test_a_trusted_folder_follows_links(folder):
    files = LocalFolder(folder, trusted=True)
    assert files.exists("outer") and files.read("outer", 100) == b"secret"
    with pytest.raises(FileNotFoundError):
        files.size("b.bin")


@pytest.mark.parametrize("character", "\\\0?#")
def test_a_remote_folder_asks_for_no_name_with_a_special_character(character):
    folder = RemoteFolder(resolve_place("memory://closed/pack"))
    with pytest.raises(PackError, match="cannot be the name of a file of a pack"):
        folder.part(f"a{character}b", 0, 1)


def test_a_remote_folder_reads_files_whole_and_asks_for_the_size_of_large_ones_alone(monkeypatch):
    monkeypatch.setattr(contained_files, "SMALL", 8)
    data, asked = {"small": b"01234", "large": b"0123456789"}, []

    class Folder(RemoteFolder):
        def part(self, name, start, end):
            return data[name][start:end]

        def size(self, name):
            asked.append(name)
            return len(data[name])

    folder = Folder(resolve_place("memory://any/pack"))
    for name, whole in data.items():
        assert folder.read(name, len(whole)) == whole
        with pytest.raises(
            PackError, match=f"^{name} has {len(whole)} bytes, over the limit of 4$"
        ):
            folder.read(name, 4)
    assert set(asked) == {"large"}
