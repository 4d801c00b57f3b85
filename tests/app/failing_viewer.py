"""xattn with a viewer that fails: in the body of the tab "Fidelity", and at a click on a class."""

from xattn.app import image_tabs
from xattn.app.pages import image
from xattn.cli import main


def fail(*args: object) -> None:
    raise RuntimeError("as the test wants it")


image.TABS["Fidelity"] = fail
image_tabs._open_class = fail

if __name__ == "__main__":
    raise SystemExit(main())
