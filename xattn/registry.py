"""Registries of classes that can be created by name, such as mechanisms, heads, explainers and metrics.

    HEADS: Registry[Head, HeadEntry] = Registry("xattn.heads", argument="head", noun="head")

    @HEADS.register(HeadEntry("mine"))
    class Mine(Head): ...

    HEADS.create("mine", backbone, width=3)

Lookups ignore case, hyphens and underscores, see :mod:`xattn.runtime.names`; :meth:`Registry.name` gives
the registered form. Each registry has its own entry type, a frozen dataclass with a ``name`` and other
facts about a class, such as its paper, test cases or sizes. Installed packages add classes through entry
points of the registry's group. The entry points are read when someone asks for the list of names, or for a
name that has not been registered yet.
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

from xattn.runtime.names import did_you_mean, matching_name
from xattn.runtime.option_checks import checked


class Named(Protocol):
    """The interface that every entry implements."""

    @property
    def name(self) -> str: ...


T = TypeVar("T")
E = TypeVar("E", bound=Named)
V = TypeVar("V")
Class = TypeVar("Class", bound=type)
_added: list[str] = []  # modules of classes from outside the package, one item per registration


class Registry(Generic[T, E]):
    """A thread-safe registry of classes derived from T, each with a name and an entry of type E.

    Args:
        group: the entry point group, such as ``"xattn.heads"``. An entry point names either a module that
            registers classes when it is imported, or a registered class.
        base: the class that all others must derive from; None skips the check.
        argument: the argument name that starts every error message; ``noun`` is the word that messages use
            for one of the classes.
        options_argument: the same as ``argument``, for errors about options.
        homes: packages whose modules register the project's own classes. To find a class, the registry
            first imports the module of the same name. It imports all modules if no module has that name, or
            if the list of names is needed.
        given: constructor parameters that :meth:`create` passes by position, or that are not meant for
            users; they do not count as options.
        adopt: ``adopt(name, value)`` registers the object that an entry point names, if needed.
        mark: ``mark(cls, entry)`` changes a class that :meth:`register` has added, for example to set
            its name.
        ordered: keep names in order of registration; otherwise they are sorted.
        hint: ``hint(name)`` returns an explanation of an unknown name, or "".
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
        """Class decorator: :meth:`add` the class with ``entry``, then call ``mark`` on it."""

        def add(cls: Class) -> Class:
            self.add(cls, entry)
            if self._mark is not None:
                self._mark(cls, entry)
            return cls

        return add

    def add(self, cls: type[T], entry: E) -> None:
        """Register ``cls`` under ``entry.name``; a reloaded class replaces its earlier version.

        Raises:
            ValueError: the name is invalid or belongs to another class, or ``cls`` does not derive from the
                base class.
        """
        name = entry.name
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: got {name!r}; give a name such as 'mine'")
        own = cls.__module__.startswith("xattn.")
        if not own and not self._loaded:
            self._import_own()  # so that the names of the project's own classes count as taken
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
        """Remove ``name`` if it is registered, for example at the end of a test."""
        with self._lock:
            self._found = {key: value for key, value in self._found.items() if key != name}

    def registered(self) -> Mapping[str, tuple[type[T], E]]:
        """Classes and entries registered so far, by name; imports nothing."""
        return self._found

    # ------------------------------------------------------------------ asking

    def names(self) -> list[str]:
        """All names, including those of installed packages; sorted unless ``ordered``."""
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
            ValueError: the name is unknown (the message lists near matches), or its package could not be
                imported.
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
        """The class registered as ``name``; raises a ``ValueError`` with near matches if it is unknown."""
        known = self.name(name)  # which may load more
        return self._found[known][0]

    def entry(self, name: str) -> E:
        """The entry registered as ``name``; raises a ``ValueError`` with near matches if it is unknown."""
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
        """The classes by name, as a mapping that stays up to date with the registry."""
        return Table(self, lambda cls, entry: {entry.name: cls})

    def table(self, rows: Callable[[E], Mapping[str, V]]) -> Table[V]:
        """The values that ``rows`` reads from every entry, in one mapping that stays up to date."""
        return Table(self, lambda cls, entry: rows(entry))

    def _find(self, name: object) -> str | None:
        """The registered form of ``name``, or None."""
        if not isinstance(name, str):
            return None
        if name not in self._found and not self._loaded:
            self._import_own(name)
            if name not in self._found:
                self.load()
        return matching_name(name, self._found)

    # ------------------------------------------------------------------ creating

    def options(self, name: str) -> tuple[str, ...] | None:
        """The constructor's options; None if it accepts any keyword."""
        return options_of(self.get(name), self.given)

    def check_options(self, name: str, options: Collection[str]) -> None:
        """Raise a ``ValueError`` that names the first option that the constructor does not accept."""
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
        """Create an instance: ``cls(*given, **options)`` of the class registered as ``name``.

        Raises:
            ValueError: as in :meth:`get` and :meth:`check_options`, or raised by the constructor.
        """
        cls = self.get(name)
        self.check_options(name, options)
        return cls(*given, **options)

    # ------------------------------------------------------------------ loading

    def _import_own(self, called: str | None = None) -> None:
        """Import all modules of ``homes``, or only the one named ``called``."""
        for home in self.homes:
            package = import_module(home)
            for module in iter_modules(package.__path__, f"{home}."):
                if not module.ispkg and called in (None, module.name.rpartition(".")[2]):
                    import_module(module.name)

    def load(self) -> None:
        """Import the project's own modules and those of installed packages, once. If a package fails to
        import, a warning names it.

        No lock is held here: a module that is being imported may use the registry, and two threads that
        load at once simply import the same modules.
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
        except Exception as error:  # an installed distribution has a damaged entry points file
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
        warnings.warn(f"{self.group}: {reason}; everything else is loaded", stacklevel=4)


class Table(Mapping[str, V]):
    """Values by name, computed from the entries of a registry, always up to date."""

    def __init__(
        self, registry: Registry[Any, Any], rows: Callable[[Any, Any], Mapping[str, V]]
    ) -> None:
        self._registry, self._rows = registry, rows
        self._made: tuple[object, dict[str, V]] = (None, {})  # (state, values computed from it)

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


def count_additions(module: str = "") -> int:
    """The number of classes of all kinds that were registered from outside the package, counting
    reloads; with ``module``, only those from that module and its submodules."""
    return sum(f"{name}.".startswith(f"{module}." if module else "") for name in _added)


def make_adopter(
    base: type, register: Callable[[str], Callable[[Any], object]]
) -> Callable[[str, Any], None]:
    """``adopt`` for :class:`Registry`: registers a class that an entry point names, if it derives from
    ``base``."""

    def adopt(name: str, value: Any) -> None:
        if not (isinstance(value, type) and issubclass(value, base)):
            raise ValueError(f"{value!r} is neither a module nor a subclass of {base.__name__}")
        register(name)(value)

    return adopt


def with_name(cls: Any, entry: Named) -> None:
    """``mark`` for :class:`Registry`: set the class's name."""
    cls.name = entry.name


def with_checked_name(cls: Any, entry: Named) -> None:
    """``mark`` for :class:`Registry`: set the class's name and make its constructor check its arguments,
    see :mod:`xattn.runtime.option_checks`."""
    cls.name = entry.name
    cls.__init__ = checked(cls.__init__)


def with_entry(cls: Any, entry: Named) -> None:
    """``mark`` for :class:`Registry`: set the class's entry and make its constructor check its arguments,
    see :mod:`xattn.runtime.option_checks`."""
    cls.entry = entry
    cls.__init__ = checked(cls.__init__)


def options_of(cls: type, given: Collection[str] = ()) -> tuple[str, ...] | None:
    """The keyword arguments of a constructor, except those in ``given``; None if it accepts any.

    If the constructor passes ``**options`` on, the next class in the hierarchy contributes its keyword-only
    parameters and those with a default.
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
    """Whether both are the same class, even if it was imported twice."""
    return one is other or _path(one) == _path(other)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _origin(point: EntryPoint) -> str:
    """A description such as ``entry point 'mine' (mine.heads) of mine-package``."""
    return f"entry point {point.name!r} ({point.value}) of {_distribution(point)}"


def _distribution(point: EntryPoint) -> str:
    return getattr(point.dist, "name", None) or "an unnamed package"
