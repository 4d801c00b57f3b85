"""Uploads: photos in, pixels out; whatever is no photo becomes a message by file name."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("streamlit")

from xattn.app.live import uploads


@dataclass
class Sent:
    name: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def getvalue(self) -> bytes:
        return self.data


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(size: tuple[int, int] = (40, 30)) -> Image.Image:
    width, height = size
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(row, (height, 1))] * 3, -1))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds no pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def test_bad_files_are_named_and_the_others_go_on():
    good, problems = uploads.accept(
        [
            Sent("empty.jpg", b""),
            Sent("good.png", encoded(gradient(), "PNG")),
            Sent("words.jpg", b"not an image at all"),
            Sent("huge.png", png_header(20_000, 20_000)),
            Sent("wide.png", png_header(20_000, 2_001)),
            Sent("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
        ]
    )
    assert [u.name for u in good] == ["good.png"]
    reasons = dict(problems)
    assert list(reasons) == ["empty.jpg", "words.jpg", "huge.png", "wide.png", "script.eps"]
    assert "0 bytes" in reasons["empty.jpg"]
    assert "not a readable image" in reasons["words.jpg"]
    assert "too many pixels" in reasons["huge.png"]
    assert "20000 x 2001" in reasons["wide.png"]
    assert "not a readable image" in reasons["script.eps"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_photo_of_any_format_becomes_its_pixels(kind):
    image = gradient()
    found = uploads.photo(uploads.Upload(f"photo.{kind.lower()}", encoded(image, kind)))
    assert (found.mode, found.size) == ("RGB", image.size)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(image).astype(int)).mean() < 4


def test_metadata_stay_behind_and_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010E] = "where it was taken"
    data = encoded(gradient((40, 30)), exif=exif, comment=b"who took it", dpi=(300, 300))
    assert b"where it was taken" in data and b"who took it" in data
    found = uploads.photo(uploads.Upload("turned.jpg", data))
    assert found.size == (30, 40)
    assert not found.info and not found.getexif()
    again = encoded(found)
    assert b"where" not in again and b"who took it" not in again


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_truncated_photo_raises_a_message_without_paths(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    upload = uploads.Upload("half.jpg", encoded(noise, kind)[:900])
    with pytest.raises(ValueError, match="truncated or damaged|not a readable image"):
        uploads.photo(upload)


def test_bytes_and_number_are_capped(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 2_000)
    monkeypatch.setattr(uploads, "MAX_PHOTOS", 2)
    small = encoded(gradient(), "PNG")
    good, problems = uploads.accept(
        [Sent("a.png", small), Sent("b.png", small + b"\0" * 2_000), Sent("c.png", small)]
    )
    assert [u.name for u in good] == ["a.png"]
    assert "too large" in dict(problems)["b.png"] and "2 photos" in dict(problems)["c.png"]


def test_an_upload_over_the_cap_is_not_copied():
    class Large:
        name, size = "large.jpg", uploads.MAX_BYTES + 1

        def getvalue(self) -> bytes:
            raise AssertionError("the bytes are not needed")

    assert "too large" in dict(uploads.accept([Large()])[1])["large.jpg"]


def test_names_are_file_names_without_control_characters():
    assert uploads.clean_name("../../etc/passwd") == "passwd"
    assert uploads.clean_name("C:\\photos\\cat.jpg") == "cat.jpg"
    assert uploads.clean_name("a\nb\x00c.png") == "a_b_c.png"
    assert uploads.clean_name("<b>'\"🐱 שלום.jpg") == "<b>'\"🐱 שלום.jpg"
    long = uploads.clean_name("x" * 300 + ".jpeg")
    assert len(long) == uploads.NAME_LENGTH and long.endswith(".jpeg")
    wide = uploads.clean_name("猫" * 300 + ".jpeg")  # three bytes a character, and a file has 255
    assert len(wide.encode()) <= uploads.NAME_BYTES and wide.startswith("猫" * 60)
    assert wide.endswith("猫.jpeg")
    assert uploads.clean_name("") and uploads.clean_name("/")


def test_a_clip_is_told_by_its_name_and_size():
    assert uploads.accept_clip(Sent("walk.MP4", b"data")).name == "walk.MP4"
    for sent in (Sent("walk.exe", b"data"), Sent("walk.mp4", b"")):
        with pytest.raises(ValueError):
            uploads.accept_clip(sent)
