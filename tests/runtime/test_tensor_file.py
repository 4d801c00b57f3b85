"""Hostile headers of safetensors files: none makes the reader request more than the file holds."""

import io
import json

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, save

from xattn.runtime.tensor_file import TensorFile


def f32(*shape, at=(0, 0)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(at)}


def file(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def opened(data):
    return TensorFile(lambda: io.BytesIO(data))


def test_tensors_in_any_order_and_empty_ones_are_read():
    values = {"b": np.arange(6.0).reshape(2, 3), "a": np.ones((1, 0)), "c": np.ones(2, np.float16)}
    found = opened(save(values))
    assert [found.shape(name) for name in ("a", "b", "c", "d")] == [(1, 0), (2, 3), (2,), None]
    for name, expected in values.items():
        np.testing.assert_array_equal(found.read(name), expected)


@pytest.mark.parametrize(
    "header, size",
    [
        ({"a": f32(4, at=(0, 16)), "b": f32(4, at=(0, 16))}, 16),  # a file of n maps of one place
        ({"a": f32(4, at=(0, 16)), "b": f32(4, at=(8, 24))}, 24),
        ({"a": f32(4, at=(8, 24))}, 24),  # a hole
        ({"a": f32(4, at=(0, 16))}, 24),
        ({"a": f32(10**9, at=(0, 4 * 10**9))}, 16),
        ({"a": f32(2**62, 4, at=(0, 0))}, 0),
    ],
)
def test_tensors_that_overlap_or_do_not_fill_the_file_are_refused(header, size):
    data = file(header, bytes(size))
    with pytest.raises(ValueError, match="header says"):
        opened(data)
    with pytest.raises(SafetensorError):
        load(data)


@pytest.mark.parametrize("shape", [[0, *[10**4000] * 200], [1] * 100, [10**30, 0]])
def test_a_shape_that_no_map_has_is_refused_before_it_is_multiplied(shape):
    with pytest.raises(ValueError, match="not a tensor of floats"):
        opened(file({"a": f32(*shape, at=(0, 4 if 0 not in shape else 0))}, bytes(4)))
