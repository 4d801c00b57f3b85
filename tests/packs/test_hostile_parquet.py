"""Small Parquet files that decode to very much: they are refused in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pack_files import ENTRIES, parquet, replaced, signed
from synthetic_packs import described, explanation, picture

from xattn.packs.columns import BoundedParquet, codecs_of
from xattn.packs.contained_files import PackError
from xattn.packs.reader import Pack
from xattn.packs.writer import pack_writer


def make(folder: Path) -> Path:
    with pack_writer(folder) as writer:
        writer.metrics = described()
        for i in range(4):
            writer.add([explanation(i, source=picture(i))])
    return folder


def packed(folder: Path, data: bytes, rows: int) -> Path:
    """A pack with another file of entries, of so many rows."""
    signed(folder, ENTRIES, data, rows=rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["entries"] = manifest["shards"][0]["maps"]["rows"] = rows
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def bombs(root: Path) -> dict[str, Path]:
    """Packs whose entries are at most 6 MB and would decode to 100 MB or more."""
    good = pq.read_table(make(root / "good") / ENTRIES)
    deltas = {"column_encoding": {"title": "DELTA_BYTE_ARRAY"}, "write_statistics": False}
    repeated = good.take(pa.array([0] * 120))
    same = replaced(repeated, "title", ["x" * (1 << 20)] * len(repeated))
    long = replaced(repeated, "target_name", ["x" * (1 << 20)] * len(repeated))
    return {
        "compressed": packed(make(root / "a"), parquet(good, compression="zstd"), 4),
        "a long name of many rows": packed(
            make(root / "b"),
            parquet(long, write_statistics=False, dictionary_pagesize_limit=1 << 30),
            len(long),
        ),
        "a long name by its difference from itself": packed(
            make(root / "c"), parquet(same, use_dictionary=False, **deltas), len(same)
        ),
        "half a million rows": packed(
            make(root / "d"),
            parquet(good.take(pa.array([0] * 500_000)), use_dictionary=True),
            500_000,
        ),
    }


CHILD = """
import json, resource, sys
from pathlib import Path
from xattn.packs.contained_files import PackError
from xattn.packs.reader import Pack

def read(folder):
    pack = Pack(Path(folder))
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
        assert (folder / ENTRIES).stat().st_size < 10 << 20
    words = [sys.executable, "-c", CHILD, *map(str, [tmp_path / "good", *packs.values()])]
    out = subprocess.run(words, check=True, capture_output=True, text=True, timeout=900).stdout
    before, most, said = json.loads(out)
    assert all(said), dict(zip(packs, said, strict=True))
    assert not any("memory" in text for text in said), said
    assert most < 500 and most - before < 80, (before, most)


def test_more_rows_or_row_groups_than_a_shard_has_are_refused(tmp_path):
    folder = make(tmp_path / "pack")
    table = pq.read_table(folder / ENTRIES)
    packed(folder, parquet(table, row_group_size=1), 10**9)
    with pytest.raises(PackError, match=r"1,000,000,000 rows, over the limit"):
        Pack(folder).entry_ids[0]
    many = table.take(pa.array([0] * 1100))
    packed(folder, parquet(many, row_group_size=1), len(many))
    with pytest.raises(PackError, match="1,100 row groups, over the limit of 1,024"):
        Pack(folder).entry_ids[0]


CODECS = {"UNCOMPRESSED": 0, "SNAPPY": 1, "ZSTD": 6}


def footer_of(data: bytes) -> tuple[int, int]:
    """Where the footer begins and ends."""
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data) - 8


def test_codecs_are_those_that_pyarrow_reads(tmp_path):
    table = pq.read_table(make(tmp_path / "pack") / ENTRIES)
    how = dict(zip(table.column_names, ["none", "snappy", "zstd"] * 99, strict=False))
    data = parquet(table, compression=how, row_group_size=2)
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    expected = [
        CODECS[metadata.row_group(g).column(j).compression]
        for g in range(metadata.num_row_groups)
        for j in range(metadata.num_columns)
    ]
    begin, end = footer_of(data)
    assert codecs_of(data[begin:end]) == expected and set(expected) == {0, 1, 6}
    for cut in range(begin, end - 1):
        with pytest.raises(ValueError, match="footer is damaged"):
            codecs_of(data[begin:cut])


def test_a_codec_that_pyarrow_does_not_know_is_refused(tmp_path):
    folder = make(tmp_path / "pack")
    data = bytearray((folder / ENTRIES).read_bytes())
    begin, end = footer_of(bytes(data))
    for at in range(begin, end):
        changed = bytes(data[:at]) + b"\x7a" + bytes(data[at + 1 :])  # 61, in Thrift's zigzag
        with suppress(ValueError):
            if data[at] == 0 and codecs_of(changed[begin:end])[0] == 61:
                break
    pack = Pack(packed(folder, changed, 4))
    with pytest.raises(PackError, match="its columns are compressed"):
        pack.entry_ids[0]


def test_a_map_of_a_photo_that_is_not_there_is_damage(tmp_path):
    maps_table = pytest.importorskip("xattn.app.triage.maps_table", exc_type=ImportError)
    folder = make(tmp_path / "pack")
    table = pq.read_table(folder / ENTRIES)
    ids = ["another", *table["image_id"].to_pylist()[1:]]
    pack = Pack(signed(folder, ENTRIES, parquet(replaced(table, "image_id", ids))))
    with pytest.raises(PackError, match="tables of maps and photos do not match"):
        maps_table.MapsTable(pack)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("field", [1, 2])
def test_a_page_header_that_lies_of_its_size_makes_no_large_page(field):
    """Fields of a page header: its type, its size once decompressed, its size in the file."""
    schema = pa.schema([pa.field("n", pa.int32(), nullable=False)])
    data = parquet(pa.table([pa.array([7, 8, 9], pa.int32())], schema=schema))
    column = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(0)
    begin, size = column.data_page_offset, column.total_compressed_size
    ends = [begin]
    while len(ends) < 4:  # each field is the byte 0x15 and a number
        end = ends[-1] + 1
        while data[end] > 127:
            end += 1
        ends.append(end + 1)
    claim = b"\x15" + varint((1 << 31) - 1 << 1)
    head, tail = data[begin : ends[field]], data[ends[field + 1] : begin + size]
    page = head + claim + tail
    foot = data[begin + size : -8]
    for old in (b"\x16" + varint(size << 1),):
        new = b"\x16" + varint(len(page) << 1)
        assert foot.count(old) >= 1
        foot = foot.replace(old, new)
    whole = data[:begin] + page + foot + len(foot).to_bytes(4, "little") + b"PAR1"
    before = pa.total_allocated_bytes(), pa.default_memory_pool().max_memory()
    try:
        found = BoundedParquet(whole, schema, 3).read(["n"])
    except ValueError as error:
        assert "Parquet" in str(error)
    else:
        assert found["n"].to_pylist() == [7, 8, 9]
    assert pa.default_memory_pool().max_memory() - max(before) < 1 << 20


def test_bounded_parquet_refuses_a_footer_that_is_too_long(monkeypatch):
    schema = pa.schema([pa.field("n", pa.int32(), nullable=False)])
    data = parquet(pa.table([pa.array([7, 8, 9], pa.int32())], schema=schema))
    begin, end = footer_of(data)
    claimed = data[:-8] + len(data).to_bytes(4, "little") + data[-4:]
    with pytest.raises(ValueError, match=f"^its footer has {len(data):,} bytes$"):
        BoundedParquet(claimed, schema, 3)  # more than the file has
    monkeypatch.setattr("xattn.packs.columns.MAX_FOOTER", end - begin - 1)
    with pytest.raises(ValueError, match=f"^its footer has {end - begin:,} bytes$"):
        BoundedParquet(data, schema, 3)
