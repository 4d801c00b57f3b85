"""Whole networks, the sources of their pretrained weights, and the heads that ship with xattn."""

from xattn.models.weights import (
    PackageWeights,
    list_package_weights,
    load_weight_file,
    package_weights,
)

__all__ = ["PackageWeights", "list_package_weights", "load_weight_file", "package_weights"]
