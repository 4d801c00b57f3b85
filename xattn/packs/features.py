"""The features of a pack's photos, float16 (M, d), read from their file and checked by their hash."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from xattn.packs.contained_files import AGAIN, PackError, PackFolder, why
from xattn.packs.manifest import DamagedFile
from xattn.runtime.tensor_file import TensorFile


def read_features(
    files: PackFolder, name: str, shape: tuple[int, int], sha256: str
) -> NDArray[np.float16]:
    """The tensor "features" of the safetensors file ``name``.

    Raises:
        PackError: it is missing, of another shape, not what was written, or not finite.
    """
    try:
        stored = TensorFile(partial(files.open, name))
        found = stored.shape("features")
        if found != shape:
            raise ValueError(f"its features have the shape {found}, not {shape}")
        values = stored.read("features", sha256)
    except PackError:
        raise
    except (ValueError, OSError) as error:
        message = f"{name} is damaged ({why(error)}); copy the pack again, or {AGAIN}"
        raise DamagedFile(name, why(error), message) from None
    if not np.isfinite(values).all():
        raise DamagedFile(name, "the features are not finite")
    return values.astype(np.float16)
