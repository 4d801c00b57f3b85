"""Mistakes with ``--import`` at the command line; tests/cli/test_imports.py has those with files."""

from mistakes.table import Typed

MISTAKES = [
    Typed("list --import mine.py", ("import: mine.py does not exist", "give a Python file")),
    Typed("list --import", ("import: got no file", "--import mine.py")),
    Typed("list --import --top 3", ("import: got no file", "--import mine.py")),
    Typed(
        "list --import nowhere.mine", ("import: there is no module 'nowhere.mine'", "install it")
    ),
    Typed("list --import {photo}", ("import: ", "is no Python file")),
    Typed("list --import {folder}", ("import: ", "is no Python file")),
    Typed("list --import json", ("import: json registers nothing", "register_explainer")),
]
