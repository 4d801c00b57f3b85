"""Reading odd and damaged files, timm's evaluation crop, and the way back to the photo."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.backbone import Preprocessing
from xattn.photos import images
from xattn.photos import view as view_module
from xattn.photos.images import list_images, load_image
from xattn.photos.sources import open_photos
from xattn.photos.view import View, make_view, prepare

SQUARE = Preprocessing(input_size=(224, 224), crop_pct=0.875, interpolation="bicubic")


def noise(height, width, mode="RGB", seed=0):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values, mode if mode != "L" else None)


def pixel(image, xy=(0, 0)):
    return image.getpixel(xy)


# ---------------------------------------------------------------------- listing


def test_a_folder_is_searched_recursively_sorted_and_without_hidden_files(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/c.webp", ".hidden.png", ".dir/x.png", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    names = [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)]
    assert names == ["a/c.webp", "a/z.JPG", "b.png"]


def test_a_list_file_names_images_relative_to_itself_with_optional_labels(tmp_path):
    for name in ("one.png", "two words.png", "three.png", "four.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list.txt").write_text(
        "\ufeffone.png 3\n\n# comment\ntwo words.png\ntwo words.png 7\nthree.png\tcat a\n"
        f"{tmp_path / 'four.png'} 1\n",
        encoding="utf-8",
    )
    names = [p.name for p in list_images(tmp_path / "list.txt")]
    assert names == ["one.png", "two words.png", "two words.png", "three.png", "four.png"]


def test_missing_and_empty_paths_raise_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images: no file or folder .*nowhere"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"images: no image in folder"):
        list_images(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"names no image"):
        list_images(tmp_path / "empty.txt")
    for line in ("absent.png 3", f"absent.png {'x' * 5000}"):
        (tmp_path / "wrong.txt").write_text(line + "\n")
        with pytest.raises(FileNotFoundError, match=r"line 1 of .*absent\.png"):
            list_images(tmp_path / "wrong.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match=r"UTF-8"):
        list_images(tmp_path / "binary.txt")


# ---------------------------------------------------------------------- reading


def test_unreadable_files_raise_and_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image: no file .*gone\.jpg"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match=r"is a folder"):
        load_image(tmp_path)
    for content in (b"", b"hello, I am text", b"\x80\x04\x95pickle", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        (tmp_path / "fake.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"fake\.jpg is not an image"):
            load_image(tmp_path / "fake.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif"])
def test_a_truncated_file_raises_value_error(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise(60, 80).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} is (truncated or damaged|not an image)"):
        load_image(path)


def test_a_bomb_is_refused_from_its_header_without_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 10_000)).save(path)  # 200 MP in a few kilobytes
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"bomb\.png .*max_pixels"):
            load_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS
    noise(40, 50).save(tmp_path / "small.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"50 x 40 pixels, over max_pixels=1999"):
        load_image(tmp_path / "small.png", max_pixels=1999)


def test_the_default_cap_is_forty_megapixels():
    with pytest.raises(ValueError, match=r"max_pixels=40000000"):
        load_image(Image.new("1", (8001, 5000)))


def test_grey_palette_and_transparent_images_become_rgb_over_white(tmp_path):
    grey = tmp_path / "grey.png"
    Image.new("L", (3, 2), 77).save(grey)
    assert pixel(load_image(grey)) == (77, 77, 77)
    clear = tmp_path / "clear.png"
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(clear)
    assert [pixel(load_image(clear), (x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]
    half = load_image(Image.new("LA", (1, 1), (0, 128)))
    assert pixel(half) == (127, 127, 127)
    palette = tmp_path / "palette.png"
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(palette, transparency=1)
    assert [pixel(load_image(palette), (x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]
    assert pixel(load_image(Image.new("1", (1, 1), 1))) == (255, 255, 255)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    path = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=95)
    red, green, blue = pixel(load_image(path), (8, 8))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257 * 100, 257 * 200, 65535]], dtype=np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [0, 100, 200, 255]


def test_32_bit_and_float_grey_are_scaled_by_their_range():
    def grey(values, dtype):
        return np.asarray(load_image(Image.fromarray(np.array([values], dtype))))[0, :, 0].tolist()

    assert grey([0, 7, 255], np.int32) == [0, 7, 255]
    assert grey([0, 25700, 65535], np.int32) == [0, 100, 255]
    assert grey([-1000, 0, 1000], np.int32) == [0, 128, 255]
    assert grey([0, 0.4, 1], np.float32) == [0, 102, 255]
    assert grey([0, 100, 255], np.float32) == [0, 100, 255]
    assert grey([-4, 0, 4], np.float32) == [0, 128, 255]
    with pytest.raises(ValueError, match=r"NaN"):
        grey([0, np.nan], np.float32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:10, :15] = 255  # white corner at the top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.jpg", exif=exif)
    image = np.asarray(load_image(tmp_path / "turned.jpg"))
    assert image.shape == (40, 60, 3)
    assert image[:8, :12].mean() > 250 and image[12:].mean() < 3


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 5), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixel(load_image(tmp_path / "moving.gif")) == (255, 0, 0)


def test_a_given_image_is_not_changed():
    image = noise(4, 5, "RGBA")
    before = image.tobytes()
    load_image(image)
    assert image.mode == "RGBA" and image.tobytes() == before


def test_threads_may_share_an_image_that_is_not_decoded_yet(tmp_path):
    noise(300, 400).save(tmp_path / "a.png")
    expected = load_image(tmp_path / "a.png").tobytes()
    for _ in range(10):
        shared = Image.open(tmp_path / "a.png")
        found = [f.result() for _, f in images.read_ahead(load_image, [shared] * 4, 4, threads=4)]
        assert all(image.tobytes() == expected for image in found)


# ---------------------------------------------------------------------- the model's crop


@pytest.mark.parametrize("size", [(333, 500), (500, 333), (224, 224), (97, 1301), (1, 1), (31, 30)])
@pytest.mark.parametrize(
    "preprocessing",
    [
        SQUARE,
        Preprocessing((160, 160), crop_pct=0.95, interpolation="bilinear"),
        Preprocessing((224, 224), crop_pct=1.0, crop_mode="squash"),
        Preprocessing((224, 224), crop_pct=0.9, crop_mode="squash"),
        Preprocessing((224, 224), crop_pct=0.95, crop_mode="border"),
        Preprocessing((96, 160), crop_pct=0.875, interpolation="lanczos"),
    ],
    ids=["center", "bilinear", "squash", "squash.9", "border", "non-square"],
)
def test_crop_has_the_pixels_of_timms_transform(size, preprocessing):
    from timm.data import create_transform

    image = noise(*size)
    transform = create_transform(
        input_size=(3, *preprocessing.input_size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        mean=preprocessing.mean,
        normalize=False,
    )
    expected = transform(image)
    expected = expected.float().div(255) if expected.dtype == torch.uint8 else expected
    tensor, view = prepare(image, preprocessing)
    assert tensor.shape == (3, *preprocessing.input_size) and tensor.dtype == torch.float32
    assert view.photo_size == size
    assert torch.equal(tensor, expected)


def test_whole_squeezes_the_entire_photo():
    tensor, view = prepare(noise(40, 90), SQUARE, mode="whole")
    expected = noise(40, 90).resize((224, 224), Image.Resampling.BICUBIC)
    assert np.array_equal((tensor * 255).round().byte().permute(1, 2, 0), np.asarray(expected))
    assert view.photo_box == (0, 0, 40, 90)
    with pytest.raises(ValueError, match=r"view: got 'middle'"):
        prepare(noise(4, 4), SQUARE, mode="middle")


def test_a_long_strip_is_prepared_without_resizing_all_of_it(monkeypatch):
    tensor, view = prepare(noise(20, 8000), SQUARE)
    assert view.resized == (256, 102400)
    assert tensor.shape == (3, 224, 224) and tensor.std() > 0.1
    monkeypatch.setattr(view_module, "DIRECT_PIXELS", 10**9)
    assert (tensor - prepare(noise(20, 8000), SQUARE)[0]).abs().max() <= 1 / 255 + 1e-6


def test_an_unknown_interpolation_is_named():
    with pytest.raises(ValueError, match=r"interpolation: got 'cubic'"):
        prepare(noise(4, 4), Preprocessing(interpolation="cubic"))


# ---------------------------------------------------------------------- the way back


def spot(size, centre):
    """A dark photo with one bright Gaussian spot, wide enough to survive the resize."""
    y, x = np.mgrid[: size[0], : size[1]]
    radius = max(2.0, min(size) / 30)
    value = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * radius**2))
    return Image.fromarray(np.rint(255 * np.stack([value] * 3, -1)).astype(np.uint8))


@pytest.mark.parametrize("mode", ["crop", "whole"])
@pytest.mark.parametrize(
    "size, centre",
    [
        ((333, 500), (120, 300)),
        ((500, 333), (301, 60)),
        ((64, 48), (20, 30)),
        ((20, 8000), (12, 4003)),
        ((1500, 900), (700, 200)),
    ],
)
def test_a_bright_spot_comes_back_where_it_was(size, centre, mode):
    tensor, view = prepare(spot(size, centre), SQUARE, mode)
    back = view.to_photo(tensor.mean(0))
    assert back.shape == size and back.dtype == np.float32
    found = np.unravel_index(np.nanargmax(back), size)
    # One input pixel is this many photo pixels: that is what the map can know.
    grain = [max(2.0, 1.5 * p / r) for p, r in zip(size, view.resized, strict=True)]
    assert abs(found[0] - centre[0]) <= grain[0] and abs(found[1] - centre[1]) <= grain[1]


@pytest.mark.parametrize("mode", ["crop", "whole"])
def test_a_cell_of_a_coarse_map_lands_on_its_region(mode):
    size = (300, 420)
    view = make_view(size, SQUARE, mode)
    grid = np.zeros((7, 7), np.float32)
    grid[2, 5] = 1
    back = np.nan_to_num(view.to_photo(grid))
    top, left, bottom, right = view.photo_box
    expected = (top + 2.5 / 7 * (bottom - top), left + 5.5 / 7 * (right - left))
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    centre = (y * back).sum() / back.sum(), (x * back).sum() / back.sum()
    assert np.allclose(centre, expected, atol=0.6)


def test_outside_the_crop_is_nan_and_inside_is_complete():
    view = make_view((333, 500), SQUARE)
    back = view.to_photo(np.ones((7, 7)))
    top, left, bottom, right = view.photo_box
    y, x = np.mgrid[:333, :500] + 0.5
    inside = (y >= top) & (y <= bottom) & (x >= left) & (x <= right)
    assert np.array_equal(~np.isnan(back), inside)
    assert np.allclose(back[inside], 1)
    assert 0.3 < inside.mean() < 0.8
    assert not np.isnan(make_view((333, 500), SQUARE, "whole").to_photo(np.ones((7, 7)))).any()


def test_mapping_agrees_with_torch_bilinear_where_the_photo_is_the_input():
    view = make_view((224, 224), Preprocessing(crop_pct=1.0))
    grid = torch.randn(3, 7, 9)
    expected = torch.nn.functional.interpolate(
        grid[None], (224, 224), mode="bilinear", align_corners=False
    )[0]
    assert np.allclose(view.to_photo(grid), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["crop", "whole"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 8000), (8000, 20)])
def test_tiny_and_extreme_photos_get_a_map(size, mode):
    tensor, view = prepare(noise(*size), SQUARE, mode)
    back = view.to_photo(np.arange(49.0).reshape(7, 7))
    assert back.shape == size and np.isfinite(back).any()
    assert np.nanmin(back) >= 0 and np.nanmax(back) <= 48
    assert tensor.isfinite().all() and 0 <= tensor.min() and tensor.max() <= 1


def dense(view, axis, cells, count):
    """The definition: the weight of every cell for every pixel inside, and which pixels those are."""
    start, length = view.box[axis], view.box[axis + 2]
    unit = view.resized[axis] / count
    centre = (np.arange(count) + 0.5) * unit - start
    inside = (centre >= 0) & (centre <= length)
    if not inside.any():
        inside = (centre + unit / 2 > 0) & (centre - unit / 2 < length)
    at = np.clip(centre[inside] * cells / length, 0, cells)
    support = max(1.0, unit * cells / length)
    distance = np.abs(at[:, None] - (np.arange(cells) + 0.5))
    weights = np.maximum(1 - distance / support, 0)
    return weights / weights.sum(1, keepdims=True), inside


@pytest.mark.parametrize("mode", ["crop", "whole"])
@pytest.mark.parametrize("cells", [(7, 9), (1, 30), (16, 1), (56, 61)])
@pytest.mark.parametrize("size", [(40, 61), (61, 40), (1, 300), (3, 2), (1, 1)])
def test_resampling_is_triangle_weights_of_every_cell(size, cells, mode):
    view = make_view((333, 500) if min(size) > 1 else size, SQUARE, mode)
    grid = np.random.default_rng(0).normal(size=(2, *cells))
    (rows, y), (columns, x) = (dense(view, i, cells[i], size[i]) for i in (0, 1))
    expected = np.full((2, *size), np.nan)
    expected[np.ix_([True, True], y, x)] = rows @ grid @ columns.T
    found = view.to_photo(grid, size)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_array_equal(view.to_photo(grid[1], size), found[1])


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 1)])
def test_a_map_of_one_long_side_takes_memory_by_its_cells(shape):
    view = make_view((500, 500), SQUARE, "whole")
    grid = np.ones(shape, np.float32)
    tracemalloc.start()
    back = view.to_photo(grid)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.allclose(back, 1, atol=1e-5)
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


def test_one_pixel_gets_the_average_of_a_fine_map():
    grid = np.random.default_rng(0).random((28, 28)).astype(np.float32)
    back = make_view((1, 1), SQUARE, "whole").to_photo(grid)
    assert abs(back[0, 0] - grid.mean()) < 0.05


def test_another_raster_over_the_same_photo():
    view = make_view((400, 600), SQUARE)
    full, small = view.to_photo(np.eye(7)), view.to_photo(np.eye(7), size=(100, 150))
    assert small.shape == (100, 150)
    blocks = full.reshape(100, 4, 150, 4).mean((1, 3))
    both = np.isfinite(blocks) & np.isfinite(small)
    assert both.any() and np.abs(blocks - small)[both].max() < 0.05


def test_a_view_survives_json():
    view = make_view((333, 500), SQUARE)
    assert View.from_json(json.loads(json.dumps(view.to_json()))) == view
    for bad in ({}, {**view.to_json(), "box": [1, 2]}, {**view.to_json(), "resized": [0, 1]}):
        with pytest.raises(ValueError, match=r"view: got"):
            View.from_json(bad)
    with pytest.raises(ValueError, match=r"map: got shape \(7,\)"):
        view.to_photo(np.ones(7))


def test_a_view_that_is_too_large_for_a_pack_names_the_size_of_the_photo():
    assert make_view((1, 3900), SQUARE).check_size().resized == (256, 998_400)
    with pytest.raises(ValueError, match=r"a photo of 20000 x 1 pixels has 5,120,000 x 256 when"):
        make_view((1, 20_000), SQUARE).check_size()
    make_view((1, 20_000), SQUARE, "whole").check_size()
    padded = View("crop", (9, 9), (9, 9), (-2_000_000, 0, 9, 9), (9, 9))
    with pytest.raises(ValueError, match=r"over the limit of 1,000,000 per side"):
        padded.check_size()


@pytest.mark.parametrize("data", [[torch.zeros(3, 8, 8)], torch.zeros(2, 3, 8, 8), 7, [None]])
def test_what_is_no_file_is_refused_in_one_line(data):
    with pytest.raises(
        ValueError, match=r"data: got (Tensor|int|NoneType); photos are read from files"
    ):
        open_photos(data)
