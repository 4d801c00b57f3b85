"""Options are checked against the annotations of a constructor: type, None, choices, range.

    @checked
    def __init__(self, queries: Count = 32, gamma: Positive | None = None, norm: bool = True)

refuses ``queries=2.0``, ``gamma=nan`` and ``norm="false"``; a bool does not count as a number.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from typing_extensions import get_type_hints

P = ParamSpec("P")
R = TypeVar("R")

SMALLEST, LARGEST = 2.0**-126, 2.0**127  # normal float32 numbers, like weights


class Condition(NamedTuple):
    """A condition that a value must meet in addition to having the right type, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


class AnyExcept:
    """Any value except the given ones, for :class:`AppliesIf`."""

    def __init__(self, *values: Any) -> None:
        self.values = values


class AppliesIf:
    """Options that have an effect only if other settings have the given values; otherwise, a command line
    that contains these options is rejected.

        option_rules: ClassVar = (
            AppliesIf("masks", objective="outcomes"),
            AppliesIf("epsilon", attention=AnyExcept("none")),
        )

    The names refer to fields of the dataclass that contains the rules, or of its nested dataclasses; the
    name of a nested dataclass stands for all its fields. A setting may also be a property. The values
    allowed for a setting are given as a single value, a list of values, or an :class:`AnyExcept`.
    """

    def __init__(self, *options: str, **settings: Any) -> None:
        self.options, self.settings = options, settings


Count: TypeAlias = Annotated[int, Condition(lambda n: n >= 1, "an int of at least 1")]
Whole: TypeAlias = Annotated[int, Condition(lambda n: n >= 0, "an int of at least 0")]
NotNegative: TypeAlias = Annotated[
    float, Condition(lambda x: x >= 0, "a finite number of at least 0")
]
Positive: TypeAlias = Annotated[
    float, Condition(lambda x: x >= SMALLEST, "a positive, finite number (float32)")
]
Names: TypeAlias = Annotated[Sequence[str], Condition(bool, "a list of names, one per class")]
Share: TypeAlias = Annotated[float, Condition(lambda x: 0 <= x < 1, "a number from 0 to below 1")]


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with a check: an argument that does not match its annotation raises a ``ValueError``.

    Checked annotations are bool, int, float (finite; an int is accepted), str, None, Literal,
    Sequence, Mapping, unions of these, and any of these with a :class:`Condition`. Other annotations allow
    anything.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints = hints_of(function)

        def plain(name: str, value: Any) -> Any:
            return check(name, value, hints[name]) if name in hints else value

        names = inspect.signature(function).parameters
        given: Any = [*map(plain, names, args), *args[len(names) :]]
        named: Any = {name: plain(name, value) for name, value in kwargs.items()}
        return function(*given, **named)

    return call


def check(name: str, value: Any, hint: Any) -> Any:
    """``value``, with a NumPy integer converted to an int; raises a ``ValueError`` that names ``name``
    unless ``hint`` allows it."""
    if isinstance(value, Integral) and not isinstance(value, int):
        value = int(value)
    if not _allows(hint, value):
        note = ""
        texts = all(part is str or get_origin(part) is Literal for part in _options(hint))
        if isinstance(value, str) and not texts:
            note = " (options written as name=value are JSON: true, false, null, 4, 0.5)"
        raise ValueError(f"{name}: got {reprlib.repr(value)}; give {_words(hint)}{note}")
    return value


def check_fields(made: Any, but: Collection[str] = ()) -> None:
    """Raise a ``ValueError`` for the first dataclass field whose value does not match its annotation.

    Defaults, fields listed in ``but``, and fields that the constructor does not take are not checked.
    """
    hints = hints_of(type(made))  # type: ignore[arg-type]
    for field in dataclasses.fields(made):
        if field.init and field.name in hints and field.name not in but:
            value = getattr(made, field.name, None)
            plain = value if value is field.default else check(field.name, value, hints[field.name])
            if plain is not value:
                object.__setattr__(made, field.name, plain)  # also for a frozen dataclass


@functools.cache
def hints_of(annotated: Any) -> dict[str, Any]:
    """The annotations of a function or class."""
    try:
        return get_type_hints(annotated, include_extras=True)
    except NameError:  # names that only a type checker sees: such options are not checked
        return {}


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or ``hint`` alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _allows(hint: Any, value: Any) -> bool:
    return any(_allows_one(part, value) for part in _options(hint))


def _allows_one(hint: Any, value: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        where = [w for w in args[1:] if isinstance(w, Condition)]
        return _allows(args[0], value) and all(w.holds(value) for w in where)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and all(_allows(args[0], item) for item in value)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    if hint in (int, float):
        number = isinstance(value, int | hint) and not isinstance(value, bool)
        return number and (hint is int or abs(value) <= LARGEST)
    return True


def _words(hint: Any) -> str:
    words: list[str] = []
    for part in _options(hint):
        words += map(repr, get_args(part)) if get_origin(part) is Literal else [_words_one(part)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words_one(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next(w.words for w in args[1:] if isinstance(w, Condition))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a dict"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list ({_words(args[0])} each)"
    names = {
        bool: "True or False",
        int: "an int",
        float: "a finite number (float32)",
        str: "a str",
        NoneType: "None",
    }
    return names.get(hint, str(hint))
