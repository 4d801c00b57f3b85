"""The state that all pages share: the settings of the process, the open pack, and views as URLs.

A view is a page with its query parameters. Pages read ``Context.params``, and switch to other views with
``go``. Names from files and models are untrusted text, which ``plain`` makes safe for Markdown.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar, cast
from urllib.parse import urlencode

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from xattn.runtime.names import visible
from xattn.runtime.stores import StorePath

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.packs.reader import Pack

DEFAULT_PAGE = "gallery"
CHOSEN = "chosen"  # the parameter for the selected photos, see :mod:`xattn.app.navigation.chosen`
Made = TypeVar("Made", bound=Callable[..., Any])
SCRIPT = Path(__file__).parent / "script" / "run.py"  # for App and AppTest.from_file
_PAGES = "xattn.app.pages"


class Page(NamedTuple):
    """A page of the viewer.

    ``shows_pack`` is True if it needs an open pack, and ``icon`` is a name from Material Symbols.
    """

    title: str
    shows_pack: bool
    module: str
    icon: str = "pageview"


PAGES = {
    "gallery": Page("Gallery", True, f"{_PAGES}.gallery.page", "grid_view"),
    "image": Page("Image", True, f"{_PAGES}.image.page", "image"),
    "attention": Page("Attention", True, f"{_PAGES}.attention", "center_focus_weak"),
    "answer": Page("Answer", True, f"{_PAGES}.answer", "chat"),
    "whatif": Page("What if", True, f"{_PAGES}.whatif.page", "brush"),
    "mistakes": Page("Mistakes", True, f"{_PAGES}.mistakes", "rule"),
    "photomap": Page("Map", True, f"{_PAGES}.photomap.page", "scatter_plot"),
    "runs": Page("Two runs", True, f"{_PAGES}.runs", "difference"),
    "live": Page("Live", False, f"{_PAGES}.live.page", "add_a_photo"),
    "compare": Page("Compare", False, f"{_PAGES}.compare.page", "leaderboard"),
    "train": Page("Train", False, f"{_PAGES}.train.page", "model_training"),
}


class ModelArgs(Protocol):
    """The model options of the command line (``BackboneArgs``)."""

    backbone: str
    weights: str
    taps: tuple[str, ...]
    input_size: int | None

    def load(self) -> Any: ...


@dataclass(frozen=True)
class Settings:
    """The settings with which this process was started."""

    root: Path | StorePath
    model: ModelArgs | None = None
    training: bool = True
    demo: bool = False
    data: Path | None = None  # the folder with photos for training; None: the root
    imports: tuple[str, ...] = ()  # files and modules given with --import, for jobs
    annotations: Path | None = None  # masks or boxes of photos
    vlm: str | None = None  # a vision-language model, in the form that xattn.load_vlm accepts
    detector: str | None = None  # in the form that xattn explain --detector accepts

    @property
    def local_root(self) -> Path:
        """The root or, if the root is in a store, the local folder for new results."""
        return self.root if isinstance(self.root, Path) else Path("runs")


_settings: Settings | None = None


def configure(settings: Settings) -> None:
    """Set the settings of this process; ``xattn app`` does this before it starts the server."""
    global _settings
    _settings = settings


def settings() -> Settings:
    """The settings of this process; by default, the root is ``runs``."""
    return _settings or Settings(root=Path("runs"))


def cache_by_version(entries: int, spinner: str | bool = False) -> Callable[[Made], Made]:
    """A decorator for functions of a pack that caches their results until the pack's version changes."""
    version: dict[str | type[Any], Callable[[Any], Any]]
    version = {"xattn.packs.reader.Pack": lambda pack: (pack.id, pack.version)}
    cached = st.cache_resource(max_entries=entries, show_spinner=spinner, hash_funcs=version)
    return cast(Callable[[Made], Made], cached)


def library() -> Library:
    """The library of packs in the root, which all sessions of the process share."""
    return _library(settings().root)


@functools.lru_cache(maxsize=8)
def _library(root: Path | StorePath) -> Library:
    from xattn.app.library import Library
    from xattn.app.remote_library import RemoteLibrary

    return RemoteLibrary(root) if isinstance(root, StorePath) else Library(root)


@dataclass(frozen=True)
class Context:
    """The arguments of a page: the library, the open pack, and the last value of each URL parameter."""

    library: Library
    pack: Pack | None = None
    params: Mapping[str, str] = field(default_factory=dict)


Value = str | int | float | bool | None | Iterable[str | int | float]


def _query(params: Mapping[str, Value]) -> dict[str, str | list[str]]:
    """Parameters as texts for a URL; None and empty lists are left out."""
    found: dict[str, str | list[str]] = {}
    for name, value in params.items():
        if value is None:
            continue
        if isinstance(value, (str, int, float)):
            found[name] = str(value).lower() if isinstance(value, bool) else str(value)
        elif values := [str(v) for v in value]:
            found[name] = values
    return found


def link(page: str, /, **params: Value) -> str:
    """The path and query of a view, for use in ``href`` and for sharing."""
    base = str(st.get_option("server.baseUrlPath") or "").strip("/")
    path = "/".join(["", *([base] if base else []), "" if page == DEFAULT_PAGE else page])
    query = urlencode(_query(params), doseq=True)
    return f"{path}?{query}" if query else path


def current_page() -> str:
    """The name of the current page."""
    return st.session_state.get("_page", DEFAULT_PAGE)


def go(page: str, /, **params: Value) -> NoReturn:
    """Show another view; this ends the current run of the script.

    If ``pack`` is not given, the open pack stays open and its selected photos stay selected. If the page
    stays the same, widgets that are bound to the URL keep their values and parameters.
    """
    if "pack" not in params:
        kept = {"pack": st.session_state.get("_pack"), CHOSEN: st.query_params.get(CHOSEN)}
        params = kept | params
    query = _query(params)
    context = get_script_run_ctx()
    if context is not None:
        # Widgets are unbound first, since a parameter cannot be set while a widget is bound to it.
        with context.session_state.query_params() as current:
            for name in {*current, *query}:
                binding = current.get_binding_for_param(name)
                if binding is None:
                    continue
                current.unbind_widget(binding.widget_id)
                if page == current_page():
                    query.pop(name, None)
                    if name in current:
                        query[name] = current.get_all(name)
    st.switch_page(page_object(page), query_params=query)
    raise AssertionError("st.switch_page ends the run")


def page_object(name: str) -> Any:
    """The page ``name`` as an object for ``st.switch_page`` and ``st.page_link``."""
    # Streamlit identifies a page only by its url_path, and runs the function given to st.navigation.
    return st.Page(lambda: None, title=name, url_path=name, default=name == DEFAULT_PAGE)


def restore_widgets(*keys: str) -> None:
    """Set the values of widgets again before the widgets are created.

    A value is sent to the browser only in the run that sets it, and the browser may miss this run if the
    next one follows at once. In addition, a widget that is not shown in a run would lose its value.
    """
    for key in keys:
        if key in st.session_state:
            st.session_state[key] = st.session_state[key]


def current_key(what: str) -> str:
    """The key of the widget that is currently shown, see :func:`widget_key`."""
    return f"{what} {st.session_state.get('_replaced', {}).get(what, 0)}"


def widget_key(what: str, value: Any, same: Callable[[Any, Any], bool] = operator.eq) -> str:
    """The key of a widget that shows ``value``; the key is new if the previous widget has another value.

    With each click, a browser sends the values of all widgets, including outdated ones. If a value was
    changed by something other than its widget, the outdated value would be mistaken for a choice of the
    user.
    """
    key = current_key(what)
    if key in st.session_state and not same(st.session_state[key], value):
        numbers = st.session_state.setdefault("_replaced", {})
        numbers[what] = numbers.get(what, 0) + 1
    return current_key(what)


_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+\-.!|~$:&@/^=\"'])")
# Places inside addresses that Streamlit turns into links even if their punctuation is escaped.
_ADDRESS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@[-\w.]*[^\W\d_])", re.IGNORECASE)
_JOINER = "\u2060"  # the word joiner, which has no width and allows no line break


def plain(text: object) -> str:
    """Escape a text for Markdown (labels, captions, help) so that it is shown literally and on one line.

    Every character with a special meaning in Markdown, HTML, LaTeX or Streamlit's directives is escaped,
    addresses do not become links, and control characters are made visible.
    """
    shown = _ADDRESS.sub(_JOINER, visible(" ".join(str(text).split())))
    return _MARKDOWN.sub(r"\\\1", shown)


def short(name: str) -> str:
    """The first name of a class: "tabby" for "tabby, tabby cat"."""
    return name.split(",")[0].strip() or name
