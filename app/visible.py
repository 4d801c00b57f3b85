"""Names of files and classes, and the words of errors, as a person should see them."""

from __future__ import annotations

import re

# Control characters, and those that order text against its letters: "exe.jpg" may be a "gpj.exe".
_HIDDEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """``text`` with a mark for each character that would only act on others; right-to-left letters,
    emoji and white space stay.

    >>> visible("\\u202egpj.exe")
    '\ufffdgpj.exe'
    """
    return _HIDDEN.sub("\ufffd", text)


def reason(error: Exception) -> str:
    """The words of an error; of an OSError, those behind its number.

    >>> reason(OSError(28, "No space left on device"))
    'No space left on device'
    """
    return str(error.args[-1] if isinstance(error, OSError) and error.args else error)
