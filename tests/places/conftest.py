"""Object stores for the tests of this folder: in memory, and of S3 where its libraries are installed."""

import logging
import uuid

import numpy as np
import pytest
from PIL import Image

from xattn.runtime import stores


@pytest.fixture(scope="session")
def store():
    """An S3 server of this process, as the environment names it to every client."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
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
def bucket():
    """The URL of an empty folder in memory."""
    return f"memory://bucket-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def s3_bucket(store):
    """The URL of an empty bucket of S3."""
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
