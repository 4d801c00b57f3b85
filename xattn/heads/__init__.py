"""Explanation heads: small trainable modules that read a frozen backbone's taps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
