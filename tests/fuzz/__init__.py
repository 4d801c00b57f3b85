"""The fuzz suite: ``make fuzz``, and a part of it in ``make test``. A new reader is one entry of a target file."""

from fuzz import commands, heads, labels, outcomes, packs, photos, regions, states, viewer
from fuzz.engine import (
    TARGETS,
    Failure,
    Tally,
    Target,
    attempt,
    make_input,
    run,
    shares,
    table,
    workspace,
)

__all__ = [
    "TARGETS", "Failure", "Tally", "Target", "attempt", "commands", "heads", "labels", "make_input", "outcomes", "packs", "photos", "regions",
    "run", "shares", "states", "table", "viewer", "workspace",
]  # fmt: skip
