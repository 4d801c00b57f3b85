"""The pages of the viewer: for each a module with a function ``page(context)``."""

from typing import NamedTuple


class Page(NamedTuple):
    """A page: its title, whether it shows a pack (without one it is not called), and its module."""

    title: str
    shows_pack: bool
    module: str


PAGES = {
    "gallery": Page("Gallery", True, f"{__name__}.gallery.page"),
    "image": Page("Image", True, f"{__name__}.image.page"),
    "attention": Page("Attention", True, f"{__name__}.attention"),
    "whatif": Page("What if", True, f"{__name__}.whatif.page"),
    "mistakes": Page("Mistakes", True, f"{__name__}.mistakes.page"),
    "runs": Page("Two runs", True, f"{__name__}.runs.page"),
    "live": Page("Live", False, f"{__name__}.live.page"),
    "compare": Page("Compare", False, f"{__name__}.compare.page"),
    "train": Page("Train", False, f"{__name__}.train.page"),
}
