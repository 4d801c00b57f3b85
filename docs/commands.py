"""Writes the table of options in ``docs/commands.md``: ``python docs/commands.py``."""

from pathlib import Path

from xattn.cli.entry import COMMANDS
from xattn.cli.model import BackboneArgs
from xattn.runtime.arguments import Option, options_of

PAGE = Path(__file__).with_name("commands.md")
START, END = "<!-- options -->\n", "<!-- end of options -->\n"
SHOWN = "train probe distill prune explain caption evaluate compare parts export".split()


def table() -> str:
    """The options that several commands have, a row each; those of the network in one row."""
    commands: dict[str, dict[str, Option]] = {}
    for name in SHOWN:
        for option in options_of(COMMANDS[name]):
            commands.setdefault(option.flag, {})[name] = option
    network = [option.flag for option in options_of(BackboneArgs)]
    lines = [f"| option | {' | '.join(SHOWN)} |", "| :-- |" + " :-: |" * len(SHOWN)]
    for flag, found in commands.items():
        if len(found) > 1 and flag not in network[1:]:
            title = "PHOTOS" if flag == "images" else f"`{flag}`"
            if flag == network[0]:
                title = "options of the network"
            marks = ["x" if name in found else "" for name in SHOWN]
            lines.append(f"| {title} | {' | '.join(marks)} |")
    listed = ", ".join(f"`{flag}`" for flag in network)
    return "\n".join([*lines, "", f"Options of the network: {listed}.", ""])


def page() -> str:
    """The page with the table as the commands are now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
