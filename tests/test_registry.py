"""Things by name: lookups, near matches, options, and what installed packages add."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xattn.registry import Registry, options_of
from xattn.runtime.names import did_you_mean, near_names


class Shape:
    """What this file's registries hold."""

    def __init__(self, side: int) -> None:
        self.side = side


@dataclass(frozen=True)
class Entry:
    name: str
    corners: tuple[int, ...] = ()


class Square(Shape):
    def __init__(self, side: int, *, filled: bool = True, border: int = 1) -> None:
        super().__init__(side)
        self.filled = filled


class Circle(Shape):
    pass


def shapes(**options: Any) -> Registry[Shape, Entry]:
    options = {"group": "xattn.test_shapes", "argument": "shape", "noun": "shape", **options}
    registry: Registry[Shape, Entry] = Registry(given=("side",), **options)
    registry.add(Square, Entry("square", (4,)))
    registry.add(Circle, Entry("circle"))
    return registry


def message(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------- names


def test_a_name_gives_its_class_and_its_entry():
    registry = shapes()
    assert registry.get("square") is Square and registry.entry("square").corners == (4,)
    assert registry.names() == list(registry) == ["circle", "square"] and len(registry) == 2
    assert "square" in registry and "sphere" not in registry and 3 not in registry
    assert [entry.name for entry in registry.entries()] == ["circle", "square"]


def test_an_ordered_registry_lists_names_as_they_came():
    assert shapes(ordered=True).names() == ["square", "circle"]


def test_late_registration_by_decorator():
    registry = shapes()
    tables = registry.classes(), registry.table(lambda entry: {entry.name: entry.corners})
    assert "triangle" not in tables[0]

    @registry.register(Entry("triangle", (3,)))
    class Triangle(Shape):
        pass

    assert Triangle.__name__ == "Triangle" and registry.get("triangle") is Triangle
    assert tables[0]["triangle"] is Triangle and tables[1]["triangle"] == (3,)
    assert list(tables[0]) == ["circle", "square", "triangle"] and len(tables[1]) == 3
    registry.remove("triangle")
    assert "triangle" not in registry and "triangle" not in tables[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sqare", "shape: unknown shape 'sqare'; did you mean square?"),
        ("zzz", "shape: unknown shape 'zzz'; choose one of circle, square"),
        ([], "shape: unknown shape []; choose one of circle, square"),
    ],
)
def test_an_unknown_name_gets_near_matches(name, expected):
    assert message(shapes().get, name) == message(shapes().entry, name) == expected


@pytest.mark.parametrize("typed", ["big_square", "Big-Square", "BIGSQUARE", "big square"])
def test_a_name_is_found_without_regard_to_case_hyphens_and_underscores(typed):
    registry = shapes()
    registry.add(type("Big", (Shape,), {}), Entry("big_square", (4, 4)))
    assert registry.name(typed) == "big_square" and typed in registry
    assert registry.entry(typed).corners == (4, 4) and registry.create(typed, 3).side == 3


def test_a_plus_is_spelt_out_and_names_that_are_alike_need_the_exact_one():
    registry = shapes()
    for name in ("square_plusplus", "two-d", "two_d"):
        registry.add(type(name, (Shape,), {}), Entry(name))
    assert registry.name("Square++") == "square_plusplus"
    assert registry.name("two-d") == "two-d" and registry.name("two_d") == "two_d"
    text = message(registry.get, "twoD")
    assert text.startswith("shape: unknown shape 'twoD'; did you mean two")


def test_near_names_are_alike_in_letters_or_hold_the_word():
    names = ["gradcam", "gradcam_plusplus", "kernel_shap", "random"]
    assert near_names("grad-cm", names) == ["gradcam"]  # not random, which is less like it
    assert near_names("SHAP", names) == ["kernel_shap"]
    assert near_names("chefer", names) == [] and near_names("", names) == []
    assert near_names("Grad_CAM", names, most=1) == ["gradcam"]
    assert did_you_mean("gradcam", names) == "did you mean gradcam or gradcam_plusplus?"
    assert (
        did_you_mean("x", ["a", "b"]) == "choose one of a, b"
        and did_you_mean("x", [], "no") == "no"
    )


def test_a_registry_may_know_more_of_a_name_that_it_lacks():
    registry = shapes(hint=lambda name: "a ball is a circle" if name == "ball" else "")
    assert message(registry.get, "ball") == "shape: unknown shape 'ball'; a ball is a circle"
    assert "choose one of" in message(registry.get, "zzz")


def test_a_registry_without_a_noun_or_without_names():
    registry: Registry[Shape, Entry] = Registry("xattn.nothing", argument="attention training")
    text = message(registry.get, "iat")
    assert text == "attention training: unknown 'iat'; it has no names yet"


def test_a_name_belongs_to_one_class_which_may_be_reloaded():
    registry = shapes()
    text = message(registry.add, Circle, Entry("square"))
    assert text.startswith("name: 'square' is taken by ") and "Square" in text and "Circle" in text
    reloaded = type("Square", (Shape,), {"__module__": Square.__module__})
    registry.add(reloaded, Entry("square"))
    assert registry.get("square") is reloaded
    assert message(registry.add, Circle, Entry("")) == "name: got ''; give a name such as 'mine'"


# ---------------------------------------------------------------------- options


def test_create_passes_options_on():
    square = shapes().create("square", 3, filled=False)
    assert isinstance(square, Square) and square.side == 3 and not square.filled


def test_an_option_that_the_constructor_lacks_is_named_with_all_it_has():
    text = message(shapes().create, "square", 3, fill=True)
    expected = "square does not take that option (fill); its options: filled, border"
    assert text == f"shape: {expected}; did you mean filled?"
    text = message(shapes(options_argument="options").create, "circle", 3, width=1)
    assert text == "options: circle does not take that option (width); its options: none"
    text = message(shapes().create, "circle", 3, a=1, b=2)
    assert text == "shape: circle does not take that option (a, b); its options: none"
    assert "(side)" in message(shapes().create, "square", 3, side=4), "given is no option"


def test_options_that_are_passed_on_are_those_of_the_next_class():
    class Tile(Square):
        def __init__(self, side: int, glaze: str = "matt", **options: Any) -> None:
            super().__init__(side, **options)

    class Anything(Shape):
        def __init__(self, **options: Any) -> None:
            pass

    class Wide(Anything, Square):
        pass

    assert options_of(Tile, ("side",)) == ("glaze", "filled", "border")
    assert options_of(Circle) == ("side",) and options_of(Shape, ("side",)) == ()
    assert options_of(Wide) == ("filled", "border"), "positional ones are for the subclass to give"
    assert options_of(type("Open", (), {"__init__": lambda self, **options: None})) is None


# ---------------------------------------------------------------------- installed packages


def distribution(folder: Path, name: str, points: str, **modules: str) -> None:
    """A distribution as pip installs it, with its entry points and its modules."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


MODULE = """
import test_registry as t
t.REGISTRY.register(t.Entry("hexagon", (6,)))(type("Hexagon", (t.Shape,), {}))
"""
CLASS = """
import test_registry as t
class Star(t.Shape): pass
"""
REGISTRY: Registry[Shape, Entry] = shapes()  # what the packages of the tests add to


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty folder on the path, and a registry that has not looked at it."""
    global REGISTRY

    def adopt(name: str, value: Any) -> None:
        if not (isinstance(value, type) and issubclass(value, Shape)):
            raise ValueError(f"{value!r} is no Shape")
        REGISTRY.add(value, Entry(name))

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    before = set(sys.modules)
    REGISTRY = shapes(adopt=adopt)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    importlib.invalidate_caches()


def test_a_module_and_a_class_of_other_packages(packages):
    points = "[xattn.test_shapes]\nhexagon = a_hexagon\nstar = a_star:Star\n[other]\nx = y\n"
    distribution(packages, "more-shapes", points, a_hexagon=MODULE, a_star=CLASS)
    assert REGISTRY.get("square") is Square and "a_star" not in sys.modules, "loaded when asked for"
    assert REGISTRY.create("star", 5).side == 5
    assert REGISTRY.names() == ["circle", "hexagon", "square", "star"]
    assert REGISTRY.entry("hexagon").corners == (6,) and not REGISTRY.failures()


def test_a_broken_package_is_one_warning_and_the_rest_goes_on(packages):
    broken = "raise ImportError('no\\nlibfoo')"
    distribution(packages, "a-broken", "[xattn.test_shapes]\noval = an_oval\n", an_oval=broken)
    points = "[xattn.test_shapes]\nstar = a_star:Star\n"
    distribution(packages, "b-good", points, a_star=CLASS)
    with pytest.warns(UserWarning) as caught:
        assert REGISTRY.names() == ["circle", "square", "star"]
    (warning,) = caught
    reason = "entry point 'oval' (an_oval) of a-broken failed (ImportError: no libfoo)"
    assert str(warning.message) == f"xattn.test_shapes: {reason}; everything else is loaded"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert message(REGISTRY.get, "oval") == f"shape: shape 'oval' cannot be loaded: {reason}"
        assert "choose one of circle, square" in message(REGISTRY.get, "ovl")
    assert REGISTRY.failures() == {("a-broken", "oval"): reason}


def test_a_package_that_exits_on_import_is_a_failure(packages):
    points = "[xattn.test_shapes]\noval = an_oval\n"
    distribution(packages, "a-quitter", points, an_oval="import sys; sys.exit('needs a display')")
    with pytest.warns(UserWarning, match="of a-quitter failed .SystemExit: needs a display."):
        assert REGISTRY.names() == ["circle", "square"]


def test_two_broken_packages_with_one_name_are_both_named(packages):
    points = "[xattn.test_shapes]\noval = {}\n"
    distribution(packages, "first", points.format("not_there"))
    distribution(packages, "second", points.format("nor_there"))
    with pytest.warns(UserWarning):
        REGISTRY.load()
    assert set(REGISTRY.failures()) == {("first", "oval"), ("second", "oval")}
    told = message(REGISTRY.get, "oval")
    assert "of first failed" in told and "of second failed" in told


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [
        ("a_thing:Missing", "", "AttributeError"),
        ("a_thing:Thing", "Thing = 3", "3 is no Shape"),
        ("not_there", "", "ModuleNotFoundError"),
        (
            "a_thing",
            "import test_registry as t\nt.REGISTRY.add(t.Circle, t.Entry('square'))",
            "'square' is taken by ",
        ),
    ],
)
def test_what_cannot_be_registered_is_named(packages, value, text, expected):
    distribution(packages, "odd", f"[xattn.test_shapes]\nthing = {value}\n", a_thing=text)
    with pytest.warns(UserWarning, match=expected):
        REGISTRY.load()
    assert expected in REGISTRY.failures()["odd", "thing"] and REGISTRY.get("square") is Square


def test_a_registry_without_adoption_wants_registered_classes(packages):
    points = "[xattn.test_shapes]\nstar = a_star:Star\n"
    distribution(packages, "unregistered", points, a_star=CLASS)
    with pytest.warns(UserWarning, match="a_star:Star is not registered; decorate it"):
        shapes().load()


def test_a_package_may_ask_the_registry_while_it_is_imported(packages):
    text = f"import test_registry as t\nassert 'square' in t.REGISTRY.names()\n{MODULE}"
    distribution(packages, "curious", "[xattn.test_shapes]\nhexagon = a_hexagon\n", a_hexagon=text)
    assert "hexagon" in REGISTRY


def test_threads_that_ask_first_all_see_every_name(packages):
    text = f"import time; time.sleep(0.05)\n{MODULE}"
    distribution(packages, "slow", "[xattn.test_shapes]\nhexagon = a_hexagon\n", a_hexagon=text)
    start, seen = threading.Barrier(4), []

    def ask() -> None:
        start.wait()
        seen.append(REGISTRY.get("hexagon"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4 and len(set(seen)) == 1


def test_it_is_importable_without_torch():
    code = "import sys, xattn.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
