"""Every job of ``xattn bench`` has a module whose ``bench`` takes what the table gives it."""

from __future__ import annotations

import importlib
import inspect
from typing import get_args, get_type_hints

import pytest

from xattn.cli.bench import JOBS, Bench, _speed

NAMES = get_args(get_args(get_type_hints(Bench, include_extras=True)["job"])[0])


@pytest.mark.parametrize("job", NAMES)
def test_a_job_is_called_with_arguments_that_it_takes(job):
    module, arguments = JOBS.get(job, ("xattn.eval.bench.speed", _speed))
    bench = importlib.import_module(module).bench
    inspect.signature(bench).bind(**arguments(Bench(job=job, aot=True)))


def test_the_table_has_no_job_that_cannot_be_asked_for():
    assert set(JOBS) < set(NAMES)
