"""A local object store for all tests of this folder, and what is counted of its answers."""

import logging
import uuid
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from xattn.runtime import stores

MISSING = any(find_spec(package) is None for package in ("s3fs", "moto"))
collect_ignore_glob = ["test_*.py"] if MISSING else []


@pytest.fixture(scope="session")
def store():
    """An S3 server of this process, as the environment names it to every client."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server
    server.stop()


@pytest.fixture
def bucket(store):
    """The URL of an empty bucket of the test's own."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    stores.file_system("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def fetched(monkeypatch):
    """(name, bytes) of every read of a store."""
    reads = []
    whole = stores.StorePath._range

    def counted(self, start, end):
        data = whole(self, start, end)
        reads.append((self.name, len(data)))
        return data

    monkeypatch.setattr(stores.StorePath, "_range", counted)
    return reads


@pytest.fixture
def impatient(monkeypatch):
    """A store is given up after two attempts; one that answers has time to, on a busy machine, too."""
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    monkeypatch.setattr(stores, "ATTEMPTS", 2)


@pytest.fixture
def photos(tmp_path):
    """A folder of photos, one of them in a hidden folder, and a file that is none."""
    folder = tmp_path / "photos"
    names = ["b.png", "a/1.jpg", "a-b/2.png", "a/.hidden/3.png", "a/deep/4.PNG"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / name)
    (folder / "notes.md").write_text("# none")
    return folder
