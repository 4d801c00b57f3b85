"""Shared by all tests: Triton's interpreter or a device, and a run folder that another process holds."""

import contextlib
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from xattn.runtime.process import keep_memory, sleep_while_waiting

ROOT = Path(__file__).resolve().parents[1]
DEVICE = os.environ.get("XATTN_TEST_DEVICE", "")
if not DEVICE.startswith("cuda"):
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
sleep_while_waiting()  # before torch is imported
keep_memory()  # as the command line does: networks on a CPU are several times faster
# No example is judged by the clock, as other programs may hold the machine up, and every run has the same
# examples. ``make fuzz`` draws new ones.
CLOCKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("xattn", deadline=None, derandomize=True, suppress_health_check=CLOCKS)
settings.load_profile("xattn")


class _PlainRoot:
    """The root's ``__init__.py`` is for those above the clone; to pytest it makes no package of it."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(_PlainRoot())
    if DEVICE:
        import on_device

        config.pluginmanager.register(on_device.Plugin(DEVICE))


def pytest_collection_modifyitems(items):
    """A test that drives a browser gets a second and a third try: a busy machine can delay any step.

    What was tried again is printed at the end, with ``R``.
    """
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Each test, with the fixtures made for it, draws numbers of its own, the same in every run."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are cores: tests that start a server or a process spend time waiting."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def held_elsewhere():
    """``with held_elsewhere(folder):`` another process owns the run folder, as a run of its own would."""
    pytest.importorskip("fcntl")
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )

    @contextlib.contextmanager
    def hold(folder):
        folder.mkdir(exist_ok=True)
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "run.lock")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert other.stdout.readline() == "held\n"
            yield
        finally:
            other.communicate("")

    return hold


@pytest.fixture(scope="session")
def browser():
    """A running Chromium; a process can have one."""
    pytest.importorskip("playwright.sync_api")
    import served_viewer

    if served_viewer.chromium() is None:
        pytest.skip("no Chromium; install Debian's chromium to run the viewer's browser tests")
    with served_viewer.browser() as running:
        yield running


@pytest.fixture(scope="session")
def photo_vit(tmp_path_factory):
    """Weights of a trained ViT, and photos of its classes: see ``photo_vit.write``."""
    from photo_vit import write

    return write(tmp_path_factory.mktemp("photo_vit"))
