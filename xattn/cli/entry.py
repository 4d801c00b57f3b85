"""Define all commands of ``xattn`` and its entry point.

Only the module of the command that was given is imported; torch and timm are not loaded until a job
starts. Errors in the user's input are printed as one line, and the exit code is 2.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from xattn.cli.imports import HELP, import_user_code, take_imports
from xattn.cli.outputs import refuse_remote
from xattn.cli.printing import one_line, pipe_is_closed, plain_warnings
from xattn.runtime.arguments import choose
from xattn.runtime.process import keep_memory, launch_rank, sleep_while_waiting
from xattn.runtime.version import __version__

NAMES = (
    *("train", "probe", "distill", "prune", "explain", "caption", "evaluate", "compare"),
    *("board", "accuracy", "diff", "merge", "parts", "export", "app", "bench", "list"),
)
# The commands whose output may be a URL in a store.
UPLOADING = ("explain", "caption", "evaluate", "merge")


class Commands(Mapping[str, type[Any]]):
    """Map the name of each command to its class, whose module is imported on first access."""

    def __getitem__(self, name: str) -> type[Any]:
        if name not in NAMES:
            raise KeyError(name)
        module = import_module(f"xattn.cli.commands.{'listing' if name == 'list' else name}")
        found: type[Any] = getattr(module, name.capitalize())
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


COMMANDS = Commands()
DESCRIPTION = (
    "Train, use and measure explanation heads on frozen image classifiers. --version prints the "
    f"version. {HELP}"
)


@contextmanager
def _group() -> Iterator[None]:
    """Leave the process group of a multi-process launch at the end of the block; if another process died,
    report it in one line. A single process does not wait for torch to be imported."""
    if launch_rank()[0] == 1:
        yield
        return
    from xattn.runtime.distributed import leave_group, peer_errors

    with peer_errors():
        yield
        leave_group()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    sleep_while_waiting()  # before torch is imported
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    finally:
        pipe_is_closed()  # avoids an error when the interpreter ends


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"xattn {__version__}")
        return 0
    for stream in (sys.stdout, sys.stderr):  # so that file names that are not UTF-8 can be printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    command: Any = None
    started = time.perf_counter()
    try:
        arguments, sources = take_imports(arguments)
        command = choose(COMMANDS, arguments, "xattn", DESCRIPTION)
        if arguments[0] not in UPLOADING:
            refuse_remote(arguments[0], getattr(command, "output", None))
        if hasattr(command, "check"):
            command.check()
        for source in sources:
            import_user_code(source)
        keep_memory()
        with plain_warnings(), _group():
            command.run()
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and pipe_is_closed():
            return 141  # the code with which a shell reports a program ended by SIGPIPE
        return _refused(error)
    except KeyboardInterrupt:
        print(f"xattn: interrupted{getattr(command, 'after_interrupt', '')}", file=sys.stderr)
        return 130
    if launch_rank()[1] > 0:
        return 0
    print(f"done in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return 0


def _refused(error: BaseException) -> int:
    """Print the error on one line; returns the exit code."""
    text: Any = error
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"files: {error.filename!r} cannot be used ({error.strerror}); check the path"
    elif isinstance(error, OSError) and error.filename is None and error.args:
        text = error.args[-1]
    print(f"xattn: error: {one_line(str(text))}", file=sys.stderr)
    if isinstance(error, ConnectionError) and launch_rank()[0] > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(2)  # threads of a broken process group may abort an orderly exit
    return 2
