"""Labels of photos, names of classes, lists of photos."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz.engine import target
from fuzz.mutations import deep
from xattn.backbone import read_classes
from xattn.photos.images import list_images
from xattn.photos.labels import read_labels, true_classes

PHOTOS = ["photos/cat/1.jpg", "photos/cat/2.jpg", "photos/dog/1.jpg", "photos/dog/3.jpg"]
CLASSES = ["tench, cat", "dog", "house cat", "house cat", "1"]


def lines(*texts: str) -> bytes:
    return "\n".join(texts).encode() + b"\n"


def nasty_json() -> list[bytes]:
    """Files that are JSON's own traps, whatever they should say."""
    return [
        b"", b" ", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{", b"null", b"[]", b"{}", b'"text"', b"1", b"NaN", b"[NaN]",
        b'{"a": Infinity}', b'{"a": 1, "a": 2}', b'{"\\ud800": "\\udfff"}', b'{"a": "\\u0000"}', b"\x00" * 100, b"[1] [2]",
        deep(1_000).encode(), deep(200_000).encode(), deep(100_000, '{"a":', "}").encode(), (b"[" * 100_000),
        b"9" * 10_000, b'{"a": ' + b"9" * 10_000 + b"}", b"1e999", b"-1e999", b'{"a": -1e999}', b'{"":""}',
    ]  # fmt: skip


def _read(file: Path) -> None:
    labels = read_labels(PHOTOS, file)
    assert len(labels.index) == len(PHOTOS)


@target(
    "labels csv",
    "labels.csv",
    valid=lambda: [
        lines(*(f"{p},{p.split('/')[1]}" for p in PHOTOS)),
        lines("photo,label", *(f"{p},{i % 2}" for i, p in enumerate(PHOTOS))),
        "\n".join(f'"{p}","a ""quoted"", {i % 2}"' for i, p in enumerate(PHOTOS)).encode("utf-8-sig"),
    ],
    nasty=lambda: [
        b"", b"\n\n\n", b",", b"a", b"a,b,c", b'"', b'"a', b'"a"b,c', b"\x00,\x00", b"\xff\xfe", b"a,b\ra,c",
        lines(*(f"{p},{'x' * 200_000}" for p in PHOTOS)), lines(f"{'y' * 200_000},x"), lines(f'"{"z" * 140_000}"'),
        lines(*(f"{p},{'9' * 5000}" for p in PHOTOS)), lines(*(f"{p},{'9' * 5000}{i}" for i, p in enumerate(PHOTOS))),
        lines(*(f"{p},-{i}" for i, p in enumerate(PHOTOS))), lines(*(f"{p},²{i}" for i, p in enumerate(PHOTOS))),
        lines(*(f"{p},--{i}" for i, p in enumerate(PHOTOS))), lines("1.jpg,cat", "2.jpg,dog"),
    ],
    says="labels: ",
    share=2,
)  # fmt: skip
def labels_csv(folder: Path) -> None:
    _read(folder / "labels.csv")


def _label_tables() -> list[bytes]:
    tables = [
        {"cat": {"group": "cats", "label": "house cat", "index": 2}, "dog": {"group": "dogs"}},
        {p: p.split("/")[1] for p in PHOTOS},
        {"cat/1.jpg": 0, "2.jpg": 1, "dog/1.jpg": "dog", "3.jpg": None},
    ]
    return [json.dumps(table).encode() for table in tables]


def _nasty_label_tables() -> list[bytes]:
    return [
        b'{"cat": {"group": "cats"}, "dog": "dogs"}',
        b'{"photos/cat/1.jpg": {"group": "a"}, "2.jpg": "b", "dog/1.jpg": "c", "3.jpg": {"label": 1}}',
        b'{"cat/1.jpg": {}, "2.jpg": [], "dog/1.jpg": true, "3.jpg": 1.5}',
        b'{"cat": {"group": ["a"]}, "dog": {"group": {"group": "a"}}}',
        b'{"cat": {"group": 1}, "dog": {"group": "' + b"9" * 5000 + b'"}}',
        b'{"cat": {"group": "\xc2\xb2"}, "dog": {"group": "-"}}',
        b'{"cat": {"group": "a", "label": ' + deep(900).encode() + b'}, "dog": {"group": "b"}}',
        b'{"cat/1.jpg": ' + deep(900).encode() + b', "2.jpg": 1, "dog/1.jpg": 2, "3.jpg": 3}',
        b'{"cat": {"group": "a", "index": []}, "dog": {"group": "b", "label": 5}}',
        *nasty_json(),
    ]  # fmt: skip


@target(
    "labels json",
    "labels.json",
    _label_tables,
    _nasty_label_tables,
    says="labels: ",
    share=2,
)
def labels_json(folder: Path) -> None:
    _read(folder / "labels.json")


@target("true classes", "labels.json", _label_tables, _nasty_label_tables, says="labels: ")
def labels_as_classes(folder: Path) -> None:
    for number, _ in true_classes(PHOTOS, folder / "labels.json", CLASSES):
        assert number is None or 0 <= number < len(CLASSES)


@target(
    "class names",
    "classes.txt",
    valid=lambda: [lines("cat", "dog", "", "tench, Tinca tinca"), "ä\r\nö\r\n".encode("utf-8-sig")],
    nasty=lambda: [b"", b"\xff", b"\x00", "\ud800".encode("utf-8", "surrogatepass"), b"\n" * 1000, b"a" * 1_000_000],
    says="class_names: ",
    share=0.5,
)  # fmt: skip
def class_names(folder: Path) -> None:
    read_classes(folder / "classes.txt")


def _photos(folder: Path) -> None:
    for name in ("a.jpg", "b c.jpg", "sub/d.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


@target(
    "list of photos",
    "list.txt",
    valid=lambda: [lines("a.jpg", "b c.jpg", "# note", "", "sub/d.png"), lines("a.jpg 3", "b c.jpg\tcat")],
    nasty=lambda: [b"", b"#", b"\x00", b"a.jpg\x00", b"/", b".", b"..", b"\xff", b"x" * 100_000, b"a.jpg/b", b"~",
                   b"/proc/self/mem", b"/dev/zero", "\ud800.jpg".encode("utf-8", "surrogatepass")],
    template=_photos,
    says="images: ",
)  # fmt: skip
def list_of_photos(folder: Path) -> None:
    list_images(folder / "list.txt")
