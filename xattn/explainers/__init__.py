"""Explainers: classes with Captum's ``attribute(inputs, target)`` that can be created by name."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
