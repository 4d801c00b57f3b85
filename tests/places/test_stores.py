"""Paths and URLs: which is which, what a store answers, and what is said when it does not."""

import socket
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from object_stores import fresh_file_systems

from xattn.runtime import stores
from xattn.runtime.stores import StoreError, StorePath, is_remote, resolve_place

pytest.importorskip("s3fs")


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("photos/a.jpg", Path("photos/a.jpg")),
        ("C:\\photos\\a.jpg", Path("C:\\photos\\a.jpg")),
        ("C:/photos/a.jpg", Path("C:/photos/a.jpg")),
        ("a: b/c.jpg", Path("a: b/c.jpg")),
        ("notes:/a.jpg", Path("notes:/a.jpg")),
        ("wds/s3://bucket", Path("wds/s3://bucket")),
        ("file:///photos/a%20b.jpg", Path("/photos/a b.jpg")),
        ("s3://bucket/photos/", StorePath("s3://bucket/photos")),
        (Path("s3://bucket/photos"), StorePath("s3://bucket/photos")),
        ("S3://bucket/Photos", StorePath("s3://bucket/Photos")),
        ("hf://datasets/user/name", StorePath("hf://datasets/user/name")),
        ("memory://runs/x", StorePath("memory://runs/x")),
    ],
)
def test_a_path_is_a_path_and_a_url_of_a_store_is_a_place_in_it(given, place):
    assert resolve_place(given) == place
    assert is_remote(given) == isinstance(place, StorePath)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x3://bucket/a", "photos: got x3://bucket/a, whose store x3:// is not known; give s3://"),
        ("s3://", "photos: got s3://; give s3://BUCKET/FOLDER"),
        ("s3://a/b.zip::zip://c", "photos: got s3://a/b.zip::zip://c; give s3://BUCKET/FOLDER"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused(given, said):
    with pytest.raises(ValueError, match="^photos: ") as raised:
        resolve_place(given, "photos")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("scheme", "line"),
    [("s3", 'pip install "xattn[remote]"'), ("gs", "pip install gcsfs"),
     ("hf", "pip install huggingface_hub")],
)  # fmt: skip
def test_a_missing_library_is_named_with_the_line_that_installs_it(scheme, line, monkeypatch):
    def missing(name):
        raise ImportError(f"Please install {name}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=f"^photos: {scheme}:// needs a library") as raised:
        resolve_place(f"{scheme}://bucket/a", "photos")
    assert str(raised.value).endswith(f"run: {line}")


@pytest.mark.parametrize("scheme", ["gs", "hf"])
def test_other_stores_are_read_by_their_own_file_system(scheme, monkeypatch):
    class Fake(MemoryFileSystem):
        protocol = scheme
        store: ClassVar = {}
        pseudo_dirs: ClassVar = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.removeprefix(f"{scheme}:/"))

    monkeypatch.setitem(_registry, scheme, Fake)
    place = resolve_place(f"{scheme}://bucket/photos")
    (place / "a/b.jpg").write(b"photo")
    assert [str(file) for file in place.files()] == [f"{scheme}://bucket/photos/a/b.jpg"]
    assert Fake.store.keys() == {"/bucket/photos/a/b.jpg"} and place.is_dir()


def test_files_are_listed_in_order_measured_and_read_by_range(s3_bucket, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK", 7)
    root = resolve_place(f"{s3_bucket}/x")
    for name in ("b.bin", "a/c.bin", "a-b.bin", ".hidden/d.bin", "empty"):
        (root / name).write(b"" if name == "empty" else name.encode() * 5)
    assert [f.below(root) for f in root.files()] == ["a/c.bin", "a-b.bin", "b.bin", "empty"]
    assert [f.below(root) for f in root.files(depth=1)] == ["a-b.bin", "b.bin", "empty"]
    file = root / "b.bin"
    assert file.info().size == 25 and file.info().mark and (root / "a").info() is None
    assert file.read_bytes() == b"b.bin" * 5 and file.read(3, 13) == (b"b.bin" * 5)[3:13]
    assert (root / "empty").read_bytes() == b"" and file.read(20, 99) == b"b.bin"
    assert root.is_dir() and not file.is_dir() and not (root / "c").is_dir()
    file.remove()
    file.remove()
    with pytest.raises(FileNotFoundError, match=r"^no file .*/x/b\.bin$"):
        file.read_bytes()


def test_a_file_that_was_replaced_has_another_mark(s3_bucket):
    file = resolve_place(f"{s3_bucket}/a")
    file.write(b"one")
    (before,) = file.parent.files()
    file.write(b"two")
    (after,) = file.parent.files()
    assert before == after and before.mark != after.mark


def test_a_request_is_repeated_until_the_store_answers(monkeypatch):
    monkeypatch.setattr(stores, "PAUSE", 0)
    place = resolve_place("memory://retried/a")
    place.write(b"data")
    failures = [TimeoutError("slow"), ConnectionResetError("gone"), OSError("down")]
    read = MemoryFileSystem.cat_file

    def failing(self, *arguments, **options):
        if failures:
            raise failures.pop()
        return read(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    assert place.read_bytes() == b"data" and not failures


def test_a_store_that_refuses_is_asked_once(monkeypatch):
    asked = []

    def refusing(self, path, **options):
        asked.append(path)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "info", refusing)
    with pytest.raises(StoreError, match=r"^memory://closed refuses access .*the credentials$"):
        resolve_place("memory://closed/a").info()
    assert len(asked) == 1


def test_a_store_that_is_gone_or_silent_is_named(impatient, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # and never answers
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with fresh_file_systems():
            with pytest.raises(StoreError, match=r"^s3://bucket does not answer .*; 2 attempts in"):
                resolve_place("s3://bucket/a").read(0, 10)
    with fresh_file_systems(), pytest.raises(StoreError, match=r"try again$"):
        resolve_place("s3://bucket/a").files()
