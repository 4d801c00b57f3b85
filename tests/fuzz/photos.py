"""Photos, clips and datasets."""

from __future__ import annotations

import functools
import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from synthetic_packs import picture

from fuzz.engine import target
from fuzz.labels import nasty_json
from xattn.app.live.uploads import accept, accept_clip, photo
from xattn.backbone import Preprocessing
from xattn.photos.clip import open_clip, quiet
from xattn.photos.images import load_image
from xattn.photos.sources import open_photos
from xattn.photos.view import prepare

SIZE = (40, 30)
LARGEST = 2_000_000  # pixels


@functools.cache
def photos() -> list[bytes]:
    """One photo in every format that is read, and in modes that need their own way to 8 bits."""
    found = []
    rgb = picture(0, SIZE)
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000"):
        found.append(_encoded(rgb, format))
    values = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[::-1])
    found.append(_encoded(Image.fromarray((values * 50).astype(np.uint16)), "PNG"))
    found.append(_encoded(Image.fromarray((values / 1200).astype(np.float32)), "TIFF"))
    found.append(_encoded(rgb.convert("RGBA"), "PNG"))
    found.append(_encoded(rgb.convert("P"), "PNG"))
    found.append(_encoded(rgb.convert("CMYK"), "JPEG"))
    exif = Image.Exif()
    exif[0x0112] = 6
    found.append(_encoded(rgb, "JPEG", exif=exif))
    frames = [picture(i, SIZE) for i in range(3)]
    found.append(_encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    return found


def _encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def _nasty_photos() -> list[bytes]:
    nan = np.zeros(SIZE[::-1], np.float32)
    nan[3, 3] = np.nan
    return [
        b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0\x08\0\0\0", b"RIFF\0\0\0\0WEBP", b"P6\n9999999 9999999 255\n",
        b"P6\n1 1 99999999999\n", b"P3 1 1 255 x", b"P5\n0 0\n255\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"MZ",
        _encoded(Image.new("L", (3000, 1)), "PNG"), _encoded(Image.new("L", (1, 20_000)), "PNG"), _encoded(Image.fromarray(nan), "TIFF"),
        _encoded(Image.new("L", (1500, 1500)), "PNG"), _encoded(Image.new("1", (5, 5)), "TIFF"),
    ]  # fmt: skip


@target("photo", "photo.jpg", photos, _nasty_photos, says="image: ", share=3)
def photo_file(folder: Path) -> None:
    image = load_image(folder / "photo.jpg", LARGEST)
    assert image.mode == "RGB" and image.width * image.height <= LARGEST
    prepare(image, Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875, "center"))


class _Sent:
    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.size, self._data = name, len(data), data

    def getvalue(self) -> bytes:
        return self._data


@target("upload", "upload", photos, _nasty_photos, says=".", share=1)
def upload(folder: Path) -> None:
    good, problems = accept([_Sent("photo.jpg", (folder / "upload").read_bytes())])
    assert len(good) + len(problems) == 1
    for _, problem in problems:
        raise ValueError(problem)
    photo(good[0])


@target(
    "upload name",
    "name",
    valid=lambda: [b"clip.mp4", "räder.MOV".encode()],
    nasty=lambda: [b"", b"..", b"/", b"\\", b"a\0.mp4", b"x" * 10_000 + b".mp4", b"." * 300, "\ud800.mp4".encode("utf-8", "surrogatepass")],
    kind="text",
    says=".",
    share=0.3,
)  # fmt: skip
def upload_name(folder: Path) -> None:
    name = (folder / "name").read_bytes().decode("utf-8", "surrogateescape")
    found = accept_clip(_Sent(name, b"x")).name
    assert found and "/" not in found and "\\" not in found and found.isprintable()


@functools.cache
def clips() -> list[bytes]:
    """Short clips as OpenCV writes them."""
    import cv2

    found = []
    for suffix, code in ((".mp4", "mp4v"), (".avi", "MJPG")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"clip{suffix}"
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 5, (32, 24))
            for i in range(3):
                writer.write(np.asarray(picture(i, (32, 24))))
            writer.release()
            found.append(path.read_bytes())
    return found


@target(
    "clip",
    "clip.mp4",
    clips,
    lambda: [b"", b"\0\0\0\x18ftypmp42", b"RIFF\0\0\0\0AVI ", b"\x1aE\xdf\xa3", b"#EXTM3U\nhttp://127.0.0.1:1/x.ts\n", b"GIF89a", b"\0" * 1000,
             b"ffconcat version 1.0\nfile /etc/passwd\n", b"%d"],
    says="video: ",
)  # fmt: skip
def clip(folder: Path) -> None:
    with quiet(), open_clip(folder / "clip.mp4", LARGEST) as found:
        for number, (_, frame) in enumerate(found.frames(1)):
            assert frame.width * frame.height <= LARGEST
            if number > 20:
                break


@functools.cache
def shard() -> bytes:
    """A tar file of three samples."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for i in range(3):
            for suffix, data in (("png", photos()[0]), ("cls", b"1")):
                member = tarfile.TarInfo(f"sample-{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _shard(folder: Path) -> None:
    (folder / "shard-0.tar").write_bytes(shard())


def _read_all(name: str) -> None:
    found = open_photos(name)
    found.describe()
    for i in range(min(len(found), 5)):
        try:
            found[i].load(LARGEST)
        except (ValueError, OSError) as error:  # this photo is skipped, the others are not
            assert str(error).startswith("image: "), error


@target(
    "shard",
    "shard-0.tar",
    lambda: [shard()],
    lambda: [b"", b"\0" * 512, b"\0" * 10_240, b"x" * 512, shard()[:700], shard()[:-2000], shard()[:512] + b"\xff" * 3000],
    says="data: ",
)  # fmt: skip
def shards(folder: Path) -> None:
    _read_all(f"wds/{folder}/shard-0.tar")


def _info(**splits: object) -> bytes:
    return json.dumps({"splits": splits}).encode()


@target(
    "shards info",
    "_info.json",
    lambda: [
        _info(train={"name": "train", "num_samples": 3, "filenames": ["shard-0.tar"], "shard_lengths": [3]}),
        _info(train={"name": "train", "num_samples": 2, "filenames": ["shard-0.tar"], "shard_lengths": [2]}, validation={"filenames": []}),
    ],
    lambda: [
        _info(train={"filenames": ["shard-0.tar"], "shard_lengths": [lengths]})
        for lengths in (-3, 10**12, 10**30, 2.5, "3", None, [], {}, True, 0)
    ]
    + [
        _info(train={"filenames": names, "shard_lengths": [3]})
        for names in ("shard-0.tar", [5], [None], ["../../etc/passwd"], ["\0"], [""], [["a"]], {}, 5, ["x" * 5000], ["http://127.0.0.1:1/x.tar"], ["pipe:echo"])
    ]
    + [_info(), _info(train=[]), _info(train={}), _info(train={"filenames": ["shard-0.tar"]}), b'{"splits": []}', *nasty_json()],
    template=_shard,
    says="data: ",
)  # fmt: skip
def shards_info(folder: Path) -> None:
    _read_all(f"wds/{folder}")


@target(
    "data names",
    "name",
    valid=lambda: [b"photo.png", b"./photo.png"],
    nasty=lambda: [b"", b"hfds/", b"wds/", b"hfids/x", b"wds/x.tar", b"wds/{0..99999999}.tar", b"wds/a-{9..0}.tar", b"wds/{.tar", b"wds/.:train", b"hfds/.",
                   b"hfds/./x:train", b"hfds/~", b"wds/~nobody/x.tar", b"~nobody", b"\0", b"wds/\0.tar", b"x" * 5000, b"hfds//", b"wds/:", b"hfds/:a[", b"wds/.tar"],
    kind="text",
    template=lambda folder: (folder / "photo.png").write_bytes(photos()[0]),
    share=0.7,
)  # fmt: skip
def data_names(folder: Path) -> None:
    import os

    os.chdir(folder)
    name = Path("name").read_bytes().decode("utf-8", "surrogateescape")
    if (
        "://" in name
        or "pipe:" in name
        or (name.lower().startswith("hfds/") and not name.startswith(("hfds/.", "hfds//")))
    ):
        return  # these go to the network
    _read_all(name)
