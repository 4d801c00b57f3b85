"""Names as people type them: "Grad-CAM++" is ``gradcam_plusplus``, and "gradcm" may mean ``gradcam``.

The module also makes file names, class names and error messages safe to display.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

# Control characters, and those that reorder the text around them: "exe.jpg" may be a "gpj.exe".
_HIDDEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """``text`` with a replacement mark for every character that only affects other characters.

    Right-to-left letters, emoji and white space are kept.

    >>> visible("\\u202egpj.exe")
    '\ufffdgpj.exe'
    """
    return _HIDDEN.sub("\ufffd", text)


def encodable(text: str) -> str:
    """``text`` without lone surrogates, which JSON can express but UTF-8 cannot encode.

    >>> encodable("half \\ud800 a character")
    'half ? a character'
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def short_reason(error: BaseException) -> str:
    """The reason in an error, on one line and without a path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split())[:200] or type(error).__name__


def reason(error: Exception) -> str:
    """The message of an error; for an ``OSError`` only the words after its number.

    >>> reason(OSError(28, "No space left on device"))
    'No space left on device'
    """
    return str(error.args[-1] if isinstance(error, OSError) and error.args else error)


# difflib's smallest ratio for a near name, and how far it may be behind the nearest.
LEAST_LIKE, SPREAD = 0.6, 0.15
SHORTEST_PART = 3  # smallest number of letters that may abbreviate a name


def normalise_name(name: object) -> str:
    """``name`` in lower case, without hyphens, underscores, dots and spaces; "+" becomes "plus".

    >>> normalise_name("Grad-CAM++")
    'gradcamplusplus'
    """
    return re.sub(r"[\W_]", "", str(name).lower().replace("+", "plus"))


def matching_name(name: object, names: Iterable[str]) -> str | None:
    """The name in ``names`` that equals ``name``, either exactly or after :func:`normalise_name`; None if
    there is no such name, or more than one.

    >>> matching_name("Grad-CAM", ["gradcam", "layercam"])
    'gradcam'
    """
    names = list(names)
    if name in names:
        return str(name)
    alike = [other for other in names if normalise_name(other) == normalise_name(name)]
    return alike[0] if len(alike) == 1 else None


def near_names(name: object, names: Collection[str], most: int = 3) -> list[str]:
    """Up to ``most`` of ``names`` that ``name`` may have meant, nearest first.

    >>> near_names("shap", ["kernel_shap", "lime"])
    ['kernel_shap']
    """
    wanted = normalise_name(name)
    known = {normalise_name(other): other for other in reversed(list(names))}
    best = difflib.get_close_matches(wanted, known, 1, LEAST_LIKE)
    near: list[str] = []
    if best:
        like = difflib.SequenceMatcher(None, best[0], wanted).ratio()
        near = difflib.get_close_matches(wanted, known, most, max(LEAST_LIKE, like - SPREAD))
    near += [p for p in known if _part(wanted, p) and p not in near][::-1]
    return [known[p] for p in near[:most]]


def did_you_mean(
    name: object, names: Collection[str], otherwise: str | None = None, most: int = 3
) -> str:
    """A "did you mean" question with :func:`near_names`; if no name is near, ``otherwise`` or a list of all
    names.

    >>> did_you_mean("gradcm", ["gradcam", "lime"]), did_you_mean("zzz", ["gradcam", "lime"])
    ('did you mean gradcam?', 'choose one of gradcam, lime')
    """
    near = near_names(name, names, most)
    if near:
        return f"did you mean {' or '.join(', '.join(near).rsplit(', ', 1))}?"
    return f"choose one of {', '.join(names)}" if otherwise is None else otherwise


def _part(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return len(short) >= SHORTEST_PART and short in long


def count_phrase(number: int, what: str) -> str:
    """A count with its noun in the singular or plural.

    >>> count_phrase(1, "photo"), count_phrase(1200, "photo")
    ('1 photo', '1,200 photos')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"
