"""File names, class names and error messages in the form that a person should see."""

from __future__ import annotations

import re

# Control characters, and those that reorder the text around them: "exe.jpg" may be a "gpj.exe".
_HIDDEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """``text`` with a replacement mark for every character that only acts on other characters.

    Right-to-left letters, emoji and white space stay.

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


def reason(error: Exception) -> str:
    """The message of an error; of an ``OSError`` only the words after its number.

    >>> reason(OSError(28, "No space left on device"))
    'No space left on device'
    """
    return str(error.args[-1] if isinstance(error, OSError) and error.args else error)
