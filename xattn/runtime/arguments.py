"""A dataclass defines the options of a command: its fields are the options, and their docstrings are the
help.

    @dataclass(frozen=True)
    class Explain:
        images: Annotated[tuple[str, ...], Argument(positional=True, metavar="PHOTOS")] = ()
        \"\"\"Photos.\"\"\"
        top: int = 1
        \"\"\"How many classes.\"\"\"

    parse(Explain, ["a.jpg", "--top", "2", "b.jpg"], "xattn explain")

argparse parses the words once, with photos and options in any order. Fields of nested dataclasses are
options like any others. Invalid input raises a one-line ``ValueError`` that names the argument and the
remedy.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeAlias

from xattn.runtime.names import did_you_mean
from xattn.runtime.option_checks import AnyExcept, AppliesIf

ABSENT = (None, (), False)
Rules: TypeAlias = tuple[tuple[tuple[str, ...], AppliesIf], ...]
NUMBERS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Argument:
    """Annotation of a field: whether it is positional, additional spellings, and its placeholder in the
    help."""

    positional: bool = False
    also: tuple[str, ...] = ()
    metavar: str | None = None


@dataclass(frozen=True)
class Option:
    """A field of a command's dataclass, seen as an option."""

    flag: str
    """As typed, such as ``--batch-size``; for a positional argument, its name."""
    kind: Any
    """The type of one value: str, int, float, Path, bool or a Literal."""
    values: Literal["none", "one", "many"] | int
    """How many values it takes: none for a bool, any number, or a fixed number."""
    required: bool
    argument: Argument
    path: tuple[str, ...]
    """Names of the nested dataclasses that contain its field, then the field's own."""
    default: Any
    option_rules: Rules
    """The rules that mention it, each with the path of the dataclass that declares it."""

    @property
    def name(self) -> str:
        """The start of error messages."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def positional(self) -> bool:
        return self.argument.positional

    @property
    def dest(self) -> str:
        return ".".join(self.path)


@functools.cache
def options_of(command: type[Any]) -> tuple[Option, ...]:
    """All options of a command, in field order, including those of nested dataclasses."""
    return tuple(_options(command))


def _options(command: type[Any], path: tuple[str, ...] = (), outer: Rules = ()) -> Iterator[Option]:
    hints = typing.get_type_hints(command, include_extras=True)
    own = [rule for cls in command.__mro__ for rule in vars(cls).get("option_rules", ())]
    rules = (*outer, *((path, rule) for rule in own))
    for field in dataclasses.fields(command):
        hint: Any = hints[field.name]
        about: tuple[Any, ...] = ()
        if typing.get_origin(hint) is Annotated:
            hint, about = hint.__origin__, hint.__metadata__
        inner = (*path, field.name)
        here = [(p, rule) for p, rule in rules if not rule.options or field.name in rule.options]
        if dataclasses.is_dataclass(hint):
            every = [(p, AppliesIf(**rule.settings)) for p, rule in here]
            yield from _options(hint, inner, (*rules, *every))  # type: ignore[arg-type]
            continue
        argument = next((item for item in about if isinstance(item, Argument)), Argument())
        flag = field.name.replace("_", "-")
        yield Option(
            flag if argument.positional else f"--{flag}",
            *_kind_and_values(hint),
            field.default is MISSING and field.default_factory is MISSING,
            argument,
            inner,
            field.default,
            tuple(here),
        )


def _kind_and_values(hint: Any) -> tuple[Any, Literal["none", "one", "many"] | int]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in hint.__args__ if part is not type(None))
    if typing.get_origin(hint) is tuple:
        kinds = hint.__args__
        return kinds[0], "many" if kinds[-1] is ... else len(kinds)
    if typing.get_origin(hint) is Annotated:
        hint = hint.__origin__
    return hint, "none" if hint is bool else "one"


# ---------------------------------------------------------------- parsing


def choose(
    commands: Mapping[str, type[Any]], words: Sequence[str], prog: str, description: str
) -> Any:
    """The command given by ``words``: the name of one of ``commands``, followed by its arguments for
    :func:`parse`.

    Raises:
        ValueError: the command is unknown, or as in :func:`parse`.
        SystemExit: after ``--help``.
    """
    if not words or words[0] in ("-h", "--help"):
        lines = [f"usage: {prog} COMMAND [OPTIONS]; {prog} COMMAND --help lists its options", ""]
        lines += [*textwrap.wrap(description, 100), ""]
        for name, command in commands.items():
            about = " ".join((command.__doc__ or "").split("\n\n")[0].split())
            lines += textwrap.wrap(f"  {name:<12} {about}", 100, subsequent_indent=15 * " ")
        print("\n".join(lines))
        raise SystemExit(0)
    name, *rest = words
    if name not in commands:
        raise ValueError(f"command: {prog} has no {name!r}; {did_you_mean(name, commands)}")
    return parse(commands[name], rest, f"{prog} {name}")


def parse(command: type[Any], words: Sequence[str], prog: str) -> Any:
    """An instance of ``command`` with the fields given by ``words``.

    Raises:
        ValueError: an unknown option, an invalid value, a missing required option, or an option that is
            not read in combination with the others.
        SystemExit: after ``--help``.
    """
    options = options_of(command)  # type: ignore[arg-type]
    parser = _Parser(prog, command, options)
    if {"-h", "--help"} & set(words):
        parser.describe(command)
    try:
        given = vars(parser.read(list(words)))
    except _Refused as error:
        raise ValueError(str(error)) from None
    for option in options:
        if option.positional and given.get(option.dest) in (None, []):
            given.pop(option.dest, None)  # argparse gives a missing positional a value
        if option.required and option.dest not in given:
            usage = option.flag if not option.positional else option.name.upper()
            raise ValueError(f"{option.name}: got none; give {prog} {usage} ...")
        count = option.values
        if isinstance(count, int) and len(given.get(option.dest, count * [""])) != count:
            raise ValueError(f"{option.name}: got {len(given[option.dest])}; give {count}")
    made = _made(command, given)
    check_read(made, set(given))
    return made


def _made(command: type[Any], given: Mapping[str, Any], prefix: str = "") -> Any:
    values = {}
    hints = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        dest = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _made(hints[field.name], given, f"{dest}.")
        elif dest in given:
            value = given[dest]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return command(**values)


class _Parser(argparse.ArgumentParser):
    """argparse, with one-line ``ValueError`` s instead of exits."""

    def __init__(self, prog: str, command: type[Any], options: Sequence[Option]) -> None:
        places = [f"[{_metavar(option)}]" for option in options if option.positional]
        super().__init__(
            prog=prog,
            usage=" ".join([prog, *places, "[OPTIONS]"]),
            description=inspect.cleandoc(command.__doc__ or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.groups: dict[tuple[str, ...], Any] = {(): self}
        self.actions = {option: self._add(option) for option in options}

    def _add(self, option: Option) -> Any:
        inside = option.path[:-1]
        if inside not in self.groups:
            self.groups[inside] = self.add_argument_group(f"{inside[-1]} options")
        group = self.groups[inside]
        spellings = [option.dest] if option.positional else [*option.argument.also, option.flag]
        details: dict[str, Any] = {} if option.positional else {"dest": option.dest}
        if option.values == "none":
            # If a name starts with --no-, BooleanOptionalAction would take the option for its opposite.
            no = option.flag.startswith("--no-")
            details["action"] = "store_true" if no else argparse.BooleanOptionalAction
            return group.add_argument(*spellings, **details)
        details["type"] = functools.partial(_value, option)
        details["metavar"] = _metavar(option)
        if option.values != "one":
            details["nargs"] = "*"
        elif option.positional:
            details["nargs"] = "?"
        return group.add_argument(*spellings, **details)

    def read(self, words: list[str]) -> argparse.Namespace:
        if "--" in words:  # what follows are not options, whatever they begin with
            end = words.index("--")
            free = [f"./{word}" if word.startswith("-") else word for word in words[end + 1 :]]
            words = [*free, *words[:end]]
        for place, word in enumerate(words):
            if word.startswith("--"):  # --batch_size is --batch-size
                flag, equals, value = word.partition("=")
                words[place] = flag.replace("_", "-") + equals + value
        found, rest = self.parse_known_intermixed_args(words)
        if rest:
            unknown = next((word for word in rest if word.startswith("-")), None)
            flags = [
                spelling for action in self.actions.values() for spelling in action.option_strings
            ]
            if unknown is None:
                places = sum(option.positional for option in self.actions)
                raise ValueError(
                    f"argument: got {rest[0]!r}; {self.prog} takes {places or 'none'} without an option, "
                    f"see {self.prog} --help"
                )
            flag = unknown.partition("=")[0]
            hint = did_you_mean(flag, flags, f"{self.prog} --help lists its options")
            raise ValueError(f"option: {self.prog} has no {flag}; {hint}")
        return found

    def error(self, message: str) -> NoReturn:
        name, colon, what = message.removeprefix("argument ").partition(": ")
        if colon:  # -b/--backbone: expected one argument
            message = f"{name.rpartition('--')[2].replace('-', '_')}: {what}"
        raise ValueError(f"{message}; see {self.prog} --help")

    def describe(self, command: type[Any]) -> None:
        """Give each option its help: the docstring of its field, and its default."""
        for option, action in self.actions.items():
            owner: Any = _owner(command, option.path[:-1])
            text = _field_docs(owner).get(option.path[-1], "")
            if not any(option.default is value for value in (MISSING, *ABSENT)):
                text = f"{text.rstrip('.')} (default: {option.default})"
            action.help = text.replace("%", "%%") or None


class _Refused(Exception):
    """A value that is refused; argparse would reword a ``ValueError``."""


def _value(option: Option, text: str) -> Any:
    kind = option.kind
    if text == argparse.SUPPRESS or (text == "None" and option.default is None):
        return None
    if kind in NUMBERS:
        try:
            return kind(text)
        except ValueError:
            raise _Refused(f"{option.name}: got {text!r}; give {NUMBERS[kind]}") from None
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in kind.__args__}
        if text not in choices:
            hint = did_you_mean(text, list(choices))
            raise _Refused(f"{option.name}: got {text!r}; {hint}")
        return choices[text]
    return kind(text) if isinstance(kind, type) else text


def _metavar(option: Option) -> str:
    if option.argument.metavar is not None:
        return option.argument.metavar
    if typing.get_origin(option.kind) is Literal:
        return "{" + ",".join(map(str, option.kind.__args__)) + "}"
    return option.path[-1].upper()


def _owner(command: type[Any], path: Sequence[str]) -> type[Any]:
    for name in path:
        command = typing.get_type_hints(command)[name]
    return command


@functools.cache
def _field_docs(command: type[Any]) -> dict[str, str]:
    """The docstrings of a dataclass's fields, each on one line."""
    found: dict[str, str] = {}
    for cls in reversed(command.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


# ---------------------------------------------------------------- options that are not read


def check_read(command: Any, given: Collection[str]) -> None:
    """Raise a ``ValueError`` if one of the fields ``given`` has no effect on ``command`` because of the
    values of other settings; the message names the first such field."""
    kind: Any = type(command)
    options = options_of(kind)
    flags = {option.path[-1]: option.flag for option in options}
    for option in options:
        if option.dest not in given:
            continue
        for path, rule in option.option_rules:
            for setting, wanted in rule.settings.items():
                got = _setting(functools.reduce(getattr, path, command), setting)
                if not _allowed(wanted, got):
                    raise ValueError(_unread(option, flags.get(setting, ""), wanted, got))


def _unread(option: Option, setting: str, wanted: Any, got: Any) -> str:
    """Why ``option`` is rejected; ``setting`` is another option, or "" for a property with a telling
    value."""
    named, left = f"{setting} " if setting else "", f"leave out {option.flag}"
    if isinstance(wanted, AnyExcept) and any(wanted.values[0] is value for value in ABSENT):
        return f"{option.name}: needs {setting}; give it, or {left}"
    if isinstance(wanted, AnyExcept):
        return f"{option.name}: not read with {named}{got}; {left}"
    if any(wanted is value for value in ABSENT):
        return f"{option.name}: not read with {setting}; leave out one of the two"
    several = wanted if isinstance(wanted, list) else [wanted]
    return f"{option.name}: for {named}{' or '.join(map(str, several))} alone, got {got}; {left}"


def _allowed(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, AnyExcept):
        return got not in wanted.values
    return got in wanted if isinstance(wanted, list) else bool(got == wanted)


def _setting(owner: Any, name: str) -> Any:
    """The field or property ``name`` of a dataclass, or of one nested in it."""
    if hasattr(owner, name):
        return getattr(owner, name)
    nested = [getattr(owner, field.name) for field in dataclasses.fields(owner)]
    parts = [part for part in nested if dataclasses.is_dataclass(part)]
    return next(getattr(part, name) for part in parts if hasattr(part, name))
