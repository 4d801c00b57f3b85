"""Page headers of Parquet files, read before any page is decoded.

A page header says how many bytes and values its page has. The library that decodes pages allocates what
it says, so a small file may take all memory. Here every header of a column is read, with Thrift's compact
protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), and refused
unless the pages fill the column and stay within its bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_BOOLEANS, _INTEGERS, _I32, _DOUBLE, _BINARY, _STRUCT = (1, 2), (4, 5, 6), 5, 7, 8, 12
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_PLAIN, _OF_DICTIONARIES, _ENCODINGS = {0}, {0, 2}, {0, 2, 8}


@dataclass(frozen=True)
class Bounds:
    """What the pages of one column of one row group may hold.

    ``values`` is the sum over its data pages, ``size`` the greatest sum of bytes once decompressed, and
    ``dictionary`` says whether its values may be numbers into a dictionary.
    """

    values: int
    size: int
    dictionary: bool


def check_pages(data: bytes | memoryview, bounds: Bounds) -> int:
    """The decompressed bytes of the pages that fill ``data``, one column of one row group.

    Raises:
        ValueError: a header is damaged, or its page is none that :class:`Bounds` allow.
    """
    at = values = size = 0
    while at < len(data):
        header, at = _struct(data, at, 0)
        kind, decompressed, stored = (_number(header, key) for key in (1, 2, 3))
        size += decompressed
        if size > bounds.size:
            raise ValueError(f"its pages have more than {bounds.size:,} bytes")
        if kind == _DATA_PAGE:
            about = header.get(5)
            allowed = _ENCODINGS if bounds.dictionary else _PLAIN
        elif kind == _DICTIONARY_PAGE and bounds.dictionary:
            about, allowed = header.get(7), _OF_DICTIONARIES
        else:
            raise ValueError("it has pages of another kind")
        if type(about) is not dict or _number(about, 2) not in allowed:
            raise ValueError("a page is encoded in another way")
        count = _number(about, 1)
        if count > bounds.values:
            raise ValueError(f"a page says that it has {count:,} values")
        values += count if kind == _DATA_PAGE else 0
        at += stored
    if at != len(data) or values != bounds.values:
        raise ValueError("its pages do not add up")
    return size


def _number(fields: dict[int, Any], key: int) -> int:
    value = fields.get(key)
    if type(value) is not int or value < 0:
        raise ValueError("a page header is damaged")
    return value


def _struct(data: bytes | memoryview, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The fields of a Thrift structure that begins at ``at``, and where it ends."""
    fields: dict[int, Any] = {}
    key = 0
    try:
        while (head := data[at]) != 0:
            at += 1
            step, kind = head >> 4, head & 15
            if step == 0 or depth > 2:
                raise ValueError("a page header is damaged")
            key += step
            if kind in _BOOLEANS:
                fields[key] = kind == 1
            elif kind in _INTEGERS:
                fields[key], at = _zigzag(data, at, 5 if kind == _I32 else 10)
            elif kind == _BINARY:
                length, at = _varint(data, at, 5)
                at += length
            elif kind == _DOUBLE:
                at += 8
            elif kind == _STRUCT:
                fields[key], at = _struct(data, at, depth + 1)
            else:
                raise ValueError("a page header is damaged")
    except IndexError:
        raise ValueError("a page header is cut short") from None
    return fields, at + 1


def _zigzag(data: bytes | memoryview, at: int, longest: int) -> tuple[int, int]:
    value, at = _varint(data, at, longest)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes | memoryview, at: int, longest: int) -> tuple[int, int]:
    value = 0
    for i in range(longest):
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            if value >> (32 if longest == 5 else 64):
                break
            return value, at + i + 1
    raise ValueError("a number in a page header is too large")
