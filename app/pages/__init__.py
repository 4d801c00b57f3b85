"""The pages of the viewer: for each a module with a function ``page(context)``."""

from typing import NamedTuple


class Page(NamedTuple):
    """A page: its title, whether it shows a pack (without one it is not called), its module, and its
    icon, a name of Material Symbols."""

    title: str
    shows_pack: bool
    module: str
    icon: str = "pageview"


PAGES = {
    "gallery": Page("Gallery", True, f"{__name__}.gallery.page", "grid_view"),
    "image": Page("Image", True, f"{__name__}.image.page", "image"),
    "attention": Page("Attention", True, f"{__name__}.attention", "center_focus_weak"),
    "whatif": Page("What if", True, f"{__name__}.whatif.page", "brush"),
    "mistakes": Page("Mistakes", True, f"{__name__}.mistakes", "rule"),
    "photomap": Page("Map", True, f"{__name__}.photomap.page", "scatter_plot"),
    "runs": Page("Two runs", True, f"{__name__}.runs", "difference"),
    "live": Page("Live", False, f"{__name__}.live.page", "add_a_photo"),
    "compare": Page("Compare", False, f"{__name__}.compare.page", "leaderboard"),
    "train": Page("Train", False, f"{__name__}.train.page", "model_training"),
}
