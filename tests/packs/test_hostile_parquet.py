"""Small Parquet files that decode to very much: they are refused before anything is decoded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xattn.app.synthetic_packs import described, explanation, picture
from xattn.packs.contained_files import PackError
from xattn.packs.reader import Pack
from xattn.packs.sharded.parquet_pages import Bounds, check_pages
from xattn.packs.writer import pack_writer

ENTRIES = "entries-00000.parquet"


def make(folder: Path) -> Path:
    with pack_writer(folder, format=2) as writer:
        writer.metrics = described()
        for i in range(4):
            writer.add([explanation(i, source=picture(i))])
    return folder


def signed(folder: Path, data: bytes, **changes: Any) -> Path:
    """Put ``data`` in place of the entries with its own hash, as somebody would who wants it to be read."""
    (folder / ENTRIES).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    changes = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
    manifest["shards"][0]["entries"] |= changes
    if "rows" in changes:
        manifest["entries"] = manifest["shards"][0]["maps"]["rows"] = changes["rows"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def parquet(table: Any, texts: list[str] | None = None, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    known = {"compression": "zstd", "store_schema": False, "use_dictionary": texts or ["image_id", "file_name", "title", "method", "target_name"]}  # fmt: skip
    pq.write_table(table, sink, **(known | options))
    return sink.getvalue().to_pybytes()


def replaced(table: Any, column: str, values: Any) -> Any:
    place = table.schema.get_field_index(column)
    field = table.schema.field(column)
    return table.set_column(place, field, pa.array(values, field.type))


def curves(table: Any, length: int) -> Any:
    """The first map has a curve of ``length`` zeros, the others have none."""
    field = table.schema.field("curve:deletion")
    offsets = pa.array([0] + [length] * len(table), pa.int32())
    values = pa.array(memoryview(bytes(8 * length)).cast("d"), pa.float64())
    column = pa.ListArray.from_arrays(offsets, values, field.type)
    return table.set_column(table.schema.get_field_index("curve:deletion"), field, column)


def bombs(root: Path) -> dict[str, Path]:
    """Packs whose entries are at most some 100 KB and decode to 96 MB or more."""
    good = pq.read_table(make(root / "good") / ENTRIES)
    long = replaced(good, "target_name", ["x" * (34 << 20)] * len(good))
    many = good.take(pa.array([0] * 300_000))
    return {
        "a curve of zeros, packed": signed(make(root / "a"), parquet(curves(good, 12 << 20))),
        "a curve of zeros by dictionary": signed(
            make(root / "b"), parquet(curves(good, 12 << 20), ["curve:deletion.list.element"])
        ),
        "a long name in a dictionary": signed(
            make(root / "c"), parquet(long, dictionary_pagesize_limit=1 << 30)
        ),
        "a million rows of one": signed(make(root / "d"), parquet(many), rows=len(many)),
    }


CHILD = """
import json, resource, sys
from pathlib import Path
from xattn.packs.contained_files import PackError
from xattn.packs.reader import Pack

def read(folder):
    pack = Pack(Path(folder))
    pack.parquet()
    len(pack.entries), len(pack.images)
    for id in list(pack.entry_ids)[:3]:
        pack.explanation(id), pack.provenance(id)

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10

good, *folders = sys.argv[1:]
read(good)
before = most()
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (300 << 20),) * 2)
said = []
for folder in folders:
    try:
        read(folder)
        said.append(None)
    except PackError as error:
        said.append(str(error))
print(json.dumps([before, most(), said]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux's means")
def test_files_that_decode_to_very_much_are_refused_in_little_memory(tmp_path):
    packs = bombs(tmp_path)
    for folder in packs.values():
        assert (folder / ENTRIES).stat().st_size < 200_000
    words = [sys.executable, "-c", CHILD, *map(str, [tmp_path / "good", *packs.values()])]
    out = subprocess.run(words, check=True, capture_output=True, text=True, timeout=900).stdout
    before, most, said = json.loads(out)
    assert all(said), dict(zip(packs, said, strict=True))
    assert not any("memory" in text for text in said), said
    assert most < 500 and most - before < 80, (before, most)


def test_more_rows_or_row_groups_than_a_shard_has_are_refused(tmp_path):
    folder = make(tmp_path / "pack")
    table = pq.read_table(folder / ENTRIES)
    signed(folder, parquet(table, row_group_size=1), rows=10**9)
    with pytest.raises(PackError, match=r"1,000,000,000 rows, over the limit"):
        Pack(folder).entry_ids[0]
    many = table.take(pa.array([0] * 1100))
    signed(folder, parquet(many, row_group_size=1), rows=len(many))
    with pytest.raises(PackError, match="1,100 row groups, over the limit of 1,024"):
        Pack(folder).entry_ids[0]


def test_a_map_of_a_photo_that_is_not_there_is_damage(tmp_path):
    maps_table = pytest.importorskip("xattn.app.navigation.maps_table", exc_type=ImportError)
    folder = make(tmp_path / "pack")
    table = pq.read_table(folder / ENTRIES)
    ids = ["another", *table["image_id"].to_pylist()[1:]]
    pack = Pack(signed(folder, parquet(replaced(table, "image_id", ids))))
    with pytest.raises(PackError, match="tables of maps and photos do not match"):
        maps_table.MapsTable(pack)


# ---------------------------------------------------------------------- page headers


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def i32(value: int) -> bytes:
    return b"\x15" + varint(value << 1)  # the next field of a structure, an i32 in zigzag


def data_page(
    values: int, size: int, data: bytes, encoding: int = 0, stored: int | None = None
) -> bytes:
    """A data page with its header: type, both sizes, then number of values, encoding, levels."""
    about = i32(values) + i32(encoding) + i32(3) + i32(3) + b"\0"
    stored = len(data) if stored is None else stored
    return i32(0) + i32(size) + i32(stored) + b"\x2c" + about + b"\0" + data


BOUNDS = Bounds(values=4, size=1000, dictionary=False)


def test_page_headers_within_their_bounds_are_taken():
    page = data_page(2, 16, b"x" * 9)
    assert check_pages(page * 2, BOUNDS) == 32


@pytest.mark.parametrize(
    "data",
    [
        data_page(4, 1 << 30, b"x"),
        data_page(1 << 30, 8, b"x"),
        data_page(4, 32, b"x", stored=1 << 30),
        data_page(4, 32, b"x", encoding=8),
        data_page(3, 32, b"x"),
        data_page(4, 32, b"x") + b"\0",
        data_page(4, 32, b"x")[:9],
        b"",
        b"\xff" * 40,
        i32(0) + b"\x15" + b"\xff" * 9 + b"\x01",  # 64 bits, of which a decoder keeps 32
        i32(3) + i32(8) + i32(1) + b"\0x",
        (i32(0) + b"\x1c" * 500),
    ],
)
def test_page_headers_that_lie_are_refused(data):
    with pytest.raises(ValueError, match=r"page|column|bytes"):
        check_pages(data, BOUNDS)


def test_a_real_file_whose_last_page_header_lies_is_refused(tmp_path):
    folder = make(tmp_path / "pack")
    data = (folder / ENTRIES).read_bytes()
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    column = metadata.row_group(0).column(metadata.num_columns - 1)
    begin, size = column.data_page_offset, column.total_compressed_size
    header = i32(0) + b"\x15"
    assert data[begin : begin + len(header)] == header
    place, end = begin + len(header), begin + len(header)
    while data[end] > 127:
        end += 1
    claim = varint((1 << 31) - 1 << 1)
    longer = len(claim) - (end + 1 - place)
    foot = data[begin + size : -8]
    old, new = b"\x16" + varint(size << 1), b"\x16" + varint((size + longer) << 1)
    at = foot.rindex(old)
    foot = foot[:at] + new + foot[at + len(old) :]
    page = data[begin:place] + claim + data[end + 1 : begin + size]
    signed(folder, data[:begin] + page + foot + len(foot).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(PackError, match="its pages have more than"):
        Pack(folder).parquet()
