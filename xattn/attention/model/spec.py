"""The mechanisms in the layers of a converted model, and how to write them: ``gna:kernel=7`` in ``0-7``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from xattn.runtime import strict_json

_COMMA = r',(?![^\[\]]*\])(?=(?:[^"]*"[^"]*")*[^"]*$)'  # not inside brackets or quotes
LAYERS_FORM = 'numbers and ranges, such as "4-11" or "0,3,8-11"'


class Conversion(NamedTuple):
    """One mechanism in some layers of a model; ``str()`` gives ``gna:kernel=7 in layers 0-7``.

    Example:
        >>> from xattn.attention import Conversion
        >>> str(Conversion("gna", (10, 11), {"kernel": 7}))
        'gna:kernel=7 in layers 10-11'
    """

    name: str
    layers: tuple[int, ...]
    """Block numbers, ascending."""
    options: dict[str, Any]
    """Options of the mechanism that were set; ``backend``, which changes no result, is left out."""

    def __str__(self) -> str:
        return f"{format_mechanism(self.name, self.options)} in layers {format_layers(self.layers)}"

    def record(self) -> dict[str, Any]:
        """Return the form stored in files: ``{"mechanism", "layers", "options"}`` with JSON values."""
        return {
            "mechanism": self.name,
            "layers": format_layers(self.layers),
            "options": json.loads(json.dumps(self.options, default=str)),
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Conversion:
        """Create a conversion from the result of :meth:`record`.

        Raises:
            ValueError: if the record is not valid.
        """
        try:
            name, layers, options = (record[key] for key in ("mechanism", "layers", "options"))
        except (KeyError, TypeError):
            raise ValueError(
                f"conversion: got {record!r}; give mechanism, layers and options"
            ) from None
        if (
            not isinstance(name, str)
            or not isinstance(layers, str)
            or not isinstance(options, dict)
        ):
            raise ValueError(f"conversion: got {record!r}; give texts, and options as an object")
        return cls(name, tuple(parse_layers(layers)), dict(options))


def describe(made: Iterable[Conversion]) -> str:
    """Describe several conversions of one model as text."""
    return " and ".join(map(str, made))


def how_to_convert(made: Sequence[Conversion]) -> str:
    """Return the command-line options that make the conversions ``made``, or how to make them in Python."""
    if len(made) > 1:
        return "xattn.backbone.conversion.converted(...), once for each mechanism"
    name, layers, options = made[0]
    return f"--mechanism {format_mechanism(name, options)} --layers {format_layers(layers)}"


def parse_layers(text: str) -> list[int]:
    """Return the numbers that ``text`` lists, in ascending order.

    >>> parse_layers("0,3,8-11")
    [0, 3, 8, 9, 10, 11]

    Raises:
        ValueError: if ``text`` has another form.
    """
    numbers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        last = int(match[2] or match[1]) if match else -1
        if match is None or last < int(match[1]):
            raise ValueError(f"layers: got {text!r}; give {LAYERS_FORM}")
        numbers.update(range(int(match[1]), last + 1))
    return sorted(numbers)


def format_layers(numbers: Iterable[int]) -> str:
    """Write numbers in the form that :func:`parse_layers` reads.

    >>> format_layers([0, 3, 8, 9, 10, 11])
    '0,3,8-11'
    """
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def parse_mechanism(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``NAME[:option=value,...]`` into name and options. A value that is not JSON is plain text.

    >>> parse_mechanism("gna:kernel=7,causal=[true,false]")
    ('gna', {'kernel': 7, 'causal': [True, False]})
    >>> parse_mechanism('softmax:rotate="comrope:form=ap,block=4"')
    ('softmax', {'rotate': 'comrope:form=ap,block=4'})

    Raises:
        ValueError: if an option has no value or occurs twice.
    """
    return parse_named(text, "mechanism")


def parse_named(text: str, argument: str) -> tuple[str, dict[str, Any]]:
    """Parse any text in the form that :func:`parse_mechanism` reads; error messages begin with
    ``argument``."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for pair in re.split(_COMMA, rest) if rest else ():
        key, found, value = pair.partition("=")
        if not found or not key.strip().isidentifier():
            raise ValueError(
                f"{argument}: got {pair!r} in {text!r}; write NAME:option=value,option=value"
            )
        if key.strip() in options:
            raise ValueError(f"{argument}: got {key.strip()} twice in {text!r}; give it once")
        options[key.strip()] = _value(value)
    return name.strip(), options


def format_mechanism(name: str, options: Mapping[str, Any]) -> str:
    """Write a name and options in the form that :func:`parse_mechanism` reads.

    >>> format_mechanism("gna", {"kernel": 7, "causal": [True, False]})
    'gna:kernel=7,causal=[true,false]'
    """
    pairs = [f"{key}={_text(value)}" for key, value in options.items()]
    return f"{name}:{','.join(pairs)}" if pairs else name


def _value(text: str) -> Any:
    try:
        return strict_json.parse(text, nan=True)
    except ValueError:
        return text.strip()


def _text(value: Any) -> str:
    if isinstance(value, str) and _value(value) == value and "," not in value:
        return value  # without quotes
    return json.dumps(value, separators=(",", ":"), default=str)
