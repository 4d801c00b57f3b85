"""Mutations: bytes, text, tables in JSON or YAML, numbers in a binary header. Pure functions of a generator."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

LARGEST = 1 << 20  # bytes of an input
NUMBERS = [
    "0", "-1", "1", "1.5", "-0.0", "1e308", "-1e308", "1e309", "1e-320", "NaN", "Infinity", "-Infinity", "true", "null",
    "127", "128", "255", "256", "65535", "65536", "2147483647", "2147483648", "4294967296", "9007199254740993",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616",
    "1" + "0" * 60, "1" + "0" * 400, "9" * 5000, "0x10", "1_000", "１２", "²", "1,5",
]  # fmt: skip
TEXTS = [
    "", " ", "\t", "\0", "a\0b", ".", "..", "../../etc/passwd", "/", "/etc/passwd", "~", "-", "--help", "\\", "%s%n", "{0}",
    "x" * 300, "x" * 5000, "é" * 200, "\u202egnp.exe", "\ud800", "\udcff", "\ufeff", "\x1b[31m", "\u2028", "a\nb", "a\r\nb",
    "None", "nan", "<script>", "'", '"', '""', ",", ";", "😀", "cat", "dog", "1", "0",
]  # fmt: skip
_RAW = "\ue000raw:"  # a text that is written into JSON without its quotes


def deep(levels: int, opening: str = "[", closing: str = "]") -> str:
    """Brackets in brackets."""
    return opening * levels + closing * levels


def of_bytes(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Bits, bytes and blocks changed, moved, cut and repeated."""
    found = bytearray(data)
    for _ in range(_times(rng)):
        at = rng.randrange(len(found) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 16, 64, 512)), len(found) - at)
        what = rng.randrange(9)
        if what == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            found[at : at + length] = rng.randbytes(length)
        elif what == 2:
            del found[at : at + length]
        elif what == 3:
            found[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif what == 4:
            del found[at:]
        elif what == 5:
            found[at:at] = found[at : at + length] * rng.choice((1, 2, 50))
        elif what == 6:
            found[at : at + length] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * length
        elif what == 7:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            value = rng.choice((0, 1, 2, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 63) - 1))
            found[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            found[at:] = other[start:]
    return bytes(found[:LARGEST])


def of_text(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Words, lines and signs changed; now and then bytes."""
    if rng.random() < 0.15:
        return of_bytes(data, rng, others)
    text = data.decode("utf-8", "surrogateescape")
    for _ in range(_times(rng)):
        lines = text.split("\n")
        i = rng.randrange(len(lines))
        what = rng.randrange(7)
        if what == 0:
            lines[i:i] = [lines[rng.randrange(len(lines))]] * rng.choice((1, 1, 3, 1000))
        elif what == 1:
            del lines[i]
        elif what == 2:
            lines[i] = rng.choice((*NUMBERS, *TEXTS))
        elif what == 3:
            lines[i] = _word(lines[i], rng)
        elif what == 4:
            lines = [_word(line, rng) if rng.random() < 0.5 else line for line in lines]
        elif what == 5:
            at = rng.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + rng.choice((*NUMBERS, *TEXTS)) + lines[i][at:]
        else:
            lines[i] = rng.choice((lines[i] * 2, lines[i][::-1], lines[i].upper(), lines[i][:-1]))
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")[:LARGEST]


def of_json(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Values, keys and types changed; now and then text or bytes."""
    if rng.random() < 0.2:
        return of_text(data, rng, others)
    try:
        tree = [json.loads(data)]
    except (ValueError, RecursionError):
        return of_text(data, rng, others)
    for _ in range(_times(rng)):
        _change(tree, rng)
    return _dump(tree[0]).encode("utf-8", "surrogatepass")[:LARGEST]


def of_json_lines(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """One line of JSON lines, or the lines."""
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    if not lines[i] or rng.random() < 0.4:
        return of_text(data, rng, others)
    lines[i] = of_json(lines[i], rng, lines)
    return b"\n".join(lines)[:LARGEST]


def of_safetensors(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The header as JSON with its length put right, or bytes."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4 or length > len(data) - 8:
        return of_bytes(data, rng, others)
    header = of_json(data[8 : 8 + length], rng, [data[8 : 8 + length]])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


Mutate = Callable[[bytes, random.Random, Sequence[bytes]], bytes]
KINDS: dict[str, Mutate] = {
    "bytes": of_bytes,
    "text": of_text,
    "json": of_json,
    "json lines": of_json_lines,
    "safetensors": of_safetensors,
}


def _times(rng: random.Random) -> int:
    """1, less often 2, seldom more."""
    return next((n for n in range(1, 8) if rng.random() < 0.55), 8)


def _word(line: str, rng: random.Random) -> str:
    separator = rng.choice((" ", ",", ":", "\t", "=", "&", "."))
    words = line.split(separator)
    words[rng.randrange(len(words))] = rng.choice((*NUMBERS, *TEXTS))
    return separator.join(words)


def _value(rng: random.Random) -> Any:
    what = rng.randrange(6)
    if what < 2:
        return _RAW + rng.choice(NUMBERS)
    if what == 2:
        return rng.choice(TEXTS)
    if what == 3:
        return copy.deepcopy(
            rng.choice(([], {}, [[]], [None], {"": None}, [1, 2], {"group": None}, ["a"] * 50))
        )
    if what == 4:
        return _RAW + rng.choice((deep(50), deep(5_000), deep(100_000), deep(20_000, '{"a":', "}")))
    return rng.choice((True, False, None, 0, -1, 1, 2.5, 1 << 40))


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value below a container."""
    if len(found) < 5_000:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in list(items):
            found.append((tree, key))
            if isinstance(value, dict | list):
                _places(value, found)
    return found


def _change(tree: list[Any], rng: random.Random) -> None:
    """One value, key or place of a tree, whose root is the one item of ``tree``."""
    places = _places(tree, [])
    holder, key = rng.choice(places)
    what = rng.randrange(8)
    if what < 3:
        holder[key] = _value(rng)
    elif what == 3 and holder is not tree:
        del holder[key]
    elif what == 4:
        holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, [holder[key]] * 3))
    elif what == 5 and isinstance(holder, dict):
        holder[rng.choice((*TEXTS, _RAW, f"{key}2"))] = holder.pop(key)
    elif what == 6:
        other, place = rng.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            with suppress(RecursionError):  # too deep to be copied
                holder[key] = copy.deepcopy(other[place])
    elif type(holder[key]) in (int, float) and abs(holder[key]) < 1e15:
        step = rng.choice((-1, 1, 0.5, 1 << 20))
        holder[key] = holder[key] + step if rng.random() < 0.5 else holder[key] * step
    else:
        holder[key] = str(holder[key])[:1000] if rng.random() < 0.5 else _value(rng)


def _dump(tree: Any) -> str:
    text = json.dumps(tree, ensure_ascii=False)
    bare = re.compile(rf'"{_RAW}((?:[^"\\]|\\.)*)"')
    return bare.sub(lambda found: found[1].replace('\\"', '"'), text)
