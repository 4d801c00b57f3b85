"""``--import``: load your own files and modules, which register classes before a command looks up
names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

OPTION = "--import"
HELP = (
    "--import FILE.py or --import MODULE adds your own metrics, explainers, heads, attention "
    "mechanisms and blocks; every command accepts it, as often as you like."
)
_imported: list[str] = []  # in order; files by absolute path


def imported_sources() -> tuple[str, ...]:
    """Return the files and modules that :func:`import_user_code` has imported in this process, so that
    child processes can import them too."""
    return tuple(dict.fromkeys(_imported))


def take_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the arguments without ``--import SOURCE`` and ``--import=SOURCE``, and
    the sources."""
    rest, sources = [], []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option != OPTION:
            rest.append(word)
            continue
        source = value if equals else next(words, "")
        if not source or source.startswith("-"):
            raise ValueError("import: got no file; give --import mine.py")
        sources.append(source)
    return rest, sources


def import_user_code(source: str) -> None:
    """Import a file (again, if it was imported before) or a module, which must register something.

    Raises:
        ValueError: it does not exist, raises an error, or registers nothing.
    """
    path = Path(source)
    if path.suffix == ".py" or path.is_file() or len(path.parts) > 1:
        load_file(path)
        _imported.append(str(path.resolve()))
    else:
        _import_module(source)
        _imported.append(source)


def load_file(path: Path, argument: str = "import") -> ModuleType:
    """Load a Python file as a module; error messages begin with ``argument``."""
    if not path.exists():
        raise ValueError(
            f"{argument}: {path} does not exist; give a Python file, or the name of a module"
        )
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"{argument}: {path} is not a Python file; give a file whose name ends in .py"
        )
    name, path = path.stem, path.resolve()
    other = _origin(name)
    if other is not None and Path(other).resolve() != path:
        raise ValueError(
            f"{argument}: {path.name} has the name of another module ({other}); rename the file"
        )
    folder = str(path.parent)
    if (
        folder not in sys.path
    ):  # for the files beside it, and for processes that unpickle its classes
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None

    def run() -> None:
        module = importlib.util.module_from_spec(spec)
        before = sys.modules.get(name)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            sys.modules.pop(name)
            if before is not None:
                sys.modules[name] = before
            raise

    _run(run, path.name, path, argument)
    return sys.modules[name]


def _origin(name: str) -> str | None:
    """The location of a module of that name, or its name if it has none; None if there is no such
    module."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or name
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    return None if found is None else found.origin or name


def _import_module(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"import: got {name!r}; give a Python file, or the name of a module")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    if name in sys.modules:
        from xattn.registry import count_additions

        _check_registered(name, count_additions(name))
        return
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # raised by the package that contains it
        found = None
    if found is None:
        beside = Path(f"{name}.py").is_file()
        remedy = f"give {name}.py" if beside else "install it, or give a Python file"
        raise ValueError(f"import: there is no module {name!r}; {remedy}")
    _run(lambda: importlib.import_module(name), name, Path(found.origin or name))


def _run(
    load: Callable[[], ModuleType | None], name: str, path: Path, argument: str = "import"
) -> None:
    """Import by calling ``load``; errors name the line of ``path`` that caused them."""
    from xattn import registry

    before = registry.count_additions()
    try:
        load()
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:500] or "no message"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename) == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f" at line {line}" if line is not None else ""
        how = name if name.endswith(".py") else f"-m {name}"
        raise ValueError(
            f"{argument}: {name} failed{where} ({type(error).__name__}: {reason}); correct it, "
            f"and test it with python {how}"
        ) from None
    if argument == "import":
        _check_registered(name, registry.count_additions() - before)


def _check_registered(name: str, count: int) -> None:
    if not count:
        raise ValueError(
            f"import: {name} registers nothing; decorate its classes with register_metric, "
            "register_explainer, register_head, register_attention or register_block from xattn"
        )
