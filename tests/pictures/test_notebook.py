"""What a notebook shows of explanations."""

import io
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image
from small_explanations import make

from xattn.explaining.photos import Explanations
from xattn.pictures import notebook


def opened(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def test_numpy_is_the_map_on_the_photo():
    explanation = make()
    found = explanation.numpy()
    assert found.dtype == np.float32 and found.shape == (60, 90)
    np.testing.assert_array_equal(found, explanation.on_photo())
    assert np.isnan(found).any() and np.nanmax(found) <= 1


def test_a_figure_has_photo_map_and_bar_and_leaves_pyplot_alone():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums(), matplotlib.get_backend()
    drawn = make().figure(width=6)
    assert (pyplot.get_fignums(), matplotlib.get_backend()) == before
    photo, overlay, bar = drawn.axes
    np.testing.assert_array_equal(photo.images[0].get_array(), np.asarray(make().photo()))
    np.testing.assert_array_equal(overlay.images[0].get_array(), np.asarray(make().overlay()))
    assert bar.get_ylabel() == "map, min-max" and drawn.get_figwidth() == 6
    assert drawn.get_suptitle() == "tabby: 25.0%"
    stream = io.BytesIO()
    drawn.savefig(stream, format="png")
    assert opened(stream.getvalue()).width == 600


def test_figures_are_drawn_from_threads():
    def drawn(seed):
        stream = io.BytesIO()
        make(seed=seed).figure(width=3).savefig(stream, format="png", metadata={"Software": None})
        return stream.getvalue()

    alone = [drawn(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(drawn, range(3))) == alone


def test_one_explanation_shows_its_photo_and_its_map():
    page = make(image_id="a<b")._repr_html_()
    assert page.count("<img") == 2 and "tabby</b> 25.0%" in page and "a&lt;b.png" in page
    assert opened(make()._repr_png_()).width > 2 * notebook.SIDE


def test_a_list_is_a_grid():
    found = Explanations(make(image_id=f"photo{i}", seed=i) for i in range(6))
    page = found._repr_html_()
    assert page.count("<img") == 6 and page.count("display:flex") == 2, "4 and 2 overlays"
    several = Explanations(make(target=i) for i in range(3))
    assert several._repr_html_().count("<img") == 4, "the photo once, and its three maps"
    many = Explanations(make(image_id=f"photo{i}") for i in range(30))
    assert many._repr_html_().count("<img") == notebook.SHOWN and "and 6 more" in many._repr_html_()
    assert opened(found._repr_png_()).height < opened(many._repr_png_()).height
    assert Explanations()._repr_html_() is None and Explanations()._repr_png_() is None


def test_a_value_that_is_no_probability_is_shown_as_it_is():
    age = replace(
        make(method_title="Explanation head"), probability=41.25, protocol={"probability": "value"}
    )
    page = age._repr_html_()
    assert "41.25 · Explanation head" in page and "%" not in re.sub(
        r"base64,[^\"]*|max-width:100%", "", page
    )
    assert age.figure(width=2).get_suptitle() == "tabby: 41.25"
    assert opened(age._repr_png_()).width > notebook.SIDE


def test_maps_without_a_photo_are_shown_alone():
    alone = replace(make(), source=None)
    assert alone._repr_html_().count("<img") == 1
    assert re.search(r"data:image/\w+;base64,", alone._repr_html_())
    assert opened(alone._repr_png_()).width > notebook.SIDE
    with pytest.raises(ValueError, match="^source: the pixels of cat are not available"):
        alone.figure()
