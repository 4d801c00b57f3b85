"""``python -m fuzz``: run the suite, or one saved input again.

Every target runs in a process of its own, so that a crash of the interpreter is a failure like others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fuzz import TARGETS, Failure, Tally, attempt, make_input, run, shares, table, workspace


def _work(name: str, first: int, count: int, seed: int, pipe: Connection) -> None:
    """Send each input's number before it is read, then the result."""
    for what in ("valid", "nasty"):
        TARGETS[name].inputs(what)
    found = run(TARGETS[name], range(first, count), seed)
    for number in range(first, count):
        pipe.send((number, None))
        pipe.send(next(found))
    pipe.close()
    os._exit(0)  # without what libraries do at the end of a process


class Worker:
    """A process that runs a target's inputs; one that dies is replaced after the input it died of."""

    def __init__(self, name: str, count: int, seed: int) -> None:
        self.name, self.count, self.seed, self.tally = name, count, seed, Tally()
        self._start(0)

    def _start(self, first: int) -> None:
        self.number = first
        self.pipe, other = multiprocessing.Pipe(duplex=False)
        arguments = (self.name, first, self.count, self.seed, other)
        self.process = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
        self.process.start()
        other.close()

    def step(self) -> bool:
        """Take one message; False when all inputs are done."""
        try:
            number, found = self.pipe.recv()
        except EOFError:
            self.process.join()
            if self.tally.count == self.count:
                return False
            data = make_input(TARGETS[self.name], self.number, self.seed)
            what = f"the process ended with code {self.process.exitcode}"
            self.tally.failures.append(Failure(self.name, self.number, data, what, ""))
            if self.number + 1 == self.count:
                return False
            self._start(self.number + 1)
            return True
        if found is None:
            self.number = number
        elif isinstance(found, Failure):
            self.tally.failures.append(found)
        elif found:
            self.tally.accepted += 1
        else:
            self.tally.refused += 1
        return True


def suite(names: Sequence[str], count: int, seed: int, jobs: int) -> dict[str, Tally]:
    """What became of ``count`` inputs, by target."""
    given = shares([TARGETS[name] for name in names], count)
    waiting = [name for name in names if given[name]]
    done: dict[str, Tally] = {name: Tally() for name in names}
    running: dict[Any, Worker] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            worker = Worker(waiting[0], given[waiting.pop(0)], seed)
            running[worker.pipe] = worker
        for pipe in wait(list(running)):
            worker = running.pop(pipe)
            if worker.step():
                running[worker.pipe] = worker
            else:
                done[worker.name] = worker.tally
                print(f"{worker.name}: {worker.tally.count} inputs, {len(worker.tally.failures)} failures", file=sys.stderr)  # fmt: skip
    return done


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=24_000, help="inputs of all targets together")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--save", type=Path, default=Path("build/fuzz"), help="where failures go")
    parser.add_argument("--input", type=Path, help="read this saved input with the one --target")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.target or list(TARGETS)
    if options.input is not None:
        (name,) = names
        with workspace(TARGETS[name]) as place:
            found = attempt(TARGETS[name], options.input.read_bytes(), place)
        print(found.trace if isinstance(found, Failure) else "accepted" if found else "refused")
        return int(isinstance(found, Failure))
    started = time.monotonic()
    done = suite(names, options.count, options.seed, options.jobs)
    failures = [failure for tally in done.values() for failure in tally.failures]
    for failure in failures:
        print(
            f"{failure.target} {failure.number}: {failure.what}\n  saved as {failure.save(options.save)}"
        )
    print(table({name: tally for name, tally in done.items() if tally.count}))
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
