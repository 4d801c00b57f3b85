"""Sphinx settings: the pages of this folder, and an API reference from the docstrings (``make docs``).

``XATTN_DOCS_URL``, the address of the published site, gives it a switch between versions, and
``XATTN_DOCS_VERSION`` says which of them this build is (``deploy/publish_docs.py``).
"""

import inspect
import os
import re
import sys
from pathlib import Path

from docutils import nodes

from xattn.runtime.version import __version__

REPOSITORY = "https://github.com/OWNER/xattn"
ADDRESS = os.environ.get("XATTN_DOCS_URL", "").rstrip("/")
ABOUT = (
    "Explain image classifiers: heat maps by one call, and metrics that say how faithful they are."
)

project = "xattn"
release = version = os.environ.get("XATTN_DOCS_VERSION", __version__)
root_doc = "index"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.linkcode"]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = "xattn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "github_url": REPOSITORY,
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "search_bar_text": "Search the pages",
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
copyright = "The xattn authors, Apache-2.0"
html_sidebars = {"index": [], "sections/*": ["sidebar-nav-bs"]}
if ADDRESS:
    html_baseurl = f"{ADDRESS}/latest/"
    html_theme_options["switcher"] = {
        "json_url": f"{ADDRESS}/switcher.json",
        "version_match": release,
    }
    html_theme_options["check_switcher"] = False  # it may not be published yet
    html_theme_options["navbar_end"] = ["version-switcher", "theme-switcher", "navbar-icon-links"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks show their stored outputs
autodoc_default_options = {"members": True}
autodoc_member_order = "groupwise"
napoleon_numpy_docstring = False


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The address in the repository of what the API reference documents."""
    value = sys.modules.get(info["module"])
    for name in info["fullname"].split("."):
        value = getattr(value, name, None)
    try:
        value = inspect.unwrap(value)
        path = Path(inspect.getsourcefile(value) or "").relative_to(Path(__file__).parents[1])
        lines, first = inspect.getsourcelines(value)
    except (TypeError, ValueError, OSError):  # an attribute, or not of this project
        return None
    return f"{REPOSITORY}/blob/main/{path.as_posix()}#L{first}-L{first + len(lines) - 1}"


def first_sentence(document: nodes.document) -> str:
    """What a page says first, on one line."""
    for paragraph in document.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        own = isinstance(paragraph.parent, nodes.section) and not paragraph.next_node(nodes.image)
        if text and own:
            return re.split(r"(?<=[.?!]) (?=[A-Z`])", text)[0].rstrip(":")
    return ""


def write_llms(app, error) -> None:
    """Write ``llms.txt`` (llmstxt.org) beside the pages: what xattn is, and what every page says."""
    if error or app.builder.format != "html":
        return
    base = f"{ADDRESS}/latest/" if ADDRESS else ""
    parts: dict[str, list[str]] = {}
    for name in sorted(app.env.found_docs):
        folder = name.rpartition("/")[0]
        if name == root_doc or folder == "sections":
            continue
        about = first_sentence(app.env.get_doctree(name))
        title = app.env.titles[name].astext()
        parts.setdefault(folder, []).append(f"- [{title}]({base}{name}.html): {about}")
    titles = {"": "Pages", "api": "API reference", "results": "Results"}
    lines = [f"# {project}", "", f"> {ABOUT}", "", f"Version {release}. Source: {REPOSITORY}"]
    for folder, pages in parts.items():
        lines += ["", f"## {titles.get(folder, folder.capitalize())}", "", *pages]
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app) -> None:
    """What Sphinx calls first."""
    app.connect("build-finished", write_llms)
