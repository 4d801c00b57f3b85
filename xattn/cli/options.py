"""The options of a command, read from its dataclass, and a command line brought into one form.

A command line may mix photos and options in any order, repeat an option of several values, and use the
earlier spellings that fields name by :class:`Also`. :func:`canonical` gives the one form that tyro
reads, and refuses words that no command takes in one line.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from xattn.runtime.names import did_you_mean
from xattn.runtime.option_checks import Belongs, Not

ABSENT = (None, (), False)
Rules: TypeAlias = tuple[tuple[tuple[str, ...], Belongs], ...]
NUMBERS = {int: "a whole number", float: "a number"}


class Also:
    """Annotation of a field: earlier spellings of its option, which take one value each."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True)
class Option:
    """What a command's dataclass says of one of its fields."""

    flag: str
    """As typed, such as ``--batch-size``; of a positional argument, its name."""
    kind: Any
    """The type of one value: str, int, float, Path, bool or a Literal."""
    values: Literal["none", "one", "many"]
    positional: bool
    required: bool
    also: tuple[str, ...]
    """Further spellings."""
    path: tuple[str, ...]
    """Names of the nested dataclasses that hold its field, then the field's own."""
    default: Any
    belongs: Rules
    """The rules that speak of it, each with the path of the dataclass that has it."""

    @property
    def name(self) -> str:
        """What errors begin with."""
        return self.flag.removeprefix("--").replace("-", "_")


@functools.cache
def options_of(command: type[Any]) -> tuple[Option, ...]:
    """All options of a command, in the order of its fields, with those of nested dataclasses."""
    return tuple(_options(command))


def _options(
    command: type[Any], prefix: str = "", path: tuple[str, ...] = (), outer: Rules = ()
) -> Iterator[Option]:
    hints = typing.get_type_hints(command, include_extras=True)
    own = [rule for cls in command.__mro__ for rule in vars(cls).get("belongs", ())]
    rules = (*outer, *((path, rule) for rule in own))
    for field in dataclasses.fields(command):
        hint: Any = hints[field.name]
        about: tuple[Any, ...] = ()
        if typing.get_origin(hint) is Annotated:
            hint, about = hint.__origin__, hint.__metadata__
        inner = (*path, field.name)
        here = [(p, rule) for p, rule in rules if not rule.options or field.name in rule.options]
        if dataclasses.is_dataclass(hint):
            inside = prefix if tyro.conf.OmitArgPrefixes in about else f"{prefix}{field.name}."
            every = [(p, Belongs(**rule.settings)) for p, rule in here]
            yield from _options(hint, inside, inner, (*rules, *every))  # type: ignore[arg-type]
            continue
        also = [name for item in about if isinstance(item, Also) for name in item.names]
        also += [name for item in about for name in getattr(item, "aliases", None) or ()]
        positional = tyro.conf.Positional in about
        flag = (prefix + field.name).replace("_", "-")
        yield Option(
            flag if positional else f"--{flag}",
            *_kind_and_values(hint),
            positional,
            field.default is MISSING and field.default_factory is MISSING,
            tuple(also),
            inner,
            field.default,
            tuple(here),
        )


def _kind_and_values(hint: Any) -> tuple[Any, Literal["none", "one", "many"]]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in hint.__args__ if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return hint.__args__[0], "many"
    if typing.get_origin(hint) is dict:
        return str, "many"
    return hint, "none" if hint is bool else "one"


# ---------------------------------------------------------------- one form


def canonical(name: str, command: type[Any], words: Sequence[str]) -> list[str]:
    """``words`` behind ``xattn name``: what stands without an option first, then each option once.

    Raises:
        ValueError: an option that the command does not have, a value that an option cannot have, or a
            required one that is missing.
    """
    options = options_of(command)  # type: ignore[arg-type]
    known = _spellings(options)
    given: dict[str, list[str]] = {}
    free: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            free += rest
            break
        if not _is_option(word):
            free.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in ("-h", "--help"):
            return ["--help"]
        if flag not in known:
            help_ = f"xattn {name} --help lists its options"
            hint = did_you_mean(flag, known, help_)
            raise ValueError(f"option: xattn {name} has no {flag}; {hint}")
        option, earlier = known[flag]
        if option.values == "none":
            for spelling in (option.flag, f"--no-{option.flag[2:]}"):
                given.pop(spelling, None)
            given[flag] = []
            continue
        values = given.setdefault(option.flag, [])
        if not earlier or option.values == "one":
            values.clear()  # the last one counts; earlier spellings add a value each
        taken = [value] if equals else []
        many = option.values == "many" and not earlier
        while rest and not equals and not _is_option(rest[0]) and (many or not taken):
            taken.append(rest.pop(0))
        if not taken and not many:
            raise ValueError(f"{option.name}: got {flag} without a value; {_wanted(option)}")
        for text in taken:
            check_value(option, text)
        values += taken
    return _in_order(name, options, given, free)


def check_value(option: Option, text: str) -> None:
    """Raise a ``ValueError`` if an option of numbers or choices cannot have the value ``text``."""
    if option.kind in NUMBERS:
        try:
            option.kind(text)
            return
        except ValueError:
            pass
    elif typing.get_origin(option.kind) is not Literal or text in map(str, option.kind.__args__):
        return
    if text == "None":
        return
    raise ValueError(f"{option.name}: got {text!r}; {_wanted(option, text)}")


def _wanted(option: Option, text: str = "") -> str:
    if option.kind in NUMBERS:
        return f"give {NUMBERS[option.kind]}"
    if typing.get_origin(option.kind) is not Literal:
        return "give one"
    return did_you_mean(text, [str(choice) for choice in option.kind.__args__])


def _spellings(options: Sequence[Option]) -> Mapping[str, tuple[Option, bool]]:
    """The option of every spelling, and whether that is an earlier one."""
    found = {}
    for option in options:
        if not option.positional:
            found[option.flag] = option, False
        if option.values == "none":
            found[f"--no-{option.flag[2:]}"] = option, False
        for spelling in option.also:
            found[spelling] = option, True
    return found


def _in_order(
    name: str, options: Sequence[Option], given: dict[str, list[str]], free: Sequence[str]
) -> list[str]:
    places = [option for option in options if option.positional]
    last = next((option for option in places if option.values == "many"), None)
    alone = [option for option in places if option is not last]
    named = given.pop(last.flag, []) if last else []
    if last and named and len(free) > len(alone):
        raise ValueError(
            f"{last.name}: got {free[len(alone)]} and {last.also[0]} {named[0]}; give one of the two"
        )
    if last is None and len(free) > len(alone):
        raise ValueError(
            f"argument: got {free[len(alone)]!r}; xattn {name} takes {len(alone) or 'none'} without an "
            f"option, see xattn {name} --help"
        )
    for option, text in zip(alone, free):  # noqa: B905  # optional ones may be missing
        check_value(option, text)
    for option in options:
        here = alone[: len(free)] + ([last] if last and (named or free[len(alone) :]) else [])
        missing = option not in here and option.flag not in given
        if option.required and missing:
            usage = option.flag if not option.positional else option.name.upper()
            raise ValueError(f"{option.name}: got none; give xattn {name} {usage} ...")
    plain = [f"./{word}" if _is_option(word) else word for word in (*free, *named)]
    return [*plain, *(word for flag, values in given.items() for word in (flag, *values))]


# ---------------------------------------------------------------- options that are not read


def check_read(command: Any, words: Sequence[str]) -> None:
    """Raise a ``ValueError`` for the first option in ``words``, in one form, that ``command`` does not
    read, since other settings have values that it does not belong to."""
    kind: Any = type(command)
    options = options_of(kind)
    known, flags = _spellings(options), {option.path[-1]: option.flag for option in options}
    given = {known[word][0] for word in words if word in known}
    for option in options:
        owner = _at(command, option.path[:-1])
        value = getattr(owner, option.path[-1])
        if option not in given and not (option.positional and value != option.default):
            continue
        for path, rule in option.belongs:
            for setting, wanted in rule.settings.items():
                got = _setting(_at(command, path), setting)
                if not _allowed(wanted, got):
                    raise ValueError(_unread(option, flags.get(setting, ""), wanted, got))


def _unread(option: Option, setting: str, wanted: Any, got: Any) -> str:
    """Why ``option`` is refused; ``setting`` is another option, "" for a property, whose value tells."""
    named, left = f"{setting} " if setting else "", f"leave out {option.flag}"
    if isinstance(wanted, Not) and any(wanted.value is value for value in ABSENT):
        return f"{option.name}: needs {setting}; give it, or {left}"
    if isinstance(wanted, Not):
        return f"{option.name}: not read with {named}{got}; {left}"
    if any(wanted is value for value in ABSENT):
        return f"{option.name}: not read with {setting}; leave out one of the two"
    several = wanted if isinstance(wanted, list) else [wanted]
    return f"{option.name}: for {named}{' or '.join(map(str, several))} alone, got {got}; {left}"


def _allowed(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, Not):
        return bool(got != wanted.value)
    return got in wanted if isinstance(wanted, list) else bool(got == wanted)


def _at(command: Any, path: Sequence[str]) -> Any:
    return functools.reduce(getattr, path, command)


def _setting(owner: Any, name: str) -> Any:
    """The field or property ``name`` of a dataclass, or of one that is nested in it."""
    if hasattr(owner, name):
        return getattr(owner, name)
    nested = [getattr(owner, field.name) for field in dataclasses.fields(owner)]
    parts = [part for part in nested if dataclasses.is_dataclass(part)]
    return next(getattr(part, name) for part in parts if hasattr(part, name))


def _is_option(word: str) -> bool:
    return word.startswith("-") and re.fullmatch(r"-|-[\d.]+(e-?\d+)?", word) is None
