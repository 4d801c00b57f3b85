"""Starts a viewer in a separate process from Python, and reads and sets its selection.

The browser gets the selection from the address and from the pack's tag file, see
:mod:`xattn.app.navigation.chosen`.
"""

from __future__ import annotations

import atexit
import html
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from xattn.app.serving.server import VARIABLE, check_installed

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


class Viewer:
    """A running viewer of one pack, see :func:`open_viewer`.

    It can be used as a context manager, which closes the viewer at the end.
    """

    def __init__(self, pack: Pack, process: subprocess.Popen[str], base: str) -> None:
        from xattn.app.triage.store import identity
        from xattn.app.triage.tag_files import store_of

        self.pack, self._process, self._base = pack, process, base
        self._store = store_of(pack, lambda: identity(pack.image_ids))
        self._digest, self._token = "", os.environ.get(VARIABLE)

    @property
    def url(self) -> str:
        """The address of the gallery.

        It includes the photos that Python selected last, and the token in the environment variable
        ``XATTN_APP_TOKEN``, if the variable was set when the viewer started.
        """
        query = {"pack": self.pack.id, "chosen": self._digest, "token": self._token}
        query = {name: value for name, value in query.items() if value}
        return f"{self._base}/?{urlencode(query)}"

    @property
    def selection(self) -> list[str]:
        """The ids of the photos that were selected last, by Python or in any tab of any viewer of this
        pack.

        Raises (also when it is set):
            ValueError: the pack does not contain a photo, or its tag file cannot be used.
        """
        return self._store.set_of() or []

    @selection.setter
    def selection(self, image_ids: Sequence[str]) -> None:
        known = set(self.pack.image_ids)
        for image_id in image_ids:
            if image_id not in known:
                raise ValueError(
                    f"selection: the pack has no photo {image_id!r}; give ids from its image_ids"
                )
        digest = self._store.keep_set(image_ids)
        self._digest = digest if len(image_ids) else ""

    def close(self) -> None:
        """Stop the viewer, and wait until its process has ended."""
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        url = html.escape(self.url)
        return f'<a href="{url}" target="_blank">{url}</a>'


def open_viewer(pack: str | os.PathLike[str], selection: Sequence[str] = ()) -> Viewer:
    """Start a viewer of a pack on a free port of this machine.

    It runs until :meth:`Viewer.close` is called or this process ends.

    Args:
        pack: the folder of the pack.
        selection: the ids of photos to select at the start.

    Raises:
        ValueError: ``pack`` is not a pack, ``selection`` contains an unknown id, or ``xattn[app]`` is not
            installed.
        RuntimeError: the viewer did not start.

    Example::

        viewer = open_viewer("runs/labelled", selection=["n01440764/a.jpg"])
        viewer.url  # 'http://127.0.0.1:40123/?pack=labelled-0f3c2a91b7d4&chosen=2ec128b489'
        viewer.selection  # the photos that the user has selected in the browser
        viewer.close()
    """
    check_installed()
    from xattn.app.library import Library

    folder = Path(pack)
    library = Library(folder)
    names = library.newest() if folder.is_dir() else []
    if len(names) != 1:
        raise ValueError(f"pack: {folder} is not the folder of a pack")
    opened = library.open(names[0])
    root = str(folder.absolute())  # an absolute path cannot be mistaken for an option
    command = [sys.executable, "-m", "xattn", "app", root, "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        start_new_session=True,  # so that Ctrl-C, or Interrupt in a notebook, does not stop the viewer
    )
    atexit.register(process.terminate)  # has no effect if the process has already ended
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        if line.startswith("xattn app: http"):
            # The rest of the output is discarded, since a full pipe would block the server.
            threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()
            viewer = Viewer(opened, process, line.split()[2])
            try:
                if len(selection):
                    viewer.selection = selection
            except ValueError:
                viewer.close()
                raise
            return viewer
        said.append(line)
    raise RuntimeError("open_viewer: the viewer did not start:\n" + "".join(said))
