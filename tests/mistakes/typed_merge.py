"""Mistakes at the command line with packs: xattn merge, and the pictures of a pack."""

from mistakes.table import Typed

MISTAKES = [
    Typed("merge", ("packs: got none; give two or more packs",)),
    Typed("merge {folder}", ("packs: got ", "give two or more")),
    Typed("merge {folder}/a {folder}/b", ("packs: ", "is no folder", "xattn explain wrote")),
    Typed("merge {folder} {folder}", ("packs: ", "cannot be opened", "manifest.json")),
    Typed("merge {photo} {photo}", ("packs: ", "is no folder")),
    Typed("merge {folder} {folder} --ouput c", ("option: xattn merge has no --ouput", "--output")),
    Typed("explain {photo} --overlays -1", ("overlays: got -1", "0 for none")),
    Typed("explain {photo} --overlays two", ("overlays: got 'two'",)),
]
