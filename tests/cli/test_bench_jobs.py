"""Every job of ``xattn bench`` has a module whose ``bench`` is given what the command line asks for."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

from xattn.cli.commands import bench as command
from xattn.cli.commands.bench import JOBS, Bench

NAMES = get_args(get_args(get_type_hints(Bench, include_extras=True)["job"])[0])
ASKED = {
    "rounds": 2,
    "backbones": ("resnet18", "resnet10t"),
    "batches": (3,),
    "tokens": (64,),
    "only": ("dma",),
    "filter": "softmax",
    "plot": Path("times.png"),
    "out": Path("gpu"),
    "device": "cuda:1",
    "small": True,
    "retry": True,
}
NAMED = {"names": "only"}  # the option of an argument by another name


@pytest.mark.parametrize("job", NAMES)
def test_a_job_is_given_all_options_that_it_takes(job, monkeypatch):
    bench, given = None, {}

    def imported(module):
        nonlocal bench
        bench = importlib.import_module(module).bench

        def called(**arguments):
            inspect.signature(bench).bind(**arguments)
            given.update(arguments)
            return []

        return SimpleNamespace(bench=called)

    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=imported))
    chosen = {"job": job, "aot": job == "kernels"}
    Bench(**chosen).run()
    taken = {name: NAMED.get(name, name) for name in inspect.signature(bench).parameters}
    taken = {name: option for name, option in taken.items() if option in ASKED}
    if job == "folder":  # it has no batches
        del taken["batches"]
    Bench(**chosen, **{option: ASKED[option] for option in taken.values()}).run()
    wanted = {name: ASKED[option] for name, option in taken.items()}
    assert wanted and {name: given[name] for name in wanted} == wanted
    assert given.get("job", job) == job


def test_the_table_has_the_jobs_that_can_be_asked_for():
    assert set(JOBS) == set(NAMES)
