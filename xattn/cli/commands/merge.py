"""``xattn merge``: join several packs into one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xattn.cli.outputs import pack_output
from xattn.cli.shared import open_packs
from xattn.runtime.arguments import Argument


@dataclass(frozen=True)
class Merge:
    """Join packs of different photos, or packs of different methods on the same photos, into one."""

    packs: Annotated[tuple[Path, ...], Argument(positional=True)] = ()
    """Two or more folders written by xattn explain or compare, or their URLs."""
    output: Path | None = None
    """Folder for the pack; by default runs/merged, or runs/merged-2 and so on if there are results
    already."""
    overwrite: bool = False
    """Replace the results in the output folder."""

    def check(self) -> None:
        if len(self.packs) < 2:
            got = "none" if not self.packs else str(self.packs[0])
            raise ValueError(f"packs: got {got}; give two or more packs")

    def run(self) -> None:
        from xattn.packs.merging import merge_packs

        packs = open_packs(self.packs)
        with pack_output(self.output, "runs/merged", self.overwrite) as output:
            found = merge_packs(packs, output.folder)
        shared = f", {found.joined:,} of them in several packs" if found.joined else ""
        print(f"merged: {len(packs)} packs, {found.photos:,} photos{shared}, {found.maps:,} maps")
        print(f"pack: {output.place}")
