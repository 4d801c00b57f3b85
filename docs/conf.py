"""Sphinx settings: the pages of this folder, and an API reference from the docstrings (``make docs``)."""

project = "xattn"
root_doc = "index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "alabaster"
html_theme_options = {
    "page_width": "1200px",
    "sidebar_width": "260px",
    "sidebar_includehidden": False,
}
myst_heading_anchors = 4
autodoc_default_options = {"members": True}
autodoc_member_order = "groupwise"
napoleon_numpy_docstring = False
