"""xattn with a viewer that fails: in the body of the tab "Fidelity", and at a click on a class."""

from xattn.app.pages.image import page as image
from xattn.app.pages.image import photo_tabs
from xattn.cli import main


def fail(*args: object) -> None:
    raise RuntimeError("as the test wants it")


image.TABS["Fidelity"] = fail
photo_tabs._open_class = fail

if __name__ == "__main__":
    raise SystemExit(main())
