"""Names of things that are created by name, for every kind alike: mechanisms, heads, explainers, metrics.

    HEADS: Registry[Head, HeadEntry] = Registry("xattn.heads", argument="head", noun="head")

    @HEADS.register(HeadEntry("mine"))
    class Mine(Head): ...

    HEADS.create("mine", backbone, width=3)

Names are found without regard to case, hyphens and underscores, see :mod:`xattn.runtime.names`;
:meth:`Registry.name` gives the registered form. A kind's entry is a frozen dataclass with a ``name`` and
whatever else is to be known of a thing: its paper, test cases, sizes. Installed packages add things
through entry points of the registry's group, which are read when a name that is not there yet, or the
list of names, is asked for.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

from xattn.runtime.names import did_you_mean, same_name
from xattn.runtime.option_checks import checked


class Named(Protocol):
    """What every entry has."""

    @property
    def name(self) -> str: ...


T = TypeVar("T")
E = TypeVar("E", bound=Named)
V = TypeVar("V")
Class = TypeVar("Class", bound=type)
_added: list[str] = []  # the modules of classes from outside the package, once for each time


class Registry(Generic[T, E]):
    """Classes of T by name, each with its entry of type E. Any thread may read and add.

    Args:
        group: of the entry points, such as ``"xattn.heads"``. An entry point names a module that
            registers things when it is imported, or a registered class.
        base: what all classes derive from, if that is checked.
        argument: the name that errors begin with; ``noun``: what they call a thing.
        options_argument: as ``argument``, for errors about options.
        homes: packages whose modules register the project's own classes. A name first asks for the module
            that is called like it; all are imported where the list of names is asked for, or a name that
            no module is called like.
        given: parameters of the constructors that :meth:`create` is given by position, or that are not
            for users; they are no options.
        adopt: ``adopt(name, value)`` registers what an entry point names if it is not registered yet.
        mark: ``mark(cls, entry)`` changes what :meth:`register` has added, for example gives it its name.
        ordered: whether names keep the order of registration; else they are sorted.
        hint: ``hint(name)`` says more of an unknown name that it knows, else "".
    """

    def __init__(
        self,
        group: str,
        *,
        base: type | None = None,
        homes: Collection[str] = (),
        argument: str,
        noun: str = "",
        options_argument: str | None = None,
        given: Collection[str] = (),
        adopt: Callable[[str, Any], object] | None = None,
        mark: Callable[[Any, Any], object] | None = None,
        ordered: bool = False,
        hint: Callable[[str], str] = lambda name: "",
    ) -> None:
        self.group, self.base, self.argument, self.noun = group, base, argument, noun
        self.homes = homes
        self.options_argument = options_argument or argument
        self.given, self.ordered = frozenset(given), ordered
        self._adopt, self._mark, self._hint = adopt, mark, hint
        self._found: dict[str, tuple[type[T], E]] = {}  # replaced, never changed
        self._failures: dict[tuple[str, str], str] = {}  # by distribution and name
        self._loaded = False
        self._lock = threading.Lock()  # never held while anything is imported
        self._here = threading.local()

    def __repr__(self) -> str:
        return f"Registry({self.group!r}, {len(self._found)} names)"

    # ------------------------------------------------------------------ adding

    def register(self, entry: E) -> Callable[[Class], Class]:
        """Class decorator: :meth:`add` the class with ``entry``, then ``mark`` it."""

        def add(cls: Class) -> Class:
            self.add(cls, entry)
            if self._mark is not None:
                self._mark(cls, entry)
            return cls

        return add

    def add(self, cls: type[T], entry: E) -> None:
        """Make ``cls`` known under ``entry.name``; a class that was reloaded replaces itself.

        Raises:
            ValueError: the name is none, or belongs to another class; ``cls`` does not derive from the
                kind's base.
        """
        name = entry.name
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: got {name!r}; give a name such as 'mine'")
        own = cls.__module__.startswith("xattn.")
        if not own and not self._loaded:
            self._import_own()  # whose names are taken
        if self.base is not None and not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(
                f"{self.noun or self.argument}: got {cls!r} for {name!r}; decorate a subclass of "
                f"{_path(self.base)}"
            )
        with self._lock:
            before = self._found.get(name)
            if before is not None and not same_class(before[0], cls):
                raise ValueError(
                    f"name: {name!r} is taken by {_path(before[0])}; choose another name for "
                    f"{_path(cls)}"
                )
            self._found = {**self._found, name: (cls, entry)}
        if not own:
            _added.append(cls.__module__)

    def remove(self, name: str) -> None:
        """Forget ``name`` if it is there, for example at the end of a test."""
        with self._lock:
            self._found = {key: value for key, value in self._found.items() if key != name}

    def registered(self) -> Mapping[str, tuple[type[T], E]]:
        """Class and entry by name of what is there now; nothing is imported."""
        return self._found

    # ------------------------------------------------------------------ asking

    def names(self) -> list[str]:
        """All names, sorted unless their order counts, with those of installed packages."""
        self.load()
        return list(self._found) if self.ordered else sorted(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def name(self, name: str) -> str:
        """The registered form of ``name``.

        Raises:
            ValueError: no such name (with near matches), or its package could not be imported.
        """
        found = self._find(name)
        if found is not None:
            return found
        reasons = [reason for (_, point), reason in self._failures.items() if point == name]
        if reasons:
            what = f"{self.noun} {name!r}".strip()
            raise ValueError(f"{self.argument}: {what} cannot be loaded: {' and '.join(reasons)}")
        names = self.names()
        hint = self._hint(name) or did_you_mean(
            name, names, None if names else "it has no names yet"
        )
        unknown = f"unknown {self.noun}".strip()
        raise ValueError(f"{self.argument}: {unknown} {name!r}; {hint}")

    def get(self, name: str) -> type[T]:
        """The class of that name; a ``ValueError`` with near matches for an unknown one."""
        known = self.name(name)  # which may load more
        return self._found[known][0]

    def entry(self, name: str) -> E:
        """The entry of that name; a ``ValueError`` with near matches for an unknown one."""
        known = self.name(name)
        return self._found[known][1]

    def entries(self) -> list[E]:
        """All entries, in the order of :meth:`names`."""
        return [self.entry(name) for name in self.names()]

    def failures(self) -> dict[tuple[str, str], str]:
        """Why entry points could not be imported, by (distribution, name of the entry point)."""
        self.load()
        return dict(self._failures)

    def classes(self) -> Table[type[T]]:
        """The classes by name, as a mapping that grows with the registry."""
        return Table(self, lambda cls, entry: {entry.name: cls})

    def table(self, rows: Callable[[E], Mapping[str, V]]) -> Table[V]:
        """What ``rows`` reads from each entry, all in one mapping that grows with the registry."""
        return Table(self, lambda cls, entry: rows(entry))

    def _find(self, name: object) -> str | None:
        """The registered form of ``name``, or None."""
        if not isinstance(name, str):
            return None
        if name not in self._found and not self._loaded:
            self._import_own(name)
            if name not in self._found:
                self.load()
        return same_name(name, self._found)

    # ------------------------------------------------------------------ creating

    def options(self, name: str) -> tuple[str, ...] | None:
        """The options that the constructor takes; None if it takes any."""
        return options_of(self.get(name), self.given)

    def check_options(self, name: str, options: Collection[str]) -> None:
        """Raise a ``ValueError`` that names the first option that the constructor lacks."""
        own = self.options(name)
        unknown = [] if own is None else [option for option in options if option not in own]
        if own is None or not unknown:
            return
        hint = did_you_mean(unknown[0], own, "")
        raise ValueError(
            f"{self.options_argument}: {name} does not take that option ({', '.join(unknown)}); its "
            f"options: {', '.join(own) or 'none'}{hint and f'; {hint}'}"
        )

    def create(self, name: str, /, *given: Any, **options: Any) -> T:
        """``cls(*given, **options)`` of that name.

        Raises:
            ValueError: as :meth:`get` and :meth:`check_options`, and what the constructor raises.
        """
        cls = self.get(name)
        self.check_options(name, options)
        return cls(*given, **options)

    # ------------------------------------------------------------------ what registers itself

    def _import_own(self, called: str | None = None) -> None:
        """Import the modules of ``homes``, or the one ``called`` so."""
        for home in self.homes:
            package = import_module(home)
            for module in iter_modules(package.__path__, f"{home}."):
                if not module.ispkg and called in (None, module.name.rpartition(".")[2]):
                    import_module(module.name)

    def load(self) -> None:
        """Import the project's own modules and what installed packages offer, once. A package that fails is
        named in a warning.

        Nothing waits for a lock here: a module that is being imported may ask the registry, and two
        threads that load at once only import the same modules.
        """
        if self._loaded or getattr(self._here, "loading", False):
            return
        self._here.loading = True
        try:
            self._import_own()
            for point in self._points():
                try:
                    self._accept(point, point.load())
                except (Exception, SystemExit) as error:
                    key = _distribution(point), point.name
                    self._fail(key, f"{_origin(point)} failed", error)
        finally:
            self._here.loading = False
        self._loaded = True

    def _points(self) -> list[EntryPoint]:
        try:
            return list(entry_points(group=self.group))
        except Exception as error:  # some distribution's file of entry points is damaged
            self._fail(("", ""), "entry points cannot be read", error)
            return []

    def _accept(self, point: EntryPoint, value: Any) -> None:
        if isinstance(value, ModuleType) or any(
            value is cls or value is entry for cls, entry in self._found.values()
        ):
            return
        if self._adopt is None:
            raise ValueError(f"{point.value} is not registered; decorate it, or name its module")
        self._adopt(point.name, value)

    def _fail(self, key: tuple[str, str], what: str, error: BaseException) -> None:
        reason = f"{what} ({type(error).__name__}: {' '.join(str(error).split())})"
        with self._lock:
            if key in self._failures:
                return
            self._failures = {**self._failures, key: reason}
        warnings.warn(f"{self.group}: {reason}; the rest goes on", stacklevel=4)


class Table(Mapping[str, V]):
    """Values by name that are made of the entries of a registry, always up to date."""

    def __init__(
        self, registry: Registry[Any, Any], rows: Callable[[Any, Any], Mapping[str, V]]
    ) -> None:
        self._registry, self._rows = registry, rows
        self._made: tuple[object, dict[str, V]] = (None, {})  # of which state, the values

    def __getitem__(self, name: str) -> V:
        if name not in self._current():
            self._registry.load()
        return self._current()[name]

    def __iter__(self) -> Iterator[str]:
        self._registry.load()
        return iter(self._current())

    def __len__(self) -> int:
        self._registry.load()
        return len(self._current())

    def __repr__(self) -> str:
        return repr(dict(self))

    def _current(self) -> dict[str, V]:
        found = self._registry.registered()
        state, values = self._made
        if state is not found:
            values = {}
            for name in found if self._registry.ordered else sorted(found):
                values.update(self._rows(*found[name]))
            self._made = found, values
        return values


def additions(module: str = "") -> int:
    """How many classes from outside the package, or of one module and those below it, have been registered,
    of any kind; reloaded ones count again."""
    return sum(f"{name}.".startswith(f"{module}." if module else "") for name in _added)


def adopting(
    base: type, register: Callable[[str], Callable[[Any], object]]
) -> Callable[[str, Any], None]:
    """For :class:`Registry`: registers a class that an entry point names, if it is one of ``base``."""

    def adopt(name: str, value: Any) -> None:
        if not (isinstance(value, type) and issubclass(value, base)):
            raise ValueError(f"{value!r} is neither a module nor a subclass of {base.__name__}")
        register(name)(value)

    return adopt


def with_name(cls: Any, entry: Named) -> None:
    """``mark`` of :class:`Registry`: the class knows its name."""
    cls.name = entry.name


def with_checked_name(cls: Any, entry: Named) -> None:
    """``mark`` of :class:`Registry`: the class knows its name, and its constructor checks what it gets, see
    :mod:`xattn.runtime.option_checks`."""
    cls.name = entry.name
    cls.__init__ = checked(cls.__init__)


def with_entry(cls: Any, entry: Named) -> None:
    """``mark`` of :class:`Registry`: the class knows its entry, and its constructor checks what it gets,
    see :mod:`xattn.runtime.option_checks`."""
    cls.entry = entry
    cls.__init__ = checked(cls.__init__)


def options_of(cls: type, given: Collection[str] = ()) -> tuple[str, ...] | None:
    """The keyword arguments of a constructor without those ``given``; None if it takes any.

    Where it passes ``**options`` on, those of the next class count: its keyword-only parameters and
    those with a default.
    """
    names: dict[str, None] = {}
    inherited = False
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())
        for p in parameters[1:]:
            if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) or p.name in given:
                continue
            if not inherited or p.kind is p.KEYWORD_ONLY or p.default is not p.empty:
                names[p.name] = None
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return tuple(names)
        inherited = True
    return None


def same_class(one: type, other: type) -> bool:
    """Whether both are one class, perhaps imported twice."""
    return one is other or _path(one) == _path(other)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _origin(point: EntryPoint) -> str:
    """Such as ``entry point 'mine' (mine.heads) of mine-package``."""
    return f"entry point {point.name!r} ({point.value}) of {_distribution(point)}"


def _distribution(point: EntryPoint) -> str:
    return getattr(point.dist, "name", None) or "an unnamed package"
