"""A safetensors file whose tensors go to disk as they come; its header is put before them at the end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from xattn.packs.format import FORMAT
from xattn.packs.sharded.manifest_shards import ShardFile


class TensorDraft:
    """The file ``path`` in the making."""

    def __init__(self, path: Path) -> None:
        self._path, self._draft = path, path.with_suffix(".draft")
        self._header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": "2"}}
        self._end = 0
        self._stream = self._draft.open("wb")

    def add(self, name: str, data: bytes, dtype: str, shape: list[int]) -> None:
        """The bytes of a tensor, after all before it."""
        begin, self._end = self._end, self._end + len(data)
        self._stream.write(data)
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, self._end]}

    @property
    def count(self) -> int:
        """How many tensors were added."""
        return len(self._header) - 1

    def close(self) -> ShardFile:
        """Write the file, and say what it is."""
        self._stream.close()
        header = json.dumps(self._header, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # as safetensors aligns its data
        digest = hashlib.sha256()
        with self._path.open("wb") as whole, self._draft.open("rb") as draft:
            block = len(header).to_bytes(8, "little") + header
            while block:
                whole.write(block)
                digest.update(block)
                block = draft.read(1 << 20)
        self._draft.unlink()
        size = self._path.stat().st_size
        return ShardFile(self._path.name, self.count, size, digest.hexdigest())

    def abandon(self) -> None:
        """Close what is open."""
        self._stream.close()
