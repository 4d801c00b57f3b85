"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def markdown(
    titles: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1
) -> Iterator[str]:
    """Lines of a table whose first ``left`` columns are aligned left and the others right.

    >>> print(*markdown(["head", "accuracy"], [("gap", 91.5)]), sep="\\n")
    | head | accuracy |
    | :-- | --: |
    | gap | 91.5 |
    """
    rules = [":--"] * left + ["--:"] * (len(titles) - left)
    for line in (titles, rules, *rows):
        yield f"| {' | '.join(map(str, line))} |"
