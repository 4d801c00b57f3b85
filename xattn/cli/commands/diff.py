"""``xattn diff``: report the differences between two packs of the same photos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xattn.cli.shared import open_packs
from xattn.runtime.arguments import Argument


@dataclass(frozen=True)
class Diff:
    """Compare two packs of the same photos, made with two networks, two heads, or two states of one of
    them."""

    packs: Annotated[tuple[Path, Path], Argument(positional=True)]
    """The pack before and the pack after: folders written by xattn explain or compare, or their URLs."""
    methods: tuple[str, str] | None = None
    """Compare the maps of the first method in the first pack with those of the second method in the second
    pack, which may be the same pack; by default each method is compared with itself."""
    output: Path | None = None
    """Folder for difference.md and difference.json; by default the report is only printed."""

    def run(self) -> None:
        from xattn.eval.report.pack_differences import compare_packs, difference_lines
        from xattn.runtime.files import check_folder, write_json, write_text

        if self.output is not None:
            check_folder(self.output)
        opened = open_packs(self.packs)
        found = compare_packs(opened[0], opened[1], self.methods)
        lines = [*difference_lines(found)]
        for line in lines:
            print(line)
        if self.output is not None:
            write_text(self.output / "difference.md", "\n".join(lines) + "\n")
            write_json(self.output / "difference.json", found.to_json())
            print(f"\nreport: {self.output / 'difference.md'}")
