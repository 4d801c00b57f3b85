"""Attention mechanisms, one file each, behind one operator interface; see :func:`create_attention`."""

import lazy_loader

from xattn.attention.record import record as record  # which is called like its module

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
